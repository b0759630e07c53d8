"""A `Report` as one self-contained page: tables, figures and what to keep in mind; no request to anywhere.

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


def _nats(value: float) -> str:
    return f"{value:.4f}"


def _whole(value: float) -> str:
    return f"{int(value):,}"


def _mark(value: bool) -> str:
    return "yes" if value else ""


_Column = tuple[str, str, Callable[[Any], str]]  # the table's name, the page's, how to write a cell
_SCORES: list[_Column] = [
    ("name", "name", str),
    ("accuracy", "accuracy %", _percent),
    ("log_loss", "log-loss nats", _nats),
    ("calibration_error", "calibration error %", _percent),
    ("macro_f1", "macro F1 %", _percent),
    ("parameters", "parameters", _whole),
]
_GAINS: list[_Column] = [
    ("gain", "gain", _points),
    ("gain_low", "from", _points),
    ("gain_high", "to", _points),
    ("mean_gain", "over mean", _points),
    ("mean_gain_low", "from", _points),
    ("mean_gain_high", "to", _points),
]
_FITTING: list[_Column] = [
    ("fitted_here", "fitted here", _mark),
    ("fitted_on_training", "fitted on training frames", _mark),
    ("optimism", "optimism nats", _nats),
    ("optimism_accuracy", "optimism", _points),
]
_CONFUSIONS: list[_Column] = [
    ("name", "class", str),
    ("taken_for", "taken for", str),
    ("frames", "frames", _whole),
    ("share", "so often %", _percent),
    ("baseline_share", "single %", _percent),
]
_PAIRS: list[_Column] = [
    ("first", "first", str),
    ("second", "second", str),
    ("disagreement", "disagreement %", _percent),
    ("double_fault", "both wrong %", _percent),
    ("q_statistic", "Q", _nats),
    ("correlation", "correlation", _nats),
    ("kappa", "kappa", _nats),
]
_CLASSES: list[_Column] = [
    ("name", "class", str),
    ("frames", "frames", _whole),
    ("baseline_accuracy", "single %", _percent),
    ("rule_accuracy", "rule %", _percent),
    ("oracle", "some member %", _percent),
    ("confused_with", "taken for", str),
    ("confused_share", "so often %", _percent),
    ("trust", "trust", str),
    ("trust_f1", "its F1 %", _percent),
]


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
        verdict=verdict(report),
        tables={
            "rules": _table(report.rules, _SCORES + _GAINS + _FITTING),
            "members": _table(report.members, _SCORES),
            "classes": _table(report.classes, _CLASSES),
            "confusions": _table(report.confusions, _CONFUSIONS),
            "pairs": _table(closest, _PAIRS),
        },
        pairs_left_out=len(report.pairs) - len(closest),
        figures={name: plots.svg(draw(report)) for name, draw in _figures(report).items()},
    )
    return text.lstrip()


def verdict(report: Report) -> str:
    """One sentence: whether the best rule is better than the best single member, as far as the frames tell."""
    if report.best is None or not report.frames:
        return "Nothing was combined, or there were no frames to judge it on."
    row = next(row for row in report.rules.to_dict("records") if row["name"] == report.best)
    gain, low, high = (_points(row[column]) for column in ("gain", "gain_low", "gain_high"))
    ends = "no interval, for want of a second recording" if report.recordings < 2 else f"95 % from {low} to {high}"
    best = f"{report.best}, the best of {len(report.rules)} rules here," if len(report.rules) > 1 else report.best
    said = f"{best} against {report.baseline}: {gain} points of accuracy, {ends}"
    if row["gain_low"] > 0:
        return f"Better. {said}."
    return f"Worse. {said}." if row["gain_high"] < 0 else f"Not shown to be better. {said}."


def _figures(report: Report) -> dict[str, Callable[[Report], Any]]:
    """Only those that have something to show."""
    wanted: dict[str, Callable[[Report], Any]] = {}
    if report.frames:
        wanted = {"reliability": plots.reliability, "classes": plots.classes}
        wanted |= {"gains": plots.gains} if len(report.rules) else {}
        wanted |= {"disagreement": plots.disagreement} if len(report.pairs) else {}
    return wanted


def _table(table: pd.DataFrame, columns: list[_Column]) -> dict[str, Any]:
    """Heads and rows of text; what is missing is an empty cell."""
    rows = [
        [("", False) if pd.isna(value) else (write(value), write is not str) for value, (*_, write) in cells]
        for cells in (zip(row, columns, strict=True) for row in table[[name for name, *_ in columns]].to_numpy(object))
    ]
    return {"heads": [(head, write is not str) for _, head, write in columns], "rows": rows}
