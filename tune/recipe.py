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

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from registry.names import check_name, parse_alias, parse_reference
from tune.evaluation.promotion import check_promotion
from tune.evaluation.settings import Evaluation
from tune.exports.settings import Export
from tune.methods import FreezeMethod, FullMethod, LoraMethod, Method, QloraMethod
from tune.record import Record
from tune.sources import Clean, DataSource, Validation


class EarlyStopping(Record):
    """End a stage once validation stops improving."""

    patience: int = Field(
        3,
        ge=1,
        le=1000,
        description="Validations in a row without a better valid_loss; Prechelt's UP rule takes 2 to 4.",
    )
    min_improvement: float = Field(
        0.0, ge=0.0, le=100.0, description="Nats by which valid_loss must fall to count as better; 0 = by anything."
    )


class Dpo(Record):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290) with its sigmoid loss.

    The reference is the model as it is when the stage begins: the base, or what earlier stages made of it.
    """

    beta: float = Field(
        0.1, gt=0.0, le=10.0, description="How dearly departing from the reference costs. 0.1: the paper's and TRL's."
    )
    sft_weight: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="Adds this times the mean cross-entropy of the preferred answer's tokens, so that it does not lose "
        "likelihood itself (https://arxiv.org/abs/2404.19733, section 2, which uses 1).",
    )


_CHATS = ("chat", "prompt-completion", "alpaca", "sharegpt")
_FORMATS_OF_KIND = {"sft": _CHATS, "cpt": ("text",), "mixed": (*_CHATS, "text"), "dpo": ("preference",)}


class Stage(Record):
    """One pass of training with one objective; stages run in order on the same weights."""

    kind: Literal["sft", "cpt", "mixed", "dpo"] = Field(
        description="sft: chat rows, loss on assistant turns. cpt (continued pre-training): text rows, loss on all. "
        "mixed: files of both, each with the loss of its rows. dpo: preference rows, see the field dpo."
    )
    data: tuple[DataSource, ...] = Field(min_length=1)
    clean: Clean = Field(default_factory=Clean, description="Duplicates and personal data: kept unless asked for.")
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
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="adamw: torch's fused one. adamw_8bit: bitsandbytes' with 8-bit states "
        "(https://arxiv.org/abs/2110.02861), 2 instead of 8 bytes for each trained weight.",
    )
    scheduler: Literal["cosine", "cosine_with_restarts", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="After warm-up. Cosine is the default of LLaMA-Factory, ms-swift, Axolotl and torchtune. "
        "cosine_with_restarts: https://arxiv.org/abs/1608.03983. wsd (warm-up, stable, decay): the peak is held and "
        "falls linearly in the last decay_share of the steps (https://arxiv.org/abs/2404.06395).",
    )
    num_cycles: int | None = Field(
        None, ge=1, le=1000, description="Of cosine_with_restarts, and of it only. None = chosen."
    )
    decay_share: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="Of wsd, and of it only: share of all steps in which the rate falls. None = chosen.",
    )
    final_learning_rate_share: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="The schedule ends at this share of the peak; a tenth, as in Chinchilla "
        "(https://arxiv.org/abs/2203.15556), keeps the last steps useful. Not used by 'constant'.",
    )
    warmup_share: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="Share of the steps in which the rate rises from 0. None = chosen, unless warmup_steps is given.",
    )
    warmup_steps: int | None = Field(None, ge=0, description="Instead of warmup_share.")
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
    neftune_alpha: float | None = Field(
        None,
        gt=0.0,
        le=100.0,
        description="Uniform noise of alpha / sqrt(T * width) on the embeddings while training (NEFTune, "
        "https://arxiv.org/abs/2310.05914; the authors use 5 to 15). None = no noise.",
    )
    max_grad_norm: float = Field(1.0, gt=0.0, description="Gradients are scaled down to this L2 norm.")
    dpo: Dpo | None = Field(None, description="Options of a dpo stage. None = their defaults.")
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
        description="Fill sequences with several examples that do not see each other. None = yes for cpt and mixed, no "
        "for sft (where a batch then counts rows). A dpo stage has none.",
    )
    group_by_length: bool = Field(
        False,
        description="Steps hold sequences of similar length, so that less is padded where packing cannot be; the order "
        "is then less random.",
    )
    evaluate_every_steps: int | None = Field(
        None, ge=1, description="None = validate before the first step and after the last one only."
    )
    evaluate_every_epochs: int | None = Field(
        None, ge=1, le=1000, description="At the end of every so many epochs, instead of evaluate_every_steps."
    )
    early_stopping: EarlyStopping | None = Field(
        None,
        description="{patience: 3}. Needs evaluate_every_steps or evaluate_every_epochs. None = the stage runs to its "
        "last step.",
    )
    final_weights: Literal["last", "best"] | None = Field(
        None,
        description="What the stage ends with: its last weights, or those with the lowest valid_loss. None = best "
        "where early_stopping is set, else last.",
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
        if self.dpo is not None and self.kind != "dpo":
            raise ValueError(f"dpo holds options of a dpo stage, and the kind of this one is {self.kind}; remove dpo")
        if self.kind == "dpo" and self.packing:
            raise ValueError("packing=True joins examples, and a dpo stage compares two answers; remove packing")
        if self.learning_rate is not None and self.learning_rate_multiplier != 1.0:
            raise ValueError(
                f"learning_rate={self.learning_rate:g} is the rate itself, and learning_rate_multiplier="
                f"{self.learning_rate_multiplier:g} scales the one that is chosen; keep one of them"
            )
        if self.warmup_share is not None and self.warmup_steps is not None:
            raise ValueError(
                f"warmup_share={self.warmup_share:g} and warmup_steps={self.warmup_steps} both say how long the rate "
                "rises; keep one of them"
            )
        for name, value, scheduler in (
            ("num_cycles", self.num_cycles, "cosine_with_restarts"),
            ("decay_share", self.decay_share, "wsd"),
        ):
            if value is not None and self.scheduler != scheduler:
                raise ValueError(f"{name}={value} belongs to scheduler {scheduler!r}, got {self.scheduler!r}")
        self._check_validations()
        if self.packing and self.group_by_length:
            raise ValueError(
                "packing=true leaves nothing to pad, so group_by_length=true has no effect; keep one of them"
            )
        for index, source in enumerate(self.data):
            if self.kind == "cpt" and source.system_prompt is not None:
                raise ValueError(f"data[{index}]: system_prompt stands before chats, and a cpt stage reads texts")
            if source.format is not None and source.format not in _FORMATS_OF_KIND[self.kind]:
                raise ValueError(
                    f"data[{index}]: a stage of kind {self.kind} reads {', '.join(_FORMATS_OF_KIND[self.kind])}, not "
                    f"format={source.format}"
                )
        if self.validation is not None and self.validation.path is not None:
            self._check_validation_file(self.validation)
        return self

    def _check_validations(self) -> None:
        given = {
            name: value
            for name in ("evaluate_every_steps", "evaluate_every_epochs")
            if (value := getattr(self, name)) is not None
        }
        if len(given) > 1:
            raise ValueError(
                f"evaluate_every_steps={self.evaluate_every_steps} and evaluate_every_epochs="
                f"{self.evaluate_every_epochs} both say when to validate; keep one of them"
            )
        if self.early_stopping is not None and not given:
            raise ValueError(
                f"early_stopping.patience={self.early_stopping.patience} counts validations, but evaluate_every_steps "
                "is not set (nor evaluate_every_epochs); set it, and validation"
            )
        if self.final_weights == "best" and not given:
            raise ValueError(
                "final_weights='best' compares validations, but evaluate_every_steps is not set (nor "
                "evaluate_every_epochs); set it, and validation"
            )
        for name, value in given.items():
            if self.validation is None:
                raise ValueError(
                    f"{name}={value} needs rows to evaluate on, but validation is not set; add validation: "
                    "{share: 0.1} or validation: {path: FILE}"
                )

    def _check_validation_file(self, validation: Validation) -> None:
        if self.kind == "cpt" and validation.system_prompt:
            raise ValueError("validation.system_prompt stands before chats, and a cpt stage reads texts")
        if validation.format is not None and validation.format not in _FORMATS_OF_KIND[self.kind]:
            raise ValueError(
                f"validation: a stage of kind {self.kind} reads {', '.join(_FORMATS_OF_KIND[self.kind])}, not "
                f"format={validation.format}"
            )
        prompts = {source.system_prompt for source in self.data}
        if validation.system_prompt is None and len(prompts) > 1:
            raise ValueError(
                f"validation.path={validation.path} takes the system prompt of the data, and the data have "
                f"{len(prompts)} different ones; say which with validation.system_prompt ('' = none)"
            )


class Wandb(Record):
    """Where and as what a run is shown in Weights & Biases."""

    project: str = Field(min_length=1, max_length=128)
    name: str | None = Field(None, min_length=1, max_length=128, description="Of the run. None = the recipe's name.")
    entity: str | None = Field(None, min_length=1, max_length=128, description="User or team. None = the key's own.")
    tags: tuple[str, ...] = Field((), max_length=32)


class Recipe(Record):
    """Everything that decides a training run, apart from the machine."""

    name: str = Field(description="Name of the artifact; lower case letters, digits, '.', '_' and '-'.")
    base_model: str = Field(
        description="capo-tiny, a directory, name@revision of a merged artifact, or a Hugging Face id."
    )
    start_from: str | None = Field(
        None,
        description="An adapter of the registry to go on from: an alias, an ft: name or name@revision. It must belong "
        "to base_model, and its rank, targets and scaling stay as they are. None = the base alone.",
    )
    method: Annotated[Method, Field(discriminator="kind")] = Field(
        default_factory=LoraMethod, description="LoRA by default: servable beside thousands of others."
    )
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=16)
    seed: int = Field(42, ge=0, lt=2**32, description="Decides data order, adapter initialisation and dropout.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of the arithmetic. auto = bfloat16 on a GPU that has it, else float32. float16 computes with a "
        "gradient scaler, on a GPU only, for those that lack bfloat16.",
    )
    save_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the exported weights. auto = an adapter keeps the training dtype; a full model is stored in "
        "bfloat16, the dtype in which engines serve. The last validation and the probes run on the rounded weights.",
    )
    parallel: Literal["data", "sharded"] = Field(
        "data",
        description="How several processes share a run (torchrun, accelerate). data = each holds the whole model, "
        "which is the fastest where it fits. sharded = each holds its part of the weights (and, for whole models, of "
        "gradients and optimizer state), for models that do not fit one device. One process alone holds all.",
    )
    checkpoint_every_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between resumable checkpoints. None = only where a stage ends or a stop is asked for.",
    )
    trackers: tuple[Literal["wandb", "mlflow"], ...] = Field(
        (),
        description="Told every step, beside TensorBoard's files, which every run writes. Where to and as whom is each "
        "tracker's own environment (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME).",
    )
    wandb: Wandb | None = Field(
        None, description="Of the tracker wandb: what stands in the place of its environment. None = the environment's."
    )
    promote_alias: str | None = Field(None, description="Alias that points to the result once it is published.")
    evaluation: Evaluation | None = Field(
        None,
        description="Base against tuned model after training: figures, answers side by side, and a report in the "
        "artifact. None = validation figures only.",
    )
    promote_if: str | None = Field(
        None,
        description="Moves the alias only if this holds of the evaluation's figures, as in 'exact_match > base + 0.05' "
        "(tune/evaluation/promotion.py). The result is published either way.",
    )
    exports: tuple[Export, ...] = Field(
        (), max_length=8, description="Further artifacts made of the result and verified against it: merge, gptq, lora."
    )

    @field_validator("name")
    @classmethod
    def _name_must_be_publishable(cls, value: str) -> str:
        return check_name(value)

    @model_validator(mode="after")
    def _only_adapters_go_on(self) -> Recipe:
        if self.start_from is None:
            return self
        parse_reference(self.start_from)
        if not isinstance(self.method, LoraMethod | QloraMethod):
            raise ValueError(
                f"start_from={self.start_from!r} is an adapter, and method.kind={self.method.kind!r} trains none that "
                "could begin as it; give kind lora or qlora"
            )
        return self

    @model_validator(mode="after")
    def _sharding_must_be_possible(self) -> Recipe:
        if self.parallel == "data":
            return self
        if isinstance(self.method, QloraMethod):
            raise ValueError(
                "parallel='sharded' cuts weights into parts, and the 4-bit blocks of method.kind='qlora' cannot be "
                "cut; give kind lora, or parallel data"
            )
        if isinstance(self.method, FullMethod | FreezeMethod):
            if self.dtype == "float16":
                raise ValueError(
                    f"parallel='sharded' with method.kind={self.method.kind!r} knows no gradient scaler, which "
                    "dtype='float16' needs: each process would see overflows of its part only; give bfloat16 or float32"
                )
            if any(stage.optimizer == "adamw_8bit" for stage in self.stages):
                raise ValueError(
                    f"parallel='sharded' with method.kind={self.method.kind!r} updates weights in parts, and "
                    "optimizer='adamw_8bit' takes whole ones only; give adamw"
                )
        return self

    @model_validator(mode="after")
    def _options_belong_to_a_tracker(self) -> Recipe:
        if self.wandb is not None and "wandb" not in self.trackers:
            raise ValueError(f"wandb.project={self.wandb.project!r} is given, but trackers does not name wandb; add it")
        return self

    @model_validator(mode="after")
    def _promotion_needs_measured_figures(self) -> Recipe:
        if self.promote_if is not None:
            check_promotion(self.promote_if, self.evaluation)
        return self

    @field_validator("promote_alias")
    @classmethod
    def _alias_must_be_settable(cls, value: str | None) -> str | None:
        return None if value is None else parse_alias(value).text
