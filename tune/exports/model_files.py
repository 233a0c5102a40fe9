"""What a model directory holds beside its weights and config.json."""

from __future__ import annotations

import shutil
from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"

# What it takes to render, tokenise and stop as the base does.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_companions(source: Path, directory: Path) -> None:
    """Copy them byte for byte, so that fingerprints and stop tokens stay the base's."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
