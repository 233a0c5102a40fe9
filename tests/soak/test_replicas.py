"""Two replicas, a control process and a worker over one registry and one PostgreSQL, behind HAProxy with the
configuration of deploy/: publish, swap, drain and kill under load.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from capo.demo import EXAMPLES
from registry import BaseModel, Registry
from tests.deploy.render import ROOT
from tests.e2e.service import Service, running
from tests.ports import free_port
from tests.programs import program
from tests.soak.adapters import publish_random
from tests.soak.balanced import Load, Sent
from tests.soak.figures import Figures
from tests.tune.jobs.postgres import new_database, running_postgres

pytestmark = [pytest.mark.engine, pytest.mark.training]

STREAMS = 8


class Replicas:
    """The processes of one deployment; replicas may be ended and started again under the same address."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._folder = folder
        self.data_dir = folder / "shared"
        self.ports = {"replica1": free_port(), "replica2": free_port()}
        self.control = stack.enter_context(running(self.data_dir, "--role", "control"))
        self.replicas = {name: self.start(name) for name in self.ports}
        self.url = stack.enter_context(self._haproxy())
        stack.enter_context(self._worker())

    def start(self, name: str) -> Service:
        arguments = (
            "--role", "infer", "--port", str(self.ports[name]), "--registry", str(self.data_dir / "registry"),
            "--engine-threads", "1",
        )  # fmt: skip
        return self._stack.enter_context(running(self._folder / name, *arguments))

    @contextlib.contextmanager
    def _worker(self) -> Iterator[None]:
        command = [sys.executable, "-m", "capo", "worker", "--data-dir", str(self.data_dir), "--threads", "1"]
        with (self._folder / "worker.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)

    @contextlib.contextmanager
    def _haproxy(self) -> Iterator[str]:
        address = f"127.0.0.1:{free_port()}"
        environment = {
            "CAPO_BIND": address,
            "CAPO_REPLICA_1": f"127.0.0.1:{self.ports['replica1']}",
            "CAPO_REPLICA_2": f"127.0.0.1:{self.ports['replica2']}",
            "CAPO_CONTROL": self.control.url.removeprefix("http://"),
        }
        with (self._folder / "haproxy.log").open("w") as log:
            command = [program("haproxy"), "-db", "-f", str(ROOT / "deploy/haproxy/haproxy.cfg")]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 30
            url = f"http://{address}"
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                assert time.monotonic() < deadline, (self._folder / "haproxy.log").read_text()
                time.sleep(0.2)
            yield url
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replicas]:
    monkeypatch.setenv("CAPO_DRAIN_SECONDS", "30")
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(running_postgres())
        monkeypatch.setenv("CAPO_DATABASE_URL", new_database(address, "replicas"))
        yield Replicas(tmp_path, stack)


async def test_nothing_fails_while_replicas_publish_swap_drain_and_die(
    replicas: Replicas, base: BaseModel, figures: Figures
) -> None:
    registry = Registry(replicas.data_dir / "registry")
    first = publish_random(registry, base, "support", rank=8, seed=1)
    second = publish_random(registry, base, "support", rank=8, seed=2)
    async with httpx.AsyncClient(base_url=replicas.url, timeout=120) as client:
        flip = await client.put("/v1/aliases/support", json={"revision": first.revision})
        assert flip.status_code == 200, flip.text
        load = Load(replicas.url, ["capo-tiny", "support"], STREAMS)
        running_load = asyncio.create_task(load.run())
        await load.more(5 * STREAMS)

        tuned = await asyncio.to_thread(tune_through_the_balancer, replicas.url)
        answers = [await client.post("/v1/completions", json={"model": tuned, "prompt": "a"}) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert {answer.headers["x-served-by"] for answer in answers} == {"replica1", "replica2"}

        began = time.monotonic()
        flip = await client.put("/v1/aliases/support", json={"revision": second.revision})
        assert flip.status_code == 200, flip.text
        for name in replicas.ports:
            await load.until(lambda sent, name=name: (sent.served_by, sent.model) == (name, second.revision))
        swap_seconds = time.monotonic() - began
        await load.more(2 * STREAMS)
        before = len(load.done)
        await load.more(4 * STREAMS)
        # A request of before the flip may still have been under way; those that follow have the new revision.
        old = [sent for sent in load.done[before:] if sent.model == first.revision]

        drained = replicas.replicas["replica1"].process
        drained.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(drained.wait, 60)
        await load.more(4 * STREAMS)
        cut_by_drain = load.cut()
        replicas.replicas["replica1"] = await asyncio.to_thread(replicas.start, "replica1")
        await load.until(lambda sent: sent.served_by == "replica1")

        killed_at = len(load.done)
        os.kill(replicas.replicas["replica2"].process.pid, signal.SIGKILL)
        await load.more(6 * STREAMS)
        load.stop()
        await running_load
    cut = load.cut()
    figures.record(
        "two replicas behind HAProxy",
        requests=len(load.done),
        failed=len(load.failed()),
        cut_by_the_drain=len(cut_by_drain),
        cut_by_the_kill=len(cut),
        swapped_on_both_after_seconds=swap_seconds,
        drain_exit_code=code,
    )
    assert load.failed() == []
    assert old == []
    assert (cut_by_drain, code) == ([], 0)
    assert len(cut) <= STREAMS
    assert all(is_of_the_killed(sent) for sent in cut), cut
    assert all(sent.served_by == "replica1" for sent in load.done[killed_at + 2 * STREAMS :])


def is_of_the_killed(sent: Sent) -> bool:
    return sent.is_stream and sent.served_by == "replica2"


def tune_through_the_balancer(url: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        uploaded = client.files.create(file=EXAMPLES / "support/train.jsonl", purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="capo-tiny", training_file=uploaded.id, hyperparameters={"n_epochs": 1, "batch_size": 32}
        )
        deadline = time.monotonic() + 300
        while job.status != "succeeded":
            assert job.status in ("queued", "running"), job.error
            assert time.monotonic() < deadline
            time.sleep(0.5)
            job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.fine_tuned_model is not None
        return job.fine_tuned_model
