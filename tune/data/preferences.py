"""Preference rows: one prompt, an answer that was preferred, and one that was not.

    OpenAI's DPO rows   {input: {messages, tools, ...}, preferred_output: [m], non_preferred_output: [m]}
    with a prompt       {prompt, chosen, rejected}: three texts, or three lists of messages
    without             {chosen, rejected}: two conversations that part at their last message

Shapes: openai.types.fine_tuning (preference input), and TRL's "preference" dataset formats. An answer is exactly one
assistant message: what comes after it would be learnt from neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tune.data import rows
from tune.data.faults import RowFault, row_fault
from tune.data.messages import unknown_key_reason
from tune.data.rows import ChatRow, JsonObject


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two chat rows that differ in their last message alone, which is also the only trained one."""

    line: int
    chosen: ChatRow
    rejected: ChatRow


def check_preference_object(row: JsonObject, line: int) -> PreferenceRow:
    """A decoded preference row of any of the three shapes, checked."""
    if "preferred_output" in row or "non_preferred_output" in row:
        prompt, chosen, rejected, names = _openai_parts(row, line)
    else:
        prompt, chosen, rejected, names = _chosen_parts(row, line)
    pair = [_answered(prompt, answer, name, row, line) for answer, name in zip((chosen, rejected), names, strict=True)]
    if pair[0].messages[-1] == pair[1].messages[-1]:
        raise row_fault(line, f"{names[0]} and {names[1]} are equal, so there is nothing to prefer", "nothing_to_learn")
    return PreferenceRow(line, pair[0], pair[1])


_Parts = tuple[list[Any], object, object, tuple[str, str]]


def _openai_parts(row: JsonObject, line: int) -> _Parts:
    names = ("preferred_output", "non_preferred_output")
    _check_keys(row, ("input", *names), "", line)
    given = row.get("input")
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise row_fault(line, "input must be an object with messages", "messages_shape", "input")
    _check_keys(given, ("messages", "tools", "parallel_tool_calls"), "input: ", line)
    return given["messages"], row.get(names[0]), row.get(names[1]), names


def _chosen_parts(row: JsonObject, line: int) -> _Parts:
    names = ("chosen", "rejected")
    _check_keys(row, ("prompt", *names, "tools"), "", line)
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            reason = "two texts without a prompt do not say where the answer begins; add prompt"
            raise row_fault(line, reason, "messages_shape", "prompt")
        answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        return _listed(prompt, "prompt", line), next(answers), next(answers), names
    chosen, rejected = _listed(chosen, "chosen", line), _listed(rejected, "rejected", line)
    if prompt is not None:
        prompt = _listed(prompt, "prompt", line)
        # Many files repeat the prompt in both answers (HH-RLHF, UltraFeedback).
        chosen, rejected = (
            side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in (chosen, rejected)
        )
        return prompt, chosen, rejected, names
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if shared is None:
        raise row_fault(line, "chosen and rejected do not part, so there is nothing to prefer", "nothing_to_learn")
    return chosen[:shared], chosen[shared:], rejected[shared:], names


def _answered(prompt: list[Any], answer: object, name: str, row: JsonObject, line: int) -> ChatRow:
    """Prompt and answer as one checked conversation in which the answer alone is trained."""
    if not isinstance(answer, list) or len(answer) != 1:
        count = f"{len(answer)} messages" if isinstance(answer, list) else type(answer).__name__
        raise row_fault(line, f"{name} must hold exactly one assistant message, got {count}", "messages_shape", name)
    read = [{**m, "weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in prompt]
    whole: JsonObject = {"messages": [*read, *answer]}
    source = row["input"] if isinstance(row.get("input"), dict) else row
    whole |= {key: source[key] for key in ("tools", "parallel_tool_calls") if source.get(key) is not None}
    try:
        return rows.check_chat_object(whole, line)
    except RowFault as fault:
        reason = fault.message.removeprefix(f"line {line}: ")
        raise row_fault(line, f"the prompt followed by {name}: {reason}", fault.kind, name) from fault


def _listed(value: object, name: str, line: int) -> list[Any]:
    if not isinstance(value, list):
        reason = f"{name} must be a text or a list of messages like the other parts, got {type(value).__name__}"
        raise row_fault(line, reason, "messages_shape", name)
    return value


def _check_keys(given: JsonObject, allowed: tuple[str, ...], where: str, line: int) -> None:
    for key in given:
        if key not in allowed:
            raise row_fault(line, f"{where}{unknown_key_reason(key, allowed)}", "unknown_key", key)
