"""A function over many items in processes of its own, in order, with little in memory: for pure Python work."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from registry.errors import CapoError, UnavailableError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(function: Callable[[Item], Result], items: Iterable[Item], num: int) -> Generator[Result]:
    """``map`` with ``num`` forked processes, each with one item under way; with ``num`` below 2 in this one.

    ``function`` is inherited by the fork and may hold anything; items and results are pickled.

    Raises:
        CapoError: what ``function`` raised, at the place of its result.
        UnavailableError: a process was lost (killed, or no memory for it).
    """
    if num < 2:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    links: list[Connection] = []
    workers = []
    try:
        for _ in range(num):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(function, theirs), daemon=True)
            worker.start()
            theirs.close()
            links.append(ours)
            workers.append(worker)
        sent = 0
        for item in items:
            if sent >= num:  # a worker gets its next item when its last result is out: neither side can block the other
                yield _received(links[sent % num])
            links[sent % num].send(item)
            sent += 1
        for number in range(max(0, sent - num), sent):
            yield _received(links[number % num])
    finally:
        for link, worker in zip(links, workers, strict=True):
            worker.terminate()  # idle, or its result is no longer wanted
            worker.join()
            link.close()


def _received(link: Connection) -> Any:
    try:
        result = link.recv()
    except EOFError as error:
        reason = "a process that checked rows was ended (no memory left?); check a smaller file, or free memory"
        raise UnavailableError(reason) from error
    if isinstance(result, CapoError):
        raise result
    return result


def _work(function: Callable[[Item], object], link: Connection) -> None:
    while True:
        item: Item = link.recv()
        try:
            result: object = function(item)
        except CapoError as error:
            result = error
        link.send(result)
