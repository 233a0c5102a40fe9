"""A conversation with litellm, in litellm's own environment. Takes the service's URL, prints what it saw as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
HELLO = {"role": "user", "content": "Who are you?"}


def ask(**options: Any) -> Any:
    fields = {"model": "openai/capo-tiny", "messages": [HELLO], "temperature": 0, "max_tokens": 32, **options}
    return litellm.completion(api_base=f"{sys.argv[1]}/v1", api_key="none", num_retries=0, **fields)


def main() -> None:
    litellm.telemetry = False
    seen: dict[str, Any] = {"text": ask().choices[0].message.content}
    seen["streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True))
    called = ask(tools=[WEATHER], tool_choice="required").choices[0]
    (call,) = called.message.tool_calls
    seen["tool"] = {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
    result = {"role": "tool", "tool_call_id": call.id, "content": "It is sunny."}
    after = ask(messages=[HELLO, called.message.model_dump(exclude_none=True), result], tools=[WEATHER])
    seen["after_tool"] = after.choices[0].finish_reason
    chunks = list(ask(tools=[WEATHER], tool_choice="required", stream=True))
    whole = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0].function
    seen["streamed_tool"] = {"name": whole.name, "arguments": json.loads(whole.arguments)}
    long = [{"role": "user", "content": "Who are you? " * 3_000}]
    wrong = {
        "unknown_model": {"model": "openai/nope"},
        "bad_request": {"temperature": -1},
        "long_prompt": {"messages": long},
    }
    for name, options in wrong.items():
        try:
            ask(**options)
        except Exception as error:
            seen[name] = type(error).__name__
    print(json.dumps(seen))


main()
