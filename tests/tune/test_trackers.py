"""Weights & Biases and MLflow, as far as they can be asked for without them: through stand-ins of their modules."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from registry.errors import InvalidRequestError
from tests.tune.workshop import Recorder, StopAfter, Workshop
from tune.progress import StopRequested


@dataclass
class FakeWandb:
    """The calls of ``wandb`` that we make, with its rule that an id which exists is resumed."""

    runs: dict[str, FakeWandbRun] = field(default_factory=dict)

    def init(self, *, name: str, id: str, resume: str, config: dict[str, Any]) -> FakeWandbRun:
        assert (name, resume, config["name"]) == ("colours", "allow", "colours")
        return self.runs.setdefault(id, FakeWandbRun())


@dataclass
class FakeWandbRun:
    logged: list[dict[str, float]] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("1-sft/*", "1-sft/step")

    def log(self, figures: dict[str, float]) -> None:
        self.logged.append(figures)

    def alert(self, *, title: str, text: str) -> None:
        assert title
        assert text

    def finish(self, *, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@dataclass
class FakeMlflow:
    runs: list[dict[str, Any]] = field(default_factory=list)
    active: dict[str, Any] = field(default_factory=dict)

    def search_runs(self, *, filter_string: str, output_format: str) -> list[Any]:
        assert output_format == "list"
        tag = filter_string.rsplit("'", 2)[1]
        found = [number for number, run in enumerate(self.runs) if run["tags"]["capo.run"] == tag]
        return [SimpleNamespace(info=SimpleNamespace(run_id=number)) for number in found]

    def start_run(self, *, run_id: int | None = None, run_name: str = "", tags: dict[str, str] | None = None) -> None:
        if run_id is None:
            self.runs.append({"name": run_name, "tags": tags, "logged": [], "ended": []})
            run_id = -1
        self.active = self.runs[run_id]

    def log_dict(self, given: dict[str, Any], path: str) -> None:
        self.active[path] = given

    def log_metrics(self, figures: dict[str, float], *, step: int) -> None:
        self.active["logged"].append(figures | {"1-sft/step": step})

    def end_run(self, *, status: str) -> None:
        self.active["ended"].append(status)


def run_twice(workshop: Workshop, tracker: str) -> Recorder:
    """Stopped after three steps, and resumed."""
    recipe = workshop.recipe(trackers=[tracker], stages=[workshop.sft(epochs=None, max_steps=5)])
    with pytest.raises(StopRequested):
        workshop.run(recipe, should_stop=StopAfter(3))
    observer = Recorder()
    workshop.run(recipe, observer=observer)
    return observer


def test_wandb_hears_every_step_of_a_resumed_run_in_one_run(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    last = run_twice(workshop, "wandb").steps[-1]
    (run,) = wandb.runs.values()
    assert [figures["1-sft/step"] for figures in run.logged] == [1, 2, 3, 4, 5]
    assert run.logged[-1]["1-sft/train_loss"] == last.train_loss
    assert run.logged[-1]["1-sft/valid_loss"] == last.valid_loss
    assert "1-sft/valid_loss" not in run.logged[0]
    assert run.exit_codes == [1, 0]


def test_mlflow_hears_every_step_of_a_resumed_run_in_one_run(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    last = run_twice(workshop, "mlflow").steps[-1]
    (run,) = mlflow.runs
    assert run["name"] == "colours"
    assert run["recipe.json"]["stages"][0]["max_steps"] == 5
    assert [figures["1-sft/step"] for figures in run["logged"]] == [1, 2, 3, 4, 5]
    assert run["logged"][-1]["1-sft/train_loss"] == last.train_loss
    assert run["ended"] == ["FAILED", "FINISHED"]


def test_wandb_is_told_what_the_recipe_says_in_place_of_its_environment(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def init(**given: Any) -> FakeWandbRun:
        asked.update(given)
        return FakeWandbRun()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    options = {"project": "tuning", "name": "try 3", "entity": "team", "tags": ["a", "b"]}
    stage = workshop.sft(epochs=None, max_steps=1, validation=None)
    workshop.run(workshop.recipe(trackers=["wandb"], wandb=options, stages=[stage]))
    assert {name: asked[name] for name in options} == options


def test_options_without_their_tracker_are_refused(workshop: Workshop) -> None:
    with pytest.raises(InvalidRequestError, match="trackers does not name wandb"):
        workshop.run(workshop.recipe(wandb={"project": "tuning"}))


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_before_training(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    observer = Recorder()
    with pytest.raises(InvalidRequestError, match=rf"pip install 'capo-llm\[{tracker}\]'"):
        workshop.run(workshop.recipe(trackers=[tracker]), observer=observer)
    assert not observer.steps
