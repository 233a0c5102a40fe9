"""Token ids and loss mask of a conversation, for any chat template.

Most templates carry no markers for the assistant's text, so the trained spans are derived from rendered
prefixes. For the assistant message *i*::

    prompt = render(messages[:i], add_generation_prompt=True)     what serving tokenises before it answers
    turn   = render(messages[:i + 1])                             prompt + answer + end of turn [+ separator]

Both are rendered from what vLLM would hand to the template (:mod:`tune.data.served_form`).

``turn`` must begin with ``prompt``, or training would see text that serving never sends: such a template is
refused. The span is what ``turn`` adds, up to its last end-of-turn token; what follows (a newline, say) is
never generated. A span without any end-of-turn token is refused too: such a model would never stop.

Two families need more. Some templates open the reasoning in the prompt (``<think>``) and cut it out of the
answer that they render (DeepSeek-R1): where the row's answer brings its reasoning, the turn is the prompt and the
answer as the row has it, with the end that the template gives it. And in some (GLM-4) no token ends a turn but the
first one of the next message, at which serving stops: that token is asked for and joins the span.

The whole row is tokenised once and each prompt's ids must be its prefix. Where they are not (a token that
straddles the border), or where the template rewrites earlier turns (Qwen3 removes their thinking), each
trained turn becomes an example of its own, which again is exactly what serving sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from registry.errors import InvalidRequestError
from tune.data.faults import RowFault
from tune.data.rows import ChatRow, TextRow
from tune.data.served_form import joined_content, served_messages, served_tools

Tokenizer = Any
"""A fast Hugging Face tokenizer; transformers ships no types for it that mypy could follow."""


_REASONING_START, _REASONING_END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to train on."""

    token_ids: NDArray[np.int32]
    """[T]"""
    trained: NDArray[np.bool_]
    """[T]; whether the token is predicted from those before it. Never true at 0."""
    line: int
    """Of its row in the file."""

    @property
    def num_trained(self) -> int:
        return int(self.trained.sum())


@dataclass(frozen=True, slots=True)
class _Turn:
    """A trained assistant message, rendered."""

    index: int
    prompt: str
    text: str


class ChatEncoder:
    """Turns chat rows into examples with one tokenizer and its chat template.

    ``stop_ids`` are token ids that may end a turn: the tokenizer's special tokens and end-of-sequence ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InvalidRequestError(
                f"{type(tokenizer).__name__} gives no character offsets; the base needs a tokenizer.json"
            )
        if not tokenizer.chat_template:
            raise InvalidRequestError(
                "the base has no chat template, so chat rows cannot be rendered; add chat_template.jinja to it or "
                "train text rows (stage kind cpt)"
            )
        self._tokenizer = tokenizer
        special = {int(i): token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if tokenizer.eos_token_id is not None:
            special[int(tokenizer.eos_token_id)] = str(tokenizer.eos_token)
        self._stop_ids = frozenset(special)
        self._stop_tokens = tuple(sorted(special.values(), key=len, reverse=True))

    def encode(self, row: ChatRow) -> list[Example]:
        """One example, or one for each trained turn where a single one would differ from what serving sees.

        Raises:
            RowFault: the template refuses the row, leaves a part of it out, is not prefix-stable, or ends no turn.
        """
        turns = self._render_turns(row)
        _check_tools_are_rendered(row, turns)
        self._check_names_are_rendered(row, turns)
        if self._is_chain(turns):
            example = self._encode_chain(row, turns)
            if example is not None:
                return [example]
        return [self._encode_alone(row, turn) for turn in turns]

    def encode_answer(self, row: ChatRow) -> Example:
        """The last message behind the prompt's own ids, alone trained: one side of a preference row."""
        (turn,) = self._render_turns(row)
        _check_tools_are_rendered(row, [turn])
        self._check_names_are_rendered(row, [turn])
        return self._encode_alone(row, turn)

    def _render_turns(self, row: ChatRow) -> list[_Turn]:
        turns = []
        for index, message in enumerate(row.messages):
            if message["role"] != "assistant" or not row.trained[index]:
                continue
            try:
                prompt = self._render(row.messages[:index], row.tools, add_generation_prompt=True)
                text = self._render(row.messages[: index + 1], row.tools, add_generation_prompt=False)
            except (TemplateError, TypeError, ValueError) as error:
                reason = f"the chat template refuses messages[:{index + 1}]: {error}"
                raise _template_fault(row.line, reason) from error
            if not text.startswith(prompt):
                text = self._with_reasoning(row, index, prompt, text)
            if len(text) == len(prompt):
                raise _template_fault(row.line, f"the chat template renders nothing for messages[{index}]")
            if not prompt:
                reason = f"the chat template renders nothing before messages[{index}], so all tokens would be trained"
                raise _template_fault(row.line, reason)
            if message.get("reasoning", "").strip() not in text[len(prompt) :]:
                reason = (
                    f"the chat template does not render the reasoning of messages[{index}]; write it into the content, "
                    f"as {_REASONING_START}...{_REASONING_END} before the answer"
                )
                raise _template_fault(row.line, reason)
            if not any(token in text[len(prompt) :] for token in self._stop_tokens):
                text += self._closing(row, index, prompt)
            turns.append(_Turn(index, prompt, text))
        return turns

    @staticmethod
    def _with_reasoning(row: ChatRow, index: int, prompt: str, text: str) -> str:
        """The turn's text where the template cuts out of it the reasoning that its prompt opens."""
        content = joined_content(row.messages[index]["content"])
        shown = content.rpartition(_REASONING_END)[2].strip()
        opening = prompt[prompt.rfind(_REASONING_START) :] if _REASONING_START in prompt else ""
        if not opening or opening.strip() != _REASONING_START:
            raise _not_prefix_stable(row.line, index, prompt, text)
        if not content.startswith(_REASONING_START) or not shown or shown not in text:
            hint = (
                f"; the prompt opens the reasoning ({opening!r}), so begin the answer with its own: "
                f"{_REASONING_START}...{_REASONING_END}"
            )
            raise _not_prefix_stable(row.line, index, prompt, text, hint)
        ending = text[text.rindex(shown) + len(shown) :]
        return prompt + content.removeprefix(_REASONING_START).removeprefix(opening[len(_REASONING_START) :]) + ending

    def _closing(self, row: ChatRow, index: int, prompt: str) -> str:
        """The token that the template writes after this turn when its user or tool follows, if it is a special one.

        Not one that also opens the assistant's own turns: no engine stops at that.
        """
        following: dict[str, Any] = {"role": "user", "content": "x"}
        if index + 1 < len(row.messages) and row.messages[index + 1]["role"] in ("user", "tool"):
            following = row.messages[index + 1]
        given = row.messages[: index + 1]
        for turns in (given, [_with_short_answer(message) for message in given]):
            try:
                text = self._render(turns, row.tools, add_generation_prompt=False)
                longer = self._render([*turns, following], row.tools, add_generation_prompt=False)
            except (TemplateError, TypeError, ValueError):
                continue
            if longer.startswith(text):
                before = self._render(row.messages[:index], row.tools, add_generation_prompt=False)
                opening = self._token_at(prompt, len(before)) if prompt.startswith(before) else ""
                closing = self._token_at(longer, len(text))
                return closing if closing != opening else ""
        return ""

    def _token_at(self, text: str, position: int) -> str:
        """The special token that begins there; empty where none does."""
        return next((token for token in self._stop_tokens if text.startswith(token, position)), "")

    def _render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        offered = served_tools(tools)
        rendered = self._tokenizer.apply_chat_template(
            served_messages(messages, self._tokenizer.get_chat_template(tools=offered)),
            tools=offered,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return str(rendered)

    def _check_names_are_rendered(self, row: ChatRow, turns: Sequence[_Turn]) -> None:
        """Most templates know no names of messages, and serving refuses a message whose name the model would not see.

        It takes a tool's name that says which call is answered, as the call's id says so, too, and one that repeats the
        role, as some clients do.
        """
        messages = row.messages[: turns[-1].index + 1]
        roles = _roles_with_names(messages)
        if not roles:
            return
        text = self._render(messages, row.tools, add_generation_prompt=False)
        for role in roles:
            unnamed = [{k: v for k, v in m.items() if k != "name"} if m["role"] == role else m for m in messages]
            try:
                is_shown = self._render(unnamed, row.tools, add_generation_prompt=False) != text
            except (TemplateError, TypeError, ValueError):
                is_shown = True  # the template cannot do without it
            if not is_shown:
                reason = (
                    f"the chat template does not show the name of a message by {role!r}; leave the name out, or say it "
                    "in the content"
                )
                raise _template_fault(row.line, reason)

    @staticmethod
    def _is_chain(turns: Sequence[_Turn]) -> bool:
        """Whether each turn's text is a prefix of the next turn's prompt, so that one sequence holds all."""
        return all(later.prompt.startswith(turn.text) for turn, later in pairwise(turns))

    def _encode_chain(self, row: ChatRow, turns: Sequence[_Turn]) -> Example | None:
        """All turns in one sequence, or ``None`` where a prompt's ids are not a prefix of the whole."""
        text = turns[-1].text
        whole, *prompts = self._tokenize([text, *(turn.prompt for turn in turns)])
        ids, offsets = whole
        trained = np.zeros(len(ids), dtype=np.bool_)
        for turn, (prompt_ids, _) in zip(turns, prompts, strict=True):
            start = len(prompt_ids)
            if ids[:start] != prompt_ids:
                return None
            end = len(ids)
            if len(turn.text) < len(text):
                end = next((i for i in range(start, end) if offsets[i][0] >= len(turn.text)), end)
            trained[start : self._end_of_turn(ids, start, end, row.line, turn.index)] = True
        return _example(ids, trained, row.line)

    def _encode_alone(self, row: ChatRow, turn: _Turn) -> Example:
        """The prompt's own ids, then those of the answer: the border is exactly serving's."""
        (prompt_ids, _), (answer_ids, _) = self._tokenize([turn.prompt, turn.text[len(turn.prompt) :]])
        ids = prompt_ids + answer_ids
        trained = np.zeros(len(ids), dtype=np.bool_)
        trained[len(prompt_ids) : self._end_of_turn(ids, len(prompt_ids), len(ids), row.line, turn.index)] = True
        return _example(ids, trained, row.line)

    def _end_of_turn(self, ids: Sequence[int], start: int, end: int, line: int, index: int) -> int:
        """One past the last token in ``ids[start:end]`` that can end a turn."""
        for position in range(end - 1, start - 1, -1):
            if ids[position] in self._stop_ids:
                return position + 1
        reason = (
            f"the chat template writes no end-of-turn token after messages[{index}], so the model would never learn to "
            "stop; use a template that writes the tokenizer's eos token or another special token there"
        )
        raise _template_fault(line, reason)

    def _tokenize(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def encode_text(tokenizer: Tokenizer, row: TextRow, max_length: int) -> list[Example]:
    """A document as windows of at most ``max_length`` tokens that carry loss everywhere, ended by the eos token.

    Special tokens at the start follow the tokenizer's own rule for running text, as in ``/v1/completions``.
    """
    ids: list[int] = list(tokenizer(row.text, return_attention_mask=False, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is not None and (not ids or ids[-1] != eos):
        ids.append(int(eos))
    windows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [_example(window, np.ones(len(window), dtype=np.bool_), row.line) for window in windows if len(window) > 1]


def _example(ids: Sequence[int], trained: NDArray[np.bool_], line: int) -> Example:
    trained[0] = False  # nothing comes before it that could predict it
    return Example(np.asarray(ids, dtype=np.int32), trained, line)


def _check_tools_are_rendered(row: ChatRow, turns: Sequence[_Turn]) -> None:
    """Many templates know no tools and leave them out without a word; such a row would teach to invent calls."""
    offered = {tool["function"]["name"] for tool in row.tools or ()}
    called = {
        call["function"]["name"]
        for message in row.messages[: turns[-1].index + 1]
        for call in message.get("tool_calls", ())
    }
    for names, text, what in ((offered, turns[0].prompt, "tools"), (called, turns[-1].text, "tool_calls")):
        missing = sorted(name for name in names if name not in text)
        if missing:
            reason = f"the chat template does not render the {what} {missing}; use a base whose template knows tools"
            raise _template_fault(row.line, reason)


def _with_short_answer(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's message without reasoning, which many templates cut out once a question follows."""
    if message["role"] != "assistant":
        return message
    return {key: value for key, value in message.items() if key != "reasoning"} | {"content": "x"}


def _roles_with_names(messages: Sequence[dict[str, Any]]) -> list[str]:
    called: dict[str, str] = {}
    roles: dict[str, None] = {}
    for message in messages:
        called |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        role, name = message["role"], message.get("name")
        known = {role, called.get(message["tool_call_id"])} if role == "tool" else {role}
        if name and name not in known:
            roles[role] = None
    return list(roles)


def _template_fault(line: int, reason: str) -> RowFault:
    return RowFault(f"line {line}: {reason}", kind="chat_template", line=line, code="chat_template")


def _not_prefix_stable(line: int, index: int, prompt: str, text: str, hint: str = "") -> RowFault:
    same = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    reason = (
        f"the chat template is not prefix-stable: with its answer, messages[{index}] renders "
        f"{text[same : same + 30]!r} where the prompt alone has {prompt[same : same + 30]!r}; serving would send other "
        "text than training saw"
    )
    return _template_fault(line, reason + hint)
