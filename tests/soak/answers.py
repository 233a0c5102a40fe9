"""Streamed greedy answers, and the references that they must equal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

import aiohttp
import grpc

from capo_proto.v1 import inference_pb2, inference_pb2_grpc

MIN_MARGIN = 0.01
"""Between the log probabilities of the two likeliest tokens. float32 keeps 24 bits: two orders of the same sums differ
by some 1e-5 at logits of this size."""


@dataclass(slots=True)
class Answer:
    """One streamed answer; times are ``time.monotonic()`` seconds at the client."""

    began_at: float
    model: str = ""
    token_ids: list[int] = field(default_factory=list)
    first_token_at: float = 0.0
    ended_at: float = 0.0
    gaps_seconds: list[float] = field(default_factory=list)
    """Between one event with new tokens and the next, by token."""
    is_whole: bool = False
    """It ended as whole answers end: ``[DONE]`` over HTTP, a status of OK and the usage over gRPC."""
    error_code: str | None = None
    """Of the error event, or of the error that was answered instead of a stream."""

    def take(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            return
        now = time.monotonic()
        if self.token_ids:
            self.gaps_seconds += [(now - self.ended_at) / len(token_ids)] * len(token_ids)
        else:
            self.first_token_at = now
        self.token_ids += token_ids
        self.ended_at = now


Ask = Callable[[str, str, int], Coroutine[None, None, Answer]]
"""Stream the greedy answer of a model to a prompt, of at most so many tokens. Trouble stands in the answer; none is
raised."""


def http_client(session: aiohttp.ClientSession, url: str, *, ignore_eos: bool = False) -> Ask:
    async def ask(model: str, prompt: str, max_tokens: int) -> Answer:
        body = {**_body(model, prompt, max_tokens), "stream": True, "ignore_eos": ignore_eos}
        answer = Answer(time.monotonic())
        try:
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    answer.error_code = str((await response.json())["error"]["code"])
                    return answer
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if line.startswith(b"data: [DONE]"):
                        answer.is_whole = True
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        answer.error_code = str(event["error"]["code"])
                        continue
                    answer.model = event["model"]
                    for choice in event["choices"]:
                        answer.take(choice.get("token_ids") or [])
        except aiohttp.ClientError as error:
            answer.error_code = type(error).__name__
        return answer

    return ask


def grpc_client(channel: grpc.aio.Channel, *, ignore_eos: bool = False) -> Ask:
    stub = inference_pb2_grpc.InferenceStub(channel)

    async def ask(model: str, prompt: str, max_tokens: int) -> Answer:
        request = inference_pb2.ChatRequest(
            model=model,
            messages=[inference_pb2.Message(role="user", content=prompt)],
            sampling=inference_pb2.Sampling(
                temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos, return_token_ids=True
            ),
        )
        answer = Answer(time.monotonic())
        has_usage = False
        try:
            async for chunk in stub.ChatStream(request):
                answer.model = chunk.model
                answer.take(list(chunk.token_ids))
                has_usage = has_usage or chunk.HasField("usage")
            answer.is_whole = has_usage
        except grpc.aio.AioRpcError as error:
            trailers = dict(error.trailing_metadata() or ())
            answer.error_code = str(trailers.get("capo-error-code", error.code().name))
        return answer

    return ask


# -- references ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt whose greedy answer tells every model from every other, beyond doubt."""

    prompt: str
    num_tokens: int
    """So many tokens of every model's answer come before its first near tie."""
    references: dict[str, tuple[int, ...]]
    """By model: the answer, taken while nothing else ran, cut to ``num_tokens``."""

    def is_answered_by(self, answer: Answer, max_tokens: int) -> bool:
        """Whether these are exactly the tokens that the model which the answer names gives alone."""
        reference = self.references.get(answer.model)
        return reference is not None and answer.is_whole and tuple(answer.token_ids) == reference[:max_tokens]

    def is_begun_by(self, answer: Answer) -> bool:
        """The same of an answer that goes on beyond the reference."""
        reference = self.references.get(answer.model)
        beginning = () if reference is None else answer.token_ids[: len(reference)]
        return answer.is_whole and tuple(beginning) == reference


PROMPTS = tuple(
    f"{opening} {subject}?"
    for subject in ("the mill", "the garden", "the baker", "summer", "the lake", "Iris", "the old goose", "winter")
    for opening in ("Who knows", "What do you know about", "Where is", "Can you tell me about", "What is it with")
)


async def ask_questions(
    session: aiohttp.ClientSession, url: str, models: Sequence[str], *, wanted: int, least_tokens: int, most_tokens: int
) -> list[Question]:
    """Find ``wanted`` questions for these models. The first ``least_tokens`` of their answers differ pairwise."""
    questions: list[Question] = []
    for prompt in PROMPTS:
        answers = {model: await reference(session, url, model, prompt, most_tokens) for model in models}
        num_tokens = min(sure for _, sure in answers.values())
        heads = {tokens[:least_tokens] for tokens, _ in answers.values()}
        if num_tokens >= least_tokens and len(heads) == len(models):
            references = {model: tokens[:num_tokens] for model, (tokens, _) in answers.items()}
            questions.append(Question(prompt, num_tokens, references))
            if len(questions) == wanted:
                return questions
    raise AssertionError(f"only {len(questions)} of {wanted} prompts tell {len(models)} models apart")


async def reference(
    session: aiohttp.ClientSession, url: str, model: str, prompt: str, max_tokens: int
) -> tuple[tuple[int, ...], int]:
    """The greedy answer, and how many of its tokens come before the first near tie (all ``max_tokens`` if it ends)."""
    body = {**_body(model, prompt, max_tokens), "logprobs": True, "top_logprobs": 2}
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        choice = (await response.json())["choices"][0]
    for place, token in enumerate(choice["logprobs"]["content"]):
        first, second = (candidate["logprob"] for candidate in token["top_logprobs"][:2])
        if first - second < MIN_MARGIN:
            return tuple(choice["token_ids"]), place
    return tuple(choice["token_ids"]), max_tokens


def _body(model: str, prompt: str, max_tokens: int) -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "return_token_ids": True,
    }
