"""One walk over the frames (`look`) and one step of the second-order model made from it (`step`).

With u = w P and Z = P / u, the loss F(x) = -mean log(x P) + sum(x) over x >= 0 has gradient 1 - d, d = mean Z,
and Hessian mean Z Z'. Its minimum lies on the simplex by itself.

References:
    Kim, Carbonetto, Stephens and Anitescu, "A fast algorithm for maximum likelihood estimation of mixture
    proportions using sequential quadratic programming", JCGS 29(2), 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble.weights.quadratic import nonnegative_minimum
from ensemble.weights.rows import Rows

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

_HEAVY = 20.0  # a quadratic says little about a frame where some P / u exceeds this
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

    @property
    def gap(self) -> float:
        """Upper bound of the excess loss, in nats."""
        return max(float(np.log(self.d.max())), 0.0)


def look(rows: Rows, w: Array, active: Indices | None, *, alpha: float, precise: bool) -> View:
    """Walk once over the frames at weights `w`.

    Args:
        rows: the frames.
        w: (M,) on the simplex.
        active: members whose curvature is wanted; None for the gradient alone.
        alpha: weight of the M pseudo-frames (one per member) relative to all frames.
        precise: float64 throughout the gradient; float32 otherwise.
    """
    dtype = np.float64 if precise else np.float32
    support = np.flatnonzero(w)
    d, logs, count = np.zeros(rows.members), 0.0, 0 if active is None else len(active)
    H, heavy, heavy_weights = np.zeros((count, count)), [], []
    weights_here = w[support].astype(dtype)
    for where, block, largest in rows.blocks(dtype):
        u: NDArray[Any] = weights_here @ (block if len(support) == rows.members else block[support])
        alive = largest > 0
        if not (u > 0)[alive].all():
            return View(w, np.full(rows.members, np.inf), np.inf, None)
        everywhere = bool(alive.all())
        s: NDArray[Any] = np.ones(len(u), dtype) if rows.weights is None else rows.weights[where].astype(dtype)
        if not everywhere:
            u, s = np.where(alive, u, 1), s * alive
        ratio = s / u
        d += block @ ratio
        if precise:
            logs += float(s @ np.log(u))
        if active is None:
            continue
        extreme = np.flatnonzero(u * _HEAVY < largest)
        if len(extreme) > len(u) // 32:
            order = np.argpartition(u[extreme] / largest[extreme], len(u) // 32)
            extreme = extreme[order[: len(u) // 32]]
        chosen = block if len(active) == rows.members else block[active]
        heavy.append(chosen[:, extreme].astype(np.float64))
        heavy_weights.append(s[extreme].astype(np.float64))
        scale: NDArray[Any] = np.sqrt(s) / u
        scale[extreme] = 0
        Z = (chosen * scale).astype(np.float32 if rows.frames * rows.members > 2**16 else np.float64, copy=False)
        H += Z @ Z.T
    total = rows.total
    share = 1.0 / (1.0 + alpha)
    with np.errstate(divide="ignore"):
        d = share * (d / total + (alpha / rows.members / w if alpha else 0.0))
    loss = -(logs + rows.log_scale) / total if precise else np.nan
    if active is None:
        return View(w, d, loss, None)
    exact, exact_weights = np.concatenate(heavy, axis=1), np.concatenate(heavy_weights) * (share / total)
    if alpha:
        exact = np.concatenate([exact, np.eye(rows.members)[active]], axis=1)
        pseudo = np.full(rows.members, share * alpha / rows.members)
        exact_weights = np.concatenate([exact_weights, pseudo])
    return View(w, d, loss, Curvature(active, H * (share / total), exact, exact_weights))


def step(view: View, model: Curvature) -> Array:
    """(M,) where the model, expanded at `view`, has its minimum; normalised to the simplex."""
    A, P, s = model.active, model.heavy, model.heavy_weights
    w = view.weights[A]
    light = view.d[A] - P @ (s / (w @ P))
    H = model.light + _RIDGE * (1.0 + np.diag(model.light).max(initial=0.0)) * np.eye(len(A))
    y = w
    for _ in range(50 if len(s) else 1):
        v = y @ P
        slope = 1.0 - light + H @ (y - w) - P @ (s / v)
        Z = P * (np.sqrt(s) / v)
        full = H + Z @ Z.T
        move = nonnegative_minimum(full, full @ y - slope, y) - y
        if float(-slope @ move) < 1e-26:
            break
        y = y + _length(H, P, s, light, w, y, move) * move
        y[y < 1e-14 * y.max()] = 0.0
    x = view.weights.copy()
    x[A] = y
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
