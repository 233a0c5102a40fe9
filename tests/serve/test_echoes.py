"""An echo begins with the prompt as it was sent and read, or is refused, on both faces."""

from __future__ import annotations

from pathlib import Path

from serve.engine_api import Endpoint
from tests.serve.fake_engine import FakeEngine
from tests.serve.grpc_channel import both_faces
from tests.serve.test_grpc_parity import ask_http, assert_the_same_refusal

COMPLETION = Endpoint.COMPLETION


async def test_a_stream_of_several_answers_echoes_no_log_probabilities(tmp_path: Path) -> None:
    asked = {"echo": True, "logprobs": 0}
    async with both_faces(FakeEngine(), tmp_path) as faces:
        fields = {**asked, "n": 2}, {**asked, "sampling": {"n": 2}}
        await assert_the_same_refusal(faces, COMPLETION, *fields, stream=True)
        for n, stream in ((2, False), (1, True)):
            answer = await ask_http(faces, COMPLETION, {**asked, "n": n}, stream=stream)
            assert answer.status_code == 200
