"""The kinds of damage that an adapter can have, each with the refusals that fit it."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.soak.hostile import CONFIG, MANIFEST, WEIGHTS, Case, Damage, Tensor, floats, header_bytes, put_pair
from tests.soak.hostile import safetensors_bytes as sound_bytes

_HEADER = ("invalid_safetensors", "unexpected_tensor", "unpaired_tensor", "base_mismatch", "missing_modules",
           "unsupported_dtype", "unsupported_shape", "rank_mismatch", "not_finite", "values_too_large")  # fmt: skip
_DAMAGES: list[Damage] = []


def kinds() -> list[Damage]:
    return [*_DAMAGES, *_config_damages(), *_file_damages()]


def _damage(*codes: str, is_artifact: bool = True) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def register(apply: Callable[[Case], None]) -> Callable[[Case], None]:
        _DAMAGES.append(Damage(apply.__name__.strip("_"), frozenset(codes), apply, is_artifact))
        return apply

    return register


def _some_tensor(case: Case) -> str:
    return case.random_of.choice(sorted(case.tensors))


# -- the weights file ----------------------------------------------------------------------------------------------


@_damage(*_HEADER)
def _one_header_byte(case: Case) -> None:
    case.weights = lambda tensors: _with_other_bytes(case, tensors, 1)


@_damage(*_HEADER)
def _many_header_bytes(case: Case) -> None:
    case.weights = lambda tensors: _with_other_bytes(case, tensors, case.random_of.randint(2, 40))


def _with_other_bytes(case: Case, tensors: dict[str, Tensor], how_many: int) -> bytes:
    data = bytearray(sound_bytes(tensors))
    for place in case.random_of.sample(range(8, len(header_bytes(tensors))), how_many):
        data[place] = (data[place] + case.random_of.randint(1, 255)) % 256
    return bytes(data)


@_damage("invalid_safetensors")
def _cut_short(case: Case) -> None:
    case.weights = lambda tensors: sound_bytes(tensors)[: case.random_of.randrange(len(sound_bytes(tensors)))]


@_damage("invalid_safetensors")
def _bytes_behind_the_end(case: Case) -> None:
    case.weights = lambda tensors: sound_bytes(tensors) + case.random_of.randbytes(case.random_of.randint(1, 5000))


@_damage("invalid_safetensors")
def _header_length_that_lies(case: Case) -> None:
    length = case.random_of.choice([0, 1, 7, 2**31, 2**62, 2**64 - 1, case.random_of.randint(0, 5000)])
    case.weights = lambda tensors: length.to_bytes(8, "little") + sound_bytes(tensors)[8:]


@_damage("invalid_safetensors")
def _huge_header(case: Case) -> None:
    def grow(directory: Path) -> None:
        with (directory / WEIGHTS).open("r+b") as file:
            file.write((40_000_000).to_bytes(8, "little"))
            file.truncate(41_000_000)

    case.before_manifest.append(grow)


@_damage("invalid_safetensors")
def _empty_weights(case: Case) -> None:
    case.weights = lambda tensors: b""


@_damage("invalid_safetensors")
def _noise(case: Case) -> None:
    case.weights = lambda tensors: case.random_of.randbytes(case.random_of.randint(1, 100_000))


@_damage("invalid_safetensors")
def _tensors_that_overlap(case: Case) -> None:
    case.weights = lambda tensors: _with_header(tensors, lambda entries: _move_one(case, entries))


def _move_one(case: Case, entries: dict[str, Any]) -> None:
    name = case.random_of.choice(sorted(entries)[1:])
    offsets = entries[name]["data_offsets"]
    step = case.random_of.choice([-4, 4, 64, -offsets[0]]) or 4
    entries[name]["data_offsets"] = [offset + step for offset in offsets]


@_damage("invalid_safetensors")
def _offsets_beyond_the_file(case: Case) -> None:
    def change(entries: dict[str, Any]) -> None:
        entry = entries[case.random_of.choice(sorted(entries))]
        entry["data_offsets"][1] += case.random_of.choice([4, 2**31, 2**47])

    case.weights = lambda tensors: _with_header(tensors, change)


@_damage("invalid_safetensors")
def _negative_sizes(case: Case) -> None:
    def change(entries: dict[str, Any]) -> None:
        entry = entries[case.random_of.choice(sorted(entries))]
        entry["shape"] = [-size for size in entry["shape"]]

    case.weights = lambda tensors: _with_header(tensors, change)


@_damage("invalid_safetensors")
def _repeated_tensor(case: Case) -> None:
    def write(tensors: dict[str, Tensor]) -> bytes:
        header = header_bytes(tensors)[8:]
        first = json.dumps({name: json.loads(header)[name] for name in sorted(tensors)[:1]})[1:-1].encode()
        header = b"{" + first + b"," + header[1:]
        return len(header).to_bytes(8, "little") + header + b"".join(tensor.data for tensor in tensors.values())

    case.weights = write


def _with_header(tensors: dict[str, Tensor], change: Callable[[dict[str, Any]], None]) -> bytes:
    entries = json.loads(header_bytes(tensors)[8:])
    change(entries)
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(tensor.data for tensor in tensors.values())


# -- what the tensors say ------------------------------------------------------------------------------------------


@_damage("base_mismatch")
def _features_of_another_base(case: Case) -> None:
    name = _some_tensor(case)
    axis = 1 if "lora_A" in name else 0
    shape = list(case.tensors[name].shape)
    shape[axis] = case.random_of.choice([1, shape[axis] // 2, shape[axis] + 1, 2 * shape[axis]])
    case.tensors[name] = floats(case.random_of, *shape)


@_damage("rank_too_large")
def _rank_over_the_engines(case: Case) -> None:
    _set_rank(case, 64)
    case.manifest["lora"]["rank"] = 64


@_damage("rank_too_large", "rank_out_of_range", "manifest_mismatch")
def _manifest_with_a_smaller_rank(case: Case) -> None:
    _set_rank(case, case.random_of.choice([17, 32, 256]))


@_damage("rank_mismatch")
def _configuration_with_another_rank(case: Case) -> None:
    case.config["r"] = case.random_of.choice([1, 2, 3, 5, 8, 16])


@_damage("rank_mismatch")
def _one_module_of_another_rank(case: Case) -> None:
    name = _some_tensor(case).partition(".lora_")[0]
    for side, axis in (("A", 0), ("B", 1)):
        tensor = case.tensors[f"{name}.lora_{side}.weight"]
        shape = list(tensor.shape)
        shape[axis] = 8
        case.tensors[f"{name}.lora_{side}.weight"] = floats(case.random_of, *shape)


def _set_rank(case: Case, rank: int) -> None:
    for name, tensor in case.tensors.items():
        shape = [rank, tensor.shape[1]] if "lora_A" in name else [tensor.shape[0], rank]
        case.tensors[name] = floats(case.random_of, *shape)
    case.config["r"] = rank


@_damage("not_finite")
def _not_a_number(case: Case) -> None:
    _poison(case, [float("nan"), float("inf"), float("-inf")])


@_damage("values_too_large")
def _huge(case: Case) -> None:
    _poison(case, [3e38, -1e30, 2.0**17])


def _poison(case: Case, values: list[float]) -> None:
    name = _some_tensor(case)
    numbers = np.frombuffer(case.tensors[name].data, np.float32).copy()
    numbers[case.random_of.randrange(numbers.size)] = case.random_of.choice(values)
    case.tensors[name].data = numbers.tobytes()


@_damage("unsupported_dtype")
def _another_dtype(case: Case) -> None:
    dtype, width = case.random_of.choice([("I8", 1), ("U8", 1), ("F8_E4M3", 1), ("F64", 8), ("I32", 4), ("BOOL", 1)])
    for name in case.random_of.sample(sorted(case.tensors), case.random_of.randint(1, 10)):
        size = case.tensors[name].shape[0] * case.tensors[name].shape[1]
        case.tensors[name] = Tensor(dtype, case.tensors[name].shape, bytes(size * width))


@_damage("missing_modules")
def _fewer_layers(case: Case) -> None:
    layer = f".layers.{case.random_of.randrange(6)}."
    case.tensors = {name: tensor for name, tensor in case.tensors.items() if layer not in name}


@_damage("base_mismatch")
def _more_layers(case: Case) -> None:
    put_pair(case, f"model.layers.{case.random_of.randint(6, 1000)}.self_attn.q_proj", 256, 256)


@_damage("base_mismatch")
def _unknown_module(case: Case) -> None:
    module = case.random_of.choice(
        ["self_attn.qkv_proj", "mlp.experts.0.w1", "self_attn.rotary_emb", "mlp", "self_attn.q_proj.base_layer"]
    )
    put_pair(case, f"model.layers.0.{module}", 256, 256)


@_damage("unexpected_tensor")
def _whole_weights(case: Case) -> None:
    name = case.random_of.choice(
        [
            "base_model.model.lm_head.weight",
            "base_model.model.model.embed_tokens.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.../../etc/passwd.lora_A.weight",
            "",
        ]
    )
    case.tensors[name] = floats(case.random_of, 4, 4)


@_damage("unpaired_tensor")
def _half_a_pair(case: Case) -> None:
    del case.tensors[_some_tensor(case)]


@_damage("unsupported_shape")
def _shape_of_no_matrix(case: Case) -> None:
    tensor = case.tensors[_some_tensor(case)]
    tensor.shape = case.random_of.choice(
        [[tensor.shape[0] * tensor.shape[1]], [*tensor.shape, 1], [1, 1, *tensor.shape]]
    )


@_damage("unsupported_shape")
def _no_elements(case: Case) -> None:
    case.tensors[_some_tensor(case)] = Tensor("F32", case.random_of.choice([[0, 256], [4, 0]]), b"")


@_damage("no_tensors")
def _no_tensors(case: Case) -> None:
    case.tensors = {}


# -- the configuration ---------------------------------------------------------------------------------------------

_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"lora_alpha": 1e9}, "invalid_adapter_config"),
    ({"lora_alpha": 1e8}, "scaling_out_of_range"),
    ({"lora_alpha": 0}, "invalid_adapter_config"),
    ({"lora_alpha": -8}, "invalid_adapter_config"),
    ({"lora_alpha": "8"}, "invalid_adapter_config"),
    ({"alpha_pattern": {"q_proj": 1e7}}, "scaling_out_of_range"),
    ({"use_dora": True}, "unsupported_dora"),
    ({"bias": "all"}, "unsupported_bias"),
    ({"lora_bias": True}, "unsupported_lora_bias"),
    ({"modules_to_save": ["lm_head"]}, "unsupported_modules_to_save"),
    ({"init_lora_weights": "pissa"}, "unsupported_init"),
    ({"init_lora_weights": "olora"}, "unsupported_init"),
    ({"peft_type": "IA3"}, "unsupported_peft_type"),
    ({"peft_type": "ADALORA"}, "unsupported_peft_type"),
    ({"task_type": "SEQ_CLS"}, "unsupported_task_type"),
    ({"fan_in_fan_out": True}, "unsupported_fan_in_fan_out"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "unsupported_target_parameters"),
    ({"trainable_token_indices": [1]}, "unsupported_trainable_token_indices"),
    ({"layer_replication": [[0, 3], [1, 6]]}, "unsupported_layer_replication"),
    ({"alora_invocation_tokens": [5]}, "unsupported_alora"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_mismatch"),
    ({"rank_pattern": {"(a|a)*$": 4}}, "unsupported_pattern"),
    ({"rank_pattern": {"q_proj": 10**9}}, "rank_out_of_range"),
    ({"r": 0}, "rank_out_of_range"),
    ({"r": -4}, "rank_out_of_range"),
    ({"r": 4.0}, "rank_out_of_range"),
    ({"r": 2**63}, "rank_out_of_range"),
    ({"target_modules": []}, "invalid_adapter_config"),
    ({"target_modules": {"q_proj": 1}}, "invalid_adapter_config"),
    ({"target_modules": ["q_proj", "lm_head"]}, "missing_modules"),
    ({"auto_map": {"AutoModel": "evil.Model"}}, "custom_code_not_allowed"),
    ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, "custom_code_not_allowed"),
    ({"a_feature_of_tomorrow": True}, "unknown_config_key"),
]
_CONFIG_BYTES: list[tuple[str, bytes, str]] = [
    ("repeated key", b'{"peft_type": "LORA", "r": 4, "r": 8, "lora_alpha": 8}', "invalid_adapter_config"),
    ("nan", b'{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}', "invalid_adapter_config"),
    ("deep", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "invalid_adapter_config"),
    ("no text", b"\xff\xfe\x00{", "invalid_adapter_config"),
    ("list", b"[]", "invalid_adapter_config"),
    ("empty", b"", "invalid_adapter_config"),
    ("large", b" " * (3 << 20), "file_too_large"),
    ("digits", b'{"peft_type": "LORA", "r": ' + b"9" * 100_000 + b"}", "invalid_adapter_config"),
]


def _config_damages() -> list[Damage]:
    def with_values(values: dict[str, Any]) -> Callable[[Case], None]:
        return lambda case: case.config.update(values)

    def with_bytes(content: bytes) -> Callable[[Case], None]:
        def apply(case: Case) -> None:
            case.config_bytes = content

        return apply

    return [
        *(Damage(f"config {json.dumps(values)}", frozenset({code}), with_values(values)) for values, code in _CONFIGS),
        *(Damage(f"config {name}", frozenset({code}), with_bytes(data)) for name, data, code in _CONFIG_BYTES),
    ]


# -- files and links -----------------------------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("kill -9 $PPID",)


def _file_damages() -> list[Damage]:
    def with_file(path: str, content: bytes) -> Callable[[Case], None]:
        return lambda case: case.files.update({path: content})

    bomb = pickle.dumps(_Bomb())
    pickles = ("adapter_model.bin", "adapter_model.pt", "training_args.pkl", "state/optimizer.ckpt")
    extra = {
        "adapter.py": ("code_not_allowed", b"import os"),
        "lib.so": ("code_not_allowed", b"\x7fELF"),
        "adapter.gguf": ("unsupported_weights_format", b"GGUF"),
        "second.safetensors": ("extra_weights", b""),
    }
    return [
        *(Damage(f"pickle {path}", frozenset({"damaged"}), with_file(path, bomb)) for path in pickles),
        *(
            Damage(f"file {path}", frozenset({code, "damaged"}), with_file(path, content))
            for path, (code, content) in extra.items()
        ),
    ]


def _replaced(path: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / path).unlink()
        make(directory / path)

    return change


@_damage("damaged")
def _link_in_place_of_the_weights(case: Case) -> None:
    def move_out(directory: Path) -> None:
        outside = directory.parents[1] / f"{directory.parent.name}.outside"
        (directory / WEIGHTS).rename(outside)
        (directory / WEIGHTS).symlink_to(outside)

    case.before_manifest.append(move_out)


@_damage("damaged")
def _link_to_a_secret(case: Case) -> None:
    case.before_manifest.append(lambda directory: (directory / "notes.txt").symlink_to("/etc/hostname"))


@_damage("damaged")
def _folder_that_is_a_link(case: Case) -> None:
    case.before_manifest.append(lambda directory: (directory / "more").symlink_to("/etc", target_is_directory=True))
    case.manifest["files"] = {}


@_damage("damaged")
def _hard_link(case: Case) -> None:
    case.before_manifest.append(lambda directory: (directory / "twin.json").hardlink_to(directory / CONFIG))


@_damage("damaged")
def _pipe_in_place_of_the_weights(case: Case) -> None:
    case.after_manifest.append(_replaced(WEIGHTS, os.mkfifo))


@_damage("damaged")
def _directory_in_place_of_the_weights(case: Case) -> None:
    case.after_manifest.append(_replaced(WEIGHTS, Path.mkdir))


@_damage("no_adapter_weights", "extra_weights")
def _no_weights(case: Case) -> None:
    case.before_manifest.append(lambda directory: (directory / WEIGHTS).unlink())


@_damage("no_adapter_config")
def _no_configuration(case: Case) -> None:
    case.before_manifest.append(lambda directory: (directory / CONFIG).unlink())


# -- the manifest --------------------------------------------------------------------------------------------------


@_damage("base_mismatch")
def _made_for_another_base(case: Case) -> None:
    case.manifest["base_model"] = {"id": "capo-tiny", "fingerprint": case.random_of.randbytes(32).hex()}


@_damage("damaged")
def _one_byte_of_the_weights_changed_later(case: Case) -> None:
    def flip(directory: Path) -> None:
        path = directory / WEIGHTS
        data = bytearray(path.read_bytes())
        data[case.random_of.randrange(len(data))] ^= 1 << case.random_of.randrange(8)
        path.write_bytes(data)

    case.after_manifest.append(flip)


@_damage("damaged")
def _file_that_the_manifest_does_not_know(case: Case) -> None:
    case.after_manifest.append(lambda directory: (directory / "more.txt").write_text("more"))


@_damage("damaged")
def _file_that_is_gone(case: Case) -> None:
    path = case.random_of.choice([WEIGHTS, CONFIG])
    case.after_manifest.append(lambda directory: (directory / path).unlink())


@_damage("probe_refused")
def _probe_that_no_engine_can_take(case: Case) -> None:
    prompt, completion = case.random_of.choice([([10**6], [5]), ([], [5]), ([5] * 5000, [5]), ([5], [7] * 5000)])
    case.manifest["probes"] = [{"prompt_token_ids": prompt, "completion_token_ids": completion}]


@_damage("probe_refused")
def _probes_without_end(case: Case) -> None:
    case.manifest["probes"] = [{"prompt_token_ids": [5], "completion_token_ids": [6]}] * 5_000


@_damage("name_mismatch", is_artifact=False)
def _manifest_of_another_name(case: Case) -> None:
    case.manifest["name"] = "somebody-else"


@_damage("unsupported_schema_version", is_artifact=False)
def _manifest_of_another_version(case: Case) -> None:
    case.manifest["schema_version"] = 99


@_damage("invalid_manifest", is_artifact=False)
def _manifest_with_an_unknown_field(case: Case) -> None:
    case.manifest["trust_me"] = True


@_damage("invalid_manifest", is_artifact=False)
def _manifest_that_leaves_the_directory(case: Case) -> None:
    case.manifest["files"] = {"../../../registry.json": {"size_bytes": 1, "sha256": "0" * 64}}


@_damage("invalid_manifest", is_artifact=False)
def _folders_without_end(case: Case) -> None:
    case.files["/".join("abcdefghijkl")] = b"deep"


@_damage("digest_mismatch", is_artifact=False)
def _manifest_changed_later(case: Case) -> None:
    case.after_naming.append(lambda directory: (directory / MANIFEST).write_bytes(b"{}"))


@_damage("no_manifest", is_artifact=False)
def _no_manifest(case: Case) -> None:
    case.after_naming.append(lambda directory: (directory / MANIFEST).unlink())


@_damage("links_not_allowed", is_artifact=False)
def _manifest_that_is_a_link(case: Case) -> None:
    def link(directory: Path) -> None:
        outside = directory.parents[1] / f"{directory.parent.name}.json"
        (directory / MANIFEST).rename(outside)
        (directory / MANIFEST).symlink_to(outside)

    case.after_naming.append(link)
