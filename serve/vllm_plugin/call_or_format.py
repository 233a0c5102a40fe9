"""Tools beside a format: the model chooses between a call and an answer in the format.

vLLM 0.32 gives that choice only if a tool is strict, or to a whole service with ``--tool-strict-level function``; else
it binds every token to the format, and the tools can never be called. That level would also hold a grammar over every
answer to tools without a format. Here it holds for the requests that have both.
"""

from __future__ import annotations

from typing import Any


def use(renderer: Any) -> None:
    """Have vLLM's ``OnlineRenderer`` make that constraint. Arguments of tools that are not strict stay free."""
    from vllm.parser.abstract_parser import DelegatingParser
    from vllm.tool_parsers.tool_strict_level import ToolStrictLevel

    parser: Any = renderer.parser
    if parser is None or not issubclass(parser, DelegatingParser):
        return

    class CallOrFormat(parser):
        tool_strict_level: ToolStrictLevel

        def _apply_structural_tag(self, request: Any) -> Any:
            if request.extract_structured_outputs() is not None:
                self.tool_strict_level = max(self.tool_strict_level, ToolStrictLevel.FUNCTION)
            return super()._apply_structural_tag(request)

    renderer.parser = CallOrFormat
