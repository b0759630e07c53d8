"""One pass over the frames (`look`), one step of the second-order model made from it (`step`), small quadratics.

With u = w P and Z = P / u, the loss F(x) = -mean log(x P) + sum(x) over x >= 0 has gradient 1 - d, d = mean Z,
and Hessian mean Z Z'. Its minimum lies on the simplex without a constraint.

References:
    Kim, Carbonetto, Stephens and Anitescu, "A fast algorithm for maximum likelihood estimation of mixture
    proportions using sequential quadratic programming", JCGS 29(2), 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv

from ensemble.fit._solver.rows import Indices, Numbers, Room, Rows

Array = NDArray[np.float64]

_HEAVY = 5.0  # a quadratic describes a frame poorly where some P / u exceeds this
_CURVED = 2**17  # this many frames suffice for the curvature; the gradient always takes all of them
_SEARCHED = 2**21  # and this many for the heavy frames
_CROWD = 16  # from this many members on, adding members to an empty start is faster than removing them from a full one
_RIDGE = 1e-9  # proximal: it keeps near duplicates solvable and does not move the optimum


@dataclass(frozen=True)
class Curvature:
    """Second-order model of the loss in the active members' weights."""

    active: Indices  # (A,) the members whose weights may move
    light: Array  # (A, A) Hessian of the ordinary frames
    heavy: Array  # (A, H) P of the frames that are kept exact
    heavy_weights: Array  # (H,) weights of these frames


@dataclass(frozen=True)
class View:
    """What a pass over all frames at weights w yields."""

    weights: Array  # (M,) on the simplex
    d: Array  # (M,) mean of P_m / u; at most 1 at the optimum, 1 on the support; infinite where u = 0 somewhere
    bound: Array  # (M,) upper bound of d, with everything that rounding may have taken from it
    loss: float  # mean of -log u, with the scaling of extreme frames undone; NaN where float64 was not requested
    curvature: Curvature | None  # None where it was not requested

    def gap(self, allowed: NDArray[np.bool_]) -> float:
        """Upper bound of the excess loss over the best pool of the allowed members, in nats."""
        return max(float(np.log(self.bound[allowed].max())), 0.0)


def look(
    rows: Rows,
    w: Array,
    near: Indices,
    pull: Array,
    *,
    precise: bool,
    curved: bool = True,
    narrow: bool = False,
    thrifty: bool = True,
) -> View:
    """Pass once over the frames at weights `w`.

    Args:
        rows: the frames.
        w: (M,) on the simplex.
        near: members that may soon carry weight; those that carry weight now are added.
        pull: (M,) weight of each member's pseudo-frame, relative to all frames; zeros for no shrinkage.
        precise: float64 throughout for the near members, and for all where P is float64; d of the other members
            is summed in float32 otherwise, and bounded.
        curved: compute the curvature over the near members.
        narrow: read the near members alone; d of the others is then 0.
        thrifty: take the curvature from some blocks only, where there are many frames.
    """
    near = np.flatnonzero(np.bincount(near, minlength=rows.members) + (w > 0))
    apart = len(near) < rows.members and not narrow
    dtype = np.float64 if precise else np.float32
    own, d, far, logs = w[near].astype(dtype), np.zeros(len(near)), np.zeros(rows.members), 0.0
    sums = _Sums(near, rows) if curved else None
    searched = max(1, round(rows.frames / _SEARCHED)) if thrifty else 1
    bent = max(1, round(rows.frames / searched / _CURVED)) if thrifty else 1
    cast, read_as = Room(), rows.values.dtype.type if precise else dtype
    infinite = View(w, np.full(len(w), np.inf), np.full(len(w), np.inf), np.nan, None)
    for k, (values, counts) in enumerate(rows.blocks(read_as, near if narrow else None)):
        counts = None if counts is None else counts.astype(dtype, copy=False)
        chosen = cast.cast(values[near] if apart else values, dtype)
        u = own @ chosen
        if counts is not None:
            u[counts == 0] = 1.0
        if not (least := u.min()) > 0:
            return infinite
        ratio = np.reciprocal(u) if counts is None else counts / u
        d += chosen @ ratio
        if apart:
            far += values @ ratio.astype(values.dtype, copy=False)
        if precise:
            logs += float(_sum_of_logs(u, least) if counts is None else counts @ np.log(u))
        if sums is not None and (k % searched == 0 or not sums.total):
            sums.add(chosen, counts, u, light=k // searched % bent == 0 or not sums.total)
    if not rows.total or (w[pull > 0] <= 0).any():
        return infinite
    # Each of n additions loses at most half a unit in the last place of a sum that only grows, so its relative error is
    # at most n units (Higham, "Accuracy and stability of numerical algorithms", chapter 4), and a few for the factors;
    # blocks are added in float64.
    lost = np.full(rows.members, 1.0 + (rows.columns + 8) * float(np.finfo(read_as).eps))
    far, lost[near] = far / rows.total, 1.0
    far[near] = d / rows.total
    d = (far + pull / np.maximum(w, 1e-300)) / (1.0 + pull.sum())
    loss = -(logs + rows.log_scale) / rows.total if precise else np.nan
    return View(w, d, d * lost, loss, None if sums is None else sums.curvature(rows, pull))


def _sum_of_logs(u: Numbers, least: float) -> float:
    """Logarithms of products of eight where these stay in range: logarithms cost as much as the rest of a pass."""
    if least < 1e-30:  # the largest is 1e18
        return float(np.log(u).sum())
    whole = len(u) // 8 * 8
    return float(np.log(u[:whole].reshape(8, -1).prod(axis=0)).sum() + np.log(u[whole:]).sum())


class _Sums:
    """Collects the curvature over the active members during a pass."""

    def __init__(self, active: Indices, rows: Rows) -> None:
        self.active, self.dtype, self.room = active, np.float64 if rows.small else np.float32, Room()
        self.light = np.zeros((len(active), len(active)))
        self.heavy: list[Numbers] = []
        self.weights: list[Numbers] = []
        self.seen, self.total = 0.0, 0.0  # weight of the frames searched for heavy ones; of those in `light`

    def add(self, chosen: Numbers, counts: Numbers | None, u: Numbers, *, light: bool) -> None:
        """Add the active members' part of a block: heavy frames as they are, the others, if `light`, as a Hessian."""
        seen = len(u) if counts is None else float(counts.sum(dtype=np.float64))
        self.seen += seen
        largest = chosen.max(axis=0)
        heavy = np.flatnonzero(u * _HEAVY < largest)
        most = len(u) // 16 + 1  # so that keeping them exact stays cheap
        if len(heavy) > most:
            heavy = heavy[np.argpartition(u[heavy] / largest[heavy], most)[:most]]
        self.heavy.append(chosen.take(heavy, axis=1))
        self.weights.append(np.ones(len(heavy)) if counts is None else counts[heavy])
        if not light:
            return
        self.total += seen
        scale: Numbers = 1.0 / u if counts is None else np.sqrt(counts) / u
        scale[heavy] = 0
        members = len(chosen)
        Z = self.room.of((members + members % 2, len(u)), self.dtype)  # products of an even number are faster
        Z[members:] = 0
        np.multiply(chosen, scale, out=Z[:members], casting="same_kind")
        self.light += (Z @ Z.T)[:members, :members]

    def curvature(self, rows: Rows, pull: Array) -> Curvature:
        """The model from all blocks, with the pseudo-frames among the heavy ones."""
        share = 1.0 / (1.0 + pull.sum())
        heavy = np.concatenate(self.heavy, axis=1, dtype=np.float64)
        weights = np.concatenate(self.weights, dtype=np.float64) * (share / self.seen)
        pulled = np.flatnonzero(pull)
        if len(pulled):
            heavy = np.concatenate([heavy, np.eye(rows.members)[np.ix_(self.active, pulled)]], axis=1)
            weights = np.append(weights, pull[pulled] * share)
        return Curvature(self.active, self.light * (share / self.total), heavy, weights)


def step(view: View, model: Curvature) -> Array:
    """(M,) the minimum, on the simplex, of the model moved to `view`.

    The heavy frames are kept exact, so this is a small Newton iteration of its own that reads no other frames.
    """
    A, P, s = model.active, model.heavy, model.heavy_weights
    w = view.weights[A]
    v = w @ P
    light = view.d[A] - P @ (s / v)
    H = model.light + _RIDGE * (1.0 + np.diag(model.light).max(initial=0.0)) * np.eye(len(A))
    y, first, Z = w, 0.0, np.empty(P.shape, np.float32 if P.size > 2**16 else np.float64)
    for _ in range(50):
        slope = 1.0 - light + H @ (y - w) - P @ (s / v)
        np.multiply(P, np.sqrt(s) / v, out=Z, casting="same_kind")
        full = H + Z @ Z.T
        crowd = len(y) > _CROWD and y.all()
        move = nonnegative_minimum(full, full @ y - slope, np.zeros_like(y) if crowd else y) - y
        gain = float(-slope @ move)
        first = first or gain
        if gain <= 1e-26:
            break
        change = move @ P
        length = _length(move @ slope, move @ H @ move, s, v, change)
        y, v = y + length * move, v + length * change
        if gain <= 1e-4 * first:  # the next one would be of the order of its square
            break
    x = np.zeros_like(view.weights)
    x[A] = np.where(y < 1e-14 * y.max(), 0.0, y)
    x /= x.sum()
    return x


def _length(slope: float, bend: float, s: Array, v: Array, change: Array) -> float:
    """The length of a step at whose end the model does not rise, found by halving.

    The slope is that of the model at the beginning; the quadratic part adds `bend` to it over the whole step, which
    changes the pool's probabilities `v` of the heavy frames, of weights `s`, by `change`.
    """
    length = 1.0
    for _ in range(60):
        end = v + length * change
        if not len(s) or (end.min() > 0 and slope + length * bend + change @ (s / v - s / end) <= 0.5 * abs(slope)):
            break
        length *= 0.5
    return length


def nonnegative_minimum(H: Array, b: Array, start: Array) -> Array:
    """(A,) the minimum of x'Hx / 2 - b'x over x >= 0, H positive definite, by an active set.

    It begins at the support of `start`; with a good guess one or two solves suffice.

    References:
        Lawson and Hanson, "Solving least squares problems", 1974, chapter 23.
    """
    x, free = start.copy(), start > 0
    slack = 1e-14 * (np.abs(b).max() + np.abs(H).max())
    for _ in range(3 * len(b) + 10):
        while (falling := free & ((target := _solved(H, b, free)) <= 0)).any():  # fix at zero what would fall below
            length = float((x[falling] / (x[falling] - target[falling] + 1e-300)).min())
            x = x + length * (target - x)
            free &= ~(falling & (x <= 1e-15))
            x[~free] = 0.0
        x = target
        slope = np.where(free, -np.inf, b - H @ x)
        entering = int(slope.argmax())
        if slope[entering] <= slack:
            break
        free[entering] = True
    return x


def _solved(H: Array, b: Array, free: NDArray[np.bool_]) -> Array:
    """The minimum over the free coordinates, the others zero."""
    x = np.zeros_like(b)
    if free.any():
        own, given = H[free][:, free], b[free]
        _, found, failed = dposv(own, given)  # straight from LAPACK: the systems are small and many, checks cost more
        x[free] = np.linalg.lstsq(own, given)[0] if failed else found
    return x
