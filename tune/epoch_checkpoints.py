"""The adapters of the last epochs' ends, published while the run goes on.

OpenAI keeps the last three epochs of a job as models. The last of them is the job's own result, so two are published
on the way, as ``<the result's name>:ckpt-step-<steps of the run>``. They are what was trained at that moment: of
methods that train an adapter. A model whose adapter is extracted, or merged, in the end has none before.

A run that was killed repeats steps and publishes the same again; which ends are kept is a function of the plan alone,
except where a stage may stop early: then every end is published, and older ones go.
"""

from __future__ import annotations

from contextlib import suppress

from registry import Registry
from registry.errors import ConflictError, ModelNotFoundError
from tune.methods import LoraMethod, QloraMethod
from tune.model import Trainable, as_stored
from tune.parallel import Ranks
from tune.preparation import Prepared
from tune.progress import Observer, TrainingEvent
from tune.publication import publish_checkpoint
from tune.train import StageState, evaluate

KEPT = 3
"""With the result itself."""


class EpochCheckpoints:
    """Of one run, whose result will be called ``fine_tuned_name``; without a name nothing is published."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        registry: Registry,
        watcher: Observer,
        job_id: str | None,
        fine_tuned_name: str | None,
        ranks: Ranks,
    ) -> None:
        self._prepared = prepared
        self._registry = registry
        self._watcher = watcher
        self._job_id = job_id
        self._name = fine_tuned_name
        self._ranks = ranks
        self._kept = _kept_ends(prepared) if fine_tuned_name is not None else set()

    def end_epoch(self, trainable: Trainable, stage_index: int, state: StageState, *, steps_before: int) -> None:
        """Publish, if this end is one that is kept. To be called in every process; model and ``state`` stay."""
        if (stage_index, state.step) not in self._kept:
            return
        assert self._name is not None
        step = steps_before + state.step
        metrics = self._measure(trainable, stage_index, state) | {"step": float(step)}
        if self._ranks.is_first:
            name = f"{self._name}:ckpt-step-{step}"
            artifact = publish_checkpoint(
                self._prepared, trainable, metrics, registry=self._registry, job_id=self._job_id, name=name
            )
            self._remove_older()
            text = f"Checkpoint created at step {step}: {name}"
            self._watcher.on_event(TrainingEvent("info", text, {"step": step, "revision": artifact.revision}))

    def _measure(self, trainable: Trainable, stage_index: int, state: StageState) -> dict[str, float]:
        metrics = {
            "train_loss": state.last_train_loss,
            "train_mean_token_accuracy": state.last_train_accuracy,
            "trained_tokens": float(state.trained_tokens),
            "processed_tokens": float(state.processed_tokens),
        }
        ready = self._prepared.stages[stage_index]
        if not ready.data.validation:
            return metrics
        save_dtype = self._prepared.recipe.save_dtype
        assert save_dtype != "auto", save_dtype
        with as_stored(trainable, save_dtype):
            found = evaluate(
                trainable,
                ready.data.validation,
                micro_batch_size=state.micro_batch_size or ready.micro_batch_size,
                make_objective=ready.data.make_objective,
                ranks=self._ranks,
            )
        return metrics | {
            "full_valid_loss": found.loss,
            "full_valid_mean_token_accuracy": found.mean_token_accuracy,
        }

    def _remove_older(self) -> None:
        assert self._name is not None
        for alias in self._registry.checkpoints(self._name)[: -(KEPT - 1)]:
            with suppress(ModelNotFoundError):  # its owner removed it at the same moment
                self._registry.remove_alias(alias.alias)
            with suppress(ModelNotFoundError, ConflictError):  # another name serves it: it stays
                self._registry.remove(alias.revision)


def _kept_ends(prepared: Prepared) -> set[tuple[int, int]]:
    """Stage and step of the ends that are published on the way."""
    if not isinstance(prepared.recipe.method, LoraMethod | QloraMethod):
        return set()
    ends = [(index, step) for index, ready in enumerate(prepared.stages) for step in ready.data.epoch_ends]
    on_the_way = ends[:-1]
    may_stop_early = any(ready.stage.early_stopping is not None for ready in prepared.stages)
    return set(on_the_way if may_stop_early else on_the_way[-(KEPT - 1) :])
