"""The rules of deploy/prometheus: valid, each alert fires and stays silent when it should, and each is explained."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.render import ROOT
from tests.programs import program

PROMETHEUS = ROOT / "deploy/prometheus"
RUNBOOK = ROOT / "docs/runbook.md"
RULE_FILES = [str(PROMETHEUS / name) for name in ("slo.yaml", "recording.yaml", "alerts.yaml")]
CASES: dict[str, dict[str, list[dict[str, Any]]]] = yaml.safe_load(
    (Path(__file__).parent / "alert_cases.yaml").read_text()
)


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: str) -> str:
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules_and_configuration_are_valid() -> None:
    promtool("check", "rules", *RULE_FILES)
    promtool("check", "config", str(PROMETHEUS / "prometheus.yaml"))


def test_every_alert_fires_and_stays_silent(tmp_path: Path) -> None:
    assert {rule["alert"] for rule in alerts()} == set(CASES)
    assert all(cases["fires"] and cases["silent"] for cases in CASES.values())
    # Days minute by minute, and objectives beside everything else, would take half a minute.
    of_objectives = {alert for alert in CASES if "BudgetBurns" in alert}
    _run(tmp_path, RULE_FILES, of_objectives)
    _run(tmp_path, RULE_FILES[1:], CASES.keys() - of_objectives)


def test_a_case_that_does_not_hold_is_found(tmp_path: Path) -> None:
    """What promtool says about the first test turned round, so that silence is not mistaken for success."""
    test = _tests({"CapoDown"})[0]
    test["promql_expr_test"][0]["exp_samples"] = []
    path = _test_file(tmp_path, RULE_FILES, [test], interval="1m")
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", str(path))


def test_every_alert_has_a_severity_and_its_section_in_the_runbook() -> None:
    sections = re.findall(r"^### (\w+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    assert sections == [rule["alert"] for rule in alerts()]
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["annotations"]["summary"]


def _run(folder: Path, rule_files: list[str], chosen: Set[str]) -> None:
    """By interval: promtool has one for all tests of a file."""
    for interval in sorted({test["interval"] for test in _tests(chosen)}):
        tests = [test for test in _tests(chosen) if test["interval"] == interval]
        promtool("test", "rules", str(_test_file(folder, rule_files, tests, interval=interval)))


def _test_file(folder: Path, rule_files: list[str], tests: list[dict[str, Any]], *, interval: str) -> Path:
    groups = [group["name"] for path in rule_files for group in yaml.safe_load(Path(path).read_text())["groups"]]
    document = {
        "rule_files": rule_files,
        "evaluation_interval": interval,
        # Else promtool takes them in any order, and what is recorded is too old for alerts that come before it.
        "group_eval_order": groups,
        "tests": tests,
    }
    path = folder / f"{interval}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _tests(chosen: Set[str]) -> list[dict[str, Any]]:
    return [
        _test(alert, CASES[alert][kind][number], fires=kind == "fires")
        for alert in sorted(chosen)
        for kind in ("fires", "silent")
        for number in range(len(CASES[alert][kind]))
    ]


def _test(alert: str, case: dict[str, Any], *, fires: bool) -> dict[str, Any]:
    firing = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    samples = [{"labels": "{}", "value": 1}] if fires else []
    return {
        "interval": case.get("every", "1m"),
        "input_series": [{"series": name, "values": str(values)} for name, values in case["series"].items()],
        "promql_expr_test": [{"expr": firing, "eval_time": case["at"], "exp_samples": samples}],
    }
