"""The page as text: complete, self-contained, the same for the same report, safe for any name. See test_browser."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

import ensemble
from ensemble.judge import excerpt
from ensemble.judge.page import contenders, page


def seen(text: str) -> str:
    """What is left of a page without its style, its script and its data."""
    return re.sub(r"<(style|script)[^>]*>.*?</\1>", "", text, flags=re.DOTALL)


def data(text: str) -> dict[str, Any]:
    """What the script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert found
    return json.loads(found[1])


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
    assert "nan" not in seen(page(shown))
    assert data(page(shown))["sample"]["t"] is None


def test_the_page_shows_everything_and_requests_nothing() -> None:
    """Every member, rule, class and note; no address, no file of its own."""
    shown = report()
    text, tables = page(shown), seen(page(shown))
    for word in [
        *shown.members["name"],
        *shown.rules["name"],
        *shown.classes["name"],
        *shown.confusions["taken_for"],
        *shown.notes,
    ]:
        assert word in tables
    assert shown.conclusion in text
    assert "<summary>Mistakes</summary>" in text
    assert text.startswith("<!doctype html>")
    assert "default-src 'none'" in text
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
    name = "</script><img src=x onerror=alert(1)>"
    text = page(report(first=name))
    assert "<img" not in text
    assert "&lt;/script&gt;&lt;img" in text
    assert data(text)["members"][0] == name
    assert text.count("</script>") == 2


@pytest.mark.parametrize("abstains", [False, True])
def test_contenders_are_the_classes_that_some_weights_prefer(abstains: bool) -> None:
    """Of two members: the top classes of a thousand mixtures; beside the true class none that another always beats."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        rows = generator.dirichlet(np.full(6, 0.3), size=2)
        rows[1] = np.nan if abstains else rows[1]
        codes = excerpt.encode(np.log(rows))
        coded = np.nan_to_num(np.exp(excerpt.decode(codes)))
        tops = {int((w * coded[0] + (1 - w) * coded[1]).argmax()) for w in np.linspace(0.001, 1, 1000)}
        found = set(contenders(codes, truth=0).tolist())
        assert tops <= found
        beaten = {c for c in range(6) for d in range(6) if (coded[:, d] > coded[:, c]).all()}
        assert not (found - {0}) & beaten


def test_contenders_of_equal_classes_are_the_first() -> None:
    """As an argmax is."""
    assert contenders(excerpt.encode(np.log(np.full((3, 4), 0.25))), truth=2).tolist() == [0, 2]


def test_equal_reports_equal_pages() -> None:
    """But for the seconds, nothing changes from one run to the next."""
    first, second = (re.sub(r"Judged in .* s", "", report().page()) for _ in range(2))
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
