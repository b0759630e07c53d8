"""Greedy selection, against the plain loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import some_outputs

import ensemble
from ensemble import greedy


def plain_loop(outputs, rounds):
    p, y = outputs.probabilities.double().numpy(), outputs.labels.numpy()
    rows, total, picks = np.arange(len(y)), np.zeros(p.shape[1:]), []
    for k in range(rounds):
        hits = [int(((total + q).argmax(axis=1) == y).sum()) for q in p]
        with np.errstate(divide="ignore"):
            losses = [-np.log((total + q)[rows, y] / (k + 1)).mean() for q in p]
        m = min(range(len(p)), key=lambda m: (-hits[m], losses[m], m))
        total += p[m]
        picks.append(outputs.members[m])
    return tuple(picks)


@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_picks_what_the_plain_loop_picks(seed, decimals):
    """In the same order, ties included."""
    outputs = some_outputs(6, seed=seed, decimals=decimals)
    assert greedy(outputs, 15).picks == plain_loop(outputs, 15)
    assert greedy(outputs, 15, sample_weights=np.ones(300)).picks == plain_loop(outputs, 15)  # another state, weighted


@pytest.mark.parametrize("layout", ["together", "apart", "frames first", "classes first"])
def test_greedy_reads_members_where_they_lie(layout):
    """Frames that no pick left can flip are let go on the way, whichever way the numbers lie in memory."""
    outputs = some_outputs(12, N=1500, C=6)
    logs = outputs.log_probabilities
    padded = torch.zeros(12, 1500 * 6 + 7)
    padded[:, :-7] = logs.flatten(1)
    laid = {
        "together": logs,
        "apart": padded.as_strided((12, 1500, 6), (1500 * 6 + 7, 6, 1)),
        "frames first": logs.transpose(0, 1).contiguous().transpose(0, 1),
        "classes first": logs.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }[layout]
    assert torch.equal(laid, logs)
    found = greedy(replace(outputs, log_probabilities=laid), 40)
    assert found.picks == plain_loop(outputs, 40)
    assert greedy(replace(outputs, log_probabilities=laid), 40, sample_weights=np.ones(1500)).picks == found.picks
    picked = outputs.probabilities.double()[[outputs.members.index(name) for name in found.picks]]
    right = picked.cumsum(dim=0).argmax(dim=-1) == outputs.labels
    assert found.accuracies.tolist() == right.double().mean(dim=1).tolist()


def judged(metric, rows, labels):
    """More is better."""
    return ensemble.judge.METRICS[metric].goods(ensemble.judge.score(rows, labels, metric))


@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "log_loss", "brier"])
def test_every_metric_is_picked_for_as_the_plain_loop_does(metric, decimals):
    """Value by value."""
    outputs = some_outputs(5, N=150, seed=4, decimals=decimals)
    p, y = outputs.probabilities.double().numpy(), outputs.labels.numpy()
    found, total = greedy(outputs, 12, metric=metric), np.zeros(p.shape[1:])
    for k, name in enumerate(found.picks):
        values = [judged(metric, (total + q) / (k + 1), y) for q in p]
        m = outputs.members.index(name)
        assert values[m] == pytest.approx(max(values), abs=1e-9)
        assert ensemble.judge.METRICS[metric].goods(found.values[k]) == pytest.approx(values[m], abs=1e-6)
        total += p[m]
    assert found.metric == metric
    assert found.value == (max if ensemble.judge.METRICS[metric].higher else min)(found.values)
    assert np.isnan(found.accuracy) == (metric != "accuracy")


def test_picks_stay_among_those_allowed():
    """Here never more than two different members."""
    outputs = some_outputs(6)
    found = greedy(outputs, 20, allowed=lambda chosen: chosen if chosen.sum() == 2 else np.ones(6, dtype=bool))
    assert len(set(found.picks)) <= 2
    assert found.accuracy >= greedy(outputs, 1).accuracy


def test_an_own_metric_of_decisions_is_picked_for_and_one_of_frames_is_refused():
    """Balanced accuracy is as good as any; a mean over frames would take a loop over all of them."""
    try:

        @ensemble.judge.metric(ensemble.judge.Counts)
        def balanced(counts):
            return (counts.hits / counts.true).mean(axis=-1)

        @ensemble.judge.metric(ensemble.judge.Answers)
        def certainty(answers):
            return answers.rows.max(axis=1)

        outputs = some_outputs(4)
        assert greedy(outputs, 5, metric="balanced").value >= greedy(outputs, 1, metric="balanced").value
        assert ensemble.fit_weights(outputs, "balanced").gap == np.inf
        with pytest.raises(ValueError, match="a metric of Counts to pick by, got 'certainty'"):
            greedy(outputs, metric="certainty")
    finally:
        for name in ("balanced", "certainty"):
            ensemble.judge.METRICS.pop(name, None)


def test_greedy_is_at_least_as_accurate_as_the_best_member_and_the_simplex_fits_better():
    """Accuracy: greedy >= best member. Log-loss: simplex <= greedy."""
    outputs = some_outputs(6)
    found = greedy(outputs, 15)
    right = (outputs.log_probabilities.argmax(dim=-1) == outputs.labels).double().mean(dim=1)
    assert found.accuracy >= right.max()
    assert ensemble.fit_weights(outputs).loss <= found.loss + 1e-6
    assert found.weights.sum() == pytest.approx(1.0)
    pooled = ensemble.WeightedMean(found.weights)(outputs.probabilities.double())
    assert (pooled.argmax(dim=-1) == outputs.labels).double().mean().item() == pytest.approx(found.accuracy)
    with pytest.raises(ValueError, match="at least one round"):
        greedy(outputs, 0)
