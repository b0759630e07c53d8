"""`Batch`: the inputs of some frames, in the form that a plan wants them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

_MOST_ROWS = 1.25  # per frame; where gaps between short recordings make more, windows cost less than rows


class Neighbours(Protocol):
    """Neighbouring frames whose windows overlap in memory; `zoo.data.Stretch` is one."""

    @property
    def rows(self) -> Tensor:
        """(R, F) frames, padding included."""
        ...

    @property
    def firsts(self) -> Tensor:
        """(B,) row at which each frame's window begins, rising; the last window ends with the rows."""
        ...

    def windows(self) -> Tensor:
        """(B, (2 * context + 1) * F)."""
        ...


@dataclass(frozen=True, eq=False)
class Batch:
    """B frames as the members of one group see them.

    Args:
        count: B.
        gather: makes the (B, ...) inputs; called once, when they are first asked for.
        rows: (R, F) frames, padding included, where the windows overlap; else None.
        firsts: (B,) row at which each window begins.
    """

    count: int
    gather: Callable[[], Tensor]
    rows: Tensor | None = None
    firsts: Tensor | None = None

    @classmethod
    def of(cls, source: Tensor | Neighbours) -> Self:
        """From (B, ...) inputs, or from neighbouring frames."""
        if isinstance(source, Tensor):
            return cls(len(source), lambda: source)
        return cls(len(source.firsts), source.windows, source.rows, source.firsts)

    @cached_property
    def windows(self) -> Tensor:
        """(B, ...) inputs."""
        return self.gather()

    @property
    def overlaps(self) -> bool:
        """Whether the frames are neighbours, and close enough to be worth computing the gaps too."""
        return self.rows is not None and len(self.rows) - self._tail <= _MOST_ROWS * self.count

    @property
    def _tail(self) -> int:
        return 0 if self.rows is None or self.firsts is None else len(self.rows) - int(self.firsts[-1])

    def middle(self, cut: int, features: int) -> Batch:
        """The same frames with `cut` frames less on each side of every window; no copy."""
        if not cut:
            return self
        edge = cut * features
        rows = None if self.rows is None else self.rows[cut : len(self.rows) - cut]
        return Batch(self.count, lambda: self.windows[:, edge : self.windows.shape[1] - edge], rows, self.firsts)

    def typed(self, dtype: torch.dtype) -> Batch:
        """The same with inputs of the type of a model's weights; whole numbers stay what they are."""
        if dtype == torch.float32:
            return self
        return Batch(self.count, lambda: self.windows.to(dtype) if self.windows.is_floating_point() else self.windows)

    def head(self, count: int) -> Batch:
        """The first `count` frames; no copy."""
        if count >= self.count or self.rows is None or self.firsts is None:
            return Batch(min(count, self.count), lambda: self.windows[:count], self.rows, self.firsts)
        rows = self.rows[: int(self.firsts[count - 1]) + self._tail]
        return Batch(count, lambda: self.windows[:count], rows, self.firsts[:count])
