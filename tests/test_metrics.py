"""The table of metrics: by hand, against scikit-learn, and as reports, choices and pages use every entry."""

import math
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss

import ensemble
from ensemble.judge import METRICS, Answers, Counts, page, tables

NAMES = ["accuracy", "log_loss", "brier", "macro_f1"]


def some_outputs(frames: int = 400, *, seed: int = 0, abstain: bool = False) -> ensemble.MemberOutputs:
    """Three members over forty recordings, classes of unequal frequency, of which the last never occurs."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(5, frames, p=[0.5, 0.3, 0.15, 0.05, 0])
    rows = {}
    for name, skill in (("a", 1.5), ("b", 2.0), ("c", 1.8)):
        logits = generator.normal(size=(frames, 5)) + skill * np.eye(5)[labels]
        rows[name] = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if abstain:
        rows["a"][::7] = np.nan
    groups = np.arange(frames) // 10
    return ensemble.MemberOutputs.from_probabilities(rows, labels=labels, groups=groups, abstain=abstain)


def oracle(name: str, rows: np.ndarray, labels: np.ndarray) -> float:
    """The metric by scikit-learn, or written out; more is better."""
    if name == "accuracy":
        return accuracy_score(labels, rows.argmax(axis=1))
    if name == "log_loss":
        return -log_loss(labels, rows / rows.sum(axis=1, keepdims=True), labels=range(rows.shape[1]))
    if name == "brier":
        return -float(np.square(rows - np.eye(rows.shape[1])[labels]).sum(axis=1).mean())
    return f1_score(labels, rows.argmax(axis=1), average="macro", zero_division=0)


def test_metrics_by_hand() -> None:
    """Three frames of three classes: right, wrong, and an abstention in which equal probabilities are judged."""
    third = 1 / 3
    rows = np.array([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [third, third, third]])
    answers = Answers(rows, np.array([0, 2, 1]), np.array([0, 1, -1]))
    numbers = {name: METRICS[name].function(answers) for name in NAMES[:3]}
    assert numbers["accuracy"].tolist() == [True, False, False]
    np.testing.assert_allclose(numbers["log_loss"], [math.log(2), 52 * math.log(2), math.log(3)])
    np.testing.assert_allclose(numbers["brier"], [0.5, 0.04 + 0.64 + 1, 2 / 3])
    counts = Counts(np.array([1, 0, 0, 0]), np.array([2, 1, 0, 0]), np.array([1, 1, 1, 0]))
    assert METRICS["macro_f1"].function(counts) == pytest.approx((2 / 3 + 0 + 0) / 3)  # the last class never occurs
    assert math.isnan(METRICS["macro_f1"].function(Counts(*[np.zeros(4)] * 3)))


def test_the_table_has_its_names_once() -> None:
    """Each with a title; another module cannot take a name."""
    assert list(METRICS)[:4] == NAMES
    assert [metric.higher for metric in METRICS.values()][:4] == [True, False, False, True]
    assert METRICS["brier"].amount == "units of Brier score"

    def accuracy(answers: Answers) -> np.ndarray:
        return answers.guesses

    with pytest.raises(ValueError, match=r"a new name for a metric, got 'accuracy', which ensemble\.judge\.metrics"):
        ensemble.judge.metric(Answers)(accuracy)
    with pytest.raises(ValueError, match="no metric named 'macro_f'; did you mean 'macro_f1'"):
        ensemble.judge.get_metric("macro_f")


@pytest.mark.parametrize("name", NAMES)
def test_gains_and_their_intervals_equal_the_plain_loop(name: str) -> None:
    """Value, gain over the single member and over the mean; the interval by drawing recordings one by one."""
    outputs, rules = some_outputs(), {"majority": ensemble.majority, "maximum": ensemble.maximum}
    report = ensemble.evaluate(outputs, rules, metric=name, baseline="a", replicates=25, seed=5)
    labels, p = outputs.require_labels().numpy(), outputs.probabilities
    single, uniform = p[0].double().numpy(), p.mean(dim=0).double().numpy()
    generator = np.random.default_rng(5)
    draws = [
        np.concatenate([np.arange(10 * g, 10 * g + 10) for g in row]) for row in generator.integers(40, size=(25, 40))
    ]
    for row, rule in zip(report.rules.to_dict("records"), rules.values(), strict=True):
        rows = rule(p).double().numpy()
        sign = 1 if METRICS[name].higher else -1
        assert sign * row[name] == pytest.approx(oracle(name, rows, labels), abs=1e-6)
        for gain, other in (("gain", single), ("mean_gain", uniform)):
            expected = [oracle(name, rows[d], labels[d]) - oracle(name, other[d], labels[d]) for d in draws]
            whole = oracle(name, rows, labels) - oracle(name, other, labels)
            assert row[gain] == pytest.approx(whole, abs=1e-6)
            ends = np.quantile(expected, [0.025, 0.975])
            np.testing.assert_allclose([row[f"{gain}_low"], row[f"{gain}_high"]], ends, atol=1e-6)
    assert report.metric == report.to_json()["metric"] == name


@pytest.mark.parametrize("name", NAMES)
def test_the_metric_chooses_baseline_and_best_rule(name: str) -> None:
    """As the oracle does, among members and among rules; `choose` and `best_member` by the same order."""
    outputs = some_outputs(seed=3)
    labels, p = outputs.require_labels().numpy(), outputs.probabilities
    rules = {"mean": ensemble.mean, "maximum": ensemble.maximum, "product": ensemble.product}
    report = ensemble.evaluate(outputs, rules, metric=name)
    of_members = {m: oracle(name, p[i].double().numpy(), labels) for i, m in enumerate(outputs.members)}
    of_rules = {rule: oracle(name, function(p).double().numpy(), labels) for rule, function in rules.items()}
    assert report.baseline == max(of_members, key=of_members.__getitem__)
    assert ensemble.judge.best_member(outputs, name) == report.baseline
    assert report.best == max(of_rules, key=of_rules.__getitem__)
    behind = ensemble.choose(outputs, rules, by=name).behind
    top = max(*of_rules.values(), of_members[report.baseline])
    assert behind == pytest.approx({report.baseline: top - of_members[report.baseline]} | {
        rule: top - value for rule, value in of_rules.items()
    }, abs=1e-6)  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_its_page_and_its_figure(name: str) -> None:
    """The sentence and the axis name what gains are counted in."""
    report = ensemble.evaluate(some_outputs(), {"mean": ensemble.mean}, metric=name, baseline="a")
    amount = METRICS[name].amount
    assert f" {amount}, 95 % interval" in report.conclusion
    words = " ".join(re.sub(r"<[^>]*>", " ", page.page(report)).split())
    assert f"Gains are {amount} over a , with" in words
    ax = report.figure("gains")
    assert ax.get_xlabel() == f"gain over a, {amount}"
    scale = 100 if METRICS[name].unit == "%" else 1
    segment = ax.collections[0].get_segments()[-1]  # type: ignore[attr-defined]
    assert segment[:, 0].tolist() == pytest.approx((scale * report.rules.loc[0, ["gain_low", "gain_high"]]).tolist())


@pytest.mark.parametrize("name", NAMES)
def test_abstentions_count_as_in_every_report(name: str) -> None:
    """Wrong, with the loss of equal probabilities, and outside the counts by class."""
    outputs = some_outputs(abstain=True)
    report = ensemble.evaluate(outputs, {"mean": ensemble.mean}, metric=name, baseline="a")
    labels, rows = outputs.require_labels().numpy(), outputs.probabilities[0].double().numpy()
    answered = ~np.isnan(rows).any(axis=1)
    expected = oracle(name, rows[answered], labels[answered])
    if name != "macro_f1":
        silent = {"accuracy": 0.0, "log_loss": -math.log(5), "brier": -0.8}[name]
        expected = expected * answered.mean() + silent * (~answered).mean()
    assert METRICS[name].goods(report.members[name].to_numpy())[0] == pytest.approx(expected, abs=1e-6)
    assert report.rules.loc[0, ["gain", "gain_low", "gain_high"]].notna().all()


def test_an_own_metric_is_judged_like_the_others() -> None:
    """Mean recall from the counts: a column, a gain with its interval, a heading."""
    try:

        @ensemble.judge.metric(Counts, unit="%")
        def mean_recall(counts: Counts) -> np.ndarray:
            with np.errstate(invalid="ignore"):
                return np.nanmean(counts.hits / counts.true, axis=-1)

        outputs = some_outputs()
        report = ensemble.evaluate(outputs, {"mean": ensemble.mean}, metric="mean_recall")
        guesses, labels = outputs.probabilities.mean(dim=0).argmax(dim=-1), outputs.require_labels()
        own = np.mean([float((guesses[labels == c] == c).double().mean()) for c in range(4)])
        assert report.rules["mean_recall"][0] == pytest.approx(own)
        assert report.rules["gain_low"][0] <= report.rules["gain"][0] <= report.rules["gain_high"][0]
        assert "mean recall %" in page.page(report)
    finally:
        METRICS.pop("mean_recall", None)


def test_counts_by_recording_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where recordings, answers and classes are many, recordings share piles, and no frame is lost."""
    outputs = some_outputs(4000)
    whole = ensemble.evaluate(outputs, {"mean": ensemble.mean}, metric="macro_f1", baseline="a").rules.loc[0]
    monkeypatch.setattr(tables, "_COUNTS", 1)
    piled = ensemble.evaluate(outputs, {"mean": ensemble.mean}, metric="macro_f1", baseline="a").rules.loc[0]
    assert tables.tally(outputs, {}, METRICS["macro_f1"]).counts.shape == (4, 100, 3, 5)
    assert piled["gain"] == whole["gain"]
    assert piled["gain_high"] - piled["gain_low"] == pytest.approx(whole["gain_high"] - whole["gain_low"], rel=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_no_frames_and_one_recording_have_no_interval(name: str) -> None:
    """NaN, without a warning."""
    outputs = some_outputs()
    for frames in (0, 10):
        few = outputs.at(torch.arange(frames))
        row = ensemble.evaluate(few, {"mean": ensemble.mean}, metric=name, baseline="a").rules.loc[0]
        assert math.isnan(row["gain_low"])
        assert math.isnan(row["gain"]) == (frames == 0)
