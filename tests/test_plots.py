"""The figures of a report: each draws what its table holds."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import ensemble

FIGURES = ["gains", "reliability", "disagreement", "map", "classes", "confusion"]


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


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_where_they_are_asked(name: str) -> None:
    """On the axes given, which they return; on new ones otherwise."""
    ax = Figure().add_subplot()
    assert report().figure(name, ax=ax) is ax
    assert ax.has_data()
    new = report().figure(name)
    assert new is not ax
    assert new._repr_png_().startswith(b"\x89PNG")  # what a notebook shows of it


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(("members", "rules", "frames"), [(1, (), 300), (2, ("mean",), 0), (2, (), 0), (70, (), 50)])
def test_every_report_has_its_figures(name: str, members: int, rules: tuple[str, ...], frames: int) -> None:
    """One member, no rule, no frames, many members, names that would be broken formulas."""
    ax = report(members, rules=rules, frames=frames, first=r"a$\frac$").figure(name)
    assert ax._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "of", "words"),
    [
        ("gain", None, "no figure named 'gain'; did you mean 'gains'"),
        ("reliability", ["mO"], "member or rule named"),
        ("reliability", "meen", "named 'meen'; did you mean 'mean'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, of: str | list[str] | None, words: str) -> None:
    """Of figures, of members and rules."""
    with pytest.raises(ValueError, match=words):
        report().figure(name, of=of)


def test_one_name_is_one_name_and_axes_are_axes() -> None:
    """What `of` holds may be a name; a figure, or several axes, are refused by name."""
    assert [text.get_text() for text in report().figure("reliability", of="m1").get_legend().get_texts()] == ["m1"]
    for strange in (Figure(), Figure().subplots(1, 2)):
        with pytest.raises(TypeError, match=r"expected axes to draw on, .* got (Figure|ndarray)"):
            report().figure("gains", ax=strange)


def test_gains_are_drawn_with_their_ends() -> None:
    """The interval of the first rule is on top."""
    shown = report()
    ax = shown.figure("gains")
    segments = ax.collections[0].get_segments()  # type: ignore[attr-defined]
    assert segments[-1][:, 0].tolist() == pytest.approx((100 * shown.rules.loc[0, ["gain_low", "gain_high"]]).tolist())


def test_disagreement_is_drawn_below_the_diagonal() -> None:
    """Row of the second member, column of the first."""
    shown = report()
    image = shown.figure("disagreement").images[0].get_array()
    pair = shown.pairs.set_index(["first", "second"]).loc[("m0", "m2"), "disagreement"]
    assert image is not None
    assert image[2, 0] == pytest.approx(100 * pair)


def test_reliability_leaves_out_thin_bins() -> None:
    """A bin of fewer than ten frames is not drawn."""
    shown = report()
    line = shown.figure("reliability", of=["m1"]).lines[1]
    bins = shown.reliability[shown.reliability["name"] == "m1"]
    assert len(line.get_xdata()) == (bins["frames"] >= 10).sum() < len(bins)  # type: ignore[arg-type]


def test_distances_on_the_map_are_those_of_right_and_wrong() -> None:
    """Three members fit into a plane without loss: the squared distance of two is their disagreement, per cent."""
    shown = report(3)
    places = np.asarray(shown.figure("map").collections[0].get_offsets())
    for first, second, disagreement in shown.pairs[["first", "second", "disagreement"]].itertuples(index=False):
        apart = places[int(first[1:])] - places[int(second[1:])]
        assert apart @ apart == pytest.approx(100 * disagreement)


def test_confusion_is_drawn_in_shares_of_the_true_class() -> None:
    """Row of the true class; the diagonal is the best rule's accuracy on each class."""
    shown = report()
    image = shown.figure("confusion").images[0].get_array()
    assert image is not None
    assert np.diagonal(image).tolist() == pytest.approx((100 * shown.classes["rule_accuracy"]).tolist())
    assert image.sum(axis=1).tolist() == pytest.approx([100] * 4)
