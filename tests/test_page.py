"""The page and its figures: complete, self-contained, the same for the same report, safe for any name."""

import re

import pytest
import torch

import ensemble
from ensemble.judge.page import page

FIGURES = ["gains", "reliability", "disagreement", "classes"]


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
    """However many frames it has: no interval, no claim of better, and the page says why."""
    shown = report(frames=10)
    assert shown.rules[["gain_low", "mean_gain_high", "loss_gain_low"]].isna().all(axis=None)
    assert shown.conclusion.startswith("Not shown to be better.")
    assert shown.conclusion.endswith("no interval, because there is only one recording.")
    assert "1 recording cannot be resampled: there are no intervals" in shown.notes
    assert "nan" not in page(shown)


def test_the_page_shows_everything_and_requests_nothing() -> None:
    """Every member, rule, class and note; no address, no file of its own."""
    shown = report()
    text = page(shown)
    for word in [
        *shown.members["name"],
        *shown.rules["name"],
        *shown.classes["name"],
        *shown.confusions["taken_for"],
        *shown.notes,
    ]:
        assert word in text
    assert shown.conclusion in text
    assert "<h2>Mistakes</h2>" in text
    assert text.startswith("<!doctype html>")
    assert text.count("<svg") == len(FIGURES)
    outside = re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*|url\((?!#)[^)]*|@import""", text)
    assert outside == []


def test_figures_in_the_page_are_the_reports() -> None:
    """A rule's accuracy and gain as written in its row."""
    shown = report()
    row = shown.rules.iloc[0]
    assert f"{100 * row['accuracy']:.2f}" in page(shown)
    assert f"{100 * row['gain_low']:+.2f}" in page(shown)


def test_names_cannot_write_html() -> None:
    """A member named like a tag is shown as text in tables and in figures."""
    text = page(report(first="<script>alert(1)</script>"))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_dollars_in_names_are_no_formulas() -> None:
    """A name that would be a broken formula is drawn as it is written."""
    assert r"a$\frac$" in page(report(first=r"a$\frac$"))


def test_equal_reports_equal_pages() -> None:
    """But for the seconds, nothing changes from one run to the next."""
    first, second = (re.sub(r"Judged in .* s", "", page(report())) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("rules", "frames", "members"), [((), 300, 3), (("mean",), 300, 1), (("mean",), 0, 2), (("mean",), 300, 16)]
)
def test_small_and_empty_reports_have_pages(rules: tuple[str, ...], frames: int, members: int) -> None:
    """No rules, one member, no frames; many members."""
    assert "</html>" in page(report(members, rules=rules, frames=frames))


def test_the_conclusion_follows_the_interval() -> None:
    """Better only if the whole interval is above zero; the number of rules tried is given."""
    assert report().conclusion.startswith("Better. ")
    assert "the best of 2 rules here, against m0" in report().conclusion
    alone = report(1, rules=("mean",))
    assert alone.conclusion.startswith("Not shown to be better. mean against m0: +0.00 points")
    assert report(rules=()).conclusion.startswith("No rule was judged")
