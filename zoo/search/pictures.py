"""Pictures: which models a parameter budget allows, and the loss along the line between two checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from zoo._names import checked
from zoo.search.sample import Samples

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    msg = "pictures need matplotlib: pip install 'zoo-ensemble[report]'"
    raise ImportError(msg) from error

_SHOWN = 20_000  # points of the scatter plot; more would blur into one patch


@checked
def plot_samples(samples: Samples, axes: Sequence[Axes] | None = None, *, layers: int = 8) -> Axes:
    """The lecture's pictures: a histogram of depths, parameters against depth, and histograms of layer widths.

    Args:
        samples: the result of `draw_many`.
        axes: the three axes to draw on; None puts them in a row of a new figure, of which the first is returned.
        layers: number of hidden layers whose widths have a histogram, from the first.
    """
    depths, sizes, widths = Figure((12, 4), layout="constrained").subplots(1, 3) if axes is None else axes
    counts = np.bincount(samples.depths)
    depths.bar(np.arange(len(counts)), counts)
    depths.set(xlabel="hidden layers", ylabel="samples")
    some = slice(None, None, max(len(samples.depths) // _SHOWN, 1))
    sizes.scatter(samples.depths[some], samples.parameters[some], s=2, alpha=0.3)
    sizes.set(xlabel="hidden layers", ylabel="parameters")
    edges = np.geomspace(1, max(int(samples.widths.max()), 2), 60)
    for layer, column in enumerate(samples.widths.T[:layers], start=1):
        widths.stairs(np.histogram(column[column > 0], edges)[0], edges, label=f"layer {layer}")
    widths.set(xscale="log", xlabel="width of the layer", ylabel="samples")
    widths.legend()
    return depths


@checked
def plot_line(positions: Tensor, losses: Tensor, *, ax: Axes | None = None, ends: Sequence[str] = ("", "")) -> Axes:
    """The loss along the line between two checkpoints, as `losses_along` gives it."""
    ax = ax or Figure((5, 4), layout="constrained").subplots()
    ax.plot(positions.numpy(), losses.numpy(), marker="o")
    ax.set(xlabel=f"{ends[0]} (0) to {ends[1]} (1)" if any(ends) else "share of the last", ylabel="loss (nats)")
    return ax
