"""Is a difference real? Intervals that resample recordings, paired tests, and corrections for many tests.

Frames of one recording resemble each other, so the unit of resampling is a recording, not a frame.
Everything here works on sums per recording, or on which answers are right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ensemble.outputs.arrays import floats, group_indices, truths

Floats = NDArray[np.float64]

_FEW = 20  # recordings
_CHUNK = 256  # replicates drawn at once: limits memory, changes no result


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval, which are NaN where there are too few recordings."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Test:
    """A test's statistic and its p-value."""

    __test__ = False  # not a test case, although its name looks like one to a collector

    statistic: float
    p_value: float


@dataclass(frozen=True, eq=False)
class CrossFit:
    """What fitted weights are worth on recordings that they were not fitted on."""

    #: mean log-loss in nats over the frames that some split tests, at the weights fitted without them; infinite where
    #: these give a frame's true class zero
    loss: float
    accuracy: float  #: fraction of these frames whose true class has the highest pooled probability
    optimism: float  #: `loss` minus the log-loss, on the same frames, of weights fitted on all frames
    optimism_accuracy: float  #: the accuracy of those weights minus `accuracy`
    weights: NDArray[np.float64]  #: (splits, M), fitted on the training frames of each split
    fold: NDArray[np.intp]  #: (N,) the first split that tests a frame; -1 where none does
    dropped: int = 0  #: frames left out of the losses because every member gave the true class exactly zero
    metric: str = "log_loss"  #: that the weights were fitted for
    value: float = math.nan  #: of `metric`, over the frames that some split tests, at the weights fitted without them
    optimism_value: float = math.nan  #: how much better `metric` is, on these frames, at weights fitted on all frames


def sums_by_group(values: ArrayLike, groups: ArrayLike) -> tuple[Floats, Floats]:
    """(G, K) sums of values over each recording, and (G,) numbers of frames; recordings in sorted order.

    Args:
        values: (N,) or (N, K) numbers per frame.
        groups: (N,) recording of each frame.

    Raises:
        ValueError: values and groups are not of one length.
    """
    table = floats(values, "values")
    if table.ndim not in (1, 2):
        msg = f"expected values of shape (N,) or (N, K) and a group for each frame, (N,), got {table.shape}"
        raise ValueError(msg)
    recordings = group_indices(groups, len(table)).numpy()
    _, where, sizes = np.unique(recordings, return_inverse=True, return_counts=True)
    columns = [np.bincount(where, column, minlength=len(sizes)) for column in np.atleast_2d(table.T)]
    return np.stack(columns, axis=1), sizes.astype(np.float64)


def piles(groups: ArrayLike, most: int = 10_000) -> tuple[NDArray[np.int64], int]:
    """(N,) the recording of each frame, counted from 0, and the number of recordings.

    More than `most` are dealt at random into so many piles, which are then resampled in their place.
    """
    recordings = np.asarray(groups)
    distinct, where = np.unique(recordings, return_inverse=True)
    if len(distinct) > most:
        where = (np.random.default_rng(0).permutation(len(distinct)) % most)[where]
    return where.astype(np.int64), len(distinct)


def resampling(recordings: int, frames: int) -> Iterator[str]:
    """Whether intervals over so many recordings can be trusted."""
    if recordings < 2:
        yield f"{recordings} recording{'s' * (not recordings)} cannot be resampled: there are no intervals"
    elif recordings < _FEW:
        yield f"{recordings} recordings are few to resample: intervals are too narrow"
    elif recordings == frames:
        yield "every frame is its own recording: if neighbours are alike, intervals are too narrow"


def cluster_bootstrap(sums: ArrayLike, sizes: ArrayLike, *, replicates: int = 2000, seed: int = 0) -> Floats:
    """(replicates, K) means over frames of resampled recordings, as one product of multinomial counts and sums.

    See Davison and Hinkley, "Bootstrap methods and their application", 1997, section 3.8.

    Args:
        sums: (G, K) sums per recording of K quantities, for instance the right answers of K rules; all K
            are resampled together, so differences between columns are paired.
        sizes: (G,) frames per recording; for G below two all means are NaN, because their spread is unknown.
        replicates: number of resamples.
        seed: of the generator; equal seeds, equal numbers.

    Raises:
        ValueError: sums and sizes do not fit together, or fewer than one replicate.
    """
    sums, sizes = floats(sums, "sums"), floats(sizes, "sizes")
    if sums.ndim != 2 or sizes.shape != sums.shape[:1]:
        msg = f"expected sums and sizes of shapes (G, K) and (G,), got {sums.shape} and {sizes.shape}"
        raise ValueError(msg)
    if replicates < 1:
        msg = f"expected one replicate or more, got {replicates}"
        raise ValueError(msg)
    if len(sizes) < 2:
        return np.full((replicates, sums.shape[1]), np.nan)
    generator, groups = np.random.default_rng(seed), len(sizes)
    means = np.empty((replicates, sums.shape[1]))
    for start in range(0, replicates, _CHUNK):
        rows = min(_CHUNK, replicates - start)
        drawn = generator.integers(groups, size=(rows, groups)) + np.arange(rows)[:, None] * groups
        counts = np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups).astype(np.float64)
        means[start : start + rows] = (counts @ sums) / (counts @ sizes)[:, None]
    return means


def bootstrap_interval(
    values: ArrayLike, groups: ArrayLike, *, level: float = 0.95, replicates: int = 2000, seed: int = 0
) -> Interval:
    """The mean over frames and its percentile interval over resampled recordings.

    Args:
        values: (N,) per frame; for a gain, the difference of two rules' right answers.
        groups: (N,) recording of each frame.
        level: nominal coverage, between 0 and 1.
        replicates: as for `cluster_bootstrap`, and so is `seed`.

    Raises:
        ValueError: values and groups differ in length, no replicate, or a level outside (0, 1).

    Example:
        >>> bootstrap_interval([1, 1, 0, 0], groups=[0, 0, 1, 1])
        Interval(estimate=0.5, low=0.0, high=1.0)
    """
    sums, sizes, mean = _mean(values, groups, level)
    means = cluster_bootstrap(sums, sizes, replicates=replicates, seed=seed)[:, 0]
    low, high = percentile_ends(means, level=level)
    return Interval(mean, float(low), float(high))


def percentile_ends(means: Floats, *, level: float = 0.95) -> Floats:
    """The ends, (2,) or (2, K), of the interval that holds the middle `level` of the replicates."""
    return np.asarray(np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0))


def t_interval(values: ArrayLike, groups: ArrayLike, *, level: float = 0.95) -> Interval:
    """The mean over frames and its interval from the spread between G recordings, by Student's t of G - 1 degrees.

    It needs no resampling, and is the better choice below some twenty recordings, where the bootstrap is too narrow.
    The mean is a ratio of sums (Cochran, "Sampling techniques", 1977, section 6.4).
    Arguments and errors are those of `bootstrap_interval`.
    """
    sums, sizes, mean = _mean(values, groups, level)
    count = len(sizes)
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    spread = float(np.square(sums[:, 0] - mean * sizes).sum())
    error = math.sqrt(spread * count / (count - 1)) / float(sizes.sum())
    half = error * float(special.stdtrit(count - 1, (1 + level) / 2))
    return Interval(mean, mean - half, mean + half)


def _mean(values: ArrayLike, groups: ArrayLike, level: float) -> tuple[Floats, Floats, float]:
    """`sums_by_group` of (N,) values, and their mean over frames, NaN for none; the level of an interval is checked."""
    if not 0 < level < 1:
        msg = f"expected a level between 0 and 1, for instance 0.95, got {level}"
        raise ValueError(msg)
    sums, sizes = sums_by_group(values, groups)
    return sums, sizes, float(sums.sum() / sizes.sum()) if len(sizes) else math.nan


def right_and_wrong(first: ArrayLike, second: ArrayLike) -> NDArray[np.int64]:
    """(2, 2) counts of frames, [[both right, only first], [only second, both wrong]], from where each is right, (N,).

    A `ValueError` where they are not of one length.
    """
    a, b = truths(first), truths(second)
    if a.ndim != 1 or a.shape != b.shape:
        msg = f"expected right and wrong of both over the same frames, (N,), got {a.shape} and {b.shape}"
        raise ValueError(msg)
    return np.bincount(2 * ~a + ~b, minlength=4).reshape(2, 2)


def mcnemar(table: ArrayLike) -> Test:
    """McNemar's test that two classifiers err equally often, with Edwards' continuity correction.

    Of the (2, 2) `table` from `right_and_wrong`, only the frames where exactly one is right matter; without any, the
    statistic is 0 and p is 1. It is chi-squared with one degree of freedom, if frames are independent: where recordings
    have many, trust `bootstrap_interval` instead. See McNemar, Psychometrika 12, 1947, and Edwards, 13, 1948.

    Example:
        >>> round(mcnemar([[101, 121], [59, 33]]).statistic, 3)
        20.672
    """
    b, c = _discordant(table)
    statistic = max(abs(b - c) - 1, 0) ** 2 / max(b + c, 1)
    return Test(statistic, float(special.chdtrc(1, statistic)))


def mcnemar_exact(table: ArrayLike) -> Test:
    """McNemar's test by the binomial distribution, for few discordant frames, such as fewer than 25.

    The statistic is the smaller discordant count; the p-value is two-sided.

    Example:
        >>> mcnemar_exact([[10, 6], [1, 10]])
        Test(statistic=1.0, p_value=0.125)
    """
    b, c = _discordant(table)
    return Test(float(min(b, c)), min(1.0, 2 * float(special.bdtr(min(b, c), b + c, 0.5))))


def _discordant(table: ArrayLike) -> tuple[int, int]:
    counts = floats(table, "a table of counts")
    if counts.shape != (2, 2) or not ((counts >= 0) & (counts % 1 == 0)).all():
        msg = f"expected a (2, 2) table of counts, got {counts.tolist()}; see right_and_wrong"
        raise ValueError(msg)
    return int(counts[0, 1]), int(counts[1, 0])


def cochran_q(correct: ArrayLike) -> Test:
    """Cochran's Q test that M classifiers are equally often right, from where each is, (M, N) bool.

    It is McNemar's question for more than two. The statistic is chi-squared with M - 1 degrees of freedom; it is 0, and
    p is 1, where all are right on the same frames. See Cochran, "The comparison of percentages in matched samples",
    Biometrika 37, 1950. A `ValueError` for fewer than two members.
    """
    right = truths(correct)
    if right.ndim != 2 or len(right) < 2:
        msg = f"expected right and wrong of shape (M, N) with two members or more, got {right.shape}"
        raise ValueError(msg)
    members, per_member, per_frame = len(right), right.sum(axis=1), right.sum(axis=0)
    total = int(per_frame.sum())
    above = (members - 1) * (members * int(np.square(per_member, dtype=np.int64).sum()) - total**2)
    below = members * total - int(np.square(per_frame, dtype=np.int64).sum())  # zero only where the other is
    statistic = above / max(below, 1)
    return Test(statistic, float(special.chdtrc(members - 1, statistic)))


def holm(p_values: ArrayLike) -> Floats:
    """(K,) p-values adjusted for K tests by Holm's step-down method.

    See Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    p = _p_values(p_values)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(stepped, 1)[np.argsort(order)]


def _p_values(given: ArrayLike) -> Floats:
    """(K,) float64, each from 0 to 1."""
    p = floats(given, "p-values")
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        msg = f"expected p-values of shape (K,), from 0 to 1, got {p}"
        raise ValueError(msg)
    return p


def bonferroni(p_values: ArrayLike) -> Floats:
    """(K,) p-values times their number, at most one: simpler than `holm`, and never more powerful."""
    p = _p_values(p_values)
    return np.minimum(p * len(p), 1)
