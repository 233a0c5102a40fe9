"""How many log probabilities of prompt tokens one request may get.

Each of the n answers carries those of its whole prompt, and all become one piece of JSON, in the memory and on the loop
of the process that streams everybody's tokens. The bound is for all of a request together: checked once for what can be
told from the body, and again as the engine tells the lengths of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry import errors

MAX_PROMPT_LOGPROBS = 65_536
"""2 to 8 MB of JSON. 32 prompts of 1,024 tokens with one beside each token's own, as evaluations ask, or one of 3,120
tokens with 20."""


def check(body: Mapping[str, Any], num_prompt_tokens: int) -> None:
    """Whether ``body`` may ask for log probabilities of so many prompt tokens. The fields' own bounds hold.

    Raises:
        InvalidRequestError: they are too many.
    """
    fields = ["prompt_logprobs", *(["logprobs"] if body.get("echo") else [])]
    asked = {name: body[name] for name in fields if body.get(name) is not None}
    n = body.get("n") or 1
    number = num_prompt_tokens * n * sum(value + 1 for value in asked.values())  # a token's own comes with them
    if number > MAX_PROMPT_LOGPROBS:
        name, value = next(iter(asked.items()))
        beside = " beside echo" if name == "logprobs" else ""
        raise errors.InvalidRequestError(
            f"{name} is {value}{beside}: with n {n} these are {number} log probabilities of {num_prompt_tokens} prompt "
            f"tokens; at most {MAX_PROMPT_LOGPROBS} are allowed. Ask for fewer, with n 1, or of fewer and shorter "
            "prompts at a time.",
            param=name,
            code="logprobs_too_large",
        )


def least_prompt_tokens(body: Mapping[str, Any]) -> int:
    """How many there are at least: of texts only the engine can tell."""
    prompt, most = body.get("prompt"), body.get("truncate_prompt_tokens")
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    lengths = [len(each) if isinstance(each, list) else 1 for each in prompts]
    return sum(lengths if most is None else (min(length, most) for length in lengths))
