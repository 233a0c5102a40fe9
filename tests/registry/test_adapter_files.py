"""Adapters from anywhere: served as trained, or refused with a reason and what to do instead."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry import Registry, check_adapter, locate_base_model
from registry.adapter_fit import WITHOUT_ADAPTED_EMBEDDINGS
from registry.errors import InvalidArtifactError, InvalidNameError, ModelNotFoundError
from tests.registry.samples import ADAPTER_CONFIG, Tensors, adapter_tensors, write_adapter, write_base

STEM = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"


def _refusal(directory: Path, base: Path | None = None) -> InvalidArtifactError:
    with pytest.raises(InvalidArtifactError) as caught:
        check_adapter(directory, base_model=None if base is None else locate_base_model(str(base)))
    assert str(directory) not in caught.value.message
    return caught.value


def test_an_imported_adapter_is_published_with_what_its_files_say(tmp_path: Path) -> None:
    base = locate_base_model(str(write_base(tmp_path / "tiny")))
    source = write_adapter(tmp_path / "adapter")
    registry = Registry(tmp_path / "registry")
    artifact = registry.import_adapter(source, name="support", base_model=base, alias="support")
    manifest = artifact.manifest
    assert manifest.kind == "lora"
    assert manifest.base_model == base.identity
    assert manifest.lora is not None
    assert (manifest.lora.rank, manifest.lora.alpha) == (4, 8.0)
    assert manifest.lora.target_modules == ["q_proj", "v_proj"]
    assert manifest.dtype == "float32"
    assert manifest.library_versions == {"peft": "0.21.2"}
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert registry.verify("support") == []
    for name in manifest.files:
        assert (artifact.path / name).read_bytes() == (source / name).read_bytes()
        assert not (artifact.path / name).samefile(source / name)
    assert check_adapter(artifact.path, base_model=base).notes == ()


def test_without_a_base_the_claimed_one_is_recorded_and_the_report_says_what_was_not_checked(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    artifact = registry.import_adapter(write_adapter(tmp_path / "one"), name="one", base_model=None)
    assert artifact.manifest.base_model.id == "acme/tiny"
    assert artifact.manifest.base_model.fingerprint is None
    odd = write_adapter(tmp_path / "two", base_model_name_or_path="/home/me/models/x y")
    assert registry.import_adapter(odd, name="two", base_model=None).manifest.base_model.id == "unknown"
    assert "No base model" in check_adapter(odd).notes[0]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"use_dora": True}, "unsupported_dora"),
        ({"bias": "all"}, "unsupported_bias"),
        ({"bias": "lora_only"}, "unsupported_bias"),
        ({"lora_bias": True}, "unsupported_lora_bias"),
        ({"modules_to_save": ["embed_tokens"]}, "unsupported_modules_to_save"),
        ({"modules_to_save": ["score"]}, "unsupported_modules_to_save"),
        ({"init_lora_weights": "pissa"}, "unsupported_init"),
        ({"init_lora_weights": "pissa_niter_16"}, "unsupported_init"),
        ({"init_lora_weights": "olora"}, "unsupported_init"),
        ({"init_lora_weights": "corda"}, "unsupported_init"),
        ({"init_lora_weights": "loftq"}, "unsupported_init"),
        ({"init_lora_weights": ["gaussian"]}, "unsupported_init"),
        ({"alora_invocation_tokens": [1, 2]}, "unsupported_alora"),
        ({"layer_replication": [[0, 2]]}, "unsupported_layer_replication"),
        ({"trainable_token_indices": [5]}, "unsupported_trainable_token_indices"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "unsupported_target_parameters"),
        ({"fan_in_fan_out": True}, "unsupported_fan_in_fan_out"),
        ({"use_bdlora": {"x": 1}}, "unsupported_bdlora"),
        ({"use_qalora": True}, "unsupported_qalora"),
        ({"arrow_config": {"x": 1}}, "unsupported_arrow"),
        ({"kasa_config": {"x": 1}}, "unsupported_kasa"),
        ({"velora_config": {"x": 1}}, "unsupported_velora"),
        ({"monteclora_config": {"x": 1}}, "unsupported_monteclora"),
        ({"megatron_config": {"x": 1}}, "unsupported_megatron"),
        ({"ensure_weight_tying": True}, "unsupported_weight_tying"),
        ({"use_dora": "false"}, "unsupported_dora"),
        ({"auto_map": {"AutoModel": "x.py"}}, "custom_code_not_allowed"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}, "custom_code_not_allowed"),
        ({"use_something_new": True}, "unknown_config_key"),
        ({"peft_type": "IA3"}, "unsupported_peft_type"),
        ({"peft_type": "LOHA"}, "unsupported_peft_type"),
        ({"peft_type": None}, "unsupported_peft_type"),
        ({"task_type": "SEQ_CLS"}, "unsupported_task_type"),
        ({"r": 0}, "rank_out_of_range"),
        ({"r": 513}, "rank_out_of_range"),
        ({"r": True}, "rank_out_of_range"),
        ({"r": "4"}, "rank_out_of_range"),
        ({"r": None}, "rank_out_of_range"),
        ({"r": 8}, "rank_mismatch"),
        ({"r": 2}, "rank_mismatch"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_mismatch"),
        ({"rank_pattern": {"(a+)+$": 4}}, "unsupported_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_out_of_range"),
        ({"rank_pattern": [1]}, "invalid_adapter_config"),
        ({"alpha_pattern": {"q_proj": -1}}, "invalid_adapter_config"),
        ({"alpha_pattern": {"q_proj": 1e8}}, "scaling_out_of_range"),
        ({"lora_alpha": 1e9}, "invalid_adapter_config"),
        ({"lora_alpha": 1e6}, "scaling_out_of_range"),
        ({"lora_alpha": 0}, "invalid_adapter_config"),
        ({"lora_alpha": "8"}, "invalid_adapter_config"),
        ({"use_rslora": "yes"}, "invalid_adapter_config"),
        ({"target_modules": []}, "invalid_adapter_config"),
        ({"target_modules": [1]}, "invalid_adapter_config"),
        ({"layers_to_transform": "0"}, "invalid_adapter_config"),
        ({"exclude_modules": [1]}, "invalid_adapter_config"),
        ({"exclude_modules": 3}, "invalid_adapter_config"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else value,
)
def test_what_the_engine_cannot_serve_as_trained_is_refused_by_code(
    tmp_path: Path, config: dict[str, Any], code: str
) -> None:
    refusal = _refusal(write_adapter(tmp_path / "adapter", **config))
    assert refusal.code == code
    assert refusal.message.count(".") >= 2, "a refusal says what is wrong and then what to do"


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4, "model.layers.0.self_attn.v_proj": 4}, "r": 16},
        {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 16}},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"}},
        {"use_something_new": False, "another_new_thing": None, "yet_another": {}},
        {"target_modules": "all-linear"},
        {"task_type": None},
        {"modules_to_save": []},
    ],
    ids=json.dumps,
)
def test_what_has_no_effect_or_is_known_is_accepted(tmp_path: Path, config: dict[str, Any]) -> None:
    if "rank_pattern" in config:
        config = config | {"rank_pattern": {"q_proj": 4, "v_proj": 4}}
    assert check_adapter(write_adapter(tmp_path / "adapter", **config)).rank == 4


def _drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def _put(name: str, value: np.ndarray[Any, Any]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_drop(A), "unpaired_tensor"),
        (_drop(B), "unpaired_tensor"),
        (_put("base_model.model.model.embed_tokens.weight", np.zeros((64, 32), np.float32)), "unexpected_tensor"),
        (_put(f"{STEM}.base_layer.weight", np.zeros((32, 32), np.float32)), "unexpected_tensor"),
        (_put("base_model.model.lm_head.modules_to_save.weight", np.zeros((2, 2), np.float32)), "unexpected_tensor"),
        (_put(f"{STEM}.lora_magnitude_vector", np.zeros(32, np.float32)), "unexpected_tensor"),
        (_put("model.layers.0.self_attn.q_proj.lora_A.weight", np.zeros((4, 32), np.float32)), "unexpected_tensor"),
        (_put(f"{STEM}.lora_embedding_A", np.zeros((4, 32), np.float32)), "unpaired_tensor"),
        (_put(A, np.full((4, 32), np.nan, np.float32)), "not_finite"),
        (_put(B, np.full((32, 4), np.inf, np.float32)), "not_finite"),
        (_put(A, np.full((4, 32), -3e38, np.float32)), "values_too_large"),
        (_put(B, np.full((32, 4), 2.0**17, np.float32)), "values_too_large"),
        (_put(A, np.full((4, 32), -np.inf, np.float16)), "not_finite"),
        (_put(A, np.zeros((4, 32), np.int8)), "unsupported_dtype"),
        (_put(A, np.zeros((4, 32), np.float64)), "unsupported_dtype"),
        (_put(A, np.zeros((4, 32, 1), np.float32)), "unsupported_shape"),
        (_put(A, np.zeros((0, 32), np.float32)), "unsupported_shape"),
        (_put(A, np.zeros((2, 32), np.float32)), "rank_mismatch"),
        (_put(B, np.zeros((32, 8), np.float32)), "rank_mismatch"),
        (lambda tensors: tensors.clear(), "no_tensors"),
    ],
)
def test_tensors_that_are_no_sound_pairs_are_refused(
    tmp_path: Path, change: Callable[[Tensors], None], code: str
) -> None:
    assert _refusal(write_adapter(tmp_path / "adapter", change=change)).code == code


def _rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_put(A, np.zeros((4, 16), np.float32)), "base_mismatch"),
        (_put(B, np.zeros((64, 4), np.float32)), "base_mismatch"),
        (_rename("layers.1.", "layers.2."), "base_mismatch"),
        (_rename("q_proj", "query"), "base_mismatch"),
        (_rename("layers.1.", "layers.0.x."), "base_mismatch"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name], "missing_modules"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if "v_proj" in name], "missing_modules"),
    ],
)
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, change: Callable[[Tensors], None], code: str) -> None:
    base = write_base(tmp_path / "tiny")
    assert _refusal(write_adapter(tmp_path / "adapter", change=change), base).code == code


def test_one_layer_is_enough_where_the_configuration_says_so(tmp_path: Path) -> None:
    base = locate_base_model(str(write_base(tmp_path / "tiny")))
    source = write_adapter(
        tmp_path / "adapter",
        change=lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name] and None,
        layers_to_transform=[0],
    )
    assert len(check_adapter(source, base_model=base).modules) == 2


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen2", "mistral"])
def test_lora_on_embeddings_and_head_is_accepted_where_the_engine_takes_it(tmp_path: Path, model_type: str) -> None:
    base = locate_base_model(str(write_base(tmp_path / "tiny", model_type=model_type)))

    def add(tensors: Tensors) -> None:
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((4, 64), np.float32)
        tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = np.zeros((32, 4), np.float32)
        tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 32), np.float32)
        tensors["base_model.model.lm_head.lora_B.weight"] = np.zeros((64, 4), np.float32)

    targets = ["q_proj", "v_proj", "embed_tokens", "lm_head"]
    adapter = write_adapter(tmp_path / "adapter", change=add, target_modules=targets)
    if model_type in WITHOUT_ADAPTED_EMBEDDINGS:
        with pytest.raises(InvalidArtifactError, match=f"no adapters on the embeddings.*'{model_type}'") as caught:
            check_adapter(adapter, base_model=base)
        assert caught.value.code == "unsupported_embeddings"
    else:
        assert check_adapter(adapter, base_model=base).target_modules == sorted(targets)


def test_the_engines_own_rank_limit_may_be_given(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter")
    assert check_adapter(source, max_rank=4).rank == 4
    with pytest.raises(InvalidArtifactError, match="1 to 3") as caught:
        check_adapter(source, max_rank=3)
    assert caught.value.code == "rank_out_of_range"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_dtype_is_the_widest_of_the_tensors(tmp_path: Path, dtype: Any) -> None:
    tensors = adapter_tensors(dtype=np.float16) | {A: np.ones((4, 32), dtype)}
    assert check_adapter(write_adapter(tmp_path / "adapter", tensors=tensors)).dtype == np.dtype(dtype).name


class _MarkerPickle:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "optimizer.pt", "a.PTH", "x.pkl", "rng.ckpt", "sub/training_args.bin"]
)
def test_a_pickle_is_refused_even_beside_good_weights_and_never_loaded(tmp_path: Path, name: str) -> None:
    """In an artifact; an import does not take it."""
    source = write_adapter(tmp_path / "adapter")
    marker = tmp_path / "marker"
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_bytes(pickle.dumps(_MarkerPickle(marker)))
    assert _refusal(source).code == "pickle_not_allowed"
    artifact = Registry(tmp_path / "registry").import_adapter(source, name="support", base_model=None)
    assert sorted(path.name for path in artifact.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("modeling.py", "code_not_allowed"),
        ("model.gguf", "unsupported_weights_format"),
        ("model.safetensors", "extra_weights"),
        ("umlaut-ä.txt", "invalid_file_name"),
        ("new\nline", "invalid_file_name"),
    ],
)
def test_other_files_that_do_not_belong_there_are_refused(tmp_path: Path, name: str, code: str) -> None:
    source = write_adapter(tmp_path / "adapter")
    (source / name).write_bytes(b"")
    assert _refusal(source).code == code


@pytest.mark.parametrize(
    ("init", "advice"), [("pissa", "path_initial_model_for_weight"), ("loftq", "merge_and_unload")]
)
def test_the_way_out_of_an_initialiser_is_one_that_peft_has(tmp_path: Path, init: str, advice: str) -> None:
    assert advice in _refusal(write_adapter(tmp_path / "adapter", init_lora_weights=init)).message


def test_links_and_special_files_are_refused_without_hanging(tmp_path: Path) -> None:
    for index, make in enumerate(
        (
            lambda path: path.symlink_to("/etc/hostname"),
            lambda path: path.symlink_to("/etc", target_is_directory=True),
            lambda path: path.hardlink_to(path.parent / "adapter_config.json"),
            os.mkfifo,
        )
    ):
        source = write_adapter(tmp_path / str(index))
        make(source / "extra")
        assert _refusal(source).code in ("links_not_allowed", "special_file_not_allowed")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "no_adapter_config"),
        (b"", "invalid_adapter_config"),
        (b"[]", "invalid_adapter_config"),
        (b'{"r": 4, "r": 8}', "invalid_adapter_config"),
        (b'{"r": NaN}', "invalid_adapter_config"),
        (b'{"a":' * 100_000, "invalid_adapter_config"),
        (b"\xff\xfe", "invalid_adapter_config"),
        (b" " * (2 << 20), "file_too_large"),
    ],
    ids=["missing", "empty", "list", "twice", "nan", "deep", "not utf-8", "large"],
)
def test_a_configuration_that_is_no_plain_json_is_refused(tmp_path: Path, content: bytes | None, code: str) -> None:
    source = write_adapter(tmp_path / "adapter")
    (source / "adapter_config.json").unlink()
    if content is not None:
        (source / "adapter_config.json").write_bytes(content)
    assert _refusal(source).code == code


def test_a_cut_or_missing_weights_file_is_refused(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter")
    weights = source / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert _refusal(source).code == "invalid_safetensors"
    weights.unlink()
    assert _refusal(source).code == "no_adapter_weights"


def test_a_base_model_is_found_by_directory_revision_or_not_at_all(tmp_path: Path) -> None:
    base = locate_base_model(str(write_base(tmp_path / "tiny")))
    assert (base.id, base.path) == ("tiny", tmp_path / "tiny")
    registry = Registry(tmp_path / "registry")
    adapter = registry.import_adapter(write_adapter(tmp_path / "adapter"), name="tuned", base_model=base)
    with pytest.raises(InvalidArtifactError, match="Merge it first"):
        locate_base_model(adapter.revision, registry)
    with pytest.raises(InvalidNameError, match="registry"):
        locate_base_model(adapter.revision)
    with pytest.raises(ModelNotFoundError):
        locate_base_model("tuned@00000000", registry)
    for bad in ("../not-to-be-found", "a b", "", "a/b/c", "x\0y"):
        with pytest.raises(InvalidNameError):
            locate_base_model(bad)


def test_the_sample_configuration_has_no_key_that_the_checker_ignores_by_accident(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter")
    assert json.loads((source / "adapter_config.json").read_text()) == ADAPTER_CONFIG
    assert check_adapter(source).config.base_model_name == "acme/tiny"
