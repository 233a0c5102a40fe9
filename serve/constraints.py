"""Tries out every new constraint on an answer (JSON schema, regex, grammar) where it can do no harm.

Neither the size nor the form of a constraint says what it costs. Seen with xgrammar 0.2.8 and a vocabulary of 2,048:
a schema of 300 strings with different ``maxLength`` (16 KB) compiles for minutes; a regex of 28 characters,
``([^a]{1,30}[^b]{1,30}){1,30}``, takes 0.7 s for each token, in the step that all requests share; a schema of 100
patterns (7 KB) blocks vLLM's event loop for 6 s while it is only being checked. So each one first goes to a process of
its own that does the same work, and is killed when it takes too long. What passed is remembered.

A constraint can still be slow on a path that the made-up answers of the trial did not take; then the engine's stall
watch (:mod:`serve.supervisor`) is what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from registry import errors
from serve.body_errors import formless
from serve.engine_errors import engine_dead, engine_reason
from serve.fair_line import FairLine

logger = logging.getLogger(__name__)

SLOWEST_TRIAL_SECONDS = 2.0
"""For checking, compiling and some 150 tokens of made-up answers together. Ordinary schemas take 0.01 s."""
SLOWEST_READING_SECONDS = 0.05
"""CPU time; vLLM reads a constraint on its event loop for each request anew. An ordinary schema of 64 KB takes 0.03 s,
128 tools 0.006 s."""
SLOWEST_STEP_SECONDS = 0.05
"""CPU time for one token; the engine spends it between two steps of everybody."""
LONGEST_WAIT_SECONDS = 10.0
"""In line behind the constraints of others: five that are stopped for their cost, hundreds of ordinary ones."""
_CLOCK_VERDICT_SECONDS = 60.0
"""How long it holds that a constraint took too long by the clock, or took its process along: it may have been the
machine that stood still, and a good schema must not be refused for ever."""
_START_SECONDS = 60.0
_REMEMBERED = 1024

Start = Callable[[], tuple[BaseProcess, Connection]]


def constraints_of(body: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Place, kind and specification of the constraints that a client gave. vLLM looks into them on the event loop while
    it reads the request.

    Raises:
        InvalidRequestError: ``body`` does not hold them as it should.
    """
    try:
        return list(_constraints_of(body))
    except (KeyError, AttributeError, TypeError) as error:
        raise formless(error) from error


def _constraints_of(body: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for kind, value in (body.get("structured_outputs") or {}).items():
        if value is not None:
            yield f"structured_outputs.{kind}", kind, value
    given = body.get("response_format") or {}
    if given.get("type") == "json_schema":
        yield "response_format.json_schema.schema", "json", given["json_schema"]["schema"]
    given = (body.get("text") or {}).get("format") or {}
    if given.get("type") == "json_schema":
        yield "text.format.schema", "json", given["schema"]


@dataclass(frozen=True, slots=True)
class _Refusal:
    reason: str
    code: str
    holds_until: float = math.inf
    """``time.monotonic()`` seconds."""


class ConstraintTrials:
    """Owns the trial process: started on first use, and again after each kill. All methods run on one event loop."""

    def __init__(
        self,
        start: Start,
        slowest_seconds: float = SLOWEST_TRIAL_SECONDS,
        longest_wait_seconds: float = LONGEST_WAIT_SECONDS,
    ) -> None:
        self._start = start
        self._slowest_seconds = slowest_seconds
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        """To the process once it is ready; until then its greeting would be taken for a verdict."""
        self._starting: asyncio.Task[Connection] | None = None
        self._is_closed = False
        self._longest_wait_seconds = longest_wait_seconds
        self._line = FairLine()
        self._outcomes: OrderedDict[bytes, _Refusal | None] = OrderedDict()

    async def check_all(self, constraints: Iterable[tuple[str, str, Any]], *, tenant: str) -> None:
        """:meth:`check` for each, given with its place in the request first."""
        for place, kind, specification in constraints:
            await self.check(kind, specification, place=place, tenant=tenant)

    async def check(self, kind: str, specification: Any, *, place: str | None = None, tenant: str = "") -> None:
        """Returns when ``specification`` may go to the engine. Tenants whose constraints are new take turns.

        Raises:
            InvalidRequestError: it is malformed, uses what the engine does not support, or costs too much; ``param`` is
                ``place``.
            UnavailableError: the process does not start, or its turn did not come in time. EngineDeadError: it ended
                with the engine.
        """
        key = hashlib.sha256(json.dumps([kind, specification], sort_keys=True).encode()).digest()
        if not self._knows(key):
            await self._judge(key, kind, specification, tenant)
        self._outcomes.move_to_end(key)
        if len(self._outcomes) > _REMEMBERED:
            self._outcomes.popitem(last=False)
        if (refusal := self._outcomes[key]) is not None:
            raise errors.InvalidRequestError(refusal.reason, param=place, code=refusal.code)

    def _knows(self, key: bytes) -> bool:
        if (known := self._outcomes.get(key)) is not None and time.monotonic() > known.holds_until:
            del self._outcomes[key]
        return key in self._outcomes

    async def _judge(self, key: bytes, kind: str, specification: Any, tenant: str) -> None:
        async with contextlib.AsyncExitStack() as held:
            try:
                await held.enter_async_context(self._line.turn(tenant, longest_wait_seconds=self._longest_wait_seconds))
            except TimeoutError:
                raise errors.UnavailableError(
                    f"Other constraints on answers that cost too much were before yours for "
                    f"{self._longest_wait_seconds:g} s. Try again shortly; each is tried out once only.",
                    code="constraints_busy",
                    retry_after_seconds=5,
                ) from None
            if not self._knows(key):
                self._outcomes[key] = await self._try(kind, specification)

    def close(self) -> None:
        """For good, with the engine: whoever waits for a verdict is told that the engine is gone."""
        self._is_closed = True
        self._kill()

    def _kill(self) -> None:
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.join(5)

    async def _try(self, kind: str, specification: Any) -> _Refusal | None:
        """Why the constraint is refused; ``None``: it is fine."""
        connection = await self._ready()
        try:
            connection.send((kind, specification))
            is_answered = await asyncio.to_thread(connection.poll, self._slowest_seconds)
            answer = connection.recv() if is_answered else None
        except (EOFError, OSError):
            self._raise_if_closed()
            self._kill()
            return _too_costly(kind, "more than its process survived", seconds=_CLOCK_VERDICT_SECONDS)
        except asyncio.CancelledError:
            self._kill()  # its answer would be taken for that of the next
            raise
        if not is_answered:
            self._raise_if_closed()
            self._kill()
            what = f"more than {self._slowest_seconds:g} s to prepare"
            return _too_costly(kind, what, seconds=_CLOCK_VERDICT_SECONDS)
        if answer is None:
            return None
        name, text = answer
        if name in ("TimeoutError", "MemoryError"):
            return _too_costly(kind, text or "too much memory")
        return _Refusal(f"The {_NAMES.get(kind, kind)} is not usable: {engine_reason(text)}", "invalid_constraint")

    async def _ready(self) -> Connection:
        """To a process that waits for a constraint."""
        self._raise_if_closed()
        if self._connection is not None and self._process is not None and self._process.is_alive():
            return self._connection
        if self._starting is None or self._starting.done():
            self._kill()
            self._starting = asyncio.create_task(self._begin())
            self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())  # marked as seen
        # When the client leaves that it began for, the next one needs the process.
        return await asyncio.shield(self._starting)

    async def _begin(self) -> Connection:
        self._process, connection = await asyncio.to_thread(self._start)
        is_ready = False
        if not self._is_closed:
            with contextlib.suppress(EOFError, OSError):
                is_ready = await asyncio.to_thread(connection.poll, _START_SECONDS) and connection.recv() == "ready"
        if is_ready and not self._is_closed:
            self._connection = connection
            return connection
        connection.close()
        self._kill()
        self._raise_if_closed()
        logger.error("the process that tries out constraints did not start")
        raise errors.UnavailableError(
            "Constraints on the answer cannot be checked just now.", code="unavailable", retry_after_seconds=5
        )

    def _raise_if_closed(self) -> None:
        if self._is_closed:
            raise engine_dead()


_NAMES = {
    "json": "JSON schema",
    "regex": "regular expression",
    "choice": "list of choices",
    "structural_tag": "grammar of the tools' calls",
}


def _too_costly(kind: str, what: str, *, seconds: float = math.inf) -> _Refusal:
    """Which holds for ``seconds``."""
    reason = (
        f"The {_NAMES.get(kind, kind)} costs too much: {what}. Use fewer and smaller bounds (maxLength, maxItems, "
        "{m,n}), fewer patterns, and no repetition within a repetition."
    )
    return _Refusal(reason, "constraint_too_slow", time.monotonic() + seconds)
