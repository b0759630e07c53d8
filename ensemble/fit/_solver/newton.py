"""The matrix of probabilities (`Rows`), a pass over it (`look`), a step of the model that it makes (`step`).

With u = w P and Z = P / u, the loss F(x) = -mean log(x P) + sum(x) over x >= 0 has gradient 1 - d, d = mean Z,
and Hessian mean Z Z'. Its minimum lies on the simplex without a constraint.

References:
    Kim, Carbonetto, Stephens and Anitescu, "A fast algorithm for maximum likelihood estimation of mixture
    proportions using sequential quadratic programming", JCGS 29(2), 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.linalg.lapack import dposv

Array = NDArray[np.float64]
Numbers = NDArray[Any]  # float32 or float64
Indices = NDArray[np.intp]

_RUN = 128  # consecutive frames that a sample takes together
_BLOCK = 2**18  # numbers in a block: with its copies it fits in the second-level cache
_SAFE = (1e-18, 1e18)  # a block in which a frame's largest probability leaves this range is scaled
_HEAVY = 5.0  # a quadratic describes a frame poorly where some P / u exceeds this
_CURVED = 2**17  # this many frames suffice for the curvature; the gradient always takes all of them
_SEARCHED = 2**21  # and this many for the heavy frames
_CROWD = 16  # from this many members on, adding members to an empty start is faster than removing them from a full one
_RIDGE = 1e-9  # proximal: it keeps near duplicates solvable and does not move the optimum


class Room:
    """Memory that is reused from block to block: fresh pages cost more than the arithmetic done on them."""

    array: Numbers = np.empty(0)

    def of(self, shape: tuple[int, ...], dtype: DTypeLike) -> Numbers:
        """An array of this shape and type with any content; it replaces the one returned before."""
        if self.array.shape != shape or self.array.dtype != dtype:
            self.array = np.empty(shape, dtype)
        return self.array

    def cast(self, values: Numbers, dtype: DTypeLike) -> Numbers:
        """The values in this type, copied only where it differs."""
        if values.dtype == dtype:
            return values
        np.copyto(array := self.of(values.shape, dtype), values, casting="same_kind")
        return array


class Rows:
    """A view of P as weighted frames ("rows" of the likelihood), never copied as a whole.

    Args:
        values: (M, N) float32 or float64.
        weights: (N,) non-negative, or None where every frame counts once.
        runs: of a sample, the runs of `_RUN` consecutive frames that it has, each by its place among all; else None.
    """

    def __init__(self, values: Numbers, weights: Array | None = None, runs: Indices | None = None) -> None:
        self.values, self.weights, self.runs = values, weights, runs
        self.members, self.frames = len(values), values.shape[1] if runs is None else len(runs) * _RUN
        self.columns = max(1024, _BLOCK // self.members // _RUN * _RUN)  # of a block
        self.small = self.members * self.frames <= 2**16  # then float64 throughout costs nothing
        self.total = 0.0  # weight of the frames that count, of those read so far
        self.dropped = 0  # number of frames with a weight in which every member gives the true class zero
        self.log_scale = 0.0  # what scaling took from the weighted sum of logarithms
        self._alive: dict[int, NDArray[np.bool_] | None] = {}  # by a block's start, once read; see `_inspect`

    def blocks(self, dtype: DTypeLike, members: Indices | None = None) -> Iterator[tuple[Numbers, Numbers | None]]:
        """Pass over the frames; a block's arrays are valid until the next block is requested.

        Yields:
            (M, b) probabilities of these members or all, each frame up to a factor of its own; and (b,) float64, the
            frames' weights, 0 where every member gives zero, or None where each counts once.

        Raises:
            ValueError: a number is NaN, infinite or negative (checked in the first pass only).
        """
        sampled, cast = Room(), Room()
        for start in range(0, self.frames, self.columns):
            where = slice(start, min(start + self.columns, self.frames))
            raw, counts = self.values[:, where], None if self.weights is None else self.weights[where]
            if self.runs is not None:
                raw = sampled.of((self.members, where.stop - start), self.values.dtype)
                for place, run in enumerate(self.runs[start // _RUN : where.stop // _RUN]):
                    raw[:, place * _RUN : (place + 1) * _RUN] = self.values[:, run * _RUN : (run + 1) * _RUN]
            if start not in self._alive:
                self._alive[start] = self._inspect(start, raw, counts)
            alive = self._alive[start]
            if alive is not None:
                raw = raw / np.where(alive, raw.max(axis=0), 1.0)
                counts = alive.astype(np.float64) if counts is None else counts * alive
            yield cast.cast(raw if members is None else raw[members], dtype), counts

    def sample(self, seed: int) -> Rows:
        """An eighth of the frames, at most 65,536, in random runs of consecutive frames: few jumps in memory."""
        count = self.frames // _RUN
        chosen = np.sort(np.random.default_rng(seed).permutation(count)[: min(self.frames // 8, 65_536) // _RUN])
        weights = None if self.weights is None else self.weights[: count * _RUN].reshape(count, _RUN)[chosen].ravel()
        return Rows(self.values, weights, chosen if self.runs is None else self.runs[chosen])

    def reweighted(self, weights: Array) -> Rows:
        """The same frames, all of which were read before, under other weights."""
        other = Rows(self.values, weights)
        other._alive = self._alive
        dead = [start + np.flatnonzero(~alive) for start, alive in self._alive.items() if alive is not None]
        other.total = float(weights.sum() - sum(weights[where].sum() for where in dead))
        return other

    def _inspect(self, start: int, raw: Numbers, counts: Numbers | None) -> NDArray[np.bool_] | None:
        """Check a block and count it: None where it is usable as it is; else it needs scaling, and these frames count.

        Read as integers, floats keep their order, with infinity, NaN and negative numbers above the rest.
        """
        integers = np.uint32 if raw.itemsize == 4 else np.uint64
        largest: Numbers = raw.view(integers).max(axis=0)
        if largest.max() < np.array(np.inf, raw.dtype).view(integers):
            largest = largest.view(raw.dtype)
        else:
            largest = raw.max(axis=0)  # negative zeros are allowed
            for member, frame in np.argwhere(~np.isfinite(raw) | (raw < 0)):
                came = f"{raw[member, frame]} from member {member} at frame {start + frame}"
                msg = f"expected finite probabilities of at least zero, got {came}"
                raise ValueError(msg)
        if largest.min() >= _SAFE[0] and largest.max() <= _SAFE[1]:
            self.total += len(largest) if counts is None else float(counts.sum())
            return None
        alive: NDArray[np.bool_] = largest > 0
        counts = np.ones(len(alive)) if counts is None else counts
        kept = counts * alive
        self.total += float(kept.sum())
        self.dropped += int(((counts > 0) & ~alive).sum())
        self.log_scale += float(kept[alive] @ np.log(largest[alive].astype(np.float64)))
        return alive


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
    curvature = Curvature(near, rows) if curved else None
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
        if curvature is not None and (k % searched == 0 or not curvature.total):
            curvature.add(chosen, counts, u, light=k // searched % bent == 0 or not curvature.total)
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
    if curvature is not None:
        curvature.finish(rows, pull)
    return View(w, d, d * lost, loss, curvature)


def _sum_of_logs(u: Numbers, least: float) -> float:
    """Logarithms of products of eight where these stay in range: logarithms cost as much as the rest of a pass."""
    if least < 1e-30:  # the largest is 1e18
        return float(np.log(u).sum())
    whole = len(u) // 8 * 8
    return float(np.log(u[:whole].reshape(8, -1).prod(axis=0)).sum() + np.log(u[whole:]).sum())


class Curvature:
    """Second-order model of the loss in the active members' weights, collected during a pass.

    Attributes:
        active: (A,) the members whose weights may move.
        light: (A, A) Hessian of the ordinary frames.
        heavy, weights: (A, H) P of the frames that are kept exact, and (H,) their weights.
    """

    heavy: Array
    weights: Array

    def __init__(self, active: Indices, rows: Rows) -> None:
        self.active, self.dtype, self.room = active, np.float64 if rows.small else np.float32, Room()
        self.light = np.zeros((len(active), len(active)))
        self.parts: list[tuple[Numbers, Numbers]] = []  # heavy frames of each block, and their weights
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
        self.parts.append((chosen.take(heavy, axis=1), np.ones(len(heavy)) if counts is None else counts[heavy]))
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

    def finish(self, rows: Rows, pull: Array) -> None:
        """Join the blocks, with the pseudo-frames among the heavy ones; give the memory of the blocks back."""
        share, pulled = 1.0 / (1.0 + pull.sum()), np.flatnonzero(pull)
        pseudo = np.eye(rows.members)[np.ix_(self.active, pulled)]
        heavy, weights = zip(*self.parts, strict=True)
        self.heavy = np.concatenate([*heavy, pseudo], axis=1, dtype=np.float64)
        own = np.concatenate(weights, dtype=np.float64) * (share / self.seen)
        self.weights = np.append(own, pull[pulled] * share)
        self.light *= share / self.total
        self.parts, self.room = [], Room()


def step(view: View, model: Curvature) -> Array:
    """(M,) the minimum, on the simplex, of the model moved to `view`.

    The heavy frames are kept exact, so this is a small Newton iteration of its own that reads no other frames.
    """
    A, P, s = model.active, model.heavy, model.weights
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
        change, along, bend, length = move @ P, move @ slope, move @ H @ move, 1.0
        for _ in range(60):  # halved until the model does not rise at the end of the step
            end = v + length * change
            if not len(s) or (end.min() > 0 and along + length * bend + change @ (s / v - s / end) <= 0.5 * abs(along)):
                break
            length *= 0.5
        y, v = y + length * move, v + length * change
        if gain <= 1e-4 * first:  # the next one would be of the order of its square
            break
    x = np.zeros_like(view.weights)
    x[A] = np.where(y < 1e-14 * y.max(), 0.0, y)
    x /= x.sum()
    return x


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
