"""Uploads on a raw socket: forms as other clients write them, cut off, too large, or hostile."""

from __future__ import annotations

import resource
import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from registry.errors import StorageError
from tests.tune.jobs.support import Place, chat_rows, open_place, serve, wait_until
from tune.data.rows import FileReport, check_rows, parse_chat_row
from tune.jobs.check_file import IN_PLACE_BYTES, check_training_file

BOUNDARY = "x-capo-x"
GOOD = chat_rows(10)


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    label = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{label}\r\n\r\n'
    return head.encode() + content + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
FILE = part("file", GOOD, "rows.jsonl")
PURPOSE = part("purpose", b"fine-tune")


def post(url: str, body: bytes, content_type: str = f"multipart/form-data; boundary={BOUNDARY}") -> httpx.Response:
    with httpx.Client(trust_env=False) as client:
        return client.post(f"{url}/v1/files", content=body, headers={"content-type": content_type})


def test_the_file_may_come_before_or_after_its_purpose(url: str) -> None:
    for body in (FILE + PURPOSE + END, PURPOSE + FILE + END):
        response = post(url, body)
        assert response.status_code == 200, response.text
        assert response.json()["bytes"] == len(GOOD)


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ("filename*=utf-8''%E2%82%AC%20rates.jsonl", "€ rates.jsonl"),
        ("filename*=UTF-8'en'rows.jsonl; x=y", "rows.jsonl"),
        ("filename*=utf-8''%E2%82%AC.jsonl; filename=\"euro.jsonl\"", "euro.jsonl"),
    ],
)
def test_a_file_name_may_come_in_the_extended_form_alone(url: str, sent: str, name: str) -> None:
    response = post(url, named(sent) + PURPOSE + END)
    assert response.status_code == 200, response.text
    assert response.json()["filename"] == name


def named(label: str) -> bytes:
    """The file, with this in the place of its name."""
    return FILE.replace(b'filename="rows.jsonl"', label.encode())


WRONG_FORMS = {
    "not a form": (GOOD, "application/json"),
    "no boundary": (FILE + PURPOSE + END, "multipart/form-data"),
    "no file": (PURPOSE + END, None),
    "no purpose": (FILE + END, None),
    "no end": (FILE + PURPOSE, None),
    "nothing": (b"", None),
    "endless boundary": (FILE + PURPOSE + END, f"multipart/form-data; boundary={'b' * 5000}"),
    "garbage": (b"\0" * 1000, None),
    "two files": (FILE + FILE + PURPOSE + END, None),
    "two purposes": (FILE + PURPOSE + PURPOSE + END, None),
    "unknown field": (FILE + PURPOSE + part("expires_after[seconds]", b"3600") + END, None),
    "file without a name": (part("file", GOOD) + PURPOSE + END, None),
    "extended name in another charset": (named("filename*=latin-1''%80") + PURPOSE + END, None),
    "extended name that is not UTF-8": (named("filename*=utf-8''%80") + PURPOSE + END, None),
    "extended name with a control character": (named("filename*=utf-8''a%00") + PURPOSE + END, None),
    "many parts": (PURPOSE + FILE + part("purpose", b"") * 100 + END, None),
    "another purpose": (FILE + part("purpose", b"batch") + END, None),
    "purpose that is not UTF-8": (FILE + part("purpose", b"\xff") + END, None),
    "empty file name": (part("file", GOOD, "") + PURPOSE + END, None),
    "long file name": (part("file", GOOD, "a" * 256) + PURPOSE + END, None),
    "file name with a control character": (part("file", GOOD, "a\x07b") + PURPOSE + END, None),
}


@pytest.mark.parametrize(("body", "content_type"), WRONG_FORMS.values(), ids=WRONG_FORMS.keys())
def test_a_wrong_form_is_refused_and_leaves_nothing(
    quiet_url: str, quiet_place: Place, body: bytes, content_type: str | None
) -> None:
    response = post(quiet_url, body) if content_type is None else post(quiet_url, body, content_type)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]
    assert quiet_place.stored_files() == []


WRONG_ROWS = {
    "0 bytes": (b"", 1),
    "blank lines": (b"\n\n  \n", 1),
    "not UTF-8": (GOOD + b'{"messages": "\xff"}\n', 11),
    "UTF-16": (GOOD.decode().encode("utf-16"), 1),
    "not JSON": (GOOD + b"hello\n", 11),
    "an array": (b"[" + GOOD.replace(b"\n", b",") + b"]", 1),
    "no messages": (GOOD + b'{"prompt": "a", "completion": "b"}\n', 11),
    "gzip": (b"\x1f\x8b\x08\x00" + b"\0" * 100, 1),
    "NUL bytes": (b"\0" * 100, 1),
}


@pytest.mark.parametrize(("content", "line"), WRONG_ROWS.values(), ids=WRONG_ROWS.keys())
def test_rows_that_cannot_train_are_refused_with_their_line(
    quiet_url: str, quiet_place: Place, content: bytes, line: int
) -> None:
    response = post(quiet_url, part("file", content, "rows.jsonl") + PURPOSE + END)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "invalid_training_file"
    assert error["line"] == line
    assert f"line {line}" in error["message"]
    assert quiet_place.stored_files() == []


def test_the_first_ten_wrong_rows_are_listed(quiet_url: str) -> None:
    response = post(quiet_url, part("file", GOOD + b"hello\n" * 30, "rows.jsonl") + PURPOSE + END)
    message = response.json()["error"]["message"]
    assert [f"line {number}:" in message for number in range(10, 22)] == [False] + [True] * 10 + [False]


def test_a_large_file_is_checked_as_strictly_as_a_small_one(tmp_path: Path) -> None:
    large = tmp_path / "large.jsonl"
    rows = IN_PLACE_BYTES // len(chat_rows(1)) + 1000
    large.write_bytes(chat_rows(1) * rows)
    assert check_training_file(large, max_rows=rows) == FileReport(rows, ())
    assert check_training_file(large, max_rows=3).rows == 4, "one too many, and no further"
    with large.open("ab") as file:
        file.write(b"hello\n" * 30)
    report = check_training_file(large, max_rows=rows)
    assert report == check_rows(large, parse_chat_row, limit_errors=10)
    assert [error.line for error in report.errors] == list(range(rows + 1, rows + 11))


@pytest.mark.parametrize("filename", ["../../../etc/cron.d/x", "/etc/passwd", "..", "a/b", "файл.jsonl"])
def test_a_file_name_is_a_label_and_never_a_path(url: str, place: Place, filename: str) -> None:
    before = {path for path in place.directory.rglob("*") if path.is_dir()}
    response = post(url, part("file", GOOD, filename) + PURPOSE + END)
    assert response.status_code == 200, response.text
    assert response.json()["filename"] == filename
    assert place.stored_files() == [response.json()["id"]]
    assert {path for path in place.directory.rglob("*") if path.is_dir()} == before


class TestTheSizeLimit:
    LIMIT = 100_000

    @pytest.fixture
    def small(self, tmp_path: Path) -> Place:
        return open_place(tmp_path / "small", max_file_bytes=self.LIMIT)

    def test_one_byte_more_is_refused_and_the_limit_itself_is_not(self, small: Place) -> None:
        row = chat_rows(1)
        exact = row * ((self.LIMIT - 100) // len(row))
        exact += row[:-2].replace(b"What", b"W" * (self.LIMIT - len(exact) - len(row) + 4)) + row[-2:]
        assert len(exact) == self.LIMIT
        with serve(small) as url:
            assert post(url, part("file", exact, "a") + PURPOSE + END).status_code == 200
            response = post(url, part("file", exact + b"\n", "a") + PURPOSE + END)
        small.database.close()
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "file_too_large"
        assert len(small.stored_files()) == 1

    def test_a_body_of_unknown_length_is_stopped_on_the_way(self, small: Place) -> None:
        sent = 0
        with serve(small) as url, _connect(url) as connection:
            connection.sendall(_head("Transfer-Encoding: chunked"))
            block = b"a" * 16_384
            opening = part("file", b"", "a")[:-2]
            connection.sendall(f"{len(opening):x}\r\n".encode() + opening + b"\r\n")
            connection.settimeout(0.0)
            answer = b""
            while not answer and sent < 100 * self.LIMIT:
                try:
                    sent += connection.send(f"{len(block):x}\r\n".encode() + block + b"\r\n")
                except BlockingIOError:
                    pass
                except (BrokenPipeError, ConnectionResetError):
                    break
                try:
                    answer = connection.recv(4096)
                except BlockingIOError:
                    pass
                except ConnectionResetError:
                    break
            wait_until(lambda: small.stored_files() == [], seconds=5)
        small.database.close()
        assert sent < 100 * self.LIMIT
        assert not answer or b" 413 " in answer.split(b"\r\n")[0]


def test_a_row_too_many_is_refused_and_the_most_are_not(tmp_path: Path) -> None:
    place = open_place(tmp_path / "few", max_file_rows=20)
    with serve(place) as url:
        assert post(url, part("file", chat_rows(20), "a") + PURPOSE + END).status_code == 200
        response = post(url, part("file", chat_rows(21), "a") + PURPOSE + END)
    place.database.close()
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("too_many_rows", "file")
    assert "more than 20 rows" in error["message"]
    assert len(place.stored_files()) == 1


def test_a_cut_off_upload_leaves_nothing(url: str, place: Place) -> None:
    with _connect(url) as connection:
        connection.sendall(_head("Content-Length: 1000000"))
        connection.sendall(part("file", GOOD * 100, "rows.jsonl"))
        wait_until(place.stored_files, seconds=5)
    wait_until(lambda: place.stored_files() == [], seconds=5)
    assert place.file_rows.page(after=None, limit=1).records == []


def test_a_sweep_removes_what_a_killed_server_left(place: Place) -> None:
    import os
    import time

    kept = place.upload(GOOD)
    directory = place.files.storage.path(kept.id).parent
    old = time.time() - 7200
    for name in ("file-without-a-row", "incoming/upload-of-a-dead-server"):
        (directory / name).write_text("x")
        os.utime(directory / name, (old, old))
    os.utime(directory / kept.id, (old, old))
    (directory / "file-just-now").write_text("x")
    with place.files.storage.receive() as running:
        os.utime(running.path, (old, old))
        assert sorted(place.files.sweep()) == ["file-without-a-row", "upload-of-a-dead-server"]
        assert running.path.exists()
    assert place.stored_files() == sorted(["file-just-now", kept.id])


def test_a_disk_that_refuses_is_a_storage_error_and_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def refuse(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError, match="No space left"):
            place.upload(GOOD)
    assert place.stored_files() == []
    assert place.file_rows.page(after=None, limit=1).records == []
    place.upload(GOOD)


def test_a_disk_that_fills_up_under_a_small_upload_is_a_storage_error(place: Place) -> None:
    """Its bytes are still in the buffer then, and closing the file would try to write them once more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(GOOD) // 2, hard))
    try:
        with pytest.raises(StorageError, match="File too large"):
            place.upload(GOOD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert place.stored_files() == []
    place.upload(GOOD)


def _connect(url: str) -> socket.socket:
    address = urlsplit(url)
    assert address.hostname is not None
    return socket.create_connection((address.hostname, address.port or 80), timeout=10)


def _head(length: str) -> bytes:
    return (
        f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\n{length}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    ).encode()
