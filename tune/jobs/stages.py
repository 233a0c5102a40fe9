"""The stages of a job: the one that OpenAI's fields say, and whichever ``capo.stages`` puts before and behind it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from registry.errors import InvalidRequestError
from tune.jobs.requests import CapoBody

_DATA_OF_A_STAGE = re.compile(r"stages\[(?P<stage>\d+)\]\.(?P<what>data|validation)\b")
_DECIDED_BY_OPENAI = frozenset(
    {
        "kind",
        "data",
        "validation",
        "epochs",
        "max_steps",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "learning_rate_multiplier",
        "dpo",
    }
)


def main_stage_of(extension: CapoBody) -> int:
    """The place of OpenAI's stage among all: the one of ``capo.stages`` that names no data of its own.

    Raises:
        InvalidRequestError: there are several such, or none, or ``capo.stage`` is given beside.
    """
    if extension.stages is None:
        return 0
    if extension.stage is not None:
        raise InvalidRequestError(
            "capo.stage and capo.stages are both given; put the first into the entry of the second that has no data",
            param="capo.stage",
        )
    open_places = [index for index, stage in enumerate(extension.stages) if "data" not in stage]
    if len(open_places) != 1:
        raise InvalidRequestError(
            f"capo.stages has {len(open_places)} stages without data; exactly one is left open for the request's own "
            "files, method and hyper-parameters, the others name theirs",
            param="capo.stages",
        )
    return open_places[0]


def all_stages(extension: CapoBody, main: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The recipe's stages; ``main`` is OpenAI's. Paths in them are ids of files.

    Raises:
        InvalidRequestError: as :func:`main_stage_of`, or the open stage says what OpenAI's fields decide.
    """
    place = main_stage_of(extension)
    if extension.stages is None:
        return ({**main, **_additions(extension.stage or {}, main, "capo.stage")},)
    return tuple(
        {**main, **_additions(stage, main, f"capo.stages[{index}]")} if index == place else stage
        for index, stage in enumerate(extension.stages)
    )


def request_param(param: str | None, extension: CapoBody) -> str | None:
    """A recipe's field that names data, such as ``stages[0].validation``, in the words of the job's request."""
    named = None if param is None else _DATA_OF_A_STAGE.match(param)
    if named is None:
        return param
    if int(named["stage"]) != main_stage_of(extension):
        return f"capo.stages[{named['stage']}]"
    return "validation_file" if named["what"] == "validation" else "training_file"


def _additions(given: Mapping[str, Any], main: Mapping[str, Any], param: str) -> Mapping[str, Any]:
    for name in given:
        if name in _DECIDED_BY_OPENAI or main.get(name) is not None:
            raise InvalidRequestError(
                f"{param}.{name} is decided by another field of this request (OpenAI's hyper-parameters, files and "
                "method, or capo's own of that name); leave it out",
                param=f"{param}.{name}"[:120],
            )
    return given
