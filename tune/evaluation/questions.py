"""Prompts with the answers that are wanted, taken out of examples as training sees them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from tune.data.mask import Example


@dataclass(frozen=True, slots=True)
class Question:
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """Without the token that ends it."""


def questions_of(examples: Iterable[Example], stop_ids: Collection[int]) -> list[Question]:
    """One question for each trained answer; running text, which is trained from its start, asks nothing."""
    questions = []
    for example in examples:
        edges = np.flatnonzero(np.diff(np.concatenate(([False], example.trained, [False])).astype(np.int8)))
        for start, end in edges.reshape(-1, 2):
            if start <= 1:
                continue
            ids = [int(i) for i in example.token_ids]
            answer = ids[start:end]
            while answer and answer[-1] in stop_ids:
                answer.pop()
            questions.append(Question(tuple(ids[:start]), tuple(answer)))
    return questions
