"""The Dockerfile, stage by stage."""

from __future__ import annotations

from pathlib import Path

from dockerfile_parse import DockerfileParser

from tests.deploy.render import ROOT


class Stage:
    """One FROM and what follows it."""

    def __init__(self, base: str, name: str) -> None:
        self.base, self.name = base, name
        self.steps: list[tuple[str, str]] = []

    def of(self, instruction: str) -> list[str]:
        return [value for name, value in self.steps if name == instruction]


def read_stages(scratch: Path) -> dict[str, Stage]:
    """``scratch`` is an empty directory: the parser writes to what it reads."""
    path = scratch / "Dockerfile"
    path.write_text((ROOT / "Dockerfile").read_text())
    found: dict[str, Stage] = {}
    for step in DockerfileParser(str(path)).structure:
        if step["instruction"] == "FROM":
            base, name = step["value"].split(" AS ")
            found[name] = stage = Stage(base, name)
        elif found and step["instruction"] != "COMMENT":
            stage.steps.append((step["instruction"], step["value"]))
    return found


def line_of(stages: dict[str, Stage], name: str) -> list[Stage]:
    """The stage and those that it is made from, the first one first."""
    stage = stages[name]
    return [*(line_of(stages, stage.base) if stage.base in stages else []), stage]


def values(stages: dict[str, Stage], name: str, instruction: str) -> list[str]:
    return [value for stage in line_of(stages, name) for value in stage.of(instruction)]


def environment(stages: dict[str, Stage], name: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in " ".join(values(stages, name, "ENV")).split())
