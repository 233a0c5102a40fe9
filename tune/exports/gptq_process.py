"""``python -m tune.exports.gptq_process ORDER.json``: the one place that imports GPTQModel; a process of its own."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from tune.jobs.process import die_with_parent


def main(order_path: Path) -> None:
    """Quantise as the order says and save. Prints what GPTQModel prints."""
    order = json.loads(order_path.read_text(encoding="utf-8"))
    die_with_parent(order["parent_pid"], signal.SIGKILL)
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=order["bits"],
        group_size=order["group_size"],
        desc_act=order["desc_act"],
        sym=True,
        device="cuda" if torch.cuda.is_available() else "cpu",
        pack_impl="original",  # the default compiles C++ first, half a minute, and needs a compiler
    )
    model = GPTQModel.load(order["model"], config)
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in order["calibration"]]
    model.quantize(calibration, batch_size=4)
    model.save(order["output"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
