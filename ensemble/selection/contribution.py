"""What each member contributes to the pool: leave-one-out, and averaged over all orders of joining (Shapley)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import comb
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ensemble.fit._solver import fit_simplex_weights, labelled, refit, refuse_nan
from ensemble.fit._solver.newton import Rows
from ensemble.outputs import LEAST, MemberOutputs, expect_outputs

Array = NDArray[np.float64]

Pool = Literal["mean", "weighted"]
_EXACT = 10  # up to this many members all subsets are computed


@dataclass(frozen=True, eq=False)
class Contributions:
    """Nats by which each member reduces the log-loss of the pool; negative where it does harm."""

    members: tuple[str, ...]
    leave_one_out: Array  #: (M,) loss without the member minus the loss of all
    #: (M,) mean reduction over the orders in which members may join; the values add up to the loss of equal
    #: probabilities minus the loss of all members
    shapley: Array
    error: Array  #: (M,) standard error of `shapley`; zero where it is exact
    pool: Pool  #: "mean" for equal weights, "weighted" for weights fitted anew to every subset


def contributions(
    outputs: MemberOutputs, *, pool: Pool = "mean", permutations: int = 200, seed: int = 0
) -> Contributions:
    """Leave-one-out and Shapley contributions to the log-loss.

    A member's probability of the true class counts as at least 2^-52, so all figures are finite and add up. See
    Shapley, "A value for n-person games", 1953, and for random orders Castro et al., "Polynomial calculation of the
    Shapley value based on sampling", Computers & Operations Research 36(5), 2009.

    Args:
        outputs: with labels.
        pool: "mean" judges the plain mean, which every member moves; "weighted" refits weights, where a member
            can only help and a duplicate adds nothing.
        permutations: number of random orders where M exceeds 10; up to there all 2^M subsets are computed.
        seed: seed of the orders.

    Raises:
        ValueError: no labels, no frames, NaN, an unknown pool, or fewer than two orders.
    """
    expect_outputs(outputs)
    if pool not in ("mean", "weighted") or permutations < 2:
        msg = f"expected the pool 'mean' or 'weighted' and at least two permutations, got {pool!r}, {permutations}"
        raise ValueError(msg)
    labelled(outputs)
    P = np.maximum(outputs.true_class().numpy(), LEAST)  # NaN stays NaN
    refuse_nan(outputs, P)
    M, rows, start = len(P), Rows(P), fit_simplex_weights(P).weights if pool == "weighted" else None

    @cache
    def loss(subset: int) -> float:
        """Nats per frame of the pool of a subset, given as a bit mask."""
        if not subset:
            return float(np.log(len(outputs.classes)))
        inside = np.array([bool(subset >> m & 1) for m in range(M)])
        if start is not None:
            return refit(rows, start=start, allowed=inside).loss
        return float(-np.log(P[inside].mean(axis=0)).mean())

    every = (1 << M) - 1
    alone = np.array([loss(every & ~(1 << m)) for m in range(M)]) - loss(every)
    if M <= _EXACT:  # over all subsets without a member, weighted by the share of orders that pass there
        share, shapley = [1.0 / (M * comb(M - 1, k)) for k in range(M)], np.zeros(M)
        for subset, m in product(range(1 << M), range(M)):
            if not subset >> m & 1:
                shapley[m] += share[subset.bit_count()] * (loss(subset) - loss(subset | 1 << m))
        return Contributions(outputs.members, alone, shapley, np.zeros(M), pool)
    generator, gains = np.random.default_rng(seed), np.zeros((permutations, M))
    for row in gains:
        subset = 0
        for m in generator.permutation(M).tolist():
            row[m] = loss(subset) - loss(subset | 1 << m)
            subset |= 1 << m
    error = gains.std(axis=0, ddof=1) / np.sqrt(permutations)
    return Contributions(outputs.members, alone, gains.mean(axis=0), error, pool)
