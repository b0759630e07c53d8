"""Pictures: which models a parameter budget allows, and the loss along the line between two checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from zoo.search.sample import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 20_000  # points of the scatter plot; more would blur into one patch


def plot_depths(samples: Samples, *, ax: Axes | None = None, parameters: bool = False) -> Axes:
    """A histogram of depths, or, with `parameters`, a scatter plot of parameters against depth.

    Args:
        samples: the result of `draw_many`.
        ax: where to draw; None makes a new figure.
        parameters: draw one dot per sample at (depth, parameters) instead of the histogram.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax)
    ax.set_xlabel("hidden layers")
    if parameters:
        some = slice(None, None, max(len(samples.depths) // _SHOWN, 1))
        ax.scatter(samples.depths[some], samples.parameters[some], s=2, alpha=0.3)
        ax.set_ylabel("parameters")
    else:
        counts = np.bincount(samples.depths)
        ax.bar(np.arange(len(counts)), counts)
        ax.set_ylabel("samples")
    return ax


def plot_widths(samples: Samples, *, ax: Axes | None = None, layers: int = 8) -> Axes:
    """Histograms of the widths of the first, second, ... hidden layer, one line per layer.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax)
    edges = np.geomspace(1, max(int(samples.widths.max()), 2), 60)
    for layer in range(min(layers, samples.widths.shape[1])):
        widths = samples.widths[:, layer]
        ax.stairs(np.histogram(widths[widths > 0], edges)[0], edges, label=f"layer {layer + 1}")
    ax.set(xscale="log", xlabel="width of the layer", ylabel="samples")
    ax.legend()
    return ax


def plot_samples(samples: Samples) -> Axes:
    """The lecture's pictures in one row: histogram of depths, parameters against depth, histograms of widths.

    Returns:
        The first of the three; its `figure` holds them all.
    """
    figure = _figure((12, 4))
    first, second, third = figure.subplots(1, 3)
    plot_depths(samples, ax=first)
    plot_depths(samples, ax=second, parameters=True)
    plot_widths(samples, ax=third)
    return first  # type: ignore[no-any-return]  # subplots returns an array of Axes


def plot_line(positions: Tensor, losses: Tensor, *, ax: Axes | None = None, ends: Sequence[str] = ("", "")) -> Axes:
    """The loss along the line between two checkpoints, as `losses_along` gives it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax)
    ax.plot(positions.numpy(), losses.numpy(), marker="o")
    ax.set(xlabel=f"{ends[0]} (0) to {ends[1]} (1)" if any(ends) else "share of the last", ylabel="loss (nats)")
    return ax


def _axes(ax: Axes | None) -> Axes:
    return _figure((5, 4)).subplots() if ax is None else ax


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "pictures need matplotlib: pip install 'zoo-ensemble[report]'"
        raise ImportError(msg) from error
    return Figure(size, layout="constrained")
