"""An echo begins with the prompt as it was sent and read, or is refused, on both faces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize(("name", "value"), [("return_token_ids", True), ("truncate_prompt_tokens", 2)])
async def test_what_would_leave_the_prompt_out_of_its_echo_or_echo_more_than_was_read_is_refused(
    tmp_path: Path, name: str, value: Any
) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        for stream in (False, True):
            fields = {"echo": True, name: value}, {"echo": True, "sampling": {name: value}}
            await assert_the_same_refusal(faces, COMPLETION, *fields, stream=stream)
            for allowed in ({"echo": False, name: value}, {"echo": True}):
                assert (await ask_http(faces, COMPLETION, allowed, stream=stream)).status_code == 200
