"""The page and its figures: complete, self-contained, the same for the same report, safe for any name."""

import re

import pytest
import torch
from matplotlib.figure import Figure

import ensemble
from ensemble.judge import plots
from ensemble.judge.page import page, verdict

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


def test_one_recording_shows_nothing() -> None:
    """However many frames it has: no interval, no verdict of better, and the page says why."""
    told = report(frames=10)
    assert told.rules[["gain_low", "mean_gain_high", "loss_gain_low"]].isna().all(axis=None)
    assert verdict(told).startswith("Not shown to be better.")
    assert verdict(told).endswith("no interval, for want of a second recording.")
    assert "1 recording cannot be resampled: there are no intervals" in told.notes
    assert "nan" not in page(told)


def test_the_page_tells_everything_and_asks_for_nothing() -> None:
    """Every member, rule, class and note; no address, no file of its own."""
    told = report()
    text = page(told)
    for word in [
        *told.members["name"],
        *told.rules["name"],
        *told.classes["name"],
        *told.confusions["taken_for"],
        *told.notes,
    ]:
        assert word in text
    assert verdict(told) in text
    assert "<h2>Mistakes</h2>" in text
    assert text.startswith("<!doctype html>")
    assert text.count("<svg") == len(FIGURES)
    outside = re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*|url\((?!#)[^)]*|@import""", text)
    assert outside == []


def test_figures_in_the_page_are_the_reports() -> None:
    """A rule's accuracy and gain as written in its row."""
    told = report()
    row = told.rules.iloc[0]
    assert f"{100 * row['accuracy']:.2f}" in page(told)
    assert f"{100 * row['gain_low']:+.2f}" in page(told)


def test_names_cannot_write_html() -> None:
    """A member called like a tag is shown, not obeyed, in tables and in figures."""
    text = page(report(first="<script>alert(1)</script>"))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_dollars_in_names_are_no_formulas() -> None:
    """A name that would be broken mathematics is drawn as it is written."""
    assert r"a$\frac$" in page(report(first=r"a$\frac$"))


def test_equal_reports_equal_pages() -> None:
    """But for the seconds, nothing changes from one run to the next."""
    first, second = (re.sub(r"Judged in .* s", "", page(report())) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("draw", FIGURES)
def test_plots_draw_where_they_are_told(draw: object) -> None:
    """On the axes given, which they return; on new ones otherwise."""
    ax = Figure().add_subplot()
    assert draw(report(), ax=ax) is ax  # type: ignore[operator]
    assert ax.has_data()
    assert draw(report()) is not ax  # type: ignore[operator]


def test_gains_are_drawn_with_their_ends() -> None:
    """The interval of the first rule stands on top."""
    told = report()
    ax = plots.gains(told)
    segments = ax.collections[0].get_segments()  # type: ignore[attr-defined]
    assert segments[-1][:, 0].tolist() == pytest.approx((100 * told.rules.loc[0, ["gain_low", "gain_high"]]).tolist())


def test_disagreement_is_drawn_below_the_diagonal() -> None:
    """Row of the second member, column of the first."""
    told = report()
    image = plots.disagreement(told).images[0].get_array()
    pair = told.pairs.set_index(["first", "second"]).loc[("m0", "m2"), "disagreement"]
    assert image is not None
    assert image[2, 0] == pytest.approx(100 * pair)


def test_reliability_leaves_out_thin_bins() -> None:
    """A bin of fewer than ten frames says nothing."""
    told = report()
    line = plots.reliability(told, names=["m1"]).lines[1]
    bins = told.reliability[told.reliability["name"] == "m1"]
    assert len(line.get_xdata()) == (bins["frames"] >= 10).sum() < len(bins)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rules", "frames", "members"), [((), 300, 3), (("mean",), 300, 1), (("mean",), 0, 2), (("mean",), 300, 16)]
)
def test_small_and_empty_reports_have_pages(rules: tuple[str, ...], frames: int, members: int) -> None:
    """No rules, one member, no frames; many members."""
    assert "</html>" in page(report(members, rules=rules, frames=frames))


def test_the_verdict_follows_the_interval() -> None:
    """Better only if the whole interval is above nought; the number tried is told."""
    assert verdict(report()).startswith("Better. ")
    assert "the best of 2 rules here, against m0" in verdict(report())
    alone = report(1, rules=("mean",))
    assert verdict(alone).startswith("Not shown to be better. mean against m0: +0.00 points")
    assert verdict(report(rules=())).startswith("Nothing was combined")
