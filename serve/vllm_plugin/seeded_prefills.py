"""Seeded requests whose prompt takes several steps, on a CPU.

Every step samples a token for every request, also for one whose prompt goes on in the next step; that token is thrown
away. vLLM 0.32 then turns the request's generator back (v1/worker/gpu_model_runner.py, ``_bookkeeping_sync``), with
``set_offset``, which generators on a CPU do not have: the engine ends. Here such a request lends the sampler no
generator in such a step, so there is nothing to turn back, and its answer does not hang on how its prompt was cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def use(runner: Any) -> None:
    """Change vLLM's ``CPUModelRunner``, or a class of its form. Not to be called twice."""
    sample, keep_books = runner._sample, runner._bookkeeping_sync

    def sample_with_generators_of_answers(self: Any, *arguments: Any, **named: Any) -> Any:
        generators = self.input_batch.generators
        is_discarded = self.discard_request_mask.np[: self.input_batch.num_reqs]
        # The sampler reads this very dictionary; until the books are kept nobody moves requests within the batch.
        self.capo_held_back = {
            index: generators.pop(index) for index in np.flatnonzero(is_discarded).tolist() if index in generators
        }
        return sample(self, *arguments, **named)

    def keep_books_and_give_back(self: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return keep_books(self, *arguments, **named)
        finally:
            self.input_batch.generators.update(self.__dict__.pop("capo_held_back", {}))

    runner._sample, runner._bookkeeping_sync = sample_with_generators_of_answers, keep_books_and_give_back
