"""Train M members of one spec at once, with zoo's own loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import zoo
from ensemble.run.training_stack import TrainingStack
from zoo import _files

_SHARE = 0.05  # of the expected time of a training, which measuring may take
_STEPS, _PATIENCE = 5, 0.5  # steps and seconds that `zoo.training.seconds_per_step` takes at least
_HELD = 1_000_000  # most parameters of a group whose size is not measured: with more, a step can fall out of the cache
_MANY = 16  # most members of such a group
_WORTH = 0.92  # a larger group is preferred if its time is below this share of a smaller one's


def stacked_group(spec: zoo.Spec, recipes: Sequence[zoo.Recipe], device: Any = "cpu") -> zoo.training.Group:
    """A new member for each recipe, all in one trainable group; a single one is not stacked.

    Raises:
        ValueError: members that cannot be trained together, see `TrainingStack` and `zoo.training.check_recipes`.
    """
    if len(recipes) == 1:
        return zoo.training.single_group(spec, recipes[0], device)
    stack = TrainingStack([zoo.build(spec, seed=recipe.seed).to(device) for recipe in recipes])
    return zoo.training.Group(spec, tuple(recipes), stack.body, forward=stack, reseed=stack.reseed)


def cotrain(
    spec: zoo.Spec,
    recipe: zoo.Recipe,
    train: zoo.FrameSet,
    valid: zoo.FrameSet,
    *,
    seeds: Iterable[int] = range(16),
    own_order: bool = False,
    learning_rates: Sequence[float] = (),
    weight_decays: Sequence[float] = (),
    together: int | None = None,
    on_epoch: Callable[[list[Mapping[str, Any]]], object] | None = None,
    directory: str | Path | None = None,
    progress: zoo.logs.Progress | None = None,
) -> list[zoo.Checkpoint]:
    """Train a member for each seed; each ends as `zoo.train` would have left it, in less time.

    Args:
        spec: the members' spec.
        recipe: the members' recipe, except for the seed.
        train: frames to learn from.
        valid: frames on which each epoch is evaluated.
        seeds: seeds of initialisation and dropout, one a member.
        own_order: whether each member also sees the frames in an order (and with masks) of its own seed; by
            default all share the order of `recipe`, and so the work of preparing the frames.
        learning_rates: one a member in place of the recipe's.
        weight_decays: likewise.
        together: members that are stepped together; None measures a few steps and takes what is fastest. If
            that would take more than a twentieth of the training, up to 16 members with at most a million
            parameters in all.
        on_epoch: called after each epoch with one record for each member that was stepped together.
        directory: as in `zoo.train`; each set of members that is stepped together has its own folder in it.
        progress: as in `zoo.train`.

    Returns:
        M checkpoints in the order of the seeds; each one's recipe repeats it alone.

    Raises:
        ValueError: no seeds, not as many rates or decays as seeds, or as in `zoo.train` and `zoo.training.Group`.
        TrainingError: as in `zoo.training.train_group`.
    """
    seeds = tuple(seeds)
    orders = seeds if own_order else [recipe.data_seed] * len(seeds)
    own: dict[str, Sequence[Any]] = {"seed": seeds, "order_seed": orders}
    for name, values in (("learning_rate", learning_rates), ("weight_decay", weight_decays)):
        own |= {name: values} if values else {}
        if values and len(values) != len(seeds):
            msg = f"expected {name}s for {len(seeds)} seeds, got {len(values)}"
            raise ValueError(msg)
    recipes = [replace(recipe, **{name: values[m] for name, values in own.items()}) for m in range(len(seeds))]
    zoo.training.check_recipes(recipes)
    folder = None if directory is None else Path(directory)
    size = _remembered(spec, recipes, train, together, folder)
    found: list[zoo.Checkpoint] = []
    for first in range(0, len(recipes), size):
        group = stacked_group(spec, recipes[first : first + size], train.features.device)
        own_folder = None if folder is None else folder / f"members-{first:03}"
        found += zoo.training.train_group(
            group, train, valid, on_epoch=on_epoch, directory=own_folder, progress=progress
        )
    return found


def train_alike(
    specs: Sequence[zoo.Spec], recipe: zoo.Recipe, train: zoo.FrameSet, valid: zoo.FrameSet
) -> list[zoo.Checkpoint | None]:
    """Train specs for `zoo.search.halving`, equal ones together, under seeds counted up from the recipe's.

    So a study compares each shape by several draws of its weights for little more than the time of one.

    Args:
        specs: one for each trial; a spec that is repeated is drawn as often.
        recipe: the trials' recipe.
        train: frames to learn from.
        valid: frames to evaluate on.

    Returns:
        A checkpoint per spec, in their order; None where the loss diverged.
    """
    found: list[zoo.Checkpoint | None] = [None] * len(specs)
    for spec in dict.fromkeys(specs):
        equal = [index for index, other in enumerate(specs) if other == spec]
        seeds = [recipe.seed + number for number in range(len(equal))]
        for index, checkpoint in zip(equal, _those_that_learn(spec, recipe, train, valid, seeds), strict=True):
            found[index] = checkpoint
    return found


def _those_that_learn(
    spec: zoo.Spec, recipe: zoo.Recipe, train: zoo.FrameSet, valid: zoo.FrameSet, seeds: list[int]
) -> list[zoo.Checkpoint | None]:
    """A checkpoint for each seed; if one diverges, each is trained alone, with None for those that diverge."""
    try:
        return [*cotrain(spec, recipe, train, valid, seeds=seeds)]
    except zoo.TrainingError:
        if len(seeds) == 1:
            return [None]
        return [one for seed in seeds for one in _those_that_learn(spec, recipe, train, valid, [seed])]


def measure_together(spec: zoo.Spec, recipes: Sequence[zoo.Recipe], train: zoo.FrameSet) -> dict[int, float]:
    """Seconds per step and member when 1, 2, 4, ... or all members are stepped together, measured on real batches.

    Larger groups are not tried once they become slower; if the members cannot be stacked, the only key is 1.
    """
    device = train.features.device
    found: dict[int, float] = {}
    for size in _sizes(len(recipes)):
        try:
            group = stacked_group(spec, recipes[:size], device)
        except ValueError:  # a layer that cannot be stacked
            break
        found[size] = zoo.training.seconds_per_step(group, train) / size
        if found[size] > 1.25 * min(found.values()):
            break
    again = zoo.training.seconds_per_step(stacked_group(spec, recipes[:1], device), train)
    return found | {1: min(found[1], again)}  # the first measurement was made while everything was cold


def _sizes(members: int) -> list[int]:
    return [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size < members] + [members]


def _remembered(
    spec: zoo.Spec, recipes: Sequence[zoo.Recipe], train: zoo.FrameSet, together: int | None, folder: Path | None
) -> int:
    """How many members to step together: as given, as the folder says, or as chosen; the folder remembers it."""
    if together is not None and together < 1:
        msg = f"expected at least 1 member together, got {together}"
        raise ValueError(msg)
    note = None if folder is None else folder / "together.json"
    if together is None and note is not None and note.exists():
        together = int(json.loads(note.read_bytes()))
    together = together or _chosen(spec, recipes, train)
    if note is not None:
        _files.make_folders(note.parent)
        _files.write(note, json.dumps(together).encode())
    return together


def _chosen(spec: zoo.Spec, recipes: Sequence[zoo.Recipe], train: zoo.FrameSet) -> int:
    """The size of the groups: measured if that takes a small share of the training, else by the members' size."""
    recipe, members, device = recipes[0], len(recipes), train.features.device
    steps = recipe.epochs * recipe.fraction * len(train) / (recipe.batch_size * recipe.accumulate) * members
    if members > 1 and _SHARE * steps >= _STEPS:
        step = zoo.training.seconds_per_step(stacked_group(spec, recipes[:1], device), train, patience=0)
        measuring = sum(max(_STEPS * step * size, _PATIENCE) for size in [*_sizes(members), 1])
        if measuring < _SHARE * steps * step:
            return fastest(measure_together(spec, recipes, train))
    size = min(members, _MANY, _HELD // zoo.count_parameters(spec))
    if size > 1:
        with suppress(ValueError):  # a layer that cannot be stacked
            stacked_group(spec, recipes[:2], device)
            return size
    return 1


def fastest(seconds: Mapping[int, float]) -> int:
    """The group size with the least time per member; a larger one only where it is clearly faster.

    Example:
        >>> fastest({1: 1.0, 2: 0.97, 4: 0.5, 8: 0.49})
        4
    """
    chosen = min(seconds)
    for size in sorted(seconds):
        if seconds[size] < _WORTH * seconds[chosen]:
            chosen = size
    return chosen
