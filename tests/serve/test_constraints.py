"""Constraints are tried out in a process that may hang or die, and nobody waits for it longer than allowed."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from registry import errors
from serve import constraints
from serve.constraints import ConstraintTrials
from tests.serve.running import eventually


def trial_process(connection: Connection, start_seconds: float) -> None:
    """Does what it is told instead of compiling anything."""
    time.sleep(start_seconds)
    connection.send("ready")
    while True:
        try:
            _, told = connection.recv()
        except EOFError:
            return
        if told == "hang":
            time.sleep(60)
        if told == "die":
            os._exit(1)
        connection.send({"fine": None, "slow": ("TimeoutError", "one token takes 3 s")}.get(told, ("ValueError", told)))


class Trials(ConstraintTrials):
    def __init__(self, start_seconds: float = 0, longest_wait_seconds: float = 10) -> None:
        super().__init__(self._start_process, slowest_seconds=0.5, longest_wait_seconds=longest_wait_seconds)
        self._start_seconds = start_seconds
        self.starts = 0

    def _start_process(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        process = context.Process(target=trial_process, args=(theirs, self._start_seconds), daemon=True)
        process.start()
        theirs.close()
        self.starts += 1
        return process, ours


@pytest.fixture
def trials() -> Any:
    made = Trials()
    yield made
    made.close()


async def refused(trials: ConstraintTrials, told: str) -> str:
    with pytest.raises(errors.InvalidRequestError) as caught:
        await trials.check("regex", told)
    is_too_slow = "costs too much" in caught.value.message
    assert caught.value.code == ("constraint_too_slow" if is_too_slow else "invalid_constraint")
    return caught.value.message


async def test_what_is_fine_passes_and_is_remembered(trials: Trials) -> None:
    await trials.check("regex", "fine")
    trials.close()
    await trials.check("regex", "fine")  # from memory: no second process
    assert trials.starts == 1


async def test_a_refusal_says_why_and_is_remembered(trials: Trials) -> None:
    assert "is not usable: unclosed" in await refused(trials, "[12:00:00] /project/cpp/regex.cc:83: unclosed")
    assert "costs too much: one token takes 3 s" in await refused(trials, "slow")
    trials.close()
    assert "costs too much" in await refused(trials, "slow")
    assert trials.starts == 1


async def test_a_refusal_names_the_place_where_this_request_has_the_constraint(trials: Trials) -> None:
    for place in ("response_format.json_schema.schema", "structured_outputs.json"):
        with pytest.raises(errors.InvalidRequestError, match="JSON schema is not usable") as caught:
            await trials.check_all([(place, "json", "unclosed")], tenant="")
        assert caught.value.param == place


@pytest.mark.parametrize("told", ["hang", "die"])
async def test_a_process_that_hangs_or_dies_costs_only_its_own_request(trials: Trials, told: str) -> None:
    await trials.check("regex", "fine")
    began = time.monotonic()
    assert "costs too much" in await refused(trials, told)
    assert time.monotonic() - began < 2
    await trials.check("choice", "fine")
    assert trials.starts == 2


async def test_the_event_loop_runs_on_while_a_constraint_is_tried(trials: Trials) -> None:
    await trials.check("regex", "fine")
    task, ticks = asyncio.create_task(refused(trials, "hang")), 0
    while not task.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 20


async def test_a_client_that_leaves_does_not_pass_its_answer_on_to_the_next(trials: Trials) -> None:
    await trials.check("regex", "fine")
    task = asyncio.create_task(trials.check("regex", "hang"))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "not usable: another" in await refused(trials, "another")


async def test_a_client_that_leaves_while_the_process_starts_leaves_every_verdict_to_its_own_constraint() -> None:
    with contextlib.closing(Trials(start_seconds=0.7)) as trials:
        task = asyncio.create_task(trials.check("regex", "first"))
        await eventually(lambda: trials.starts == 1)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for kind in ("regex", "json"):
            await trials.check(kind, "fine")
            assert f"not usable: no {kind}" in await refused(trials, f"no {kind}")
        assert trials.starts == 1, "what the first client began served the next one"


@pytest.mark.parametrize("start_seconds", [0, 0.7], ids=["during a trial", "during the start"])
async def test_an_engine_that_ends_tells_everybody_who_waits_for_a_verdict(start_seconds: float) -> None:
    trials = Trials(start_seconds)
    waiting = [asyncio.create_task(trials.check("regex", told)) for told in ("hang", "fine")]
    await eventually(lambda: trials.starts == 1)
    await asyncio.sleep(0.2)
    trials.close()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [errors.EngineDeadError] * 2
    assert trials.starts == 1, "nothing starts again for an engine that is gone"


async def test_one_tenants_costly_constraints_do_not_hold_up_anothers(trials: Trials) -> None:
    await trials.check("regex", "fine")
    costly = [asyncio.create_task(trials.check(f"kind {n}", "hang", tenant="greedy")) for n in range(6)]
    await asyncio.sleep(0.1)
    await trials.check("choice", "fine", tenant="patient")
    assert sum(task.done() for task in costly) == 1, "it waited for the one that was under way, not for all six"
    for task in costly:
        task.cancel()
    await asyncio.gather(*costly, return_exceptions=True)


async def test_who_waits_too_long_for_a_verdict_is_told_to_come_again() -> None:
    with contextlib.closing(Trials(longest_wait_seconds=0.2)) as trials:
        await trials.check("regex", "fine")
        costly = asyncio.create_task(refused(trials, "hang"))
        await asyncio.sleep(0.1)
        with pytest.raises(errors.UnavailableError) as caught:
            await trials.check("choice", "fine")
        assert (caught.value.code, caught.value.retry_after_seconds) == ("constraints_busy", 5)
        await trials.check("regex", "fine")  # what is known waits for nobody
        await costly
        await trials.check("choice", "fine")


@pytest.mark.parametrize("told", ["hang", "die"])
async def test_a_verdict_by_the_clock_holds_for_a_while_only(
    trials: Trials, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraints, "_CLOCK_VERDICT_SECONDS", 0.5)
    await trials.check("regex", "fine")
    await refused(trials, told)
    await refused(trials, told)
    assert trials.starts == 1, "the verdict was remembered"
    await asyncio.sleep(0.6)
    await refused(trials, told)
    assert trials.starts == 2, "it was tried again"
    await refused(trials, "slow")
    await asyncio.sleep(0.6)
    trials.close()
    await refused(trials, "slow")  # by the CPU's time: for good
