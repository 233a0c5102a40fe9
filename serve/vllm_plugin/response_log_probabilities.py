"""Log probabilities in streams of /v1/responses.

vLLM 0.32 passes over what the engine hands out without text (a piece of a letter, what may be the beginning of a stop
text or of a call, the token that ends an answer), and with it over the log probabilities of its tokens. Here they come
with the next text, and those behind the last text in an event of their own.
"""

from __future__ import annotations

from typing import Any


def use(serving: Any) -> None:
    """Have vLLM's module ``entrypoints.openai.responses.serving`` keep them."""
    from vllm.entrypoints.generate.base.protocol import DeltaMessage
    from vllm.entrypoints.openai.responses.streaming_events import _StateType

    class Context(serving.SimpleContext):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._untold: list[Any] = []

        def append_output(self, output: Any) -> None:
            super().append_output(output)
            (made,) = output.outputs
            if made.logprobs is not None:
                self._untold.append(made)
                made.untold = self._untold

    class Processor(serving.SimpleStreamingEventProcessor):
        _last_text: tuple[Any, Any] | None = None
        """The output that the last text came with, and vLLM's function for the log probabilities of one."""

        def resolve_target_state(self, delta_message: DeltaMessage) -> tuple[Any, Any]:
            state, call = super().resolve_target_state(delta_message)
            if self._last_text is not None and state not in (_StateType.CONTENT, _StateType.NONE):
                _take_untold(self._last_text[0])  # of a call or of reasoning, which have none
            return state, call

        def emit_delta(self, delta_message: DeltaMessage, output: Any, get_logprobs: Any = None) -> list[Any]:
            untold = _take_untold(output)
            if self.state.current_state is _StateType.CONTENT:
                self._last_text = output, get_logprobs

            def logprobs_of_all(_: Any) -> list[Any]:
                return [each for made in untold for each in get_logprobs(made)]

            events: list[Any] = super().emit_delta(delta_message, output, logprobs_of_all)
            return events

        def close_current(self) -> list[Any]:
            events: list[Any] = []
            if self.state.current_state is _StateType.CONTENT and self._last_text is not None:
                output, get_logprobs = self._last_text
                if any(map(get_logprobs, getattr(output, "untold", ()))):
                    events = self.emit_delta(DeltaMessage(content=""), output, get_logprobs)
            return [*events, *super().close_current()]

    serving.SimpleContext, serving.SimpleStreamingEventProcessor = Context, Processor


def _take_untold(output: Any) -> list[Any]:
    """The outputs since the last text, ``output`` included; none where no log probabilities are asked for."""
    untold: list[Any] = getattr(output, "untold", [])
    taken = untold.copy()
    untold.clear()
    return taken
