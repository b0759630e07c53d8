"""How members differ: pair by pair, as a crowd, and what the difference is worth.

Pairwise and crowd measures see right and wrong only, (M, N) bool; the pairs come from one matrix product,
the crowd from the histogram of how many members are right. Splits of uncertainty and of loss see the
probabilities. A new measure is one function under `@pair_measure` or `@crowd_measure`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_BLOCK = 65_536  # frames turned to float32 at once


@dataclass(frozen=True, eq=False)
class Joint:
    """How often members are right together.

    Args:
        both: (M, M) frames where both are right; the diagonal counts where one is.
        frames: N.
    """

    both: Floats
    frames: int

    @classmethod
    def of(cls, correct: ArrayLike) -> Joint:
        """Counted from (M, N) bool by matrix products, exact: whole numbers below 2^24 a block."""
        right = np.asarray(correct, dtype=bool)
        both = np.zeros((len(right), len(right)))
        for start in range(0, right.shape[1], _BLOCK):
            block = right[:, start : start + _BLOCK].astype(np.float32)
            both += block @ block.T
        return cls(both, right.shape[1])

    @property
    def right(self) -> Floats:
        """(M,) frames where each member is right."""
        return np.diagonal(self.both).copy()

    @property
    def only_first(self) -> Floats:
        """(M, M) frames where the row's member is right and the column's is wrong."""
        return self.right[:, None] - self.both

    @property
    def only_second(self) -> Floats:
        """(M, M) frames where the column's member is right and the row's is wrong."""
        return self.right[None, :] - self.both

    @property
    def neither(self) -> Floats:
        """(M, M) frames where both are wrong."""
        return self.frames - self.both - self.only_first - self.only_second


PAIR_MEASURES: dict[str, Callable[[Joint], Floats]] = {}
CROWD_MEASURES: dict[str, Callable[[Floats], float]] = {}


def pair_measure(function: Callable[[Joint], Floats]) -> Callable[[Joint], Floats]:
    """Enter a pairwise measure, `Joint` to (M, M), into the table under its own name."""
    PAIR_MEASURES[function.__name__] = function
    return function


def crowd_measure(function: Callable[[Floats], float]) -> Callable[[Floats], float]:
    """Enter a measure of the whole crowd into the table: from (M + 1,) fractions of frames to a number."""
    CROWD_MEASURES[function.__name__] = function
    return function


def _ratio(above: Floats, below: Floats) -> Floats:
    """Quotient, NaN where it is nought by nought."""
    quotient: Floats = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0)
    return quotient


@pair_measure
def disagreement(joint: Joint) -> Floats:
    """Fraction of the frames where exactly one of the two is right (Skalak, 1996)."""
    return _ratio(joint.only_first + joint.only_second, np.full_like(joint.both, joint.frames))


@pair_measure
def q_statistic(joint: Joint) -> Floats:
    """Yule's Q: 1 where they are right on the same frames, 0 if independent, below 0 if they complement.

    NaN where a product of counts is nought on both sides, for instance beside a member that is never wrong.
    """
    same, crossed = joint.both * joint.neither, joint.only_first * joint.only_second
    return _ratio(same - crossed, same + crossed)


@pair_measure
def correlation(joint: Joint) -> Floats:
    """Correlation of right and wrong; NaN beside a member that is always or never right."""
    same, crossed = joint.both * joint.neither, joint.only_first * joint.only_second
    spread = joint.right * (joint.frames - joint.right)  # (M,)
    return _ratio(same - crossed, np.sqrt(np.outer(spread, spread)))


@pair_measure
def double_fault(joint: Joint) -> Floats:
    """Fraction of the frames where both are wrong (Giacinto and Roli, 2001)."""
    return _ratio(joint.neither, np.full_like(joint.both, joint.frames))


@pair_measure
def kappa(joint: Joint) -> Floats:
    """Cohen's kappa of right and wrong: agreement beyond chance; NaN where chance agreement is whole."""
    same, crossed = joint.both * joint.neither, joint.only_first * joint.only_second
    right, wrong = joint.right, joint.frames - joint.right
    return _ratio(2 * (same - crossed), np.outer(right, wrong) + np.outer(wrong, right))
