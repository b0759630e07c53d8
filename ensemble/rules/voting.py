"""Rules that see only the order of each member's classes: votes and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble.rules.table import members_first, rule, wide

_BLOCK = 256  # frames ranked at once: what is compared stays in the cache


@rule
def majority(probabilities: Tensor) -> Tensor:
    """One member, one vote; ties in votes fall to the higher mean probability.

    Args:
        probabilities: (M, N, C), each row summing to one.

    Returns:
        (N, C), `(votes + mean) / (M + 1)`: the mean is less than a whole vote, so it only decides ties
        (see `tie_rate`). Where a member's own top classes are equal, its vote goes to the first of them.
        Half precision is computed in float32, but answered in kind, with room for little of the mean beside
        the votes: give float32 where ties matter.
    """
    dtype = wide(probabilities)
    votes = _votes(probabilities).to(dtype)
    return ((votes + probabilities.mean(dim=0, dtype=dtype)) / (len(probabilities) + 1)).to(probabilities.dtype)


def _votes(probabilities: Tensor) -> Tensor:
    """(N, C) int64: how many members put each class first."""
    votes = torch.zeros(probabilities.shape[1:], dtype=torch.int64, device=probabilities.device)
    choices = probabilities.argmax(dim=-1, keepdim=True)  # (M, N, 1)
    speaks = ~probabilities.gather(-1, choices).isnan()  # who abstains has no vote
    for choice, vote in zip(choices, speaks.long(), strict=True):
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


@rule
def borda(probabilities: Tensor) -> Tensor:
    """Each member ranks the classes; a class's points are how many it beats, equal ones half.

    Returns:
        (N, C), points plus half the mean probability, normalised: the mean only decides ties. Give
        float32 where ties matter, as to `majority`.

    References:
        Ho, Hull, Srihari, "Decision combination in multiple classifier systems", IEEE TPAMI 16(1), 1994.
    """
    members, _, classes = probabilities.shape
    lead = torch.cat([_leads(block) for block in torch.split(probabilities, _BLOCK, dim=1)])
    points = (lead + members * (classes - 1)) / 2
    pooled = points + probabilities.mean(dim=0, dtype=points.dtype) / 2
    return (pooled / (members * classes * (classes - 1) / 2 + 0.5)).to(probabilities.dtype)


def _leads(probabilities: Tensor) -> Tensor:
    """(N, C): pairs of member and class that each class beats, less those that beat it; sorting takes longer."""
    rows = probabilities.permute(2, 0, 1).contiguous()  # (C, M, N)
    leads = torch.zeros_like(rows[:, 0], dtype=wide(rows))  # (C, N)
    for index in range(len(rows) - 1):
        ahead = (rows[index + 1 :] - rows[index]).sign_().sum(dim=1)
        leads[index + 1 :] += ahead
        leads[index] -= ahead.sum(dim=0)
    return leads.T
