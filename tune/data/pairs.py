"""Preference rows as token ids: each is two examples of one store, the preferred answer and behind it the other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from tune.data.mask import ChatEncoder, Example
from tune.data.preferences import PreferenceRow


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt with the answer that is preferred and one that is not; in each only the answer is trained."""

    chosen: Example
    rejected: Example

    @property
    def prompt_token_ids(self) -> NDArray[np.int32]:
        """What both begin with."""
        return self.chosen.token_ids[: int(self.chosen.trained.argmax())]

    @property
    def key(self) -> bytes:
        """Equal for pairs with equal tokens."""
        sha = hashlib.sha256()
        for side in (self.chosen, self.rejected):
            sha.update(side.token_ids.tobytes() + b"|" + side.trained.tobytes() + b"||")
        return sha.digest()


class Pairs(Sequence[PreferenceExample]):
    """Preference rows as they lie in the data: at even places the chosen answer, behind it the rejected one."""

    def __init__(self, examples: Sequence[Example]) -> None:
        assert len(examples) % 2 == 0, len(examples)
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples) // 2

    @overload
    def __getitem__(self, index: int) -> PreferenceExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferenceExample]: ...
    def __getitem__(self, index: int | slice) -> PreferenceExample | list[PreferenceExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return PreferenceExample(self._examples[2 * number], self._examples[2 * number + 1])


def encode_preference(encoder: ChatEncoder, row: PreferenceRow) -> PreferenceExample:
    """Both answers behind the same prompt ids.

    Raises:
        RowFault: the template refuses the row.
    """
    return PreferenceExample(encoder.encode_answer(row.chosen), encoder.encode_answer(row.rejected))
