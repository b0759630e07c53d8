"""Figures of a report's tables: each function draws on the axes it is given, or on new ones, and returns them.

`Report.figure` calls them by name. Nothing is shown on a screen or written to a file. Needs matplotlib, which comes
with the extra `report`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ensemble.judge.diversity import plane
from ensemble.judge.metrics import Metric

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure
except ImportError as error:
    msg = "expected matplotlib for figures, found none; install it with: pip install 'zoo-ensemble[report]'"
    raise ImportError(msg) from error

_RULE, _BASELINE, _LINE = "#0b6e99", "#b4632f", "#999999"
_NAMED = 60  # rows of a coloured table that have room for their names


def gains(rules: pd.DataFrame, ax: Axes | None = None, *, baseline: str, metric: Metric) -> Axes:
    """Each rule's gain over the best single member with its 95 % interval, per cent counted in points."""
    table = rules.iloc[::-1]
    ax = _bare(ax, 6.4, 1.0 + 0.3 * len(table))
    scale = 100 if metric.unit == "%" else 1
    gain, low, high = (scale * table[column].to_numpy(dtype=float) for column in ("gain", "gain_low", "gain_high"))
    rows = np.arange(len(table))
    ax.axvline(0, color=_LINE, linewidth=1)
    ax.hlines(rows, low, high, color=_RULE, linewidth=2)
    ax.plot(gain, rows, "o", color=_RULE)
    ax.set_yticks(rows, [*map(_as_written, table["name"])])
    ax.set_xlabel(f"gain over {_as_written(baseline)}, {metric.amount}")
    return ax


def reliability(bins: pd.DataFrame, ax: Axes | None = None, *, names: Sequence[str]) -> Axes:
    """Accuracy against confidence, bin by bin, of the members or rules named.

    Bins of fewer than ten frames are left out.
    """
    ax = _bare(ax, 4.2, 4.0)
    colours = [_BASELINE, _RULE]
    if len(names) > 2:
        colours = [mpl.colors.to_hex(colour) for colour in mpl.colormaps["viridis"](np.linspace(0, 0.9, len(names)))]
    ax.plot([0, 1], [0, 1], color=_LINE, linewidth=1)
    for name, colour in zip(names, colours, strict=False):
        own = bins[(bins["name"] == name) & (bins["frames"] >= 10)]
        ax.plot(own["confidence"], own["accuracy"], "o-", markersize=4, color=colour, label=_as_written(name))
    ax.set_xlabel("confidence of the top class")
    ax.set_ylabel("fraction right")
    ax.set_aspect("equal")
    ax.legend(frameon=False)
    return ax


def disagreement(pairs: pd.DataFrame, ax: Axes | None = None, *, names: Sequence[str]) -> Axes:
    """How often exactly one of two members is right, per cent, as a coloured table; with numbers up to 12 members."""
    size = min(1.6 + 0.42 * len(names), 9.0)
    ax = _bare(ax, size + 0.8, size)
    table = np.full((len(names), len(names)), np.nan)
    first, second = np.triu_indices(len(names), k=1)  # the order of the rows of `pairs`
    table[second, first] = 100 * pairs["disagreement"].to_numpy(dtype=float)
    image = ax.imshow(table, cmap="cividis")
    ax.figure.colorbar(image, ax=ax, label="disagreement, per cent", shrink=0.8)
    _name_both(ax, names)
    if len(names) <= 12:
        middle = np.nanmean(table) if np.isfinite(table).any() else 0.0
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                colour = "black" if value > middle else "white"
                ax.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    return ax


def member_map(pairs: pd.DataFrame, ax: Axes | None = None, *, members: pd.DataFrame) -> Axes:
    """The members as a map: the farther apart two of them are, the more often exactly one is right.

    Places are those of `diversity.plane`. The colour is the accuracy; the axes have no meaning but distance.
    """
    names, accuracy = members["name"].tolist(), 100 * members["accuracy"].to_numpy(dtype=float)
    ax = _bare(ax, 5.4, 4.4)
    squared = np.zeros((len(names), len(names)))
    first, second = np.triu_indices(len(names), k=1)  # the order of the rows of `pairs`
    squared[first, second] = squared[second, first] = 100 * pairs["disagreement"].to_numpy(dtype=float)
    places, _ = plane(squared)
    points = ax.scatter(places[:, 0], places[:, 1], c=accuracy, cmap="viridis", s=45, zorder=2)
    ax.figure.colorbar(points, ax=ax, label="accuracy, per cent", shrink=0.8)
    size = np.ptp(places, axis=0).max(initial=1e-9)
    written: list[NDArray[np.float64]] = []  # where names stand; each is moved up until it covers none
    for row in np.argsort(places[:, 1], kind="stable") if len(names) <= _NAMED else ():
        place = places[row] + (0.025 * size, 0.0)
        while any((np.abs(place - other) < (0.35 * size, 0.045 * size)).all() for other in written):
            place += (0.0, 0.01 * size)
        written.append(place)
        line = {"arrowstyle": "-", "color": _LINE, "linewidth": 0.6}
        at, to = tuple(places[row]), tuple(place)
        ax.annotate(_as_written(names[row]), at, xytext=to, fontsize=8, va="center", arrowprops=line)
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.margins(0.15)
    return ax


def classes(table: pd.DataFrame, ax: Axes | None = None, *, baseline: str, best: str) -> Axes:
    """Accuracy per class, of the best single member and of the best rule, the most improved class on top."""
    table = table[table["frames"] > 0].copy()
    table["change"] = table["rule_accuracy"] - table["baseline_accuracy"]
    table = table.sort_values(["change", "name"], ascending=[True, False])
    ax = _bare(ax, 6.4, 1.0 + 0.19 * len(table))
    rows = np.arange(len(table))
    before, after = (100 * table[column].to_numpy() for column in ("baseline_accuracy", "rule_accuracy"))
    ax.hlines(rows, before, after, color=_LINE, linewidth=1.5)
    ax.plot(before, rows, "o", markersize=4, color=_BASELINE, label=_as_written(baseline))
    ax.plot(after, rows, "o", markersize=4, color=_RULE, label=_as_written(best))
    ax.set_yticks(rows, [*map(_as_written, table["name"])], fontsize=8)
    ax.set_ylim(-1, len(table))
    ax.set_xlabel("accuracy on the class's frames, per cent")
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def confusion(counts: NDArray[np.int64], ax: Axes | None = None, *, names: Sequence[str], judged: str) -> Axes:
    """What each true class, a row, is taken for, per cent of its frames; classes without frames have empty rows.

    The colours tell shares of a hundredth and of a half apart: they follow the square root.
    """
    size = min(2.2 + 0.2 * len(names), 12.0)
    ax = _bare(ax, size + 1.0, size)
    with np.errstate(invalid="ignore"):
        shares = 100 * counts / counts.sum(axis=1, keepdims=True)
    image = ax.imshow(shares, cmap="cividis", norm=mpl.colors.PowerNorm(0.5, vmin=0, vmax=100))
    ax.figure.colorbar(image, ax=ax, label="frames of the true class, per cent", shrink=0.8)
    _name_both(ax, names)
    ax.set_xlabel(f"class given by {_as_written(judged)}")
    ax.set_ylabel("true class")
    return ax


def risk_coverage(curves: pd.DataFrame, ax: Axes | None = None, *, scores: pd.DataFrame, risk: float) -> Axes:
    """The risk, per cent, against the share of the frames that are kept, of each score; marked where `risk` allows."""
    ax = _bare(ax, 6.4, 4.2)
    colours = [mpl.colors.to_hex(each) for each in mpl.colormaps["viridis"](np.linspace(0, 0.9, len(scores)))]
    ax.axhline(100 * risk, color=_LINE, linewidth=1, linestyle="--")
    for (_, row), colour in zip(scores.iterrows(), colours, strict=True):
        own = curves[curves["name"] == row["name"]]
        name = _as_written(str(row["name"]).replace("_", " "))
        ax.plot(100 * own["coverage"], 100 * own["risk"], color=colour, linewidth=1.5, label=name)
        there = np.interp(row["coverage"], own["coverage"], own["risk"])
        ax.plot(100 * row["coverage"], 100 * there, "o", markersize=4, color=colour)
    whole = float(curves["generalised_risk"].max())  # that of full coverage
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 100 * max(1.3 * whole, 1.3 * risk, 1e-3))
    ax.set_xlabel("coverage: frames kept, per cent")
    ax.set_ylabel("risk: wrong among these, per cent")
    ax.legend(frameon=False, loc="upper left")
    return ax


def set_coverage(classes: pd.DataFrame, ax: Axes | None = None, *, asked: float) -> Axes:
    """How often the sets of a class's frames hold it, per cent, and how large they are, the least covered on top.

    The line stands at what was asked for; there is none where that is NaN.
    """
    table = classes[classes["frames"] > 0].sort_values(["coverage", "name"], ascending=[False, True])
    ax = _bare(ax, 6.4, 1.0 + 0.19 * len(table))
    rows, covered, size = np.arange(len(table)), 100 * table["coverage"].to_numpy(), table["size"].to_numpy()
    if not np.isnan(asked):
        ax.axvline(100 * asked, color=_LINE, linewidth=1, linestyle="--")
    points = ax.scatter(covered, rows, c=size, cmap="viridis_r", s=22, zorder=2)
    ax.figure.colorbar(points, ax=ax, label="classes in a set, on average", shrink=0.6)
    ax.set_yticks(rows, [*map(_as_written, table["name"])], fontsize=8)
    ax.set_ylim(-1, len(table))
    ax.set_xlabel("frames of the class whose set holds it, per cent")
    return ax


def _bare(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes given, or new ones of this size in inches, without the lines at the top and on the right.

    New ones show themselves as a picture in a notebook; those given belong to a figure that shows itself.
    """
    if ax is None:
        ax = (figure := Figure(figsize=(width, height))).add_subplot()
        vars(ax)["_repr_png_"] = partial(_png, figure)
    if not isinstance(ax, Axes):
        msg = f"expected axes to draw on, such as those of Figure().subplots(), got {type(ax).__name__}"
        raise TypeError(msg)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def _name_both(ax: Axes, names: Sequence[str]) -> None:
    """The names of a coloured table's rows, and of its columns, where there is room."""
    shown = [*map(_as_written, names)] if len(names) <= _NAMED else []
    size = 10 if len(names) <= 12 else 7
    ax.set_xticks(range(len(shown)), shown, rotation=90, fontsize=size)
    ax.set_yticks(range(len(shown)), shown, fontsize=size)


def _as_written(name: str) -> str:
    """The name so that a dollar sign does not start a formula."""
    return name.replace("$", r"\$")
