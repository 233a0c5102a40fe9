"""What of the base is trained, and as what it is published. Imports neither torch nor transformers.

    method   trains                                    publishes
    lora     low-rank matrices beside the base         the adapter
    qlora    the same, beside a base held in 4 bits    the adapter, for the base in its own precision
    dora     direction by low rank, magnitude whole    whole weights, because vLLM loads no DoRA adapter
    freeze   chosen layers or weights                  whole weights
    full     all weights                               whole weights

Where whole weights are published, ``extract_lora_rank`` publishes a LoRA adapter in their place.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from tune.record import Record

# Starting values that PEFT knows and Capo refuses: the first word of PEFT's name -> why.
_CHANGES_THE_BASE = (
    "changes the base's own weights before training, so the adapter fits no engine that serves the base (vLLM refuses "
    "it); use 'default', 'gaussian' or 'orthogonal'"
)
_REFUSED_INITS = {
    "pissa": _CHANGES_THE_BASE,
    "olora": _CHANGES_THE_BASE,
    "corda": _CHANGES_THE_BASE,
    "loftq": _CHANGES_THE_BASE + "; for a base in 4 bits use method kind 'qlora'",
    "lora_ga": "changes the base's own weights during training; use 'default', 'gaussian' or 'orthogonal'",
    "eva": "needs a pass over the data before training, which Capo does not make; use 'orthogonal' or 'default'",
}
_EXTRACTION = (
    "Publish, in place of the whole weights, a LoRA adapter of this rank: the truncated singular value decomposition "
    "of tuned minus base weights, layer by layer. It serves beside other adapters; how far it is from the tuned "
    "weights stands in the manifest's metrics (extraction.relative_error). None = publish whole weights."
)


class LowRankMethod(Record):
    """What all low-rank methods share (LoRA, https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(
        16,
        ge=1,
        le=256,
        description="R. 16 suits up to about 10,000 rows (Axolotl, TRL); 16 is also vLLM's default "
        "max_lora_rank, so the adapter loads on an unchanged server. vLLM's largest is 512.",
    )
    alpha: int | None = Field(
        None,
        ge=1,
        description="The update is scaled by alpha / rank. None = 2 * rank, the setting of TRL, Axolotl and "
        "PEFT's method comparison; a start_from brings its own.",
    )
    dropout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="On the adapter's input. 0: PEFT's method comparison gains nothing by it.",
    )
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="Linear layers that get an adapter, by the last part of their name. all-linear (without "
        "lm_head): adapting the MLP layers matters most (LoRA Without Regret, thinkingmachines.ai, 2025).",
    )
    use_rslora: bool = Field(
        False,
        description="Scale by alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732); for ranks >= 64.",
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict,
        description="Ranks of single layers, by PEFT's rule: a key is a regular expression that matches the end of a "
        "layer's name from a dot on, and the first key that matches counts. {layers\\.5\\.mlp\\..*: 32}",
    )
    alpha_pattern: dict[str, int] = Field(
        default_factory=dict,
        description="Alphas of single layers, by the same rule. Without one, a layer has alpha, also where its rank "
        "differs.",
    )
    init: Literal["default", "gaussian", "orthogonal"] = Field(
        "default",
        description="Starting values; all make an update of zero. default: A Kaiming-uniform, B zero (PEFT's and "
        "Microsoft's loralib). gaussian: A normal, B zero (the paper's). orthogonal: A and B orthogonal to each other.",
    )
    loraplus_ratio: float | None = Field(
        None,
        ge=1.0,
        le=256.0,
        description="LoRA+ (https://arxiv.org/abs/2402.12354): the learning rate of the B matrices over that of the A "
        "matrices, which is the stage's. The paper recommends 16, with a rate about half as high as without. "
        "None = one rate for both.",
    )

    @property
    def scaled_alpha(self) -> int:
        return 2 * self.rank if self.alpha is None else self.alpha

    @field_validator("init", mode="before")
    @classmethod
    def _init_must_leave_the_base_alone(cls, given: Any) -> Any:
        for name, reason in _REFUSED_INITS.items():
            if isinstance(given, str) and given.lower().startswith(name):
                raise ValueError(f"{given!r} {reason}")
        return given

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_must_compile(cls, given: dict[str, int]) -> dict[str, int]:
        for key, value in given.items():
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"the key {key!r} is no regular expression: {error}") from error
            if value < 1:
                raise ValueError(f"{key!r} has {value}; at least 1 is allowed")
        return given

    @model_validator(mode="after")
    def _fields_must_allow_an_adapter(self) -> LowRankMethod:
        if self.target_modules != "all-linear" and not self.target_modules:
            raise ValueError("target_modules is empty, so nothing would be trained; name layers or use 'all-linear'")
        ranks = [self.rank, *self.rank_pattern.values()]
        if max(ranks) > 256:
            raise ValueError(f"rank_pattern has the rank {max(ranks)}; at most 256 is allowed, as for rank")
        odd = [rank for rank in ranks if rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"init 'orthogonal' halves each rank and got {odd[0]}; give even ranks")
        return self


class LoraMethod(LowRankMethod):
    """Low-rank matrices beside the frozen base; published as an adapter."""

    kind: Literal["lora"] = "lora"


class QloraMethod(LowRankMethod):
    """LoRA beside a base held in 4 bits (https://arxiv.org/abs/2305.14314): NF4, computed in ``dtype``.

    The adapter is published for the base in its own precision, because that is what an engine serves. What the change
    of the base does is measured (metrics ``quantization.*``).
    """

    kind: Literal["qlora"] = "qlora"
    double_quantization: bool = Field(
        True, description="Quantise the block scales too: 0.37 bits a weight less (the paper, section 3)."
    )


class DoraMethod(LowRankMethod):
    """LoRA on the weights' direction, with a trained magnitude (https://arxiv.org/abs/2402.09353)."""

    kind: Literal["dora"] = "dora"
    extract_lora_rank: int | None = Field(None, ge=1, le=256, description=_EXTRACTION)


class FullMethod(Record):
    """All weights are trained; the result is a model of its own (artifact kind ``merged``)."""

    kind: Literal["full"] = "full"
    extract_lora_rank: int | None = Field(None, ge=1, le=256, description=_EXTRACTION)


class FreezeMethod(Record):
    """Some weights of the base are trained and the others stay; the result is a model of its own."""

    kind: Literal["freeze"] = "freeze"
    last_layers: int | None = Field(None, ge=1, description="Train this many transformer layers, from the last back.")
    trained: str | None = Field(
        None,
        description="Train the weights in whose name this regular expression is found, such as layers\\.[45]\\.mlp. "
        "Give either this or last_layers.",
    )
    extract_lora_rank: int | None = Field(None, ge=1, le=256, description=_EXTRACTION)

    @model_validator(mode="after")
    def _exactly_one_choice(self) -> FreezeMethod:
        if (self.last_layers is None) == (self.trained is None):
            raise ValueError(
                f"give either last_layers or trained, got last_layers={self.last_layers} and trained={self.trained}"
            )
        if self.trained is not None:
            try:
                re.compile(self.trained)
            except re.error as error:
                raise ValueError(f"trained={self.trained!r} is no regular expression: {error}") from error
        return self


AdapterMethod: TypeAlias = LoraMethod | QloraMethod | DoraMethod
WholeMethod: TypeAlias = FullMethod | FreezeMethod
Method: TypeAlias = AdapterMethod | WholeMethod


def publishes_adapter(method: Method) -> bool:
    """Whether the artifact is a LoRA adapter rather than a model of its own."""
    return isinstance(method, LoraMethod | QloraMethod) or method.extract_lora_rank is not None


def extracted_rank(method: Method) -> int | None:
    """Rank of the adapter that is extracted from whole weights, ``None`` where none is."""
    return None if isinstance(method, LoraMethod | QloraMethod) else method.extract_lora_rank
