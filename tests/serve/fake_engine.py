"""An engine for fault injection: keeps adapters in a dict, answers with text that names what answered.

It keeps the same promises as the real one (engine_contract.py).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from registry import errors
from serve.engine_api import Call, Endpoint, Engine, EngineAdapter, EngineLimits, Piece


class FakeEngine(Engine):
    """``load_gate`` and ``answer_gate`` hold loads and answers until set; ``refuse`` names adapters it rejects.

    Loads take ``load_seconds`` each, one after the other, and a start takes ``start_seconds``.
    """

    def __init__(self, *, max_loras: int = 2, num_tokens: int = 4) -> None:
        self._limits = EngineLimits(max_loras=max_loras, max_lora_rank=16, max_model_len=1024, vocab_size=512)
        self._num_tokens = num_tokens
        self._started = False
        self.loaded: dict[int, EngineAdapter] = {}
        self.most_loaded = 0
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.aborted = 0
        self.refuse: set[str] = set()
        self.load_gate = asyncio.Event()
        self.load_gate.set()
        self.load_seconds = self.start_seconds = 0.0
        self._loads_in_turn = asyncio.Lock()
        self.answer_gate = asyncio.Event()
        self.answer_gate.set()
        self.check_gate = asyncio.Event()
        self.check_gate.set()
        self.fail_after_tokens: int | None = None
        self.starts = self.kills = self.failing_starts = 0
        self.progressed_at = 0.0
        self.waiting = self.loading = 0
        self.by_name: dict[str, int] = {}

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    @property
    def is_dead(self) -> bool:
        return not self._started

    @property
    def has_work(self) -> bool:
        return self.waiting + self.loading > 0

    @property
    def last_progress_at(self) -> float:
        return self.progressed_at

    async def kill(self) -> None:
        self.kills += 1
        self.die()

    async def start(self) -> None:
        self.starts += 1
        await asyncio.sleep(self.start_seconds)
        if self.failing_starts:
            self.failing_starts -= 1
            raise RuntimeError("no start today")
        self._started = True

    async def stop(self, timeout_seconds: float) -> None:
        self._started = False
        self.loaded.clear()

    def die(self) -> None:
        self._started = False
        self.loaded.clear()

    async def load_adapter(self, adapter: EngineAdapter) -> None:
        self._require_life()
        life = self.starts
        self.loading += 1
        try:
            await self._take_time_to_load()
        finally:
            self.loading -= 1
            self.progressed_at = time.monotonic()
        self._require_life(life)
        if adapter.name in self.refuse:
            raise errors.InvalidArtifactError("the engine does not like it", code="engine_refused")
        assert adapter.engine_id not in self.loaded, "an engine id was used twice"
        self.loaded[adapter.engine_id] = adapter
        self.by_name[adapter.name] = adapter.engine_id
        self.most_loaded = max(self.most_loaded, len(self.loaded))
        self.loads.append(adapter.name)

    async def _take_time_to_load(self) -> None:
        await self.load_gate.wait()
        async with self._loads_in_turn:
            await asyncio.sleep(self.load_seconds)

    async def unload_adapter(self, adapter: EngineAdapter) -> None:
        self._require_life()
        del self.loaded[adapter.engine_id]
        if self.by_name.get(adapter.name) == adapter.engine_id:
            del self.by_name[adapter.name]
        self.unloads.append(adapter.name)
        self.progressed_at = time.monotonic()

    async def loaded_engine_ids(self) -> frozenset[int]:
        self._require_life()
        return frozenset(self.loaded)

    async def check(self, call: Call) -> None:
        """``check_gate`` holds verdicts until set."""
        self._require_life()
        await self.check_gate.wait()

    async def complete(self, call: Call) -> bytes:
        pieces = [piece async for piece in self._tokens(call)]
        message = {"role": "assistant", "content": "".join(pieces)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        prompt_tokens = call.prompt_tokens
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(pieces)}
        usage["total_tokens"] = prompt_tokens + len(pieces)
        answer = {"id": call.request_id, "object": "chat.completion", "model": call.answer_model}
        return json.dumps({**answer, "choices": [choice], "usage": usage}).encode()

    async def stream(self, call: Call) -> AsyncGenerator[str, None]:
        async for piece in self._tokens(call):
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            chunk = {"object": "chat.completion.chunk", "model": call.answer_model, "choices": [choice]}
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    async def pieces(self, call: Call) -> AsyncGenerator[Piece, None]:
        words = [word async for word in self._tokens(call)] if not call.body.get("stream") else []
        if words:
            yield Piece(0, "".join(words), range(len(words)), "stop")
            return
        async for word in self._tokens(call):
            yield Piece(0, word, [0], None)
        yield Piece(0, "", [], "stop")

    async def convert_tokens(self, endpoint: Endpoint, body: Mapping[str, Any]) -> bytes:
        """A token for each character."""
        self._require_life()
        if endpoint is Endpoint.DETOKENIZE:
            return json.dumps({"prompt": "".join(map(chr, body["tokens"]))}).encode()
        return json.dumps({"tokens": [ord(character) for character in body["prompt"]]}).encode()

    def body_schema(self, endpoint: Endpoint) -> dict[str, Any]:
        return {"type": "object", "properties": {"model": {"type": "string"}, "priority": {"type": "integer"}}}

    async def generate_greedy(
        self, prompt_token_ids: list[int], *, max_tokens: int, adapter: EngineAdapter | None
    ) -> list[int]:
        self._require_life()
        return [0] * max_tokens

    async def _tokens(self, call: Call) -> AsyncIterator[str]:
        """One word per token: the name of what answers, so that a mixed answer cannot hide."""
        name = call.adapter.name if call.adapter is not None else "base"
        life = self.starts
        call.prompt_tokens, call.queued_seconds = 1, 0.0
        call.was_in_engine = True
        try:
            for number in range(self._num_tokens):
                self.waiting += 1
                try:
                    await self.answer_gate.wait()
                finally:
                    self.waiting -= 1
                if self.fail_after_tokens is not None and number >= self.fail_after_tokens:
                    self.die()
                self._require_life(life)
                if call.adapter is not None:
                    assert call.adapter.engine_id in self.loaded, "an adapter left under its user"
                self._note_token(call)
                yield f"{name} "
                await asyncio.sleep(0)
            call.finish_reasons.append("stop")
        except GeneratorExit:
            self.aborted += 1
            raise

    def _note_token(self, call: Call) -> None:
        self.progressed_at = time.monotonic()
        call.first_token_at = call.first_token_at or self.progressed_at
        call.note_tokens(0, 1)

    def _require_life(self, life: int | None = None) -> None:
        if not self._started or (life is not None and life != self.starts):
            raise errors.EngineDeadError("the engine is dead", retry_after_seconds=1)
