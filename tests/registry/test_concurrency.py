"""Several processes on one registry, some of them killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from registry import Registry
from registry.errors import ModelNotFoundError
from registry.manifest import MANIFEST_NAME
from tests.registry.samples import draft, write_files

REPOSITORY = Path(__file__).parents[2]


def _start(command: str, root: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.registry.workers", command, str(root), *args],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _run_together(processes: list[subprocess.Popen[str]], root: Path) -> list[list[object]]:
    """Let all go at the same moment; returns what each printed as JSON."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (root.parent / "start").touch()
    answers = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return [json.loads(answer) for answer in answers]


class _Reader(threading.Thread):
    """Looks at the registry all the time; every revision it meets must be whole, and the alias must lead to one."""

    def __init__(self, root: Path) -> None:
        super().__init__(daemon=True)
        self._registry = Registry(root, read_only=True)
        self.stop = threading.Event()
        self.problems: list[str] = []
        self.verified: set[str] = set()
        self.num_looks = 0

    def run(self) -> None:
        alias_seen = False
        while not self.stop.is_set():
            self.num_looks += 1
            try:
                self._registry.resolve("support")
                alias_seen = True
            except ModelNotFoundError as error:
                if alias_seen:
                    self.problems.append(error.message)
            for artifact in self._registry.artifacts():
                if artifact.revision not in self.verified:
                    self.problems += self._registry.verify(artifact.revision)
                    self.verified.add(artifact.revision)


def _phase(root: Path) -> str:
    """How far the killed publisher had come, by what it left."""
    leftovers = [path for path in (root / "staging").iterdir() if path.is_dir()]
    if not leftovers:
        return "between publishes, renaming or flipping"
    names = {path.name for path in leftovers[0].iterdir()}
    if MANIFEST_NAME in names:
        return "sealed"
    return "filled" if len(names) == 8 else "filling"


def test_a_reader_beside_50_killed_publishers_sees_only_whole_revisions(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    registry = Registry(root)
    breeder = _start("breed-publishers", root)
    reader = _Reader(root)
    reader.start()
    phases: Counter[str] = Counter()
    rng = random.Random(3)
    assert breeder.stdin is not None
    assert breeder.stdout is not None
    started = time.monotonic()
    for _ in range(50):
        breeder.stdin.write("go\n")
        breeder.stdin.flush()
        child = int(breeder.stdout.readline())
        time.sleep(rng.uniform(0.002, 0.15))
        os.kill(child, signal.SIGKILL)
        while True:  # until the breeder has reaped it, its locks are its own
            try:
                os.kill(child, 0)
            except ProcessLookupError:
                break
            time.sleep(0.001)
        phases[_phase(root)] += 1
        registry.gc()
        assert list((root / "staging").iterdir()) == []
        assert not list(root.rglob(".tmp-*"))
    reader.stop.set()
    reader.join()
    breeder.communicate(timeout=10)
    assert time.monotonic() - started < 60
    assert reader.problems == []
    assert len(phases) >= 3, phases
    assert len(reader.verified) > 10
    for artifact in registry.artifacts():
        assert registry.verify(artifact.revision) == []
    assert registry.resolve("support") in registry.artifacts()


def test_publishers_of_the_same_content_at_once_make_one_revision(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    registry = Registry(root)
    answers = _run_together([_start("publish", root, "same", "5") for _ in range(3)], root)
    assert {revision for revisions in answers for revision in revisions} == {registry.resolve("support").revision}
    assert len(registry.artifacts()) == 1
    assert registry.verify("support") == []


def test_publishers_of_different_content_at_once_all_succeed(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    registry = Registry(root)
    answers = _run_together([_start("publish", root, text, "4") for text in ("one", "two", "three")], root)
    revisions = {str(revision) for answer in answers for revision in answer}
    assert len(revisions) == 3
    assert {artifact.revision for artifact in registry.artifacts()} == revisions
    assert all(registry.verify(revision) == [] for revision in revisions)
    assert registry.resolve("support").revision in revisions


def test_compare_and_set_lets_exactly_one_of_several_processes_win_each_step(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    registry = Registry(root)
    revisions = [
        registry.publish(write_files(tmp_path / f"v{index}", str(index).encode()), draft()).revision
        for index in range(30)
    ]
    registry.set_alias("support", revisions[0])
    answers = _run_together([_start("advance-alias", root, json.dumps(revisions)) for _ in range(4)], root)
    assert sorted(int(str(step)) for answer in answers for step in answer) == list(range(1, 30))
    history = [entry.revision for entry in registry.alias("support").history]
    assert history == revisions[9:29], "the last 20, each once and in order"


def test_gc_leaves_alone_what_another_process_is_publishing(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    registry = Registry(root)
    publisher = _start("publish", root, "busy", "1")
    with registry.stage() as staging:
        (staging / "model.safetensors").write_bytes(b"weights")
        assert Registry(root).gc(keep_unaliased=0, min_age_seconds=0).removed_staging == 0
        (answer,) = _run_together([publisher], root)
        assert Registry(root).gc(keep_unaliased=0, min_age_seconds=0).removed_revisions == ()
        artifact = registry.publish(staging, draft("other"), alias="other")
    assert registry.verify(artifact.revision) == []
    assert registry.resolve("support").revision == answer[0]


def test_gc_beside_a_publisher_of_a_name_that_is_empty_again_and_again(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    registry, stop = Registry(root), threading.Event()
    num_taken = 0

    def collect() -> None:
        collector = Registry(root)
        while not stop.is_set():
            collector.gc()

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        source = write_files(tmp_path / "v", b"v")
        for _ in range(40):
            num_taken += not (root / "artifacts" / "support").exists()
            artifact = registry.publish(source, draft())
            assert registry.verify(artifact.revision) == []
            registry.remove(artifact.revision)
    finally:
        stop.set()
        thread.join()
    assert num_taken > 1, "the collector took nothing away, so this proves nothing"


def test_gc_beside_a_busy_publisher_never_takes_its_alias_away(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    registry = Registry(root)
    stop = threading.Event()
    removed: list[str] = []

    def collect() -> None:
        collector = Registry(root)
        while not stop.is_set():
            removed.extend(collector.gc(keep_unaliased=0, min_age_seconds=0).removed_revisions)

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for index in range(40):
            source = write_files(tmp_path / f"v{index}", str(index).encode())
            artifact = registry.publish(source, draft(), alias="support")
            assert registry.resolve("support") == artifact
            assert registry.verify("support") == []
    finally:
        stop.set()
        thread.join()
    assert removed, "the collector found nothing to do, so this proves nothing"
    assert set(removed).isdisjoint({artifact.revision for artifact in registry.artifacts()})
