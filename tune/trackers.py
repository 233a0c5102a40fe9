"""Experiment trackers that a recipe names: Weights & Biases and MLflow.

Where to and as whom is each tracker's own environment (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME). A resumed run goes on in the tracker's run that it began: W&B gets an id made from the run's
fingerprint, and MLflow a tag to find it by.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from types import TracebackType
from typing import Any, Literal

from registry.errors import InvalidRequestError
from tune.observers import scalars_of
from tune.progress import StepMetrics, TrainingEvent
from tune.recipe import Wandb

_RUN_TAG = "capo.run"


def open_tracker(
    name: Literal["wandb", "mlflow"],
    *,
    run_name: str,
    run_id: str,
    recipe: Mapping[str, Any],
    wandb: Wandb | None = None,
) -> WandbRun | MlflowRun:
    """Connect, as the tracker's environment says, or ``wandb`` for that one. May block on the network.

    Raises:
        InvalidRequestError: the tracker is not installed.
    """
    try:
        library: Any = import_module(name)
    except ImportError as error:
        raise InvalidRequestError(
            f"trackers names {name!r}, which is not installed here; pip install 'capo-llm[{name}]', or leave it out",
            param="trackers",
        ) from error
    if name == "wandb":
        return WandbRun(library, run_name=run_name, run_id=run_id, recipe=recipe, options=wandb)
    return MlflowRun(library, run_name=run_name, run_id=run_id, recipe=recipe)


class WandbRun(AbstractContextManager["WandbRun"]):
    """One run in Weights & Biases; each stage has an axis of its own, because W&B's steps may only rise."""

    def __init__(
        self, wandb: Any, *, run_name: str, run_id: str, recipe: Mapping[str, Any], options: Wandb | None = None
    ) -> None:
        named: dict[str, Any] = {"name": run_name}
        if options is not None:
            named = {"name": options.name or run_name, "project": options.project, "entity": options.entity}
            named["tags"] = list(options.tags)
        self._run = wandb.init(**named, id=run_id, resume="allow", config=dict(recipe))
        self._stages: set[str] = set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)

    def on_event(self, event: TrainingEvent) -> None:
        if event.level == "warn":
            self._run.alert(title="Capo", text=event.message)

    def on_step(self, metrics: StepMetrics) -> None:
        axis = f"{metrics.stage}/step"
        if metrics.stage not in self._stages:
            self._stages.add(metrics.stage)
            self._run.define_metric(f"{metrics.stage}/*", step_metric=axis)
        self._run.log(scalars_of(metrics) | {axis: metrics.step})


class MlflowRun(AbstractContextManager["MlflowRun"]):
    """One run in MLflow."""

    def __init__(self, mlflow: Any, *, run_name: str, run_id: str, recipe: Mapping[str, Any]) -> None:
        self._mlflow = mlflow
        found = mlflow.search_runs(filter_string=f"tags.`{_RUN_TAG}` = '{run_id}'", output_format="list")
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=run_name, tags={_RUN_TAG: run_id})
            mlflow.log_dict(dict(recipe), "recipe.json")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mlflow.end_run(status="FINISHED" if kind is None else "FAILED")

    def on_event(self, event: TrainingEvent) -> None:
        if event.level == "warn":
            self._mlflow.set_tag("capo.last_warning", event.message)

    def on_step(self, metrics: StepMetrics) -> None:
        self._mlflow.log_metrics(scalars_of(metrics), step=metrics.step)
