"""A `Report` as one self-contained HTML page: tables, figures and notes, without a request to anywhere.

Needs jinja2 and matplotlib, which come with the extra `report`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from ensemble.judge import plots
from ensemble.judge.report import Report

try:
    import jinja2
except ImportError as error:
    msg = "expected jinja2 for pages, found none; install it with: pip install 'zoo-ensemble[report]'"
    raise ImportError(msg) from error

_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_MOST_PAIRS = 100


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _whole(value: float) -> str:
    return f"{int(value):,}"


def _mark(value: bool) -> str:
    return "yes" if value else ""


_COLUMNS: dict[
    str, tuple[str, Callable[[Any], str]]
] = {  # column of a report's table: its heading, how to write a cell
    "name": ("name", str),
    "accuracy": ("accuracy %", _percent),
    "log_loss": ("log-loss nats", _number),
    "calibration_error": ("calibration error %", _percent),
    "macro_f1": ("macro F1 %", _percent),
    "parameters": ("parameters", _whole),
    "gain": ("gain", _points),
    "gain_low": ("from", _points),
    "gain_high": ("to", _points),
    "mean_gain": ("over mean", _points),
    "mean_gain_low": ("from", _points),
    "mean_gain_high": ("to", _points),
    "fitted_here": ("fitted here", _mark),
    "fitted_on_training": ("fitted on training frames", _mark),
    "optimism": ("optimism nats", _number),
    "optimism_accuracy": ("optimism", _points),
    "frames": ("frames", _whole),
    "baseline_accuracy": ("single %", _percent),
    "rule_accuracy": ("rule %", _percent),
    "oracle": ("some member %", _percent),
    "confused_with": ("taken for", str),
    "confused_share": ("share %", _percent),
    "trust": ("best member", str),
    "trust_f1": ("its F1 %", _percent),
    "taken_for": ("taken for", str),
    "share": ("share %", _percent),
    "baseline_share": ("single %", _percent),
    "first": ("first", str),
    "second": ("second", str),
    "disagreement": ("disagreement %", _percent),
    "double_fault": ("both wrong %", _percent),
    "q_statistic": ("Q", _number),
}
_HIDDEN = {"abstained", "loss_gain", "loss_gain_low", "loss_gain_high"}


def page(report: Report, *, title: str = "Is the ensemble better?") -> str:
    """The report as HTML text, one file that needs nothing else.

    Args:
        report: from `evaluate`.
        title: of the page.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    closest = report.pairs.sort_values("disagreement", ascending=False).head(_MOST_PAIRS)
    text = template.render(
        title=title,
        report=report,
        conclusion=conclusion(report),
        tables={
            "rules": _table(report.rules),
            "members": _table(report.members),
            "classes": _table(report.classes, first="class"),
            "confusions": _table(report.confusions, first="class"),
            "pairs": _table(closest),
        },
        pairs_left_out=len(report.pairs) - len(closest),
        figures={name: plots.svg(draw(report)) for name, draw in _figures(report).items()},
    )
    return text.lstrip()


def conclusion(report: Report) -> str:
    """One sentence: whether these frames show that the best rule is better than the best single member."""
    if report.best is None or not report.frames:
        return "No rule was judged, or there were no frames to judge it on."
    row = next(row for row in report.rules.to_dict("records") if row["name"] == report.best)
    gain, low, high = (_points(row[column]) for column in ("gain", "gain_low", "gain_high"))
    interval = f"95 % interval from {low} to {high}"
    if report.recordings < 2:
        interval = "no interval, because there is only one recording"
    best = f"{report.best}, the best of {len(report.rules)} rules here," if len(report.rules) > 1 else report.best
    comparison = f"{best} against {report.baseline}: {gain} points of accuracy, {interval}"
    if row["gain_low"] > 0:
        return f"Better. {comparison}."
    return f"Worse. {comparison}." if row["gain_high"] < 0 else f"Not shown to be better. {comparison}."


def _figures(report: Report) -> dict[str, Callable[[Report], Any]]:
    """Name -> function, of the figures for which there is something to draw."""
    wanted: dict[str, Callable[[Report], Any]] = {}
    if report.frames:
        wanted = {"reliability": plots.reliability, "classes": plots.classes}
        wanted |= {"gains": plots.gains} if len(report.rules) else {}
        wanted |= {"disagreement": plots.disagreement} if len(report.pairs) else {}
    return wanted


def _table(table: pd.DataFrame, *, first: str = "name") -> dict[str, Any]:
    """Headings and rows of text; a missing value is an empty cell. `first` is the heading of the column `name`."""
    shown = [str(name) for name in table.columns if name not in _HIDDEN]
    columns = {name: _COLUMNS.get(name, (name.replace("_", " "), _number)) for name in shown}
    writers = [write for _, write in columns.values()]
    rows = [
        [
            ("", False) if pd.isna(value) else (write(value), write is not str)
            for value, write in zip(row, writers, strict=True)
        ]
        for row in table[shown].to_numpy(object)
    ]
    heads = [(first if name == "name" else head, write is not str) for name, (head, write) in columns.items()]
    return {"heads": heads, "rows": rows}
