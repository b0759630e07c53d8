"""The solver of all weights: true-class probabilities go in, weights on the simplex with a certificate come out.

In goes P (M, N), each member's probability of the true class, read in blocks and never copied (`rows`). Out come
weights w of least -mean(log(w P)) by Newton steps that read the frames three to five times (`newton`). The law that
proves them right: with d_m = mean(P_m / (w P)), the loss is at most log(max d) above its minimum, and that is computed
in float64 and bounded from above where float32 was used. `tests/test_solver.py` holds it on 400 random problems.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # it ships no types

from ensemble.fit._solver.newton import Curvature, View, Walk, look, step
from ensemble.fit._solver.rows import Numbers, Rows, as_matrix
from ensemble.rules.fitted import WeightedMean

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

_CLOSE = 0.98  # members whose d exceeds this take part in the next step
_STEPS = 20  # at most, in `settle`, which takes one or two where rounding does not matter


@dataclass(frozen=True, eq=False)
class SimplexFit:
    """Weights on the simplex and the proof of how good they are.

    Attributes:
        weights: (M,) float64, non-negative, summing to one.
        loss: mean of -log(w P) over the frames kept, in nats (without the shrinkage term).
        gap: the objective is at most this far above its minimum, in nats; computed in float64.
        passes: number of times the frames were read, partial reads included.
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

    @property
    def rule(self) -> WeightedMean:
        """The weighted mean with these weights; it knows neither the members' names nor the frames."""
        return WeightedMean(tuple(self.weights.tolist()))


def fit_simplex_weights(
    P: object,
    *,
    alpha: float = 0.0,
    towards: object | None = None,
    sample_weights: object | None = None,
    start: object | None = None,
    tolerance: float = 1e-6,
    max_passes: int = 100,
    seed: int = 0,
) -> SimplexFit:
    """Weights w on the simplex that minimise -mean(log(w P)), with an upper bound of the remaining excess.

    Args:
        P: (M, N) each member's probability of the true class; array or tensor. Scaling a frame's column
            changes nothing but the loss.
        alpha: strength of the pull towards equal weights: M pseudo-frames, each of which one member alone gets right,
            of total weight alpha N; 0 for none.
        towards: (M,) weights to pull towards instead of equal ones.
        sample_weights: (N,) non-negative; integers act as repeated frames.
        start: (M,) weights to begin from (a warm start); members at zero may come back.
        tolerance: stop when the certified gap is at most this, in nats.
        max_passes: stop after this many reads of the frames, whatever the gap is then.
        seed: seed of the sample of frames on which the start is computed.

    Returns:
        The fit; its gap refers to the objective with the pull. Of exactly equal members the first one
        carries the weight of all.

    Raises:
        ValueError: shapes, NaN, infinite or negative numbers or settings, or no frame with a positive probability.

    Example:
        >>> fit_simplex_weights([[0.9, 0.1], [0.1, 0.9]]).weights.round(6).tolist()
        [0.5, 0.5]

    References:
        Kim et al., "A fast algorithm for maximum likelihood estimation of mixture proportions using
        sequential quadratic programming", JCGS 29(2), 2020.
    """
    values = as_matrix(P)
    weights = None if sample_weights is None else checked_weights(sample_weights, values.shape[1])
    at_least_zero("alpha", alpha)
    at_least_zero("tolerance", tolerance)
    aim = np.ones(len(values)) if towards is None else checked_weights(towards, len(values), "weights to pull towards")
    pull = alpha * aim / aim.sum()
    begin = None if start is None else checked_weights(start, len(values), "weights to start from")
    with _controller().limit(limits=1, user_api="blas"):
        # with shrinkage, equal members have different optimal weights, so all of them stay
        first = np.arange(len(values)) if pull.any() else first_equal(values)
        if begin is not None:
            begin = np.bincount(first, begin, len(values)).astype(np.float64)
        rows = Rows(values, weights)
        task = _Task(rows, first == np.arange(len(values)), pull, tolerance, max_passes)
        view, passes = _solve(task, begin, seed)
        if np.isnan(view.loss) and np.isfinite(view.d).all():  # stopped early: still certified in float64
            view, passes = task.look(view.weights, task.active(view), Walk(True, curved=False)), passes + 1
    if not rows.total:
        msg = f"expected a positive probability of the true class somewhere, got {rows.dropped} frames of zeros"
        raise ValueError(msg)
    support = tuple(np.flatnonzero(view.weights).tolist())
    return SimplexFit(view.weights, view.loss, task.gap(view), passes, view.d, support, rows.dropped)


def refit(rows: Rows, *, start: Array, allowed: NDArray[np.bool_]) -> View:
    """Weights over the `allowed` members, from a warm start.

    Where every allowed member gives a frame zero, the loss and d are infinite.

    Args:
        rows: the frames.
        start: (M,) weights; those of members that are not allowed are ignored.
        allowed: (M,) members that may have a weight.
    """
    begin = np.where(allowed, start, 0.0)
    begin = begin if begin.any() else allowed.astype(np.float64)
    with _controller().limit(limits=1, user_api="blas"):
        return _solve(_Task(rows, allowed, np.zeros(rows.members), 1e-6, 100), begin, 0)[0]


def settle(rows: Rows, *, start: Array, within: float) -> Array:
    """(M,) weights that another Newton step would hardly move.

    For questions about the weights themselves: a small gap does not settle these where members are alike, since all
    weights have nearly the same loss there.

    Args:
        rows: the frames, read before; some member gives each a positive probability.
        start: (M,) weights on the simplex.
        within: stop after a step that moves no weight by more; the remaining error is of the order of its square.
            Where rounding alone moves them further, stop after twenty steps.
    """
    task = _Task(rows, np.ones(rows.members, dtype=bool), np.zeros(rows.members), 0.0, _STEPS)
    target = start
    with _controller().limit(limits=1, user_api="blas"):
        view, _ = _first(task, start, np.arange(rows.members), Walk(True))
        for _ in range(_STEPS):
            model = view.curvature
            assert model is not None  # some member gives each frame a positive probability
            if task.outside(view, model):
                view = task.look(view.weights, task.active(view), Walk(True))
            target = step(view, view.curvature or model)
            if np.abs(target - view.weights).max() <= within:
                break
            view, _ = _advance(task, view, target, Walk(True))
    return target


@dataclass(frozen=True)
class _Task:
    """Everything that stays the same during one solve."""

    rows: Rows
    allowed: NDArray[np.bool_]
    pull: Array
    tolerance: float
    max_passes: float
    rough: bool = False  # stop on float32's word: this is for a start, not for a certificate

    def look(self, w: Array, near: Indices, walk: Walk) -> View:
        return look(self.rows, w, near, walk, pull=self.pull)

    def active(self, view: View, above: float = _CLOSE) -> Indices:
        """Members that take part in the next step; with shrinkage none may leave."""
        return np.flatnonzero(self.allowed & ((view.d > above) | (view.weights > 0) | (self.pull > 0)))

    def outside(self, view: View, model: Curvature) -> bool:
        """Whether a member outside the model should join it."""
        joins = self.allowed & (view.d > 1.0)
        joins[model.active] = False
        return bool(joins.any())

    def gap(self, view: View) -> float:
        return view.gap(self.allowed)


def _solve(task: _Task, begin: Array | None, seed: int) -> tuple[View, float]:
    """The best view found, computed in float64, and the passes it took."""
    view, passes = _begin(task, begin, seed)
    best, model, precise, thrifty, slow = view, view.curvature, task.rows.small, True, False
    if model is None:  # every allowed member gives some frame zero: infinite, whatever the weights
        return replace(view, loss=np.inf), passes
    # steps with one curvature take a gap to its second, third, ... power; reading few members is cheap
    reach, gap = task.tolerance ** (1 / 2 if task.rough else 1 / 3), task.gap(view)
    while passes < task.max_passes and not (gap <= task.tolerance and (precise or task.rough)):
        last = gap < max(task.tolerance**0.7, 1e-5)  # then one more step will do
        precise = precise or (last and not task.rough)
        curved = task.rows.small or slow or gap > reach
        walk = Walk(precise, curved, narrow=not (precise or task.rough), thrifty=thrifty)
        new, reads = _advance(task, view, step(view, model), walk)
        passes += reads * (len(task.active(view)) / task.rows.members if walk.narrow else 1)
        if new.curvature is None and task.gap(new) > task.tolerance and task.outside(new, model):
            new, passes = task.look(new.weights, task.active(new), walk._replace(curved=True)), passes + 1
        slow = task.gap(new) > 0.1 * gap
        thrifty = thrifty and not slow
        view, model, gap = new, new.curvature or model, task.gap(new)
        if np.isnan(best.loss) or (precise and gap < task.gap(best)):
            best = view
    return best, passes


def _begin(task: _Task, begin: Array | None, seed: int) -> tuple[View, float]:
    """The first pass over all frames: from a warm start, from a solved sample, or from equal weights."""
    rows, passes = task.rows, 0.0
    w, active = task.allowed / task.allowed.sum(), np.flatnonzero(task.allowed)
    if begin is not None:
        w = begin / begin.sum()
    elif rows.frames >= 8192 and rows.members * rows.frames >= 2**19:
        sample = rows.sample(seed)
        found, passes = _solve(_Task(sample, task.allowed, task.pull, 1e-2, 30, rough=True), None, seed)
        passes *= sample.frames / rows.frames
        active, w = task.active(found, above=_CLOSE - 0.01), found.weights
        if found.curvature is not None:
            w = step(found, found.curvature)
    view, reads = _first(task, w, active, Walk(rows.small))
    return view, passes + reads


def _first(task: _Task, w: Array, active: Indices, walk: Walk) -> tuple[View, int]:
    """The first pass at a start, or near it where only members of weight zero give a frame a positive probability."""
    view = task.look(w, active, walk)
    if np.isfinite(view.d).all():
        return view, 1
    even = task.allowed / task.allowed.sum()
    return task.look(0.9 * w + 0.1 * even, np.flatnonzero(task.allowed), Walk(True)), 2


def _advance(task: _Task, view: View, target: Array, walk: Walk) -> tuple[View, int]:
    """A pass at the target, or nearer where the slope there shows that the step was too long."""
    move = target - view.weights
    limit = -0.9 * abs(float(view.d @ move)) - 1e-12
    near, length, reads = task.active(view), 1.0, 0
    while True:
        reads += 1
        w = np.maximum(view.weights + length * move, 0.0)
        new = task.look(w / w.sum(), near, walk)
        if reads == 50 or (np.isfinite(new.d).all() and float(new.d @ move) >= limit):
            return new, reads
        length *= 0.5


def first_equal(values: Numbers, order: Indices | None = None) -> Indices:
    """(M,) for every member the first one, in the given order, that equals it exactly."""
    heads: dict[bytes, list[int]] = {}
    first = np.arange(len(values))
    for m in first.tolist() if order is None else order.tolist():
        twins = heads.setdefault(values[m, :256].tobytes(), [])
        first[m] = next((t for t in twins if np.array_equal(values[t], values[m])), m)
        if first[m] == m:
            twins.append(m)
    return first


def at_least_zero(name: str, value: float) -> None:
    """Refuse a setting that is negative, infinite or NaN."""
    if not 0 <= value < np.inf:
        msg = f"expected {name} of at least 0, got {value}"
        raise ValueError(msg)


def checked_weights(values: object, count: int, what: str = "sample weights") -> Array:
    """(count,) float64 weights, refused unless finite, non-negative and not all zero."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (count,) or not np.isfinite(array).all() or (array < 0).any() or not array.any():
        msg = f"expected {count} {what}, finite, non-negative, not all zero; got {array}"
        raise ValueError(msg)
    return array


@lru_cache(maxsize=1)
def _controller() -> Any:
    return ThreadpoolController()
