"""Weights from outputs: by log-loss, by Brier score, for each class, of the log-linear pool."""

import numpy as np
import pytest
import torch
from conftest import recorded_outputs
from scipy.optimize import minimize

import ensemble
from ensemble import fit_weights


def test_fit_weights_reports_the_loss_of_the_pool_it_describes():
    """WeightedMean with these weights has that log-loss; names and fingerprint come along."""
    outputs = recorded_outputs()
    fit = fit_weights(outputs)
    pooled = ensemble.WeightedMean(fit.weights)(outputs.probabilities.double())
    assert -pooled.log()[range(600), outputs.labels].mean().item() == pytest.approx(fit.loss, rel=1e-5)
    assert fit.members == outputs.members
    assert fit.fingerprint == outputs.fingerprint
    assert set(fit.support) == {n for n, w in zip(fit.members, fit.weights, strict=True) if w > 0}


def test_order_of_members_does_not_matter():
    """Permuted members, permuted weights."""
    outputs = recorded_outputs()
    turned = outputs.subset(outputs.members[::-1])
    np.testing.assert_allclose(
        fit_weights(turned, tolerance=1e-11).weights[::-1], fit_weights(outputs, tolerance=1e-11).weights, atol=1e-5
    )


def test_logarithms_too_small_for_any_float_still_count():
    """A frame with log-probabilities of -1000 and -1001 weighs like any other."""
    logs = torch.tensor([[[-1000.0, 0.0], [-0.1, -2.4]], [[-1001.0, 0.0], [-0.5, -0.9]]], dtype=torch.float64)
    outputs = ensemble.MemberOutputs(logs, ("a", "b"), ("x", "y"), labels=torch.tensor([0, 0]))
    fit = fit_weights(outputs)
    assert fit.weights.tolist() == [1.0, 0.0]
    assert fit.loss == pytest.approx(1000.1 / 2, rel=1e-9)
    assert fit.dropped == 0


@pytest.mark.parametrize("objective", ["nll", "brier"])
def test_members_with_nan_are_refused_or_get_weight_zero(objective):
    """The message names the member; dropped, it changes nothing for the others."""
    outputs = recorded_outputs()
    logs = outputs.log_probabilities.clone()
    logs[2, 7] = float("nan")
    broken = ensemble.MemberOutputs(logs, outputs.members, outputs.classes, labels=outputs.labels)
    with pytest.raises(ValueError, match=r"NaN from \['m2'\]"):
        fit_weights(broken, objective)
    with pytest.warns(UserWarning, match="m2"):
        fit = fit_weights(broken, objective, on_nan="drop")
    rest = fit_weights(outputs.subset(["m0", "m1", "m3", "m4"]), objective)
    assert fit.weights[2] == 0
    np.testing.assert_allclose(np.delete(fit.weights, 2), rest.weights, atol=1e-6)
    assert np.isfinite(ensemble.WeightedMean(fit.weights)(broken.probabilities).numpy()).all()


def test_brier_weights_agree_with_scipy_and_their_gap_bounds_the_truth():
    """The moment matrix gives the Brier score of the pool exactly, and SLSQP the same minimum."""
    outputs = recorded_outputs()
    p, onehot = outputs.probabilities.double().numpy(), np.eye(4)[outputs.labels.numpy()]
    score = lambda w: ((np.einsum("m,mnc->nc", w, p) - onehot) ** 2).sum(axis=1).mean()  # noqa: E731
    found = minimize(
        score,
        np.full(5, 0.2),
        method="SLSQP",
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14},
    )
    fit = fit_weights(outputs, "brier")
    assert fit.loss == pytest.approx(score(fit.weights), rel=1e-9)
    assert -1e-12 <= found.fun - fit.loss + fit.gap <= 1e-6
    assert fit.gap <= 1e-9


def test_an_unknown_objective_or_missing_labels_are_refused():
    """With the names that exist, and the way out."""
    outputs = recorded_outputs()
    with pytest.raises(ValueError, match="no objective named 'acuracy'; did you mean 'accuracy'"):
        fit_weights(outputs, "acuracy")
    with pytest.raises(ValueError, match="with labels"):
        fit_weights(ensemble.MemberOutputs(outputs.log_probabilities, outputs.members, outputs.classes))


def test_log_linear_fit_is_a_minimum_and_matches_its_rule():
    """LogPool of these exponents has that loss; no neighbour is better; it beats every member."""
    outputs = recorded_outputs()
    fit = ensemble.fit.fit_log_linear(outputs)
    loss = lambda w: -ensemble.rules.LogPool(w)(outputs.probabilities.double()).log()[range(600), outputs.labels].mean()  # noqa: E731
    assert loss(fit.weights).item() == pytest.approx(fit.loss, rel=1e-5)
    assert fit.slope < 1e-5
    for m in range(5):
        for change in (-1e-2, 1e-2):
            assert loss(np.maximum(fit.weights + change * np.eye(5)[m], 0)) >= fit.loss - 1e-6
        assert loss(np.eye(5)[m]) >= fit.loss


def test_log_linear_fit_and_rule_agree_where_a_member_gives_zero():
    """A member of zeros and ones, right on nine frames of ten: neither lets it veto; the losses agree."""
    generator = np.random.default_rng(0)
    labels, logits = generator.integers(0, 4, 2000), generator.normal(size=(2000, 4))
    logits[np.arange(2000), labels] += 1.5
    soft = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    hard = np.eye(4)[np.where(generator.random(2000) < 0.9, labels, generator.integers(0, 4, 2000))]
    outputs = ensemble.MemberOutputs.from_probabilities({"soft": soft, "hard": hard}, labels=labels)
    fit = ensemble.fit.fit_log_linear(outputs)
    pooled = ensemble.rules.LogPool(fit.weights)(outputs.probabilities.double())
    assert -pooled.log()[range(2000), labels].mean().item() == pytest.approx(fit.loss, rel=1e-6)
    judged = ensemble.evaluate(outputs, {"log": ensemble.rules.LogPool(fit.weights), "mean": ensemble.mean})
    loss = judged.rules.set_index("name")["log_loss"]
    assert loss["log"] == pytest.approx(fit.loss, rel=1e-4)
    assert loss["log"] < loss["mean"]


def test_class_weights_shrink_to_the_common_ones():
    """A strong pull leaves the common weights; a weak one fits its own frames at least as well."""
    outputs = recorded_outputs()
    strong = ensemble.fit.fit_class_weights(outputs, strength=1e9)
    np.testing.assert_allclose(strong.weights, np.tile(strong.common, (4, 1)), atol=1e-3)
    weak = ensemble.fit.fit_class_weights(outputs, strength=1.0)
    p = outputs.probabilities
    np.testing.assert_allclose(weak.rule(p).sum(dim=-1), 1.0, rtol=1e-5)
    loss = lambda rule: -rule(p).log()[range(600), outputs.labels].mean().item()  # noqa: E731
    assert loss(weak.rule) <= loss(ensemble.WeightedMean(weak.common)) + 1e-6
    with pytest.raises(ValueError, match="positive number of frames"):
        ensemble.fit.fit_class_weights(outputs, strength=0)


DECISIONS = ["accuracy", "macro_f1"]


@pytest.mark.parametrize("metric", DECISIONS)
def test_weights_for_decisions_beat_every_member_and_lie_within_their_gap_of_all_weights(metric):
    """On a grid of all weights of three members; the loss is that of the rule."""
    outputs = recorded_outputs(M=3, N=60)
    p, labels = outputs.probabilities.double(), outputs.labels.numpy()
    judged = lambda w: 1 - ensemble.judge.score(ensemble.WeightedMean(w)(p), labels, metric)  # noqa: E731
    fit = fit_weights(outputs, metric)
    assert judged(fit.weights) == pytest.approx(fit.loss, abs=1e-12)
    assert fit.loss <= min(judged(w) for w in np.eye(3)) + 1e-12
    grid = [(a, b, 20 - a - b) for a in range(21) for b in range(21 - a)]
    assert fit.loss - fit.gap <= min(judged(w) for w in grid) + 1e-12
    assert 0 <= fit.gap < fit.loss
    assert np.isnan(fit.multipliers).all()


def test_frames_lost_to_every_pool_prove_weights_for_decisions_optimal():
    """All members are wrong in the same way on one frame of three, and one is right on the others."""
    good, bad = [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], [[0.4, 0.6], [0.4, 0.6], [0.4, 0.6]]
    outputs = ensemble.MemberOutputs.from_probabilities({"good": good, "bad": bad}, labels=[0, 1, 0])
    fit = fit_weights(outputs, "accuracy")
    assert (fit.loss, fit.gap) == (pytest.approx(1 / 3), 0.0)
    macro = fit_weights(outputs, "macro_f1")
    assert macro.loss == pytest.approx(1 - (2 / 3 + 2 / 3) / 2)
    assert macro.loss - macro.gap == pytest.approx(1 - (2 / 3 + 1) / 2)  # as if the lost frame were predicted as none


@pytest.mark.parametrize("objective", ["nll", "brier", *DECISIONS])
def test_sample_weights_are_repeated_frames_for_every_objective(objective):
    """Zeros leave frames out."""
    outputs = recorded_outputs(M=4, N=80)
    times = np.random.default_rng(0).integers(0, 4, 80)
    weighted = fit_weights(outputs, objective, sample_weights=times)
    repeated = fit_weights(outputs.at(torch.from_numpy(np.repeat(np.arange(80), times))), objective)
    np.testing.assert_allclose(weighted.weights, repeated.weights, atol=2e-3)
    assert weighted.loss == pytest.approx(repeated.loss, abs=2e-6)
    assert weighted.gap == pytest.approx(repeated.gap, abs=2e-6)


def test_what_decisions_do_not_offer_is_refused_and_a_member_with_nan_left_out():
    """No pull towards equal weights; weight 0 with a warning."""
    outputs = recorded_outputs(M=3, N=60)
    with pytest.raises(ValueError, match="alpha 0 for accuracy"):
        fit_weights(outputs, "accuracy", alpha=0.1)
    logs = outputs.log_probabilities.clone()
    logs[1, 7] = torch.nan
    holes = ensemble.MemberOutputs(logs, outputs.members, outputs.classes, outputs.labels)
    with pytest.raises(ValueError, match="got NaN from"):
        fit_weights(holes, "macro_f1")
    with pytest.warns(UserWarning, match="get weight 0"):
        found = fit_weights(holes, "macro_f1", on_nan="drop")
    assert found.weights[1] == 0


def test_log_loss_is_a_name_of_the_default_objective():
    """The same weights, the same proof."""
    outputs = recorded_outputs()
    first, second = fit_weights(outputs), fit_weights(outputs, "log_loss")
    assert first.weights.tolist() == second.weights.tolist()
    assert (first.metric, first.gap) == (second.metric, second.gap)
