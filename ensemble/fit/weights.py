"""Fit the linear pool, with one weight per member or one per member and class, and the log-linear pool."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from ensemble.fit._solver import (
    Array,
    SimplexFit,
    at_least_zero,
    checked_weights,
    fit_simplex_weights,
    labelled,
    positive,
    refuse_nan,
)
from ensemble.fit._solver.newton import nonnegative_minimum
from ensemble.fit.greedy import greedy, residual_products
from ensemble.judge.metrics import METRICS, Counts, Metric
from ensemble.outputs import MemberOutputs, expect_outputs
from ensemble.outputs.arrays import floats
from ensemble.rules.fitted import ClasswiseMean, LogPool, WeightedMean
from ensemble.rules.table import no_such
from zoo._notebook import Table, html

Objective = str  # "nll" or a name in `ensemble.judge.METRICS`
_EXACT = 2**22  # a true-class matrix of up to this many numbers is kept in float64
_BLOCK = 2**21  # numbers of (M, b, C) processed together
_FRAMES = 8192  # frames processed together by the log-linear pool and by the class-wise fit
_ROUNDING = 1e-6  # of a difference of probabilities in float32, and of their weighted means
_LOWEST = math.log(LogPool.floor)


@dataclass(frozen=True, eq=False)
class WeightFit:
    """Weights of a `WeightedMean`, and the proof of how good they are on the frames that they were fitted on.

    Attributes:
        weights: (M,) float64, non-negative, summing to one, in the order of `members`.
        loss: the objective at these weights over the frames kept: nats per frame for "nll", mean squared
            distance to the one-hot truth (0 to 2) for "brier", one minus the metric for decisions; without the
            shrinkage term.
        gap: the objective is at most this far above its minimum; for decisions loose, see `fit_weights`.
        multipliers: (M,) d_m for "nll" (see `SimplexFit`); for "brier" 1 - (slope_m - w . slope), so that
            both are 1 on the support and at most 1 elsewhere, up to the gap; NaN for decisions.
        passes, dropped: see `SimplexFit`.
    """

    weights: Array
    loss: float
    gap: float
    passes: float
    multipliers: Array
    members: tuple[str, ...]
    objective: Objective = "nll"
    dropped: int = 0
    fingerprint: str = ""

    @property
    def metric(self) -> str:
        """The objective's name in `ensemble.judge.METRICS`."""
        return "log_loss" if self.objective == "nll" else self.objective

    @property
    def value(self) -> float:
        """The metric that `loss` stands for: one minus it where more is better."""
        return 1 - self.loss if METRICS[self.metric].higher else self.loss

    @property
    def rule(self) -> WeightedMean:
        """The weighted mean of these members with these weights."""
        return WeightedMean(tuple(self.weights.tolist()), self.fingerprint, members=self.members)

    @property
    def support(self) -> tuple[str, ...]:
        """Names of the members with a positive weight."""
        return tuple(name for name, weight in zip(self.members, self.weights, strict=True) if weight > 0)

    @property
    def conclusion(self) -> str:
        """One sentence: what the weights reach, and how far they can be from the best."""
        metric = METRICS[self.metric]
        side = "below the most" if metric.higher else "above the least"
        return f"{metric.words(self.value)}, at most {self.gap:.1e} {side} that any weights reach"

    def __repr__(self) -> str:
        return f"WeightFit: {self.conclusion}\nweights: {weights_in_words(self.members, self.weights)}"

    def _repr_html_(self) -> str:
        columns = zip(self.members, self.weights.tolist(), self.multipliers.tolist(), strict=True)
        rows = [
            {"member": name, "weight": weight, "multiplier": None if math.isnan(multiplier) else multiplier}
            for name, weight, multiplier in columns
        ]
        table = Table(rows, formats={"weight": ".4f", "multiplier": ".4f"})
        known = (
            "" if np.isnan(self.multipliers).all() else "; multipliers are one where a member is used, else at most one"
        )
        return html("Fitted weights", [self.conclusion + known], [table])


def weights_in_words(members: Sequence[str], weights: Array) -> str:
    """The positive weights, the largest first, for sentences."""
    ordered = sorted(zip(members, weights.tolist(), strict=True), key=lambda pair: -pair[1])
    positive_ones = [f"{name} {weight:.3f}" for name, weight in ordered if weight > 0]
    return ", ".join(positive_ones[:20]) + (f" and {len(positive_ones) - 20} more" if len(positive_ones) > 20 else "")


def fit_weights(
    outputs: MemberOutputs,
    objective: Objective = "nll",
    *,
    alpha: float = 0.0,
    sample_weights: object | None = None,
    start: object | None = None,
    on_nan: Literal["raise", "drop"] = "raise",
    tolerance: float = 1e-6,
    max_passes: int = 100,
) -> WeightFit:
    """The best weights of the linear pool on these frames; judge them on other frames.

    For the log-loss and the Brier score, which are convex, `gap` proves the weights optimal. Accuracy and macro F1 are
    neither convex nor smooth: their weights are the shares of 50 greedy picks (see `greedy`), never worse than the best
    single member on these frames, and `gap` compares them with a bound that no weights exceed, since some frames are
    wrong whatever the weights: those where every member prefers one and the same class to the true one. Better weights
    may exist. These objectives also flatter themselves more: see `cross_fit` for how much.

    Args:
        outputs: with labels; read in blocks, so they may be memory-mapped.
        objective: "nll" or "log_loss", "brier" for the squared error of the whole distribution, or a metric of
            decisions: "accuracy", "macro_f1", or your own of `Counts` (its gap is infinite).
        alpha: strength of the pull towards equal weights. "nll": as if M further frames, of total weight alpha N, had
            been added, on each of which exactly one member is right; "brier": alpha times the squared distance from
            equal weights; 0 for decisions.
        sample_weights: (N,) non-negative; integers act as repeated frames.
        start: (M,) weights to begin from ("nll" only; the Brier score needs none).
        on_nan: "drop" gives weight 0 to a member with NaN on some frame, with a warning.
        tolerance: gap to reach, in units of the objective.
        max_passes: stop after this many reads of the frames, whatever the gap ("nll" only).

    Raises:
        ValueError: no labels, an unknown objective, a negative setting, NaN (the message names the member),
            or no usable frame.

    Example:
        >>> p, q = [[0.9, 0.1], [0.8, 0.2]], [[0.1, 0.9], [0.2, 0.8]]
        >>> outputs = MemberOutputs.from_probabilities({"good": p, "bad": q}, labels=[0, 0])
        >>> fit_weights(outputs).weights.tolist()
        [1.0, 0.0]
    """
    expect_outputs(outputs)
    if objective not in (known := {"nll", *METRICS}):
        raise ValueError(no_such("objective", objective, known))
    metric = METRICS["log_loss" if objective == "nll" else objective]
    if on_nan not in ("raise", "drop"):
        msg = f"expected on_nan 'raise' or 'drop', got {on_nan!r}"
        raise ValueError(msg)
    at_least_zero(alpha=alpha, tolerance=tolerance)
    M, N, _ = outputs.shape
    offset = 0.0
    if metric.name not in ("log_loss", "brier"):
        fit, kept = _best_decisions(outputs, metric, sample_weights, alpha, on_nan)
    elif metric.name == "brier":
        fit, kept = _least_brier(outputs, sample_weights, alpha, on_nan)
    else:
        P, log_scale = _true_class_matrix(outputs)
        kept = _members_kept(outputs, P.sum(axis=1), on_nan)
        if len(kept) < M:
            P, start = P[kept], None if start is None else floats(start, "weights to start from")[kept]
        settings: Any = {"alpha": alpha, "start": start, "tolerance": tolerance, "max_passes": max_passes}
        fit = fit_simplex_weights(P, sample_weights=sample_weights, **settings)
        counts = np.ones(N) if sample_weights is None else checked_weights(sample_weights, N)
        counts = counts * np.isfinite(log_scale)
        offset = float(counts @ np.where(counts > 0, log_scale, 0.0)) / float(counts.sum())
    if len(kept) < M:
        names = [name for m, name in enumerate(outputs.members) if m not in kept]
        warnings.warn(f"{names} have NaN on some frame and get weight 0", stacklevel=2)
    weights, multipliers = np.zeros(M), np.full(M, np.nan)
    weights[kept], multipliers[kept] = fit.weights, fit.multipliers
    proof = fit.loss - offset, fit.gap, fit.passes, multipliers
    return WeightFit(weights, *proof, outputs.members, objective, fit.dropped, outputs.fingerprint)


def _best_decisions(
    outputs: MemberOutputs, metric: Metric, sample_weights: object | None, alpha: float, on_nan: str
) -> tuple[SimplexFit, NDArray[np.intp]]:
    """Greedy weights for a metric of decisions, with the gap to its bound, and the members that they are of."""
    if alpha:
        msg = f"expected alpha 0 for {metric.name}, whose weights cannot be pulled, got {alpha}"
        raise ValueError(msg)
    sums = np.array([sum(float(part.sum()) for part in member.split(_FRAMES)) for member in outputs.log_probabilities])
    kept = _members_kept(outputs, sums, on_nan)
    judged = outputs if len(kept) == len(outputs.members) else outputs.subset([outputs.members[m] for m in kept])
    found = greedy(judged, metric=metric.name, sample_weights=sample_weights)
    loss, support = 1 - found.value, tuple(np.flatnonzero(found.weights).tolist())
    gap = max(loss - least_loss(judged, metric.name, sample_weights), 0.0)
    return SimplexFit(found.weights, loss, gap, len(found.picks), np.full(len(kept), np.nan), support, 0), kept


def least_loss(outputs: MemberOutputs, metric: str, sample_weights: object | None = None) -> float:
    """A bound of one minus a metric of decisions, for every linear pool of some of the members; -inf where unknown.

    A frame is lost to all pools where one class has more than the true one from every member. Were all others right,
    macro F1 would be the mean of 2 h / (h + n) over the classes, with h of n frames not lost.
    """
    labels = labelled(outputs).numpy()
    times = np.ones(len(labels)) if sample_weights is None else checked_weights(sample_weights, len(labels))
    (M, _, C), lost = outputs.shape, np.empty(len(labels), dtype=bool)
    for where, block in outputs.blocks(max(1, _BLOCK // (M * C))):
        truth = block.gather(-1, torch.from_numpy(labels[where]).expand(M, -1)[..., None])
        lost[where] = ((block - truth).amin(dim=0) > _ROUNDING).any(dim=-1).numpy()
    n, h = np.bincount(labels, times, C), np.bincount(labels, times * ~lost, C)
    bounds = {"accuracy": h.sum() / n.sum(), "macro_f1": METRICS["macro_f1"].function(Counts(h, h, n))}
    return 1 - float(bounds.get(metric, np.inf))


def _members_kept(outputs: MemberOutputs, sums: NDArray[np.floating], on_nan: str) -> NDArray[np.intp]:
    """Positions of the members whose sums are not NaN; the others are refused unless they are to be dropped."""
    kept = np.flatnonzero(~np.isnan(sums))
    if on_nan == "raise" or not len(kept):
        refuse_nan(outputs, sums[:, None])
    return kept


def explained_matrix(outputs: MemberOutputs) -> tuple[NDArray[np.floating], Array, NDArray[np.bool_]]:
    """P (M, N) and the logarithms (N,) of its divisors, see `_true_class_matrix`; and the frames that count, (N,) bool.

    These are the frames to whose true class some member gives a positive probability; there must be one, and no NaN.
    """
    P, log_scale = _true_class_matrix(outputs)
    refuse_nan(outputs, P)
    alive = np.isfinite(log_scale)
    if not alive.any():
        msg = f"expected a positive probability of the true class somewhere, got {len(alive)} frames of zeros"
        raise ValueError(msg)
    return P, log_scale, alive


def _true_class_matrix(outputs: MemberOutputs) -> tuple[NDArray[np.floating], Array]:
    """P (M, N), scaled so that nothing underflows, and the logarithms of the divisors (N,).

    Each member's probability of the true class is divided by the frame's largest one; float64 up to `_EXACT` numbers,
    float32 above. A frame to whose true class every member gives zero has the divisor's logarithm -inf and zeros in P.
    """
    labels, (M, N, C) = labelled(outputs), outputs.shape
    P = np.empty((M, N), np.float64 if M * N <= _EXACT else np.float32)
    log_scale = np.empty(N)
    step = max(1, _BLOCK // (M * C))
    for begin in range(0, N, step):
        where = slice(begin, min(begin + step, N))
        index = labels[where].expand(M, -1).unsqueeze(-1)
        logs = outputs.log_probabilities[:, where].gather(-1, index).squeeze(-1).double().numpy()
        largest = np.fmax.reduce(logs, axis=0)
        largest[np.isnan(largest)] = 0.0
        log_scale[where] = largest
        P[:, where] = np.exp(logs - np.where(np.isneginf(largest), 0.0, largest))
    return P, log_scale


def _least_brier(
    outputs: MemberOutputs, sample_weights: object | None, alpha: float, on_nan: str
) -> tuple[SimplexFit, NDArray[np.intp]]:
    """The weights of least Brier score, with the pull, and the members that they are of.

    The score of a pool is w' R w, see `residual_products`.
    """
    labels = labelled(outputs)
    counts = np.ones(len(labels)) if sample_weights is None else checked_weights(sample_weights, len(labels))
    R = residual_products(outputs, counts)
    kept = _members_kept(outputs, np.diag(R), on_nan)
    R = R[np.ix_(kept, kept)]
    w, slope, gap = least_quadratic(R + alpha * np.eye(len(kept)))
    support = tuple(np.flatnonzero(w).tolist())
    return SimplexFit(w, float(w @ R @ w), gap, 1.0, 1.0 - (slope - w @ slope), support, 0), kept


def least_quadratic(Q: Array) -> tuple[Array, Array, float]:
    """Weights w (M,) on the simplex of least w' Q w, its slope there, and how far above its minimum it is at most.

    The gap is that of Frank and Wolfe, w . slope - min slope, at least w' Q w - min Q by convexity.
    """
    unit = np.eye(len(Q))
    ridge = 1e-12 * float(np.trace(Q)) / len(Q) + 1e-300
    x = nonnegative_minimum(Q + ridge * unit, np.ones(len(Q)), unit[int(np.diag(Q).argmin())])
    w = x / x.sum()  # the quadratic is homogeneous: its minimum on the ray is all that matters
    slope = 2.0 * (Q @ w)
    return w, slope, max(float(w @ slope - slope.min()), 0.0)


@dataclass(frozen=True, eq=False)
class ClasswiseFit:
    """Weights of a `ClasswiseMean`: a set for the frames of each predicted class, shrunk to the weights of all frames.

    Attributes:
        common: (M,) weights fitted on all frames.
        weights: (C, M), for the frames that `common` predicts as that class.
        gaps: (C,) certified distance from the optimum of each class's shrunk objective, in nats.
        frames: (C,) number of frames that each row was fitted on.
    """

    common: Array
    weights: Array
    gaps: Array
    frames: NDArray[np.intp]
    members: tuple[str, ...]
    fingerprint: str = ""

    @property
    def rule(self) -> ClasswiseMean:
        """The class-wise mean of these members with these weights."""
        return ClasswiseMean(self.common.tolist(), self.weights.tolist(), self.fingerprint, self.members)


def fit_class_weights(outputs: MemberOutputs, *, strength: float = 500.0) -> ClasswiseFit:
    """Log-loss weights for each predicted class, pulled towards those of all frames.

    Args:
        outputs: with labels.
        strength: number of frames that the pull is worth; a class with fewer frames stays close to `common`.

    Raises:
        ValueError: no labels, or a strength that is not positive.
    """
    expect_outputs(outputs)
    positive("number of frames as strength", strength)
    common = fit_weights(outputs).weights
    P, _ = _true_class_matrix(outputs)
    classes, shares = len(outputs.classes), torch.tensor(common, dtype=torch.float32)
    blocks = [torch.einsum("m,mnc->nc", shares, block).argmax(dim=-1) for _, block in outputs.blocks(_FRAMES)]
    predicted = torch.cat(blocks).numpy()
    weights, gaps = np.tile(common, (classes, 1)), np.zeros(classes)
    for c in range(classes):
        own = P[:, predicted == c]
        if own.any():
            alive = int((own.max(axis=0) > 0).sum())
            fit = fit_simplex_weights(own, alpha=strength / alive, towards=common, start=common)
            weights[c], gaps[c] = fit.weights, fit.gap
    frames = np.bincount(predicted, minlength=classes)
    return ClasswiseFit(common, weights, gaps, frames, outputs.members, outputs.fingerprint)


@dataclass(frozen=True, eq=False)
class LogLinearFit:
    """Exponents of a `LogPool`.

    Attributes:
        weights: (M,) non-negative; their sum is free, below one it softens.
        loss: log-loss of `LogPool` with these weights, in nats per frame.
        slope: the largest violation of the optimality conditions, in nats per unit of weight.
    """

    weights: Array
    loss: float
    slope: float
    members: tuple[str, ...]
    fingerprint: str = ""

    @property
    def rule(self) -> LogPool:
        """The log-linear pool of these members with these exponents."""
        return LogPool(tuple(self.weights.tolist()), self.fingerprint, self.members)


def fit_log_linear(outputs: MemberOutputs, *, start: object | None = None, ridge: float = 0.0) -> LogLinearFit:
    """The best non-negative exponents of the normalised product of the members' rows, by log-loss.

    The loss is that of `LogPool`, where probabilities below 1e-30 count as 1e-30.

    Args:
        outputs: with labels; read in blocks, many times.
        start: (M,) exponents to begin from; 1 / M each if None.
        ridge: adds ridge / 2 times the squared norm of the exponents.

    Raises:
        ValueError: no labels, no frames, NaN (the message names the member), a negative ridge, or a start that is
            not M finite, non-negative numbers.

    Example:
        >>> p, q = [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
        >>> fit_log_linear(MemberOutputs.from_probabilities({"a": p, "b": q}, labels=[0, 1, 1])).loss < 0.69
        True

    References:
        Hinton, "Products of experts", ICANN 1999.
    """
    expect_outputs(outputs)
    at_least_zero(ridge=ridge)
    M = len(outputs.members)
    begin = np.full(M, 1.0 / M) if start is None else floats(start, "exponents to start from")
    if begin.shape != (M,) or not np.isfinite(begin).all() or (begin < 0).any():
        msg = f"expected a start of {M} finite, non-negative exponents, got {begin}"
        raise ValueError(msg)
    labels, frames = labelled(outputs), outputs.shape[1]
    for _ in outputs.blocks(_FRAMES, nan="refuse"):  # refuses NaN, by name
        pass

    def objective(w: Array) -> tuple[float, Array]:
        """Log-loss with the ridge, in nats per frame, and its gradient (M,)."""
        exponents, loss, slope = torch.from_numpy(w), 0.0, torch.zeros(M, dtype=torch.float64)
        for first in range(0, frames, _FRAMES):
            where = slice(first, first + _FRAMES)
            logs = outputs.log_probabilities[:, where].double().clamp_min(_LOWEST)  # (M, b, C)
            pooled = torch.einsum("m,mbc->bc", exponents, logs).log_softmax(dim=-1)
            truth = labels[where, None]
            loss -= float(pooled.gather(1, truth).sum())
            error = pooled.exp().scatter_add_(1, truth, torch.full_like(truth, -1, dtype=torch.float64))
            slope += torch.einsum("bc,mbc->m", error, logs)
        return loss / frames + ridge / 2 * float(w @ w), slope.numpy() / frames + ridge * w

    settings: Any = {"method": "L-BFGS-B", "options": {"ftol": 1e-13, "gtol": 1e-8, "maxiter": 500}}
    found = minimize(objective, begin, jac=True, bounds=[(0.0, None)] * M, **settings)
    w = np.asarray(found.x, dtype=np.float64)
    loss, slope = objective(w)
    violation = np.where(w > 0, np.abs(slope), np.maximum(-slope, 0.0)).max()
    return LogLinearFit(w, loss - ridge / 2 * float(w @ w), float(violation), outputs.members, outputs.fingerprint)
