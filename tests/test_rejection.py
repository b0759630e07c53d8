"""Risk against coverage: cases worked out by hand, a slow loop, scikit-learn, and resampling frame by frame."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

import ensemble
from ensemble.judge.rejection import REJECTION_SCORES, Evidence, rejection_score, risk_coverage
from ensemble.outputs import About

LN2 = math.log(2)


def judged(confidence: Sequence[float], right: Sequence[int], groups: Sequence[int] | None = None) -> object:
    """One member of two classes that is so confident, and right where it says."""
    rows = np.array([[p, 1 - p] for p in confidence])
    return ensemble.MemberOutputs.from_probabilities({"a": rows}, labels=1 - np.array(right), groups=groups)


def by_loop(confidence: Sequence[float], right: Sequence[int], risk: float) -> tuple[float, float, float]:
    """Aurc, augrc and coverage by their definitions, threshold by threshold."""
    N = len(right)
    aurc = augrc = coverage = before = accepted_before = 0.0
    for threshold in sorted(set(confidence), reverse=True):
        accepted = sum(value >= threshold for value in confidence)
        errors = sum(value >= threshold and not good for value, good in zip(confidence, right, strict=True))
        step = (accepted - accepted_before) / N
        aurc += step * errors / accepted
        augrc += step * (errors / N + before / N) / 2
        coverage = accepted / N if errors / accepted <= risk else coverage
        before, accepted_before = errors, accepted
    return aurc, augrc, coverage


def random_outputs(frames: int = 400, members: int = 3, classes: int = 4, recordings: int = 20) -> object:
    """Members that are right more often than not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (frames,), generator=generator)
    logits = torch.randn(members, frames, classes, generator=generator)
    rows = (logits + 1.5 * torch.nn.functional.one_hot(labels, classes)).softmax(-1)
    names = {f"m{index}": row for index, row in enumerate(rows)}
    groups = torch.arange(frames) * recordings // frames
    return ensemble.MemberOutputs.from_probabilities(names, labels=labels, groups=groups)


def test_a_curve_worked_out_by_hand() -> None:
    """Confidences .9 right, .8 right and wrong, .7 right, .6 wrong: steps of 1, 2, 1 and 1 frames."""
    found = risk_coverage(judged([0.9, 0.8, 0.8, 0.7, 0.6], [1, 1, 0, 1, 0]), ensemble.mean, ["confidence"], risk=0.3)
    assert found.curves["coverage"].tolist() == [0.2, 0.6, 0.8, 1.0]
    assert found.curves["risk"].tolist() == [0, 1 / 3, 1 / 4, 2 / 5]
    assert found.curves["generalised_risk"].tolist() == [0, 0.2, 0.2, 0.4]
    row = found.scores.iloc[0]
    assert row["aurc"] == pytest.approx(0.2 * 0 + 0.4 / 3 + 0.2 / 4 + 0.2 * 2 / 5, rel=1e-12)
    assert row["augrc"] == pytest.approx(0.4 * 0.1 + 0.2 * 0.2 + 0.2 * 0.3, rel=1e-12)
    assert row["coverage"] == 0.8  # the second step is above 30 %, the third is not
    assert row["threshold"] == pytest.approx(0.7)
    assert (found.error, found.best, found.frames, found.recordings) == (0.4, "confidence", 5, 5)


@settings(max_examples=60, deadline=None)
@given(
    frames=st.lists(st.tuples(st.integers(5, 10), st.booleans()), min_size=1, max_size=40),
    risk=st.sampled_from([0.0, 0.05, 0.25, 0.5]),
)
def test_areas_equal_the_loop_over_thresholds(frames: list[tuple[int, bool]], risk: float) -> None:
    """With many ties; half sure frames are predicted as the first class."""
    confidence, right = [tenths / 10 for tenths, _ in frames], [int(good) for _, good in frames]
    found = risk_coverage(judged(confidence, right), ensemble.mean, ["confidence"], risk=risk, replicates=1).scores
    expected = by_loop(confidence, right, risk)
    np.testing.assert_allclose(found[["aurc", "augrc", "coverage"]].to_numpy()[0], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", REJECTION_SCORES)
def test_augrc_says_what_auroc_says(name: str) -> None:
    """Accuracy (1 - accuracy) (1 - AUROC) + (1 - accuracy)^2 / 2 (Traub et al., 2024), ties included."""
    outputs = random_outputs()
    found = risk_coverage(outputs, ensemble.mean, [name], replicates=1)
    rows = ensemble.mean(outputs.probabilities)
    right = (rows.argmax(-1) == outputs.labels).numpy()
    values = REJECTION_SCORES[name](Evidence(rows, outputs.probabilities)).float().numpy()
    accuracy, auroc = right.mean(), roc_auc_score(right, values)
    expected = accuracy * (1 - accuracy) * (1 - auroc) + (1 - accuracy) ** 2 / 2
    assert found.scores["augrc"][0] == pytest.approx(expected, rel=1e-9)


def test_without_ties_aurc_is_the_mean_of_the_risks() -> None:
    """Of the most trusted 1, 2, ... N frames, as Geifman and El-Yaniv have it."""
    outputs = random_outputs()
    rows = ensemble.mean(outputs.probabilities)
    wrong = (rows.argmax(-1) != outputs.labels).numpy()[np.argsort(-rows.amax(-1).numpy())]
    found = risk_coverage(outputs, ensemble.mean, ["confidence"], replicates=1).scores["aurc"][0]
    assert found == pytest.approx((np.cumsum(wrong) / np.arange(1, 401)).mean(), rel=1e-12)


def test_the_order_of_frames_does_not_matter() -> None:
    """Frames of one score are one step, and intervals do not see the order either."""
    outputs = random_outputs()
    mixed = outputs.at(torch.randperm(400, generator=torch.Generator().manual_seed(1)))
    first, second = (risk_coverage(each, ensemble.majority, replicates=50) for each in (outputs, mixed))
    np.testing.assert_allclose(first.scores.drop(columns="name"), second.scores.drop(columns="name"), rtol=1e-5)


def test_intervals_equal_those_of_resampled_recordings() -> None:
    """Draw whole recordings, and measure the curve of their frames anew."""
    outputs = random_outputs()
    found = risk_coverage(outputs, ensemble.mean, ["margin", "vote_share"], risk=0.1, replicates=80, seed=3).scores
    rows = ensemble.mean(outputs.probabilities)
    right = (rows.argmax(-1) == outputs.labels).numpy().astype(int)
    drawn = np.random.default_rng(3).integers(20, size=(80, 20))
    values = {
        name: REJECTION_SCORES[name](Evidence(rows, outputs.probabilities)).float().numpy() for name in found.name
    }
    areas = {name: [] for name in values}
    for picks in drawn:
        frames = np.concatenate([np.arange(20 * pick, 20 * pick + 20) for pick in picks])
        for name, own in values.items():
            areas[name].append(by_loop(own[frames].tolist(), right[frames].tolist(), 0.1))
    for index, name in enumerate(values):
        for column, area in enumerate(("aurc", "augrc", "coverage")):
            ends = np.quantile([each[column] for each in areas[name]], [0.025, 0.975])
            np.testing.assert_allclose(found.loc[index, [f"{area}_low", f"{area}_high"]].tolist(), ends, rtol=1e-9)
    behind = np.subtract(*(np.array(areas[name])[:, 1] for name in ("vote_share", "margin")))
    assert found.loc[1, ["behind_low", "behind_high"]].tolist() == pytest.approx(np.quantile(behind, [0.025, 0.975]))
    assert found.loc[0, ["behind", "behind_low", "behind_high"]].tolist() == [0, 0, 0]


def test_curves_of_many_steps_are_resampled_at_few() -> None:
    """The estimate is that of all steps, the interval about that of all steps, and the curve ends at coverage 1."""
    outputs = random_outputs(6000, recordings=30)
    found = risk_coverage(outputs, ensemble.mean, ["confidence"], replicates=100)
    rows = ensemble.mean(outputs.probabilities)
    right = (rows.argmax(-1) == outputs.labels).numpy()
    order, wrong = np.argsort(-rows.amax(-1).numpy()), ~right
    assert 400 < len(found.curves) <= 512
    assert found.curves["coverage"].iloc[-1] == 1
    every = (np.cumsum(wrong[order]) / np.arange(1, 6001)).mean()
    assert found.scores["aurc"][0] == pytest.approx(every, rel=1e-6)  # a few confidences are equal in float32
    drawn = np.random.default_rng(0).integers(30, size=(100, 30))
    times = np.stack([np.bincount(picks, minlength=30) for picks in drawn])[:, order // 200]  # (100, 6000)
    accepted, errors = times.cumsum(1), (times * wrong[order]).cumsum(1)
    aurc = (times * errors / np.maximum(accepted, 1)).sum(1) / accepted[:, -1]
    ends = found.scores.loc[0, ["aurc_low", "aurc_high"]].tolist()
    np.testing.assert_allclose(ends, np.quantile(aurc, [0.025, 0.975]), rtol=0.002)  # 512 steps instead of 6000


def test_each_score_worked_out_by_hand() -> None:
    """Two members on one frame: the rule says .6, .3, .1; one member votes with it, the other is torn."""
    members = torch.tensor([[[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]]])
    evidence = Evidence(torch.tensor([[0.6, 0.3, 0.1]]), members)
    expected = {
        "confidence": 0.6,
        "margin": 0.3,
        "entropy": 0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1),
        "mutual_information": 1.5 * LN2 - (2 * 0.375 * math.log(1 / 0.375) + 0.25 * math.log(4)),
        "vote_share": 0.5,
    }
    assert set(expected) == set(REJECTION_SCORES)
    for name, value in expected.items():
        assert REJECTION_SCORES[name](evidence).item() == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("name", REJECTION_SCORES)
def test_one_class_or_one_member_is_no_special_case(name: str) -> None:
    """Nothing to reject by is one step, whose risk is the error."""
    alone = ensemble.MemberOutputs.from_probabilities({"a": [[1.0], [1.0]]}, labels=[0, 0])
    assert risk_coverage(alone, ensemble.mean, [name]).scores["coverage"][0] == 1
    single = risk_coverage(judged([0.9, 0.8], [1, 0]), ensemble.mean, ["mutual_information", "vote_share"])
    assert single.scores["augrc"].tolist() == [0.25, 0.25]


def test_alike_members_have_no_disagreement_to_reject_by() -> None:
    """All frames are one step, whatever rounding does to equal rows."""
    rows = random_outputs().probabilities[0]
    outputs = ensemble.MemberOutputs.from_probabilities({"a": rows, "b": rows, "c": rows}, labels=[0] * 400)
    found = risk_coverage(outputs, ensemble.mean, ["mutual_information"])
    assert len(found.curves) == 1
    assert found.scores["augrc"][0] == pytest.approx(found.error / 2)


def test_members_that_abstain_are_left_out() -> None:
    """Where one answers, it alone is asked; frames that nobody answers are rejected first, all at once."""
    nothing = [math.nan, math.nan]
    a, b = [[0.9, 0.1], [0.8, 0.2], nothing, nothing], [nothing, [0.4, 0.6], nothing, nothing]
    outputs = ensemble.MemberOutputs.from_probabilities({"a": a, "b": b}, labels=[0, 0, 1, 0], abstain=True)
    found = risk_coverage(outputs, ensemble.mean)
    curves = {name: curve["risk"].tolist() for name, curve in found.curves.groupby("name")}
    assert curves == {name: [0, 0, 1 / 4] for name in REJECTION_SCORES}


def test_members_without_influence_are_not_asked() -> None:
    """A member of weight zero neither votes nor disagrees."""
    outputs = random_outputs()
    weighted = ensemble.WeightedMean([0.7, 0.3, 0.0], members=outputs.members)
    found = risk_coverage(outputs, weighted, replicates=50).scores
    two = ensemble.WeightedMean([0.7, 0.3], members=outputs.members[:2])
    expected = risk_coverage(outputs.subset(outputs.members[:2]), two, replicates=50).scores
    np.testing.assert_allclose(found.drop(columns="name"), expected.drop(columns="name"), rtol=1e-6)


def test_a_score_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One decorated function; the name of another's is refused, and so is what it returns in a wrong shape."""
    monkeypatch.setattr("ensemble.judge.rejection.REJECTION_SCORES", table := dict(REJECTION_SCORES))

    @rejection_score
    def second(evidence: Evidence) -> torch.Tensor:
        return -evidence.rows.topk(2, dim=1).values[:, 1]

    outputs = judged([0.9, 0.8, 0.7], [1, 1, 0])
    found = risk_coverage(outputs, ensemble.mean, ["confidence", "second"]).scores
    assert found["aurc"][0] == found["aurc"][1]
    assert set(risk_coverage(outputs, ensemble.mean).scores["name"]) == set(table)
    second.__name__ = "margin"
    with pytest.raises(ValueError, match="new name for a score, got 'margin'"):
        rejection_score(second)
    table["second"] = lambda evidence: evidence.rows
    with pytest.raises(ValueError, match=r"scores 'second' of shape \(3,\), got \(3, 2\)"):
        risk_coverage(outputs, ensemble.mean, ["second"])


def test_figures_that_are_too_good_are_noted() -> None:
    """A rule fitted here, a member trained here, and few recordings."""
    outputs = random_outputs(recordings=5)
    fitted = ensemble.fit_weights(outputs).rule
    notes = " ".join(risk_coverage(outputs, fitted, replicates=1).notes)
    assert "the rule was fitted on these frames" in notes
    assert "5 recordings are few" in notes
    about = {"m0": About(trained_on=outputs.fingerprint)}
    names = {f"m{index}": rows for index, rows in enumerate(outputs.probabilities)}
    trained = ensemble.MemberOutputs.from_probabilities(
        names, labels=outputs.labels, fingerprint=outputs.fingerprint, about=about
    )
    assert "training frames of m0" in risk_coverage(trained, ensemble.mean, replicates=1).notes[0]


def test_the_figure_draws_a_curve_for_each_score() -> None:
    """On the axes given, marked where the risk allows; of one step, and where nothing can be kept, too."""
    found = risk_coverage(random_outputs(), ensemble.mean, risk=0.1, replicates=1)
    ax = Figure().add_subplot()
    assert found.figure(ax) is ax
    lines = ax.lines[1:]  # the first is the risk asked for
    assert len(lines) == 2 * len(REJECTION_SCORES)
    curve = found.curves[found.curves["name"] == "confidence"]
    assert lines[0].get_xdata().tolist() == (100 * curve["coverage"]).tolist()
    assert lines[0].get_ydata().tolist() == (100 * curve["risk"]).tolist()
    assert lines[1].get_xdata()[0] == 100 * found.scores["coverage"][0]
    assert risk_coverage(judged([0.9], [0]), ensemble.mean, risk=0).figure().has_data()


def test_one_recording_has_no_interval() -> None:
    """And its JSON has None there."""
    found = risk_coverage(judged([0.9, 0.6], [1, 0], [3, 3]), ensemble.mean)
    row = found.to_json()["scores"][0]
    assert (row["augrc"], row["augrc_low"], row["coverage_high"]) == (0.125, None, None)
    assert "cannot be resampled" in found.notes[0]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda o: risk_coverage(o, ensemble.mean, "confidenec"), "no score named 'confidenec'; did you mean 'conf"),
        (lambda o: risk_coverage(o, ensemble.mean, [5]), "no score named 5; there are confidence"),
        (lambda o: risk_coverage(o, ensemble.mean, ["confidenec"]), "no score named 'confidenec'; did you mean 'conf"),
        (lambda o: risk_coverage(o, ensemble.mean, []), r"names of scores, .* got \[\]"),
        (lambda o: risk_coverage(o, ensemble.mean, risk=5), "risk from 0 to below 1 such as 0.05, .* and 5"),
        (lambda o: risk_coverage(o.at(torch.tensor([], dtype=torch.long)), ensemble.mean), "frames to judge scores on"),
        (lambda o: risk_coverage(o, lambda p: p[0, :, :1]), r"shape \(2, 2\) from the rule, got \(2, 1\)"),
        (
            lambda o: risk_coverage(ensemble.MemberOutputs(o.log_probabilities, ("a",), o.classes), ensemble.mean),
            "outputs with labels",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(ask: object, words: str) -> None:
    """With what was expected and what came."""
    with pytest.raises(ValueError, match=words):
        ask(judged([0.9, 0.8], [1, 0]))  # type: ignore[operator]
