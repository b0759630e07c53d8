"""A `Report` as one self-contained HTML page: tables, figures and notes, without a request to anywhere.

Needs jinja2 and matplotlib, which come with the extra `report`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from ensemble.judge import plots
from ensemble.judge.metrics import METRICS, get_metric
from ensemble.judge.report import Report

try:
    import jinja2
except ImportError as error:
    msg = "expected jinja2 for pages, found none; install it with: pip install 'zoo-ensemble[report]'"
    raise ImportError(msg) from error

_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_MOST_PAIRS = 100

_Style = tuple[float, str]  # a number is multiplied by the first, and formatted by the second
_TEXT, _PERCENT, _POINTS, _NUMBER, _WHOLE = (0, ""), (100, ".2f"), (100, "+.2f"), (1, ".4f"), (1, ",.0f")
_COLUMNS: dict[str, tuple[str, _Style]] = {  # column of a report's table -> heading, style of its cells
    "calibration_error": ("calibration error %", _PERCENT),
    "parameters": ("parameters", _WHOLE),
    "bytes": ("bytes", _WHOLE),
    "microseconds": ("\u00b5s per frame", (1, ".2f")),
    "memory": ("memory", _WHOLE),
    "gain": ("gain", _POINTS),
    "gain_low": ("from", _POINTS),
    "gain_high": ("to", _POINTS),
    "mean_gain": ("over mean", _POINTS),
    "mean_gain_low": ("from", _POINTS),
    "mean_gain_high": ("to", _POINTS),
    "fitted_here": ("fitted here", _TEXT),
    "fitted_on_training": ("fitted on training frames", _TEXT),
    "optimism": ("optimism nats", _NUMBER),
    "optimism_accuracy": ("optimism", _POINTS),
    "frames": ("frames", _WHOLE),
    "baseline_accuracy": ("single %", _PERCENT),
    "rule_accuracy": ("rule %", _PERCENT),
    "oracle": ("some member %", _PERCENT),
    "confused_with": ("taken for", _TEXT),
    "confused_share": ("share %", _PERCENT),
    "trust": ("best member", _TEXT),
    "trust_f1": ("its F1 %", _PERCENT),
    "taken_for": ("taken for", _TEXT),
    "share": ("share %", _PERCENT),
    "baseline_share": ("single %", _PERCENT),
    "first": ("first", _TEXT),
    "second": ("second", _TEXT),
    "disagreement": ("disagreement %", _PERCENT),
    "double_fault": ("both wrong %", _PERCENT),
    "q_statistic": ("Q", _NUMBER),
}
_HIDDEN = {"abstained", "loss_gain", "loss_gain_low", "loss_gain_high"}


def page(report: Report, *, title: str = "Is the ensemble better?") -> str:
    """The report of `evaluate` as HTML text, one file that needs nothing else."""
    figures = ["reliability", "classes"] if report.frames else []
    figures += ["gains"] if report.frames and len(report.rules) else []
    figures += ["disagreement"] if report.frames and len(report.pairs) else []
    farthest = report.pairs.sort_values("disagreement", ascending=False).head(_MOST_PAIRS)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        report=report,
        conclusion=report.conclusion,
        amount=get_metric(report.metric).amount,
        tables={
            "rules": _table(report.rules, gain=_gain(get_metric(report.metric).unit)),
            "members": _table(report.members),
            "classes": _table(report.classes, first="class"),
            "confusions": _table(report.confusions, first="class"),
            "pairs": _table(farthest),
        },
        pairs_left_out=len(report.pairs) - len(farthest),
        figures={name: plots.svg(report.figure(name)) for name in figures},
    )
    return text.lstrip()


def _gain(unit: str) -> _Style:
    """The style of gains in a metric of this unit."""
    return _POINTS if unit == "%" else (1, "+.4f")


def _table(table: pd.DataFrame, *, first: str = "name", gain: _Style = _POINTS) -> dict[str, Any]:
    """Headings and rows of text, each with whether it is a number. `first` is the heading of the column `name`."""
    columns = _COLUMNS | {"name": (first, _TEXT)}
    for name, metric in METRICS.items():
        columns[name] = (f"{metric.title} {metric.unit}".strip(), _PERCENT if metric.unit == "%" else _NUMBER)
    for name in [name for name in columns if name.removeprefix("mean_") in ("gain", "gain_low", "gain_high")]:
        columns[name] = (columns[name][0], gain)
    measured = {"bytes", "microseconds", "memory"}
    empty = {name for name in measured.intersection(table.columns) if table[name].isna().all()}
    shown = [str(name) for name in table.columns if name not in _HIDDEN | empty]
    styled = [columns.get(name, (name.replace("_", " "), _NUMBER)) for name in shown]
    rows = [
        [(_cell(value, style), style is not _TEXT) for value, (_, style) in zip(row, styled, strict=True)]
        for row in table[shown].to_numpy(object)
    ]
    return {"heads": [(head, style is not _TEXT) for head, style in styled], "rows": rows}


def _cell(value: Any, style: _Style) -> str:
    """Empty where the value is missing or False."""
    if pd.isna(value) or value is False:
        return ""
    scale, form = style
    return "yes" if value is True else format(scale * value, form) if form else str(value)
