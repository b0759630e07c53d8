"""The figures of a report: each draws what its table holds."""

import pytest
import torch
from matplotlib.figure import Figure

import ensemble
from ensemble.judge import plots

FIGURES = [plots.gains, plots.reliability, plots.disagreement, plots.classes]


def report(
    members: int = 3, *, first: str = "m0", rules: tuple[str, ...] = ("mean", "majority"), frames: int = 300
) -> ensemble.Report:
    """Members of a real gain over thirty recordings."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (frames,), generator=generator)
    hint = torch.nn.functional.one_hot(labels, 4) * 1.5
    rows = (torch.randn(members, frames, 4, generator=generator) + hint).softmax(-1)
    names = [first, *(f"m{i}" for i in range(1, members))]
    outputs = ensemble.MemberOutputs.from_probabilities(
        dict(zip(names, rows, strict=True)), labels=labels, groups=torch.arange(frames) // 10
    )
    return ensemble.evaluate(outputs, {name: ensemble.get_rule(name) for name in rules}, baseline=first)


@pytest.mark.parametrize("draw", FIGURES)
def test_plots_draw_where_they_are_asked(draw: object) -> None:
    """On the axes given, which they return; on new ones otherwise."""
    ax = Figure().add_subplot()
    assert draw(report(), ax=ax) is ax  # type: ignore[operator]
    assert ax.has_data()
    assert draw(report()) is not ax  # type: ignore[operator]


def test_gains_are_drawn_with_their_ends() -> None:
    """The interval of the first rule is on top."""
    shown = report()
    ax = plots.gains(shown)
    segments = ax.collections[0].get_segments()  # type: ignore[attr-defined]
    assert segments[-1][:, 0].tolist() == pytest.approx((100 * shown.rules.loc[0, ["gain_low", "gain_high"]]).tolist())


def test_disagreement_is_drawn_below_the_diagonal() -> None:
    """Row of the second member, column of the first."""
    shown = report()
    image = plots.disagreement(shown).images[0].get_array()
    pair = shown.pairs.set_index(["first", "second"]).loc[("m0", "m2"), "disagreement"]
    assert image is not None
    assert image[2, 0] == pytest.approx(100 * pair)


def test_reliability_leaves_out_thin_bins() -> None:
    """A bin of fewer than ten frames is not drawn."""
    shown = report()
    line = plots.reliability(shown, names=["m1"]).lines[1]
    bins = shown.reliability[shown.reliability["name"] == "m1"]
    assert len(line.get_xdata()) == (bins["frames"] >= 10).sum() < len(bins)  # type: ignore[arg-type]
