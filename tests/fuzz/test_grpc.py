"""Every call of every gRPC service: messages made from the protos, and bytes that are none."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from capo_proto.v1 import adapters_pb2, inference_pb2, tuning_pb2
from tests.fuzz.watch import MODEL, NUM_REQUESTS, Watch

pytestmark = [pytest.mark.engine, pytest.mark.timeout(0)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MOST_TOKENS = 4
METHODS: list[MethodDescriptor] = [
    method
    for file in (inference_pb2, adapters_pb2, tuning_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
# Not UNAVAILABLE: one call at a time fills no queue, so it would say that something was harmed.
HONEST = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_SPECIAL_TEXTS = (
    MODEL,
    "user",
    "assistant",
    "{}",
    "[a-",
    '{"type": "object"}',
    "\x00",
    "x" * 3000,
    "capo-tiny@12345678",
)
_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_ENUM: (-1, 5),
}


@dataclass(frozen=True)
class Jobs:
    """What calls of the tuning service can be about. No worker runs, so jobs stay as their calls leave them."""

    training_file: str
    id_for: dict[str, str]
    """A job for each method that takes one. FollowJob's has ended: its stream would go on otherwise."""


@pytest.fixture(scope="module")
def jobs(watch: Watch) -> Jobs:
    client = watch.service.client
    uploaded = client.files.create(file=EXAMPLES / "tasks" / "support" / "train.jsonl", purpose="fine-tune")
    methods = [method.name for method in METHODS if "job_id" in method.input_type.fields_by_name]
    ids = {
        name: client.fine_tuning.jobs.create(model=MODEL, training_file=uploaded.id, suffix="fuzzed").id
        for name in methods
    }
    client.fine_tuning.jobs.cancel(ids["FollowJob"])
    return Jobs(uploaded.id, ids)


@pytest.fixture(scope="module")
def channel(watch: Watch) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(watch.service.grpc_address) as opened:
        yield opened


def values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    """Of one value; small ones first, the whole range of the type after."""
    if field.message_type is not None:
        return messages(GetMessageClass(field.message_type), depth + 1)
    if field.type in _INTEGERS:
        return st.integers(0, 5) | st.integers(*_INTEGERS[field.type])
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return st.floats(0, 1, width=32) | st.floats(width=32)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=50)
    return st.sampled_from(_SPECIAL_TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@st.composite
def messages(draw: st.DrawFn, kind: type[Message], depth: int = 0) -> Message:
    """With at most four fields, so that one bad value does not hide all the rest."""
    message = kind()
    fields = list(kind.DESCRIPTOR.fields)
    chosen = draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=id)) if fields and depth < 4 else []
    for field in chosen:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entries = field.message_type.fields_by_name
            for _ in range(draw(st.integers(0, 3))):
                getattr(message, field.name)[draw(values(entries["key"], depth))] = draw(
                    values(entries["value"], depth)
                )
        elif field.is_repeated:
            items = draw(st.lists(values(field, depth), max_size=3))
            getattr(message, field.name).extend(items)
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(values(field, depth)))
        else:
            setattr(message, field.name, draw(values(field, depth)))
    return message


def made_cheap(message: Any, method: MethodDescriptor, jobs: Jobs, of: random.Random) -> Any:
    """The base model, a file or a job that is there, something to answer, and few tokens, most of the time."""
    if of.random() < 0.95 and "model" in message.DESCRIPTOR.fields_by_name:
        message.model = MODEL
    if of.random() < 0.95 and "training_file" in message.DESCRIPTOR.fields_by_name:
        message.training_file = jobs.training_file
    if of.random() < 0.95 and "job_id" in message.DESCRIPTOR.fields_by_name:
        message.job_id = jobs.id_for[method.name]
    if isinstance(message, inference_pb2.ChatRequest) and (not message.messages or of.random() < 0.5):
        del message.messages[:]
        message.messages.add(role="user", content="hello")
    if isinstance(message, inference_pb2.CompletionRequest) and message.WhichOneof("input") is None:
        message.prompt = "hello"
    if hasattr(message, "sampling"):
        message.sampling.max_tokens = MOST_TOKENS
    return message


def send(channel: grpc.Channel, method: MethodDescriptor, raw: bytes) -> str:
    """The status and its reason; only statuses that tell the client something it can act on."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if method.server_streaming:
            list(channel.unary_stream(path)(raw, timeout=60))
        else:
            channel.unary_unary(path)(raw, timeout=60)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        reason = dict(error.trailing_metadata() or ()).get("capo-error-code", "")
        assert code in HONEST, f"{code}: {details} for {raw[:2000]!r}"
        assert details, raw[:2000]
        return f"{code.name} {reason}"
    return "OK"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_messages_of_the_protos_are_answered_and_do_no_harm(
    watch: Watch, channel: grpc.Channel, jobs: Jobs, method: MethodDescriptor
) -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=NUM_REQUESTS,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(messages(GetMessageClass(method.input_type)), st.randoms(use_true_random=False))
    def each(message: Message, of: random.Random) -> None:
        outcomes[send(channel, method, made_cheap(message, method, jobs, of).SerializeToString())] += 1

    with watch.over(f"protobuf {method.name}") as counted:
        each()
        counted.update(outcomes)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_bytes_that_are_no_message_are_answered_and_do_no_harm(
    watch: Watch, channel: grpc.Channel, jobs: Jobs, method: MethodDescriptor
) -> None:
    of = random.Random(method.name)
    sound = made_cheap(GetMessageClass(method.input_type)(), method, jobs, of).SerializeToString()
    with watch.over(f"bytes {method.name}") as outcomes:
        for _ in range(NUM_REQUESTS):
            raw = bytearray(sound or b"\x0a\x03abc")
            for _ in range(of.choice((1, 2, 5))):
                raw[of.randrange(len(raw))] = of.randrange(256)
            raw = raw[: of.randrange(len(raw))] if of.random() < 0.3 else raw + of.randbytes(of.choice((0, 3, 40)))
            outcomes[send(channel, method, bytes(raw))] += 1
