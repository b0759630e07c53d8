"""The solver of all weights: true-class probabilities go in, weights on the simplex with a certificate come out.

In goes P (M, N), each member's probability of the true class, read in blocks and never copied (`newton.Rows`). Out come
weights w of least -mean(log(w P)) by Newton steps that read the frames three to five times (`newton`). The law that
proves them right: with d_m = mean(P_m / (w P)), the loss is at most log(max d) above its minimum, and that is computed
in float64 and bounded from above where float32 was used. `tests/test_solver.py` holds it on 400 random problems.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # it ships no types

from ensemble.fit._solver.newton import Curvature, Indices, Numbers, Rows, View, look, step
from ensemble.outputs import MemberOutputs
from ensemble.outputs.arrays import floats, numbers
from ensemble.rules.fitted import WeightedMean

Array = NDArray[np.float64]

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
    given = numbers(P, "P").detach().cpu()
    values = (given if given.dtype in (torch.float32, torch.float64) else given.double()).numpy()
    if values.ndim != 2 or 0 in values.shape:
        msg = f"expected P of shape (M, N), members by frames, neither empty; got {values.shape}"
        raise ValueError(msg)
    weights = None if sample_weights is None else checked_weights(sample_weights, values.shape[1])
    at_least_zero(alpha=alpha, tolerance=tolerance)
    aim = np.ones(len(values)) if towards is None else checked_weights(towards, len(values), "weights to pull towards")
    pull = alpha * aim / aim.sum()
    begin = None if start is None else checked_weights(start, len(values), "weights to start from")
    # with shrinkage, equal members have different optimal weights, so all of them stay
    first = np.arange(len(values)) if pull.any() else first_equal(values)
    if begin is not None:
        begin = np.bincount(first, begin, len(values)).astype(np.float64)
    rows = Rows(values, weights)
    task = _Task(rows, first == np.arange(len(values)), pull)
    with _controller().limit(limits=1, user_api="blas"):
        view, passes = _solve(task, begin, seed, tolerance, max_passes)
        if np.isnan(view.loss) and np.isfinite(view.d).all():  # stopped early: still certified in float64
            view, passes = task.look(view.weights, task.active(view), precise=True, curved=False), passes + 1
    if not rows.total:
        msg = f"expected a positive probability of the true class somewhere, got {rows.dropped} frames of zeros"
        raise ValueError(msg)
    support, gap = tuple(np.flatnonzero(view.weights).tolist()), view.gap(task.allowed)
    return SimplexFit(view.weights, view.loss, gap, passes, view.d, support, rows.dropped)


def refit(rows: Rows, *, start: Array, allowed: NDArray[np.bool_]) -> View:
    """Weights over the `allowed` members, (M,) bool, from a warm start; the start's weights of others are ignored.

    Where every allowed member gives a frame zero, the loss and d are infinite.
    """
    begin = np.where(allowed, start, 0.0)
    task = _Task(rows, allowed, np.zeros(rows.members))
    with _controller().limit(limits=1, user_api="blas"):
        return _solve(task, begin if begin.any() else allowed.astype(np.float64), 0, 1e-6, 100)[0]


def settle(rows: Rows, *, start: Array, within: float) -> Array:
    """(M,) weights that another Newton step would move by at most `within`; their error is of the order of its square.

    For questions about the weights themselves: a small gap does not settle these where members are alike, since all
    weights have nearly the same loss there. The rows were read before, and some member gives each frame a positive
    probability. Where rounding alone moves the weights further, the search stops after twenty steps.
    """
    task, target = _Task(rows, np.ones(rows.members, dtype=bool), np.zeros(rows.members)), start
    with _controller().limit(limits=1, user_api="blas"):
        view, _ = task.first(start, np.arange(rows.members), precise=True)
        for _ in range(_STEPS):
            model = view.curvature
            assert model is not None  # some member gives each frame a positive probability
            if task.outside(view, model):
                view = task.look(view.weights, task.active(view), precise=True)
            target = step(view, view.curvature or model)
            if np.abs(target - view.weights).max() <= within:
                break
            view, _ = task.advance(view, target, precise=True)
    return target


@dataclass(frozen=True)
class _Task:
    """What stays the same during one solve, and the passes over the frames; `how` says how, see `look`."""

    rows: Rows
    allowed: NDArray[np.bool_]
    pull: Array

    def look(self, w: Array, near: Indices, **how: bool) -> View:
        return look(self.rows, w, near, self.pull, **how)

    def first(self, w: Array, near: Indices, **how: bool) -> tuple[View, int]:
        """The pass at a start, or near it where only members of weight zero give a frame a positive probability."""
        view = self.look(w, near, **how)
        if np.isfinite(view.d).all():
            return view, 1
        even = self.allowed / self.allowed.sum()
        return self.look(0.9 * w + 0.1 * even, np.flatnonzero(self.allowed), precise=True), 2

    def advance(self, view: View, target: Array, **how: bool) -> tuple[View, int]:
        """The pass at the target, or nearer where the slope there shows that the step was too long."""
        move, near, length, reads = target - view.weights, self.active(view), 1.0, 0
        limit = -0.9 * abs(float(view.d @ move)) - 1e-12
        while True:
            reads += 1
            w = np.maximum(view.weights + length * move, 0.0)
            new = self.look(w / w.sum(), near, **how)
            if reads == 50 or (np.isfinite(new.d).all() and float(new.d @ move) >= limit):
                return new, reads
            length *= 0.5

    def active(self, view: View, above: float = _CLOSE) -> Indices:
        """Members that take part in the next step; with shrinkage none may leave."""
        return np.flatnonzero(self.allowed & ((view.d > above) | (view.weights > 0) | (self.pull > 0)))

    def outside(self, view: View, model: Curvature) -> bool:
        """Whether a member outside the model should join it."""
        return bool(np.delete(self.allowed & (view.d > 1.0), model.active).any())


def _solve(
    task: _Task, begin: Array | None, seed: int, tolerance: float, max_passes: float, *, rough: bool = False
) -> tuple[View, float]:
    """The best view found, computed in float64 unless a rough one will do for a start, and the passes it took."""
    rows, allowed, small = task.rows, task.allowed, task.rows.small
    w, active, passes = allowed / allowed.sum(), np.flatnonzero(allowed), 0.0
    if begin is not None:
        w = begin / begin.sum()
    elif rows.frames >= 8192 and rows.members * rows.frames >= 2**19:  # from the solution of a sample
        sample = rows.sample(seed)
        found, passes = _solve(_Task(sample, allowed, task.pull), None, seed, 1e-2, 30, rough=True)
        passes *= sample.frames / rows.frames
        active, w = task.active(found, above=_CLOSE - 0.01), found.weights
        if found.curvature is not None:
            w = step(found, found.curvature)
    view, reads = task.first(w, active, precise=small)
    passes += reads
    best, model, precise, thrifty, slow = view, view.curvature, small, True, False
    if model is None:  # every allowed member gives some frame zero: infinite, whatever the weights
        return replace(view, loss=np.inf), passes
    # steps with one curvature take a gap to its second, third, ... power; reading few members is cheap
    reach, gap = tolerance ** (1 / 2 if rough else 1 / 3), view.gap(allowed)
    while passes < max_passes and not (gap <= tolerance and (precise or rough)):
        last = gap < max(tolerance**0.7, 1e-5)  # then one more step will do
        precise = precise or (last and not rough)
        curved, narrow = small or slow or gap > reach, not (precise or rough)
        how = {"precise": precise, "narrow": narrow, "thrifty": thrifty}
        new, reads = task.advance(view, step(view, model), curved=curved, **how)
        passes += reads * (len(task.active(view)) / rows.members if narrow else 1)
        if new.curvature is None and new.gap(allowed) > tolerance and task.outside(new, model):
            new, passes = task.look(new.weights, task.active(new), curved=True, **how), passes + 1
        slow = new.gap(allowed) > 0.1 * gap
        thrifty = thrifty and not slow
        view, model, gap = new, new.curvature or model, new.gap(allowed)
        if np.isnan(best.loss) or (precise and gap < best.gap(allowed)):
            best = view
    return best, passes


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


def at_least_zero(**settings: float) -> None:
    """Refuse settings that are negative, infinite or NaN."""
    for name, value in settings.items():
        if not 0 <= value < np.inf:
            msg = f"expected {name} of at least 0, got {value}"
            raise ValueError(msg)


def positive(name: str, value: float) -> None:
    """Refuse a setting that is not a positive number."""
    if not 0 < value < np.inf:
        msg = f"expected a positive {name}, got {value}"
        raise ValueError(msg)


def checked_weights(values: object, count: int, what: str = "sample weights") -> Array:
    """(count,) float64 weights, refused unless finite, non-negative and not all zero."""
    array = floats(values, what)
    if array.shape != (count,) or not np.isfinite(array).all() or (array < 0).any() or not array.any():
        msg = f"expected {count} {what}, finite, non-negative, not all zero; got {array}"
        raise ValueError(msg)
    return array


def labelled(outputs: MemberOutputs) -> torch.Tensor:
    """(N,) labels to fit on; refuse outputs without labels or frames."""
    labels = outputs.require_labels()
    if not len(labels):
        msg = "expected frames to fit on, got none"
        raise ValueError(msg)
    return labels


def refuse_nan(outputs: MemberOutputs, numbers: NDArray[np.floating]) -> None:
    """Refuse numbers (M, N) with NaN; the message names the members."""
    names = [name for name, missing in zip(outputs.members, np.isnan(numbers).any(axis=1), strict=True) if missing]
    if names:
        way_out = (
            "leave these members out (--members, or on_nan='drop'), or take a rule that is not fitted, such as mean"
        )
        msg = f"expected numbers from every member, got NaN from {names}; {way_out}"
        raise ValueError(msg)


@lru_cache(maxsize=1)
def _controller() -> Any:
    return ThreadpoolController()
