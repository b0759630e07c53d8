"""What every test shares: one thread per worker, and small frames."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also in the programs that tests start: the workers share the cores
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

from zoo import FrameSet

torch.set_num_threads(1)


@pytest.fixture
def frames() -> FrameSet:
    """Five recordings of 1 to 60 frames, 6 features, 4 classes; the first features tell the class."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 40, 1, 60, 7, 30])
    labels = torch.randint(0, 4, (138,), generator=generator)
    features = torch.randn(138, 6, generator=generator) + torch.nn.functional.one_hot(labels, 6) * 2
    return FrameSet(features, labels, lengths.cumsum(0), ("a", "b", "c", "d"))
