"""The one training loop: for one model, or for M models of one spec at once.

Everything that a resumed run needs is in one file that is replaced whole at the end of every epoch; the
randomness of an epoch is a function of the seeds and its number. So a run killed at any moment and started
again ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.checkpoint import Checkpoint
from zoo.data.frames import FrameSet
from zoo.logs import Log, Progress
from zoo.models.spec import Spec, build
from zoo.training.group import Group, TrainingError
from zoo.training.loop import seconds_per_step, train_group
from zoo.training.recipe import Recipe

__all__ = ["Group", "TrainingError", "seconds_per_step", "single", "train", "train_group"]


def train(
    spec: Spec,
    recipe: Recipe,
    train: FrameSet,
    valid: FrameSet,
    *,
    on_epoch: Callable[[Mapping[str, Any]], object] | None = None,
    directory: str | Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Train a new model and return it as it was after its best epoch on the validation frames.

    Args:
        spec: the model.
        recipe: how to train it.
        train: frames to learn from, with labels; their features' device is where training happens.
        valid: frames to judge each epoch by.
        on_epoch: called after each epoch with its figures: epoch, train/loss (nats), train/accuracy
            (fraction), valid/loss, valid/accuracy, learning_rate, frames_per_second, seconds.
        directory: where each epoch leaves a checkpoint and the run its state. A directory that holds this
            same run already is gone on with: the result is that of an uninterrupted run, to the bit on a CPU.
        log: where the figures go besides the JSON lines in the directory, where there is one.
        progress: shows how far each epoch has come; None shows nothing.

    Raises:
        ValueError: frames that do not fit the spec or each other, or a directory that holds another run.
        TrainingError: the loss became NaN or infinite; it carries the best checkpoint so far.
        OSError: an epoch could not be written; those before it are still there.

    Example:
        >>> import torch
        >>> from zoo.data.frames import FrameSet
        >>> features = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> frames = FrameSet(features, (features[:, 0] > 0).long(), torch.tensor([0, 64]), ("low", "high"))
        >>> spec = Spec("cylinder", features=3, context=0, classes=2, options={"width": 8, "depth": 1})
        >>> trained = train(spec, Recipe(epochs=5, batch_size=16, learning_rate=0.05), frames, frames)
        >>> trained.metrics["valid/accuracy"]["value"] > 0.9
        True
    """
    group = single(spec, recipe, train.features.device)
    report = None if on_epoch is None else lambda records: on_epoch(records[0])
    return train_group(group, recipe, train, valid, on_epoch=report, directory=directory, log=log, progress=progress)[0]


def single(spec: Spec, recipe: Recipe, device: torch.device | str = "cpu") -> Group:
    """A group of one new model."""
    model = build(spec, seed=recipe.seed).to(device)
    return Group(spec, (recipe.seed,), model, forward=lambda x: model(x)[None], reseed=_reseed)


def _reseed(seeds: Sequence[int]) -> None:
    torch.manual_seed(seeds[0])
