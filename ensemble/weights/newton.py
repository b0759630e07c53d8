"""One walk over the frames (`look`) and one step of the second-order model made from it (`step`).

With u = w P and Z = P / u, the loss F(x) = -mean log(x P) + sum(x) over x >= 0 has gradient 1 - d, d = mean Z,
and Hessian mean Z Z'. Its minimum lies on the simplex by itself.

References:
    Kim, Carbonetto, Stephens and Anitescu, "A fast algorithm for maximum likelihood estimation of mixture
    proportions using sequential quadratic programming", JCGS 29(2), 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble.weights.quadratic import nonnegative_minimum
from ensemble.weights.rows import Block, Numbers, Rows

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

_HEAVY = 6.0  # a quadratic says little about a frame where some P / u exceeds this
_CURVED = 2**17  # so many frames say enough about curvature; the gradient is always of all of them
_RIDGE = 1e-9  # proximal: it keeps near duplicates solvable and does not move the optimum


@dataclass(frozen=True)
class Curvature:
    """Second-order model of the loss over the active members.

    Attributes:
        active: (A,) the members that may move.
        light: (A, A) Hessian of the ordinary frames.
        heavy: (A, H) P of the frames kept exact, and their weights (H,).
    """

    active: Indices
    light: Array
    heavy: Array
    heavy_weights: Array


@dataclass(frozen=True)
class View:
    """What a walk over all frames at weights w shows.

    Attributes:
        weights: (M,) on the simplex.
        d: (M,) mean of P_m / u; at most 1 at the optimum, 1 on the support. Infinite where u = 0 somewhere.
        loss: mean of -log u, with the scaling of extreme frames undone.
        curvature: None where it was not asked for.
    """

    weights: Array
    d: Array
    loss: float
    curvature: Curvature | None

    def gap(self, allowed: NDArray[np.bool_]) -> float:
        """Upper bound of the excess loss over the best pool of the allowed members, in nats."""
        return max(float(np.log(self.d[allowed].max())), 0.0)


def look(rows: Rows, w: Array, active: Indices | None, *, pull: Array, precise: bool, thrifty: bool = True) -> View:
    """Walk once over the frames at weights `w`.

    Args:
        rows: the frames.
        w: (M,) on the simplex.
        active: members whose curvature is wanted; None for the gradient alone.
        pull: (M,) weight of each member's pseudo-frame, relative to all frames; zeros for no shrinkage.
        precise: float64 throughout the gradient; float32 otherwise.
        thrifty: take the curvature from every so many blocks, where frames abound.
    """
    dtype = np.float64 if precise else np.float32
    support = np.flatnonzero(w)
    whole = 3 * len(support) > rows.members  # gathering rows costs more than multiplying by zero
    own = (w if whole else w[support]).astype(dtype)
    d, logs = np.zeros(rows.members), 0.0
    sums = None if active is None else _Sums(active, rows)
    every = max(1, rows.frames // _CURVED) if thrifty else 1
    for k, block in enumerate(rows.blocks(dtype)):
        u = own @ (block.values if whole else block.values[support])
        if block.counts is not None:
            u[block.counts == 0] = 1.0
        if not u.min() > 0:
            return View(w, np.full(rows.members, np.inf), np.nan, None)
        ratio = np.reciprocal(u) if block.counts is None else block.counts / u
        d += block.values @ ratio
        if precise:
            logs += float(np.log(u).sum() if block.counts is None else block.counts @ np.log(u))
        if sums is not None:
            sums.add(block, u, light=k % every == 0 or not sums.total)
    if not rows.total or (w[pull > 0] <= 0).any():
        return _infinite(w)
    d = (d / rows.total + pull / np.maximum(w, 1e-300)) / (1.0 + pull.sum())
    loss = -(logs + rows.log_scale) / rows.total if precise else np.nan
    return View(w, d, loss, None if sums is None else sums.curvature(rows, pull))


def _infinite(w: Array) -> View:
    return View(w, np.full(len(w), np.inf), np.nan, None)


class _Sums:
    """Collects the curvature over the active members while the frames go by."""

    def __init__(self, active: Indices, rows: Rows) -> None:
        self.active = active
        self.every = len(active) == rows.members
        self.dtype = np.float64 if rows.small else np.float32
        self.light = np.zeros((len(active), len(active)))
        self.heavy: list[Numbers] = []
        self.weights: list[Numbers] = []
        self.room = np.empty(0, self.dtype)
        self.total = 0.0

    def add(self, block: Block, u: Numbers, *, light: bool) -> None:
        heavy = _heaviest(block.largest, u)
        self.heavy.append(block.values[np.ix_(self.active, heavy)])
        self.weights.append(np.ones(len(heavy)) if block.counts is None else block.counts[heavy])
        if not light:
            return
        chosen = block.values if self.every else block.values[self.active]
        scale: Numbers = 1.0 / u if block.counts is None else np.sqrt(block.counts) / u
        self.total += len(u) if block.counts is None else float(block.counts.sum(dtype=np.float64))
        scale[heavy] = 0
        if self.room.shape != chosen.shape:
            self.room = np.empty(chosen.shape, self.dtype)
        Z = np.multiply(chosen, scale, out=self.room, casting="same_kind")
        self.light += Z @ Z.T

    def curvature(self, rows: Rows, pull: Array) -> Curvature:
        share = 1.0 / ((1.0 + pull.sum()) * rows.total)
        heavy = np.concatenate(self.heavy, axis=1).astype(np.float64)
        weights = np.concatenate(self.weights).astype(np.float64) * share
        pulled = np.flatnonzero(pull)
        if len(pulled):
            heavy = np.concatenate([heavy, np.eye(rows.members)[np.ix_(self.active, pulled)]], axis=1)
            weights = np.append(weights, pull[pulled] / (1.0 + pull.sum()))
        return Curvature(self.active, self.light * (share * rows.total / self.total), heavy, weights)


def _heaviest(largest: Numbers, u: Numbers) -> Indices:
    """Frames that a quadratic fits badly; at most every sixteenth, so that keeping them stays cheap."""
    heavy = np.flatnonzero(u * _HEAVY < largest)
    room = len(u) // 16 + 1
    if len(heavy) > room:
        heavy = heavy[np.argpartition(u[heavy] / largest[heavy], room)[:room]]
    return heavy


def step(view: View, model: Curvature) -> Array:
    """(M,) on the simplex, where the model, moved to `view`, has its minimum.

    The heavy frames are kept exact, so this is a small Newton iteration of its own, without a walk.
    """
    A, P, s = model.active, model.heavy, model.heavy_weights
    w = view.weights[A]
    light = view.d[A] - P @ (s / (w @ P))
    H = model.light + _RIDGE * (1.0 + np.diag(model.light).max(initial=0.0)) * np.eye(len(A))
    y, first = w, 0.0
    for _ in range(50):
        v = y @ P
        slope = 1.0 - light + H @ (y - w) - P @ (s / v)
        Z = P * (np.sqrt(s) / v)
        full = H + Z @ Z.T
        move = nonnegative_minimum(full, full @ y - slope, y) - y
        gain = float(-slope @ move)
        first = first or gain
        if gain <= 1e-26:
            break
        y = y + _length(H, P, s, light, w, y, move) * move
        if gain <= 1e-4 * first:  # the next one would be of the order of its square
            break
    x = np.zeros_like(view.weights)
    x[A] = np.where(y < 1e-14 * y.max(), 0.0, y)
    x /= x.sum()
    return x


def _length(H: Array, P: Array, s: Array, light: Array, w: Array, y: Array, move: Array) -> float:
    """A step along `move` at whose end the model does not climb: halved until the slope says so."""
    length, base, change = 1.0, y @ P, move @ P
    for _ in range(60):
        v = base + length * change
        if not len(s):
            return length
        if v.min() > 0:
            slope = (1.0 - light + H @ (y + length * move - w)) @ move - change @ (s / v)
            start = (1.0 - light + H @ (y - w)) @ move - change @ (s / base)
            if slope <= 0.5 * abs(start):
                return length
        length *= 0.5
    return length
