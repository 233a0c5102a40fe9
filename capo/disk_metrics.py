"""How full the disks are that Capo writes to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class DiskMetrics(Collector):
    """``directories`` by what they are to Capo; the name becomes the label. One that is not there has no series."""

    def __init__(self, directories: Mapping[str, Path]) -> None:
        self._directories = directories

    def collect(self) -> Iterator[Metric]:
        size = GaugeMetricFamily("capo_disk_size_bytes", "Size of the file system.", labels=("directory",))
        free = GaugeMetricFamily("capo_disk_free_bytes", "Free for us on the file system.", labels=("directory",))
        for name, directory in self._directories.items():
            try:
                status = os.statvfs(directory)
            except OSError:
                continue
            size.add_metric((name,), status.f_blocks * status.f_frsize)
            free.add_metric((name,), status.f_bavail * status.f_frsize)
        yield from (size, free)
