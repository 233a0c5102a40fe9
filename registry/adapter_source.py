"""Which files of a directory that a trainer wrote are the adapter: those, and no others, enter the registry.

Beside them trainers leave what nobody serves and not everybody should see: pickled optimizers and arguments,
checkpoints, logs, ``.env`` and ``.git``. None of that is copied, so none of it need be refused either.
"""

from __future__ import annotations

import os
from pathlib import Path

from registry.adapter_config import CONFIG_NAME
from registry.adapter_files import WEIGHTS_NAME
from registry.errors import InvalidArtifactError
from registry.files import plain_files
from registry.names import shown

_PICKLED_WEIGHTS = "adapter_model.bin"
_MODEL_CARD = "README.md"
"""Says where the weights come from and who may use them."""

# Trained beside the adapter, which answers otherwise without them: embeddings of new tokens, LLaVA's projector.
_MORE_WEIGHTS = ("new_embeddings.bin", "non_lora_trainables.bin")
_MOST_FOLDERS_SHOWN = 3


def files_of_adapter(directory: Path) -> list[str]:
    """The names of the files to take, sorted. Opens none.

    Raises:
        InvalidArtifactError: the weights are missing, pickled, or only a part of what was trained; or a file to take
            is a link, has hard links, or is no regular file.
        OSError: the directory cannot be read.
    """
    with os.scandir(directory) as entries:
        folders = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    if WEIGHTS_NAME not in folders:
        raise _without_weights(directory, folders)
    more = [name for name in sorted(folders) if name in _MORE_WEIGHTS or name.endswith(".safetensors")]
    if more != [WEIGHTS_NAME]:
        others = ", ".join(shown(name) for name in more if name != WEIGHTS_NAME)
        raise InvalidArtifactError(
            f"Beside {WEIGHTS_NAME} the directory holds more weights, {others}, and the engine would serve the adapter "
            "without them. Train without them, or remove them if the adapter does not need them.",
            code="extra_weights",
        )
    return plain_files(directory, (CONFIG_NAME, WEIGHTS_NAME, _MODEL_CARD))


def _without_weights(directory: Path, folders: dict[str, bool]) -> InvalidArtifactError:
    if _PICKLED_WEIGHTS in folders:
        return InvalidArtifactError(
            f"The weights are in {_PICKLED_WEIGHTS}, a pickle, and loading it can run code. If you trust it, load the "
            f"adapter with PEFT and save it again with save_pretrained, which writes {WEIGHTS_NAME}.",
            code="pickle_not_allowed",
        )
    within = sorted(
        name for name, is_folder in folders.items() if is_folder and os.path.lexists(directory / name / WEIGHTS_NAME)
    )
    advice = "Give a directory that PEFT's save_pretrained wrote."
    if within:
        advice = (
            f"Give one of the directories in it that hold one: {', '.join(map(shown, within[:_MOST_FOLDERS_SHOWN]))}."
        )
    return InvalidArtifactError(f"The directory holds no {WEIGHTS_NAME}. {advice}", code="no_adapter_weights")
