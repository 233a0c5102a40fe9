"""Whether a chat template walks over the parts of a message's content, as vLLM 0.32 finds it out
(vllm/renderers/hf.py, ``_detect_content_format``; its format ``openai``).

Such a template is handed every content as a list of parts, even one that came as a text; any other template is handed
texts. The template is read, not rendered: a loop over the content of a message of the loop over ``messages``, over a
variable ``content``, or in a macro over the parameter that a content is passed for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser


class _Generation(Extension):
    """The tag ``{% generation %}`` that transformers adds to Jinja: here only what stands in it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to say it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _UnnamedTargetError(Exception):
    """Several names or an attribute are assigned at once. vLLM does not follow those."""


_ENVIRONMENT = Environment(extensions=[_Generation, loopcontrols], autoescape=False)  # noqa: S701 - nothing is rendered


@lru_cache(maxsize=32)
def walks_over_parts(template: str) -> bool:
    try:
        root = _ENVIRONMENT.parse(template)
        messages = [_named(loop.target) for loop in _loops_over(root, _aliases(root, "messages"))]
        return _has_loop_over_content(root, messages)
    except (TemplateSyntaxError, _UnnamedTargetError):
        return False


def _has_loop_over_content(root: nodes.Template, messages: list[str]) -> bool:
    parameters = _content_parameters(root, messages)
    for loop in root.find_all(nodes.For):
        if _reads_content(loop.iter, messages):
            return bool(_named(loop.target))
        name = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
        if id(loop) in parameters:
            if name in parameters[id(loop)]:
                return True
        elif name == "content":
            return bool(_named(loop.target))
    return False


def _content_parameters(root: nodes.Template, messages: list[str]) -> dict[int, set[str]]:
    """For each loop within a macro, by its ``id``, the macro's parameters that a content is passed for."""
    found: dict[int, set[str]] = {}
    for macro in root.find_all(nodes.Macro):
        names = [argument.name for argument in macro.args]
        parameters: set[str] = set()
        for call in root.find_all(nodes.Call):
            if not isinstance(call.node, nodes.Name) or call.node.name != macro.name:
                continue
            passed = [*zip(names, call.args, strict=False), *((each.key, each.value) for each in call.kwargs)]
            parameters |= {name for name, value in passed if name in names and _reads_content(value, messages)}
        for loop in macro.find_all(nodes.For):
            found.setdefault(id(loop), set()).update(parameters)
    return found


def _aliases(root: nodes.Template, name: str) -> list[str]:
    """``name`` and the variables that it is assigned to, whole or in part."""
    names = [name]
    for known in names:  # grows while it is walked
        for assignment in root.find_all(nodes.Assign):
            if _reads(assignment.node, known) and (target := _named(assignment.target)) not in names:
                names.append(target)
    return names


def _loops_over(root: nodes.Template, names: Iterable[str]) -> Iterator[nodes.For]:
    return (loop for loop in root.find_all(nodes.For) if any(_reads(loop.iter, name) for name in names))


def _reads_content(node: nodes.Node, messages: list[str]) -> bool:
    node = _without_filters(node)
    if isinstance(node, nodes.Getattr):
        key: object = node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        key = node.arg.value
    else:
        return False
    return key == "content" and any(_is_variable(node.node, message) for message in messages)


def _reads(node: nodes.Node, name: str) -> bool:
    return _is_variable(_without_filters(node), name)


def _without_filters(node: nodes.Node) -> nodes.Node:
    """What filters, tests and slices are applied to."""
    while isinstance(node, nodes.Filter | nodes.Test | nodes.Getitem):
        is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        if node.node is None or (isinstance(node, nodes.Getitem) and not is_slice):
            break
        node = node.node
    return node


def _is_variable(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _named(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _UnnamedTargetError
    return target.name
