"""The house: which room may import which, what stays light, and what may not be in the sources at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("registry", "tune", "serve", "capo")
MAY_IMPORT = {
    "registry": set(),
    "tune": {"registry", "capo_proto"},
    "serve": {"registry", "capo_proto"},
    "capo": {"registry", "tune", "serve", "capo_proto"},
}
# Only these may import vLLM: the engine behind its seam, the import ahead of its start, and the plugin that runs inside
# vLLM's own processes.
VLLM_FILES = {
    f"serve/{name}.py"
    for name in (
        "engine", "engine_requests", "engine_abilities", "engine_faults", "observed_llm", "engine_preload",
    )
}  # fmt: skip


def sources(room: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / room).rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    for path, tree in sources(room):
        used = {name.partition(".")[0] for name in imports(tree)} & {*ROOMS, "capo_proto"}
        assert used <= MAY_IMPORT[room] | {room}, f"{path} imports {used - MAY_IMPORT[room] - {room}}"


def test_only_the_engine_and_the_plugin_import_vllm() -> None:
    for room in ROOMS:
        for path, tree in sources(room):
            if any(name.partition(".")[0] == "vllm" for name in imports(tree)):
                assert path in VLLM_FILES or path.startswith("serve/vllm_plugin/"), path


@pytest.mark.parametrize("room", ROOMS)
def test_sources_hold_no_way_to_run_code_from_data(room: str) -> None:
    """No pickle, no eval, no shell, no archives: what comes from outside is parsed, never executed."""
    forbidden_modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "tarfile", "zipfile"}
    forbidden_calls = {"eval", "exec", "compile"}
    for path, tree in sources(room):
        names = {name.partition(".")[0] for name in imports(tree)}
        assert not names & forbidden_modules, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                if isinstance(node.func, ast.Name):
                    assert node.func.id not in forbidden_calls, f"{path}:{node.lineno}"
                if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                    call = f"{node.func.value.id}.{node.func.attr}"
                    assert call not in {"torch.load", "os.system", "shutil.unpack_archive"}, f"{path}:{node.lineno}"
                assert not any(k.arg == "shell" for k in node.keywords), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("registry", ["torch", "vllm", "transformers", "fastapi", "grpc", "sqlalchemy"]),
        ("tune.jobs.routes", ["torch", "vllm", "transformers", "peft", "trl", "datasets", "accelerate"]),
        ("tune.jobs.service", ["torch", "vllm", "transformers", "peft", "trl", "datasets", "accelerate"]),
        ("tune.jobs.worker", ["torch", "vllm", "transformers", "peft", "trl", "datasets", "accelerate"]),
        ("serve.service", ["torch", "vllm", "transformers"]),
        ("capo.app", ["torch", "vllm", "transformers", "peft"]),
        ("capo.cli", ["torch", "vllm", "transformers", "fastapi", "sqlalchemy", "openai"]),
    ],
)
def test_a_light_module_stays_light(module: str, absent: list[str]) -> None:
    script = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_http_process_never_pulls_in_the_training_stack() -> None:
    """vLLM brings torch and transformers along; peft and trl belong to training alone."""
    for room in ("serve", "capo"):
        for path, tree in sources(room):
            names = {name.partition(".")[0] for name in imports(tree)}
            assert not names & {"peft", "trl", "accelerate", "bitsandbytes", "gptqmodel"}, path


def test_the_engine_is_started_only_where_make_test_gives_it_the_machine() -> None:
    [line] = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("ENGINE_TESTS")]
    places = tuple(line.partition(":=")[2].split())
    files = [
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)
    ]
    with_engine = [file for file in files if "pytest.mark.engine" in (ROOT / file).read_text()]
    assert with_engine
    assert [file for file in files if file.startswith("tests/e2e/") and file not in with_engine] == []
    assert [file for file in with_engine if not file.startswith(places)] == []
