"""``promote_if``: one small expression over figures that decides whether an alias moves to the new artifact.

    exact_match > base + 0.05
    loss < base and general_loss < base.general_loss * 1.1
    benchmarks.arc_easy.acc >= 0.6

A metric's name means the tuned model's figure (``tuned.loss`` says so aloud), ``base.loss`` the base's, and a bare
``base`` in a comparison the base's figure of the one metric that the comparison names. Allowed are numbers,
``+ - * /``, comparisons, ``and``, ``or``, ``not`` and brackets. The text is parsed with :mod:`ast` and walked here; it
is never run.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from registry.errors import InvalidRequestError
from tune.evaluation.settings import GENERAL_METRICS, METRICS, Evaluation, benchmark_metric

MAX_LENGTH = 500

_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}
_SIDES = ("base", "tuned")


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to promote, and every figure that the expression looked at."""

    expression: str
    is_promoted: bool
    figures: dict[str, float]
    """By ``base.<metric>`` and ``tuned.<metric>``."""

    def sentence(self) -> str:
        seen = ", ".join(f"{name} = {value:.4g}" for name, value in sorted(self.figures.items()))
        verdict = "holds" if self.is_promoted else "does not hold"
        return f"promote_if {self.expression!r} {verdict} ({seen})"


def check_promotion(expression: str, evaluation: Evaluation | None) -> None:
    """Whether a recipe's ``promote_if`` can be decided once its evaluation is done.

    Raises:
        ValueError: it cannot; for a recipe's validator.
    """
    try:
        promotion = Promotion(expression)
        if evaluation is None:
            raise _refused(expression, "it needs figures, and evaluation is not set; add evaluation: {}")
        known = [*METRICS, *(GENERAL_METRICS if evaluation.general is not None else ())]
        families = [benchmark_metric(benchmark.task, "") for benchmark in evaluation.benchmarks]
        promotion.check(known, families=families)
    except InvalidRequestError as error:
        raise ValueError(error.message) from error


class Promotion:
    """A checked expression."""

    def __init__(self, expression: str) -> None:
        """
        Raises:
            InvalidRequestError: it is no expression of the small language; the message shows the part.
        """
        self.expression = expression
        if len(expression) > MAX_LENGTH:
            raise _refused(expression[:40] + "...", f"it has {len(expression)} characters, at most {MAX_LENGTH}")
        try:
            self._tree = ast.parse(expression.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise _refused(expression, f"it is no expression ({error})") from error
        self._check_truth(self._tree)

    @property
    def metrics(self) -> frozenset[str]:
        """The metrics that it names."""
        return frozenset(_metric(node) for node in _names(self._tree) if _metric(node))

    def check(self, known: Collection[str], *, families: Collection[str] = ()) -> None:
        """Refuse metrics that will not be measured. ``families`` are prefixes under which any name may come.

        Raises:
            InvalidRequestError: naming the first one, and what there is.
        """
        for metric in sorted(self.metrics):
            if metric not in known and not any(metric.startswith(family) for family in families):
                allowed = ", ".join([*sorted(known), *(f"{family}<metric>" for family in sorted(families))])
                raise _refused(self.expression, f"{metric!r} is not measured; there are {allowed}")

    def decide(self, *, base: Mapping[str, float], tuned: Mapping[str, float]) -> Decision:
        """
        Raises:
            InvalidRequestError: a metric was not measured after all, or something is divided by zero.
        """
        seen: dict[str, float] = {}
        figures = {"base": base, "tuned": tuned}

        def look_up(side: str, metric: str) -> float:
            if metric not in figures[side]:
                raise _refused(self.expression, f"{side}.{metric} was not measured")
            seen[f"{side}.{metric}"] = figures[side][metric]
            return figures[side][metric]

        try:
            is_promoted = _truth(self._tree, look_up)
        except ZeroDivisionError as error:
            raise _refused(self.expression, "it divides by zero") from error
        return Decision(self.expression, is_promoted, seen)

    def _check_truth(self, node: ast.expr) -> None:
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self._check_truth(value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._check_truth(node.operand)
        elif isinstance(node, ast.Compare):
            if not all(type(op) in _COMPARISONS for op in node.ops):
                raise _refused(self.expression, f"{ast.unparse(node)!r} compares with something else than > >= < <=")
            for part in (node.left, *node.comparators):
                self._check_number(part)
            named = {_metric(name) for name in _names(node)}
            if "" in named and len(named) != 2:
                reason = f"'base' in {ast.unparse(node)!r} needs exactly one metric beside it; write base.<metric>"
                raise _refused(self.expression, reason)
        else:
            raise _refused(self.expression, f"{ast.unparse(node)!r} is not a comparison, such as loss < base")

    def _check_number(self, node: ast.expr) -> None:
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            self._check_number(node.left)
            self._check_number(node.right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            self._check_number(node.operand)
        elif isinstance(node, ast.Constant):
            is_number = isinstance(node.value, int | float) and not isinstance(node.value, bool)
            if not (is_number and math.isfinite(float(str(node.value)))):
                raise _refused(self.expression, f"{ast.unparse(node)!r} is not a number")
        elif not _is_name(node):
            raise _refused(self.expression, f"{ast.unparse(node)!r} is no number, metric or arithmetic of them")


_LookUp = Callable[[str, str], float]


def _truth(node: ast.expr, look_up: _LookUp) -> bool:
    if isinstance(node, ast.BoolOp):
        values = [_truth(value, look_up) for value in node.values]  # all of them, so that all figures are told
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.UnaryOp):
        return not _truth(node.operand, look_up)
    assert isinstance(node, ast.Compare), ast.dump(node)
    named = next((metric for metric in map(_metric, _names(node)) if metric), "")
    numbers = [_number(part, named, look_up) for part in (node.left, *node.comparators)]
    return all(
        _COMPARISONS[type(op)](left, right) for op, left, right in zip(node.ops, numbers, numbers[1:], strict=False)
    )


def _number(node: ast.expr, named: str, look_up: _LookUp) -> float:
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left, named, look_up), _number(node.right, named, look_up)
        return _ARITHMETIC[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp):
        return -_number(node.operand, named, look_up)
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int | float), ast.dump(node)
        return float(node.value)
    side = _dotted(node).partition(".")[0]
    return look_up("base" if side == "base" else "tuned", _metric(node) or named)


def _names(node: ast.AST) -> list[ast.expr]:
    """The outermost names below ``node``: ``base.loss`` once, and not its ``base`` again."""
    if isinstance(node, ast.expr) and _is_name(node):
        return [node]
    return [name for child in ast.iter_child_nodes(node) for name in _names(child)]


def _is_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_name(node.value))


def _dotted(node: ast.expr) -> str:
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else str(getattr(node, "id", ""))


def _metric(node: ast.expr) -> str:
    """The metric that a name means; empty for a bare ``base`` or ``tuned``."""
    side, _, rest = _dotted(node).partition(".")
    return rest if side in _SIDES else _dotted(node)


def _refused(expression: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"promote_if {expression!r}: {reason}. An example: exact_match > base + 0.05", param="promote_if"
    )
