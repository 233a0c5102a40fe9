"""What of an example is trained, as text that a test can spell out."""

from __future__ import annotations

import numpy as np

from tune.data.mask import Example, Tokenizer


def decode_spans(tokenizer: Tokenizer, example: Example) -> list[str]:
    """The trained text of an example, span by span."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], example.trained, [False])).astype(np.int8)))
    return [str(tokenizer.decode(example.token_ids[start:end].tolist())) for start, end in edges.reshape(-1, 2)]
