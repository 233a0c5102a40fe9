"""Log probabilities of a prompt beside other requests with adapters, on a CPU.

vLLM 0.32 computes logits of a prompt's own rows (v1/worker/gpu_model_runner.py, ``_get_prompt_logprobs_dict``) with
what it has told the LoRA kernels of the rows that the step samples, one for each request. So a prompt of seven tokens
beside three requests ends the engine, and any other gets the head of whatever adapter stands at the place of its row.
Here prompts are worked one by one, and the kernels are told whose rows they are.
"""

from __future__ import annotations

from typing import Any

from serve.vllm_plugin.cpu_lora import CapoPunicaWrapperCPU


def use(runner: Any) -> None:
    """Change vLLM's ``CPUModelRunner``, or a class of its form. Not to be called twice."""
    of_all = runner._get_prompt_logprobs_dict

    def one_by_one(self: Any, hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        asked: dict[str, int] = self.num_prompt_logprobs
        found: dict[str, Any] = {}
        try:
            for request_id in [each for each in asked if each in num_scheduled_tokens]:
                self.num_prompt_logprobs = {request_id: asked[request_id]}
                row = int(self.query_start_loc.np[self.input_batch.req_id_to_index[request_id]])
                with CapoPunicaWrapperCPU.logits_of_prompt(row):
                    found |= of_all(self, hidden_states, num_scheduled_tokens)
                if not self.num_prompt_logprobs:  # its prompt ended in this step
                    del asked[request_id]
        finally:
            self.num_prompt_logprobs = asked
        return found

    runner._get_prompt_logprobs_dict = one_by_one
