"""``adapter_config.json`` as PEFT writes it, accepted only if the engine would compute the same as PEFT did.

vLLM 0.32 refuses some features (vllm/lora/peft_helper.py) and silently ignores others (fan_in_fan_out,
target_parameters, the peft_type itself), which gives wrong answers without an error. Here every key is known
to have no effect on a trained adapter, or must be off, or is read; an unknown key that is switched on is
refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from registry.errors import InvalidArtifactError
from registry.files import read_limited
from registry.names import shown
from registry.strict_json import parse_strict_json

CONFIG_NAME = "adapter_config.json"
_MAX_CONFIG_BYTES = 1 << 20
# The largest value vLLM takes for max_lora_rank (vllm/config/lora.py).
MAX_RANK = 512
# Common adapters scale by 0.25 to 32. 1024 leaves room and stops an alpha of 1e9, which the engine would
# take.
_MAX_SCALING = 1024.0

_MERGE = "Merge it into the base model (PEFT's merge_and_unload) and publish the merged model, or train without it."
_RETRAIN = "Train the adapter without it."

# What must be off: key -> (code, what to do). Off is null, false, or an empty list or object.
_MUST_BE_OFF: dict[str, tuple[str, str]] = {
    "use_dora": ("unsupported_dora", _MERGE),
    "lora_bias": ("unsupported_lora_bias", _MERGE),
    "modules_to_save": (
        "unsupported_modules_to_save",
        "Whole modules cannot be loaded beside the base. " + _MERGE,
    ),
    "layer_replication": ("unsupported_layer_replication", _MERGE),
    "alora_invocation_tokens": ("unsupported_alora", _RETRAIN),
    "trainable_token_indices": ("unsupported_trainable_token_indices", _MERGE),
    "target_parameters": ("unsupported_target_parameters", _MERGE),
    "fan_in_fan_out": ("unsupported_fan_in_fan_out", "It is for Conv1D models such as GPT-2. " + _MERGE),
    "use_bdlora": ("unsupported_bdlora", _MERGE),
    "use_qalora": ("unsupported_qalora", _MERGE),
    "arrow_config": ("unsupported_arrow", "Serve the adapters that it routes between one by one."),
    "kasa_config": ("unsupported_kasa", _MERGE),
    "velora_config": ("unsupported_velora", _MERGE),
    "monteclora_config": ("unsupported_monteclora", _MERGE),
    "megatron_config": ("unsupported_megatron", "Convert it to a plain PEFT adapter."),
    "ensure_weight_tying": ("unsupported_weight_tying", _MERGE),
    "auto_map": ("custom_code_not_allowed", "Nothing here runs code that came with weights. Remove the key."),
    "custom_code": (
        "custom_code_not_allowed",
        "Nothing here runs code that came with weights. Remove the key.",
    ),
}

# No effect on what a trained adapter computes: training-time options, the inputs of initialisers (init_lora_weights
# decides whether one was used), and notes.
_WITHOUT_EFFECT = frozenset(
    {
        "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
        "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
        "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    }
)  # fmt: skip

_READ = frozenset(
    {
        "alpha_pattern", "auto_mapping", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r",
        "rank_pattern", "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip

# These only choose the starting values of A and B, so that the saved adapter is a plain one. The others also change
# the base model's weights when PEFT loads the adapter (vllm/lora/peft_helper.py: _init_is_supported).
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})

# Keys of rank_pattern and alpha_pattern are regular expressions to PEFT. Without any operator but '.', matching cannot
# take long, and that is what PEFT itself writes.
_MODULE_SUFFIX = re.compile(r"\^?[A-Za-z0-9_.]{1,300}", re.ASCII)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    rank: int
    """For modules that no rank pattern names."""
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: tuple[str, ...] | str
    """Names, or one regular expression (or ``all-linear``) that is never evaluated here."""
    layers_to_transform: tuple[int, ...] | None
    exclude_modules: tuple[str, ...] | str
    """As ``target_modules``, what is left out of them; empty: nothing is."""
    base_model_name: str | None
    peft_version: str | None

    @property
    def has_exclusions(self) -> bool:
        return bool(self.exclude_modules)

    def rank_of(self, module: str) -> int:
        return next((rank for key, rank in self.rank_pattern.items() if _matches(key, module)), self.rank)

    def scaling_of(self, module: str) -> float:
        """What B @ A is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA (https://arxiv.org/abs/2312.03732)."""
        rank = self.rank_of(module)
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if _matches(key, module)), self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_adapter_config(directory: Path, *, max_rank: int = MAX_RANK) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Raises:
        InvalidArtifactError: ``code`` names the first thing that the engine cannot serve as it was trained.
        OSError: the file cannot be read.
    """
    raw = _load(directory)
    _check_kind(raw)
    _check_switches(raw)
    _check_init(raw)
    rank_pattern = {key: _rank(value, key, max_rank) for key, value in _pattern(raw, "rank_pattern").items()}
    return AdapterConfig(
        rank=_rank(raw.get("r"), "r", max_rank),
        alpha=_alpha(raw.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(raw, "use_rslora"),
        rank_pattern=rank_pattern,
        alpha_pattern={key: _alpha(value, key) for key, value in _pattern(raw, "alpha_pattern").items()},
        target_modules=_target_modules(raw.get("target_modules")),
        layers_to_transform=_layers(raw.get("layers_to_transform")),
        exclude_modules=_exclude_modules(raw.get("exclude_modules")),
        base_model_name=_optional_text(raw, "base_model_name_or_path"),
        peft_version=_optional_text(raw, "peft_version"),
    )


def check_scaling(config: AdapterConfig, module: str) -> None:
    scaling = config.scaling_of(module)
    if not 0 < scaling <= _MAX_SCALING:
        raise InvalidArtifactError(
            f"The adapter multiplies {shown(module)} by {scaling:g} (from lora_alpha and r); above 0 and at most "
            f"{_MAX_SCALING:g} is allowed. Check lora_alpha.",
            code="scaling_out_of_range",
        )


def _load(directory: Path) -> dict[str, object]:
    try:
        data = read_limited(directory / CONFIG_NAME, _MAX_CONFIG_BYTES)
    except FileNotFoundError as error:
        raise InvalidArtifactError(
            f"There is no {CONFIG_NAME}. Give a directory that PEFT's save_pretrained wrote.",
            code="no_adapter_config",
        ) from error
    try:
        raw = parse_strict_json(data)
    except ValueError as error:
        raise _invalid(f"is not JSON as it should be: {str(error)[:200]}") from error
    if not isinstance(raw, dict):
        raise _invalid("is no object")
    return raw


def _check_kind(raw: dict[str, object]) -> None:
    if raw.get("peft_type") != "LORA":
        raise InvalidArtifactError(
            f"The adapter's peft_type is {shown(str(raw.get('peft_type')))}; only LORA can be served as an adapter. "
            "Convert it (peft.convert_to_lora) or merge it into the base model.",
            code="unsupported_peft_type",
        )
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise InvalidArtifactError(
            f"The adapter's task_type is {shown(str(raw['task_type']))}; only CAUSAL_LM (or null) is "
            "served. Train the adapter for causal language modelling.",
            code="unsupported_task_type",
        )
    mapping = raw.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if mapping is not None and not (isinstance(library, str) and library.startswith("transformers.models.")):
        # PEFT imports parent_library when it loads the adapter.
        raise InvalidArtifactError(
            "The adapter's auto_mapping names a library outside transformers.models, which PEFT would import. "
            "Set it to null and task_type to CAUSAL_LM.",
            code="custom_code_not_allowed",
        )


def _check_switches(raw: dict[str, object]) -> None:
    for key, (code, advice) in _MUST_BE_OFF.items():
        if _is_on(raw.get(key)):
            raise InvalidArtifactError(f"The adapter uses {key}, which the engine cannot serve. {advice}", code=code)
    if raw.get("bias", "none") != "none":
        raise InvalidArtifactError(
            f"The adapter's bias is {shown(str(raw['bias']))}; only 'none' can be served. {_MERGE}",
            code="unsupported_bias",
        )
    known = _WITHOUT_EFFECT | _READ | set(_MUST_BE_OFF)
    for key, value in raw.items():
        if key not in known and _is_on(value):
            raise InvalidArtifactError(
                f"{CONFIG_NAME} sets {shown(key)}, which this version of Capo does not know, so it cannot tell whether "
                "the engine would serve it as trained. Remove the key if it has no effect.",
                code="unknown_config_key",
            )


def _check_init(raw: dict[str, object]) -> None:
    init = raw.get("init_lora_weights", True)
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS):
        return
    advice = "Save it again with PEFT's path_initial_model_for_weight_conversion, which makes it a plain adapter."
    if init == "loftq":  # of which PEFT converts none
        advice = _MERGE
    raise InvalidArtifactError(
        f"The adapter's init_lora_weights is {shown(str(init))}, which changes the base model's weights too. {advice}",
        code="unsupported_init",
    )


def _is_on(value: object) -> bool:
    return value is not None and value is not False and value != [] and value != {}


def _flag(raw: dict[str, object], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise _invalid(f"has {key} = {shown(str(value))}; allowed: true, false")
    return bool(value)


def _rank(value: object, key: str, max_rank: int) -> int:
    if type(value) is not int or not 1 <= value <= max_rank:
        raise InvalidArtifactError(
            f"{CONFIG_NAME} has the rank {shown(str(value))} ({shown(key)}); whole numbers from 1 to {max_rank} are "
            "allowed. Train with a smaller rank.",
            code="rank_out_of_range",
        )
    return value


def _alpha(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise _invalid(f"has the alpha {shown(str(value))} ({shown(key)}); a number above 0 and below 1e9 is allowed")
    return float(value)


def _pattern(raw: dict[str, object], key: str) -> dict[str, object]:
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _invalid(f"has a {key} that is no object")
    for module in value:
        if _MODULE_SUFFIX.fullmatch(module) is None:
            raise InvalidArtifactError(
                f"{key} has the key {shown(module)}; only module names are allowed, no other regular expressions. "
                "Write one entry per module.",
                code="unsupported_pattern",
            )
    return value


def _target_modules(value: object) -> tuple[str, ...] | str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise _invalid("has target_modules that is neither a text nor a list of names")


def _exclude_modules(value: object) -> tuple[str, ...] | str:
    if not value:
        return ()
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise _invalid("has exclude_modules that is neither a text nor a list of names")


def _layers(value: object) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    layers = [value] if type(value) is int else value
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise _invalid("has layers_to_transform that is no list of layer numbers")
    return tuple(layers)


def _optional_text(raw: dict[str, object], key: str) -> str | None:
    value = raw.get(key)
    return value if isinstance(value, str) and value else None


def _matches(key: str, module: str) -> bool:
    # The expression that PEFT (utils/other.py: get_pattern_key) and vLLM (PEFTHelper._match_pattern) use.
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _invalid(what: str) -> InvalidArtifactError:
    return InvalidArtifactError(
        f"{CONFIG_NAME} {what}. Save the adapter again with PEFT's save_pretrained.",
        code="invalid_adapter_config",
    )
