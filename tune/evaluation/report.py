"""The evaluation as two files of an artifact: ``report.json`` for programs, ``report.html`` for people.

The page needs nothing beside itself: no script, no font, no address. Everything in it that came from data or a model
is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from tune.evaluation.comparison import SideBySide
from tune.evaluation.curves import CurvePoint
from tune.evaluation.promotion import Decision

JSON_NAME, HTML_NAME = "report.json", "report.html"
FORMAT = "capo-report"
VERSION = 1
_SHOWN_ANSWERS = 50
_WIDTH, _HEIGHT, _MARGIN = 720, 240, 44
_COLOURS = {"train": "#2563eb", "valid": "#d97706"}


@dataclass(frozen=True, slots=True)
class Report:
    title: str
    base: str
    rows: str
    """What was judged, one sentence."""
    figures: Mapping[str, Mapping[str, float]]
    """By column (``base``, ``tuned``; of an export ``verification``), then by metric."""
    answers: Sequence[SideBySide] = ()
    curve: Sequence[CurvePoint] = ()
    decision: Decision | None = None
    notes: Sequence[str] = ()

    def write(self, directory: Path) -> None:
        (directory / JSON_NAME).write_text(self.as_json(), encoding="utf-8")
        (directory / HTML_NAME).write_text(self.as_html(), encoding="utf-8")

    def as_json(self) -> str:
        document = {
            "format": FORMAT,
            "version": VERSION,
            "title": self.title,
            "base": self.base,
            "rows": self.rows,
            "figures": {column: dict(values) for column, values in self.figures.items()},
            "promotion": asdict(self.decision) if self.decision is not None else None,
            "notes": list(self.notes),
            "answers": [
                asdict(one) | {"is_base_right": one.is_base_right, "is_tuned_right": one.is_tuned_right}
                for one in self.answers
            ],
            "curve": [asdict(point) for point in self.curve],
        }
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    def as_html(self) -> str:
        parts = [
            f"<h1>{escape(self.title)}</h1>",
            f"<p>Base: {escape(self.base)}. {escape(self.rows)}</p>",
            *(f"<p>{escape(note)}</p>" for note in self.notes),
            _decision_html(self.decision),
            _figures_html(self.figures),
            _curves_html(self.curve),
            _answers_html(self.answers),
        ]
        return _PAGE.format(title=escape(self.title), body="\n".join(part for part in parts if part))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #111827 }}
table {{ border-collapse: collapse; margin: 1rem 0; width: 100% }}
th, td {{ border-bottom: 1px solid #e5e7eb; padding: .3rem .6rem; text-align: left; vertical-align: top }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
td.text {{ white-space: pre-wrap; overflow-wrap: anywhere }}
.right {{ background: #ecfdf5 }} .wrong {{ background: #fef2f2 }}
text {{ font-size: 11px; fill: #4b5563 }}
</style></head><body>
{body}
</body></html>
"""


def _decision_html(decision: Decision | None) -> str:
    if decision is None:
        return ""
    kind = "right" if decision.is_promoted else "wrong"
    return f'<p class="{kind}">{escape(decision.sentence())}</p>'


def _figures_html(figures: Mapping[str, Mapping[str, float]]) -> str:
    metrics = list(dict.fromkeys(metric for values in figures.values() for metric in values))
    head = "".join(f"<th>{escape(column)}</th>" for column in figures)
    rows = [
        f"<tr><td>{escape(metric)}</td>"
        + "".join(f'<td class="number">{_shown(values.get(metric))}</td>' for values in figures.values())
        + "</tr>"
        for metric in metrics
    ]
    return f"<h2>Figures</h2><table><tr><th>metric</th>{head}</tr>{''.join(rows)}</table>"


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _curves_html(curve: Sequence[CurvePoint]) -> str:
    stages = dict.fromkeys(point.stage for point in curve)
    charts = [_chart(stage, [point for point in curve if point.stage == stage]) for stage in stages]
    return "<h2>Loss</h2>" + "".join(charts) if charts else ""


def _chart(stage: str, points: Sequence[CurvePoint]) -> str:
    lines = {
        "train": [(point.step, point.train_loss) for point in points],
        "valid": [(point.step, point.valid_loss) for point in points if point.valid_loss is not None],
    }
    values = [loss for line in lines.values() for _, loss in line]
    low, high = min(values), max(values)
    first, last = points[0].step, points[-1].step

    def place(step: int, loss: float) -> tuple[float, float]:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * (step - first) / max(1, last - first)
        y = _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (loss - low) / ((high - low) or 1.0)
        return round(x, 1), round(y, 1)

    drawn = []
    for name, line in lines.items():
        places = [place(step, loss) for step, loss in line]
        path = " ".join(f"{x},{y}" for x, y in places)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{_COLOURS[name]}" stroke-width="1.5"/>')
        drawn += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{_COLOURS[name]}"/>' for x, y in places if name == "valid"]
    labels = [
        (_MARGIN, _HEIGHT - 14, f"step {first}"),
        (_WIDTH - _MARGIN - 40, _HEIGHT - 14, f"step {last}"),
        (4, _MARGIN, f"{high:.3f}"),
        (4, _HEIGHT - _MARGIN, f"{low:.3f}"),
        (_MARGIN, 16, f"stage {stage}: loss in nats, training blue, validation orange"),
    ]
    texts = "".join(f'<text x="{x}" y="{y}">{escape(text)}</text>' for x, y, text in labels)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}">{"".join(drawn)}{texts}</svg>'


def _answers_html(answers: Sequence[SideBySide]) -> str:
    if not answers:
        return ""
    rows = [
        f'<tr><td class="text">{escape(one.prompt)}</td><td class="text">{escape(one.expected)}</td>'
        f"{_answer_cell(one.base, one.is_base_right)}{_answer_cell(one.tuned, one.is_tuned_right)}</tr>"
        for one in answers[:_SHOWN_ANSWERS]
    ]
    left_out = len(answers) - len(rows)
    more = f"<p>{left_out} more are in {JSON_NAME}.</p>" if left_out > 0 else ""
    head = "<tr><th>prompt</th><th>expected</th><th>base</th><th>tuned</th></tr>"
    return f"<h2>Answers</h2><table>{head}{''.join(rows)}</table>{more}"


def _answer_cell(text: str, is_right: bool) -> str:
    return f'<td class="text {"right" if is_right else "wrong"}">{escape(text)}</td>'
