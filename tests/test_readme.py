"""What the README tells people to type exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

from tune.jobs.records import OPEN, JobStatus

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert named <= targets


def test_every_path_that_is_named_exists() -> None:
    paths = set(re.findall(r"(?:examples|tests|docs|bench)/[\w./-]*\w", README))
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_capo_command_that_is_named_has_help() -> None:
    named = set(re.findall(r"(?:`|/)capo ((?:registry )?[a-z]+)", README))
    assert {"tune", "serve", "registry import"} <= named
    for command in named:
        arguments = [sys.executable, "-m", "capo", *command.split(), "--help"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        assert "Usage" in done.stdout


def test_the_loop_that_waits_for_a_job_ends_whatever_becomes_of_the_job() -> None:
    loop = re.search(r"^while .*\.status not in (\(.*\)):$", README, flags=re.MULTILINE)
    assert loop is not None
    assert set(ast.literal_eval(loop[1])) == set(get_args(JobStatus)) - set(OPEN)


def test_recipes_of_the_examples_are_valid() -> None:
    from tune.recipe_file import load_recipe

    recipes = sorted((ROOT / "examples").rglob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load_recipe(recipe)
