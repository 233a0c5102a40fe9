"""Capo against bare vLLM: the same model, adapters, engine settings and load, one after the other on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import grpc
import psutil

from bench.adapters import write_random_adapter
from bench.load import Client, Seen, drive, grpc_chat, http_chat, percentile
from registry import Artifact, BaseModel, Registry, locate_base_model

CONCURRENCIES = (1, 8, 32)
NUM_ADAPTERS = 4
_START_SECONDS = 240.0
_ENGINE_THREADS = max(1, (os.cpu_count() or 2) - 1)
_ENGINE_ARGUMENTS = [
    "--max-loras", "4", "--max-lora-rank", "16", "--max-num-seqs", "64",
    "--kv-cache-memory-bytes", str(256 << 20), "--no-enable-prefix-caching",
]  # fmt: skip

_VLLM = {
    "bare vLLM": {},
    "bare vLLM, threads as Capo": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(_ENGINE_THREADS)},
}
"""With the threads that it takes by itself, and with as many as Capo gives its engine, which leaves a core to the front
end. The faster of the two is what Capo is held against."""


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    url: str
    grpc_address: str | None
    start_seconds: float
    adapters: list[str]
    """Model names of the adapters."""
    front_end: psutil.Process
    """The process that speaks to clients; the engine is another one, on both sides."""


@dataclass(frozen=True, slots=True)
class Measured:
    seen: Seen
    front_end_seconds: float
    """CPU time of the front end."""

    @property
    def microseconds_per_token(self) -> float:
        return 1e6 * self.front_end_seconds / self.seen.tokens


def run(seconds: float) -> str:
    """Measure both servers; returns a report in Markdown."""
    base = locate_base_model("capo-tiny")
    with tempfile.TemporaryDirectory(prefix="capo-bench-") as folder:
        adapters = [
            write_random_adapter(Path(folder) / f"adapter{n}", base, rank=16, seed=n) for n in range(NUM_ADAPTERS)
        ]
        results: dict[str, dict[tuple[str, int], Measured]] = {}
        starts: dict[str, float] = {}
        for name, environment in _VLLM.items():
            with _vllm(name, environment, base, adapters) as server:
                results[name], starts[name] = asyncio.run(_measure(server, seconds)), server.start_seconds
        with _capo(Path(folder), base, adapters) as server:
            results["Capo"], starts["Capo"] = asyncio.run(_measure(server, seconds)), server.start_seconds
            results["Capo gRPC"] = asyncio.run(_measure_grpc(server, seconds))
    return _report(results, starts, seconds)


async def _measure(server: Server, seconds: float) -> dict[tuple[str, int], Measured]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = http_chat(session, server.url)
        await drive(client, ["capo-tiny", *server.adapters], concurrency=4, seconds=min(2.0, seconds))  # warm up
        return {
            (label, concurrency): await _drive(server, client, models, concurrency, seconds)
            for label, models in _mixes(server).items()
            for concurrency in CONCURRENCIES
        }


async def _measure_grpc(server: Server, seconds: float) -> dict[tuple[str, int], Measured]:
    assert server.grpc_address is not None
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        client = grpc_chat(channel)
        return {
            ("base", concurrency): await _drive(server, client, ["capo-tiny"], concurrency, seconds)
            for concurrency in CONCURRENCIES
        }


async def _drive(server: Server, client: Client, models: list[str], concurrency: int, seconds: float) -> Measured:
    before = server.front_end.cpu_times()
    seen = await drive(client, models, concurrency=concurrency, seconds=seconds)
    after = server.front_end.cpu_times()
    return Measured(seen, after.user + after.system - before.user - before.system)


def _mixes(server: Server) -> dict[str, list[str]]:
    return {"base": ["capo-tiny"], "1 adapter": server.adapters[:1], "4 adapters mixed": server.adapters}


# -- servers -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _vllm(name: str, threads: dict[str, str], base: BaseModel, adapters: list[Path]) -> Iterator[Server]:
    """vLLM's own OpenAI server, without Capo's plugin."""
    port = _free_port()
    modules = [f"adapter{number}={path}" for number, path in enumerate(adapters)]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base.path),
        "--served-model-name", base.id, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--enable-lora", *_ENGINE_ARGUMENTS, "--lora-modules", *modules, "--disable-uvicorn-access-log",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_PLUGINS": "none", "VLLM_LOGGING_LEVEL": "ERROR", **threads}
    with _process(command, environment, f"http://127.0.0.1:{port}/health") as (seconds, process):
        names = [f"adapter{number}" for number in range(len(adapters))]
        yield Server(name, f"http://127.0.0.1:{port}", None, seconds, names, process)


@contextlib.contextmanager
def _capo(folder: Path, base: BaseModel, adapters: list[Path]) -> Iterator[Server]:
    registry = Registry(folder / "registry")
    artifacts: list[Artifact] = [
        registry.import_adapter(path, name=f"adapter{number}", base_model=base) for number, path in enumerate(adapters)
    ]
    port, grpc_port = _free_port(), _free_port()
    command = [
        sys.executable, "-m", "capo", "serve", "--port", str(port), "--grpc-port", str(grpc_port), "--workers", "0",
        "--data-dir", str(folder), "--", *_ENGINE_ARGUMENTS,
    ]  # fmt: skip
    with _process(command, dict(os.environ), f"http://127.0.0.1:{port}/readyz") as (seconds, process):
        names = [artifact.revision for artifact in artifacts]
        yield Server("Capo", f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", seconds, names, process)


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str], ready_url: str) -> Iterator[tuple[float, psutil.Process]]:
    """Run a server in a process group of its own; yields the seconds until it was ready, and the process."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while not _answers(ready_url):
                if process.poll() is not None or time.monotonic() - began > _START_SECONDS:
                    log.seek(0)
                    raise RuntimeError(f"{command[2]} did not start:\n{log.read().decode()[-4000:]}")
                time.sleep(0.1)
            yield time.monotonic() - began, psutil.Process(process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310 - our own loopback address
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# -- report ------------------------------------------------------------------------------------------------------


def _report(results: dict[str, dict[tuple[str, int], Measured]], starts: dict[str, float], seconds: float) -> str:
    lines = [
        f"{os.cpu_count()} cores of {_processor()}, Python {platform.python_version()}, capo-tiny, rank-16 adapters on "
        f"all linear layers, about 60 prompt and 64 completion tokens, streamed chat, {seconds:g} s each.",
        "",
        "| load | streams | server | tokens/s | TTFT p50 / p99 ms | ITL p50 / p99 ms | front end, CPU us/token "
        "| against the faster bare vLLM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, concurrency in results["Capo"]:
        for server, seen_by in results.items():
            if (label, concurrency) not in seen_by:
                continue
            measured = seen_by[label, concurrency]
            seen = measured.seen
            bare = max(results[name][label, concurrency].seen.tokens_per_second for name in _VLLM)
            lines.append(
                f"| {label} | {concurrency} | {server} | {seen.tokens_per_second:,.0f} | "
                f"{_milliseconds(seen.time_to_first_token)} | {_milliseconds(seen.inter_token)} | "
                f"{measured.microseconds_per_token:,.0f} | {seen.tokens_per_second / bare:.2f} |"
            )
    lines += ["", "| server | start to ready |", "|---|---|"]
    lines += [f"| {server} | {start:.1f} s |" for server, start in starts.items()]
    return "\n".join(lines) + "\n"


def _milliseconds(values: list[float]) -> str:
    return f"{percentile(values, 0.5) * 1000:.1f} / {percentile(values, 0.99) * 1000:.1f}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
