"""Reading the (M, N) matrix of true-class probabilities block by block: checked once, scaled, weighted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

Numbers = NDArray[Any]  # float32 or float64
Indices = NDArray[np.intp]

_RUN = 128  # frames of a sample that stand together
_BLOCK = 2**18  # numbers in a block: with its copies it stays in the second-level cache
_SAFE = (1e-18, 1e18)  # a block whose frames' largest probabilities leave this range is scaled


class Block(NamedTuple):
    """Some consecutive frames.

    Attributes:
        values: (M, b) probabilities, each frame up to a factor of its own.
        counts: (b,) float64, the frames' weights, 0 where every member gives zero; None where each counts once.
    """

    values: Numbers
    counts: Numbers | None


class Room:
    """Memory for one block after another: fresh pages cost more than the arithmetic done on them."""

    def __init__(self) -> None:
        self._array: Numbers = np.empty(0)

    def of(self, shape: tuple[int, ...], dtype: DTypeLike) -> Numbers:
        """An array of this shape and type, whatever it holds; the one given before is gone."""
        if self._array.shape != shape or self._array.dtype != dtype:
            self._array = np.empty(shape, dtype)
        return self._array

    def cast(self, values: Numbers, dtype: DTypeLike) -> Numbers:
        """The values in another type."""
        if values.dtype == dtype:
            return values
        np.copyto(array := self.of(values.shape, dtype), values, casting="same_kind")
        return array


class Rows:
    """A view of P as weighted frames ("rows" of the likelihood), never copied as a whole.

    Args:
        values: (M, N) float32 or float64, as `as_matrix` gives it.
        weights: (N,) non-negative, or None where every frame counts once.
        runs: of a sample, numbers of its runs: the k-th are the `_RUN` frames from k `_RUN` on. None: all frames.

    Attributes:
        members, frames: how many are read.
        total: weight of the frames that count, as far as they were read.
        dropped: frames with a weight in which every member gives the true class zero.
        log_scale: what scaling took from the weighted sum of logarithms.
    """

    def __init__(
        self, values: Numbers, weights: NDArray[np.float64] | None = None, runs: Indices | None = None
    ) -> None:
        self.values = values
        self.weights = weights
        self.runs = runs
        self.members, self.frames = len(values), values.shape[1] if runs is None else len(runs) * _RUN
        self._kinds: dict[int, NDArray[np.bool_] | None] = {}  # by a block's start, once it was read: see `_inspect`
        self.dropped = 0
        self.log_scale = 0.0
        self.total = 0.0

    @property
    def small(self) -> bool:
        """Whether it is so little that float64 throughout costs nothing."""
        return self.members * self.frames <= 2**16

    @property
    def columns(self) -> int:
        """Frames in a block."""
        return int(max(1024, _BLOCK // self.members // _RUN * _RUN))

    def rounding(self, dtype: type[np.floating[Any]]) -> float:
        """By how much, at most, a block's sum of products of positive numbers can be too small: a factor.

        Each of n additions loses at most half a unit in the last place of a sum that only grows, so the
        relative error is at most n units (Higham, "Accuracy and stability of numerical algorithms", chapter 4);
        a few more for the factors, and the blocks are added in float64.
        """
        return 1.0 + (self.columns + 8) * float(np.finfo(dtype).eps)

    def blocks(self, dtype: type[np.floating[Any]], members: Indices | None = None) -> Iterator[Block]:
        """Walk over the frames; a block's arrays hold until the next one is asked for.

        Args:
            dtype: of the values.
            members: whose values are wanted; None for all.

        Raises:
            ValueError: a number is NaN, infinite or negative (only the first walk looks).
        """
        columns, sampled, cast = self.columns, Room(), Room()
        for start in range(0, self.frames, columns):
            where = slice(start, min(start + columns, self.frames))
            raw = self._taken(self.values, where, sampled)
            if start not in self._kinds:
                self._kinds[start] = self._inspect(where, raw)
            alive = self._kinds[start]
            if alive is not None:
                raw = raw / _divisor(raw)
            if members is not None:
                raw = raw[members]
            counts = None if self.weights is None and alive is None else self._counts(where, alive)
            yield Block(cast.cast(raw, dtype), counts)

    def sample(self, seed: int) -> Rows:
        """An eighth of the frames, 65,536 at most, in random runs of consecutive ones: few jumps in memory."""
        runs = np.arange(self.frames // _RUN) if self.runs is None else self.runs
        chosen = np.random.default_rng(seed).permutation(runs)[: min(self.frames // 8, 65_536) // _RUN]
        return Rows(self.values, self.weights, np.sort(chosen))

    def reweighted(self, weights: NDArray[np.float64]) -> Rows:
        """The same frames, all read before, under other weights."""
        other = Rows(self.values, weights)
        other._kinds = self._kinds
        dead = [start + np.flatnonzero(~alive) for start, alive in self._kinds.items() if alive is not None]
        other.total = float(weights.sum() - sum(weights[where].sum() for where in dead))
        return other

    def _counts(self, where: slice, alive: NDArray[np.bool_] | None) -> Numbers:
        """(b,) the weights of a block's frames, 0 for those that no member explains."""
        weights: Numbers = np.ones(where.stop - where.start)
        if self.weights is not None:
            weights = self._taken(self.weights[None], where, Room())[0]
        return weights if alive is None else weights * alive

    def _taken(self, values: Numbers, where: slice, room: Room) -> Numbers:
        """(M, b) the frames of a block; those of a sample are gathered."""
        if self.runs is None:
            return values[:, where]
        out = room.of((len(values), where.stop - where.start), values.dtype)
        for place in range(0, out.shape[1], _RUN):
            start = int(self.runs[(where.start + place) // _RUN]) * _RUN
            out[:, place : place + _RUN] = values[:, start : start + _RUN]
        return out

    def _inspect(self, where: slice, raw: Numbers) -> NDArray[np.bool_] | None:
        """Check a block. None: it can be used as it is; else it needs scaling, and these frames count."""
        largest = _largest(where, raw)
        if largest.min() >= _SAFE[0] and largest.max() <= _SAFE[1]:
            self.total += float(self._counts(where, None).sum())
            return None
        alive: NDArray[np.bool_] = largest > 0
        counts = self._counts(where, alive)
        self.total += float(counts.sum())
        self.dropped += int(((self._counts(where, None) > 0) & ~alive).sum())
        self.log_scale += float(counts[alive] @ np.log(largest[alive].astype(np.float64)))
        return alive


def as_matrix(P: object) -> Numbers:
    """(M, N) float32 or float64, without a copy where the input already is one.

    Raises:
        ValueError: not two axes, or one of them is empty.
    """
    if isinstance(P, Tensor):
        P = P.detach().cpu()
        P = (P if P.dtype.itemsize >= 4 else P.float()).numpy()
    matrix = np.asarray(P)
    if matrix.dtype not in (np.float32, np.float64):
        matrix = matrix.astype(np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        msg = f"expected P of shape (M, N), members by frames, neither empty; got {matrix.shape}"
        raise ValueError(msg)
    return matrix


def _divisor(raw: Numbers) -> Numbers:
    largest = raw.max(axis=0)
    return np.where(largest > 0, largest, 1.0)


def _largest(where: slice, raw: Numbers) -> Numbers:
    """(b,) the largest of each frame, and the check of all numbers, in one read.

    Read as integers, floats keep their order, and infinity, NaN and negative numbers stand above the rest.
    """
    integers = np.uint32 if raw.itemsize == 4 else np.uint64
    largest: Numbers = raw.view(integers).max(axis=0)
    if largest.max() < np.array(np.inf, raw.dtype).view(integers):
        return largest.view(raw.dtype)
    _refuse(where, raw)
    return np.asarray(raw.max(axis=0))  # negative zeros are welcome


def _refuse(where: slice, raw: Numbers) -> None:
    wrong = ~np.isfinite(raw) | (raw < 0)
    if wrong.any():
        member, frame = np.argwhere(wrong)[0]
        msg = (
            f"expected finite probabilities of at least zero, got {raw[member, frame]} from member {member} "
            f"at frame {where.start + frame}"
        )
        raise ValueError(msg)
