"""Train M members of one spec at once, with zoo's own loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import zoo
from ensemble.run.brood import Brood
from zoo import _files

_SHARE = 0.05  # of the expected time of a training, which measuring may take
_STEPS, _PATIENCE = 5, 0.5  # steps and seconds that `zoo.training.seconds_per_step` takes at least
_HELD = 1_000_000  # parameters of a group that is not measured: with more, a step can fall out of the cache
_MANY = 16  # members of such a group
_WORTH = 0.92  # share of the time that a larger group must stay under to be preferred to a smaller one


@dataclass(frozen=True)
class _Plan:
    """All members: seeds, and what each has of its own; empty for what the recipe says."""

    spec: zoo.Spec
    recipe: zoo.Recipe
    seeds: tuple[int, ...]
    own_order: bool
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]

    def part(self, first: int, count: int) -> _Plan:
        """Only these members."""
        some = slice(first, first + count)
        return replace(
            self,
            seeds=self.seeds[some],
            learning_rates=self.learning_rates[some],
            weight_decays=self.weight_decays[some],
        )

    def alone(self) -> zoo.Recipe:
        """The recipe by which the first member is trained alone."""
        recipe = self.recipe
        return replace(
            recipe,
            seed=self.seeds[0],
            order_seed=self.seeds[0] if self.own_order else recipe.data_seed,
            learning_rate=self.learning_rates[0] if self.learning_rates else recipe.learning_rate,
            weight_decay=self.weight_decays[0] if self.weight_decays else recipe.weight_decay,
        )

    def group(self, device: Any) -> zoo.training.Group:
        """All members as one trainable group with fresh weights."""
        brood = Brood([zoo.build(self.spec, seed=seed).to(device) for seed in self.seeds])
        return zoo.training.Group(
            spec=self.spec,
            seeds=self.seeds,
            module=brood.body,
            forward=brood,
            reseed=brood.reseed,
            order_seeds=self.seeds if self.own_order else (self.recipe.data_seed,),
            learning_rates=self.learning_rates,
            weight_decays=self.weight_decays,
        )


def grouped(
    spec: zoo.Spec, recipe: zoo.Recipe, seeds: Iterable[int], *, own_order: bool = False, device: Any = "cpu"
) -> zoo.training.Group:
    """New members of these seeds as one trainable group; a single one as it is.

    Raises:
        ValueError: members that cannot be put together, see `Brood`.
    """
    plan = _Plan(spec, recipe, tuple(seeds), own_order, (), ())
    return zoo.training.single(spec, plan.alone(), device) if len(plan.seeds) == 1 else plan.group(device)


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
        spec: of every member.
        recipe: of every member, but for the seed.
        train: frames to learn from.
        valid: frames to judge each epoch by.
        seeds: of initialisation and dropout, one a member.
        own_order: whether each member also sees the frames in an order (and with masks) of its own seed; by
            default all share the order of `recipe`, and so the work of preparing the frames.
        learning_rates: one a member in place of the recipe's.
        weight_decays: likewise.
        together: members that are stepped together; None measures a few steps and takes what is fastest. Where
            that would take more than a twentieth of the training, up to 16 that have a million parameters together.
        on_epoch: called after each epoch with one record for each member that was stepped together.
        directory: as in `zoo.train`; each set of members that is stepped together has its own folder in it.
        progress: as in `zoo.train`.

    Returns:
        M checkpoints in the order of the seeds; each one's recipe repeats it alone.

    Raises:
        ValueError: no seeds, numbers of rates or decays other than of seeds, or as in `zoo.train`.
        TrainingError: as in `zoo.training.train_group`.
    """
    seeds = tuple(seeds)
    _check(seeds, recipe, learning_rates, weight_decays, together)
    plan = _Plan(spec, recipe, seeds, own_order, tuple(learning_rates), tuple(weight_decays))
    folder = None if directory is None else Path(directory)
    count = _settled(plan, train, together, folder)
    found: list[zoo.Checkpoint] = []
    for first in range(0, len(seeds), count):
        part = plan.part(first, count)
        place = None if folder is None else folder / f"members-{first:03}"
        if len(part.seeds) == 1:
            report = None if on_epoch is None else lambda record: on_epoch([record])
            found.append(
                zoo.train(spec, part.alone(), train, valid, on_epoch=report, directory=place, progress=progress)
            )
        else:
            group = part.group(train.features.device)
            found += zoo.training.train_group(
                group, recipe, train, valid, on_epoch=on_epoch, directory=place, progress=progress
            )
    return found


def train_alike(
    specs: Sequence[zoo.Spec], recipe: zoo.Recipe, train: zoo.FrameSet, valid: zoo.FrameSet
) -> list[zoo.Checkpoint | None]:
    """A trainer for `zoo.search.halving`: equal specs are trained together, under seeds counted up from the recipe's.

    So a study judges each shape by several draws of its weights for little more than the time of one.

    Args:
        specs: of the trials; write one several times to have it drawn several times.
        recipe: of all.
        train: frames to learn from.
        valid: frames to judge by.

    Returns:
        A checkpoint per spec, in their order; None where the loss diverged.
    """
    found: list[zoo.Checkpoint | None] = [None] * len(specs)
    for spec in dict.fromkeys(specs):
        places = [place for place, other in enumerate(specs) if other == spec]
        seeds = [recipe.seed + number for number in range(len(places))]
        for place, checkpoint in zip(places, _as_far_as_they_go(spec, recipe, train, valid, seeds), strict=True):
            found[place] = checkpoint
    return found


def _as_far_as_they_go(
    spec: zoo.Spec, recipe: zoo.Recipe, train: zoo.FrameSet, valid: zoo.FrameSet, seeds: list[int]
) -> list[zoo.Checkpoint | None]:
    """Together; where one of them diverges, each for itself, None for those that do."""
    try:
        return [*cotrain(spec, recipe, train, valid, seeds=seeds)]
    except zoo.TrainingError:
        if len(seeds) == 1:
            return [None]
        return [one for seed in seeds for one in _as_far_as_they_go(spec, recipe, train, valid, [seed])]


def measure_together(
    spec: zoo.Spec, recipe: zoo.Recipe, train: zoo.FrameSet, members: int, *, own_order: bool = False
) -> dict[int, float]:
    """Seconds per step and member when 1, 2, 4, ... `members` are stepped together, measured on real batches.

    Groups that grow slower are not tried further; a spec whose members cannot be put together has the key 1 only.
    """
    found: dict[int, float] = {}
    for size in _sizes(members):
        try:
            group = grouped(spec, recipe, range(size), own_order=own_order, device=train.features.device)
        except ValueError:  # no rule for one of its layers
            break
        found[size] = zoo.training.seconds_per_step(group, recipe, train) / size
        if found[size] > 1.25 * min(found.values()):
            break
    again = zoo.training.seconds_per_step(grouped(spec, recipe, [0], device=train.features.device), recipe, train)
    return found | {1: min(found[1], again)}  # the first to be measured ran while all was still cold


def _sizes(members: int) -> list[int]:
    return [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size < members] + [members]


def _settled(plan: _Plan, train: zoo.FrameSet, together: int | None, folder: Path | None) -> int:
    """How many members to step together: as said, as the folder remembers, or as chosen."""
    note = None if folder is None else folder / "together.json"
    if together is None and note is not None and note.exists():
        return int(json.loads(note.read_text(encoding="utf-8")))
    if together is None:
        together = _chosen(plan, train)
    if note is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        _files.write(note, json.dumps(together).encode())
    return together


def _chosen(plan: _Plan, train: zoo.FrameSet) -> int:
    """The size of the groups: measured where the training is long enough to pay for it, else by the members' size."""
    if not _pays(plan, train):
        return _by_size(plan, train.features.device)
    return fastest(measure_together(plan.spec, plan.recipe, train, len(plan.seeds), own_order=plan.own_order))


def _pays(plan: _Plan, train: zoo.FrameSet) -> bool:
    """Whether measuring takes a small share of what training one after another is expected to take."""
    recipe, members = plan.recipe, len(plan.seeds)
    steps = recipe.epochs * recipe.fraction * len(train) / (recipe.batch_size * recipe.accumulate) * members
    if members == 1 or _SHARE * steps < _STEPS:
        return False
    single = grouped(plan.spec, recipe, [0], device=train.features.device)
    step = zoo.training.seconds_per_step(single, recipe, train, patience=0)
    return sum(max(_STEPS * step * size, _PATIENCE) for size in [*_sizes(members), 1]) < _SHARE * steps * step


def _by_size(plan: _Plan, device: Any) -> int:
    """As many as are small enough together, where they can be put together; else one."""
    size = min(len(plan.seeds), _MANY, _HELD // zoo.count_parameters(plan.spec))
    if size < 2:
        return 1
    try:
        plan.part(0, 2).group(device)
    except ValueError:  # no rule for one of its layers
        return 1
    return size


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


def _check(
    seeds: Sequence[int],
    recipe: zoo.Recipe,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    together: int | None,
) -> None:
    if not seeds:
        msg = "expected at least one seed, got none"
        raise ValueError(msg)
    for name, values in (("learning_rates", learning_rates), ("weight_decays", weight_decays)):
        if values and len(values) != len(seeds):
            msg = f"expected {name} for {len(seeds)} seeds, got {len(values)}"
            raise ValueError(msg)
    if together is not None and together < 1:
        msg = f"expected at least 1 member together, got {together}"
        raise ValueError(msg)
    if recipe.optimiser == "adam_sgd" and (learning_rates or weight_decays or recipe.schedule == "plateau"):
        msg = "adam_sgd finds its own rates: learning_rates, weight_decays and plateau do not go with it"
        raise ValueError(msg)
