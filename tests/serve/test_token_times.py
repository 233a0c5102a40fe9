"""The times between tokens are those between one answer's tokens, however many answers a request has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from serve.engine_api import Call, Endpoint
from serve.observed_llm import _observe

_STEP_SECONDS = 0.02
_NUM_STEPS = 6


class Watched:
    """A call with the seconds per token that it was told of."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.num_first = 0
        self.call = Call(Endpoint.CHAT, {"stream": True}, None, "m", "r", on_tokens=self._on_tokens)

    def _on_tokens(self, seconds: float | None, new_tokens: int) -> None:
        if seconds is None:
            self.num_first += 1
        else:
            self.seconds.append(seconds / new_tokens)


def _output(request_id: str, index: int, token_ids: list[int]) -> RequestOutput:
    completion = CompletionOutput(index, "x", token_ids, None, None)
    return RequestOutput(request_id, None, [1], None, [completion], finished=False)


def _steps() -> Iterator[float]:
    """The time at each step of an engine, between which nothing comes."""
    for _ in range(_NUM_STEPS):
        yield time.monotonic()
        time.sleep(_STEP_SECONDS)


@pytest.mark.parametrize("num_answers", [1, 4])
@pytest.mark.parametrize("is_merged", [False, True])
async def test_each_of_several_answers_has_its_own_times(num_answers: int, is_merged: bool) -> None:
    watched = Watched()
    times = []
    for at in _steps():
        times.append(at)
        # vLLM's own queue: it merges what came since it was last looked at.
        queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
        for index in range(num_answers):
            queue.put(_output("r", index, [1]))
            if not is_merged:
                _observe(watched.call, await queue.get())
        if is_merged:
            _observe(watched.call, await queue.get())
    assert watched.num_first == num_answers
    assert len(watched.seconds) == num_answers * (_NUM_STEPS - 1)
    gaps = sorted(after - before for before, after in pairwise(times))
    assert min(watched.seconds) > gaps[0] / 2
    assert sum(watched.seconds) == pytest.approx(num_answers * sum(gaps), rel=0.2)
    assert watched.call.completion_tokens == num_answers * _NUM_STEPS


async def test_answers_to_several_prompts_have_their_own_times() -> None:
    watched = Watched()
    for _ in _steps():
        for prompt in ("r-0", "r-1"):
            _observe(watched.call, _output(prompt, 0, [1]))
    assert watched.num_first == 2
    assert len(watched.seconds) == 2 * (_NUM_STEPS - 1)
    assert min(watched.seconds) > _STEP_SECONDS / 2


async def test_tokens_that_come_together_share_their_time_and_an_output_without_any_is_none() -> None:
    watched = Watched()
    for _, token_ids in zip(_steps(), ([1], [], [2, 3]), strict=False):
        _observe(watched.call, _output("r", 0, token_ids))
    assert watched.num_first == 1
    (seconds,) = watched.seconds
    assert _STEP_SECONDS <= seconds < 3 * _STEP_SECONDS
    assert watched.call.completion_tokens == 3
