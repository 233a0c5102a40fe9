"""Work in processes of its own: in order, with errors where they belong, and a lost process is said to be lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from registry.errors import InvalidRequestError, UnavailableError
from tune.data.processes import map_in_processes


@pytest.mark.parametrize("num", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [0, 1, 2, 7])
def test_results_come_in_the_order_of_their_items(num: int, items: int) -> None:
    assert list(map_in_processes(lambda item: item * item, range(items), num)) == [n * n for n in range(items)]


def test_the_work_is_done_elsewhere_by_as_many_processes_as_asked() -> None:
    pids = set(map_in_processes(lambda _: os.getpid(), range(12), 3))
    assert len(pids) == 3
    assert os.getpid() not in pids


def test_large_items_and_results_block_nobody() -> None:
    sizes = [len(text) for text in map_in_processes(lambda text: text * 2, ["x" * 3_000_000] * 6, 2)]
    assert sizes == [6_000_000] * 6


def refuse(item: int) -> int:
    if item == 3:
        raise InvalidRequestError("three is not allowed", param="item")
    return item


@pytest.mark.parametrize("num", [1, 2])
def test_an_error_comes_out_at_its_place(num: int) -> None:
    results = map_in_processes(refuse, range(10), num)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InvalidRequestError, match="three is not allowed") as caught:
        next(results)
    assert caught.value.param == "item"


def end_itself(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_process_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(UnavailableError, match="a process that checked rows was ended"):
        list(map_in_processes(end_itself, range(10), 2))


def test_results_that_nobody_wants_end_the_processes() -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            taken.append(1)
            yield 0

    results = map_in_processes(lambda _: os.getpid(), endless(), 2)
    pid = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert len(taken) < 5
