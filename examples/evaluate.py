"""Ask a model questions greedily and count exact answers. Needs torch and transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    expected: str
    given: str
    """Without the end-of-turn token."""
    has_ended: bool
    """Whether the model ended its turn by itself."""

    @property
    def is_right(self) -> bool:
        return self.has_ended and self.given == self.expected


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def share_right(answers: Sequence[Answer]) -> float:
    """From 0 to 1."""
    return sum(answer.is_right for answer in answers) / len(answers)


def answer_rows(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, max_tokens: int = 64, batch_size: int = 32
) -> list[Answer]:
    """Greedy answers to all messages but the last of each row, which is the expected answer."""
    listed = model.generation_config.eos_token_id
    stop_ids = set(listed) if isinstance(listed, list) else {listed}
    answers = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts = [
            tokenizer.apply_chat_template(
                row["messages"][:-1], tools=row.get("tools"), tokenize=False, add_generation_prompt=True
            )
            for row in batch
        ]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            generated = model.generate(**encoded, max_new_tokens=max_tokens, do_sample=False)
        for row, token_ids in zip(batch, generated[:, encoded["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((i for i, token_id in enumerate(token_ids) if token_id in stop_ids), None)
            answers.append(
                Answer(
                    expected=row["messages"][-1]["content"],
                    given=tokenizer.decode(token_ids[:end]),
                    has_ended=end is not None,
                )
            )
    return answers
