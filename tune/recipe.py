"""What to train, on what, and how: one frozen record, YAML on the command line and JSON in the API.

Every default stands once, in the field that owns it, with its reason. Where a good value depends on
something else, the field is ``None`` (= choose for me) and a ``choose_*`` function in ``tune.choices``
returns the value together with the reason. Importing this module pulls in neither torch nor transformers.

    name: support
    base_model: capo-tiny
    stages:
      - kind: sft
        data: [{path: train.jsonl}]
        validation: {share: 0.1}
"""

from __future__ import annotations

from collections.abc import Hashable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from registry.errors import InvalidRequestError, NotFoundError
from registry.names import check_name, parse_alias


class Record(BaseModel):
    """Frozen; an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _suggest_the_nearest_key(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for key in given:
            if key in cls.model_fields:
                continue
            shown = str(key)[:80]
            near = get_close_matches(shown, cls.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown key {shown!r}; {hint}allowed: {', '.join(cls.model_fields)}")
        return given


class LoraMethod(Record):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685) on the frozen base."""

    kind: Literal["lora"] = "lora"
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
        "PEFT's method comparison.",
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

    @property
    def scaled_alpha(self) -> int:
        return 2 * self.rank if self.alpha is None else self.alpha

    @model_validator(mode="after")
    def _some_module_must_be_adapted(self) -> LoraMethod:
        if self.target_modules != "all-linear" and not self.target_modules:
            raise ValueError("target_modules is empty, so nothing would be trained; name layers or use 'all-linear'")
        return self


class FullMethod(Record):
    """All weights are trained; the result is a model of its own (artifact kind ``merged``)."""

    kind: Literal["full"] = "full"


class DataSource(Record):
    """One JSONL file of training rows."""

    path: Path = Field(description="Relative paths start at the recipe file's directory.")
    weight: float = Field(
        1.0,
        gt=0.0,
        le=100.0,
        description="How often an epoch visits each row: 1 = once, 2 = twice, 0.25 = a newly drawn quarter of them.",
    )


class Validation(Record):
    """Held-out rows: a file of their own, or a share of the training files (exactly one of the two)."""

    path: Path | None = Field(None, description="Relative paths start at the recipe file's directory.")
    share: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Equal rows always land on the same side, so none leaks into training.",
    )

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Validation:
        if (self.path is None) == (self.share is None):
            raise ValueError(f"give either path or share, got path={self.path} and share={self.share}")
        return self


class Stage(Record):
    """One pass of training with one objective; stages run in order on the same weights."""

    kind: Literal["sft", "cpt"] = Field(
        description="sft: chat rows, loss on assistant turns. cpt (continued pre-training): text rows, loss on all."
    )
    data: tuple[DataSource, ...] = Field(min_length=1)
    validation: Validation | None = Field(
        None, description="{path: FILE} or {share: 0.1}. None = no validation figures for this stage."
    )
    epochs: float | None = Field(
        None, gt=0.0, le=1000.0, description="Passes over the data. None = chosen, unless max_steps is given."
    )
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps, instead of epochs.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Sequences per forward pass. None = chosen from the number of examples.",
    )
    gradient_accumulation_steps: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Forward passes per optimizer step. None = chosen from the number of examples.",
    )
    learning_rate: float | None = Field(
        None, gt=0.0, le=1.0, description="Peak. None = chosen from method, kind and the base's width."
    )
    learning_rate_multiplier: float = Field(
        1.0, gt=0.0, le=1000.0, description="Of the chosen rate; OpenAI's word for it. 1 where learning_rate is given."
    )
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine",
        description="After warm-up. Cosine is the default of LLaMA-Factory, ms-swift, Axolotl and torchtune.",
    )
    final_learning_rate_share: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="The schedule ends at this share of the peak; a tenth, as in Chinchilla "
        "(https://arxiv.org/abs/2203.15556), keeps the last steps useful. Not used by 'constant'.",
    )
    warmup_share: float = Field(
        0.05,
        ge=0.0,
        lt=1.0,
        description="Share of the steps in which the rate rises from 0; fields use 3 to 10 %.",
    )
    weight_decay: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="AdamW's. 0: adapters start at zero and stay small; set 0.1 for long cpt runs.",
    )
    adam_beta2: float = Field(
        0.999,
        gt=0.0,
        lt=1.0,
        description="AdamW's second decay; 0.999 is torch's default, 0.95 suits training from scratch.",
    )
    max_grad_norm: float = Field(1.0, gt=0.0, description="Gradients are scaled down to this L2 norm.")
    max_length: int | None = Field(
        None, ge=8, description="Tokens per sequence. None = the base's context length, at most 2048."
    )
    over_length: Literal["truncate", "drop", "refuse"] = Field(
        "truncate",
        description="What happens to an sft row longer than max_length; each is counted and reported by its line. "
        "cpt rows are cut into windows and lose nothing.",
    )
    packing: bool | None = Field(
        None,
        description="Fill sequences with several examples that do not see each other. None = yes for cpt, no for sft "
        "(where a batch then counts rows).",
    )
    evaluate_every_steps: int | None = Field(
        None, ge=1, description="None = validate before the first step and after the last one only."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: about 40 % less memory, 20 % slower (torchtune).",
    )

    @model_validator(mode="after")
    def _fields_must_fit_together(self) -> Stage:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"epochs={self.epochs:g} and max_steps={self.max_steps} both say when to stop; keep one of them"
            )
        if self.learning_rate is not None and self.learning_rate_multiplier != 1.0:
            raise ValueError(
                f"learning_rate={self.learning_rate:g} is the rate itself, and learning_rate_multiplier="
                f"{self.learning_rate_multiplier:g} scales the one that is chosen; keep one of them"
            )
        if self.evaluate_every_steps is not None and self.validation is None:
            raise ValueError(
                f"evaluate_every_steps={self.evaluate_every_steps} needs rows to evaluate on, but validation is not "
                "set; add validation: {share: 0.1} or validation: {path: FILE}"
            )
        return self


class Recipe(Record):
    """Everything that decides a training run, apart from the machine."""

    name: str = Field(description="Name of the artifact; lower case letters, digits, '.', '_' and '-'.")
    base_model: str = Field(
        description="capo-tiny, a directory, name@revision of a merged artifact, or a Hugging Face id."
    )
    method: Annotated[LoraMethod | FullMethod, Field(discriminator="kind")] = Field(
        default_factory=LoraMethod, description="LoRA by default: servable beside thousands of others."
    )
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=16)
    seed: int = Field(42, ge=0, lt=2**32, description="Decides data order, adapter initialisation and dropout.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the arithmetic. auto = bfloat16 on a GPU that has it, else float32."
    )
    save_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the exported weights. auto = an adapter keeps the training dtype; a full model is stored in "
        "bfloat16, the dtype in which engines serve. The last validation and the probes run on the rounded weights.",
    )
    checkpoint_every_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between resumable checkpoints. None = only where a stage ends or a stop is asked for.",
    )
    promote_alias: str | None = Field(None, description="Alias that points to the result once it is published.")

    @field_validator("name")
    @classmethod
    def _name_must_be_publishable(cls, value: str) -> str:
        return check_name(value)

    @field_validator("promote_alias")
    @classmethod
    def _alias_must_be_settable(cls, value: str | None) -> str | None:
        return None if value is None else parse_alias(value).text


def parse_recipe(given: object) -> Recipe:
    """Check an already decoded recipe (JSON of the API, YAML of a file).

    Raises:
        InvalidRequestError: naming the field in ``param``; unknown keys come with the nearest known one.
    """
    if not isinstance(given, dict):
        raise InvalidRequestError(
            f"a recipe must be a mapping with at least name, base_model and stages, got {type(given).__name__}"
        )
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = _field_path(first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] in ("value_error", "missing") else f", got {_shortened(first['input'])}"
        raise InvalidRequestError(
            f"recipe{': ' + where if where else ''}: {reason}{got}",
            code="invalid_recipe",
            param=where or None,
        ) from error


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe. Relative data paths stay as written; pass ``path.parent`` to ``tune.session.run``.

    Raises:
        NotFoundError: there is no such file.
        InvalidRequestError: not UTF-8, not YAML, a key given twice, or not a valid recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFoundError(f"there is no recipe file at {path}", param="recipe") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        return parse_recipe(yaml.load(text, Loader=_UniqueKeyLoader))  # noqa: S506 - a SafeLoader, see its class
    except yaml.YAMLError as error:
        raise InvalidRequestError(f"{path} is not valid YAML: {error}", code="invalid_recipe") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a recipe must not lose settings that way."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _field_path(location: tuple[int | str, ...]) -> str:
    """``("stages", 0, "data")`` -> ``stages[0].data``, without the tags pydantic adds for unions."""
    tags = {"lora", "full", "tuple[str, ...]", "literal['all-linear']"}
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in tags:
            path += f".{part}" if path else part
    return path


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
