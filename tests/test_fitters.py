"""`FITTERS`, what every fit gives and refuses; Bayes votes counted by hand, stacking against autograd."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import nats, overconfident_outputs
from torch import Tensor

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
    "fit_weights, accuracy": lambda outputs: ensemble.fit_weights(outputs, "accuracy"),
    "fit_weights, macro F1": lambda outputs: ensemble.fit_weights(outputs, "macro_f1"),
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
    "greedy, macro F1": lambda outputs: ensemble.greedy(outputs, metric="macro_f1"),
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


def test_bayes_vote_counts_by_hand() -> None:
    """One member predicts 0, 0, 1 where the truth is 0, 1, 1: with half a count added everywhere."""
    rows = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]
    o = ensemble.MemberOutputs.from_probabilities({"a": rows}, labels=[0, 1, 1])
    rule = ensemble.fit.fit_bayes_vote(o)
    expected = [[1.5 / 2, 1.5 / 3], [0.5 / 2, 1.5 / 3]]  # predicted, then true
    np.testing.assert_allclose(np.exp(rule.log_likelihoods[0]), expected, rtol=1e-12)
    np.testing.assert_allclose(np.exp(rule.log_priors), [1.5 / 4, 2.5 / 4], rtol=1e-12)


def test_bayes_vote_learns_whom_to_believe() -> None:
    """A member that swaps two classes is as good as one that does not."""
    o = overconfident_outputs(1, 500, 3)
    swapped = o.probabilities[0][:, [1, 0, 2]]
    wrong = ensemble.MemberOutputs.from_probabilities({"a": swapped}, labels=o.labels)
    straight, turned = ensemble.fit.fit_bayes_vote(o), ensemble.fit.fit_bayes_vote(wrong)
    torch.testing.assert_close(straight(o.probabilities), turned(wrong.probabilities))


@pytest.mark.parametrize("classes", [2, 4])
def test_stacking_finds_the_least_that_autograd_finds(classes: int) -> None:
    """The objective written out, in doubles: log-loss plus half the strength times the distance from `log_mean`."""
    o = overconfident_outputs(2, 300, classes)
    labels, logs = o.require_labels(), o.probabilities.double().log()
    centre = torch.eye(classes, dtype=torch.float64).expand(2, -1, -1) / 2  # (M, C given, C)
    slopes, intercepts = centre.clone().requires_grad_(), torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([slopes, intercepts], max_iter=200, line_search_fn="strong_wolfe")

    def rows() -> Tensor:
        return (torch.einsum("mnc,mck->nk", logs, slopes) + intercepts).softmax(-1)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -rows()[torch.arange(300), labels].log().mean() + 0.3 / 2 * (slopes - centre).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    found = ensemble.fit.fit_stacked(o, strength=0.3)(o.probabilities.double())
    torch.testing.assert_close(found, rows().detach(), rtol=0, atol=1e-2)  # it stops at 1e-7 of the loss


def test_stacking_on_few_frames_is_no_worse_than_the_members_together() -> None:
    """Fewer frames than coefficients; a ridge a thousand times weaker fails here."""
    fitted, fresh = overconfident_outputs(8, 400, 10, seed=1), overconfident_outputs(8, 4000, 10, seed=2)
    labels = fresh.require_labels()
    loss = nats(ensemble.fit.fit_stacked(fitted)(fresh.probabilities), labels)
    assert loss < nats(ensemble.mean(fresh.probabilities), labels)
    assert loss < nats(ensemble.log_mean(fresh.probabilities), labels)


def test_the_strength_of_stacking_does_not_depend_on_the_number_of_frames() -> None:
    """Every frame twice gives the same rule; without end, it gives the geometric mean of balanced classes."""
    o = overconfident_outputs(2, 300)
    twice = o.at(torch.arange(300).repeat(2))
    p = o.probabilities
    torch.testing.assert_close(ensemble.fit.fit_stacked(twice)(p), ensemble.fit.fit_stacked(o)(p), rtol=0, atol=1e-3)
    slopes = torch.tensor(ensemble.fit.fit_stacked(o, strength=1e6).coefficients)  # (C, M, C)
    torch.testing.assert_close(slopes, (torch.eye(4) / 2)[:, None].expand(-1, 2, -1), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="positive strength, got -1"):
        ensemble.fit.fit_stacked(o, strength=-1)


def test_stacking_says_when_it_stopped_early() -> None:
    """A note that names the way out, instead of another library's; none where the iterations suffice."""
    o = overconfident_outputs(2, 100)
    with pytest.warns(RuntimeWarning, match="on 100 frames stopped after 2 iterations: raise max_iterations or stren"):
        ensemble.fit.fit_stacked(o, max_iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble.fit.fit_stacked(o)


def test_stacking_rules_out_classes_never_seen() -> None:
    """Labels 0 and 2 of three: class 1 gets nothing."""
    o = overconfident_outputs(2, 200, 3)
    labels = torch.where(o.require_labels() == 1, 2, o.require_labels())
    seen = ensemble.MemberOutputs.from_probabilities(dict(zip("ab", o.probabilities, strict=True)), labels=labels)
    rows = ensemble.fit.fit_stacked(seen)(o.probabilities)
    assert rows[:, 1].max() < 1e-12
    assert ((rows.argmax(-1) == labels).double().mean() > 0.6).item()


@pytest.mark.parametrize("fit", [ensemble.fit.fit_bayes_vote, ensemble.fit.fit_stacked])
def test_fits_need_frames(fit: object) -> None:
    """Nothing is fitted on nothing."""
    empty = ensemble.MemberOutputs.from_probabilities({"a": torch.empty(0, 2)}, labels=torch.empty(0).long())
    with pytest.raises(ValueError, match="expected frames to fit on, got none"):
        fit(empty)  # type: ignore[operator]


def test_stacking_needs_two_classes() -> None:
    """With one class there is nothing to decide."""
    o = ensemble.MemberOutputs.from_probabilities({"a": [[0.5, 0.5]]}, labels=[1], classes=["x", "y"])
    with pytest.raises(ValueError, match="two classes or more to stack on, got only 'y'"):
        ensemble.fit.fit_stacked(o)
