"""GPTQ weights by GPTQModel, made in a process of its own.

Importing GPTQModel prints a banner to stdout and changes CUDA's environment variables, so it never happens in a process
of Capo's. What it writes is taken over selectively: it edits generation_config.json and tokenizer_config.json, and its
config names a temporary directory of this machine. Only the weights, and of the configuration only what the format
needs, are kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from registry.errors import InternalError, InvalidArtifactError, InvalidRequestError
from registry.safetensors_header import MAX_BASE_HEADER_BYTES, read_header
from tune.data.mask import Example
from tune.exports.model_files import INDEX_NAME, copy_companions
from tune.exports.settings import GptqExport

_GROUP_SIZES = (128, 64, 32)
_KEPT = ("bits", "group_size", "desc_act", "sym", "quant_method", "checkpoint_format", "lm_head", "pack_dtype")
_OUTPUT_SHOWN = 2000


def choose_group_size(model_dir: Path, asked: int | None) -> tuple[int, str]:
    """The group size, and why.

    Raises:
        InvalidRequestError: the asked one, or none at all, divides the inputs of every linear layer.
    """
    inputs = sorted(_inputs_of_linear_layers(model_dir))
    fitting = [size for size in _GROUP_SIZES if all(width % size == 0 for width in inputs)]
    if asked is not None and asked in fitting:
        return asked, "given"
    if asked is not None or not fitting:
        what = f"group_size={asked}" if asked is not None else "no group size"
        raise InvalidRequestError(
            f"{what} divides the inputs of every layer of this model ({', '.join(map(str, inputs))}); "
            + (f"take {' or '.join(map(str, fitting))}" if fitting else "GPTQ needs widths that 32 divides"),
            param="group_size",
        )
    return fitting[0], f"the largest of {', '.join(map(str, _GROUP_SIZES))} that divides the inputs of every layer"


def quantize(
    model_dir: Path,
    calibration: Sequence[Example],
    directory: Path,
    export: GptqExport,
    *,
    group_size: int,
    scratch: Path,
) -> None:
    """Write the quantised model into ``directory``. Blocks for seconds on a small model, an hour on a large one.

    ``scratch`` takes the model as GPTQModel writes it, and is the caller's to remove. GPTQModel's process ends with the
    thread that calls this.

    Raises:
        InvalidArtifactError: the model is quantised already.
        InternalError: GPTQModel failed; the message ends with what it said last.
    """
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config") is not None:
        raise InvalidArtifactError(
            f"{model_dir.name} is quantised already; export from the model it was made from.", code="already_quantized"
        )
    scratch = scratch.absolute()  # it is where GPTQModel's process runs
    made = scratch / "quantized"
    order = {
        "parent_pid": os.getpid(),
        "model": str(model_dir.absolute()),
        "output": str(made),
        "bits": export.bits,
        "group_size": group_size,
        "desc_act": export.desc_act,
        "calibration": [[int(i) for i in example.token_ids] for example in calibration],
    }
    (scratch / "order.json").write_text(json.dumps(order), encoding="utf-8")
    _run(scratch)
    made_config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    settings = made_config["quantization_config"]
    config["quantization_config"] = {key: settings[key] for key in _KEPT if key in settings}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in [*made.glob("*.safetensors"), *made.glob(INDEX_NAME)]:
        shutil.copyfile(path, directory / path.name)
    copy_companions(model_dir, directory)


def _run(scratch: Path) -> None:
    log = scratch / "output.txt"
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    # Its pool of helpers must be larger than the two that load; it counts cores, or threads where OpenMP is told.
    environment.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 1)))
    command = [sys.executable, "-m", "tune.exports.gptq_process", str(scratch / "order.json")]
    with log.open("wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=scratch, check=False)
    if done.returncode != 0:
        said = log.read_text(encoding="utf-8", errors="replace").strip()[-_OUTPUT_SHOWN:]
        raise InternalError(f"GPTQModel ended with status {done.returncode}: {said}")


def _inputs_of_linear_layers(model_dir: Path) -> set[int]:
    """Of the layers that get quantised: two-dimensional weights but for embeddings and the head."""
    found = set()
    for path in sorted(model_dir.glob("*.safetensors")):
        for entry in read_header(path.resolve(), max_header_bytes=MAX_BASE_HEADER_BYTES).tensors.values():
            is_layer = entry.name.endswith(".weight") and ".layers." in entry.name
            if is_layer and len(entry.shape) == 2:
                found.add(entry.shape[1])
    return found
