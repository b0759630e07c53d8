"""Pictures of draws and of losses, on new and on given axes."""

import pytest
import torch

import zoo

pytest.importorskip("matplotlib")


def test_pictures_of_draws_are_drawn_on_the_axes_that_are_given() -> None:
    """The histogram of depths holds every sample, the scatter plot a dot for each, and each layer has a histogram."""
    from matplotlib.figure import Figure

    samples = zoo.search.draw_many(500, 100_000)
    figure = Figure()
    axes = figure.subplots(1, 3)
    assert zoo.search.plot_samples(samples, axes, layers=2) is axes[0]
    assert sum(bar.get_height() for bar in axes[0].patches) == 500
    assert len(axes[1].collections[0].get_offsets()) == 500
    assert [text.get_text() for text in axes[2].get_legend().get_texts()] == ["layer 1", "layer 2"]
    assert len(zoo.search.plot_samples(samples).figure.axes) == 3


def test_the_line_between_two_checkpoints_is_labelled_by_its_ends() -> None:
    """Positions against losses."""
    ax = zoo.search.plot_line(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([2.0, 3.0, 1.0]), ends=("a@1", "b@1"))
    assert ax.lines[0].get_xydata().tolist() == [[0.0, 2.0], [0.5, 3.0], [1.0, 1.0]]
    assert ax.get_xlabel() == "a@1 (0) to b@1 (1)"
