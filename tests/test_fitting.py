"""What every fit refuses, in the same words."""

import numpy as np
import pytest
import torch

import ensemble
from ensemble import fit_weights


def outputs_of_two():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    return ensemble.MemberOutputs.from_probabilities({"a": p, "b": p[:, ::-1].copy()}, labels=[0, 1, 1])


@pytest.mark.parametrize(
    "fit",
    [
        fit_weights,
        lambda outputs: fit_weights(outputs, "brier"),
        ensemble.fit.fit_class_weights,
        ensemble.fit.fit_log_linear,
        ensemble.fit.bootstrap_weights,
        ensemble.fit.cross_fit,
        ensemble.greedy,
        lambda outputs: ensemble.select(outputs, np.inf),
        lambda outputs: ensemble.selection.pareto_front(outputs, {"a": 1, "b": 2}),
    ],
)
def test_no_frames_are_refused_by_every_fit(fit):
    """In the same words."""
    empty = ensemble.MemberOutputs(torch.empty(2, 0, 3), ("a", "b"), tuple("xyz"), labels=torch.empty(0).long())
    with pytest.raises(ValueError, match="expected frames to fit on, got none"):
        fit(empty)


def test_log_linear_fit_names_the_member_that_says_nan():
    """Leaving it out needs its name."""
    outputs = outputs_of_two()
    outputs.log_probabilities[1, 2] = torch.nan
    with pytest.raises(ValueError, match="from member 'b', got NaN at frame 2"):
        ensemble.fit.fit_log_linear(outputs)


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (lambda outputs: fit_weights(outputs, "brier", alpha=-1), "alpha of at least 0, got -1"),
        (lambda outputs: fit_weights(outputs, "brier", tolerance=np.nan), "tolerance of at least 0, got nan"),
        (lambda outputs: ensemble.fit.fit_log_linear(outputs, ridge=-1), "ridge of at least 0, got -1"),
        (lambda outputs: ensemble.select(outputs, np.inf, tolerance=-1), "tolerance of at least 0, got -1"),
        (lambda outputs: ensemble.fit.fit_stacked(outputs, strength=0), "a positive strength, got 0"),
        (lambda outputs: ensemble.fit.fit_stacked(outputs, floor=0), "a positive floor, got 0"),
        (lambda outputs: ensemble.fit.fit_bayes_vote(outputs, smoothing=0), "a positive smoothing, got 0"),
    ],
)
def test_settings_out_of_range_are_named(fit, words):
    """Before anything is fitted."""
    with pytest.raises(ValueError, match=words):
        fit(outputs_of_two())
