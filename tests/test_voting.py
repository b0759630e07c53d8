"""Voting in half precision."""

import torch

import ensemble


def test_ties_fall_to_the_mean_in_half_precision() -> None:
    """One vote for each class; the mean is higher for the second, by less than bfloat16 holds beside a vote."""
    p = torch.tensor([[[0.6, 0.4]], [[0.39, 0.61]]]).bfloat16()
    assert ensemble.majority(p).argmax(dim=-1).item() == 1
