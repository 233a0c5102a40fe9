"""What Capo chooses for vLLM, and what it does not let through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capo.settings import Settings
from registry import errors
from serve.engine_arguments import choose, max_lora_rank


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "max_position_embeddings": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def chosen(model: Path, *arguments: str, use_gpu: bool = False) -> dict[str, str | None]:
    return {c.argument: c.value for c in choose(model, use_gpu=use_gpu, user_arguments=list(arguments))}


def test_a_cpu_gets_an_explicit_cache_and_a_gpu_leaves_it_to_vllm(model: Path) -> None:
    # 2 (K and V) * 2 layers * 2 heads * 16 wide * 2 bytes * 1024 tokens * 32 sequences
    assert chosen(model)["--kv-cache-memory-bytes"] == str(max(64 * 1024**2, 2 * 2 * 2 * 16 * 2 * 1024 * 32))
    assert "--kv-cache-memory-bytes" not in chosen(model, use_gpu=True)


def test_what_the_user_gives_is_not_chosen_again(model: Path) -> None:
    mine = chosen(model, "--max-lora-rank", "64", "--max_loras=3")
    assert "--max-lora-rank" not in mine
    assert "--max-loras" not in mine
    assert mine["--max-cpu-loras"] == "3"


@pytest.mark.parametrize(("arguments", "rank"), [([], 16), (["--max-lora-rank", "64"], 64), (["--max-lora-rank=8"], 8)])
def test_the_largest_rank_is_known_before_the_engine_is_up(arguments: list[str], rank: int) -> None:
    assert max_lora_rank(arguments) == rank


@pytest.mark.parametrize(
    "arguments",
    [
        ["foo"],
        ["--api-key", "x"],
        ["--ssl-keyfile=x"],
        ["--lora-modules", "a=b"],
        ["--served_model_name", "x"],
        ["--no-enable-lora"],
    ],
)
def test_an_argument_that_would_be_ignored_or_do_harm_is_refused(model: Path, arguments: list[str]) -> None:
    with pytest.raises(errors.InvalidRequestError) as caught:
        chosen(model, *arguments)
    assert caught.value.code == "invalid_engine_arguments"
    assert arguments[0].partition("=")[0].replace("_", "-") in caught.value.message


@pytest.mark.parametrize(
    ("argument", "instead"),
    [("--api-key", ["capo keys create"]), ("--ssl-keyfile", ["CAPO_TLS_CERTIFICATE", "CAPO_TLS_KEY"])],
)
def test_an_argument_for_what_capo_does_itself_is_refused_with_capos_own_way(
    model: Path, argument: str, instead: list[str]
) -> None:
    with pytest.raises(errors.InvalidRequestError) as caught:
        chosen(model, argument, "x")
    assert all(word in caught.value.message for word in instead)
    names = {f"CAPO_{name}".upper() for name in Settings.model_fields}
    assert [word for word in instead if word.startswith("CAPO_") and word not in names] == []


TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser")


def test_tools_work_by_default_where_the_template_shows_how(model: Path) -> None:
    assert not set(TOOLS) & chosen(model).keys()
    (model / "chat_template.jinja").write_text("{{ tools }}<tool_call></tool_call>")
    assert chosen(model)["--tool-call-parser"] == "hermes"
    assert "--enable-auto-tool-choice" in chosen(model)


def test_a_parser_that_the_user_names_is_taken_and_enabled(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ tools }}<tool_call></tool_call>")
    mine = chosen(model, "--tool-call-parser", "mistral")
    assert "--tool-call-parser" not in mine
    assert "--enable-auto-tool-choice" in mine
    assert not set(TOOLS) & chosen(model, "--enable-auto-tool-choice", "--tool-call-parser=mistral").keys() - {TOOLS[0]}


def test_one_backend_compiles_constraints_unless_the_user_says_which(model: Path) -> None:
    """By itself vLLM keeps the backend that its first constrained request happens to need, for all that follow."""
    assert chosen(model)["--structured-outputs-config"] == '{"backend": "xgrammar"}'
    for mine in ("--structured-outputs-config={}", "--structured-outputs-config.backend=guidance"):
        assert "--structured-outputs-config" not in chosen(model, mine)
