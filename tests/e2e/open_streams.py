"""Long streamed answers, each read in a thread of its own until it ends, and how it ended."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import httpx

from capo_proto.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.service import Service

MAX_TOKENS = 1500
TIMEOUT = 120
"""Seconds: enough for ``MAX_TOKENS`` in each of 16 streams on a machine that does much besides."""
_LIMIT = {"/v1/responses": "max_output_tokens"}


class OpenStream(ABC):
    """Its constructor does not wait: of streams that begin one by one, the first may end before the last begins."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_until_open(self) -> None:
        """Returns when its first event has come."""
        assert self._opened.wait(TIMEOUT), "no first event"

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"still open after {seconds:g} s"

    def _read(self) -> None:
        for _ in self._events():
            self._opened.set()

    @abstractmethod
    def _events(self) -> Iterator[object]:
        """What comes, until the end."""


class HttpStream(OpenStream):
    """``lines``: every line that came, without the empty ones."""

    def __init__(self, service: Service, path: str, asked: Mapping[str, Any]) -> None:
        limit = {_LIMIT.get(path, "max_tokens"): MAX_TOKENS}
        self._body = {"model": "capo-tiny", "stream": True, "ignore_eos": True, **limit, **asked}
        self._url = f"{service.url}{path}"
        self.lines: list[str] = []
        super().__init__()

    @property
    def is_whole(self) -> bool:
        """It ended as whole answers do, somewhere: ``[DONE]``, or the event that ends a response."""
        ends = ("data: [DONE]", "event: response.completed", "event: response.incomplete")
        return any(line.startswith(ends) for line in self.lines)

    @property
    def error_code(self) -> str | None:
        """Of its last event, if that is an error."""
        if not self.lines or not self.lines[-1].startswith("data: {"):
            return None
        event = json.loads(self.lines[-1].removeprefix("data: "))
        error = event if event.get("type") == "error" else event.get("error")
        return None if error is None else str(error["code"])

    def _events(self) -> Iterator[object]:
        with httpx.stream("POST", self._url, json=self._body, timeout=TIMEOUT) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line:
                    self.lines.append(line)
                    yield line


class GrpcStream(OpenStream):
    """``status`` and ``error_code``: how it ended; its last chunk has the usage only if it is whole."""

    def __init__(self, service: Service, prompt: str) -> None:
        sampling = inference_pb2.Sampling(max_tokens=MAX_TOKENS, ignore_eos=True)
        self._request = inference_pb2.CompletionRequest(model="capo-tiny", prompt=prompt, sampling=sampling)
        self._address = service.grpc_address
        self.has_usage = False
        self.status: grpc.StatusCode | None = None
        self.error_code = ""
        super().__init__()

    def _events(self) -> Iterator[object]:
        with grpc.insecure_channel(self._address) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).CompleteStream(self._request, timeout=TIMEOUT)
            try:
                for chunk in call:
                    self.has_usage = self.has_usage or chunk.HasField("usage")
                    yield chunk
            except grpc.RpcError:
                self.error_code = str(dict(call.trailing_metadata() or ()).get("capo-error-code", ""))
            self.status = call.code()
