"""Input that means harm: names that are paths, fields that fetch or run something, and templates of somebody else's."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from capo.access_rules import HTTP_RULES
from tests.capo.guarded import Guarded, guarded
from tests.registry.test_names import HOSTILE_NAMES
from tests.serve.running import BASE
from tests.sizes import size
from tests.tune.jobs.support import chat_rows

HELLO = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
NAMED = [operation for operation in HTTP_RULES if "{" in operation]


def files_of(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in directory.rglob("*") if path.is_file()}


def on_the_wire(text: str) -> str:
    """As a client sends it in a path, byte for byte."""
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


async def test_no_hostile_name_reaches_the_disk_by_any_route_that_takes_a_name(tmp_path: Path) -> None:
    """What stands in a route's place is a name or an id; whatever it is instead, the answer is a refusal."""
    place = tmp_path / "place"
    place.mkdir()
    harmful: dict[str, Any] = {}
    # A path that another route takes is no name of this one; a dot segment alone is gone before it is sent.
    names = [name for name in HOSTILE_NAMES if name and len(name) < 3000 and name.strip("./")][:: size(10, 1)]
    async with guarded(place) as service:
        before = files_of(tmp_path)
        for operation in NAMED:
            method, _, template = operation.partition(" ")
            for name in names:
                path = template.replace(":path}", "}")
                while "{" in path:
                    path = path[: path.index("{")] + on_the_wire(name) + path[path.index("}") + 1 :]
                answer = await service.ask(operation, None, path=path, **body_for(method, operation))
                if not 400 <= int(answer.status) < 500:
                    harmful[f"{operation} {name[:60]!a}"] = answer.status
        after = files_of(tmp_path)
    assert harmful == {}
    own = ("jobs.sqlite", "audit.jsonl", "registry/generation")
    assert [path for path in after if path not in before and not any(name in path for name in own)] == []


def body_for(method: str, operation: str) -> dict[str, Any]:
    if operation.startswith("PUT /v1/aliases"):
        return {"json": {"revision": "support@0123456789abcdef"}}
    return {}


@contextmanager
def listening_ear() -> Iterator[tuple[str, list[bytes]]]:
    """An address of this machine, and whatever anybody sends to it."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        is_over = threading.Event()

        def listen() -> None:
            while not is_over.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                heard.append(connection.recv(1000))
                connection.close()

        thread = threading.Thread(target=listen)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/canary", heard
        is_over.set()
        thread.join()


def fetching(url: str) -> list[dict[str, Any]]:
    """Bodies that ask somebody to fetch ``url`` or to open a file."""
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}},
        {"type": "file", "file": {"file_data": url}},
        {"type": "image_embeds", "image_embeds": "gASVAAAA"},
    ]
    return [
        *(HELLO | {"messages": [{"role": "user", "content": [part]}]} for part in parts),
        HELLO | {"mm_processor_kwargs": {"url": url}},
        HELLO | {"media_io_kwargs": {"image": {"url": url}}},
        HELLO | {"documents": [{"url": url}]},
        HELLO | {"prompt_embeds": "gASVAAAA"},
        HELLO | {"kv_transfer_params": {"remote_host": url}},
        HELLO | {"chat_template": "{{ ''.__class__ }}"},
        HELLO | {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        HELLO | {"logits_processors": ["os.system"]},
        HELLO | {"vllm_xargs": {"x": url}},
        HELLO | {"tools": [{"type": "mcp", "server_url": url}]},
        HELLO | {"cache_salt": "mine"},
        HELLO | {"model": url},
        HELLO | {"model": "/etc/passwd"},
    ]


async def test_no_field_makes_the_service_fetch_open_or_run_anything(tmp_path: Path) -> None:
    with listening_ear() as (url, heard):
        async with guarded(tmp_path) as service:
            for body in fetching(url):
                answer = await service.ask("POST /v1/chat/completions", None, json=body)
                assert answer.status in (400, 404), body
            for path in (url, "/etc", "../../etc"):
                body = {"lora_name": "x", "lora_path": path}
                assert (await service.ask("POST /v1/load_lora_adapter", None, json=body)).status in (400, 404)
    assert heard == []


async def created(service: Guarded, **changes: Any) -> tuple[int | str, str | None]:
    """A job, of a file that is made for the first one."""
    listed = (await service.ask("GET /v1/files", None)).body["data"]
    if not listed:
        form = {"files": {"file": ("rows.jsonl", chat_rows(12))}, "data": {"purpose": "fine-tune"}}
        listed = [(await service.ask("POST /v1/files", None, **form)).body]
    file = listed[0]["id"]
    answer = await service.ask("POST /v1/fine_tuning/jobs", None, json={"model": BASE, "training_file": file} | changes)
    return answer.status, answer.code


COMMANDS = [
    "$(touch marker)",
    "`touch marker`",
    "; touch marker",
    "\n--x",
    "--output_dir=/tmp/x",
    "${IFS}",
    "{{ 7*7 }}",
]


async def test_no_text_of_a_job_becomes_part_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with guarded(tmp_path) as service:
        for text in COMMANDS:
            for change in changes_with(text):
                status, _ = await created(service, **change)
                assert status == 400, change
            # A name of a module is compared with names of modules, and no more; training finds none of this name.
            assert (await created(service, capo={"lora": {"target_modules": [text]}}))[0] == 200
    assert not (tmp_path / "marker").exists()


def changes_with(text: str) -> list[dict[str, Any]]:
    """A job's fields that hold a text, or should hold none."""
    return [
        {"suffix": text},
        {"seed": text},
        {"hyperparameters": {"n_epochs": text}},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": text}}}},
        {"method": {"type": text}},
        {"capo": {"alias": text}},
        {"validation_file": text},
        {"integrations": [{"type": text}]},
        {"model": text},
    ]


async def test_an_unknown_base_is_refused_without_a_look_at_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[Any] = []
    original = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        looked_up.append(host)
        return original(host, *arguments, **options)

    async with guarded(tmp_path) as service:
        await created(service)  # what this machine's own addresses cost is over
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        for model in ("Qwen/Qwen3-0.6B", "http://example.com/model", "hf://x", "gpt-4o"):
            assert (await created(service, model=model)) == (400, "model_not_available")
            answer = await service.ask("POST /v1/chat/completions", None, json=HELLO | {"model": model})
            assert answer.status == 404
    assert [host for host in looked_up if host not in ("127.0.0.1", b"127.0.0.1")] == []


NO_LINES = {
    "parquet": b"PAR1" + b"\0" * 100,
    "arrow": b"ARROW1\0\0" + b"\0" * 100,
    "pickle": b"\x80\x04\x95" + b"\0" * 50,
    "gzip": b"\x1f\x8b\x08" + b"\0" * 50,
    "zip": b"PK\x03\x04" + b"\0" * 50,
    "numpy": b"\x93NUMPY" + b"\0" * 50,
    "sqlite": b"SQLite format 3\0" + b"\0" * 50,
    "zstd": b"\x28\xb5\x2f\xfd" * 9,
}


async def test_an_upload_of_anything_but_lines_of_json_is_refused(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        for kind, content in NO_LINES.items():
            form = {"files": {"file": ("rows.jsonl", content)}, "data": {"purpose": "fine-tune"}}
            answer = await service.ask("POST /v1/files", None, **form)
            assert (answer.status, answer.code) == (400, "invalid_training_file"), kind
            assert json.dumps(answer.body).isascii()
