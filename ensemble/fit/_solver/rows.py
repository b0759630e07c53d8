"""The (M, N) matrix of true-class probabilities, read block by block: checked once, scaled, weighted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

Numbers = NDArray[Any]  # float32 or float64
Indices = NDArray[np.intp]

_RUN = 128  # consecutive frames that a sample takes together
_BLOCK = 2**18  # numbers in a block: with its copies it fits in the second-level cache
_SAFE = (1e-18, 1e18)  # a block in which a frame's largest probability leaves this range is scaled


class Block(NamedTuple):
    """Some consecutive frames.

    Attributes:
        values: (M, b) probabilities, each frame up to a factor of its own.
        counts: (b,) float64, the frames' weights, 0 where every member gives zero; None where each counts once.
    """

    values: Numbers
    counts: Numbers | None


class Room:
    """Memory that is reused from block to block: fresh pages cost more than the arithmetic done on them."""

    def __init__(self) -> None:
        self._array: Numbers = np.empty(0)

    def of(self, shape: tuple[int, ...], dtype: DTypeLike) -> Numbers:
        """An array of this shape and type with any content; it replaces the one returned before."""
        if self._array.shape != shape or self._array.dtype != dtype:
            self._array = np.empty(shape, dtype)
        return self._array

    def cast(self, values: Numbers, dtype: DTypeLike) -> Numbers:
        """The values in this type, copied only where it differs."""
        if values.dtype == dtype:
            return values
        np.copyto(array := self.of(values.shape, dtype), values, casting="same_kind")
        return array


class Rows:
    """A view of P as weighted frames ("rows" of the likelihood), never copied as a whole.

    Args:
        values: (M, N) float32 or float64, as `as_matrix` returns it.
        weights: (N,) non-negative, or None where every frame counts once.
        runs: indices of the runs in a sample, where run k is the `_RUN` frames from k * `_RUN` on; None for all frames.

    Attributes:
        members, frames: their numbers.
        total: weight of the frames that count, of those read so far.
        dropped: number of frames with a weight in which every member gives the true class zero.
        log_scale: what scaling took from the weighted sum of logarithms.
    """

    def __init__(
        self, values: Numbers, weights: NDArray[np.float64] | None = None, runs: Indices | None = None
    ) -> None:
        self.values = values
        self.weights = weights
        self.runs = runs
        self.members, self.frames = len(values), values.shape[1] if runs is None else len(runs) * _RUN
        self._kinds: dict[int, NDArray[np.bool_] | None] = {}  # by a block's start, once read; see `_inspect`
        self.dropped = 0
        self.log_scale = 0.0
        self.total = 0.0

    @property
    def small(self) -> bool:
        """Whether the matrix is so small that float64 throughout costs nothing."""
        return self.members * self.frames <= 2**16

    @property
    def columns(self) -> int:
        """Frames in a block."""
        return int(max(1024, _BLOCK // self.members // _RUN * _RUN))

    def rounding(self, dtype: type[np.floating[Any]]) -> float:
        """The largest factor by which a block's sum of products of positive numbers can be too small.

        Each of n additions loses at most half a unit in the last place of a sum that only grows, so the
        relative error is at most n units (Higham, "Accuracy and stability of numerical algorithms", chapter 4),
        and a few more for the factors; blocks are added in float64.
        """
        return 1.0 + (self.columns + 8) * float(np.finfo(dtype).eps)

    def blocks(self, dtype: type[np.floating[Any]], members: Indices | None = None) -> Iterator[Block]:
        """Pass over the frames; a block's arrays are valid until the next block is requested.

        Args:
            dtype: type of the values.
            members: members to read; None for all.

        Raises:
            ValueError: a number is NaN, infinite or negative (checked in the first pass only).
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
        """An eighth of the frames, at most 65,536, in random runs of consecutive frames: few jumps in memory."""
        runs = np.arange(self.frames // _RUN) if self.runs is None else self.runs
        chosen = np.random.default_rng(seed).permutation(runs)[: min(self.frames // 8, 65_536) // _RUN]
        return Rows(self.values, self.weights, np.sort(chosen))

    def reweighted(self, weights: NDArray[np.float64]) -> Rows:
        """The same frames, all of which were read before, under other weights."""
        other = Rows(self.values, weights)
        other._kinds = self._kinds
        dead = [start + np.flatnonzero(~alive) for start, alive in self._kinds.items() if alive is not None]
        other.total = float(weights.sum() - sum(weights[where].sum() for where in dead))
        return other

    def _counts(self, where: slice, alive: NDArray[np.bool_] | None) -> Numbers:
        """(b,) the weights of a block's frames, 0 where every member gives the true class zero."""
        weights: Numbers = np.ones(where.stop - where.start)
        if self.weights is not None:
            weights = self._taken(self.weights[None], where, Room())[0]
        return weights if alive is None else weights * alive

    def _taken(self, values: Numbers, where: slice, room: Room) -> Numbers:
        """(M, b) the frames of a block, gathered where they are a sample's."""
        if self.runs is None:
            return values[:, where]
        out = room.of((len(values), where.stop - where.start), values.dtype)
        for place in range(0, out.shape[1], _RUN):
            start = int(self.runs[(where.start + place) // _RUN]) * _RUN
            out[:, place : place + _RUN] = values[:, start : start + _RUN]
        return out

    def _inspect(self, where: slice, raw: Numbers) -> NDArray[np.bool_] | None:
        """Check a block: None where it can be used as it is; else it needs scaling, and these frames count."""
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
    """(b,) the largest number of each frame; all numbers are checked in the same read.

    Read as integers, floats keep their order, with infinity, NaN and negative numbers above the rest.
    """
    integers = np.uint32 if raw.itemsize == 4 else np.uint64
    largest: Numbers = raw.view(integers).max(axis=0)
    if largest.max() < np.array(np.inf, raw.dtype).view(integers):
        return largest.view(raw.dtype)
    _refuse(where, raw)
    return np.asarray(raw.max(axis=0))  # negative zeros are allowed


def _refuse(where: slice, raw: Numbers) -> None:
    wrong = ~np.isfinite(raw) | (raw < 0)
    if wrong.any():
        member, frame = np.argwhere(wrong)[0]
        msg = (
            f"expected finite probabilities of at least zero, got {raw[member, frame]} from member {member} "
            f"at frame {where.start + frame}"
        )
        raise ValueError(msg)
