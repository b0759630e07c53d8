"""The (M, N) matrix of true-class probabilities, read block by block: checked once, scaled, weighted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Numbers = NDArray[Any]  # float32 or float64
Indices = NDArray[np.intp]

_RUN = 128  # consecutive frames that a sample takes together
_BLOCK = 2**18  # numbers in a block: with its copies it fits in the second-level cache
_SAFE = (1e-18, 1e18)  # a block in which a frame's largest probability leaves this range is scaled


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
    """

    def __init__(self, values: Numbers, weights: NDArray[np.float64] | None = None) -> None:
        self.values, self.weights = values, weights
        self.members, self.frames = values.shape
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
        cast = Room()
        for start in range(0, self.frames, self.columns):
            where = slice(start, min(start + self.columns, self.frames))
            raw, counts = self.values[:, where], None if self.weights is None else self.weights[where]
            if start not in self._alive:
                self._alive[start] = self._inspect(start, raw, counts)
            alive = self._alive[start]
            if alive is not None:
                raw = raw / np.where(alive, raw.max(axis=0), 1.0)
                counts = alive.astype(np.float64) if counts is None else counts * alive
            yield cast.cast(raw if members is None else raw[members], dtype), counts

    def sample(self, seed: int) -> Rows:
        """An eighth of the frames, at most 65,536, in random runs of consecutive frames: few jumps in memory."""
        count = min(self.frames // 8, 65_536) // _RUN
        runs = np.sort(np.random.default_rng(seed).permutation(self.frames // _RUN)[:count])
        where = (runs[:, None] * _RUN + np.arange(_RUN)).ravel()
        return Rows(self.values.take(where, axis=1), None if self.weights is None else self.weights[where])

    def reweighted(self, weights: NDArray[np.float64]) -> Rows:
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
        alive: NDArray[np.bool_] = largest > 0
        counts = np.ones(len(alive)) if counts is None else counts
        kept = counts * alive
        self.total += float(kept.sum())
        if largest.min() >= _SAFE[0] and largest.max() <= _SAFE[1]:
            return None
        self.dropped += int(((counts > 0) & ~alive).sum())
        self.log_scale += float(kept[alive] @ np.log(largest[alive].astype(np.float64)))
        return alive
