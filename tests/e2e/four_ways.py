"""One question asked in four ways: over HTTP and gRPC, in one piece and streamed; the answers in one form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from capo.client import CapoClient, ChatOptions, CompletionOptions, JsonSchema, Message, Sampling


@dataclass(frozen=True)
class Question:
    """One request, in the words of both faces."""

    model: str
    shared: dict[str, Any]
    """Fields that both faces call the same."""
    prompt: str | list[int] | None = None
    """``None``: a chat."""
    turns: list[dict[str, str]] = field(default_factory=list)
    schema: dict[str, Any] | None = None
    logprobs: int | None = None

    def body(self, *, stream: bool) -> dict[str, Any]:
        body = {"model": self.model, "stream": stream, **self.shared}
        if self.schema is not None:
            form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.schema}}
            body["response_format"] = form
        if stream:
            body["stream_options"] = {"include_usage": True}
        if self.prompt is None:
            logprobs = {} if self.logprobs is None else {"logprobs": True, "top_logprobs": self.logprobs}
            return {**body, **logprobs, "messages": self.turns}
        logprobs = {} if self.logprobs is None else {"logprobs": self.logprobs}
        return {**body, **logprobs, "prompt": self.prompt, "return_token_ids": True}

    @property
    def sampling(self) -> Sampling:
        given = {**self.shared}
        if "logit_bias" in given:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        return Sampling(**given, structure=None if self.schema is None else JsonSchema(self.schema))


@dataclass
class Answer:
    """What all four ways have in common, by choice."""

    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[tuple[str, float, dict[str, float]]]] = field(default_factory=dict)
    ends: dict[int, tuple[str, Any]] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    model: str = ""

    def add(self, index: int, text: str, token_ids: Any, logprobs: list[Any], end: tuple[str | None, Any]) -> None:
        self.texts[index] = self.texts.get(index, "") + text
        self.token_ids.setdefault(index, []).extend(token_ids or ())
        self.logprobs.setdefault(index, []).extend(logprobs)
        if end[0] is not None:
            assert index not in self.ends, "a choice ended twice"
            self.ends[index] = (str(end[0]), end[1])


def chat_logprobs(choice: dict[str, Any]) -> list[Any]:
    entries = (choice.get("logprobs") or {}).get("content") or []
    return [(e["token"], e["logprob"], {t["token"]: t["logprob"] for t in e["top_logprobs"]}) for e in entries]


def completion_logprobs(choice: dict[str, Any]) -> list[Any]:
    columns = choice.get("logprobs") or {}
    names = ("tokens", "token_logprobs", "top_logprobs")
    return [(token, value, top or {}) for token, value, top in zip(*(columns.get(n, []) for n in names), strict=True)]


def over_http(http: httpx.Client, question: Question) -> Answer:
    return in_json(question, [post(http, question)])


def over_http_stream(http: httpx.Client, question: Question) -> Answer:
    events = []
    with http.stream("POST", path_of(question), json=question.body(stream=True)) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]", lines
    events = [json.loads(line) for line in lines[:-1]]
    return in_json(question, events)


def path_of(question: Question) -> str:
    return "/v1/chat/completions" if question.prompt is None else "/v1/completions"


def post(http: httpx.Client, question: Question) -> dict[str, Any]:
    response = http.post(path_of(question), json=question.body(stream=False))
    assert response.status_code == 200, response.text
    return dict(response.json())


def in_json(question: Question, objects: list[dict[str, Any]]) -> Answer:
    answer = Answer()
    for given in objects:
        answer.model = given["model"]
        for choice in given["choices"]:
            end = (choice.get("finish_reason"), choice.get("stop_reason"))
            if question.prompt is None:
                said = choice.get("message") or choice["delta"]
                answer.add(choice["index"], said.get("content") or "", (), chat_logprobs(choice), end)
            else:
                parts = (choice["text"], choice.get("token_ids"), completion_logprobs(choice))
                answer.add(choice["index"], *parts, end)
        if usage := given.get("usage"):
            answer.usage = (usage["prompt_tokens"], usage["completion_tokens"])
    return answer


def grpc_logprobs(part: Any) -> list[Any]:
    return [(entry.token, entry.logprob, {top.token: top.logprob for top in entry.top}) for entry in part.logprobs]


def over_grpc(client: CapoClient, question: Question) -> Answer:
    answer = Answer()
    if question.prompt is None:
        chat = client.chat(question.model, messages(question), sampling=question.sampling, options=options(question))
        for choice in chat.choices:
            end = (choice.finish_reason, choice.stop_reason)
            answer.add(choice.index, choice.message.content or "", (), grpc_logprobs(choice), end)
        answer.usage = (chat.usage.prompt_tokens, chat.usage.completion_tokens)
        answer.model = chat.model
        return answer
    logprobs = CompletionOptions(logprobs=question.logprobs)
    done = client.complete(question.model, question.prompt, sampling=question.sampling, options=logprobs)
    for part in done.choices:
        end = (part.finish_reason, part.stop_reason)
        answer.add(part.index, part.text, part.token_ids, grpc_logprobs(part), end)
    answer.usage = (done.usage.prompt_tokens, done.usage.completion_tokens)
    answer.model = done.model
    return answer


def over_grpc_stream(client: CapoClient, question: Question) -> Answer:
    answer = Answer()
    num_tokens = 0
    pieces: Iterator[Any]
    if question.prompt is None:
        pieces = client.chat_stream(
            question.model, messages(question), sampling=question.sampling, options=options(question)
        )
    else:
        logprobs = CompletionOptions(logprobs=question.logprobs)
        pieces = client.complete_stream(question.model, question.prompt, sampling=question.sampling, options=logprobs)
    for piece in pieces:
        answer.model = piece.model
        if piece.usage is not None:
            answer.usage = (piece.usage.prompt_tokens, piece.usage.completion_tokens)
            continue
        token_ids = () if question.prompt is None else piece.token_ids
        num_tokens += piece.num_tokens if question.prompt is None else len(piece.token_ids)
        answer.add(piece.index, piece.text, token_ids, grpc_logprobs(piece), (piece.finish_reason, piece.stop_reason))
    assert answer.usage is not None
    assert num_tokens == answer.usage[1], "the pieces' tokens are those that are billed"
    return answer


def messages(question: Question) -> list[Message]:
    return [Message(turn["role"], turn["content"]) for turn in question.turns]


def options(question: Question) -> ChatOptions:
    asks = question.logprobs is not None
    return ChatOptions(logprobs=True if asks else None, top_logprobs=question.logprobs)
