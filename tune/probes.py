"""Probes: short prompts with the trained model's own greedy answers, replayed by serving before it routes.

An engine adds the same numbers in another order and maybe in another dtype, so near ties may fall the other
way there. A probe therefore ends before the first token that won by less than ``MIN_MARGIN``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from registry.manifest import Probe
from tune.data.mask import Example
from tune.model import Trainable

NUM_PROBES = 4
"""In an artifact; each is answered again before the adapter takes traffic."""
MAX_COMPLETION_TOKENS = 16
MIN_MARGIN = 0.5
"""Between the two highest logits. bfloat16 keeps 8 bits: logits of 16 to 32 are 0.125 apart, 0.5 is four such steps."""

_CANDIDATES_PER_PROBE = 4
_MAX_TEXT_PROMPT_TOKENS = 16


def make_probes(
    trainable: Trainable, examples: Sequence[Example], stop_ids: frozenset[int], *, number: int = NUM_PROBES
) -> list[Probe]:
    """Up to ``number`` probes from the shortest different prompts in ``examples``.

    A completion holds the end-of-sequence token if the model chose it. Prompts whose first token is already a
    near tie give no probe, so the list may be shorter or empty.
    """
    prompts = sorted({tuple(_prompt_of(example)) for example in examples}, key=lambda ids: (len(ids), ids))
    was_training = trainable.model.training
    trainable.model.eval()
    probes: list[Probe] = []
    for prompt in prompts[: number * _CANDIDATES_PER_PROBE]:
        completion = _greedy(trainable, prompt, stop_ids)
        if completion:
            probes.append(Probe(prompt_token_ids=list(prompt), completion_token_ids=completion))
        if len(probes) == number:
            break
    trainable.model.train(was_training)
    return probes


def _prompt_of(example: Example) -> list[int]:
    """What comes before the first trained span; for running text, its first tokens."""
    first = int(example.trained.argmax())
    if first > 1:
        return [int(i) for i in example.token_ids[:first]]
    length = max(1, min(_MAX_TEXT_PROMPT_TOKENS, len(example.token_ids) // 2))
    return [int(i) for i in example.token_ids[:length]]


@torch.no_grad()
def _greedy(trainable: Trainable, prompt: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    """Without a cache: at most 16 forward passes over a short prompt, and nothing to get wrong."""
    ids = list(prompt)
    while len(ids) < len(prompt) + MAX_COMPLETION_TOKENS:
        token_ids = torch.tensor([ids], device=trainable.device)
        with trainable.autocast():
            logits = trainable.model(input_ids=token_ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        best = logits.float().topk(2)
        if float(best.values[0] - best.values[1]) < MIN_MARGIN:
            break
        ids.append(int(best.indices[0]))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]
