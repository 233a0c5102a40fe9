"""docs/security.md: every class of advisories has its tests, every limit its figure, and all of them are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from serve import constraints, faces, request_policy, request_shapes
from serve.limits import Limits
from serve.prompt_logprobs import MAX_PROMPT_LOGPROBS
from tests.test_house import ROOT
from tune.jobs import files, requests, upload

TEXT = (ROOT / "docs" / "security.md").read_text()
CLASSES = [line for line in TEXT.splitlines() if re.match(r"\| S\d+ \|", line)]


def test_all_25_classes_are_there_with_at_least_one_test_each() -> None:
    assert [line.split("|")[1].strip() for line in CLASSES] == [f"S{number}" for number in range(1, 26)]
    assert all("::test_" in line for line in CLASSES)


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", TEXT)
    assert len(named) >= 40
    missing = [f"{path}::{name}" for path, name in named if name not in functions_of(ROOT / path)]
    assert missing == []


def functions_of(path: Path) -> set[str]:
    assert path.exists(), path
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_the_figures_of_the_limits_are_those_of_the_code() -> None:
    mebibyte = 1024 * 1024
    said = {
        "request line and headers": f"{faces.MAX_HEAD_BYTES // 1024} KiB",
        "JSON body": f"{faces.MAX_REQUEST_BYTES // mebibyte} MiB; {request_policy.MAX_VALUES:,} entries",
        "| n |": f"| {request_policy.MAX_N} |",
        "logprobs, top_logprobs": f"| {request_policy.MAX_LOGPROBS} |",
        "log probabilities of prompt": f"| {MAX_PROMPT_LOGPROBS:,} |",
        "| stop |": f"{request_policy.MAX_STOP_STRINGS} of {request_policy.MAX_STOP_CHARACTERS} characters",
        "prompts in one request": f"| {request_policy.MAX_PROMPTS} |",
        "messages, or items": f"| {request_policy.MAX_MESSAGES} |",
        "tools, logit_bias": f"| {request_policy.MAX_TOOLS}, {request_policy.MAX_LOGIT_BIAS} |",
        "| bad_words |": f"{request_policy.MAX_BAD_WORDS} of {request_policy.MAX_BAD_WORDS_BYTES // 1024} KiB together",
        "allowed_token_ids, stop": f"{request_policy.MAX_ALLOWED_TOKEN_IDS:,}, {request_policy.MAX_STOP_TOKEN_IDS} |",
        "JSON schema of": f"{request_shapes.MAX_SCHEMA_BYTES // 1024} KiB, {request_shapes.MAX_SCHEMA_DEPTH} deep",
        "regex, grammar": f"{request_shapes.MAX_REGEX_CHARACTERS:,} and {request_shapes.MAX_GRAMMAR_CHARACTERS:,} "
        f"characters, {request_shapes.MAX_CHOICES:,}",
        "compile time": f"{constraints.SLOWEST_TRIAL_SECONDS:g} s, and {constraints.SLOWEST_STEP_SECONDS * 1000:g} ms",
        "| upload |": f"{files.MAX_FILE_BYTES // mebibyte} MiB a file, {files.MAX_PART_BYTES // mebibyte} MiB a part, "
        f"{files.MAX_UPLOAD_BYTES // mebibyte // 1024} GiB",
        "beside the file": f"{upload.FORM_OVERHEAD_BYTES // 1024} KiB, {upload.MAX_PARTS} parts",
        "| requests in flight |": f"{Limits().max_in_flight:,}",
        "in flight to one model": f"{Limits().max_in_flight_per_model}",
        "what makes jobs": f"{requests.MAX_BODY_BYTES // mebibyte} MiB",
        "reads nothing": f"{faces.STALLED_READER_SECONDS:g} s",
    }
    rows = [line for line in TEXT.splitlines() if line.startswith("|")]
    wrong = {name: figure for name, figure in said.items() if not any(name in row and figure in row for row in rows)}
    assert wrong == {}
