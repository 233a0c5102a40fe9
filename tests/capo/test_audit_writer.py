"""Lines of the audit log are written beside the event loop: all of them, in order, whatever the disk does."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from capo import audit
from capo.audit import Act, AuditLog, AuditWriter
from tests.capo.guarded import guarded
from tests.serve.running import eventually

NUM_LINES = 500


def act(target: str) -> Act:
    return Act(key_id="k", tenant="acme", operation="PUT", target=target, peer="::1", result="ok")


def targets(lines: str) -> list[str]:
    return [json.loads(line)["target"] for line in lines.splitlines()]


class HeldLog(AuditLog):
    """Writes nothing before it is let go."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self.go_on = threading.Event()

    def append(self, line: bytes) -> None:
        self.go_on.wait(30)
        super().append(line)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldLog]:
    log = HeldLog(tmp_path)
    yield log
    log.go_on.set()


def test_every_line_stands_in_the_file_in_the_order_of_the_acts_once_it_is_closed(tmp_path: Path) -> None:
    writer = AuditWriter(AuditLog(tmp_path))
    for number in range(NUM_LINES):
        writer.write(act(str(number)))
    writer.close()
    assert targets((tmp_path / "audit.jsonl").read_text()) == [str(number) for number in range(NUM_LINES)]


def test_who_writes_waits_for_no_disk_and_the_lines_come_when_it_goes_on(tmp_path: Path, held: HeldLog) -> None:
    writer = AuditWriter(held)
    for number in range(NUM_LINES):
        writer.write(act(str(number)))
    assert not (tmp_path / "audit.jsonl").exists()
    held.go_on.set()
    writer.close()
    assert targets((tmp_path / "audit.jsonl").read_text()) == [str(number) for number in range(NUM_LINES)]


def test_a_line_says_when_its_act_was_not_when_it_was_written(
    tmp_path: Path, held: HeldLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = AuditWriter(held)
    monkeypatch.setattr(audit.time, "time", lambda: 1_000.0)
    writer.write(act("x"))
    monkeypatch.undo()
    held.go_on.set()
    writer.close()
    assert json.loads((tmp_path / "audit.jsonl").read_text())["at"] == 1_000.0


def test_what_does_not_fit_in_the_line_goes_to_the_log_whole(
    tmp_path: Path, held: HeldLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit, "_MAX_WAITING_LINES", 2)
    writer = AuditWriter(held)
    for number in range(4):
        writer.write(act(str(number)))
    said = [record.getMessage() for record in caplog.records]
    assert targets("\n".join(message.partition("the line is ")[2] for message in said)) == ["2", "3"]
    held.go_on.set()
    writer.close()
    assert targets((tmp_path / "audit.jsonl").read_text()) == ["0", "1"]


def test_a_disk_that_hangs_does_not_keep_the_process_and_loses_nothing(
    held: HeldLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit, "_CLOSE_SECONDS", 0.05)
    writer = AuditWriter(held)
    for number in range(3):
        writer.write(act(str(number)))
    writer.close()
    writer.write(act("late"))
    said = [record.getMessage().partition("the line is ")[2] for record in caplog.records]
    assert targets("\n".join(said)) == ["0", "1", "2", "late"]


async def test_a_disk_that_hangs_under_the_audit_log_holds_no_request_up(tmp_path: Path) -> None:
    """A pipe that nobody reads yet stands for the disk."""
    pipe = tmp_path / "audit.jsonl"
    async with guarded(tmp_path) as service:
        os.mkfifo(pipe)
        rescue = threading.Timer(20, pipe.read_text)  # of a service that does hang
        rescue.daemon = True
        rescue.start()
        try:
            async with asyncio.timeout(10):
                deletion = await service.ask("DELETE /v1/aliases/{alias:path}", None, path="/v1/aliases/x")
                assert (await service.ask("GET /livez", None)).status == 200
        finally:
            rescue.cancel()
        lines = await asyncio.to_thread(pipe.read_text)
        assert (deletion.status, targets(lines)) == (404, ["/v1/aliases/x"])
        await eventually(lambda: not rescue.is_alive())
