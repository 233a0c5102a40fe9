"""Remake capo-tiny, from invented text to the published model directory, with Capo's own stages:

    python -m examples.capo_tiny.build

1. write the corpus, the chats and the held-out questions (seeded; their digests stand in ``data.sha256``)
2. train the tokenizer and write the model with random weights (``blank/``)
3. run ``recipe.yaml``: continued pre-training on the corpus, then supervised training on the chats
4. copy the published model into ``registry/models/capo-tiny/`` and ask it the held-out questions

Everything is made below ``--work-dir``; run it again there to go on after a stop.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tune.threads import prepare_environment

HERE = Path(__file__).parent
MODEL_DIR = HERE.parent.parent / "registry" / "models" / "capo-tiny"
DATA_FILES = ("corpus.jsonl", "chats.jsonl", "held_out.jsonl")
DIGESTS = HERE / "data.sha256"
_SEED = 1
_NUM_TEXTS = 6_000
_NUM_CHATS = 12_000


def write_data(directory: Path) -> None:
    """Write the three data files; the same bytes on every machine."""
    from examples.capo_tiny.dialogues import held_out_rows, training_rows
    from examples.capo_tiny.narratives import corpus

    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(
        DATA_FILES, (corpus(_NUM_TEXTS, _SEED), training_rows(_NUM_CHATS, _SEED), held_out_rows()), strict=True
    ):
        with (directory / name).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def data_digests(directory: Path) -> str:
    """The digests of the data files, in the format of ``sha256sum``."""
    return "".join(f"{hashlib.sha256((directory / name).read_bytes()).hexdigest()}  {name}\n" for name in DATA_FILES)


def tokenizer_texts(directory: Path) -> Iterator[str]:
    """What the tokenizer learns from: texts, messages and tool calls, without any template."""
    for line in _lines(directory / "corpus.jsonl"):
        yield json.loads(line)["text"]
    for line in _lines(directory / "chats.jsonl"):
        row = json.loads(line)
        yield from (json.dumps(tool["function"]) for tool in row.get("tools", ()))
        for message in row["messages"]:
            yield from _message_texts(message)


def build(work_dir: Path, model_dir: Path) -> None:
    """Make everything and replace the files of ``model_dir``. Blocks for the whole training."""
    from examples.capo_tiny.blank_model import write_blank_model
    from registry import Registry
    from tune.observers import ProgressBar
    from tune.recipe_file import load_recipe
    from tune.session import run

    write_data(work_dir)
    if not (work_dir / "blank").is_dir():
        write_blank_model(work_dir / "blank", tokenizer_texts(work_dir), seed=_SEED)
    with ProgressBar() as progress:
        result = run(
            load_recipe(HERE / "recipe.yaml"),
            registry=Registry(work_dir / "registry"),
            work_dir=work_dir / "run",
            observer=progress,
            recipe_dir=work_dir,
        )
    model_dir.mkdir(parents=True, exist_ok=True)
    for name in result.artifact.manifest.files:
        shutil.copyfile(result.artifact.path / name, model_dir / name)
    shutil.copyfile(work_dir / "held_out.jsonl", HERE / "held_out.jsonl")
    DIGESTS.write_text(data_digests(work_dir), "utf-8")


def held_out_share(model_dir: Path) -> float:
    """Share of the held-out questions that the model in ``model_dir`` answers word for word."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.evaluate import answer_rows, read_rows, share_right

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return share_right(answer_rows(model, tokenizer, read_rows(HERE / "held_out.jsonl")))


def main() -> None:
    parser = argparse.ArgumentParser(description="Remake capo-tiny.")
    parser.add_argument("--work-dir", type=Path, default=Path("build") / "capo-tiny")
    parser.add_argument("--model-dir", type=Path, default=MODEL_DIR)
    given = parser.parse_args()
    prepare_environment()
    started = time.monotonic(), time.process_time()
    build(given.work_dir, given.model_dir)
    wall, cpu = time.monotonic() - started[0], time.process_time() - started[1]
    print(f"{given.model_dir}: made in {wall:.0f} s ({cpu:.0f} s of CPU time)")
    print(f"held-out questions answered word for word: {held_out_share(given.model_dir):.1%}")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


def _message_texts(message: dict[str, Any]) -> Iterable[str]:
    if message["content"]:
        yield message["content"]
    for call in message.get("tool_calls", ()):
        yield json.dumps(call["function"])


if __name__ == "__main__":
    main()
