"""The engine that tests inject faults into keeps what vLLM's keeps; otherwise they would prove nothing about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.engine_api import EngineAdapter
from tests.serve import engine_contract
from tests.serve.fake_engine import FakeEngine


async def test_the_engine_for_fault_injection_keeps_every_promise() -> None:
    engine = FakeEngine(num_tokens=engine_contract.NUM_TOKENS)
    engine.refuse = {"refused@1"}

    @contextmanager
    def hold() -> Iterator[None]:
        engine.answer_gate.clear()
        try:
            yield
        finally:
            engine.answer_gate.set()

    await engine.start()
    one, other, refused = [
        EngineAdapter(f"{name}@1", number, Path(name)) for number, name in enumerate(("one", "other", "refused"), 1)
    ]
    found = await engine_contract.broken_promises(engine_contract.Subject(engine, (one, other), refused, hold))
    assert list(found) == engine_contract.names()
    assert {name: trouble for name, trouble in found.items() if trouble} == {}
