"""Base against tuned model on the same rows: everything a report shows, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tune.data.mask import Example
from tune.evaluation.answers import Answers, answer
from tune.evaluation.figures import is_exact, text_figures
from tune.evaluation.questions import Question, questions_of
from tune.evaluation.scoring import score

_TEXT_BATCH_SIZE = 8


@dataclass(frozen=True, slots=True)
class Rows:
    """What both models are judged on."""

    examples: Sequence[Example]
    general: Sequence[Example]
    """May be empty."""
    source: str
    """Where the examples are from, for a person."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One model on the rows."""

    figures: dict[str, float]
    answers: tuple[str, ...]
    """By question."""


@dataclass(frozen=True, slots=True)
class SideBySide:
    prompt: str
    expected: str
    base: str
    tuned: str

    @property
    def is_base_right(self) -> bool:
        return is_exact(self.base, self.expected)

    @property
    def is_tuned_right(self) -> bool:
        return is_exact(self.tuned, self.expected)


def measure(
    model: Any, tokenizer: Any, rows: Rows, *, stop_ids: frozenset[int], max_tokens: int, batch_size: int
) -> Measured:
    """All figures of one model, benchmarks apart."""
    held_out = score(model, rows.examples, batch_size=_TEXT_BATCH_SIZE)
    figures = {"loss": held_out.loss, "perplexity": held_out.perplexity, "token_accuracy": held_out.token_accuracy}
    questions = questions_of(rows.examples, stop_ids)
    texts: tuple[str, ...] = ()
    if questions:
        given = answer(model, questions, stop_ids=stop_ids, max_tokens=max_tokens, batch_size=batch_size)
        texts = tuple(_texts(tokenizer, given))
        figures |= text_figures(texts, expected_texts(tokenizer, questions))
        figures["tokens_per_second"] = given.tokens_per_second
        figures["peak_memory_bytes"] = float(given.peak_memory_bytes)
    if rows.general:
        general = score(model, rows.general, batch_size=_TEXT_BATCH_SIZE)
        figures |= {"general_loss": general.loss, "general_perplexity": general.perplexity}
    return Measured(figures, texts)


def side_by_side(
    tokenizer: Any, rows: Rows, base: Measured, tuned: Measured, stop_ids: frozenset[int]
) -> list[SideBySide]:
    questions = questions_of(rows.examples, stop_ids)
    prompts = [str(tokenizer.decode(question.prompt_ids)) for question in questions]
    expected = expected_texts(tokenizer, questions)
    return [SideBySide(*texts) for texts in zip(prompts, expected, base.answers, tuned.answers, strict=True)]


def expected_texts(tokenizer: Any, questions: Sequence[Question]) -> list[str]:
    return [_text(tokenizer, question.answer_ids) for question in questions]


def _texts(tokenizer: Any, answers: Answers) -> list[str]:
    return [_text(tokenizer, ids) for ids in answers.token_ids]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
