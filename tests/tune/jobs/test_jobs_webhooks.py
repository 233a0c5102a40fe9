"""Webhooks from the end of a job to a receiver that verifies them with the stock SDK."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from click.testing import Result
from openai import AsyncOpenAI, InvalidWebhookSignatureError, OpenAI
from openai.types.webhooks import FineTuningJobSucceededWebhookEvent
from sqlalchemy import select
from typer.testing import CliRunner

from capo.cli.webhooks import app
from tests.tune.jobs import standins
from tests.tune.jobs.receiver import Receiver, receiver
from tests.tune.jobs.sdk_types import assert_no_wrong_typed_field, assert_no_wrong_typed_fields
from tests.tune.jobs.support import TENANT, Place, add_file_row, chat_rows, wait_until
from tests.tune.jobs.test_jobs_worker import wait_for, worker
from tune.jobs.database import Database
from tune.jobs.queue import Outcome, WorkQueue
from tune.jobs.records import JobError, JobRecord
from tune.jobs.schema import webhook_deliveries
from tune.jobs.webhooks.endpoints import EVENT_TYPES, MAX_ENDPOINTS, EndpointRecord, EndpointStore
from tune.jobs.webhooks.outbox import LONGEST_PAUSE_SECONDS, RETRIED_SECONDS, Outbox, pause_after
from tune.jobs.webhooks.sender import WebhookSender


@pytest.fixture
def hooked() -> Iterator[Receiver]:
    with receiver() as found:
        yield found


def endpoint(place: Place, url: str, *, tenant: str = TENANT, events: tuple[str, ...] = EVENT_TYPES) -> EndpointRecord:
    return EndpointStore(place.database, tenant=tenant).create(name="n", url=url, event_types=events)


def ended(place: Place, how: str) -> JobRecord:
    """A job that ended this way."""
    queue = WorkQueue(place.database)
    job = place.queue_job(add_file_row(place.file_rows))
    if how == "cancelled":
        return place.store.cancel(job.id)
    held = queue.claim(job, owner="w", lease_seconds=30)
    assert held is not None
    if how == "succeeded":
        queue.succeed(held, Outcome("model@0123456789abcdef", 9, None))
    elif how == "failed":
        queue.fail(held, JobError("code", "text"))
    else:
        queue.end_cancelled(held)
    return place.store.job(job.id)


@asynccontextmanager
async def sending(place: Place, clock: Callable[[], float] = time.time) -> AsyncIterator[None]:
    sender = WebhookSender(
        Outbox(place.database, clock=clock),
        client=lambda: httpx.AsyncClient(trust_env=False, timeout=0.1),  # which must not shorten an attempt
        poll_seconds=0.02,
        clock=clock,
    )
    task = asyncio.create_task(sender.run())
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    await asyncio.to_thread(wait_until, condition, seconds=seconds)


def deliveries(database: Database) -> list[Any]:
    with database.read() as connection:
        return list(connection.execute(select(webhook_deliveries).order_by(webhook_deliveries.c.created_at)).all())


class TestTheMessage:
    @pytest.mark.parametrize("how", ["succeeded", "failed", "cancelled", "cancelled by its worker"])
    async def test_the_sdk_verifies_and_reads_it(self, place: Place, hooked: Receiver, how: str) -> None:
        made = endpoint(place, hooked.url)
        job = ended(place, how)
        async with sending(place):
            await until(lambda: hooked.messages)
            await until(lambda: deliveries(place.database)[0].status == "delivered")
        (message,) = hooked.messages
        with OpenAI(api_key="unused", webhook_secret=made.secret) as client:
            event: Any = client.webhooks.unwrap(message.body, message.headers)
            with pytest.raises(InvalidWebhookSignatureError):
                client.webhooks.unwrap(message.body + " ", message.headers)
        assert_no_wrong_typed_field(event)
        assert (event.type, event.data.id) == (f"fine_tuning.job.{how.split()[0]}", job.id)
        if how == "succeeded":
            assert isinstance(event, FineTuningJobSucceededWebhookEvent)
        assert event.created_at == job.finished_at
        assert message.headers["content-type"] == "application/json"
        assert message.path == "/hook"

    async def test_the_asynchronous_sdk_verifies_it_and_another_secret_does_not(
        self, place: Place, hooked: Receiver
    ) -> None:
        made = endpoint(place, hooked.url)
        ended(place, "succeeded")
        async with sending(place):
            await until(lambda: hooked.messages)
        (message,) = hooked.messages
        async with AsyncOpenAI(api_key="unused", webhook_secret=made.secret) as client:
            client.webhooks.unwrap(message.body, message.headers)
            other = endpoint(place, hooked.url).secret
            with pytest.raises(InvalidWebhookSignatureError):
                client.webhooks.unwrap(message.body, message.headers, secret=other)

    async def test_the_signature_is_that_of_the_specification(self, place: Place, hooked: Receiver) -> None:
        """Worked out here anew from the text of Standard Webhooks."""
        made = endpoint(place, hooked.url)
        ended(place, "failed")
        async with sending(place):
            await until(lambda: hooked.messages)
        (message,) = hooked.messages
        key = base64.b64decode(made.secret.split("_", 1)[1])
        assert len(key) == 32
        content = f"{message.headers['webhook-id']}.{message.headers['webhook-timestamp']}.{message.body}"
        expected = base64.b64encode(hmac.digest(key, content.encode(), hashlib.sha256)).decode()
        assert message.headers["webhook-signature"] == f"v1,{expected}"

    async def test_only_who_asked_for_this_end_and_owns_the_job_is_told(self, place: Place, hooked: Receiver) -> None:
        endpoint(place, f"{hooked.url}/failures", events=("fine_tuning.job.failed",))
        endpoint(place, f"{hooked.url}/other", tenant="other")
        endpoint(place, f"{hooked.url}/all")
        ended(place, "succeeded")
        async with sending(place):
            await until(lambda: hooked.messages)
            await asyncio.sleep(0.1)
        assert [message.path for message in hooked.messages] == ["/hook/all"]


class TestDelivery:
    async def test_it_is_tried_again_under_the_same_id_until_it_is_received(
        self, place: Place, hooked: Receiver
    ) -> None:
        made = endpoint(place, hooked.url)
        ended(place, "succeeded")
        hooked.answers = [500, 404, 302, 204]
        skipped = 0.0

        def clock() -> float:
            return time.time() + skipped

        async with sending(place, clock):
            for attempt in range(1, 5):
                await until(lambda attempt=attempt: len(hooked.messages) == attempt)
                if attempt < 4:
                    await until(lambda: deliveries(place.database)[0].last_error is not None)
                    await until(lambda: deliveries(place.database)[0].due_at < clock() + 60 + pause_after(4))
                    await asyncio.sleep(0.05)
                    assert len(hooked.messages) == attempt, "not before its pause is over"
                    skipped += pause_after(attempt) + 1
            await until(lambda: deliveries(place.database)[0].status == "delivered")
        assert len({message.headers["webhook-id"] for message in hooked.messages}) == 1
        assert len({message.body for message in hooked.messages}) == 1
        stamps = [int(message.headers["webhook-timestamp"]) for message in hooked.messages]
        assert stamps == sorted(set(stamps)), "each attempt is signed anew, for receivers that refuse old ones"
        with OpenAI(api_key="unused", webhook_secret=made.secret) as client:
            client.webhooks.verify_signature(hooked.messages[0].body, hooked.messages[0].headers)
        (delivery,) = deliveries(place.database)
        assert (delivery.attempts, delivery.last_error) == (4, "the receiver answered 302")

    async def test_a_redirect_is_not_followed(self, place: Place, hooked: Receiver) -> None:
        with receiver() as elsewhere:
            hooked.answers, hooked.location = [307] * 50, elsewhere.url
            endpoint(place, hooked.url)
            ended(place, "succeeded")
            async with sending(place):
                await until(lambda: deliveries(place.database)[0].last_error is not None)
                await asyncio.sleep(0.1)
            assert elsewhere.messages == []

    async def test_nobody_there_is_a_failed_attempt(self, place: Place) -> None:
        with receiver() as gone:
            url = gone.url
        endpoint(place, url)
        ended(place, "succeeded")
        async with sending(place):
            await until(lambda: deliveries(place.database)[0].last_error is not None)
        assert deliveries(place.database)[0].status == "waiting"

    async def test_an_address_that_cannot_be_used_is_a_failed_attempt_and_is_given_up(self, place: Place) -> None:
        """Endpoints from before such an address was refused."""
        endpoint(place, "http://xn--a/hook")
        ended(place, "succeeded")
        skipped = 0.0
        async with sending(place, lambda: time.time() + skipped):
            await until(lambda: deliveries(place.database)[0].last_error is not None)
            assert deliveries(place.database)[0].last_error.startswith("InvalidCodepoint: ")
            skipped = RETRIED_SECONDS
            await until(lambda: deliveries(place.database)[0].status == "given_up")

    async def test_a_receiver_may_think_for_longer_than_a_client_would_wait_by_itself(
        self, place: Place, hooked: Receiver
    ) -> None:
        endpoint(place, hooked.url)
        ended(place, "succeeded")
        hooked.holds.clear()
        async with sending(place):
            await until(lambda: hooked.messages)
            await asyncio.sleep(0.5)
            hooked.holds.set()
            await until(lambda: deliveries(place.database)[0].status == "delivered")
        (delivery,) = deliveries(place.database)
        assert (delivery.attempts, delivery.last_error) == (1, None)

    async def test_a_sender_that_dies_on_the_way_leaves_the_message_to_the_next(
        self, place: Place, hooked: Receiver
    ) -> None:
        endpoint(place, hooked.url)
        ended(place, "succeeded")
        hooked.holds.clear()
        async with sending(place):
            await until(lambda: hooked.messages)
        hooked.holds.set()
        async with sending(place):
            await asyncio.sleep(0.2)
            assert len(hooked.messages) == 1, "for a minute it counts as being on its way"
        async with sending(place, lambda: time.time() + 61):
            await until(lambda: deliveries(place.database)[0].status == "delivered")
        assert len({message.headers["webhook-id"] for message in hooked.messages}) == 1

    async def test_one_slow_receiver_holds_up_no_other_and_not_the_loop(self, place: Place, hooked: Receiver) -> None:
        """All messages to the other one are through while the slow one still thinks about its first two."""
        with receiver() as slow:
            slow.holds.clear()
            endpoint(place, slow.url)
            endpoint(place, hooked.url)
            async with sending(place):
                for _ in range(20):
                    ended(place, "failed")
                longest, last = 0.0, time.monotonic()
                while len(hooked.messages) < 20:
                    await asyncio.sleep(0.005)
                    longest, last = max(longest, time.monotonic() - last), time.monotonic()
                assert 1 <= len(slow.messages) <= 2
                assert longest < 5, "seconds that the event loop stood still; a busy machine takes some of them"
                slow.holds.set()

    async def test_two_senders_do_not_send_a_message_twice(self, any_place: Place, hooked: Receiver) -> None:
        place = any_place
        endpoint(place, hooked.url)
        for _ in range(10):
            ended(place, "succeeded")
        async with sending(place), sending(place):
            await until(lambda: all(row.status == "delivered" for row in deliveries(place.database)))
        ids = [message.headers["webhook-id"] for message in hooked.messages]
        assert len(ids) == len(set(ids)) == 10

    def test_it_is_given_up_after_three_days(self, place: Place) -> None:
        start = time.time()
        now = start
        outbox = Outbox(place.database, clock=lambda: now)
        endpoint(place, "http://127.0.0.1:9/")
        ended(place, "succeeded")
        attempts, goes_on = 0, True
        while goes_on:
            (delivery,) = outbox.take_due({}, per_endpoint=2, for_seconds=60)
            attempts += 1
            assert delivery.attempts == attempts
            goes_on = outbox.failed(delivery, "no")
            now = deliveries(place.database)[0].due_at
        assert RETRIED_SECONDS - LONGEST_PAUSE_SECONDS < now - LONGEST_PAUSE_SECONDS - start <= RETRIED_SECONDS
        assert 15 < attempts < 25
        assert outbox.take_due({}, per_endpoint=2, for_seconds=60) == []

    def test_it_does_not_wait_for_a_clock_that_was_set_back_by_a_day(self, place: Place) -> None:
        now = time.time()
        outbox = Outbox(place.database, clock=lambda: now)
        endpoint(place, "http://127.0.0.1:9/")
        ended(place, "succeeded")
        (first,) = outbox.take_due({}, per_endpoint=2, for_seconds=60)
        assert outbox.failed(first, "no")
        assert outbox.take_due({}, per_endpoint=2, for_seconds=60) == [], "its pause is not over"
        now -= 24 * 3600
        (second,) = outbox.take_due({}, per_endpoint=2, for_seconds=60)
        assert (second.id, second.attempts) == (first.id, 2)
        assert outbox.take_due({}, per_endpoint=2, for_seconds=60) == [], "it is on its way"

    def test_pauses_grow_to_six_hours(self) -> None:
        pauses = [pause_after(attempt) for attempt in range(1, 40)]
        assert pauses[:4] == [5, 20, 80, 320]
        assert pauses[-1] == LONGEST_PAUSE_SECONDS == max(pauses)

    async def test_the_end_of_a_job_by_a_real_worker_is_told(self, place: Place, hooked: Receiver) -> None:
        endpoint(place, hooked.url)
        good = place.queue_job(place.upload(chat_rows(20)).id)
        async with sending(place):
            with worker(place, standins.trains_well):
                await asyncio.to_thread(wait_for, place, good.id, "succeeded")
            await until(lambda: hooked.messages)
        assert json.loads(hooked.messages[0].body)["data"] == {"id": good.id}


class TestEndpoints:
    def test_the_sdk_creates_lists_retrieves_and_deletes_them(self, client: OpenAI) -> None:
        made = client.webhooks.create(
            name="ops", url="https://ops.example/hook", event_types=["fine_tuning.job.succeeded"]
        )
        assert_no_wrong_typed_field(made)
        assert made.signing_secret.startswith("whsec_")
        shown = client.webhooks.retrieve(made.id)
        assert_no_wrong_typed_field(shown)
        assert made.signing_secret not in shown.to_json()
        assert shown.signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"
        more = [
            client.webhooks.create(name="n", url="http://a.example", event_types=list(EVENT_TYPES)).id for _ in range(4)
        ]
        listed = assert_no_wrong_typed_fields(client.webhooks.list(limit=2))
        assert [found.id for found in listed] == [*reversed(more), made.id]
        gone = client.webhooks.delete(made.id)
        assert_no_wrong_typed_field(gone)
        for call in (client.webhooks.retrieve, client.webhooks.delete):
            with pytest.raises(openai.NotFoundError):
                call(made.id)

    def test_what_waits_goes_with_its_endpoint(self, client: OpenAI, place: Place) -> None:
        made = endpoint(place, "http://127.0.0.1:9/")
        ended(place, "succeeded")
        client.webhooks.delete(made.id)
        assert deliveries(place.database) == []

    def test_a_repeated_creation_makes_one_with_the_same_secret(self, client: OpenAI) -> None:
        def make(name: str) -> Any:
            return client.webhooks.create(
                name=name,
                url="https://a.example",
                event_types=["fine_tuning.job.failed"],
                extra_headers={"Idempotency-Key": "k"},
            )

        assert make("a") == make("a")
        with pytest.raises(openai.ConflictError):
            make("b")
        assert len(list(client.webhooks.list())) == 1

    def test_their_number_is_bounded_and_others_do_not_see_them(self, place: Place) -> None:
        made = [endpoint(place, "http://a.example") for _ in range(MAX_ENDPOINTS)]
        with pytest.raises(Exception, match="delete one of them"):
            endpoint(place, "http://a.example")
        other = EndpointStore(place.database, tenant="other")
        assert other.page(after=None, limit=5).records == []
        for call in (other.get, other.delete):
            with pytest.raises(LookupError):
                call(made[0].id)

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"url": "ftp://a.example"}, "url"),
            ({"url": "https://"}, "url"),
            ({"url": "a.example"}, "url"),
            ({"url": "https://user:password@a.example"}, "url"),
            ({"url": "https://a.example/#x"}, "url"),
            ({"url": "https://a.example/\n"}, "url"),
            ({"url": "https://a.example:99999"}, "url"),
            ({"url": "https://xn--a/hook"}, "url"),
            ({"url": "https://a.example/" + "a" * 2100}, "url"),
            ({"url": 5}, "url"),
            ({"name": ""}, "name"),
            ({"name": "\0"}, "name"),
            ({"event_types": []}, "event_types"),
            ({"event_types": ["batch.completed"]}, "event_types.0"),
            ({"secret": "mine"}, "secret"),
        ],
    )
    def test_a_wrong_one_is_refused_with_its_field(
        self, quiet_client: OpenAI, changes: dict[str, Any], param: str
    ) -> None:
        body = {"name": "a", "url": "https://a.example", "event_types": ["fine_tuning.job.failed"]} | changes
        response = quiet_client._client.post(
            f"{quiet_client.base_url}webhook_endpoints", content=json.dumps(body).encode()
        )
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param


class TestTheCommand:
    def capo_webhooks(self, url: str, *arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--url", url], catch_exceptions=False)

    def test_it_creates_lists_and_deletes(self, url: str, client: OpenAI) -> None:
        made = self.capo_webhooks(url, "create", "https://a.example/x", "--name", "ops", "--on", "failed")
        endpoint_id, secret = made.output.split()
        assert secret.startswith("whsec_")
        assert client.webhooks.retrieve(endpoint_id).event_types == ["fine_tuning.job.failed"]
        listed = self.capo_webhooks(url, "list").output
        assert listed.split() == [endpoint_id, "https://a.example/x", "ops", "failed"]
        assert secret not in listed
        assert self.capo_webhooks(url, "delete", endpoint_id).exit_code == 0
        assert self.capo_webhooks(url, "list").output == ""
