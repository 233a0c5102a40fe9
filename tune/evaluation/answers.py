"""Greedy answers in batches, with a key-value cache, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from tune.evaluation.questions import Question


@dataclass(frozen=True, slots=True)
class Answers:
    token_ids: list[tuple[int, ...]]
    """By question, without the token that ended the answer."""
    tokens_per_second: float
    """Generated tokens over the time of generation."""
    peak_memory_bytes: int
    """Of the accelerator since generation began; on a CPU the largest resident size of the process that was seen
    between batches."""


@torch.no_grad()
def answer(
    model: Any, questions: Sequence[Question], *, stop_ids: frozenset[int], max_tokens: int, batch_size: int
) -> Answers:
    """Answer every question greedily, as serving does at temperature 0."""
    answers: list[tuple[int, ...]] = [()] * len(questions)
    memory = _MemoryPeak(model.device)
    num_tokens, seconds = 0, 0.0
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index].prompt_ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = _left_padded([questions[index].prompt_ids for index in chosen], model.device)
        started = time.perf_counter()
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            max_new_tokens=max_tokens,
            eos_token_id=sorted(stop_ids) or None,
            pad_token_id=0,
        )[:, ids.shape[1] :]
        seconds += time.perf_counter() - started
        for index, row in zip(chosen, generated.tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in stop_ids), len(row))
            answers[index] = tuple(row[:end])
            num_tokens += min(end + 1, len(row))
        memory.look()
    return Answers(answers, num_tokens / seconds if seconds else 0.0, memory.bytes)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, [B, T] each: answers then all begin at the same column."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


class _MemoryPeak:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def look(self) -> None:
        if self._device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self._device)
        else:
            now = psutil.Process().memory_info().rss
        self.bytes = max(self.bytes, now)
