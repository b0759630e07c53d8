"""Prediction sets: cases worked out by hand, the definition as a slow loop, coverage by simulation."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import ensemble
from ensemble.fit import PredictionSets, fit_prediction_sets
from ensemble.fit.conformal import SET_SCORES, set_score
from ensemble.judge.reliability import set_coverage
from ensemble.outputs import About


def outputs_of(true_class: Any, groups: Any = None) -> ensemble.MemberOutputs:
    """One member of two classes that gives the true class, the first, so much."""
    p = np.asarray(true_class, dtype=float)
    rows = np.stack([p, 1 - p], axis=1)
    return ensemble.MemberOutputs.from_probabilities({"a": rows}, labels=np.zeros(len(p), int), groups=groups)


def by_loop(scores: list[float], groups: list[int], coverage: Fraction) -> float:
    """The weighted quantile of hierarchical conformal prediction, in exact arithmetic."""
    K = len(set(groups))
    weights = [Fraction(1, (K + 1) * groups.count(group)) for group in groups]
    for value in sorted(scores):
        if sum(weight for score, weight in zip(scores, weights, strict=True) if score <= value) >= coverage:
            return value
    return math.inf


def test_a_threshold_worked_out_by_hand() -> None:
    """Recordings of 1, 2 and 1 frames weigh 1/4 each, and the new one too: 0.7 is reached at the last but one."""
    outputs = outputs_of([0.9, 0.8, 0.6, 0.7], groups=["a", "b", "b", "c"])
    # scores .1 (1/4), .2 (1/8), .3 (1/4), .4 (1/8): sums of 2/8, 3/8, 5/8, 6/8
    for coverage, score in ((0.25, 0.1), (0.26, 0.2), (0.6, 0.3), (0.625, 0.3), (0.63, 0.4), (0.75, 0.4)):
        assert fit_prediction_sets(outputs, ensemble.mean, coverage).threshold == pytest.approx(score, abs=1e-6)
    fitted = fit_prediction_sets(outputs, ensemble.mean, 0.6)
    assert fitted.sets([[0.7001, 0.2999], [0.65, 0.35], [0.2, 0.8]]).tolist() == [[1, 0], [0, 0], [0, 1]]
    assert (fitted.recordings, fitted.classes, fitted.fingerprint) == (3, ("0", "1"), outputs.fingerprint)


@settings(max_examples=60, deadline=None)
@given(
    frames=st.lists(st.tuples(st.integers(1, 19), st.integers(0, 5)), min_size=3, max_size=40),
    twentieths=st.integers(1, 19),
)
def test_the_threshold_is_the_weighted_quantile(frames: list[tuple[int, int]], twentieths: int) -> None:
    """With ties, and recordings of any lengths; the right-hand side of an equality counts."""
    p, groups = [twentieth / 20 for twentieth, _ in frames], [group for _, group in frames]
    scores = [1 - float(row[0]) for row in outputs_of(p).probabilities[0].double()]
    expected = by_loop(scores, groups, Fraction(twentieths, 20))
    if expected == math.inf:
        with pytest.raises(ValueError, match="recordings or more to fit sets that cover"):
            fit_prediction_sets(outputs_of(p, groups), ensemble.mean, twentieths / 20)
    else:
        assert fit_prediction_sets(outputs_of(p, groups), ensemble.mean, twentieths / 20).threshold == expected


SIMULATED = {  # recordings to fit on, spread within one relative to between, whether long ones are easier
    "frames of a recording are equal": (99, 0.0, True),
    "strong effects, long recordings easier": (19, 1.0, True),
    "strong effects, few recordings of any length": (20, 0.2, False),
    "as few as can be": (9, 0.5, True),
}


@pytest.mark.parametrize("case", SIMULATED)
def test_sets_cover_new_recordings_and_naive_ones_do_not(case: str) -> None:
    """At 90 % asked; naive: all frames as exchangeable, the sets that one gets without groups."""
    K, within, easier = SIMULATED[case]
    generator, trials = np.random.default_rng(0), 300

    def draw(recordings: int) -> tuple[np.ndarray, np.ndarray]:
        """The probability of the true class of each frame, and its recording."""
        effect, other = generator.normal(size=(2, recordings))
        frames = np.clip(20 * np.exp(-(effect if easier else other)), 2, 200).astype(int)
        groups = np.repeat(np.arange(recordings), frames)
        return 1 / (1 + np.exp(effect[groups] + within * generator.normal(size=len(groups)))), groups

    covered = np.empty((trials, 2))
    for trial in range(trials):
        fitting, new, groups = *(outputs_of(*draw(K)),), *draw(30)
        for column, outputs in enumerate((fitting, replace(fitting, groups=None))):
            held = fit_prediction_sets(outputs, ensemble.mean).sets(np.stack([new, 1 - new], axis=1))[:, 0]
            covered[trial, column] = (np.bincount(groups, held) / np.bincount(groups)).mean()
    (ours, naive), error = covered.mean(axis=0), 3 * covered.std(axis=0) / math.sqrt(trials)
    assert 0.9 - error[0] <= ours <= 0.9 + 2 / (K + 1) + error[0]
    assert naive < 0.9 - error[1]
    if within == 0:  # the guarantee is met exactly, so that no sets that hold for all recordings can be smaller
        assert abs(ours - 0.9) <= error[0]


def test_the_scores_by_hand() -> None:
    """The second class of .5, .3, .2 enters after .5, or at 1 - .3; equal classes enter together."""
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.2, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(SET_SCORES["lac"](rows), 1 - rows)
    expected = torch.tensor([[0, 0.5, 0.8], [0, 0.8, 0]], dtype=torch.float64)
    torch.testing.assert_close(SET_SCORES["aps"](rows), expected)


@pytest.mark.parametrize("score", SET_SCORES)
def test_sets_grow_with_the_coverage_and_follow_the_classes(score: str) -> None:
    """Nested, and permuted as the classes are; a more probable class enters no later."""
    generator = torch.Generator().manual_seed(0)
    rows = (2 * torch.randn(60, 5, generator=generator)).softmax(-1)
    labels = torch.multinomial(rows, 1, generator=generator)[:, 0]
    outputs = ensemble.MemberOutputs.from_probabilities({"a": rows}, labels=labels, groups=torch.arange(60) // 3)
    before = np.zeros((60, 5), dtype=bool)
    for coverage in (0.3, 0.6, 0.8, 0.9, 0.95):
        fitted = fit_prediction_sets(outputs, ensemble.mean, coverage, score=score)
        held = fitted.sets(rows)
        assert (held >= before).all()
        assert (fitted.sets(rows[:, [3, 0, 4, 1, 2]]) == held[:, [3, 0, 4, 1, 2]]).all()
        inside, outside = (np.where(each, rows.numpy(), fill) for each, fill in ((held, 2), (~held, -1)))
        assert (inside.min(axis=1) > outside.max(axis=1)).all()
        before = held
    assert (
        score != "aps" or (fit_prediction_sets(outputs, ensemble.mean, 0.1, score=score).sets(rows).any(axis=1)).all()
    )


def test_sets_are_judged_by_recording_and_by_class() -> None:
    """Three recordings of 1, 2 and 3 frames, of two classes."""
    fitted = fit_prediction_sets(outputs_of([0.4] * 3), ensemble.mean, 0.75)  # a class of .4 or more is in the set
    p = np.array([0.5, 0.9, 0.1, 0.9, 0.5, 0.3])
    rows = np.stack([p, 1 - p], axis=1)
    outputs = ensemble.MemberOutputs.from_probabilities(
        {"a": rows}, labels=[0, 0, 0, 1, 1, 1], groups=[5, 6, 6, 7, 7, 7]
    )
    found = fitted.judge(outputs)
    assert found.by_recording["coverage"].tolist() == pytest.approx([1, 0.5, 2 / 3])
    assert found.by_recording["size"].tolist() == pytest.approx([2, 1, 4 / 3])
    assert found.recordings.estimate == pytest.approx((1 + 0.5 + 2 / 3) / 3)
    assert found.recordings.low <= found.recordings.estimate <= found.recordings.high
    assert found.frames.estimate == pytest.approx(4 / 6)
    assert found.size.estimate == pytest.approx(8 / 6)
    assert (found.empty, found.single) == (0, pytest.approx(4 / 6))
    assert found.classes.to_dict("records") == [
        {"name": "0", "frames": 3, "coverage": pytest.approx(2 / 3), "size": pytest.approx(4 / 3)},
        {"name": "1", "frames": 3, "coverage": pytest.approx(2 / 3), "size": pytest.approx(4 / 3)},
    ]
    assert found.notes == ("3 recordings are few to resample: intervals are too narrow",)


def test_a_class_without_frames_has_no_coverage() -> None:
    """NaN, no frames, and no point in the figure."""
    outputs = outputs_of([0.9, 0.8])
    found = fit_prediction_sets(outputs, ensemble.mean, 0.5).judge(outputs)
    assert found.classes["frames"].tolist() == [2, 0]
    assert math.isnan(found.classes["coverage"][1])
    ax = Figure().add_subplot()
    assert found.figure(ax) is ax
    assert ax.collections[0].get_offsets().tolist() == [[100, 0]]
    assert ax.lines[0].get_xdata() == [50, 50]  # what was asked for
    assert not set_coverage(outputs, [[True, False]] * 2).figure().lines


def test_sets_judged_where_they_were_fitted_are_marked() -> None:
    """And so is a rule that was fitted on the same frames, or a member that was trained on them."""
    outputs = outputs_of([0.9, 0.8, 0.7, 0.6])
    assert fit_prediction_sets(outputs_of([0.9] * 6), ensemble.mean, 0.5).notes == ()
    assert fit_prediction_sets(outputs_of([0.9] * 29), ensemble.mean).notes[0].startswith("29 recordings are few")
    assert fit_prediction_sets(outputs_of([0.9] * 30), ensemble.mean).notes == ()
    assert (
        "the sets were fitted on these frames"
        in fit_prediction_sets(outputs, ensemble.mean, 0.5).judge(outputs).notes[0]
    )
    fitted = fit_prediction_sets(outputs, ensemble.fit_weights(outputs).rule, 0.5)
    assert fitted.notes[0] == "the rule was fitted on these frames: its figures are optimistic"
    trained = replace(outputs, about=(About(trained_on=outputs.fingerprint),))
    assert "training frames of a" in fit_prediction_sets(trained, ensemble.mean, 0.5).notes[0]


def test_the_rule_finds_its_members_and_leaves_out_those_that_abstain() -> None:
    """Sets go with their rule: by name, in any order."""
    p = [[0.9, 0.1], [math.nan, math.nan]]
    outputs = ensemble.MemberOutputs.from_probabilities(
        {"a": p, "b": [[0.5, 0.5], [0.7, 0.3]]}, labels=[0, 0], abstain=True
    )
    rule = ensemble.WeightedMean([3, 1], members=("a", "b"))
    fitted = fit_prediction_sets(outputs, rule, 0.5)  # .8 and .7 for the true class
    assert fitted.threshold == pytest.approx(0.3)
    assert fitted.judge(outputs.subset(["b", "a"])).frames.estimate == 1


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (
            lambda o: fit_prediction_sets(o, ensemble.mean, 0.9),
            "9 recordings or more .* cover 0.9, got 2; .* most 0.666$",
        ),
        (lambda o: fit_prediction_sets(o, ensemble.mean, 90), "coverage between 0 and 1, for instance 0.9, got 90"),
        (lambda o: fit_prediction_sets(o, ensemble.mean, 0.5, score="raps"), "no score named 'raps'.*aps, lac"),
        (lambda o: fit_prediction_sets(replace(o, labels=None), ensemble.mean), "outputs with labels"),
        (
            lambda o: fit_prediction_sets(o, ensemble.mean, 0.5).sets([[0.2, 0.3, 0.5]]),
            "probabilities of 2 classes, .* got 3",
        ),
        (lambda o: fit_prediction_sets(o, ensemble.mean, 0.5).sets([[0.2, 0.3]]), "sum to one of the rule"),
        (
            lambda o: fit_prediction_sets(o, ensemble.mean, 0.5).judge(o.at(torch.zeros(0, dtype=torch.long))),
            r"sets of shape \(0, 2\), for one frame or more",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(ask: Callable[[ensemble.MemberOutputs], object], words: str) -> None:
    """With what was expected and what came."""
    with pytest.raises(ValueError, match=words):
        ask(outputs_of([0.9, 0.8]))


def test_a_score_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One decorated function; the name of another's is refused."""
    monkeypatch.setattr("ensemble.fit.conformal.SET_SCORES", dict(SET_SCORES))

    @set_score
    def rank(probabilities: torch.Tensor) -> torch.Tensor:
        return (probabilities[:, None] > probabilities[..., None]).sum(dim=-1).double()

    fitted: PredictionSets = fit_prediction_sets(outputs_of([0.9, 0.8, 0.3]), ensemble.mean, 0.75, score="rank")
    assert fitted.threshold == 1
    rank.__name__ = "lac"
    with pytest.raises(ValueError, match="new name for a score, got 'lac'"):
        set_score(rank)
