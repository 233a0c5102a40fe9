"""What a recipe or ``capo export`` may ask for. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Annotated, Literal, NoReturn, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from registry.errors import InvalidRequestError
from registry.names import check_name
from tune.record import Record


class Thresholds(Record):
    """How far an export may be from what it was made from; beyond any of them it is not published."""

    max_kl: float | None = Field(None, ge=0.0, description="Mean divergence of next-token distributions, in nats.")
    min_top1_agreement: float | None = Field(
        None, ge=0.0, le=1.0, description="Share of tokens at which both find the same token most likely."
    )
    max_perplexity_change: float | None = Field(
        None, ge=0.0, description="Relative; a better perplexity always passes."
    )
    max_logit_gap: float | None = Field(None, ge=0.0, description="Of any single logit.")

    def or_else(self, defaults: Thresholds) -> Thresholds:
        """With every open value taken from ``defaults``."""
        given = {name: value for name, value in self.model_dump().items() if value is not None}
        return Thresholds(**(defaults.model_dump() | given))


class _Export(Record):
    name: str | None = Field(
        None, description="Of the new artifact. None = the exported one's, with the kind behind it."
    )
    max_rows: int = Field(100, ge=1, le=10_000, description="Held-out rows that both sides are compared on, at most.")
    thresholds: Thresholds = Field(
        default_factory=Thresholds, description="Open ones are chosen by kind and precision; the report says them."
    )

    @field_validator("name")
    @classmethod
    def _name_must_be_publishable(cls, value: str | None) -> str | None:
        return None if value is None else check_name(value)


class MergeExport(_Export):
    """The adapter added into its base's weights: a model of its own, kind ``merged``."""

    kind: Literal["merge"] = "merge"
    dtype: Literal["base", "float32", "bfloat16"] = Field(
        "base",
        description="Of the written weights; they are added in float32 and rounded once. base = each as the base has "
        "it, so that the merged model is as large as its base.",
    )


class GptqExport(_Export):
    """Weights in 4 or 8 bits (GPTQ, https://arxiv.org/abs/2210.17323), kind ``gptq``."""

    kind: Literal["gptq"] = "gptq"
    bits: Literal[4, 8] = Field(
        4, description="4 serves on CPU and GPU; 8 on a GPU only, vLLM's CPU kernel has 4 bits."
    )
    group_size: Literal[32, 64, 128] | None = Field(
        None,
        description="Inputs that share a scale. None = the largest that divides every layer's inputs; 128 is the usual "
        "one, smaller is more exact and larger on disk.",
    )
    desc_act: bool = Field(
        False,
        description="Quantise inputs in order of their activation: a little more exact, and slower to serve.",
    )
    calibration_rows: int = Field(
        128, ge=8, le=4096, description="Training rows it is calibrated on; 128 as in the paper, section 5."
    )


class LoraExport(_Export):
    """A LoRA adapter of a whole tuned model: truncated singular value decomposition of tuned minus base weights."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=256, description="As a recipe's method.rank; the error falls as it rises.")


class AwqExport(_Export):
    """Known, so that it can be refused with its reason."""

    kind: Literal["awq"] = "awq"

    @model_validator(mode="after")
    def _cannot_be_made(self) -> NoReturn:
        raise ValueError(
            "awq is not offered: GPTQModel 7.6 packs AWQ weights with CUDA only ('AWQ: CUDA is not available'), and an "
            "export that cannot be verified here is none; use kind gptq, which serves on the same engines"
        )


Export: TypeAlias = Annotated[MergeExport | GptqExport | LoraExport | AwqExport, Field(discriminator="kind")]

_FLOAT32_MERGE = Thresholds(max_kl=1e-6, min_top1_agreement=1.0, max_perplexity_change=1e-4, max_logit_gap=1e-3)
_ROUNDED_MERGE = Thresholds(max_kl=0.02, min_top1_agreement=0.97, max_perplexity_change=0.03)
_EIGHT_BITS = Thresholds(max_kl=0.02, min_top1_agreement=0.97, max_perplexity_change=0.03)
_FOUR_BITS = Thresholds(max_kl=0.15, min_top1_agreement=0.9, max_perplexity_change=0.15)


def choose_thresholds(export: MergeExport | GptqExport | LoraExport, dtype: str) -> tuple[Thresholds, str]:
    """What the export must keep to, and why. ``dtype``: of the written weights."""
    if isinstance(export, MergeExport) and dtype == "float32":
        defaults, reason = _FLOAT32_MERGE, "the same sums in another order, in 24 bits"
    elif isinstance(export, MergeExport):
        defaults, reason = (
            _ROUNDED_MERGE,
            "the sum of weight and update is rounded to 8 bits, as serving would round it",
        )
    elif isinstance(export, GptqExport) and export.bits == 8:
        defaults, reason = _EIGHT_BITS, "8 bits with a scale for each group lose about what bfloat16 does"
    elif isinstance(export, GptqExport):
        defaults, reason = (
            _FOUR_BITS,
            "4 bits cost up to a tenth of the perplexity on small models, little on large ones",
        )
    else:
        defaults, reason = _FOUR_BITS, "what the rank leaves out must not cost more than 4 bits would"
    return export.thresholds.or_else(defaults), reason


def parse_export(given: object) -> MergeExport | GptqExport | LoraExport:
    """
    Raises:
        InvalidRequestError: naming the field, or why this kind is not offered.
    """
    try:
        export = TypeAdapter[MergeExport | GptqExport | LoraExport | AwqExport](Export).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        reason = first["msg"].removeprefix("Value error, ")
        raise InvalidRequestError(f"export{': ' + where if where else ''}: {reason}", param=where or None) from error
    assert not isinstance(export, AwqExport), "no record of one can be made"
    return export
