"""Figures of a `Report`: each function draws on the axes it is given, or on new ones, and returns them.

Nothing is shown on a screen or written to a file; `svg` turns axes into text for a page. Needs matplotlib, which comes
with the extra `report`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from ensemble.judge.metrics import get_metric
from ensemble.judge.report import Report

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    msg = "expected matplotlib for figures, found none; install it with: pip install 'zoo-ensemble[report]'"
    raise ImportError(msg) from error

_RULE, _BASELINE, _LINE = "#0b6e99", "#b4632f", "#999999"


def gains(report: Report, ax: Axes | None = None) -> Axes:
    """Each rule's gain over the best single member with its 95 % interval, per cent counted in points."""
    table = report.rules.iloc[::-1]
    ax = _bare(ax, 6.4, 1.0 + 0.3 * len(table))
    metric = get_metric(report.metric)
    scale = 100 if metric.unit == "%" else 1
    gain, low, high = (scale * table[column].to_numpy(dtype=float) for column in ("gain", "gain_low", "gain_high"))
    rows = np.arange(len(table))
    ax.axvline(0, color=_LINE, linewidth=1)
    ax.hlines(rows, low, high, color=_RULE, linewidth=2)
    ax.plot(gain, rows, "o", color=_RULE)
    ax.set_yticks(rows, [*map(_as_written, table["name"])])
    ax.set_xlabel(f"gain over {_as_written(report.baseline)}, {metric.amount}")
    return ax


def reliability(report: Report, ax: Axes | None = None, *, names: Sequence[str] | None = None) -> Axes:
    """Accuracy against confidence, bin by bin, of the members or rules named; if None, of the baseline and best rule.

    Bins of fewer than ten frames are left out.
    """
    ax, table = _bare(ax, 4.2, 4.0), report.reliability
    chosen = [name for name in (report.baseline, report.best) if name] if names is None else names
    colours = [_BASELINE, _RULE]
    if len(chosen) > 2:
        colours = [mpl.colors.to_hex(colour) for colour in mpl.colormaps["viridis"](np.linspace(0, 0.9, len(chosen)))]
    ax.plot([0, 1], [0, 1], color=_LINE, linewidth=1)
    for name, colour in zip(chosen, colours, strict=False):
        bins = table[(table["name"] == name) & (table["frames"] >= 10)]
        ax.plot(bins["confidence"], bins["accuracy"], "o-", markersize=4, color=colour, label=_as_written(name))
    ax.set_xlabel("confidence of the top class")
    ax.set_ylabel("fraction right")
    ax.set_aspect("equal")
    ax.legend(frameon=False)
    return ax


def disagreement(report: Report, ax: Axes | None = None) -> Axes:
    """How often exactly one of two members is right, per cent, as a coloured table; with numbers up to 12 members."""
    names = report.members["name"].tolist()
    size = min(1.6 + 0.42 * len(names), 9.0)
    ax = _bare(ax, size + 0.8, size)
    table = np.full((len(names), len(names)), np.nan)
    first, second = np.triu_indices(len(names), k=1)  # the order of the rows of `pairs`
    table[second, first] = 100 * report.pairs["disagreement"].to_numpy(dtype=float)
    image = ax.imshow(table, cmap="cividis")
    ax.figure.colorbar(image, ax=ax, label="disagreement, per cent", shrink=0.8)
    shown = [*map(_as_written, names)] if len(names) <= 40 else []
    ax.set_xticks(range(len(shown)), shown, rotation=90)
    ax.set_yticks(range(len(shown)), shown)
    if len(names) <= 12:
        middle = np.nanmean(table) if np.isfinite(table).any() else 0.0
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                colour = "black" if value > middle else "white"
                ax.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    return ax


def classes(report: Report, ax: Axes | None = None) -> Axes:
    """Accuracy per class, of the best single member and of the best rule, the most improved class on top."""
    table = report.classes[report.classes["frames"] > 0].copy()
    table["change"] = table["rule_accuracy"] - table["baseline_accuracy"]
    table = table.sort_values(["change", "name"], ascending=[True, False])
    ax = _bare(ax, 6.4, 1.0 + 0.19 * len(table))
    rows = np.arange(len(table))
    before, after = (100 * table[column].to_numpy() for column in ("baseline_accuracy", "rule_accuracy"))
    ax.hlines(rows, before, after, color=_LINE, linewidth=1.5)
    ax.plot(before, rows, "o", markersize=4, color=_BASELINE, label=_as_written(report.baseline))
    ax.plot(after, rows, "o", markersize=4, color=_RULE, label=_as_written(report.best or report.baseline))
    ax.set_yticks(rows, [*map(_as_written, table["name"])], fontsize=8)
    ax.set_ylim(-1, len(table))
    ax.set_xlabel("accuracy on the class's frames, per cent")
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def svg(ax: Axes) -> str:
    """The figure that `ax` belongs to as SVG text; equal figures give equal text."""
    figure = ax.get_figure(root=True)
    if figure is None:
        msg = "expected axes that belong to a figure, got axes that were removed from theirs"
        raise ValueError(msg)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        unstamped = {"Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata=unstamped)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _bare(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes given, or new ones of this size in inches, without the lines at the top and on the right."""
    ax = Figure(figsize=(width, height)).add_subplot() if ax is None else ax
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _as_written(name: str) -> str:
    """The name so that a dollar sign does not start a formula."""
    return name.replace("$", r"\$")
