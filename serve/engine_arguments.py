"""The vLLM arguments that Capo chooses by itself, each with its reason. What the user passes wins.

Knows nothing of vLLM but the names of its arguments.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import errors
from serve.engine_api import EngineLimits
from serve.tool_formats import tool_parser

MAX_LORAS = 8
MAX_LORA_RANK = 16
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes (vLLM 0.32, vllm/config/lora.py, MaxLoRARanks)."""

_AUTO_TOOLS = "--enable-auto-tool-choice"
_TOOL_PARSER = "--tool-call-parser"
_STRUCTURED_OUTPUTS = "--structured-outputs-config"

_GIB = 1024**3
_CPU_KV_SEQUENCES = 32
_CPU_KV_LEAST_BYTES = 64 * 1024**2
_CPU_KV_UNKNOWN_BYTES = 4 * _GIB


@dataclass(frozen=True, slots=True)
class Choice:
    """One argument, its value and why."""

    argument: str
    value: str | None
    """``None``: a flag."""
    reason: str

    @property
    def argv(self) -> list[str]:
        return [self.argument] if self.value is None else [self.argument, self.value]


def choose(model_path: Path, *, use_gpu: bool, user_arguments: list[str]) -> list[Choice]:
    """Our choices for what the user left open. They go before the user's on the command line: the last one wins."""
    refuse_front_end_arguments(user_arguments)
    config = _read_config(model_path)
    max_loras = _user_value(user_arguments, "--max-loras") or str(MAX_LORAS)
    choices = [
        Choice("--enable-lora", None, "adapters are what Capo serves"),
        Choice("--max-loras", max_loras, "adapter slots; each costs memory at the largest rank"),
        Choice("--max-cpu-loras", max_loras, "Capo decides what is resident, so host copies equal slots"),
        Choice(
            "--max-lora-rank",
            str(MAX_LORA_RANK),
            "the default rank of a recipe; raise it for larger adapters",
        ),
        *_tool_choices(model_path, user_arguments),
    ]
    if not any(argument.replace("_", "-").startswith(_STRUCTURED_OUTPUTS) for argument in user_arguments):
        choices.append(
            Choice(
                _STRUCTURED_OUTPUTS,
                '{"backend": "xgrammar"}',
                "one backend for all: by itself vLLM keeps the one that the first request needs",
            )
        )
    if not use_gpu:
        bytes_, why = _cpu_kv_cache_bytes(config)
        choices.append(Choice("--kv-cache-memory-bytes", str(bytes_), why))
        choices.append(Choice("--enforce-eager", None, "with LoRA on a CPU vLLM compiles nothing anyway"))
    return [c for c in choices if _user_value(user_arguments, c.argument) is None or c.argument == "--enable-lora"]


def _tool_choices(model_path: Path, user_arguments: list[str]) -> list[Choice]:
    """What makes vLLM read tool calls. Nothing where the model's form of them is not known: then tools are refused."""
    template = _user_value(user_arguments, "--chat-template")
    known = tool_parser(model_path, Path(template) if template else None)
    given = _user_value(user_arguments, _TOOL_PARSER)
    if given is not None:
        return [Choice(_AUTO_TOOLS, None, f"it goes with {_TOOL_PARSER} {given}")]
    if known is None or _user_value(user_arguments, _AUTO_TOOLS) is not None:
        return []
    parser, markup = known
    return [
        Choice(_AUTO_TOOLS, None, "the chat template takes tools"),
        Choice(_TOOL_PARSER, parser, f"the chat template writes tool calls with {markup}"),
    ]


# Arguments of vLLM's own server that have no meaning behind Capo's; accepted, they would be ignored or do harm.
_FRONT_END_ARGUMENTS = {
    "--api-key": "Capo has keys of its own; make them with capo keys create",
    "--host": "use capo serve --host",
    "--port": "use capo serve --port",
    "--model": "use capo serve --model",
    "--served-model-name": "the base model goes by its own id",
    "--no-enable-lora": "adapters are what Capo serves; --max-loras 1 takes the least memory for them",
    "--lora-modules": "publish adapters to the registry; capo registry import takes a directory",
    "--grpc": "Capo has its own gRPC server",
    "--grpc-port": "use capo serve --grpc-port",
    "--middleware": "the routes are Capo's own",
    "--root-path": "the routes are Capo's own",
    "--allowed-origins": "the routes are Capo's own",
    "--headless": "Capo runs one engine in process",
    "--api-server-count": "Capo runs one server process",
}


def refuse_front_end_arguments(arguments: list[str]) -> None:
    """Refuse what would be accepted by vLLM's parser and then ignored, or do harm.

    Raises:
        InvalidRequestError: naming the argument and what to use instead.
    """
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        reason = _FRONT_END_ARGUMENTS.get(name)
        if name.startswith("--ssl-"):
            reason = "Capo speaks TLS itself; set CAPO_TLS_CERTIFICATE and CAPO_TLS_KEY"
        if reason is not None:
            raise errors.InvalidRequestError(f"{name} cannot be given here: {reason}.", code="invalid_engine_arguments")
    if arguments and not arguments[0].startswith("-"):
        raise errors.InvalidRequestError(
            f"{arguments[0]!r} is not an argument of capo serve. The model is given with --model.",
            code="invalid_engine_arguments",
        )


def max_lora_rank(user_arguments: list[str]) -> int:
    """The largest rank that an engine started with these arguments holds; asked before the engine is up."""
    given = _user_value(user_arguments, "--max-lora-rank")
    return int(given) if given is not None and given.isdigit() else MAX_LORA_RANK


def engine_limits(model_path: Path, user_arguments: list[str]) -> EngineLimits:
    """What an engine started with these arguments holds, as far as they and the model's own files say it.

    For processes without an engine. What is not known there counts as unlimited: the engine itself refuses later.
    """
    config = _read_config(model_path)

    def number(argument: str, otherwise: int) -> int:
        given = _user_value(user_arguments, argument)
        return int(given) if given is not None and given.isdigit() else otherwise

    return EngineLimits(
        max_loras=number("--max-loras", MAX_LORAS),
        max_lora_rank=max_lora_rank(user_arguments),
        max_model_len=number("--max-model-len", config.get("max_position_embeddings", sys.maxsize)),
        vocab_size=config.get("vocab_size", sys.maxsize),
    )


def _cpu_kv_cache_bytes(config: dict[str, Any]) -> tuple[int, str]:
    """vLLM would take nine tenths of the machine's memory if nobody said a number."""
    quarter = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    try:
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        per_token = 2 * config["num_hidden_layers"] * heads * head_dim * 2  # K and V, two bytes each
        wanted = per_token * config["max_position_embeddings"] * _CPU_KV_SEQUENCES
    except (KeyError, TypeError):
        return min(_CPU_KV_UNKNOWN_BYTES, quarter), "unknown architecture: 4 GiB, at most a quarter of the memory"
    bytes_ = max(_CPU_KV_LEAST_BYTES, min(wanted, quarter))
    return bytes_, f"{_CPU_KV_SEQUENCES} sequences of full length, at most a quarter of the memory"


def _read_config(model_path: Path) -> dict[str, Any]:
    try:
        config = json.loads((model_path / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _user_value(arguments: list[str], name: str) -> str | None:
    """The value the user gave for ``name`` (an empty text for a flag), ``None`` when they did not."""
    for index, argument in enumerate(arguments):
        key, separator, value = argument.partition("=")
        if key.replace("_", "-") == name:
            if separator:
                return value
            return arguments[index + 1] if index + 1 < len(arguments) else ""
    return None
