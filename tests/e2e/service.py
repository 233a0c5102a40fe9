"""A whole Capo service in a process of its own: real engine, real worker, real sockets."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import openai
import psutil

from registry import Registry

_READY = re.compile(r"Capo is ready at (http://\S+) after ([0-9.]+) s .* gRPC (\S+)\)")


@dataclass
class Service:
    process: subprocess.Popen[str]
    url: str
    grpc_address: str
    start_seconds: float
    data_dir: Path
    output: list[str] = field(default_factory=list)
    """Lines on standard output after the one that says it is ready."""

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def async_client(self) -> openai.AsyncOpenAI:
        """Use it in ``async with``: it belongs to one event loop."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    @property
    def registry(self) -> Registry:
        return Registry(self.data_dir / "registry")

    def processes(self) -> list[psutil.Process]:
        """The service and everything it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def engine_pid(self) -> int:
        return next(p.pid for p in self.processes() if "EngineCore" in p.name() or "EngineCore" in "".join(p.cmdline()))

    def log(self) -> str:
        return (self.data_dir / "service.log").read_text()


@contextlib.contextmanager
def running(data_dir: Path, *arguments: str, start_seconds: float = 180) -> Iterator[Service]:
    """Start ``capo serve`` with these arguments; kill whatever is left of it at the end."""
    data_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "capo", "serve", "--port", "0", "--grpc-port", "0", "--data-dir", str(data_dir)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("OMP_NUM_THREADS", None)  # the service chooses its own
    with (data_dir / "service.log").open("a") as log:
        process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    deadline = time.monotonic() + start_seconds
    reader: threading.Thread | None = None
    try:
        assert process.stdout is not None
        match = None
        for line in process.stdout:
            if (match := _READY.search(line)) or time.monotonic() > deadline:
                break
        assert match is not None, f"the service did not start: {(data_dir / 'service.log').read_text()[-3000:]}"
        service = Service(process, match[1], match[3], float(match[2]), data_dir)
        # A pipe that nobody reads fills up, and then whoever writes to it stands still.
        reader = threading.Thread(target=service.output.extend, args=(process.stdout,), daemon=True)
        reader.start()
        yield service
        service.client.close()
    finally:
        left = []
        with contextlib.suppress(psutil.NoSuchProcess):
            left = psutil.Process(process.pid).children(recursive=True)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
        for survivor in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
        process.kill()
        process.wait()
        if reader is not None:
            reader.join()
        assert process.stdout is not None
        process.stdout.close()
