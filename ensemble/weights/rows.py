"""Reading the (M, N) matrix of true-class probabilities block by block: checked once, scaled, weighted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
_BLOCK = 2**18  # numbers in a block: it stays in the second-level cache
_SAFE = (1e-18, 1e18)  # a frame whose largest probability lies outside is scaled before float32 sees it


def as_matrix(P: object) -> Array:
    """(M, N) float32 or float64 without a copy where the input already is one.

    Raises:
        ValueError: not two axes, or one of them is empty.
    """
    values = P.detach().cpu() if isinstance(P, Tensor) else P
    if isinstance(values, Tensor):
        values = values.numpy() if values.dtype.itemsize >= 4 else values.float().numpy()
    matrix = np.asarray(values)
    if matrix.dtype not in (np.float32, np.float64):
        matrix = matrix.astype(np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        msg = f"expected P of shape (M, N), members by frames, neither empty; got {matrix.shape}"
        raise ValueError(msg)
    return matrix


class Rows:
    """A view of P as weighted frames ("rows" of the likelihood), read in blocks that fit the cache.

    Args:
        values: (M, N) float32 or float64, as `as_matrix` gives it.
        weights: (N,) non-negative, or None where every frame counts once.

    Attributes:
        maxima: (N,) float32, each frame's largest probability over the members; 0 marks a frame that
            says nothing (zero in every member, or of weight 0), NaN one that was not read yet.
        dropped: frames with a weight in which every member gives the true class zero.
        log_scale: what scaling took from the sum of weighted logarithms.
    """

    def __init__(self, values: Array, weights: NDArray[np.float64] | None = None) -> None:
        self.values = values
        self.weights = weights
        self.members, self.frames = values.shape
        self.maxima = np.full(self.frames, np.nan, dtype=np.float32)
        self.dropped = 0
        self.log_scale = 0.0

    def blocks(self, dtype: type[np.floating[Any]]) -> Iterator[tuple[slice, Array, Array]]:
        """Walk over (where, block (M, b) of `dtype`, largest (b,)); a frame of extreme size comes scaled to 1."""
        columns = max(512, _BLOCK // self.members)
        for start in range(0, self.frames, columns):
            where = slice(start, min(start + columns, self.frames))
            raw = self.values[:, where]
            if np.isnan(self.maxima[start]):
                self._inspect(where, raw)
            block, largest = _scaled(raw, self.maxima[where])
            yield where, block.astype(dtype, copy=False), largest

    @property
    def total(self) -> float:
        """The sum of the weights of the frames that say something; complete after one walk."""
        alive = self.maxima > 0
        return float(alive.sum() if self.weights is None else self.weights[alive].sum())

    def _inspect(self, where: slice, raw: Array) -> None:
        largest = raw.max(axis=0)
        if not np.isfinite(largest).all() or raw.min() < 0:
            bad = ~np.isfinite(raw) | (raw < 0)
            member, frame = np.argwhere(bad)[0]
            msg = (
                f"expected finite probabilities of at least zero, got {raw[member, frame]} from member "
                f"{member} at frame {where.start + frame}"
            )
            raise ValueError(msg)
        counts = np.ones(len(largest)) if self.weights is None else self.weights[where]
        alive = (largest > 0) & (counts > 0)
        self.dropped += int(((largest <= 0) & (counts > 0)).sum())
        self.maxima[where] = np.where(alive, np.clip(largest, 1e-37, 1e37), 0.0)
        if _extreme(self.maxima[where]):
            self.log_scale += float(counts[alive] @ np.log(largest[alive].astype(np.float64)))


def _extreme(largest: Array) -> bool:
    return bool(largest.min() < _SAFE[0] or largest.max() > _SAFE[1])


def _scaled(raw: Array, largest: Array) -> tuple[Array, Array]:
    if not _extreme(largest):
        return raw, largest
    exact = raw.max(axis=0)
    return raw / np.where(exact > 0, exact, 1.0), np.sign(largest)
