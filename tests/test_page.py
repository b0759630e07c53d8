"""The page as text: complete, self-contained, the same for the same report, safe for any name. See test_browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import ensemble
from ensemble.judge import excerpt
from ensemble.judge.page import _packed, contenders, page


def seen(text: str) -> str:
    """What is left of a page without its style, its script and its data."""
    return re.sub(r"<(style|script)[^>]*>.*?</\1>", "", text, flags=re.DOTALL)


def data(text: str) -> dict[str, Any]:
    """What the script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert found
    return json.loads(found[1])


def script(*calls: tuple[Any, ...]) -> list[Any]:
    """What functions of page.js return: each call is a name and arguments, as JSON."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node")
    file = Path(ensemble.judge.page.__file__).with_name("page.js")
    code = """const page = require(process.argv[1]), calls = JSON.parse(require("fs").readFileSync(0));
    const plain = value => ArrayBuffer.isView(value) ? [...value] : value;
    console.log(JSON.stringify(calls.map(([name, ...rest]) => plain(page[name](...rest)))));"""
    done = subprocess.run([node, "-e", code, str(file)], input=json.dumps(calls), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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


def test_a_sample_that_would_be_too_long_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the frames that a smaller sample has, so that Python can give the same numbers."""
    shown = report()
    sample = data(shown.page())["sample"]
    long = len(script(("unpack", sample["codes"]))[0])
    monkeypatch.setattr("ensemble.judge.page._MOST_CODES", long // 3)
    cut = data(shown.page())["sample"]
    assert sample["frames"] == 300
    assert cut["frames"] == 300 * (long // 3) // long
    assert len(script(("unpack", cut["codes"]))[0]) < 0.5 * long
    assert script(("unpack", cut["truth"]))[0] == shown.sample.first(cut["frames"]).outputs.labels.tolist()


def test_temperatures_on_the_page_are_those_of_a_fit() -> None:
    """The mean of the two that are fitted on one half of the recordings each; for members and for rules."""
    shown = report()
    outputs, where = shown.sample.outputs, torch.from_numpy(shown.sample.recordings[1])
    halves = [outputs.at(where % 2 == odd) for odd in (0, 1)]
    after = data(shown.page())["bins"]["after"]
    only_second = ensemble.WeightedMean([0, 1, 0])
    for place, rule in ((1, only_second), (3, ensemble.mean), (4, ensemble.majority)):
        fitted = [ensemble.fit.fit_temperature(half, rule=rule).rule.steps[-1].value for half in halves]
        assert after[place]["temperature"] == pytest.approx(np.mean(fitted), abs=2e-3)
        assert after[place]["after"][1] < after[place]["before"][1]


def test_the_best_stands_first_whichever_way_the_metric_goes() -> None:
    """Members and rules in one table; a gain's place on the axis grows with it, and zero has one place."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(4, 90, 3, generator=generator) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]).softmax(-1)
    outputs = ensemble.MemberOutputs.from_probabilities(
        {f"m{i}": each for i, each in enumerate(rows)},
        labels=torch.randint(3, (90,), generator=generator),
        groups=torch.arange(90) // 9,
    )
    for metric in ("accuracy", "log_loss"):
        shown = ensemble.evaluate(outputs, {"mean": ensemble.mean}, metric=metric, baseline="m2")
        text = seen(shown.page()).partition('id="leaderboard"')[2].partition("</table>")[0]
        names = re.findall(r'<th scope="row">(\w+)', text)
        both = pd.concat([shown.members, shown.rules]).set_index("name")[metric]
        assert names == list(both.sort_values(ascending=metric == "log_loss", kind="stable").index)
        places = [float(place) for place in re.findall(r'<circle cx="([\d.]+)%"', text)]
        assert places == sorted(places, reverse=True)
        zeros = set(re.findall(r'class="zero" x1="([\d.]+)%"', text))
        assert zeros == {f"{places[names.index('m2')]:.2f}"}


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


def test_numbers_arrive_in_the_script_as_they_were_packed() -> None:
    """In the least bits that hold them."""
    arrays = [[], [0, 255], [256, 65_535, 7], [65_536, 2**32 - 1]]
    packed = [_packed(each) for each in arrays]
    assert [each[0] for each in packed] == [8, 8, 16, 32]
    assert script(*(("unpack", each) for each in packed)) == arrays


def test_an_interval_in_the_script_is_the_t_interval() -> None:
    """Of recordings that differ in length; and there is none for a single recording."""
    generator = np.random.default_rng(0)
    groups = np.sort(generator.integers(0, 12, 200))
    values = generator.normal(size=200)
    sizes = np.bincount(groups).tolist()
    t = 2.200985160082949  # of eleven degrees of freedom
    sample = {"frames": 200, "recordings": 12, "recording": groups.tolist(), "sizes": sizes, "t": t}
    one = {"frames": 2, "recordings": 1, "recording": [0, 0], "sizes": [2], "t": None}
    found, alone = script(("estimate", values.tolist(), sample), ("estimate", [1, 0], one))
    interval = ensemble.judge.t_interval(values, groups)
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(
        [interval.estimate, interval.low, interval.high], abs=1e-12
    )
    assert alone == {"mean": 0.5, "low": None, "high": None}


def test_a_mix_by_hand() -> None:
    """Of equal classes the first; with the weights' sum as the whole; the probability of the true class is pooled."""
    sample = {"frames": 2, "first": [0, 2, 3], "truth": [2, 1], "candidates": [0, 2, 1], "members": 2, "classes": 3}
    sample |= {"codes": [1, 2, 2, 1, 0, 2], "probability": [1.0, 0.5, 0.25, 0.0], "abstains": False}
    sample |= {"coding": {"absent": 9}}
    mixes = script(*(("pool", sample, weights) for weights in ([1, 1], [1, 2], [0, 3], [0, 0])))
    assert [mix and list(mix["right"].values()) for mix in mixes] == [[0, 1], [1, 1], [1, 1], None]
    losses = [[0.375, 0.625], [(0.25 + 2 * 0.5) / 3, 0.5], [0.5, 0.25]]
    for mix, pooled in zip(mixes, losses, strict=False):
        assert [*mix["loss"].values()] == pytest.approx(-np.log(pooled))


def test_the_front_is_what_nothing_beats() -> None:
    """Against the slow definition, ties included; by x."""
    generator = np.random.default_rng(0)
    for count in (0, 1, 2, 9, 40):
        points = generator.integers(0, 12, (count, 2)).tolist()
        front = script(("front", [{"x": x, "y": y} for x, y in points]))[0]
        beaten = [
            any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) or [x, y] in points[:place]
            for place, (x, y) in enumerate(points)
        ]
        assert sorted(front) == [place for place in range(count) if not beaten[place]]
        assert [points[place][0] for place in front] == sorted(points[place][0] for place in front)


def test_axes_have_round_numbers() -> None:
    """A handful, inside the range, at even steps; powers of ten and their twice and five times."""
    ranges = [(0.41, 0.62), (0, 1), (87.2, 87.9), (-3, 250), (0.5, 0.5)]
    for (low, high), found in zip(ranges, script(*(("ticks", *each, 5) for each in ranges)), strict=True):
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
        assert 3 <= len(found) <= 11 or low == high
        assert np.allclose(np.diff(found, n=2), 0)
    losses = [0.4, 0.42, 0.45, 0.5, 0.47, 1.4]
    assert script(("farthest", losses), ("farthest", [1, 9]), ("farthest", [2] * 7)) == [0.5, 9, 2]
    assert script(("logTicks", 300, 6000)) == [[500, 1000, 2000, 5000]]


def test_stretches_texts_and_names() -> None:
    """Runs of equal values; numbers before words, and the empty last, either way; names that cover nothing."""
    texts = ["1,200", "b", "", "-3.5", "20 %", "a"]
    pairs = [(a, b) for a in texts for b in texts]
    for sign, order in ((1, ["-3.5", "20 %", "1,200", "a", "b", ""]), (-1, ["1,200", "20 %", "-3.5", "b", "a", ""])):
        for (a, b), found in zip(pairs, script(*(("compareTexts", a, b, sign) for a, b in pairs)), strict=True):
            assert np.sign(found) == np.sign(order.index(a) - order.index(b))
    runs, placed = script(("runs", [4, 4, 1, 4]), ("placeNames", [{"x": 50, "y": 50}] * 6, ["name"] * 6, 100, 100))
    assert runs == [[0, 2, 4], [2, 3, 1], [3, 4, 4]]
    assert len({(each["x"], each["y"]) for each in placed if each}) == len([each for each in placed if each])
