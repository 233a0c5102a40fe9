"""A run before its first step: base located, every open value chosen, all data read.

What can fail without a model in memory fails here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from registry import Artifact, BaseModel, Registry, locate_base_model
from tune.choices import choose_alpha
from tune.data.pairs import PreferenceExample
from tune.export import choose_save_dtype
from tune.methods import LoraMethod, QloraMethod
from tune.model import base_shape, choose_device, choose_dtype, load_tokenizer, stop_token_ids
from tune.progress import Observer, TrainingEvent
from tune.recipe import Recipe
from tune.stages import ReadyStage, prepare_stage
from tune.starting import check_base, started_method
from tune.threads import choose_threads


@dataclass(frozen=True, slots=True)
class Prepared:
    recipe: Recipe
    """With every open value filled in."""
    base: BaseModel
    stop_ids: frozenset[int]
    """Tokens at which serving ends an answer."""
    stages: tuple[ReadyStage, ...]
    device: torch.device
    start: Artifact | None = None
    """The adapter that training goes on from."""

    def fingerprint(self) -> str:
        """Of everything that decides the run, apart from the machine."""
        files = [(str(account.path), account.sha256) for ready in self.stages for account in ready.accounts]
        decides = [self.recipe.model_dump(mode="json"), files, self.base.identity.fingerprint]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def prepare(
    recipe: Recipe, registry: Registry, recipe_dir: Path, watcher: Observer, store_dir: Path | None = None
) -> Prepared:
    """Choose and read everything; each choice goes to ``watcher`` with its reason. Sets torch's thread number.

    Tokenised rows are kept in ``store_dir``, where a resumed run finds them again.
    """
    threads = choose_threads()
    torch.set_num_threads(threads.value)
    device = choose_device()
    dtype = choose_dtype(recipe.dtype, device)
    recipe = recipe.model_copy(update={"dtype": dtype.value})
    save_dtype = choose_save_dtype(recipe, dtype.value)
    base = _locate(recipe.base_model, registry, recipe_dir)
    start = None if recipe.start_from is None else registry.resolve(recipe.start_from)
    if start is not None:
        assert isinstance(recipe.method, LoraMethod | QloraMethod), recipe.method
        check_base(start, base.identity)
        method = started_method(recipe.method, start)
        recipe = recipe.model_copy(update={"method": method, "start_from": start.revision})
        text = f"start_from = {start.revision} (goes on with its rank {method.rank} and its targets)"
        watcher.on_event(TrainingEvent("info", text, {"revision": start.revision}))
    alpha = choose_alpha(recipe.method)
    if alpha.value is not None:
        recipe = recipe.model_copy(update={"method": recipe.method.model_copy(update={"alpha": alpha.value})})
        watcher.on_event(TrainingEvent("info", f"method.alpha = {alpha.value} ({alpha.reason})"))
    for name, value, reason in (
        ("base_model", base.id, f"fingerprint {str(base.identity.fingerprint)[:16]}"),
        ("device", device.type, "the GPU if there is one"),
        ("threads", threads.value, threads.reason),
        ("dtype", dtype.value, dtype.reason),
        ("save_dtype", save_dtype.value, save_dtype.reason),
    ):
        watcher.on_event(TrainingEvent("info", f"{name} = {value} ({reason})"))
    tokenizer = load_tokenizer(base.path)
    shape = base_shape(base.path)
    stop_ids = stop_token_ids(base.path, tokenizer)
    stages = []
    for index in range(len(recipe.stages)):
        ready = prepare_stage(
            recipe, index, tokenizer=tokenizer, base_shape=shape, recipe_dir=recipe_dir, store_dir=store_dir
        )
        for note in (*ready.notes, *_endless_answers(ready, stop_ids, tokenizer)):
            watcher.on_event(note)
        stages.append(ready)
    resolved = recipe.model_copy(
        update={"save_dtype": save_dtype.value, "stages": tuple(ready.stage for ready in stages)}
    )
    return Prepared(resolved, base, stop_ids, tuple(stages), device, start)


def _locate(reference: str, registry: Registry, recipe_dir: Path) -> BaseModel:
    """A directory beside the recipe wins over a name; everything else is the registry's to know."""
    beside = recipe_dir / reference
    return locate_base_model(str(beside) if beside.is_dir() else reference, registry)


def _endless_answers(ready: ReadyStage, stop_ids: frozenset[int], tokenizer: Any) -> list[TrainingEvent]:
    """A warning where the template ends a turn with a token at which serving does not stop."""
    if ready.stage.kind == "cpt":
        return []
    few = [unit.chosen if isinstance(unit, PreferenceExample) else unit for unit in ready.data.examples[:1000]]
    endings = {int(example.token_ids[example.trained][-1]) for example in few} - stop_ids
    # A truncated row ends anywhere; only special tokens were written by the template.
    endings &= {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not endings:
        return []
    names, stops = (tokenizer.convert_ids_to_tokens(sorted(ids)) for ids in (endings, stop_ids))
    text = f"stage {ready.data.label}: answers end with {names}, but serving stops only at {stops}"
    return [TrainingEvent("warn", f"{text}; add the token to eos_token_id in the base's generation_config.json")]
