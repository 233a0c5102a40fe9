"""Every operation that takes somebody's text, with the planted text in it; and why the others take none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from capo.access_rules import RULES
from capo_proto.v1 import inference_pb2, inference_pb2_grpc, tuning_pb2, tuning_pb2_grpc
from registry import EMBEDDED_MODEL_ID

PROMPT = "plantedprompt7f3a"
ASKED = [{"role": "user", "content": f"Repeat: {PROMPT}"}]
_JOB = "ends a job, or holds it; named by its id"
_NAMES = "takes names and revisions alone"

TAKES_NO_TEXT: Mapping[str, str] = {
    "PUT /v1/adapters/{reference:path}/pin": _NAMES,
    "PUT /v1/aliases/{alias:path}": _NAMES,
    "POST /v1/aliases/{alias:path}/rollback": _NAMES,
    "POST /v1/load_lora_adapter": _NAMES,
    "POST /v1/unload_lora_adapter": _NAMES,
    "POST /v1/fine_tuning/checkpoints/{model:path}/permissions": _NAMES,
    "POST /v1/webhook_endpoints": _NAMES,
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": _JOB,
    "POST /v1/fine_tuning/jobs/{job_id}/pause": _JOB,
    "POST /v1/fine_tuning/jobs/{job_id}/resume": _JOB,
    "/grpc.health.v1.Health/Check": _NAMES,
    "/grpc.health.v1.Health/List": _NAMES,
    "/grpc.health.v1.Health/Watch": _NAMES,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _NAMES,
    "/capo.v1.Inference/ListModels": _NAMES,
    "/capo.v1.Tuning/GetJob": _JOB,
    "/capo.v1.Tuning/ListJobs": _JOB,
    "/capo.v1.Tuning/CancelJob": _JOB,
    "/capo.v1.Tuning/PauseJob": _JOB,
    "/capo.v1.Tuning/ResumeJob": _JOB,
    "/capo.v1.Tuning/FollowJob": _JOB,
    "/capo.v1.Adapters/ListAdapters": _NAMES,
    "/capo.v1.Adapters/ListPins": _NAMES,
    "/capo.v1.Adapters/PinAdapter": _NAMES,
    "/capo.v1.Adapters/UnpinAdapter": _NAMES,
    "/capo.v1.Adapters/ListAliases": _NAMES,
    "/capo.v1.Adapters/GetAlias": _NAMES,
    "/capo.v1.Adapters/SetAlias": _NAMES,
    "/capo.v1.Adapters/RollbackAlias": _NAMES,
    "/capo.v1.Adapters/RemoveAlias": _NAMES,
}


def operations_with_text() -> set[str]:
    """All but those named above, and those whose method has no body."""
    return {rule for rule in RULES if not rule.startswith(("GET ", "HEAD ", "DELETE "))} - set(TAKES_NO_TEXT)


def rows() -> bytes:
    chats = [[*ASKED, {"role": "assistant", "content": f"{PROMPT} {number}"}] for number in range(12)]
    return b"".join(json.dumps({"messages": chat}).encode() + b"\n" for chat in chats)


@dataclass
class Pushing:
    """Asks a service with a key of its own for everything; what errors said is kept."""

    http: httpx.Client
    channel: grpc.Channel
    key: str
    said: list[str] = field(default_factory=list)

    def post(self, path: str, **options: Any) -> Any:
        answer = self.http.post(path, **options)
        assert answer.status_code == 200, (path, answer.text)
        return answer.json() if answer.headers["content-type"] == "application/json" else answer.text

    def call(self, method: Callable[..., Any], request: Any) -> Any:
        answer = method(request, metadata=(("authorization", f"Bearer {self.key}"),), timeout=60)
        return list(answer) if hasattr(answer, "__iter__") else answer

    def begun_upload(self) -> str:
        announced = {"bytes": len(rows()), "filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
        return str(self.post("/v1/uploads", json=announced)["id"])

    def part(self, upload: str) -> str:
        return str(self.post(f"/v1/uploads/{upload}/parts", files={"data": ("part", rows())})["id"])

    def file(self) -> str:
        form = {"files": {"file": ("rows.jsonl", rows())}, "data": {"purpose": "fine-tune"}}
        return str(self.post("/v1/files", **form)["id"])


def _infer(path: str, **body: Any) -> Callable[[Pushing], None]:
    def push(pushing: Pushing) -> None:
        pushing.post(path, json={"model": EMBEDDED_MODEL_ID, **body})

    return push


def _grade(path: str) -> Callable[[Pushing], None]:
    def push(pushing: Pushing) -> None:
        """Capo has no graders, and its refusal must not repeat what it was asked to grade."""
        answer = pushing.http.post(path, json={"grader": {"reference": PROMPT}, "model_sample": PROMPT})
        assert answer.status_code == 400
        pushing.said.append(answer.text)

    return push


def _detokenize(pushing: Pushing) -> None:
    tokens = pushing.post("/tokenize", json={"model": EMBEDDED_MODEL_ID, "prompt": PROMPT})["tokens"]
    assert PROMPT in pushing.post("/detokenize", json={"model": EMBEDDED_MODEL_ID, "tokens": tokens})["prompt"]


def _complete_upload(pushing: Pushing) -> None:
    upload = pushing.begun_upload()
    pushing.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [pushing.part(upload)]})


def _cancel_upload(pushing: Pushing) -> None:
    upload = pushing.begun_upload()
    pushing.part(upload)
    pushing.post(f"/v1/uploads/{upload}/cancel")


def _create_job(pushing: Pushing) -> None:
    body = {"model": EMBEDDED_MODEL_ID, "training_file": pushing.file(), "hyperparameters": {"n_epochs": 1}}
    job = pushing.post("/v1/fine_tuning/jobs", json=body)
    pushing.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")


def _create_job_by_grpc(pushing: Pushing) -> None:
    stub = tuning_pb2_grpc.TuningStub(pushing.channel)
    request = tuning_pb2.CreateJobRequest(model=EMBEDDED_MODEL_ID, training_file=pushing.file())
    job = pushing.call(stub.CreateJob, request)
    pushing.call(stub.CancelJob, tuning_pb2.CancelJobRequest(job_id=job.id))


def _infer_by_grpc(method: str) -> Callable[[Pushing], None]:
    def push(pushing: Pushing) -> None:
        sampling = inference_pb2.Sampling(max_tokens=4)
        if method.startswith("Chat"):
            message = inference_pb2.Message(role="user", content=PROMPT)
            request = inference_pb2.ChatRequest(model=EMBEDDED_MODEL_ID, messages=[message], sampling=sampling)
        else:
            request = inference_pb2.CompletionRequest(model=EMBEDDED_MODEL_ID, prompt=PROMPT, sampling=sampling)
        pushing.call(getattr(inference_pb2_grpc.InferenceStub(pushing.channel), method), request)

    return push


PUSHES: Mapping[str, Callable[[Pushing], object]] = {
    "POST /v1/chat/completions": _infer("/v1/chat/completions", messages=ASKED, max_tokens=4),
    "POST /v1/completions": _infer("/v1/completions", prompt=PROMPT, max_tokens=4),
    "POST /v1/responses": _infer("/v1/responses", input=PROMPT, max_output_tokens=16),
    "POST /tokenize": _infer("/tokenize", prompt=PROMPT),
    "POST /detokenize": _detokenize,
    "POST /v1/files": Pushing.file,
    "POST /v1/uploads": Pushing.begun_upload,
    "POST /v1/uploads/{upload_id}/parts": lambda pushing: pushing.part(pushing.begun_upload()),
    "POST /v1/uploads/{upload_id}/complete": _complete_upload,
    "POST /v1/uploads/{upload_id}/cancel": _cancel_upload,
    "POST /v1/fine_tuning/jobs": _create_job,
    "POST /v1/fine_tuning/alpha/graders/run": _grade("/v1/fine_tuning/alpha/graders/run"),
    "POST /v1/fine_tuning/alpha/graders/validate": _grade("/v1/fine_tuning/alpha/graders/validate"),
    "/capo.v1.Inference/Chat": _infer_by_grpc("Chat"),
    "/capo.v1.Inference/ChatStream": _infer_by_grpc("ChatStream"),
    "/capo.v1.Inference/Complete": _infer_by_grpc("Complete"),
    "/capo.v1.Inference/CompleteStream": _infer_by_grpc("CompleteStream"),
    "/capo.v1.Tuning/CreateJob": _create_job_by_grpc,
}
