"""Train M members of one spec at once, with zoo's own loop; `TrainingStack` is written to be fast on a CPU.

vmap over a training step is slower than one member after another beyond small batches: it treats the shared
input as M inputs and BatchNorm as M small ones. Here the few layers with parameters or random draws are
replaced by layers that hold all members: activations are (B, M, features), so the first layer is one wide
product over the shared input, and BatchNorm is a single one over M * features channels. All other layers work
entry by entry and stay. What cannot be replaced is refused, and the whole is compared with the single members.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

import zoo
from ensemble.run.stack import unlike
from zoo import _files
from zoo._names import checked
from zoo.checkpoint import state_of
from zoo.data.frames import require_sendable
from zoo.models.blocks import Dropout, activation_of, dropout_mask
from zoo.training.optimisers import restored
from zoo.training.teacher import frame_sets
from zoo.workers import Workers, carry_out

_SHARE = 0.05  # of the expected time of a training, which measuring may take
_STEPS, _PATIENCE = 5, 0.5  # steps and seconds that `zoo.training.seconds_per_step` takes at least
_HELD = 1_000_000  # most parameters of a group whose size is not measured: with more, a step can fall out of the cache
_MANY = 16  # most members of such a group
_PROBED = 4  # frames on which a stack is compared with its members
_LEASE = 120.0  # seconds after which a file server frees what a worker held whose machine is gone, and some more
_WORTH = 0.92  # a larger group is preferred if its time is below this share of a smaller one's


def stacked_group(spec: zoo.Spec, recipes: Sequence[zoo.Recipe], device: Any = "cpu") -> zoo.training.Group:
    """A new member for each recipe, all in one trainable group; ValueError if `TrainingStack` cannot stack them."""
    if len(recipes) == 1:
        return zoo.training.single_group(spec, recipes[0], device)
    stack = TrainingStack([zoo.build(spec, seed=recipe.seed, device=device) for recipe in recipes])
    return zoo.training.Group(spec, tuple(recipes), stack.body, forward=stack, reseed=stack.reseed)


@checked
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
    folds: int = 0,
    teacher: zoo.training.Teacher | Callable[[Tensor], Tensor] | None = None,
    unlabelled: Sequence[zoo.FrameSet] = (),
    on_epoch: Callable[[list[Mapping[str, Any]]], object] | None = None,
    directory: str | Path | None = None,
    workers: Workers | None = None,
    progress: zoo.logs.Progress | None = None,
) -> list[zoo.Checkpoint]:
    """Train a member for each seed; each ends as `zoo.train` would have left it, in less time.

    Arguments that are not listed are those of `zoo.train`. A teacher answers once for the members that are stepped
    together, unless each has an order of its own.

    Args:
        recipe: the members' recipe, except for the seed.
        seeds: seeds of initialisation and dropout, one a member.
        own_order: whether each member also sees the frames in an order (and with masks) of its own seed; by
            default all share the order of `recipe`, and so the work of preparing the frames.
        learning_rates, weight_decays: one a member in place of the recipe's.
        together: members that are stepped together; None measures a few steps and takes what is fastest. If
            that would take more than a twentieth of the training, up to 16 members with at most a million
            parameters in all.
        folds: 0 trains on all frames. Otherwise whole recordings are dealt out to so many folds, and a member is
            trained for each fold and seed, on the frames outside that fold; see `ensemble.run.distillation`.
        on_epoch: called after each epoch with one record for each member that was stepped together.
        directory: as in `zoo.train`; each set of members that is stepped together has its own folder in it.
        workers: `ensemble.run.Processes` or `Ray`, each of which trains one such set at a time; here, one after
            another, if None. Whoever trains, sets of the same size give the same bits, so a smaller `together` gives
            more workers something to do. A directory must be seen by all machines, a teacher and its functions must be
            something that can be sent.

    Returns:
        M checkpoints in the order of the seeds; each one's recipe repeats it alone. With folds, the M members trained
        without the first fold, then those without the second, and so on.

    Raises:
        ValueError: no seeds, not as many rates or decays as seeds, folds other than from 2 to as many as recordings, or
            as in `zoo.train` and `zoo.training.Group`; `on_epoch`, or frames that cannot be sent, beside workers.
        TrainingError: as in `zoo.training.train_group`.
        OSError: somebody else is training in the directory.
    """
    if together is not None and together < 1:
        msg = f"expected at least 1 member together, got {together}"
        raise ValueError(msg)
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
    settings: dict[str, Any] = {"unlabelled": frame_sets(unlabelled), "on_epoch": on_epoch}
    settings["teacher"] = None if teacher is None else zoo.training.Teacher.of(teacher)
    if workers is not None and on_epoch is not None:
        msg = "expected no on_epoch beside workers, which train elsewhere; a directory has the figures of each epoch"
        raise ValueError(msg)
    folder = None if directory is None else Path(directory).absolute()
    with _files.held(folder):
        if not folds:
            sets = _sets(spec, recipes, train, valid, together, folder, None, settings)
        else:
            fold, sets = fold_of(train, folds), []
            for k in range(folds):
                outside, place = (fold != k).nonzero().flatten(), None if folder is None else folder / f"fold-{k:02}"
                sets += _sets(spec, recipes, train.select(outside), valid, together, place, outside, settings)
        trained = _trained(sets, _Trainer(train, valid, settings), workers, progress)
    return [one for one in trained if one is not None]


@dataclass(frozen=True)
class _Set:
    """Members that are stepped together."""

    spec: zoo.Spec
    recipes: tuple[zoo.Recipe, ...]
    recordings: Tensor | None  # to learn from; all of them if None
    place: Path | None  # of the run


@dataclass(frozen=True)
class _Trainer:
    """The job of a worker; to the bit, what is learnt depends on the number of threads."""

    train: zoo.FrameSet
    valid: zoo.FrameSet
    settings: Mapping[str, Any]  # of `train_group`
    diverging: bool = False  # whether a loss that diverges gives None in place of an error
    patience: float = 0.0  # seconds to wait for whoever trains in the same place
    threads: int = field(default_factory=torch.get_num_threads)

    def __call__(self) -> Callable[[_Set], list[zoo.Checkpoint | None]]:
        torch.set_num_threads(self.threads)
        return self.trained

    def trained(self, some: _Set) -> list[zoo.Checkpoint | None]:
        """A checkpoint for each of these members; where one diverges, each is trained alone."""
        frames = self.train if some.recordings is None else self.train.select(some.recordings)
        group = stacked_group(some.spec, some.recipes, frames.features.device)
        try:
            with _files.held(some.place, patience=self.patience):
                return [*zoo.training.train_group(group, frames, self.valid, directory=some.place, **self.settings)]
        except zoo.TrainingError:
            if not self.diverging:
                raise
        if len(some.recipes) == 1:
            return [None]
        places = [some.place and some.place / f"alone-{m:03}" for m in range(len(some.recipes))]
        alone = zip(some.recipes, places, strict=True)
        return [one for recipe, place in alone for one in self.trained(replace(some, recipes=(recipe,), place=place))]


def _trained(
    sets: Sequence[_Set], trainer: _Trainer, workers: Workers | None, progress: zoo.logs.Progress | None
) -> list[zoo.Checkpoint | None]:
    """The members of all sets, in their order, whoever trains them."""
    if workers is None:  # each training shows how far it is
        trainer, progress = replace(trainer, settings={**trainer.settings, "progress": progress}), None
    else:
        require_sendable(trainer.train, trainer.valid, *trainer.settings.get("unlabelled", ()))
        trainer = replace(trainer, patience=_LEASE)
    names = [f"set {n} ({len(some.recipes)} {some.spec.architecture})" for n, some in enumerate(sets)]
    items = {name: partial(replace, some) for name, some in zip(names, sets, strict=True)}
    found = dict(carry_out(trainer, items, workers, title="trainings", progress=progress))
    return [one for name in items for one in found[name]]


def fold_of(frames: zoo.FrameSet, folds: int) -> Tensor:
    """(U,) the fold, from 0 on, of each recording: the same each time, and as many of each as can be.

    Example:
        >>> frames = zoo.FrameSet(torch.zeros(4, 1), None, torch.arange(5), ("a", "b"))
        >>> fold_of(frames, 2).bincount()
        tensor([2, 2])
    """
    if not 2 <= folds <= frames.recordings:
        msg = f"expected from 2 folds to as many as there are recordings ({frames.recordings}), got {folds}"
        raise ValueError(msg)
    return torch.randperm(frames.recordings, generator=torch.Generator().manual_seed(0)) % folds


def _sets(
    spec: zoo.Spec,
    recipes: Sequence[zoo.Recipe],
    train: zoo.FrameSet,
    valid: zoo.FrameSet,
    together: int | None,
    folder: Path | None,
    recordings: Tensor | None,
    settings: Mapping[str, Any],
) -> list[_Set]:
    """A member for each recipe, so many together, which is noted in the folder: a resumed run has the same sets."""
    teacher, first = settings.get("teacher"), zoo.training.single_group(spec, recipes[0])
    zoo.training.check_group(first, train, valid, teacher, settings.get("unlabelled", ()))
    note = None if folder is None else folder / "together.json"
    if together is None and note is not None and note.exists():
        together = int(json.loads(note.read_bytes()))
    size = together or _chosen(spec, recipes, train, teacher)
    if note is not None:
        _files.make_folders(note.parent)
        _files.write(note, json.dumps(size).encode())
    return [
        _Set(spec, tuple(recipes[at : at + size]), recordings, None if folder is None else folder / f"members-{at:03}")
        for at in range(0, len(recipes), size)
    ]


@checked
def train_alike(
    specs: Sequence[zoo.Spec],
    recipe: zoo.Recipe,
    train: zoo.FrameSet,
    valid: zoo.FrameSet,
    *,
    workers: Workers | None = None,
    folder: str | Path | None = None,
    progress: zoo.logs.Progress | None = None,
) -> list[zoo.Checkpoint | None]:
    """Train a model for each spec, equal specs together, as the `trainer` of `zoo.search.halving`.

    A spec that is repeated is drawn as often, under seeds counted up from the recipe's. So a study compares each
    shape by several draws of its weights for little more than the time of one. The result
    has a checkpoint per spec, in their order; None where the loss diverged. `workers` are those of `cotrain`; in the
    folder each set of equal specs has its run, from which a study that is started again goes on.
    """
    root = None if folder is None else Path(folder).absolute()
    sets, places = list[_Set](), list[int]()
    with _files.held(root):
        for spec in dict.fromkeys(specs):
            equal = [index for index, other in enumerate(specs) if other == spec]
            recipes = [replace(recipe, seed=recipe.seed + m, order_seed=recipe.data_seed) for m in range(len(equal))]
            known = repr((spec.canonical(), len(equal), recipe.to_dict(), train.fingerprint, valid.fingerprint))
            home = None if root is None else root / hashlib.sha256(known.encode()).hexdigest()
            sets += _sets(spec, recipes, train, valid, None, home, None, {})
            places += equal
        trained = _trained(sets, _Trainer(train, valid, {}, diverging=True), workers, progress)
    return [one for _, one in sorted(zip(places, trained, strict=True), key=lambda pair: pair[0])]


def measure_together(
    spec: zoo.Spec, recipes: Sequence[zoo.Recipe], train: zoo.FrameSet, teacher: zoo.training.Teacher | None = None
) -> dict[int, float]:
    """Seconds per step and member when 1, 2, 4, ... or all members are stepped together, measured on real batches.

    Larger groups are not tried once they become slower; if the members cannot be stacked, the only key is 1.
    """
    device = train.features.device
    found: dict[int, float] = {}
    for size in _sizes(len(recipes)):
        try:
            group = stacked_group(spec, recipes[:size], device)
            found[size] = zoo.training.seconds_per_step(group, train, teacher=teacher) / size
        except (ValueError, torch.OutOfMemoryError):  # a layer that cannot be stacked, or no room
            if size == 1:
                raise
            break
        if found[size] > 1.25 * min(found.values()):
            break
    again = zoo.training.seconds_per_step(stacked_group(spec, recipes[:1], device), train, teacher=teacher)
    return found | {1: min(found[1], again)}  # the first measurement was made while everything was cold


def _sizes(members: int) -> list[int]:
    return [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size < members] + [members]


def _chosen(
    spec: zoo.Spec, recipes: Sequence[zoo.Recipe], train: zoo.FrameSet, teacher: zoo.training.Teacher | None
) -> int:
    """The size of the groups: measured if that takes a small share of the training, else by the members' size."""
    recipe, members, device = recipes[0], len(recipes), train.features.device
    steps = recipe.epochs * recipe.fraction * len(train) / (recipe.batch_size * recipe.accumulate) * members
    if members > 1 and _SHARE * steps >= _STEPS:
        first = stacked_group(spec, recipes[:1], device)
        step = zoo.training.seconds_per_step(first, train, teacher=teacher, patience=0)
        measuring = sum(max(_STEPS * step * size, _PATIENCE) for size in [*_sizes(members), 1])
        if measuring < _SHARE * steps * step:
            return fastest(measure_together(spec, recipes, train, teacher))
    size = min(members, _MANY, _HELD // max(zoo.count_parameters(spec), 1))
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


class TrainingStack(nn.Module):
    """M models of one structure: (B, inputs) for all, or (M, B, inputs) with one for each -> (M, B, C).

    The names in the `state_dict` of its `body` are those of one model; each tensor's memory is the members' tensors
    one after another, so `tensor.view(M, -1)` has a row for each member. A member computes, dropout included,
    what it would compute alone from the same seed.

    Args:
        models: at least one, in train mode, on the device where they are to be trained; they are copied.

    Raises:
        ValueError: the models differ, or have layers that cannot be stacked; the message names them.

    Example:
        >>> models = [nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(5)]
        >>> TrainingStack(models)(torch.zeros(7, 3)).shape
        torch.Size([5, 7, 2])
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        first = next((layer for layer in models[0].modules() if isinstance(layer, nn.Linear)), None)
        if first is None:
            msg = "expected models that begin with a Linear"
            raise ValueError(msg)
        device = first.weight.device
        self.generators = [torch.Generator(device) for _ in models]
        self.body = _stacked(list(models), self.generators, "model")
        if difference := _difference(models) or _loss(models[0], self.body, len(models)):
            msg = f"cannot stack the models: {difference}; train them one after another"
            raise ValueError(msg)
        for name, parameter in models[0].named_parameters():
            self.body.get_parameter(name).requires_grad_(parameter.requires_grad)
        x = torch.randn(_PROBED, first.in_features, generator=torch.Generator().manual_seed(0)).to(device)
        for model in (self, *models):
            model.eval()
        try:
            with torch.no_grad():
                alone, together = torch.stack([model(x.clone()) for model in models]), self(x.clone())
        except (TypeError, AttributeError, RuntimeError) as error:
            msg = f"expected models that answer {tuple(x.shape)} inputs with a tensor, alone and stacked, got: {error}"
            raise ValueError(msg) from error
        for model in (self, *models):
            model.train()
        if self._draws(x):
            msg = "cannot stack models that draw random numbers in training otherwise than by Dropout layers; "
            raise ValueError(msg + "train them one after another")
        if alone.shape != together.shape or not torch.allclose(alone, together, rtol=1e-4, atol=1e-4):
            msg = "the stacked members do not compute what each computes alone; train them one after another"
            raise ValueError(msg)

    def _draws(self, x: Tensor) -> bool:
        """Whether training draws from the global generators, where members would not draw what each draws alone."""
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), restored(self.body):
            before = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
            self(x.clone())
            after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        return not all(map(torch.equal, before, after))

    def forward(self, x: Tensor) -> Tensor:
        """(M, B, C) of (B, inputs) or (M, B, inputs)."""
        found: Tensor = self.body(x if x.ndim == 2 else x.transpose(0, 1))  # (B, M, C)
        return found.transpose(0, 1)

    def reseed(self, seeds: Sequence[int]) -> None:
        """Restart each member's dropout from M seeds."""
        for generator, seed in zip(self.generators, seeds, strict=True):
            generator.manual_seed(seed)


def _difference(models: Sequence[nn.Module]) -> str:
    """The first difference between models that may decide what they compute or learn; "" if none."""
    return next((difference for model in models[1:] if (difference := unlike(model, models[0]))), "")


def _loss(model: nn.Module, body: nn.Module, members: int) -> str:
    """What of a model the stack would lose: names of one tensor, entries of its state, hooks; "" if nothing."""
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if shared := [name for name in every if name not in dict(model.named_parameters())]:
        return f"{', '.join(shared)} has another name as well"
    sizes = {name: members * tensor.numel() for name, tensor in state_of(model).items()}
    if sizes != {name: tensor.numel() for name, tensor in body.state_dict().items()}:
        return f"the state of the first, {', '.join(sizes)}, is not that of plain layers"
    for name, part in model.named_modules():
        hooks = [key for key, value in vars(part).items() if key.endswith("_hooks") and value]
        if hooks or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in part.parameters(recurse=False)):
            return f"hooks of {name or 'the model'!r} would not run"
    return ""


class _WideLinear(nn.Module):
    """M Linear layers as one: (B, I) or (B, M, I) -> (B, M, O)."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.members = len(layers)
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]))  # (M * O, I)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases)) if biases else None  # (M * O)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return functional.linear(x, self.weight, self.bias).view(len(x), self.members, -1)
        weight = self.weight.view(self.members, -1, self.weight.shape[1])
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        y: Tensor = _Products.apply(x.to(dtype), weight.to(dtype))  # type: ignore[no-untyped-call]  # untyped in torch
        return y if self.bias is None else y + self.bias.view(self.members, -1)


class _Products(Function):
    """(B, M, I) by (M, O, I) -> (B, M, O), gradients laid out as the parameters are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        g = gradients[0].transpose(0, 1)  # (M, B, O)
        return torch.bmm(g, weight).transpose(0, 1).contiguous(), torch.bmm(g.transpose(1, 2), x.transpose(0, 1))


class _WideBatchNorm(nn.BatchNorm1d):
    """M BatchNorms as one over M * H channels: (B, M, H) -> (B, M, H)."""

    def __init__(self, layers: Sequence[nn.BatchNorm1d]) -> None:
        first = layers[0]
        super().__init__(
            len(layers) * first.num_features, first.eps, first.momentum, first.affine, first.track_running_stats
        )
        for name in [name for name, _ in (*first.named_parameters(), *first.named_buffers())]:
            tensor = torch.stack([getattr(layer, name).detach() for layer in layers]).flatten()
            setattr(self, name, nn.Parameter(tensor) if name in self._parameters else tensor)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1)).view_as(input)


class _WideDropout(nn.Module):
    """M Dropouts, each drawing from its member's generator what it would draw alone: (B, M, H) -> (B, M, H)."""

    def __init__(self, layer: nn.Dropout, generators: list[torch.Generator]) -> None:
        super().__init__()
        self.p, self.generators, self.built_in = layer.p, generators, isinstance(layer, Dropout)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return x * torch.stack([self._mask(x[:, 0], generator) for generator in self.generators], dim=1)

    def _mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.built_in and x.device.type == "cpu":
            return dropout_mask(x, self.p, generator)
        return torch.empty_like(x).bernoulli_(1 - self.p, generator=generator).div_(1 - self.p or 1)


def _stacked(layers: list[Any], generators: list[torch.Generator], name: str) -> nn.Module:
    """One layer for the members' layers, its parts stacked likewise."""
    first = layers[0]
    if any(type(layer) is not type(first) or layer.extra_repr() != first.extra_repr() for layer in layers):
        msg = f"expected members of one structure, but {name} is {first} in one member and differs in another"
        raise ValueError(msg)
    if type(first) is nn.Linear:
        return _WideLinear(layers)
    if type(first) is nn.BatchNorm1d and (first.momentum is not None or not first.track_running_stats):
        return _WideBatchNorm(layers)
    if type(first) in (nn.Dropout, Dropout):
        return _WideDropout(first, generators)
    if type(first) is nn.Identity or activation_of(first) is not None:
        return copy.deepcopy(first)  # type: ignore[no-any-return]  # layers are modules
    children = dict(first.named_children())
    if first._parameters or first._buffers or not children:
        msg = f"cannot stack {name}, a {type(first).__name__}; train the members one after another"
        raise ValueError(msg)
    hollow: nn.Module = copy.copy(first)
    hollow._modules = {
        part: _stacked([layer._modules[part] for layer in layers], generators, f"{name}.{part}") for part in children
    }
    return hollow
