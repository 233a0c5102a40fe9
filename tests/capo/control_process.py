"""Runs the control role in a process of its own, asks it for what it offers, and prints what came and is imported.

python -m tests.capo.control_process DATA_DIR
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from capo.roles import Role
from capo.server import CapoServer, StartupReport
from capo.settings import Settings
from tune.jobs import metrics

HEAVY = ("vllm", "torch", "transformers", "peft", "trl")


async def main(data_dir: Path) -> dict[str, Any]:
    settings = Settings(role=Role.CONTROL, data_dir=data_dir, port=0, grpc_port=0)
    server = CapoServer(settings, vllm_arguments=[], clean_environment=dict(os.environ), started_at=time.monotonic())
    ready: asyncio.Future[StartupReport] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(server.run(ready.set_result))
    await asyncio.wait((ready, serving), return_when=asyncio.FIRST_COMPLETED)
    report = ready.result()
    async with httpx.AsyncClient(base_url=report.url, timeout=20) as client:
        found = await conversation(client)
        found |= await an_upload_through_the_end(client)
    await serving
    return found | {"imported": [name for name in HEAVY if name in sys.modules]}


async def conversation(client: httpx.AsyncClient) -> dict[str, Any]:
    said = {"role": "assistant", "content": "yes"}
    chats = [{"messages": [{"role": "user", "content": f"{number}?"}, said]} for number in range(12)]
    rows = "\n".join(map(json.dumps, chats)).encode()
    uploaded = await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows)})
    job = await client.post("/v1/fine_tuning/jobs", json={"model": "capo-tiny", "training_file": uploaded.json()["id"]})
    chat = await client.post("/v1/chat/completions", json={"model": "capo-tiny", "messages": []})
    flip = await client.put("/v1/aliases/support", json={"revision": sys.argv[2]})
    refused = await client.put("/v1/aliases/support", json={"revision": sys.argv[3]})
    models = await client.get("/v1/models")
    probes = {path: (await client.get(path)).status_code for path in ("/startupz", "/livez", "/readyz")}
    await asyncio.sleep(3 * metrics.REFRESH_SECONDS)
    page = (await client.get("/metrics")).text
    return {
        "job": job.json().get("status"),
        "chat": chat.json()["error"]["code"],
        "flip": [flip.status_code, flip.json().get("warmed")],
        "refused": [refused.status_code, refused.json()["error"]["code"]],
        "models": [model["id"] for model in models.json()["data"]],
        "probes": probes,
        "queued": next(line for line in page.splitlines() if line.startswith('capo_jobs{status="queued"}')).split()[-1],
    }


async def an_upload_through_the_end(client: httpx.AsyncClient) -> dict[str, Any]:
    """SIGTERM in the middle of an upload, and what is answered until it is whole."""
    has_begun, go_on = asyncio.Event(), asyncio.Event()
    head = '--x\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
    file = '--x\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}

    async def body() -> AsyncIterator[bytes]:
        yield (head.format("purpose", "fine-tune") + file).encode()
        has_begun.set()
        await go_on.wait()
        yield f"{json.dumps(row)}\n\r\n--x--\r\n".encode()

    headers = {"content-type": "multipart/form-data; boundary=x"}
    upload = asyncio.create_task(client.post("/v1/files", content=body(), headers=headers))
    await has_begun.wait()
    await asyncio.sleep(0.5)  # until the server has read what was sent
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.2)
    refused = await client.get("/v1/files")
    probes = {path: (await client.get(path)).status_code for path in ("/livez", "/readyz", "/metrics")}
    go_on.set()
    return {
        "refused_while_draining": [refused.status_code, refused.json()["error"]["code"]],
        "probes_while_draining": probes,
        "upload_through_the_end": (await upload).status_code,
    }


if __name__ == "__main__":
    metrics.REFRESH_SECONDS = 0.1
    print(json.dumps(asyncio.run(main(Path(sys.argv[1])))))
