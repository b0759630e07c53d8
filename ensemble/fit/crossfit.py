"""How far fitted weights can be trusted: weights of resampled recordings, and losses on recordings held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ensemble.fit._solver import Array, labelled, settle
from ensemble.fit._solver.newton import Indices, Rows
from ensemble.fit.weights import Objective, explained_matrix, fit_weights
from ensemble.judge.metrics import METRICS, Answers
from ensemble.judge.significance import CrossFit
from ensemble.outputs import MemberOutputs, expect_outputs

_PRESENT = 1e-3  # a weight above this counts as the member being included
_SETTLED = 1e-3
_FRAMES = 8192  # judged together


@dataclass(frozen=True, eq=False)
class WeightIntervals:
    """Weights with their spread over resampled recordings; small weights are often noise.

    Attributes:
        members: M names.
        weights: (M,) fitted on all recordings.
        low, high: (M,) percentile interval of each weight.
        inclusion: (M,) the fraction of replicates in which the weight exceeds 0.001.
        replicates: (R, M) the weights of each replicate.
        level: nominal coverage of the interval.
        dropped: frames left out because every member gave the true class exactly zero.
    """

    members: tuple[str, ...]
    weights: Array
    low: Array
    high: Array
    inclusion: Array
    replicates: Array
    level: float
    dropped: int = 0


def bootstrap_weights(
    outputs: MemberOutputs, replicates: int = 200, *, objective: Objective = "nll", seed: int = 0, level: float = 0.95
) -> WeightIntervals:
    """Intervals and inclusion frequencies of fitted weights, with recordings drawn with replacement.

    Each replicate of log-loss weights is refitted from the full fit's weights, until another step would move them by
    less than 0.001; for other objectives it is a fit of its own, so that fewer replicates may have to do. Frames to
    whose true class every member gives zero are left out, and so are recordings of nothing else.

    Args:
        outputs: with labels and groups (recordings); without groups, frames are drawn.
        replicates: R, the number of resamples.
        objective: see `fit_weights`.
        seed: seed of the resampling.
        level: nominal coverage of the percentile intervals.

    Raises:
        ValueError: no labels, NaN, no usable frame, no replicate, or a level outside (0, 1).

    References:
        Field and Welsh, "Bootstrapping clustered data", JRSS B 69(3), 2007.
    """
    expect_outputs(outputs)
    if replicates < 1 or not 0 < level < 1:
        msg = f"expected at least one replicate and a level in (0, 1), got {replicates} and {level}"
        raise ValueError(msg)
    P, _, alive = explained_matrix(outputs)
    fit = fit_weights(outputs, objective)
    assert outputs.groups is not None  # filled in when made
    distinct, recording = np.unique(outputs.groups.numpy()[alive], return_inverse=True)
    count = len(distinct)
    rows = Rows(P[:, alive].astype(np.float32, copy=False))
    for _ in rows.blocks(np.float32):  # checks the frames once for all replicates
        pass
    generator = np.random.default_rng(seed)
    drawn = np.empty((replicates, len(outputs.members)))
    for r in range(replicates):
        times = generator.multinomial(count, np.full(count, 1.0 / count)).astype(np.float64)
        if fit.metric == "log_loss":
            drawn[r] = settle(rows.reweighted(times[recording]), start=fit.weights, within=_SETTLED)
        else:
            every = np.zeros(len(alive))
            every[alive] = times[recording]
            drawn[r] = fit_weights(outputs, objective, sample_weights=every).weights
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    inclusion = (drawn > _PRESENT).mean(axis=0)
    return WeightIntervals(outputs.members, fit.weights, low, high, inclusion, drawn, level, fit.dropped)


def cross_fit(
    outputs: MemberOutputs,
    folds: int = 5,
    *,
    splitter: Any = None,
    objective: Objective = "nll",
    alpha: float = 0.0,
    seed: int = 0,
) -> CrossFit:
    """Log-loss, accuracy and the metric fitted for, of fitted weights on recordings that the fit did not see.

    Args:
        outputs: with labels and groups; whole recordings are dealt out to the folds.
        folds: at least two, and no more than there are recordings.
        splitter: a scikit-learn splitter, or pairs of training and test indices, in place of such folds; it is
            given the labels and the groups. Frames that no split tests are left out of all figures; frames that
            several splits test count once for each.
        objective, alpha: see `fit_weights`.
        seed: seed of the dealing.

    Raises:
        ValueError: no labels, NaN, no usable frame, a number of folds that is too small or too large, or a splitter
            without splits.

    Example:
        >>> from sklearn.model_selection import LeaveOneGroupOut
        >>> p, q = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]], [[0.6, 0.4], [0.7, 0.3], [0.6, 0.4]]
        >>> outputs = MemberOutputs.from_probabilities({"p": p, "q": q}, labels=[0, 0, 1], groups=[0, 1, 2])
        >>> cross_fit(outputs, splitter=LeaveOneGroupOut()).accuracy
        1.0
    """
    expect_outputs(outputs)
    splits = _splits(outputs, folds, splitter, seed)
    P, log_scale, alive = explained_matrix(outputs)
    labels, whole = labelled(outputs), fit_weights(outputs, objective, alpha=alpha)
    full, metric = whole.weights, METRICS[whole.metric]
    times = [np.bincount(train, minlength=len(alive)) for train, _ in splits]
    fits = [fit_weights(outputs, objective, alpha=alpha, sample_weights=own, start=full) for own in times]

    def answers(pools: Array) -> Iterator[Answers]:
        """Those of pools (splits, M), each on the test frames of its split."""
        for own, (_, test) in zip(pools, splits, strict=True):
            for part in torch.split(torch.from_numpy(test), _FRAMES):
                rows = np.einsum("m,mnc->nc", own, outputs.log_probabilities[:, part].float().exp().numpy())
                yield Answers(rows, labels[part].numpy(), rows.argmax(axis=1))

    def judged(pools: Array) -> tuple[float, float, float]:
        """Log-loss, accuracy, and the metric fitted for."""
        nats = []
        for own, (_, test) in zip(pools, splits, strict=True):
            kept = test[alive[test]]
            with np.errstate(divide="ignore"):
                nats.append(-(np.log(np.einsum("m,mn->n", own, P[:, kept], dtype=np.float64)) + log_scale[kept]))
        known = {"log_loss": float(np.concatenate(nats).mean()), "accuracy": METRICS["accuracy"].over(answers(pools))}
        value = known[metric.name] if metric.name in known else metric.over(answers(pools))
        return known["log_loss"], known["accuracy"], value

    weights, fold = np.stack([fit.weights for fit in fits]), np.full(len(alive), -1)
    for k in reversed(range(len(splits))):
        fold[splits[k][1]] = k
    loss, accuracy, value = judged(weights)
    full_loss, full_accuracy, full_value = judged(np.tile(full, (len(splits), 1)))
    dropped = int((~alive & (fold >= 0)).sum())
    optimism_value = full_value - value if metric.higher else value - full_value
    found = loss, accuracy, loss - full_loss, full_accuracy - accuracy, weights, fold, dropped
    return CrossFit(*found, metric=metric.name, value=value, optimism_value=optimism_value)


def _splits(outputs: MemberOutputs, folds: int, splitter: Any, seed: int) -> list[tuple[Indices, Indices]]:
    """Indices of training and test frames; without a splitter whole recordings are dealt out to folds at random."""
    labels, groups = labelled(outputs).numpy(), outputs.groups
    assert groups is not None  # filled in when made
    if splitter is None:
        distinct, recording = np.unique(groups.numpy(), return_inverse=True)
        count = len(distinct)
        if not 2 <= folds <= count:
            msg = f"expected from 2 folds to as many as there are recordings ({count}), got {folds}"
            raise ValueError(msg)
        fold = np.random.default_rng(seed).permutation(np.arange(count) % folds)[recording]
        return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(folds)]
    from sklearn.model_selection import check_cv  # takes a second to import

    splits = list(check_cv(splitter).split(np.zeros(len(labels)), labels, groups.numpy()))
    if not splits:
        msg = f"expected a splitter with splits of these frames, got none from {splitter!r}"
        raise ValueError(msg)
    return splits
