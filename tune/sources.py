"""Where a stage's rows come from and how they are read: the part of a recipe that speaks of files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from tune.record import Record

RowFormat: TypeAlias = Literal["chat", "prompt-completion", "alpaca", "sharegpt", "preference", "text"]


class DataSource(Record):
    """One file or folder of training rows: JSONL, a JSON array, CSV, Parquet, or a Hugging Face dataset folder."""

    path: Path = Field(description="Relative paths start at the recipe file's directory.")
    format: RowFormat | None = Field(
        None, description="Of the rows. None = found out from the keys of the first row, and said."
    )
    system_prompt: str | None = Field(
        None,
        min_length=1,
        description="Put before every chat that has no system message of its own. None = rows stay as they are.",
    )
    ignored_keys: tuple[str, ...] = Field(
        (),
        description="Top-level keys of a row that are left out, for files that hold more columns than training reads.",
    )
    weight: float = Field(
        1.0,
        gt=0.0,
        le=100.0,
        description="How often an epoch visits each row: 1 = once, 2 = twice, 0.25 = a newly drawn quarter of them.",
    )


class Clean(Record):
    """What happens to rows before training, beyond the checks that every row must pass. Nothing unless asked for."""

    duplicates: Literal["keep", "drop_exact", "drop_near"] = Field(
        "keep",
        description="Over all sources of the stage; the first of its kind stays. Near: four fifths of the three-word "
        "sequences are shared (MinHash).",
    )
    personal_data: Literal["keep", "redact", "drop"] = Field(
        "keep",
        description="E-mail addresses, phone, card, bank account and social security numbers, IP addresses: replaced "
        "by their kind, or the row is dropped.",
    )


class Validation(Record):
    """Held-out rows: a file of their own, or a share of the training files (exactly one of the two).

    A file is read as the training files are, so that its figures are those of the same task; the stage's
    ``clean.personal_data`` holds for it as well. Rows of a share are what they are in their file.
    """

    path: Path | None = Field(None, description="Relative paths start at the recipe file's directory.")
    format: RowFormat | None = Field(
        None, description="Of the rows of path. None = found out from the keys of the first row, and said."
    )
    system_prompt: str | None = Field(
        None,
        description="Put before every chat of path that has no system message of its own; empty = rows stay as they "
        "are. None = that of the data, where all have the same.",
    )
    ignored_keys: tuple[str, ...] | None = Field(
        None, description="Top-level keys of a row of path that are left out. None = those of all data together."
    )
    share: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Equal rows always land on the same side, so none leaks into training.",
    )
    required: bool = Field(
        True,
        description="Of share. False = where all rows are equal and none can be held out, all are trained on, and a "
        "warning says so; True = that is an error.",
    )

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Validation:
        if (self.path is None) == (self.share is None):
            raise ValueError(f"give either path or share, got path={self.path} and share={self.share}")
        if self.path is not None and not self.required:
            raise ValueError(f"required=false is of share, and path={self.path} is read in any case; remove required")
        if self.share is not None:
            for name in ("format", "system_prompt", "ignored_keys"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} says how path is read, and the rows of share={self.share:g} "
                        "are read as their file is; give it there"
                    )
        return self
