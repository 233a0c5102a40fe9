"""A service that exports its spans, and what is asked of it: run as a process, because a process has one exporter.

Arguments: a directory, the collector's endpoint. Prints the job that it made.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from capo_proto.v1 import inference_pb2
from registry.tracing import export_to
from tests.capo.guarded import bearer, guarded
from tests.serve.running import BASE
from tests.tune.jobs.support import chat_rows

PROMPT = "canaryprompt7f3a"
PARENT = "00f067aa0ba902b7"
TRACES = {
    name: f"{number:032x}"
    for number, name in enumerate(("chat", "stream", "grpc", "cut", "unknown", "refused", "job"), 1)
}
ADAPTER = "support"


def traced(name: str) -> dict[str, str]:
    """What a client of W3C trace context sends."""
    return {"traceparent": f"00-{TRACES[name]}-{PARENT}-01", "x-request-id": f"request-{name}"}


async def live(directory: Path) -> str:
    chat = "POST /v1/chat/completions"
    body = {"model": ADAPTER, "messages": [{"role": "user", "content": PROMPT}]}
    async with guarded(directory) as service:
        key = bearer(service.key())
        service.publish(ADAPTER, "acme", alias=ADAPTER)
        await service.service.catalog.refresh()
        await service.ask(chat, key, json=body, headers=traced("chat"))
        await service.ask(chat, key, json=body | {"stream": True}, headers=traced("stream"))
        request = inference_pb2.ChatRequest(
            model=ADAPTER, messages=[inference_pb2.Message(role="user", content=PROMPT)]
        )
        call = service.channel.unary_unary("/capo.v1.Inference/Chat")
        metadata = (("authorization", key), *traced("grpc").items())
        await call(request.SerializeToString(), metadata=metadata, timeout=5)
        await service.ask(chat, key, json=body | {"model": "nobodys"}, headers=traced("unknown"))
        await service.ask(chat, "Bearer capo_wrong_key", json=body, headers=traced("refused"))
        await service.http.get("/livez")
        uploaded = await service.ask(
            "POST /v1/files", key, files={"file": ("rows.jsonl", chat_rows(12))}, data={"purpose": "fine-tune"}
        )
        job = await service.ask(
            "POST /v1/fine_tuning/jobs",
            key,
            json={"model": BASE, "training_file": uploaded.body["id"]},
            headers=traced("job"),
        )
        service.engine.fail_after_tokens = 2
        await service.ask(chat, key, json=body | {"stream": True}, headers=traced("cut"))
        return str(job.body["id"])


if __name__ == "__main__":
    end_export = export_to(sys.argv[2], role="all")
    print(asyncio.run(live(Path(sys.argv[1]))))
    end_export()
