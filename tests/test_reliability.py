"""Calibration error, Brier score and its parts: scikit-learn and the slow loop as oracles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

import ensemble
from ensemble.judge import reliability


def confident(frames: int = 600, classes: int = 4, *, seed: int = 0) -> ensemble.MemberOutputs:
    """One member that is often right and more confident than that."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (frames,), generator=generator)
    hint = torch.nn.functional.one_hot(labels, classes) * 2.0
    rows = (torch.randn(frames, classes, generator=generator) * 2 + hint).softmax(-1)
    return ensemble.MemberOutputs.from_probabilities({"m": rows}, labels=labels)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), frames=st.integers(1, 80), bins=st.integers(1, 20))
def test_calibration_error_equals_the_loop(seed: int, frames: int, bins: int) -> None:
    """Bin by bin: share of frames times distance of accuracy from confidence."""
    o = confident(frames, seed=seed)
    rows, labels = o.probabilities[0].double(), o.require_labels()
    confidence, top = rows.max(-1)
    expected = 0.0
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        if inside.any():
            right = (top == labels)[inside].double().mean()
            expected += inside.double().mean().item() * abs(right - confidence[inside].mean()).item()
    found = ensemble.judge.expected_calibration_error(rows, labels, bins=bins)
    assert found == pytest.approx(expected, abs=1e-12)


SCORES = [
    ensemble.fit.fit_temperature,
    ensemble.judge.expected_calibration_error,
    ensemble.judge.brier_score,
    ensemble.judge.murphy,
]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("rows", "labels", "words"),
    [
        ([[2.0, -3.0, 1.5]] * 3, [0, 1, 2], r"sum to one, got a row with sum 0.5 .* softmax"),
        ([[math.nan] * 3] * 3, [0, 1, 2], "leave those frames out"),
        ([[0.2, 0.3, 0.5]] * 3, [5, -1, 7], "labels from 0 to 2, got -1 to 7"),
        ([[0.2, 0.3, 0.5]] * 3, [0.9, 0.2, 1.7], r"labels as whole numbers, got \[0.2, 0.9, 1.7\]"),
    ],
)
def test_what_is_no_distribution_or_no_label_is_refused(score, rows, labels, words) -> None:  # type: ignore[no-untyped-def]
    """Logits, NaN, and labels of another set of classes would give a plausible number."""
    with pytest.raises(ValueError, match=words):
        score(np.array(rows), np.array(labels))


@given(bins=st.integers(1, 2000), data=st.data())
def test_every_bin_holds_its_upper_end(bins: int, data: st.DataObject) -> None:
    """Where rounding puts k / bins x bins above k, too: 7 / 25."""
    k = data.draw(st.integers(1, bins))
    assert reliability.bin_sums([k / bins], [1], bins=bins)[0, k - 1] == 1
    assert reliability.bin_sums([7 / 25], [1], bins=25)[0, 6] == 1
    with pytest.raises(ValueError, match="one bin or more, got 0"):
        reliability.bin_sums([0.5], [1], bins=0)


def test_ends_of_bins_belong_to_the_lower_bin() -> None:
    """Confidence one half of two bins lies in the first, one in the last, zero in the first."""
    frames = reliability.bin_sums([0.5, 1.0, 0.0], [1, 1, 0], bins=2)[0]
    assert frames.tolist() == [2, 1]


def test_brier_score_equals_scikit_learn() -> None:
    """Several classes, unscaled."""
    o = confident()
    rows, labels = o.log_probabilities[0].double().softmax(-1).numpy(), o.require_labels().numpy()
    expected = brier_score_loss(labels, rows, labels=range(4), scale_by_half=False)
    assert ensemble.judge.brier_score(rows, labels) == pytest.approx(expected, rel=1e-6)


def test_murphy_by_hand() -> None:
    """Two confidences, .6 right half the time and .9 always; one bin each, so nothing is left within."""
    rows = [[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]]
    parts = ensemble.judge.murphy(rows, [0, 1, 0, 0])
    assert parts.reliability == pytest.approx((0.1**2 + 0.1**2) / 2)
    assert parts.resolution == pytest.approx(0.25**2)
    assert parts.uncertainty == pytest.approx(0.75 * 0.25)
    assert parts.within == pytest.approx(0, abs=1e-12)


def test_murphys_parts_add_up() -> None:
    """Their sum is the mean squared distance of confidence from right or wrong."""
    o = confident()
    confidence, top = o.probabilities[0].double().max(-1)
    score = (confidence - (top == o.labels).double()).square().mean().item()
    assert ensemble.judge.murphy(o.probabilities[0], o.labels).score == pytest.approx(score, rel=1e-9)


def test_no_frames_have_no_score() -> None:
    """NaN, not an error."""
    rows = torch.empty(0, 3)
    assert math.isnan(ensemble.judge.expected_calibration_error(rows, []))
    assert math.isnan(ensemble.judge.brier_score(rows, []))
    assert math.isnan(ensemble.judge.murphy(rows, []).score)
    with pytest.raises(ValueError, match=r"labels of shape \(2,\) .*, got \(3,\)"):
        ensemble.judge.brier_score([[0.5, 0.5]] * 2, [0, 1, 0])
