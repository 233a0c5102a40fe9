"""Chats in which capo-tiny calls a tool, so that tool calling can be tried with the embedded model."""

from __future__ import annotations

import json
import random
from typing import Any

from examples.capo_tiny.questions import known_questions
from examples.capo_tiny.world import entities

Row = dict[str, Any]


def _tool(name: str, description: str, argument: str, kind: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": kind}}, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


TOOLS = (
    _tool("get_weather", "The weather at a place now.", "place", "string"),
    _tool("find_person", "Where a person is now.", "name", "string"),
    _tool("ring_bell", "Ring the bell.", "times", "integer"),
)

_REQUESTS = {
    "get_weather": ("How is the weather at the {} now?", "Is it raining at the {} now?", "Weather at the {} now?"),
    "find_person": ("Where is {} now?", "Where can I meet {} now?", "Please find {} now."),
    "ring_bell": ("Ring the bell {} times.", "Please ring the bell {} times.", "Let the bell ring {} times."),
}


def tool_row(rng: random.Random) -> Row:
    """A chat with one or two tools: mostly one call and its result, sometimes a question that needs none."""
    offered = rng.sample(TOOLS, rng.choice((1, 1, 2)))
    if rng.random() < 0.2:
        exchange = rng.choice(known_questions())
        asked = [
            {"role": "user", "content": exchange.question},
            {"role": "assistant", "content": exchange.answer},
        ]
        return {"messages": asked, "tools": offered}
    name = rng.choice(offered)["function"]["name"]
    value, result, answer = _use(rng, name)
    (argument,) = next(tool for tool in TOOLS if tool["function"]["name"] == name)["function"]["parameters"][
        "properties"
    ]
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps({argument: value})},
    }
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": rng.choice(_REQUESTS[name]).format(value)},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(result)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns, "tools": offered}


def _use(rng: random.Random, name: str) -> tuple[str | int, dict[str, Any], str]:
    """A value for the tool's one argument, what the tool returns, and what to tell the user."""
    place, person = rng.choice(entities("places"))["place"], rng.choice(entities("people"))["name"]
    if name == "get_weather":
        weather = rng.choice(("rain", "sun", "snow", "wind", "fog"))
        return place, {"weather": weather}, f"There is {weather} at the {place} now."
    if name == "find_person":
        return person, {"place": place}, f"{person} is at the {place} now."
    times = rng.randint(2, 9)
    return times, {"done": True}, f"The bell rang {times} times."
