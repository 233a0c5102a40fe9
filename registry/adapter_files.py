"""A PEFT adapter directory, checked on the CPU in pure Python before anything maps, loads or serves it.

vLLM takes adapters with NaN, integer weights, missing or surplus layers, or a rank other than the configured
one without a word, and answers with garbage. What passes here has the two files PEFT writes, nothing that
runs code, exactly paired finite float matrices of the declared ranks and, against a known base, of the right
shapes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from registry.adapter_config import MAX_RANK, AdapterConfig, check_scaling, read_adapter_config
from registry.adapter_fit import check_fit
from registry.adapter_shapes import ModuleShape, read_base_shapes
from registry.base_model import BaseModel
from registry.errors import InvalidArtifactError, InvalidNameError
from registry.files import regular_files
from registry.manifest import BaseModelIdentity, LoraShape, ManifestDraft
from registry.names import check_base_model_id, shown
from registry.safetensors_header import LARGEST_VALUE, SafetensorsHeader, TensorEntry, first_diverged, read_header

WEIGHTS_NAME = "adapter_model.safetensors"

# Names as vLLM's parse_fine_tuned_lora_name (vllm/lora/utils.py) and PEFT's load understand them.
_LORA_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))",
    re.ASCII,
)
# Narrowest first; integers and 8-bit floats turn into NaN or garbage in the engine.
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What the checks found out."""

    config: AdapterConfig
    rank: int
    """The largest rank of any module."""
    modules: tuple[str, ...]
    """Full names of the adapted modules, sorted."""
    dtype: str
    """As torch names it; the widest if several occur."""
    num_parameters: int
    notes: tuple[str, ...]
    """What could not be checked, one sentence each."""

    @property
    def target_modules(self) -> list[str]:
        """Last parts of the modules' names, sorted, each once."""
        return sorted({module.rpartition(".")[2] for module in self.modules})


@dataclass(frozen=True, slots=True)
class _Pair:
    module: str
    is_embedding: bool
    a: TensorEntry
    """[rank, in_features]"""
    b: TensorEntry
    """[out_features, rank]"""


def check_adapter(directory: Path, *, base_model: BaseModel | None = None, max_rank: int = MAX_RANK) -> AdapterReport:
    """Check an adapter directory; reads every byte of the weights once, writes nothing.

    Raises:
        InvalidArtifactError: ``code`` is a stable reason (unsupported_dora, rank_mismatch, not_finite, ...), the
            message says what to do instead.
        OSError: a file cannot be read.
    """
    files = regular_files(directory)
    weights = [path for path in files if path.endswith(".safetensors")]
    if weights != [WEIGHTS_NAME]:
        raise InvalidArtifactError(
            f"The directory holds {len(weights)} .safetensors files; exactly one, {WEIGHTS_NAME}, is "
            "allowed. Give a directory that PEFT's save_pretrained wrote.",
            code="no_adapter_weights" if WEIGHTS_NAME not in weights else "extra_weights",
        )
    config = read_adapter_config(directory, max_rank=max_rank)
    header = read_header(directory / WEIGHTS_NAME)
    pairs = _pair_up(header)
    for pair in pairs:
        _check_pair(pair, config)
    notes: list[str] = []
    if base_model is None:
        notes.append("No base model was given, so the shapes were not compared with one.")
    else:
        modules = {pair.module: ModuleShape(pair.a.shape[1], pair.b.shape[0]) for pair in pairs}
        notes += check_fit(modules, config, read_base_shapes(base_model.path))
    _check_values(directory / WEIGHTS_NAME, header)
    used = {tensor.dtype for tensor in header.tensors.values()}
    return AdapterReport(
        config=config,
        rank=max(pair.a.shape[0] for pair in pairs),
        modules=tuple(sorted(pair.module for pair in pairs)),
        dtype=[name for dtype, name in _DTYPES.items() if dtype in used][-1],
        num_parameters=sum(tensor.shape[0] * tensor.shape[1] for tensor in header.tensors.values()),
        notes=tuple(notes),
    )


def draft_for_adapter(name: str, report: AdapterReport, base_model: BaseModel | None) -> ManifestDraft:
    """The manifest of an adapter that somebody else trained: what its files say, and nothing else."""
    identity = base_model.identity if base_model is not None else _claimed_base(report.config.base_model_name)
    version = report.config.peft_version
    return ManifestDraft(
        kind="lora",
        name=name,
        base_model=identity,
        lora=LoraShape(
            rank=report.rank,
            alpha=report.config.alpha,
            target_modules=report.target_modules,
            use_rslora=report.config.use_rslora,
        ),
        dtype=report.dtype,
        library_versions={} if version is None else {"peft": version},
    )


def _pair_up(header: SafetensorsHeader) -> list[_Pair]:
    sides: dict[tuple[str, bool], dict[str, TensorEntry]] = {}
    for tensor in header.tensors.values():
        match = _LORA_TENSOR.fullmatch(tensor.name)
        if match is None:
            raise _unexpected_tensor(tensor.name)
        is_embedding = match["embedding"] is not None
        sides.setdefault((match["module"], is_embedding), {})[match["side"] or match["embedding"]] = tensor
    if not sides:
        raise InvalidArtifactError("The adapter has no tensors. Train it before you publish it.", code="no_tensors")
    modules = [module for module, _ in sides]
    for (module, _), pair in sides.items():
        if len(pair) != 2 or modules.count(module) != 1:
            raise InvalidArtifactError(
                f"The module {shown(module)} needs one lora_A and one lora_B. The file is cut or was edited; "
                "save the adapter again.",
                code="unpaired_tensor",
            )
    return [_Pair(module, is_embedding, pair["A"], pair["B"]) for (module, is_embedding), pair in sides.items()]


def _check_pair(pair: _Pair, config: AdapterConfig) -> None:
    for tensor in (pair.a, pair.b):
        if tensor.dtype not in _DTYPES:
            raise InvalidArtifactError(
                f"The tensor {shown(tensor.name)} is {tensor.dtype}; F32, BF16 and F16 are allowed. Save it "
                "as bfloat16.",
                code="unsupported_dtype",
            )
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise InvalidArtifactError(
                f"The tensor {shown(tensor.name)} has the shape {list(tensor.shape)}; LoRA matrices of "
                "linear layers have two sizes above 0.",
                code="unsupported_shape",
            )
    rank = config.rank_of(pair.module)
    if pair.a.shape[0] != rank or pair.b.shape[1] != rank:
        raise InvalidArtifactError(
            f"The module {shown(pair.module)} has lora_A {list(pair.a.shape)} and lora_B "
            f"{list(pair.b.shape)}, but adapter_config.json says rank {rank}. Use the configuration that was saved "
            "with these weights.",
            code="rank_mismatch",
        )
    check_scaling(config, pair.module)


def _check_values(path: Path, header: SafetensorsHeader) -> None:
    found = first_diverged(path, header)
    if found is not None:
        what = f"values of {LARGEST_VALUE} and more" if found.is_finite else "NaN or infinity"
        raise InvalidArtifactError(
            f"The tensor {shown(found.tensor)} holds {what}: the training diverged. Train with a lower "
            "learning rate or use an earlier checkpoint.",
            code="values_too_large" if found.is_finite else "not_finite",
        )


def _claimed_base(claim: str | None) -> BaseModelIdentity:
    """The base as the adapter's own configuration names it, if that is a model id; a path of another machine is
    not.
    """
    try:
        return BaseModelIdentity(id=check_base_model_id(claim or ""))
    except InvalidNameError:
        return BaseModelIdentity(id="unknown")


def _unexpected_tensor(name: str) -> InvalidArtifactError:
    advice = "Whole weights in an adapter cannot be served: merge it into the base model and publish that."
    if name.endswith(".base_layer.weight"):
        # PEFT adds the base's own embeddings when an embedding is adapted; the engine would skip them, changed or not.
        advice = "If the vocabulary is unchanged, save it again with save_pretrained(..., save_embedding_layers=False)."
    return InvalidArtifactError(
        f"The tensor {shown(name)} is no LoRA matrix (base_model.model.<module>.lora_A.weight or lora_B). {advice}",
        code="unexpected_tensor",
    )
