"""BatchNorm's statistics, seen anew or left alone."""

import torch
from torch import nn

from zoo.training.batchnorm import reestimate, unchanged_statistics


def test_statistics_become_the_mean_over_the_batches() -> None:
    """Means of batch means and variances, with nothing left of what was there."""
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(99)
    batches = [torch.randn(8, 2, generator=torch.Generator().manual_seed(i)) + i for i in range(3)]
    reestimate(norm, batches)
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert norm.num_batches_tracked == 3
    assert norm.momentum == 0.1
    assert not norm.training


def test_dropout_stays_off_while_statistics_are_seen() -> None:
    """All of a batch arrives."""
    module = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(1))
    reestimate(module, [torch.tensor([[1.0], [3.0]])])
    assert module[1].running_mean.item() == 2


def test_a_module_without_batchnorm_is_left_as_it_is() -> None:
    """No batch is even looked at."""
    reestimate(nn.Linear(1, 1), iter(lambda: 1 / 0, None))


def test_batches_can_pass_without_a_trace() -> None:
    """In train mode, yet mean, variance and count are those before."""
    norm = nn.BatchNorm1d(2)
    with unchanged_statistics(norm):
        norm(torch.randn(8, 2) + 5)
    assert norm.running_mean.tolist() == [0, 0]
    assert norm.num_batches_tracked == 0
    assert norm.momentum == 0.1
