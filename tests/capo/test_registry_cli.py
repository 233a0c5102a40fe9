"""``capo registry``'s alias commands, and the settings of pins, as an operator types them."""

from __future__ import annotations

import errno
import getpass
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bench.adapters import write_random_adapter
from capo.cli import registry as registry_cli
from capo.cli.serve import read_settings
from registry import Registry, errors, locate_base_model
from registry.artifacts import ArtifactStore
from tests.registry.samples import write_adapter, write_base
from tests.serve.running import publish


def run(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(registry_cli.app, [*arguments, "--registry", str(root)], env={"COLUMNS": "250"})


def test_an_alias_gets_a_canary_is_rolled_back_and_removed(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    one, two = (publish(registry, "support", content).revision for content in ("one", "two"))
    assert run(tmp_path, "alias", "prod", one).output == f"prod -> {one}\n"
    done = run(tmp_path, "alias", "prod", one, "--canary", two, "--percent", "10", "--expected", one)
    assert done.output == f"prod -> {one}, 10 % -> {two}\n"
    assert "prod (10 %)" in run(tmp_path, "list").output
    assert run(tmp_path, "rollback", "prod").output == f"prod -> {one}\n"
    assert registry.alias("prod").canary is None
    assert run(tmp_path, "unalias", "prod").output == "removed prod\n"
    assert registry.aliases() == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--canary", "TWO"], errors.InvalidRequestError),
        (["--percent", "10"], errors.InvalidRequestError),
        (["--canary", "TWO", "--percent", "0"], errors.InvalidRequestError),
        (["--canary", "ONE", "--percent", "10"], errors.InvalidRequestError),
        (["--expected", "TWO"], errors.ConflictError),
    ],
)
def test_a_wrong_alias_command_changes_nothing(tmp_path: Path, arguments: list[str], error: type[Exception]) -> None:
    registry = Registry(tmp_path)
    one, two = (publish(registry, "support", content).revision for content in ("one", "two"))
    registry.set_alias("prod", one)
    given = [{"ONE": one, "TWO": two}.get(argument, argument) for argument in arguments]
    assert isinstance(run(tmp_path, "alias", "prod", two if "--expected" in given else one, *given).exception, error)
    assert (registry.alias("prod").revision, registry.alias("prod").canary) == (one, None)


def test_an_import_says_what_could_not_be_checked(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", model_type="something-new")
    adapter, root = write_adapter(tmp_path / "adapter"), tmp_path / "registry"
    done = run(root, "import", str(adapter), "--name", "support", "--base-model", str(base))
    assert done.stderr.startswith("note: Whether modules are missing was not checked")
    assert done.stdout.strip() == Registry(root).resolve("support").revision


def test_an_import_says_what_it_left_out(tmp_path: Path) -> None:
    base, root = write_base(tmp_path / "base"), tmp_path / "registry"
    adapter = write_adapter(tmp_path / "adapter")
    for name in ("training_args.bin", ".env"):
        (adapter / name).touch()
    done = run(root, "import", str(adapter), "--name", "support", "--base-model", str(base))
    assert done.stderr == "note: left out, for it is no part of the adapter: '.env', 'training_args.bin'\n"
    assert done.exit_code == 0


def test_what_is_damaged_is_listed_with_its_fault_and_fails_a_verification(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    whole, damaged = (publish(registry, name) for name in ("whole", "damaged"))
    assert run(tmp_path, "verify").exit_code == 0
    (damaged.path / "manifest.json").unlink()
    listed = run(tmp_path, "list")
    assert whole.revision in listed.stdout
    assert listed.stderr.startswith(f"{damaged.revision} is damaged: manifest.json is missing.")
    verified = run(tmp_path, "verify")
    assert verified.output.splitlines() == [f"{whole.revision}: ok", f"{damaged.revision}: manifest.json is missing"]
    assert verified.exit_code == 1


@pytest.mark.parametrize("fault", ["manifest.json is missing", "the directory is named"])
def test_a_verification_of_one_that_is_damaged_names_the_fault_by_whatever_name_it_is_asked_for(
    tmp_path: Path, fault: str
) -> None:
    damaged = publish(Registry(tmp_path), "damaged", alias="prod")
    manifest = damaged.path / "manifest.json"
    manifest.unlink()
    if fault != "manifest.json is missing":
        manifest.write_bytes(b"{}")
    for reference in ("prod", damaged.revision, f"damaged@{damaged.digest[:20]}"):
        verified = run(tmp_path, "verify", reference)
        assert verified.output.startswith(damaged.revision)
        assert fault in verified.output
        assert verified.exit_code == 1
    assert isinstance(run(tmp_path, "verify", "damaged@0123456789").exception, errors.ModelNotFoundError)


@pytest.mark.parametrize(
    "command",
    ["list", "show x", "alias x x@0123456789abcdef", "rollback x", "unalias x", "verify", "remove x@01", "gc"],
)
@pytest.mark.parametrize("is_there", [False, True], ids=["nothing", "an empty directory"])
def test_a_mistyped_registry_is_none_and_becomes_none(tmp_path: Path, command: str, is_there: bool) -> None:
    root = tmp_path / "typo"
    if is_there:
        root.mkdir()
    error = run(root, *command.split()).exception
    assert isinstance(error, errors.NotFoundError)
    assert error.message == f"There is no registry at {root}. Name one with --registry."
    assert sorted(tmp_path.rglob("*")) == ([root] if is_there else [])


def test_a_name_that_may_not_be_listed_fails_a_verification_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path)
    whole, locked = (publish(registry, name) for name in ("whole", "locked"))
    directories = ArtifactStore.directories

    def refuse(store: ArtifactStore, name: str, digest_prefix: str = "") -> list[str]:
        if name == locked.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return directories(store, name, digest_prefix)

    monkeypatch.setattr(ArtifactStore, "directories", refuse)
    verified = run(tmp_path, "verify")
    refusal = "locked: Its directory may not be read by this user. Give it back its owner and mode."
    assert verified.output.splitlines() == [refusal, f"{whole.revision}: ok"]
    assert verified.exit_code == 1


@pytest.mark.parametrize("command", ["rollback", "unalias"])
def test_an_alias_that_is_not_set_is_an_error(tmp_path: Path, command: str) -> None:
    Registry(tmp_path)
    assert isinstance(run(tmp_path, command, "prod").exception, errors.ModelNotFoundError)


def test_every_change_is_in_the_audit_log_with_who_made_it_and_how_it_ended(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    registry = Registry(root)
    base = locate_base_model("capo-tiny")
    one, two = (publish(registry, "support", content).revision for content in ("one", "two"))
    adapter = write_random_adapter(tmp_path / "adapter", base, rank=4, seed=0, scale=0.1)
    for arguments in (
        ["alias", "prod", one],
        ["alias", "prod", one, "--canary", two, "--percent", "10"],
        ["rollback", "prod"],
        ["rollback", "prod"],
        ["unalias", "prod"],
        ["import", str(adapter), "--name", "mine"],
        ["remove", two],
        ["gc"],
        ["list"],
        ["verify"],
    ):
        run(root, *arguments)
    acts = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(act["operation"], act["target"], act["result"]) for act in acts] == [
        ("registry alias", "prod", "ok"),
        ("registry alias", "prod", "ok"),
        ("registry rollback", "prod", "ok"),
        ("registry rollback", "prod", acts[3]["result"]),
        ("registry unalias", "prod", "ok"),
        ("registry import", "mine", "ok"),
        ("registry remove", two, "ok"),
        ("registry gc", "", "ok"),
    ]
    assert acts[1]["changes"] == {"revision": one, "canary": f"10 % {two}"}
    assert acts[3]["result"] not in ("ok", "internal_error"), "there was nothing to go back to"
    assert acts[5]["changes"]["revision"].startswith("mine@")
    assert {act["from"] for act in acts} == {f"command line of {getpass.getuser()}"}


@pytest.mark.parametrize(
    ("role", "given", "place"),
    [("all", None, "file"), ("control", None, "file"), ("infer", None, "stdout"), ("infer", "file", "file")],
)
def test_a_replica_writes_its_acts_to_standard_output_unless_told_otherwise(
    role: str, given: str | None, place: str
) -> None:
    assert read_settings(role=role, audit_log=given).audit_place == place


def test_acts_on_standard_output_are_lines_of_the_same_form(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from capo.audit import Act, AuditLog, AuditPlace\n"
        "AuditLog(Path(sys.argv[1]), AuditPlace.STDOUT).write(Act('k', 'acme', 'PUT', 'x', '::1', '200'))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["key"] == "k"
    assert list(tmp_path.iterdir()) == []


def test_pins_come_from_the_command_line_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    ft = "ft:capo-tiny:capo:support:k3j2h1g0"
    assert read_settings().pin == ()
    monkeypatch.setenv("CAPO_PIN", f"support, {ft},,support@3f9c2b7e91aa04d1")
    assert read_settings().pin == ("support", ft, "support@3f9c2b7e91aa04d1")
    assert read_settings(pin=["beta", "gamma"]).pin == ("beta", "gamma")
    with pytest.raises(errors.InvalidRequestError, match="pin"):
        read_settings(pin=["Not A Name"])
