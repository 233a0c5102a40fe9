"""Rows to judge or calibrate on: from a file that somebody names, or those that an artifact was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from registry import Manifest
from registry.errors import InvalidDataError, InvalidRequestError, NotFoundError
from tune.data.datafile import open_data
from tune.data.faults import RowFault
from tune.data.mask import ChatEncoder, Example, encode_text
from tune.data.rows import ChatRow, TextRow
from tune.model import base_shape
from tune.recipe_file import parse_recipe
from tune.stages import prepare_stage

_LONGEST_TOKENS = 2048
_ADVICE = "name rows with --data FILE"


@dataclass(frozen=True, slots=True)
class JobRows:
    """What an artifact was trained on, and what was kept out of it."""

    trained: Sequence[Example]
    held_out: Sequence[Example]
    """Empty where the recipe had no validation."""


def read_examples(path: Path, tokenizer: Any, base_dir: Path, *, max_rows: int) -> list[Example]:
    """The first rows of a chat or text file of any format that training reads; a row that is too long is left out.

    Raises:
        InvalidDataError: at the first faulty row, or when none is left.
        NotFoundError: there is no such file.
    """
    longest = min(base_shape(base_dir).context_tokens or _LONGEST_TOKENS, _LONGEST_TOKENS)
    encoder: ChatEncoder | None = None
    examples: list[Example] = []
    for _, row in islice(open_data(path).rows(), max_rows):
        if isinstance(row, RowFault):
            raise InvalidDataError(f"{path}: {row.message}", line=row.line) from row
        if isinstance(row, ChatRow):
            encoder = encoder or ChatEncoder(tokenizer)
            examples += encoder.encode(row)
        elif isinstance(row, TextRow):
            examples += encode_text(tokenizer, row, longest)
        else:
            raise InvalidDataError(
                f"{path}: line {row.line} is a preference row; give chat or text rows", line=row.line
            )
    kept = [example for example in examples if len(example.token_ids) <= longest and example.trained.any()]
    if not kept:
        raise InvalidDataError(f"{path} holds no row with a trained token within {longest} tokens")
    return kept


def rows_of_job(manifest: Manifest, directories: Sequence[Path], tokenizer: Any, base_dir: Path) -> JobRows:
    """Read the data of the last stage with chats or texts again, from the first directory that has its files.

    Raises:
        InvalidRequestError: the manifest holds no recipe, or the files are not those it was trained on.
        NotFoundError: no directory has them.
    """
    if manifest.recipe is None:
        raise InvalidRequestError(f"{manifest.name} was imported, and nobody knows what it was trained on; {_ADVICE}")
    recipe = parse_recipe(manifest.recipe)
    index = max((i for i, stage in enumerate(recipe.stages) if stage.kind != "dpo"), default=None)
    if index is None:
        raise InvalidRequestError(f"{manifest.name} was trained on preference rows only; {_ADVICE}")
    stage = recipe.stages[index]
    files = [source.path for source in stage.data]
    if stage.validation is not None and stage.validation.path is not None:
        files.append(stage.validation.path)
    holding = next((folder for folder in directories if all((folder / file).exists() for file in files)), None)
    if holding is None:
        raise NotFoundError(f"the data of {manifest.name} ({', '.join(map(str, files))}) are not here; {_ADVICE}")
    ready = prepare_stage(recipe, index, tokenizer=tokenizer, base_shape=base_shape(base_dir), recipe_dir=holding)
    known = {record.sha256 for record in manifest.data}
    changed = [str(account.path) for account in ready.accounts if account.sha256 not in known]
    if changed:
        raise InvalidRequestError(f"{', '.join(changed)} changed since {manifest.name} was trained; {_ADVICE}")
    return JobRows(ready.data.examples, ready.data.validation)
