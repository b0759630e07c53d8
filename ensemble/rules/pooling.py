"""Rules without numbers: votes and ranks, means of several kinds, extremes, products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ensemble.rules.table import Sums, members_first, rule, wide

_BLOCK = 256  # frames ranked at once: the numbers compared stay in the cache


def linear(weights: Sequence[float]) -> Sums:
    """The sums of a linear pool; two classes can differ in a row by one."""
    return Sums(
        lambda position, rows: weights[position] * rows, torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    )


def _ballots(members: int) -> Sums:
    """The sums of a vote. With a vote more than another class, no mean probability makes up for it."""

    def add(position: int, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows).scatter_(-1, rows.argmax(dim=-1, keepdim=True), 1)

    return Sums(add, torch.ones(members, 1, 1, dtype=torch.float64), votes=True)


@partial(rule, sums=_ballots)
def majority(probabilities: Tensor) -> Tensor:
    """One member, one vote; ties go to the class with the higher mean probability.

    Returns:
        (N, C), `(votes + mean) / (M + 1)`: the mean is less than a whole vote, so it only decides ties
        (see `tie_rate`). Where a member's own top classes are equal, its vote goes to the first of them.
        Half precision is computed in float32 but returned as half precision, which holds little of the mean beside
        the votes: use float32 where ties matter.
    """
    dtype = wide(probabilities)
    votes = _votes(probabilities).to(dtype)
    return ((votes + probabilities.mean(dim=0, dtype=dtype)) / (len(probabilities) + 1)).to(probabilities.dtype)


def _votes(probabilities: Tensor) -> Tensor:
    """(N, C) int64: how many members put each class first."""
    votes = torch.zeros(probabilities.shape[1:], dtype=torch.int64, device=probabilities.device)
    choices = probabilities.argmax(dim=-1, keepdim=True)  # (M, N, 1)
    present = ~probabilities.gather(-1, choices).isnan()  # a member that abstains has no vote
    for choice, vote in zip(choices, present.long(), strict=True):
        votes.scatter_add_(1, choice, vote)
    return votes


def tie_rate(probabilities: Tensor) -> float:
    """Fraction of the frames where two or more classes share the most votes; 0 where there are no frames.

    Example:
        >>> tie_rate(torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.2, 0.8], [0.6, 0.4]]]))
        0.5
    """
    votes = _votes(members_first(probabilities))
    if len(votes) == 0:
        return 0.0
    tied = (votes == votes.amax(dim=1, keepdim=True)).sum(dim=1) > 1
    return float(tied.double().mean())


@partial(rule, continuous=False)
def borda(probabilities: Tensor) -> Tensor:
    """Each member ranks the classes; a class earns a point for each class below it, half a point for equal ones.

    Returns:
        (N, C), points plus half the mean probability, normalised: the mean only decides ties. Use
        float32 where ties matter, as with `majority`.

    References:
        Ho, Hull, Srihari, "Decision combination in multiple classifier systems", IEEE TPAMI 16(1), 1994.
    """
    members, _, classes = probabilities.shape
    leads = []
    for block in torch.split(probabilities, _BLOCK, dim=1):
        rows = block.permute(2, 0, 1).contiguous()  # (C, M, N)
        lead = torch.zeros_like(rows[:, 0], dtype=wide(rows))  # members for a class minus those against it, over pairs
        for index in range(classes - 1):  # sorting takes longer
            ahead = (rows[index + 1 :] - rows[index]).sign_().sum(dim=1)
            lead[index + 1 :] += ahead
            lead[index] -= ahead.sum(dim=0)
        leads.append(lead.T)
    points = (torch.cat(leads) + members * (classes - 1)) / 2
    pooled = points + probabilities.mean(dim=0, dtype=points.dtype) / 2
    return (pooled / (members * classes * (classes - 1) / 2 + 0.5)).to(probabilities.dtype)


@rule
def maximum(probabilities: Tensor) -> Tensor:
    """The row of the member with the highest probability, frame by frame.

    Returns:
        (N, C), the row of the most confident member; on a tie, of the first.

    References:
        Kittler et al., "On combining classifiers", IEEE TPAMI 20(3), 1998.
    """
    surest = probabilities.amax(dim=-1).argmax(dim=0)  # (N,)
    return probabilities[surest, torch.arange(surest.shape[0], device=surest.device)]


@partial(rule, logarithmic=True)
def minimum(logs: Tensor) -> Tensor:
    """Each class's lowest probability over the members, normalised.

    Returns:
        (N, C); the members' mean where every class has a member that gives it zero.
    """
    return logs.amin(dim=0)


@partial(rule, sums=lambda members: linear([1 / members] * members))
def mean(probabilities: Tensor) -> Tensor:
    """The members' arithmetic mean: the linear pool with equal weights.

    Example:
        >>> mean(torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]]))
        tensor([[0.5000, 0.5000]])
    """
    return probabilities.mean(dim=0)


@rule
def median(probabilities: Tensor) -> Tensor:
    """Each class's median over the members, normalised: a single outlier changes little.

    Returns:
        (N, C); for even M the mean of the middle two; the members' mean where all medians are zero.
    """
    members = len(probabilities)
    if torch.compiler.is_exporting():  # ONNX has no kthvalue
        ranked = probabilities.sort(dim=0).values
        lower, upper = ranked[(members - 1) // 2], ranked[members // 2]
    else:
        lower = probabilities.kthvalue((members + 1) // 2, dim=0).values
        upper = lower if members % 2 else probabilities.kthvalue(members // 2 + 1, dim=0).values
    return _normalised((lower + upper) / 2, probabilities)


@rule
def trimmed_mean(probabilities: Tensor, *, trim: float = 0.2) -> Tensor:
    """The mean of each class's probabilities without the most extreme members, normalised.

    Args:
        probabilities: (M, N, C), each row summing to one.
        trim: fraction of the members left out at each end, rounded down; refused outside [0, 0.5).
    """
    if not isinstance(trim, int | float) or not 0 <= trim < 0.5:
        msg = f"expected trim in [0, 0.5), got {trim}"
        raise ValueError(msg)
    members = len(probabilities)
    aside = math.floor(trim * members + 1e-9)  # 0.2 * 5 is one, whatever the rounding
    kept = probabilities.sort(dim=0).values[aside : members - aside]
    return _normalised(kept.mean(dim=0), probabilities)


@partial(rule, logarithmic=True)
def product(logs: Tensor) -> Tensor:
    """The normalised product: the posterior if members were independent and classes equally frequent.

    Computed from sums of logarithms, so that many members do not underflow. Overconfident where members agree
    for a common reason, as they do in practice; see `log_mean`.

    Returns:
        (N, C); the members' mean where every class has a member that gives it zero.
    """
    return weighted_sum(logs, [1.0] * len(logs))


@partial(rule, logarithmic=True)
def log_mean(logs: Tensor) -> Tensor:
    """The normalised geometric mean: the log-linear pool with equal weights.

    Returns:
        (N, C); the members' mean where every class has a member that gives it zero.

    References:
        Hinton, "Products of experts", ICANN 1999.
    """
    return weighted_sum(logs, [1 / len(logs)] * len(logs))


@partial(rule, logarithmic=True)
def power_mean(logs: Tensor, *, power: float = 0.5) -> Tensor:
    """The normalised power mean: 1 is the arithmetic mean, towards 0 the geometric, large the maximum.

    Args:
        logs: (M, N, C), the logarithms of rows that sum to one.
        power: the exponent, refused unless positive; one half lies between `mean` and `log_mean`.
    """
    if not isinstance(power, int | float) or not 0 < power < math.inf:
        msg = f"expected a positive power, got {power}; towards zero it becomes log_mean"
        raise ValueError(msg)
    top = logs.amax(dim=0)  # (N, C), taken out so that large powers do not underflow
    shares = logs - top.masked_fill(top == -math.inf, 0)
    if power > 0.1:
        return top + (shares * power).exp().mean(dim=0).log() / power
    # x^p is close to 1 + p log x: the difference from 1 is what matters, so it is computed by itself
    least = max(float(power), 1e-30)  # below, the result is the geometric mean to the last bit
    return top + (shares * least).expm1().mean(dim=0).log1p() / least


def _normalised(scores: Tensor, probabilities: Tensor) -> Tensor:
    """(N, C) non-negative scores as rows that sum to one; the members' mean where a row is all zero."""
    total = scores.sum(dim=-1, keepdim=True)
    return torch.where(total == 0, probabilities.mean(dim=0), scores / total)


def weighted_sum(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """(N, K) sum of weights times rows, (M, N, K); members of weight 0 stay out, even with NaN."""
    total = torch.zeros(rows.shape[1:], dtype=wide(rows), device=rows.device)
    for row, weight in zip(rows, weights, strict=True):
        if weight:
            total += weight * row
    return total.to(rows.dtype)
