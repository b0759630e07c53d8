"""How far fitted weights can be trusted: recordings drawn again, and losses on recordings held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble.fit._solver.rows import Rows
from ensemble.fit._solver.simplex import settle
from ensemble.fit.weights import Objective, explained_matrix, fit_weights, labelled
from ensemble.judge.significance import CrossFit
from ensemble.outputs import MemberOutputs

Array = NDArray[np.float64]

_PRESENT = 1e-3  # a weight above this counts as the member being included
_SETTLED = 1e-3


@dataclass(frozen=True, eq=False)
class WeightIntervals:
    """Weights with what resampling the recordings does to them; the small ones are often noise.

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
    outputs: MemberOutputs, replicates: int = 200, *, seed: int = 0, level: float = 0.95
) -> WeightIntervals:
    """Intervals and inclusion frequencies of log-loss weights, recordings drawn with replacement.

    Each replicate is a refit from the full fit's weights, until another step would move them by less than
    0.001. Frames that every member gives zero are left out, and so are recordings of nothing else.

    Args:
        outputs: with labels and groups (recordings); without groups, frames are drawn.
        replicates: R.
        seed: of the draws.
        level: of the percentile intervals.

    Raises:
        ValueError: no labels, NaN, no usable frame, no replicate, or a level outside (0, 1).

    References:
        Field and Welsh, "Bootstrapping clustered data", JRSS B 69(3), 2007.
    """
    if replicates < 1 or not 0 < level < 1:
        msg = f"expected at least one replicate and a level in (0, 1), got {replicates} and {level}"
        raise ValueError(msg)
    P, _, alive = explained_matrix(outputs)
    fit = fit_weights(outputs)
    recording, count = _numbered(recordings(outputs)[0][alive])
    rows = Rows(P[:, alive].astype(np.float32, copy=False))
    for _ in rows.blocks(np.float32):  # checks the frames once for all replicates
        pass
    generator = np.random.default_rng(seed)
    drawn = np.empty((replicates, len(outputs.members)))
    for r in range(replicates):
        times = generator.multinomial(count, np.full(count, 1.0 / count)).astype(np.float64)
        drawn[r] = settle(rows.reweighted(times[recording]), start=fit.weights, within=_SETTLED)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    inclusion = (drawn > _PRESENT).mean(axis=0)
    return WeightIntervals(outputs.members, fit.weights, low, high, inclusion, drawn, level, fit.dropped)


def cross_fit(
    outputs: MemberOutputs, folds: int = 5, *, objective: Objective = "nll", alpha: float = 0.0, seed: int = 0
) -> CrossFit:
    """Log-loss and accuracy of fitted weights on recordings that the fit did not see.

    Args:
        outputs: with labels and groups; whole recordings are dealt out to the folds.
        folds: at least two, and no more than there are recordings.
        objective: see `fit_weights`.
        alpha: see `fit_weights`.
        seed: of the dealing.

    Raises:
        ValueError: no labels, NaN, no usable frame, or a number of folds that cannot be.
    """
    recording, count = recordings(outputs)
    if not 2 <= folds <= count:
        msg = f"expected from 2 folds to as many as there are recordings ({count}), got {folds}"
        raise ValueError(msg)
    P, log_scale, alive = explained_matrix(outputs)
    fold = np.random.default_rng(seed).permutation(np.arange(count) % folds)[recording]
    full = fit_weights(outputs, objective, alpha=alpha)
    weights = np.stack(
        [
            fit_weights(
                outputs, objective, alpha=alpha, sample_weights=(fold != k).astype(float), start=full.weights
            ).weights
            for k in range(folds)
        ]
    )
    with np.errstate(divide="ignore"):
        held_out = -(np.log(np.einsum("nm,mn->n", weights[fold], P, dtype=np.float64)) + log_scale)[alive].mean()
        seen = -(np.log(full.weights @ P) + log_scale)[alive].mean()
    accuracy = _accuracy(outputs, weights[fold])
    flattered = _accuracy(outputs, np.broadcast_to(full.weights, (len(fold), len(full.weights))))
    optimism, dropped = float(held_out - seen), int((~alive).sum())
    return CrossFit(float(held_out), accuracy, optimism, flattered - accuracy, weights, fold, dropped)


def recordings(outputs: MemberOutputs) -> tuple[NDArray[np.intp], int]:
    """(N,) running number of each frame's recording, and how many there are."""
    labelled(outputs)
    groups = np.arange(outputs.shape[1]) if outputs.groups is None else outputs.groups.numpy()
    return _numbered(groups)


def _numbered(groups: NDArray[np.intp]) -> tuple[NDArray[np.intp], int]:
    distinct, number = np.unique(groups, return_inverse=True)
    return number, len(distinct)


def _accuracy(outputs: MemberOutputs, weights: Array) -> float:
    """Fraction right of the pools with (N, M) weights."""
    labels, right = outputs.require_labels().numpy(), 0
    for where, block in outputs.blocks(8192):
        pooled = np.einsum("nm,mnc->nc", weights[where], block.numpy())
        right += int((pooled.argmax(axis=1) == labels[where]).sum())
    return right / len(labels)
