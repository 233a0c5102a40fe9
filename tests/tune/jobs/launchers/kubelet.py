"""What a node does with a Job's pod, in processes of this machine: the container's arguments and environment, with
directories for its volumes. No image, no isolation: a path below a mount becomes one below the directory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_pod(manifest: Mapping[str, Any], *, volumes: Mapping[str, Path], timeout_seconds: float) -> int:
    """Run the one container of a ``batch/v1`` Job to its end; its exit code.

    ``volumes`` are the directories of the claims and secrets by name; an emptyDir must be needed by nobody.
    """
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "command" not in container, "the image's entrypoint, which is capo"
    environment = {entry["name"]: _on_this_machine(entry["value"], pod, volumes) for entry in container["env"]}
    # A pod has nothing of the node's environment; this one has what the node's Python needs.
    environment |= {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    command = [sys.executable, "-m", "capo", *container["args"]]
    return subprocess.run(command, env=environment, timeout=timeout_seconds, check=False).returncode


def _on_this_machine(value: str, pod: Mapping[str, Any], volumes: Mapping[str, Path]) -> str:
    (container,) = pod["containers"]
    for mount in container["volumeMounts"]:
        if Path(value).is_relative_to(mount["mountPath"]):
            (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
            named = volume.get("persistentVolumeClaim", {}).get("claimName") or volume["secret"]["secretName"]
            return str(volumes[named] / Path(value).relative_to(mount["mountPath"]))
    return value
