"""An adapter's modules against those of a base model: of a known architecture, or known by its weights only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from registry import BaseModel, check_adapter, locate_base_model
from registry.errors import InvalidArtifactError
from tests.registry.samples import LAYERS, MODULES, Tensors, write_adapter, write_base

HEAD = "base_model.model.lm_head"


def _base(directory: Path, *, change: Callable[[Tensors], Tensors] | None = None, **config: Any) -> BaseModel:
    """A base whose architecture is not known; ``change`` gives it other weights."""
    write_base(directory, **{"model_type": "something-new", **config})
    if change is not None:
        tensors = load_file(directory / "model.safetensors")
        save_file(change(tensors), directory / "model.safetensors")
    return locate_base_model(str(directory))


def _refusal(adapter: Path, base: BaseModel) -> InvalidArtifactError:
    with pytest.raises(InvalidArtifactError) as caught:
        check_adapter(adapter, base_model=base)
    return caught.value


def _notes(adapter: Path, base: BaseModel) -> tuple[str, ...]:
    return check_adapter(adapter, base_model=base).notes


def _rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def _without(text: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if text in name]:
            del tensors[name]

    return change


def _all_modules(tensors: Tensors) -> None:
    tensors.clear()
    for layer in range(LAYERS):
        for name, (num_in, num_out) in MODULES.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = np.ones((4, num_in), np.float32)
            tensors[f"{stem}.lora_B.weight"] = np.ones((num_out, 4), np.float32)


# -- a base that is known by its weights only ----------------------------------------------------------------------


def test_an_adapter_that_fits_the_weights_of_an_unknown_architecture_passes_with_a_note(tmp_path: Path) -> None:
    (note,) = _notes(write_adapter(tmp_path / "fits"), _base(tmp_path / "tiny"))
    assert note.startswith("Whether modules are missing was not checked, because")
    assert "something-new" in note


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers.1.self_attn", "layers.1.attention"),
        ("layers.1.", "layers.2."),
        ("layers.1.self_attn.q_proj", "layers.1.input_layernorm"),
        ("layers.1.", "layers.0.inner."),
    ],
)
def test_a_module_that_the_weights_do_not_have_is_refused(tmp_path: Path, old: str, new: str) -> None:
    def with_a_norm(tensors: Tensors) -> Tensors:
        return tensors | {"model.layers.1.input_layernorm.weight": np.ones(32, np.float32)}

    refusal = _refusal(
        write_adapter(tmp_path / "odd", change=_rename(old, new)), _base(tmp_path / "tiny", change=with_a_norm)
    )
    assert (refusal.code, new.rpartition(".")[0] in refusal.message) == ("base_mismatch", True)


def test_weights_whose_outer_parts_have_other_names_are_compared_by_what_is_within_the_layer(tmp_path: Path) -> None:
    base = _base(tmp_path / "tiny", change=_renamed("model.layers", "language_model.model.layers"))
    assert len(_notes(write_adapter(tmp_path / "fits"), base)) == 1
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    wrong = write_adapter(
        tmp_path / "wrong",
        change=lambda tensors: tensors.update({f"{stem}.lora_B.weight": np.ones((64, 4), np.float32)}),
    )
    assert _refusal(wrong, base).code == "base_mismatch"


def test_quantised_weights_are_compared_by_name_and_the_notes_say_so(tmp_path: Path) -> None:
    def quantise(tensors: Tensors) -> Tensors:
        return {
            name.replace(".weight", ".qweight") if ".layers." in name else name: (
                np.zeros((4, 4), np.int32) if ".layers." in name else tensor
            )
            for name, tensor in tensors.items()
        }

    base = _base(tmp_path / "tiny", change=quantise)
    first, second = _notes(write_adapter(tmp_path / "fits"), base)
    assert first.startswith("4 of 4 modules were compared with the base model by name only")
    assert "missing" in second
    odd = write_adapter(tmp_path / "odd", change=_rename("layers.1.", "layers.2."))
    assert _refusal(odd, base).code == "base_mismatch"


def test_a_head_that_shares_the_embeddings_weights_is_known(tmp_path: Path) -> None:
    def adapter(name: str, num_out: int) -> Path:
        def add(tensors: Tensors) -> None:
            tensors[f"{HEAD}.lora_A.weight"] = np.ones((4, 32), np.float32)
            tensors[f"{HEAD}.lora_B.weight"] = np.ones((num_out, 4), np.float32)

        return write_adapter(tmp_path / name, change=add, target_modules=["q_proj", "v_proj", "lm_head"])

    base = _base(tmp_path / "tiny")
    assert len(_notes(adapter("fits", 64), base)) == 1
    assert _refusal(adapter("wrong", 65), base).code == "base_mismatch"


def test_a_base_whose_weights_name_nothing_leaves_a_note(tmp_path: Path) -> None:
    base = _base(tmp_path / "tiny", change=lambda tensors: {"steps": np.zeros(1, np.int32)})
    (note,) = _notes(write_adapter(tmp_path / "one"), base)
    assert "name no modules" in note


# -- which modules the adapter says it has -------------------------------------------------------------------------


def test_what_a_regular_expression_targets_is_not_checked_and_a_note_says_so(tmp_path: Path) -> None:
    base = _base(tmp_path / "tiny", model_type="llama")
    for number, config in enumerate([{"target_modules": r".*_proj"}, {"exclude_modules": r".*layers\.1.*"}]):
        (note,) = _notes(write_adapter(tmp_path / str(number), change=_without("layers.1."), **config), base)
        assert next(iter(config)) in note
        assert "regular expression" in note


@pytest.mark.parametrize("missing", ["layers.1.", "down_proj", "layers.0.mlp.up_proj"])
def test_an_adapter_of_all_linear_modules_must_have_all_of_them(tmp_path: Path, missing: str) -> None:
    base = _base(tmp_path / "tiny", model_type="llama")
    whole = write_adapter(tmp_path / "whole", change=_all_modules, target_modules="all-linear")
    assert _notes(whole, base) == ()

    def cut(tensors: Tensors) -> None:
        _all_modules(tensors)
        _without(missing)(tensors)

    refusal = _refusal(write_adapter(tmp_path / "cut", change=cut, target_modules="all-linear"), base)
    assert refusal.code == "missing_modules"


def test_modules_that_are_excluded_by_name_may_be_missing_and_no_others(tmp_path: Path) -> None:
    base = _base(tmp_path / "tiny", model_type="llama")
    names = [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")]
    cut = write_adapter(tmp_path / "cut", change=_without("layers.1."), exclude_modules=names)
    assert _notes(cut, base) == ()
    cut_more = write_adapter(tmp_path / "more", change=_without("layers.1."), exclude_modules=names[:1])
    assert _refusal(cut_more, base).code == "missing_modules"
