"""What a model directory holds beside its weights and config.json."""

from __future__ import annotations

import shutil
from pathlib import Path

from registry.base_model import TOKENIZER_FILES

INDEX_NAME = "model.safetensors.index.json"

# What it takes to render, tokenise and stop as the base does.
_COMPANIONS = (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json")


def copy_companions(source: Path, directory: Path) -> None:
    """Copy them byte for byte, so that fingerprints and stop tokens stay the base's."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
