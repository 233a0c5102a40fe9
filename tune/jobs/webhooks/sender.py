"""Sends what waits in the outbox, from the process that serves the API.

The event loop only ever waits for sockets here: the store is asked in threads, and a slow receiver holds up nothing
but its own message.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import httpx

from registry.errors import CapoError
from registry.threads import Threads
from tune.jobs.webhooks.outbox import Delivery, Outbox
from tune.jobs.webhooks.signing import signed_headers

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_AT_ONCE_PER_ENDPOINT = 2
"""So that a slow receiver holds up nobody's messages but its own."""
_THREADS = 2
"""One for looking what is due, one for what became of the last ones."""
_ATTEMPT_SECONDS = 15.0
"""For one attempt, from the first byte to the answer's status; receivers are expected to answer and work later."""
_TAKEN_SECONDS = 60.0
"""Longer than an attempt, so that two control processes never send one message at a time."""


class WebhookSender:
    """Run :meth:`run` as a task. No redirect is followed: a signed message goes where it was sent, or nowhere."""

    def __init__(
        self,
        outbox: Outbox,
        *,
        client: Callable[[], httpx.AsyncClient] = httpx.AsyncClient,
        poll_seconds: float = POLL_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outbox = outbox
        self._make_client = client
        self._poll_seconds = poll_seconds
        self._clock = clock
        self._threads = Threads("webhooks", _THREADS)
        self._running: dict[asyncio.Task[None], str] = {}
        """Sends under way, each with its endpoint's id."""

    async def run(self) -> None:
        """Send for ever; ends when it is cancelled, and what is on its way then is sent again later."""
        async with self._make_client() as client:
            try:
                while True:
                    await self._start_due(client)
                    await asyncio.sleep(self._poll_seconds)
            finally:
                for task in self._running:
                    task.cancel()
                await asyncio.gather(*self._running, return_exceptions=True)

    async def _start_due(self, client: httpx.AsyncClient) -> None:
        look = partial(
            self._outbox.take_due,
            Counter(self._running.values()),
            per_endpoint=_AT_ONCE_PER_ENDPOINT,
            for_seconds=_TAKEN_SECONDS,
        )
        try:
            due = await self._threads.run(look)
        except CapoError as error:
            logger.warning("webhooks wait, the job store cannot be read: %s", error)
            return
        for delivery in due:
            task = asyncio.create_task(self._send(client, delivery), name=f"webhook-{delivery.id}")
            self._running[task] = delivery.endpoint_id
            task.add_done_callback(self._running.pop)

    async def _send(self, client: httpx.AsyncClient, delivery: Delivery) -> None:
        reason = await self._attempt(client, delivery)
        try:
            if reason is None:
                await self._threads.run(self._outbox.delivered, delivery)
                return
            goes_on = await self._threads.run(self._outbox.failed, delivery, reason)
        except CapoError as error:  # it stays taken for a minute, and is sent once more then
            logger.warning("webhook %s: the job store cannot be written: %s", delivery.id, error)
            return
        level = logging.INFO if goes_on else logging.WARNING
        future = "is tried again" if goes_on else "is given up"
        logger.log(level, "webhook %s, attempt %d: %s; it %s", delivery.id, delivery.attempts, reason, future)

    async def _attempt(self, client: httpx.AsyncClient, delivery: Delivery) -> str | None:
        """``None`` where it was received, else why not. The answer's body is nobody's business and is not read."""
        headers = signed_headers(delivery.secret, delivery.id, delivery.payload, now=self._clock())
        headers |= {"content-type": "application/json", "user-agent": "Capo-Webhooks/1"}
        try:
            async with (
                asyncio.timeout(_ATTEMPT_SECONDS),
                client.stream(
                    "POST",
                    delivery.url,
                    content=delivery.payload.encode(),
                    headers=headers,
                    timeout=None,  # httpx would give up after 5 s of silence
                    follow_redirects=False,
                ) as response,
            ):
                if response.is_success:
                    return None
                return f"the receiver answered {response.status_code}"
        except TimeoutError:
            return f"no answer within {_ATTEMPT_SECONDS:g} s"
        except Exception as error:
            # An address that httpx cannot use fails in more ways than it lists, and must not be tried for ever.
            return f"{type(error).__name__}: {error}"
