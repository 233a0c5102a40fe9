"""A real Prometheus with the rules of deploy/prometheus, scraping every second."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deploy.expressions import NAMESPACE, PROMETHEUS
from tests.ports import free_port
from tests.programs import program


@dataclass
class Prometheus:
    client: httpx.Client

    def series(self, query: str, *, since: float) -> list[list[float]]:
        """The values of each series between then and now that are numbers, second by second."""
        asked = {"query": query, "start": since, "end": time.time(), "step": 1}
        answer: dict[str, Any] = self.client.post("/api/v1/query_range", data=asked).json()
        assert answer["status"] == "success", f"{query}: {answer}"
        found = [[float(value) for _, value in series["values"]] for series in answer["data"]["result"]]
        return [numbers for values in found if (numbers := [value for value in values if value == value])]


@contextlib.contextmanager
def running_prometheus(
    folder: Path, targets: Mapping[str, str], *, credentials: str | None = None
) -> Iterator[Prometheus]:
    """``targets``: address by what is put into the label ``component``. ``credentials``: the key that scrapes show."""
    folder.mkdir(parents=True, exist_ok=True)
    static = [
        {"targets": [address], "labels": {"namespace": NAMESPACE, "component": component}}
        for component, address in targets.items()
    ]
    authorization = {} if credentials is None else {"authorization": {"credentials": credentials}}
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(PROMETHEUS / name) for name in ("slo.yaml", "recording.yaml", "alerts.yaml")],
        "scrape_configs": [{"job_name": "capo", "static_configs": static} | authorization],
    }
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(configuration))
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("w") as log, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/-/ready").status_code == 200:
                        break
                is_late = process.poll() is not None or time.monotonic() > deadline
                assert not is_late, (folder / "prometheus.log").read_text()
                time.sleep(0.1)
            yield Prometheus(client)
        finally:
            process.terminate()
            process.wait(20)
