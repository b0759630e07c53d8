"""`FITTERS`, what every fit gives, and what every fit refuses in the same words."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import ensemble
from ensemble import fit_weights
from ensemble.fit import FITTERS


def some_outputs(seed: int = 0) -> ensemble.MemberOutputs:
    """Three members of unequal worth over ten recordings."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, 200)
    rows = {}
    for member, skill in (("a", 0.5), ("b", 1.5), ("c", 1.0)):
        logits = generator.normal(size=(200, 3))
        logits[np.arange(200), labels] += skill
        rows[member] = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return ensemble.MemberOutputs.from_probabilities(rows, labels=labels, groups=np.arange(200) // 20)


FITS = {
    "fit_weights": ensemble.fit_weights,
    "fit_weights, Brier": lambda outputs: ensemble.fit_weights(outputs, "brier"),
    "fit_class_weights": ensemble.fit.fit_class_weights,
    "fit_log_linear": ensemble.fit.fit_log_linear,
    "fit_temperature": ensemble.fit.fit_temperature,
    "fit_temperature of a rule": lambda outputs: ensemble.fit.fit_temperature(
        outputs, rule=ensemble.fit_weights(outputs).rule
    ),
    "fit_pool_temperatures": ensemble.fit.fit_pool_temperatures,
    "fit_bayes_vote": ensemble.fit.fit_bayes_vote,
    "fit_stacked": ensemble.fit.fit_stacked,
    "select": lambda outputs: ensemble.select(outputs, np.inf),
    "greedy": ensemble.greedy,
}


@pytest.mark.parametrize("name", FITS)
def test_every_fit_has_a_rule_that_knows_its_frames_and_members(name: str) -> None:
    """Members in another order, beside a stranger, make no difference, and JSON keeps it all."""
    outputs = some_outputs()
    rule = FITS[name](outputs).rule
    assert rule.fingerprint == outputs.fingerprint
    assert set(rule.members) <= set(outputs.members)
    assert rule.has_numbers
    assert "" not in rule.fingerprints
    p = outputs.probabilities
    expected = ensemble.rules.rule_for(rule, outputs.members)(p)
    turned = ensemble.rules.rule_for(rule, ["c", "x", "a", "b"])(p[[2, 0, 0, 1]])
    torch.testing.assert_close(turned, expected)
    assert ensemble.rules.rule_from_json(ensemble.rules.rule_to_json(rule)) == rule


@pytest.mark.parametrize("name", FITTERS)
def test_fitters_give_distributions_from_other_frames(name: str) -> None:
    """Fitted on one set, applied to another; the table has them by the names of the commands."""
    rule = ensemble.rules.rule_for(FITTERS[name](some_outputs()), ["a", "b", "c"])
    rows = rule(some_outputs(1).probabilities)
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(200))
    assert {"weighted", "calibrated", "log_pool", "bayes_vote", "stacked", "auto"} <= set(FITTERS)


def test_fits_of_bare_numbers_know_nothing_of_their_origin() -> None:
    """`fit_simplex_weights` sees a matrix only."""
    outputs = some_outputs()
    rule = ensemble.fit_simplex_weights(outputs.true_class()).rule
    assert (rule.fingerprint, rule.members, rule.has_numbers) == ("", (), True)


def test_auto_takes_a_single_member_where_no_rule_is_better() -> None:
    """One member that is always right: the choice is its weight alone, known to come from all these frames."""
    labels = np.arange(40) % 2
    sure, poor = np.eye(2)[labels] * 0.8 + 0.1, np.full((40, 2), 0.5)
    outputs = ensemble.MemberOutputs.from_probabilities(
        {"poor": poor, "sure": sure}, labels=labels, groups=np.arange(40) // 4
    )
    expected = ensemble.WeightedMean([0, 1], outputs.fingerprint, members=("poor", "sure"))
    assert FITTERS["auto"](outputs) == expected


def test_auto_needs_two_recordings() -> None:
    """One half to fit on, the other to choose on."""
    p = [[0.9, 0.1], [0.2, 0.8]]
    outputs = ensemble.MemberOutputs.from_probabilities({"a": p}, labels=[0, 1], groups=[0, 0])
    with pytest.raises(ValueError, match="two recordings or more for 'auto', got 1"):
        FITTERS["auto"](outputs)


def test_a_fitter_of_ones_own_enters_the_table_once() -> None:
    """`@fitter` keeps the name and refuses to shadow a built-in one."""

    @ensemble.fit.fitter
    def favourite(outputs: ensemble.MemberOutputs) -> ensemble.rules.FittedRule:
        return ensemble.WeightedMean([1, 0, 0], outputs.fingerprint)

    def weighted(outputs: ensemble.MemberOutputs) -> ensemble.rules.FittedRule:
        return favourite(outputs)

    try:
        assert FITTERS["favourite"] is favourite
        with pytest.raises(ValueError, match="new name for a rule, got 'weighted'"):
            ensemble.fit.fitter(weighted)
    finally:
        del FITTERS["favourite"]


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


def test_naming_the_fitters_loads_no_tables():
    """Commands that only list rules wait neither for pandas nor for scikit-learn."""
    code = "import sys, ensemble; ensemble.fit.FITTERS; print({'pandas', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
