"""Resampling recordings: bootstrap intervals against exact refits, cross-fitting against the plain loop."""

import numpy as np
import pytest
import torch
from conftest import recorded_outputs
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, RepeatedKFold, TimeSeriesSplit

import ensemble
from ensemble import fit_simplex_weights, fit_weights


def test_bootstrap_draws_recordings_and_starts_from_the_full_fit():
    """The same seed, the same draws; each replicate is a refit with its recordings counted."""
    outputs = recorded_outputs()
    found = ensemble.fit.bootstrap_weights(outputs, 20, seed=3)
    again = ensemble.fit.bootstrap_weights(outputs, 20, seed=3)
    np.testing.assert_array_equal(found.replicates, again.replicates)
    times = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30))[outputs.groups.numpy()]
    explicit = fit_weights(outputs, sample_weights=times)
    loss = lambda w: -times @ np.log(w @ outputs.true_class().numpy()) / times.sum()  # noqa: E731
    assert loss(found.replicates[0]) == pytest.approx(loss(explicit.weights), abs=1.1e-4)
    assert ((found.low <= found.high) & (found.inclusion >= 0) & (found.inclusion <= 1)).all()
    with pytest.raises(ValueError, match="at least one replicate"):
        ensemble.fit.bootstrap_weights(outputs, 0)


def test_bootstrap_intervals_of_members_that_are_alike_are_those_of_exact_refits():
    """All weights have nearly one loss there, so a refit that stops at a small gap would not move at all."""
    generator = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(200), 100), generator.integers(0, 10, 20_000)
    logits = generator.normal(size=(20_000, 10)) * 1.5
    logits[np.arange(20_000), labels] += 3
    softmax = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)  # noqa: E731
    rows = {name: softmax(logits + 0.01 * generator.normal(size=logits.shape)) for name in "abc"}
    outputs = ensemble.MemberOutputs.from_probabilities(rows, labels=labels, groups=groups)
    found = ensemble.fit.bootstrap_weights(outputs, 60, seed=1)
    draws, P = np.random.default_rng(1), outputs.true_class().numpy()
    times = [draws.multinomial(200, np.full(200, 1 / 200))[groups] for _ in range(60)]
    exact = np.stack([fit_simplex_weights(P, sample_weights=t, tolerance=1e-10).weights for t in times])
    np.testing.assert_allclose(found.replicates, exact, atol=0.01)
    np.testing.assert_allclose([found.low, found.high], np.quantile(exact, [0.025, 0.975], axis=0), atol=0.01)
    np.testing.assert_allclose(found.inclusion, (exact > 1e-3).mean(axis=0), atol=0.03)


def test_bootstrap_does_not_draw_recordings_without_a_positive_probability():
    """A draw of nothing else would have no weights at all."""
    rows = {"a": [[0.6, 0.4], [0.3, 0.7], [1.0, 0.0]], "b": [[0.7, 0.3], [0.4, 0.6], [1.0, 0.0]]}
    outputs = ensemble.MemberOutputs.from_probabilities(rows, labels=[0, 1, 1])
    kept = outputs.at(torch.tensor([0, 1]))
    np.testing.assert_array_equal(
        ensemble.fit.bootstrap_weights(outputs, 30).replicates, ensemble.fit.bootstrap_weights(kept, 30).replicates
    )


def test_cross_fitting_judges_recordings_by_weights_that_never_saw_them():
    """Whole recordings are held out, and the loss is that of the plain loop over folds."""
    outputs = recorded_outputs()
    found = ensemble.fit.cross_fit(outputs, 3)
    groups, P = outputs.groups.numpy(), outputs.true_class().numpy()
    assert all(len(set(found.fold[groups == g])) == 1 for g in set(groups))
    total = 0.0
    for k in range(3):
        inside = found.fold == k
        w = fit_simplex_weights(P[:, ~inside]).weights
        total -= np.log(w @ P[:, inside]).sum()
    assert found.loss == pytest.approx(total / 600, abs=1e-4)
    assert found.optimism > 0
    own = np.einsum("m,mnc->nc", ensemble.fit_weights(outputs).weights, outputs.probabilities.numpy())
    flattered = (own.argmax(axis=1) == outputs.require_labels().numpy()).mean()
    assert found.accuracy + found.optimism_accuracy == pytest.approx(flattered, abs=1e-9)
    with pytest.raises(ValueError, match="from 2 folds"):
        ensemble.fit.cross_fit(outputs, 31)


def test_cross_fitting_drops_and_counts_frames_without_a_positive_probability():
    """As the fit does: they are infinite whatever the weights."""
    rows = {"a": [[0.6, 0.4], [0.3, 0.7], [0.8, 0.2], [1, 0]], "b": [[0.7, 0.3], [0.4, 0.6], [0.5, 0.5], [1, 0]]}
    outputs = ensemble.MemberOutputs.from_probabilities(rows, labels=[0, 1, 0, 1])
    found = ensemble.fit.cross_fit(outputs, 2)
    assert found.dropped == fit_weights(outputs).dropped == 1
    pooled = (found.weights[found.fold].T * outputs.true_class().numpy()).sum(axis=0)
    assert found.loss == pytest.approx(-np.log(pooled[:3]).mean(), rel=1e-6)
    assert ensemble.fit.bootstrap_weights(outputs, 5).dropped == 1


@pytest.mark.parametrize("judge", [ensemble.fit.bootstrap_weights, ensemble.fit.cross_fit])
def test_members_with_nan_are_named(judge):
    """And the way out is one that exists."""
    outputs = recorded_outputs(M=2, N=200)
    outputs.log_probabilities[1, 7] = torch.nan
    with pytest.raises(ValueError, match=r"NaN from \['m1'\]; leave these members out \(--members, or"):
        judge(outputs)


@pytest.mark.filterwarnings("ignore:The groups parameter is ignored")
@pytest.mark.parametrize(
    "splitter", [GroupKFold(3), LeaveOneGroupOut(), RepeatedKFold(n_splits=2, n_repeats=3), TimeSeriesSplit(4)]
)
def test_cross_fitting_takes_any_splitter_of_scikit_learn(splitter):
    """Against the plain loop over its splits; frames tested often count often, frames never tested not at all."""
    outputs = recorded_outputs(M=3, N=240)
    splits = list(splitter.split(np.zeros(240), outputs.labels, outputs.groups))
    found = ensemble.fit.cross_fit(outputs, splitter=splits)
    P, p, labels = outputs.true_class().numpy(), outputs.probabilities.numpy(), outputs.require_labels().numpy()
    full = fit_weights(outputs).weights
    held_out, own, right = [], [], []
    for (train, test), weights in zip(splits, found.weights, strict=True):
        times = np.bincount(train, minlength=240)
        assert fit_simplex_weights(P, sample_weights=times).loss == pytest.approx(
            -(times @ np.log(weights @ P)) / times.sum(), abs=2e-6
        )
        held_out.append(-np.log(weights @ P[:, test]))
        own.append(-np.log(full @ P[:, test]))
        right.append(np.einsum("m,mnc->nc", weights, p[:, test]).argmax(axis=1) == labels[test])
    assert found.loss == pytest.approx(np.concatenate(held_out).mean(), rel=1e-9)
    assert found.optimism == pytest.approx(found.loss - np.concatenate(own).mean(), abs=1e-9)
    assert found.accuracy == pytest.approx(np.concatenate(right).mean(), abs=1e-9)
    assert (found.fold >= 0).sum() == len(set(np.concatenate([test for _, test in splits])))
    if not isinstance(splitter, RepeatedKFold):  # it draws anew
        assert ensemble.fit.cross_fit(outputs, splitter=splitter).loss == found.loss


def test_a_splitter_without_splits_is_refused():
    """An empty list of splits, for instance."""
    with pytest.raises(ValueError, match="expected a splitter with splits of these frames, got none"):
        ensemble.fit.cross_fit(recorded_outputs(M=2, N=60), splitter=[])


@pytest.mark.parametrize("objective", ["nll", "brier", "accuracy", "macro_f1"])
def test_the_metric_fitted_for_is_judged_on_recordings_left_out(objective):
    """Fold by fold, with the weights of that fold's own fit; optimism is what the weights of all frames add."""
    outputs = recorded_outputs(N=200)
    found = ensemble.fit.cross_fit(outputs, 3, objective=objective)
    whole = ensemble.fit_weights(outputs, objective)
    rows = np.empty(outputs.shape[1:])
    for k in range(3):
        rest = ensemble.fit_weights(outputs.at(torch.from_numpy(found.fold != k)), objective)
        np.testing.assert_allclose(found.weights[k], rest.weights, atol=2e-3)
        here = torch.from_numpy(found.fold == k)
        rows[found.fold == k] = ensemble.WeightedMean(found.weights[k])(outputs.probabilities.double()[:, here])
    assert found.metric == whole.metric
    value = ensemble.judge.score(rows, outputs.labels, found.metric)
    full = ensemble.judge.score(whole.rule(outputs.probabilities.double()), outputs.labels, found.metric)
    assert found.value == pytest.approx(value, abs=1e-6)
    sign = 1 if ensemble.judge.METRICS[found.metric].higher else -1
    assert found.optimism_value == pytest.approx(sign * (full - value), abs=1e-6)


@pytest.mark.parametrize("objective", ["brier", "accuracy"])
def test_weights_of_every_objective_have_their_spread(objective):
    """Intervals around them, from fits of their own."""
    outputs = recorded_outputs(N=120)
    found = ensemble.fit.bootstrap_weights(outputs, 8, objective=objective)
    assert found.weights.tolist() == ensemble.fit_weights(outputs, objective).weights.tolist()
    np.testing.assert_allclose(found.replicates.sum(axis=1), 1)
    assert (found.low <= found.high).all()
    assert np.ptp(found.replicates, axis=0).max() > 0
