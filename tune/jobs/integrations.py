"""OpenAI's integrations of a job: Weights & Biases, told of every step by the recipe's tracker of that name."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from registry.errors import InvalidRequestError
from tune.jobs.requests import IntegrationBody

_HOST = "api.wandb.ai"
_WITHOUT_KEY = ("offline", "disabled")
_MAX_TAG = 64
"""W&B's limit."""


def check_integrations(given: Sequence[IntegrationBody] | None) -> None:
    """Raises :class:`InvalidRequestError` unless a worker with this process's software and environment can do them."""
    if not given:
        return
    if len(given) > 1:
        raise InvalidRequestError(
            f"integrations has {len(given)} entries; a job has one, of type 'wandb'", param="integrations"
        )
    for tag in given[0].wandb.tags or ():
        if not 1 <= len(tag) <= _MAX_TAG:
            raise InvalidRequestError(
                f"integrations[0].wandb.tags: a tag has 1 to {_MAX_TAG} characters, got {tag[:80]!r}",
                param="integrations",
            )
    problem = wandb_problem(os.environ)
    if problem is not None:
        raise InvalidRequestError(
            f"integrations: wandb cannot be told of a job here: {problem}",
            code="integration_unavailable",
            param="integrations",
        )


def wandb_problem(environment: Mapping[str, str]) -> str | None:
    """Why a run could not be shown in Weights & Biases; ``None``: it can."""
    if find_spec("wandb") is None:
        return "the package is not installed; pip install 'capo-llm[wandb]' where jobs are worked"
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_MODE") in _WITHOUT_KEY or _is_logged_in(environment):
        return None
    return "there is no key; set WANDB_API_KEY for the service and its workers, or WANDB_MODE=offline"


def wandb_options(integrations: Sequence[Mapping[str, Any]], *, base_model: str, job_id: str | None) -> dict[str, Any]:
    """The recipe's keys for a job's integrations; the default tags are made as OpenAI makes its own."""
    if not integrations:
        return {}
    asked = integrations[0]["wandb"]
    tags = ["capo/finetune", f"capo/{base_model}"[:_MAX_TAG], *([f"capo/{job_id}"] if job_id is not None else [])]
    wandb = {
        "project": asked["project"],
        "name": asked.get("name") or job_id,
        "entity": asked.get("entity"),
        "tags": list(dict.fromkeys([*tags, *(asked.get("tags") or ())])),
    }
    return {"trackers": ["wandb"], "wandb": wandb}


def _is_logged_in(environment: Mapping[str, str]) -> bool:
    path = Path(environment.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
