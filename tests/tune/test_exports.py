"""Exports: merged weights against PEFT, memory, tied embeddings, GPTQ against GPTQModel, extraction against numpy."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from registry import ManifestDraft, Registry, identify, locate_base_model
from registry.errors import InvalidArtifactError, InvalidRequestError
from tests.sizes import LONG
from tests.tune.samples import chat_rows, write_jsonl
from tune.evaluation.gptq_weights import dequantized, plain_weights
from tune.evaluation.loading import load
from tune.evaluation.rows import read_examples
from tune.evaluation.scoring import Distance, Score, distance
from tune.exports.gptq import choose_group_size
from tune.exports.merge import merge
from tune.exports.session import Source, export, locate_source, rows_for
from tune.exports.settings import GptqExport, LoraExport, MergeExport, Thresholds, choose_thresholds
from tune.exports.verification import judge

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)}
SHAPES |= {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}


def write_adapter(directory: Path, *, modules: tuple[str, ...] = LINEAR, vocabulary: int = 0, **config: Any) -> Path:
    """Random matrices large enough to change what the model says."""
    directory.mkdir(parents=True)
    config = {"r": 4, "lora_alpha": 8, **config}
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(2):
        for module in modules:
            block = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            rank = config.get("rank_pattern", {}).get(module, config["r"])
            inputs, outputs = SHAPES[module]
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=random) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=random) * 0.1
    targets = list(modules)
    if vocabulary:
        targets.append("embed_tokens")
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = (
            torch.randn(4, vocabulary, generator=random) * 0.1
        )
        tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.randn(64, 4, generator=random) * 0.1
    save_file(tensors, directory / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": targets, "bias": "none", **config}
    (directory / "adapter_config.json").write_text(json.dumps(document))
    return directory


def vocabulary_of(base_dir: Path) -> int:
    return int(json.loads((base_dir / "config.json").read_text())["vocab_size"])


@pytest.fixture(scope="module")
def examples(tokenizer: Any, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", chat_rows(100))
    return read_examples(path, tokenizer, base_dir, max_rows=100)


def peft_model(base_dir: Path, adapter_dir: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32, attn_implementation="sdpa")
    return PeftModel.from_pretrained(base, adapter_dir).eval()


# PEFT's warning of exactly what the last case is about.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"q_proj": 32}},
        {"modules": ("q_proj",), "vocabulary": True},
    ],
    ids=["plain", "rslora", "patterns", "tied embedding"],
)
def test_merged_weights_and_the_judged_adapter_answer_as_peft_does(
    tmp_path: Path, base_dir: Path, examples: Any, config: dict[str, Any]
) -> None:
    if "vocabulary" in config:
        config = {**config, "vocabulary": vocabulary_of(base_dir)}
    adapter = write_adapter(tmp_path / "adapter", **config)
    (tmp_path / "merged").mkdir()
    merge(base_dir, adapter, tmp_path / "merged", dtype="float32")
    reference = peft_model(base_dir, adapter)
    for candidate in (load(tmp_path / "merged"), load(base_dir, adapter)):
        found = distance(reference, candidate, examples, batch_size=10)
        assert found.top1_agreement == 1.0
        assert found.max_logit_gap <= 1e-3
        assert found.kl < 1e-6
    assert distance(load(base_dir), reference, examples, batch_size=10).max_logit_gap > 0.1, "the adapter does nothing"


def test_merging_into_one_use_of_tied_embeddings_separates_the_two(tmp_path: Path, base_dir: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", modules=("q_proj",), vocabulary=vocabulary_of(base_dir))
    (tmp_path / "merged").mkdir()
    assert merge(base_dir, adapter, tmp_path / "merged").is_untied
    weights, base = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base_dir / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(weights["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("num_files", [1, 2])
def test_a_tied_base_that_stores_its_head_too_gets_each_of_the_two_once(
    tmp_path: Path, base_dir: Path, num_files: int
) -> None:
    base, merged = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    merged.mkdir()
    weights = load_file(base_dir / "model.safetensors")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    parts = [weights, head] if num_files == 2 else [weights | head]
    for number, part in enumerate(parts):
        save_file(part, base / f"model-{number}.safetensors")
    files = {name: f"model-{number}.safetensors" for number, part in enumerate(parts) for name in part}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (base / "config.json").write_text((base_dir / "config.json").read_text())
    adapter = write_adapter(tmp_path / "adapter", modules=("q_proj",), vocabulary=vocabulary_of(base_dir))
    assert merge(base, adapter, merged).is_untied
    written = [load_file(path) for path in sorted(merged.glob("*.safetensors"))]
    assert [part.keys() for part in written] == [part.keys() for part in parts]
    assert torch.equal(written[-1]["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert not torch.equal(written[0]["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == files
    assert index["metadata"]["total_size"] == sum(t.nbytes for part in written for t in part.values())


def test_untouched_tensors_keep_their_bytes_and_rounding_happens_once(tmp_path: Path, base_dir: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", modules=("q_proj",))
    low = tmp_path / "low"
    low.mkdir()
    base = {name: tensor.bfloat16() for name, tensor in load_file(base_dir / "model.safetensors").items()}
    save_file(base, low / "model.safetensors")
    (low / "config.json").write_text((base_dir / "config.json").read_text())
    (tmp_path / "merged").mkdir()
    assert merge(low, adapter, tmp_path / "merged").dtype == "bfloat16"
    weights, factors = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for name, tensor in base.items():
        expected = tensor
        if "q_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            update = factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()
            expected = (tensor.double() + 2.0 * update).bfloat16()
            assert (weights[name] != expected).float().mean() < 1e-3  # float32 sums may round a tie the other way
            continue
        assert torch.equal(weights[name], expected), name


def test_an_adapter_of_another_shape_is_refused_before_anything_is_written(tmp_path: Path, base_dir: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", modules=("q_proj",))
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_A" in name)
    tensors[first] = torch.zeros(4, 63)
    save_file(tensors, adapter / "adapter_model.safetensors")
    (tmp_path / "merged").mkdir()
    with pytest.raises(InvalidArtifactError, match=r"\[64, 63\].*\[64, 64\]"):
        merge(base_dir, adapter, tmp_path / "merged")
    assert list((tmp_path / "merged").iterdir()) == []


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from tune.exports.merge import merge
torch.ones(8, 8) @ torch.ones(8, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_of_a_merge_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 240 MB in two files, one tensor of it 120 MB, within 60 MB more than the bare libraries."""
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    for directory in (base, adapter, merged):
        directory.mkdir()
    layer = "model.layers.0.mlp.up_proj"
    save_file({f"{layer}.weight": torch.ones(15_000, 2_000)}, base / "model-1.safetensors")
    save_file(
        {f"model.layers.{i}.norm.weight": torch.ones(10_000_000) for i in (1, 2, 3)}, base / "model-2.safetensors"
    )
    (base / "config.json").write_text("{}")
    factors = {"lora_A.weight": torch.ones(4, 2_000), "lora_B.weight": torch.ones(15_000, 4)}
    save_file({f"base_model.model.{layer}.{k}": v for k, v in factors.items()}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(base), str(adapter), str(merged)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 60 * 1024, f"{int(done.stdout) / 1024:.0f} MB"
    assert float(load_file(merged / "model-1.safetensors")[f"{layer}.weight"][-1, -1]) == 5.0


# Verification and publishing


def same() -> Distance:
    return Distance(0.0, 1.0, 0.0, Score(1.0, 0.5, 10), Score(1.0, 0.5, 10))


@pytest.mark.parametrize(
    ("changed", "thresholds", "reason"),
    [
        ({"kl": 0.2}, {"max_kl": 0.1}, "KL divergence is 0.2, at most 0.1"),
        ({"kl": float("nan")}, {"max_kl": 0.1}, "KL divergence is nan"),
        ({"top1_agreement": 0.8}, {"min_top1_agreement": 0.9}, "top-1 agreement is 0.8000, at least 0.9"),
        ({"candidate": Score(1.5, 0.5, 10)}, {"max_perplexity_change": 0.1}, "perplexity is 0.6487"),
        ({"max_logit_gap": 0.01}, {"max_logit_gap": 1e-3}, "logit gap is 0.01"),
    ],
)
def test_each_threshold_stops_an_export_and_says_why(
    changed: dict[str, Any], thresholds: dict[str, float], reason: str
) -> None:
    good = {name: getattr(same(), name) for name in ("kl", "top1_agreement", "max_logit_gap", "reference", "candidate")}
    limits = Thresholds(**thresholds)
    judge(same(), limits).require("it")
    with pytest.raises(InvalidArtifactError, match=reason) as caught:
        judge(Distance(**(good | changed)), limits).require("it")
    assert caught.value.code == "export_not_faithful"


def test_a_given_threshold_wins_over_the_chosen_one_and_leaves_the_others() -> None:
    thresholds, reason = choose_thresholds(GptqExport(thresholds=Thresholds(max_kl=0.5)), "int4")
    assert (thresholds.max_kl, thresholds.min_top1_agreement) == (0.5, 0.9)
    assert reason


@pytest.fixture
def published(tmp_path: Path, base_dir: Path) -> tuple[Registry, str]:
    registry = Registry(tmp_path / "registry")
    adapter = write_adapter(tmp_path / "adapter")
    return registry, registry.import_adapter(adapter, name="odd", base_model=locate_base_model(str(base_dir))).revision


@pytest.fixture
def located(published: tuple[Registry, str], base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.chdir(base_dir.parent)  # the base's id is its directory's name
    return locate_source(published[1], published[0])


def rows_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", chat_rows(100))


def test_a_merge_is_published_with_its_figures_parent_and_report(
    tmp_path: Path, published: tuple[Registry, str], located: Source
) -> None:
    registry, revision = published
    rows = rows_for(located, data=rows_file(tmp_path), directories=[], max_rows=100)
    artifact = export(located, MergeExport(dtype="float32"), rows, registry=registry)
    manifest = artifact.manifest
    assert (artifact.name, manifest.kind, manifest.dtype, manifest.parents) == (
        "odd-merged",
        "merged",
        "float32",
        [revision],
    )
    assert manifest.metrics["verification.top1_agreement"] == 1.0
    assert manifest.metrics["verification.max_logit_gap"] <= 1e-3
    assert {"report.json", "report.html", "model.safetensors"} <= set(manifest.files)
    assert registry.verify(artifact.revision) == []
    assert locate_base_model(artifact.revision, registry).id == artifact.revision


def test_an_export_beyond_its_thresholds_is_not_published(
    tmp_path: Path, published: tuple[Registry, str], located: Source
) -> None:
    registry, _ = published
    rows = rows_for(located, data=rows_file(tmp_path), directories=[], max_rows=20)
    never = MergeExport(dtype="bfloat16", thresholds=Thresholds(max_logit_gap=0.0))
    with pytest.raises(InvalidArtifactError, match=r"odd-merged' of odd@.* is not published: largest logit gap"):
        export(located, never, rows, registry=registry)
    assert registry.artifacts("odd-merged") == []
    with pytest.raises(InvalidRequestError, match="no tuned model with whole weights"):
        export(located, LoraExport(), rows, registry=registry)


@pytest.mark.filterwarnings("ignore")
def test_an_extracted_adapter_loses_what_numpys_decomposition_says(
    tmp_path: Path, published: tuple[Registry, str], located: Source, base_dir: Path
) -> None:
    registry, _ = published
    rows = rows_for(located, data=rows_file(tmp_path), directories=[], max_rows=20)
    merged = export(located, MergeExport(dtype="float32"), rows, registry=registry)
    loose = Thresholds(max_kl=100, min_top1_agreement=0, max_perplexity_change=1e6)
    adapter = export(
        locate_source(merged.revision, registry), LoraExport(rank=2, thresholds=loose), rows, registry=registry
    )
    base, tuned = load_file(base_dir / "model.safetensors"), load_file(merged.path / "model.safetensors")
    lost = whole = 0.0
    for name in base:
        change = (tuned[name].double() - base[name].double()).numpy()
        whole += float((change**2).sum())
        if ".layers." in name and change.ndim == 2:
            singular = np.linalg.svd(change, compute_uv=False)
            lost += float((singular[2:] ** 2).sum())
            expected = np.sqrt((singular[2:] ** 2).sum() / (singular**2).sum())
            measured = adapter.manifest.metrics[f"extraction.relative_error.{name.removesuffix('.weight')}"]
            assert measured == pytest.approx(expected, rel=1e-4)
    assert adapter.manifest.metrics["extraction.relative_error"] == pytest.approx(np.sqrt(lost / whole), rel=1e-4)
    whole_rank = export(locate_source(merged.revision, registry), LoraExport(rank=4), rows, registry=registry)
    assert whole_rank.manifest.metrics["extraction.relative_error"] < 1e-4
    assert whole_rank.manifest.metrics["verification.top1_agreement"] == 1.0


# GPTQ


def test_the_group_size_is_the_largest_that_divides_every_layers_inputs(base_dir: Path) -> None:
    assert choose_group_size(base_dir, None)[0] == 64
    assert choose_group_size(base_dir, 32) == (32, "given")
    with pytest.raises(InvalidRequestError, match="take 64 or 32"):
        choose_group_size(base_dir, 128)
    assert choose_group_size(locate_base_model("capo-tiny").path, None)[0] == 128


def test_a_killed_export_takes_gptqmodel_with_it_and_leaves_nothing_that_the_registry_does_not_sweep(
    tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQModel is stood in for by a module that tells its process id and sleeps. Killed as a worker kills a job."""
    modules, temporary, told = tmp_path / "modules", tmp_path / "temporary", tmp_path / "pid"
    modules.mkdir()
    temporary.mkdir()
    (modules / "torch.py").touch()
    (modules / "gptqmodel.py").write_text(
        f"import os, time\nwith open({str(told)!r} + '~', 'w') as file:\n    file.write(str(os.getpid()))\n"
        f"os.rename({str(told)!r} + '~', {str(told)!r})\ntime.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(modules))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    registry = Registry(tmp_path / "registry")
    source = locate_source(str(base_dir), registry)
    rows = rows_for(source, data=rows_file(tmp_path), directories=[], max_rows=2, calibration_rows=2)
    settings = GptqExport(name="never")
    exporting = multiprocessing.get_context("fork").Process(
        target=export, args=(source, settings, rows), kwargs={"registry": registry}
    )
    exporting.start()
    wait_until(told.is_file)
    quantizing = int(told.read_text())
    try:
        assert not has_ended(quantizing)
        exporting.kill()
        exporting.join()
        wait_until(lambda: has_ended(quantizing))
    finally:
        with suppress(ProcessLookupError):
            os.kill(quantizing, signal.SIGKILL)
    assert list(temporary.iterdir()) == []
    assert registry.gc().removed_staging == 2
    assert list((registry.root / "staging").iterdir()) == []


def has_ended(pid: int) -> bool:
    """A zombie has ended; reaping it is not ours."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


GPTQMODEL_SCRIPT = """
import sys
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
model = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.TORCH)
layers = {name: layer for name, layer in model.model.named_modules() if hasattr(layer, "dequantize_weight")}
save_file({name: layer.dequantize_weight().T.float().contiguous() for name, layer in layers.items()}, sys.argv[2])
"""


def check_unpacking(tmp_path: Path, base_dir: Path, bits: int) -> None:
    registry = Registry(tmp_path / "registry")
    source = locate_source(str(base_dir), registry)
    rows = rows_for(source, data=rows_file(tmp_path), directories=[], max_rows=40, calibration_rows=16)
    settings = GptqExport.model_validate({"name": "tiny-gptq", "calibration_rows": 16, "bits": bits})
    artifact = export(source, settings, rows, registry=registry)
    command = [sys.executable, "-c", GPTQMODEL_SCRIPT, str(artifact.path), str(tmp_path / "weights")]
    subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
    theirs, ours = load_file(tmp_path / "weights"), dict(plain_weights(artifact.path))
    assert len(theirs) == 14
    for name, weight in theirs.items():
        # Theirs come in bfloat16: scale and product are rounded to 8 bits each. A wrong zero point is a whole step off.
        torch.testing.assert_close(ours[f"{name}.weight"], weight, rtol=2**-7, atol=1e-6)


if LONG:  # two imports of GPTQModel each; the short suite quantises once, for the engine (tests/e2e)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_quantised_weights_are_unpacked_as_gptqmodel_unpacks_them(
        tmp_path: Path, base_dir: Path, bits: int
    ) -> None:
        check_unpacking(tmp_path, base_dir, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_weight_is_unpacked_to_what_its_numbers_say(bits: int) -> None:
    """Packed here number by number, as the format's description says; two groups, one output crossed by both."""
    inputs, outputs, groups, count = 64, 32, 2, 32 // bits
    random = np.random.default_rng(0)
    numbers = random.integers(0, 2**bits, (inputs, outputs))
    zeros = random.integers(1, 2**bits, (groups, outputs))
    scales = random.random((groups, outputs)).astype(np.float16)
    g_idx = random.permutation(np.repeat(np.arange(groups), inputs // groups))

    def packed(values: Any) -> Any:
        words = sum(values[place::count].astype(np.uint64) << np.uint64(bits * place) for place in range(count))
        return torch.from_numpy(np.asarray(words).astype(np.uint32).view(np.int32))

    weight = dequantized(
        packed(numbers), packed((zeros - 1).T).T, torch.from_numpy(scales), torch.from_numpy(g_idx), bits=bits
    )
    expected = [
        [float(scales[g_idx[i], o]) * (int(numbers[i, o]) - int(zeros[g_idx[i], o])) for i in range(inputs)]
        for o in range(outputs)
    ]
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_a_quantised_copy_of_something_merged_does_not_take_adapters_of_the_model_below(
    tmp_path: Path, base_dir: Path
) -> None:
    registry = Registry(tmp_path / "registry")
    draft = ManifestDraft(
        kind="gptq",
        name="merged-then-quantised",
        base_model=identify("tiny-base", base_dir),
        dtype="int4",
        quantized_from="f" * 64,
    )
    artifact = registry.publish(base_dir, draft)
    base = locate_base_model(artifact.revision, registry)
    assert base.takes_adapters_of("f" * 64)
    assert not base.takes_adapters_of("0" * 64)
