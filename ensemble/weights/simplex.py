"""`fit_simplex_weights`: the weights of the best linear pool, with a certificate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # it ships no types

from ensemble.weights.newton import View, look, step
from ensemble.weights.rows import Rows, as_matrix

Array = NDArray[np.float64]

_CLOSE = 0.98  # members whose d exceeds this take part in the next step


@dataclass(frozen=True, eq=False)
class SimplexFit:
    """Weights on the simplex and the proof of how good they are.

    Attributes:
        weights: (M,) float64, non-negative, summing to one.
        loss: mean of -log(w P) over the frames kept, in nats (without the shrinkage term).
        gap: the objective is at most this far above its minimum, in nats; computed in float64.
        passes: how often the frames were read, partial reads included.
        multipliers: (M,) d_m = mean(P_m / (w P)): 1 on the support, at most 1 elsewhere, up to the gap.
        support: indices of the members with a positive weight.
        dropped: frames left out because every member gave the true class exactly zero.
    """

    weights: Array
    loss: float
    gap: float
    passes: float
    multipliers: Array
    support: tuple[int, ...]
    dropped: int


def fit_simplex_weights(
    P: object,
    *,
    alpha: float = 0.0,
    sample_weights: object | None = None,
    start: object | None = None,
    tolerance: float = 1e-6,
    max_passes: int = 100,
    seed: int = 0,
) -> SimplexFit:
    """Weights w on the simplex that minimise -mean(log(w P)), with an upper bound of what is left.

    Args:
        P: (M, N) each member's probability of the true class; array or tensor. Scaling a frame's column
            changes nothing but the loss.
        alpha: pull towards equal weights: M pseudo-frames, each right for one member only, with weight
            alpha N / M; 0 for none.
        sample_weights: (N,) non-negative; integers act as repeated frames.
        start: (M,) weights to begin from (a warm start); members at zero may come back.
        tolerance: stop when the certified gap is at most this, in nats.
        max_passes: stop after so many reads of the frames, whatever the gap then is.
        seed: of the choice of frames on which the start is solved.

    Returns:
        The fit. Of exactly equal members the first one carries the weight of all.

    Raises:
        ValueError: shapes, NaN, infinite or negative numbers, or no frame with a positive probability.

    Example:
        >>> fit_simplex_weights([[0.9, 0.1], [0.1, 0.9]]).weights.round(6).tolist()
        [0.5, 0.5]

    References:
        Kim et al., "A fast algorithm for maximum likelihood estimation of mixture proportions using
        sequential quadratic programming", JCGS 29(2), 2020.
    """
    values = as_matrix(P)
    weights = None if sample_weights is None else checked_weights(sample_weights, values.shape[1])
    if not 0 <= alpha < np.inf:
        msg = f"expected alpha of at least 0, got {alpha}"
        raise ValueError(msg)
    begin = None if start is None else _start(start, len(values))
    with _controller().limit(limits=1, user_api="blas"):
        distinct, first = _distinct(values)
        reduced = values if len(distinct) == len(values) else values[distinct]
        if begin is not None:
            begin = np.bincount(first, begin, len(values)).astype(np.float64)[distinct]
        if alpha:  # duplicates are pulled apart by the shrinkage: keep them
            distinct, reduced, begin = (
                np.arange(len(values)),
                values,
                None if start is None else _start(start, len(values)),
            )
        rows = Rows(reduced, weights)
        view, passes = _solve(rows, begin, alpha=alpha, tolerance=tolerance, max_passes=max_passes, seed=seed)
    full, d = np.zeros(len(values)), np.ones(len(values))
    full[distinct] = view.weights
    d[distinct] = view.d
    if not alpha:
        d = d[first]
    return SimplexFit(full, view.loss, view.gap, passes, d, tuple(np.flatnonzero(full).tolist()), rows.dropped)


def _solve(
    rows: Rows, begin: Array | None, *, alpha: float, tolerance: float, max_passes: float, seed: int
) -> tuple[View, float]:
    passes, M = 0.0, rows.members
    small = rows.frames * M <= 2**16
    active: NDArray[np.intp] = np.arange(M)
    w = np.full(M, 1.0 / M)
    if begin is not None:
        w = (begin + 1e-3 / M) / (begin.sum() + 1e-3) if alpha or not begin.all() else begin / begin.sum()
    elif rows.frames >= 8192:
        sample = _sample(rows, seed)
        found, read = _solve(sample, None, alpha=alpha, tolerance=1e-3, max_passes=30, seed=seed)
        passes += read * sample.frames / rows.frames
        w = 0.999 * found.weights + 0.001 / M
        active = np.arange(M) if alpha else np.flatnonzero(found.d > 0.95)
        w[np.setdiff1d(np.arange(M), active)] = 0
        w /= w.sum()
    precise = small
    view = look(rows, w, active, alpha=alpha, precise=precise)
    passes += 1
    if not rows.total:
        msg = "expected a frame in which some member gives the true class a positive probability, got none"
        raise ValueError(msg)
    if not np.isfinite(view.d).all():
        w = np.full(M, 1.0 / M)
        view = look(rows, w, np.arange(M), alpha=alpha, precise=True)
        passes += 1
    best, model = view, view.curvature
    assert model is not None
    while not (precise and view.gap <= tolerance) and passes < max_passes:
        if not precise and view.gap <= 1e-5:
            precise = True
        target = step(view, model)
        precise = precise or view.gap < 3e-2
        wanted = None if view.gap < 1e-4 else _close(view, alpha)
        new, read = _advance(rows, view, target, wanted, alpha=alpha, precise=precise)
        passes += read
        outside = np.setdiff1d(np.flatnonzero(new.d > 1 + tolerance / 2), model.active)
        if new.curvature is None and (new.gap > tolerance) and (len(outside) or new.gap > 0.1 * view.gap):
            new = look(rows, new.weights, _close(new, alpha), alpha=alpha, precise=precise)
            passes += 1
        model = new.curvature or model
        view = new
        if precise and (not np.isfinite(best.loss) or view.gap < best.gap):
            best = view
    return best if np.isfinite(best.loss) else view, passes


def _advance(
    rows: Rows, view: View, target: Array, active: NDArray[np.intp] | None, *, alpha: float, precise: bool
) -> tuple[View, int]:
    """Go towards `target`, back where the slope there says the step was too long."""
    length, move = 1.0, target - view.weights
    descent = float(view.d @ move)
    for tries in range(1, 40):
        w = np.maximum(view.weights + length * move, 0.0)
        new = look(rows, w / w.sum(), active, alpha=alpha, precise=precise)
        if np.isfinite(new.d).all() and float(new.d @ move) >= -0.9 * abs(descent) - 1e-12:
            return new, tries
        length *= 0.5
    return new, tries


def _close(view: View, alpha: float) -> NDArray[np.intp]:
    if alpha:
        return np.arange(len(view.d))
    return np.flatnonzero((view.d > _CLOSE) | (view.weights > 0))


def _sample(rows: Rows, seed: int) -> Rows:
    """A thirty-second part of the frames (2,048 at least) in random runs of consecutive ones."""
    wanted, run = max(rows.frames // 32, min(2048, rows.frames)), 128
    runs = np.random.default_rng(seed).permutation(max(rows.frames // run, 1))[: max(wanted // run, 1)]
    index = (np.sort(runs)[:, None] * run + np.arange(min(run, rows.frames))).ravel()
    weights = None if rows.weights is None else rows.weights[index]
    return Rows(rows.values[:, index], weights)


def _distinct(values: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of the members that equal no earlier one, and for every member the first equal to it."""
    heads: dict[bytes, list[int]] = {}
    first = np.arange(len(values))
    for m, head in enumerate(values[:, :256]):
        twins = heads.setdefault(head.tobytes(), [])
        equal = next((t for t in twins if np.array_equal(values[t], values[m])), None)
        if equal is None:
            twins.append(m)
        else:
            first[m] = equal
    return np.flatnonzero(first == np.arange(len(values))), first


def checked_weights(weights: object, frames: int) -> Array:
    """(N,) float64 sample weights, refused unless finite, non-negative and not all zero."""
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (frames,) or not np.isfinite(array).all() or (array < 0).any() or not array.any():
        msg = f"expected {frames} sample weights, finite, non-negative, not all zero; got shape {array.shape}"
        raise ValueError(msg)
    return array


def _start(start: object, members: int) -> Array:
    array = np.asarray(start, dtype=np.float64)
    if array.shape != (members,) or not np.isfinite(array).all() or (array < 0).any() or not array.any():
        msg = f"expected a start of {members} weights, finite, non-negative, not all zero; got {array}"
        raise ValueError(msg)
    return array


@lru_cache(maxsize=1)
def _controller() -> Any:
    return ThreadpoolController()
