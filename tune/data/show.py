"""A row as training sees it: its tokens, with those that carry loss told apart."""

from __future__ import annotations

from collections.abc import Iterator

from tune.data.datafile import DataFile
from tune.data.encode import RowEncoder
from tune.data.faults import RowFault
from tune.data.mask import Example, Tokenizer
from tune.data.preferences import PreferenceRow


def labelled_examples(file: DataFile, tokenizer: Tokenizer) -> Iterator[tuple[int, list[tuple[str, Example]]]]:
    """For each row its line and its examples, each with a label.

    Raises:
        RowFault: at the first faulty row.
    """
    encoder = RowEncoder(tokenizer)
    for line, row in file.rows():
        if isinstance(row, RowFault):
            raise row
        examples = encoder.encode(row)
        names = ["chosen", "rejected"] if isinstance(row, PreferenceRow) else ["all"]
        if len(examples) != len(names):
            names = [f"part {number + 1}" for number in range(len(examples))]
        yield line, list(zip(names, examples, strict=True))


def pieces(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The text token by token, each with whether it is trained. Bytes of one character come out together."""
    waiting: list[int] = []
    was_trained = False
    for token_id, trained in zip(example.token_ids.tolist(), example.trained.tolist(), strict=True):
        if waiting and trained != was_trained:
            yield str(tokenizer.decode(waiting)), was_trained
            waiting = []
        waiting.append(token_id)
        was_trained = trained
        text = str(tokenizer.decode(waiting))
        if "\N{REPLACEMENT CHARACTER}" not in text:
            yield text, trained
            waiting = []
    if waiting:
        yield str(tokenizer.decode(waiting)), was_trained
