"""What the loop trains, and what it feeds it; all with the members as the first axis."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint
from zoo.data.audio import mask
from zoo.data.frames import FrameSet, stretch
from zoo.models.spec import Spec
from zoo.training.recipe import Recipe
from zoo.training.scores import labels_of


class TrainingError(ValueError):
    """Training cannot go on; `checkpoints` holds each member's best so far, None where there is none."""

    def __init__(self, message: str, checkpoints: Sequence[Checkpoint | None] = ()) -> None:
        super().__init__(message)
        self.checkpoints = tuple(checkpoints)


@dataclass(frozen=True)
class Group:
    """M models of one spec that are trained together; M is 1 for a single model.

    Args:
        spec: of every member.
        seeds: M seeds, of each member's dropout (and of the weights that it starts with).
        module: one module whose `state_dict` has the names of a single model's; the memory of each tensor is
            that of the M members' tensors, one after another.
        forward: (B, inputs), or (M, B, inputs) where every member has frames of its own -> (M, B, C) logits.
        reseed: restarts the random draws (of dropout) of each member from M seeds.
        order_seeds: of the order of the frames: one for all members, or M; empty takes the recipe's.
        learning_rates: M, in place of the recipe's; empty for the recipe's.
        weight_decays: likewise.
    """

    spec: Spec
    seeds: tuple[int, ...]
    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    reseed: Callable[[Sequence[int]], None]
    order_seeds: tuple[int, ...] = ()
    learning_rates: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("order_seeds", (0, 1)), ("learning_rates", (0,)), ("weight_decays", (0,))):
            if len(getattr(self, name)) not in (*allowed, self.members):
                msg = f"expected {name} for {self.members} members, got {len(getattr(self, name))}"
                raise ValueError(msg)

    @property
    def members(self) -> int:
        """M."""
        return len(self.seeds)


class Feed:
    """Training frames in batches, in an order that is a function of seed and epoch."""

    def __init__(self, frames: FrameSet, spec: Spec, recipe: Recipe, order_seeds: Sequence[int]) -> None:
        self._stretch = stretch(frames, spec.context, spec.normalisation, spec.padding)
        self._labels = labels_of(frames, "train").to(frames.features.device)
        self._spec, self._recipe, self._seeds = spec, recipe, tuple(order_seeds)
        count = max(round(len(frames) * recipe.fraction), 1)
        self._frames = torch.stack([_drawn(len(frames), count, seed) for seed in self._seeds])  # (1 or M, count)
        self.count = count
        batches = count // recipe.batch_size + (count % recipe.batch_size > 1)  # BatchNorm cannot take one frame
        if not batches:
            msg = f"expected at least two frames to train on, got {count}"
            raise ValueError(msg)
        self.steps = -(-batches // recipe.accumulate)
        self._starts = range(0, batches * recipe.batch_size, recipe.batch_size)

    def epoch(self, number: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """For each step its batches: windows (B, inputs) with labels (B,), or (M, B, ...) of both.

        The windows of the later batches of a step are gathered when they are needed.
        """
        generators = [_generator(seed, number, "order") for seed in self._seeds]
        order = torch.stack([torch.randperm(self.count, generator=g) for g in generators])  # (1 or M, N)
        order = self._frames.expand_as(order).gather(1, order)
        for first in range(0, len(self._starts), self._recipe.accumulate):
            starts = self._starts[first : first + self._recipe.accumulate]
            yield [self._batch(order[:, at : at + self._recipe.batch_size], generators) for at in starts]

    def plain(self, most: int) -> Iterator[Tensor]:
        """Windows in batches without masks, of about `most` frames evenly over the whole."""
        chosen = self._frames[0, :: max(self.count // most, 1)]
        for batch in torch.split(chosen, self._recipe.batch_size):
            if len(batch) > 1:
                yield self._stretch.windows(batch.to(self._labels.device))

    def _batch(self, index: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        index = index.to(self._labels.device)
        windows = [self._masked(self._stretch.windows(row), g) for row, g in zip(index, generators, strict=True)]
        if len(windows) == 1:
            return windows[0], self._labels[index[0]]
        return torch.stack(windows), self._labels[index]

    def _masked(self, windows: Tensor, generator: torch.Generator) -> Tensor:
        recipe = self._recipe
        if not recipe.mask_time and not recipe.mask_features:
            return windows
        shaped = windows.view(len(windows), -1, self._spec.features)
        masked = mask(shaped, max_time=recipe.mask_time, max_features=recipe.mask_features, generator=generator)
        return masked.flatten(1)


def epoch_seed(seed: int, epoch: int, what: str) -> int:
    """32 bits that depend on all three; neighbouring seeds and epochs have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{what} {seed} {epoch}".encode()).digest()[:4])


def check_frames(spec: Spec, recipe: Recipe, train: FrameSet, valid: FrameSet) -> None:
    """Raise ValueError where frames, spec and recipe do not fit each other."""
    for what, frames in (("train", train), ("valid", valid)):
        labels_of(frames, what)
        width = frames.features.shape[1]
        if (width, len(frames.classes)) != (spec.features, spec.classes):
            msg = (
                f"expected {what} frames of {spec.features} features and {spec.classes} classes as the spec says, "
                f"got {width} and {len(frames.classes)}"
            )
            raise ValueError(msg)
    if train.classes != valid.classes:
        msg = "expected the same classes in the same order in the train and the valid frames"
        raise ValueError(msg)
    if train.features.device != valid.features.device:
        msg = f"expected all frames on {train.features.device}, got valid on {valid.features.device}; use .to()"
        raise ValueError(msg)
    span = 2 * spec.context + 1
    if recipe.mask_time > span or recipe.mask_features > spec.features:
        msg = (
            f"expected masks within a window of {span} frames and {spec.features} features, "
            f"got mask_time={recipe.mask_time} and mask_features={recipe.mask_features}"
        )
        raise ValueError(msg)


def _drawn(frames: int, count: int, seed: int) -> Tensor:
    """(count,) of the frames, in their order; all of them where count says so."""
    if count == frames:
        return torch.arange(frames)
    return torch.randperm(frames, generator=_generator(seed, 0, "fraction"))[:count].sort().values


def _generator(seed: int, epoch: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(epoch_seed(seed, epoch, what))
