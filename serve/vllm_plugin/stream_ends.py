"""The end of a streamed answer that may hold calls of tools.

vLLM 0.32's parsers hold text back that may become a call: ``<`` where calls begin with ``<tool_call>``, and all that
stands behind such a beginning. Where the answer ends and it was none, they keep it, and a stream lacks what the whole
answer has. Its newer parsers (``engine_based_streaming``) hand it out themselves.
"""

from __future__ import annotations

from typing import Any


def use(manager: Any) -> None:
    """Have vLLM's ``ParserManager`` give parsers that hand out at the end what is left."""
    from vllm.parser.abstract_parser import DelegatingParser

    get_parser = manager.get_parser

    def get_whole_parser(*args: Any, **options: Any) -> Any:
        parser = get_parser(*args, **options)
        # Parsers of their own kind end streams in a way of their own.
        is_of_parts = getattr(parser, "parse_delta", None) is DelegatingParser.parse_delta
        tools = parser.tool_parser_cls if is_of_parts else None
        return parser if tools is None or tools.engine_based_streaming else _whole(parser)

    manager.get_parser = get_whole_parser


def _whole(parser: Any) -> Any:
    """A subclass of it, of which one object reads one stream."""
    from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaMessage, DeltaToolCall

    class WholeStreams(parser):
        _read = ""
        """All text in which calls were looked for."""
        _sent = ""
        """What of it was handed out as text."""
        _has_called = False

        def extract_tool_calls_streaming(
            self, previous_text: str, current_text: str, *others: Any, **named: Any
        ) -> DeltaMessage | None:
            delta: DeltaMessage | None = super().extract_tool_calls_streaming(
                previous_text, current_text, *others, **named
            )
            self._read = current_text
            if delta is not None:
                self._sent += delta.content or ""
                self._has_called |= bool(delta.tool_calls)
            return delta

        def parse_delta(self, *args: Any, request: Any, finished: bool, **named: Any) -> DeltaMessage | None:
            delta: DeltaMessage | None = super().parse_delta(*args, request=request, finished=finished, **named)
            if not finished or self._has_called or self._sent == self._read:
                return delta
            # Another object, as the one that has read the stream keeps what it has read of it.
            found = self.tool_parser_cls(self.model_tokenizer, request.tools).extract_tool_calls(self._read, request)
            text = (found.content or "") if found.tools_called else self._read
            delta = delta or DeltaMessage()
            if text.startswith(self._sent) and text != self._sent:
                delta.content = (delta.content or "") + text[len(self._sent) :]
            if found.tools_called:
                delta.tool_calls = [
                    DeltaToolCall(
                        index=index,
                        id=call.id,
                        type="function",
                        function=DeltaFunctionCall(name=call.function.name, arguments=call.function.arguments),
                    )
                    for index, call in enumerate(found.tool_calls)
                ]
            return delta if delta.content or delta.tool_calls or delta.reasoning else None

    return WholeStreams
