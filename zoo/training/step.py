"""One step of training: the members, the batches that they see, their scores, and the move of the optimiser.

Members are the first axis everywhere; a single model is a group of one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional

from zoo import _files
from zoo._names import checked
from zoo.checkpoint import state_of
from zoo.checkpoint.exam import rows_for
from zoo.checkpoint.header import DTYPES
from zoo.data.audio import blank_, drawn_runs
from zoo.data.frames import FrameSet, Windows, prepared, sent_to
from zoo.models.spec import Spec, build
from zoo.training.optimisers import OPTIMISERS, norms, perturb, restored, rows, spread
from zoo.training.recipe import Recipe
from zoo.training.schedules import SCHEDULES
from zoo.training.teacher import Teacher

OWN = ("seed", "order_seed", "learning_rate", "weight_decay")  # what members of one group may differ in
_DRAWN = 64  # batches whose masks are drawn, and sent to the device, at once
_AT_ONCE = 16_384  # frames times members that are evaluated at once; keeps the activations within the cache


@dataclass(frozen=True, eq=False)
class Batch:
    """Frames that the members see at once; where each has frames of its own, all tensors begin with M."""

    windows: Tensor  #: (B, inputs), or (M, B, inputs)
    labels: Tensor  #: (B,); -1 for a frame without one
    soft: Tensor | None = None  #: (B, C) probabilities, the teacher's at the recipe's temperature
    others: Tensor | None = None  #: (B,) labels of the windows that are mixed in
    share: Tensor | None = None  #: (B,) share of a mixed window that is its own

    @property
    def count(self) -> int:
        """B."""
        return self.labels.shape[-1]


@dataclass(frozen=True)
class Group:
    """M models of one spec that are trained together; M is 1 for a single model.

    Args:
        spec: the members' spec.
        recipes: M, each of which trains its member alone in the same way; `check_recipes` says how they may differ.
        module: one module whose `state_dict` has the names of a single model's; the memory of each tensor is
            that of the M members' tensors, one after another.
        forward: (B, inputs), or (M, B, inputs) where every member has frames of its own -> (M, B, C) logits.
        reseed: restarts each member's random draws (of dropout) from M seeds.
    """

    spec: Spec
    recipes: tuple[Recipe, ...]
    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    reseed: Callable[[Sequence[int]], object]

    def __post_init__(self) -> None:
        check_recipes(self.recipes)

    @property
    def members(self) -> int:
        """M."""
        return len(self.recipes)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of a single model's tensors by their names in the `state_dict`."""
        return {name: tensor.shape for name, tensor in build(self.spec, device="meta").state_dict().items()}


@checked
def check_recipes(recipes: Sequence[Recipe]) -> None:
    """Raise ValueError unless members with these recipes can be trained together, that is share most fields."""
    if not recipes:
        msg = "expected at least one member, each with a seed or a recipe, got none"
        raise ValueError(msg)
    first = recipes[0]
    differing = [name for name in vars(first) if len({getattr(one, name) for one in recipes}) > 1]
    if not set(differing) <= set(OWN):
        others = ", ".join(name for name in differing if name not in OWN)
        msg = f"members trained together may differ in {', '.join(OWN)}, not in {others}"
        raise ValueError(msg)
    own_rates = not {"learning_rate", "weight_decay"}.isdisjoint(differing)
    own_rates |= len(recipes) > 1 and SCHEDULES[first.schedule].reactive
    if own_rates and not OPTIMISERS[first.optimiser].proportional:
        msg = (
            f"{first.optimiser} requires that members trained together share one learning rate: they can have no "
            f"rates or decays of their own, nor a schedule that reacts to results (here {first.schedule!r})"
        )
        raise ValueError(msg)


class Batches:
    """Frames in batches, in an order that is a function of seed and epoch; members of one order share them.

    With a teacher, frames without labels may follow those with labels, and each batch holds its answers. Windows are
    cut with the larger context of spec and teacher, are augmented, and each sees the middle of them.
    """

    def __init__(
        self,
        frames: FrameSet,
        spec: Spec,
        recipes: Sequence[Recipe],
        teacher: Teacher | None = None,
        unlabelled: Sequence[FrameSet] = (),
    ) -> None:
        self._spec, self._recipe, self._teacher = spec, recipes[0], teacher
        self._asked = spec.context if teacher is None or teacher.context is None else teacher.context
        self._context = max(spec.context, self._asked)
        device, sets = frames.features.device, [frames, *unlabelled]
        way = self._context, spec.normalisation, spec.padding
        self._windows = joined([prepared(each, *way) for each in sets], [len(each) for each in sets])
        self._labels = labels_of(frames, "train").to(device)
        if unlabelled:
            without = [self._labels.new_full((len(each),), -1) for each in unlabelled]
            self._labels = torch.cat([self._labels, *without])
        groups = None if teacher is None else teacher.groups  # within which windows are mixed
        self._groups = None if groups is None else groups.to(device)
        order = None if teacher is None else teacher.order(frames.classes)
        self._order = None if order is None else torch.tensor(order, device=device)
        seeds = [recipe.data_seed for recipe in recipes]
        self._seeds = seeds[:1] if len(set(seeds)) == 1 else seeds
        total = len(self._labels)
        self.count = max(round(total * self._recipe.fraction), 1)
        self._frames: Tensor | None = None  # (1 or M, count) where it is a fraction of them
        if self.count < total:
            orders = [torch.randperm(total, generator=_generator(seed, 0, "fraction")) for seed in self._seeds]
            self._frames = torch.stack([order[: self.count].sort().values for order in orders])
        size = self._recipe.batch_size
        batches = self.count // size + (self.count % size > 1)  # BatchNorm cannot take one frame
        if not batches:
            msg = f"expected at least two frames to train on, got {self.count}"
            raise ValueError(msg)
        self.steps = -(-batches // self._recipe.accumulate)
        self._starts = range(0, batches * size, size)

    def epoch(self, number: int) -> Iterator[list[Batch]]:
        """For each step its batches."""
        generators = [_generator(seed, number, "order") for seed in self._seeds]
        orders = [torch.randperm(self.count, generator=g) for g in generators]
        order = orders[0][None] if len(orders) == 1 else torch.stack(orders)  # (1 or M, N)
        order = order if self._frames is None else self._frames.gather(1, order)
        order = order.to(self._labels.device)  # at once: each step would wait for its own
        drawn, size = self._drawn(generators), self._recipe.batch_size
        for first in range(0, len(self._starts), self._recipe.accumulate):
            starts = self._starts[first : first + self._recipe.accumulate]
            yield [self._batch(order[:, at : at + size], next(drawn)) for at in starts]

    def _drawn(self, generators: Sequence[torch.Generator]) -> Iterator[dict[str, Tensor]]:
        """What is drawn on the CPU for each batch, (1 or M, B, ...) each: for many batches, and sent at once."""
        recipe, frames = self._recipe, 2 * self._context + 1
        longest = {"max_time": recipe.mask_time, "max_features": recipe.mask_features}
        around = self._context - self._spec.context
        sizes = [min(recipe.batch_size, self.count - at) for at in self._starts]

        def of(size: int) -> dict[str, Tensor]:
            parts: dict[str, list[Tensor]] = {}
            if recipe.mix_up:
                pairs = [_mixing(size, recipe.mix_up, g) for g in generators]
                parts["partners"], parts["share"] = ([*column] for column in zip(*pairs, strict=True))
            if recipe.mask_time or recipe.mask_features:
                shape = size, frames, self._spec.features
                parts["runs"] = [drawn_runs(shape, **longest, generator=g, around=around) for g in generators]
            return {name: torch.stack(rows) for name, rows in parts.items()}

        for first in range(0, len(sizes), _DRAWN):
            some = sizes[first : first + _DRAWN]
            columns = [of(size) for size in some]
            together = {name: torch.cat([each[name] for each in columns], dim=1) for name in columns[0]}
            sent = {name: torch.split(sent_to(x, self._labels.device), some, dim=1) for name, x in together.items()}
            yield from ({name: pieces[at] for name, pieces in sent.items()} for at in range(len(some)))

    def unmasked(self, most: int) -> Iterator[Tensor]:
        """Windows in batches without masks, of about `most` frames spread evenly over all."""
        frames = evenly(self.count, most)
        frames = frames if self._frames is None else self._frames[0][frames]
        batches = spread_batches(self._windows, frames.to(self._labels.device), self._recipe.batch_size)
        return (self._middle(windows, self._spec.context) for windows in batches)

    def _batch(self, index: Tensor, drawn: Mapping[str, Tensor]) -> Batch:
        """Of frames (1 or M, B): the first axis is left out where members share them."""
        shared = len(index) == 1
        windows, own = [self._windows(row) for row in index], index[0] if shared else index
        mixing: dict[str, Tensor] = {}
        if "share" in drawn:
            partners, shares = drawn["partners"], drawn["share"]
            if self._groups is not None:
                both = zip(partners, self._groups[index], strict=True)
                partners = torch.stack([within(groups, order) for order, groups in both])
            windows = [x[at].lerp(x, share[:, None]) for x, at, share in zip(windows, partners, shares, strict=True)]
            others = self._labels[index.gather(1, partners)]
            mixing = {"others": others[0] if shared else others, "share": shares[0] if shared else shares}
        if "runs" in drawn:
            for x, runs in zip(windows, drawn["runs"], strict=True):
                blank_(x.view(len(x), -1, self._spec.features), runs)
        together = windows[0] if shared else torch.cat(windows)  # (1 or M * B, inputs): one call of the teacher
        if self._teacher is not None:
            asked = self._middle(together, self._asked)
            soft = self._teacher.targets(asked, index.flatten(), self._order, self._recipe.temperature)
            mixing["soft"] = soft.view(*own.shape, -1)
        return Batch(self._middle(together, self._spec.context).view(*own.shape, -1), self._labels[own], **mixing)

    def _middle(self, windows: Tensor, context: int) -> Tensor:
        """(B, inputs) of this context, of windows with at least as much."""
        edge = (self._context - context) * self._spec.features
        return windows[:, edge : windows.shape[1] - edge].contiguous() if edge else windows


class Scorer:
    """Labelled frames, prepared once to evaluate models of one spec on the frames' device.

    With `whole` they are evaluated as one batch, for models whose answers depend on the other frames of a batch.
    """

    def __init__(self, frames: FrameSet, spec: Spec) -> None:
        self.whole = False
        self.frames = frames
        self._labels = labels_of(frames, "valid").to(frames.features.device)
        self._windows = prepared(frames, spec.context, spec.normalisation, spec.padding)

    @torch.no_grad()
    def __call__(self, forward: Callable[[Tensor], Tensor], members: int = 1) -> tuple[Tensor, Tensor]:
        """Accuracy (M,) as a fraction and loss (M,) in nats, float64; forward: (B, inputs) -> (M, B, C) logits."""
        size = len(self._labels) if self.whole else max(_AT_ONCE // members, 256)
        right, loss = torch.zeros(2, members, dtype=torch.float64, device=self._labels.device)
        for at in range(0, len(self._labels), size):
            labels = self._labels[at : at + size]
            logits = forward(self._windows(slice(at, at + size))).float()
            right += (logits.argmax(dim=-1) == labels).sum(dim=1)
            loss += losses(logits, labels).double().sum(dim=1)
        return right.cpu() / len(self._labels), loss.cpu() / len(self._labels)

    def metrics(self, accuracy: Tensor, loss: Tensor) -> dict[str, dict[str, Any]]:
        """One member's scores as a checkpoint stores them: with the unit, number and fingerprint of the frames."""
        measured_on = {"n": len(self.frames), "frames": self.frames.fingerprint}
        return {
            "valid/accuracy": {"value": float(accuracy), "unit": "fraction", **measured_on},
            "valid/loss": {"value": float(loss), "unit": "nats", **measured_on},
        }


class State:
    """The parameters and buffers in a module's `state_dict`, looked up wherever they stand at the moment.

    Training may put another tensor in the place of one (`self.mean = ...`, `weight.data = ...`); so their places are
    kept here, and no tensor. Of several names for one tensor the first counts.

    Raises:
        ValueError: two of the tensors share memory, or as in `zoo.checkpoint.state_of`; the message names them.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._name, self._layers = name, dict(module.named_modules())
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        self._aside: dict[str, tuple[dict[str, Any], str]] = {}
        found = state_of(module, repr(name))
        for prefix, layer in module.named_modules(remove_duplicate=False):
            for store in (layer._parameters, layer._buffers):
                for key in store:
                    full = f"{prefix}.{key}" if prefix else key
                    (self._places if full in found else self._aside)[full] = store, key
        firsts: dict[int, str] = {}
        self.first = {entry: firsts.setdefault(id(store[key]), entry) for entry, (store, key) in self._places.items()}
        tensors = self.tensors()
        spans = sorted((t.data_ptr(), entry, t) for entry, t in tensors.items() if t.numel())
        for (at, entry, tensor), (after, other, _) in pairwise(spans):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            if at + (sum((n - 1) * step for n, step in steps) + 1) * tensor.element_size() > after:
                msg = (
                    f"{entry} and {other} of {name!r} share memory, but are different tensors; assign one to both names"
                )
                raise ValueError(msg)
        self._forms = {entry: (tensor.shape, tensor.dtype) for entry, tensor in tensors.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their first names, detached; they share memory with the module."""
        return {
            name: self._places[name][0][self._places[name][1]].detach() for name in dict.fromkeys(self.first.values())
        }

    def checked(self) -> dict[str, Tensor]:
        """As `tensors`; ValueError where training has put one of another shape or type, or no tensor, in a place."""
        for name, form in self._forms.items():
            store, key = self._places[name]
            tensor = store.get(key)
            if tensor is None or (tensor.shape, tensor.dtype) != form:
                came = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                msg = f"expected {name} of {self._name!r} to stay {tuple(form[0])} {form[1]} in training, got {came}"
                raise ValueError(msg)
        return self.tensors()

    def aside(self) -> dict[str, Tensor]:
        """Copies of the buffers that are in no `state_dict`, those that a file can hold."""
        found = {name: store.get(key) for name, (store, key) in self._aside.items()}
        plain = {name: t for name, t in found.items() if t is not None and t.layout is torch.strided}
        return {name: t.detach().clone() for name, t in plain.items() if t.dtype in DTYPES.values()}

    def numbers(self) -> dict[str, dict[str, float]]:
        """The plain numbers among the attributes of each layer, by its path: a model may count in them."""
        return {
            path: {
                name: value
                for name, value in vars(layer).items()
                if type(value) in (bool, int, float) and math.isfinite(value) and name != "training"
            }
            for path, layer in self._layers.items()
        }

    def set_aside(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Mapping[str, float]]) -> None:
        """Put back what `aside` and `numbers` gave, where the module still has such places."""
        for name, (store, key) in self._aside.items():
            if name in tensors:
                like = next(iter(self.tensors().values())) if store[key] is None else store[key]
                store[key] = tensors[name].to(like.device, copy=True)
        for path, own in self.numbers().items():
            for name in own.keys() & numbers.get(path, {}).keys():
                setattr(self._layers[path], name, numbers[path][name])


class Stepper:
    """A group's parameters with their optimiser and, for float16, the scaling of their gradients."""

    def __init__(self, group: Group, device: torch.device | str) -> None:
        self.group, self.recipe, self.device = group, group.recipes[0], torch.device(device)
        self.parameters = [p for p in group.module.parameters() if p.requires_grad]
        if not self.parameters:
            msg = f"expected parameters to train in {group.spec.architecture!r}, got none that requires a gradient"
            raise ValueError(msg)
        self.check_parameters()
        matrices = {name for name, shape in group.shapes.items() if len(shape) > 1}
        self.matrices = [p for name, p in group.module.named_parameters() if name in matrices and p.requires_grad]
        decays = [recipe.weight_decay for recipe in group.recipes]
        self.decays = torch.tensor(decays if len(set(decays)) > 1 else [], dtype=torch.float64)  # else torch's own
        self.kind = OPTIMISERS[self.recipe.optimiser]
        shared = replace(self.recipe, weight_decay=0.0) if len(self.decays) else self.recipe
        _files.name_compiler_cache()
        self.optimiser = self.kind.make(self.parameters, **shared.arguments(self.kind.make, members=group.members))
        self.scaler = GradScaler(self.device.type, enabled=self.recipe.precision == "float16")

    def check_parameters(self) -> None:
        """Raise ValueError if the model has put in others; lay them out as `_lay_out` does."""
        known = {id(p) for p in self.parameters}
        trained = {name: p for name, p in self.group.module.named_parameters() if p.requires_grad}
        if others := [name for name, p in trained.items() if id(p) not in known]:
            msg = f"{', '.join(others)} of {self.group.spec.architecture!r} would not be trained: "
            raise ValueError(msg + "a model cannot replace or unfreeze its parameters while it is trained")
        self._lay_out()

    def _lay_out(self) -> None:
        """Parameters and gradients in one piece each, as fused optimisers take for granted."""
        for p in self.parameters:
            if not p.is_contiguous():
                p.data = p.data.contiguous()
            if p.grad is not None and not p.grad.is_contiguous():
                p.grad = p.grad.contiguous()

    def step(self, batches: Sequence[Batch], rates: Tensor) -> Tensor:
        """One step at each member's learning rate (M,): correct frames, summed losses in nats, labels (3, M)."""
        recipe, M = self.recipe, self.group.members
        twice = self.kind.gradients > 1
        sums = self.gradient([_copy(batch) for batch in batches] if twice else batches)
        if twice:
            with restored(self.group.module):
                perturb(self.parameters, recipe.rho, M)
                self.gradient(batches)
        if recipe.clip_value:
            nn.utils.clip_grad_value_(self.parameters, recipe.clip_value)
        if recipe.clip_norm:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            factor = (recipe.clip_norm / (norms(gradients, M) + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                rows(gradient, M).mul_(spread(factor, gradient))
        self.move(rates)
        return sums

    def gradient(self, batches: Sequence[Batch]) -> Tensor:
        """Set the parameters' gradients to those of each member's mean loss and penalties; sums as in `step`."""
        recipe, mixed, architecture = self.recipe, self.recipe.precision != "float32", self.group.spec.architecture
        self.optimiser.zero_grad(set_to_none=True)
        sums = torch.zeros(3, self.group.members, dtype=torch.float64, device=self.device)
        lost = torch.zeros(self.group.members, dtype=torch.bool, device=self.device)
        for batch in batches:
            with torch.autocast(self.device.type, getattr(torch, recipe.precision)) if mixed else nullcontext():
                logits = self.group.forward(batch.windows)
            expected = (self.group.members, batch.count, self.group.spec.classes)
            if logits.shape != expected:
                msg = f"expected logits {expected[1:]} from {architecture!r} in training, got {tuple(logits.shape[1:])}"
                raise ValueError(msg)
            loss = objective(logits.float(), batch, recipe)  # (M, B)
            total = loss.mean(dim=1).sum() / len(batches)
            if not total.requires_grad:
                msg = f"expected logits of {architecture!r} that depend on its parameters, got a constant"
                raise ValueError(msg)
            try:
                self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]  # untyped in torch
            except RuntimeError as error:
                kept = [name for name, buffer in self.group.module.named_buffers() if buffer.requires_grad]
                if not kept:
                    raise
                msg = (
                    f"{', '.join(kept)} of {architecture!r} would take gradients through earlier steps; detach() first"
                )
                raise ValueError(msg) from error
            sums[0] += (logits.detach().argmax(dim=-1) == batch.labels).sum(dim=1)
            sums[1] += loss.detach().sum(dim=1)
            sums[2] += batch.count if batch.soft is None else (batch.labels >= 0).sum(dim=-1)
            lost |= ~loss.detach().isfinite().all(dim=1)
        self._lay_out()
        if self.group.members > 1 and self.scaler.is_enabled():  # or the scaler would skip the others' steps as well
            for gradient in (p.grad for p in self.parameters if p.grad is not None):
                rows(gradient, self.group.members).masked_fill_(lost[:, None], 0)
        self.scaler.unscale_(self.optimiser)
        with torch.no_grad():
            for p in self.matrices if recipe.l1 or recipe.l2 else ():
                if p.grad is None:  # the logits do not depend on it, but the penalties do
                    p.grad = torch.zeros_like(p)
                p.grad.add_(p.sign(), alpha=recipe.l1).add_(p, alpha=recipe.l2)
        return sums

    @torch.no_grad()
    def move(self, rates: Tensor) -> None:
        """Take the optimiser's step at each member's own rate (M,), after weight decays of their own.

        Where the rates differ, steps are proportional to them (`check_recipes`): the step is taken at the highest
        rate, and the other members are moved part of the way back.
        """
        M, top = self.group.members, float(rates.max())
        for settings in self.optimiser.param_groups:
            settings["lr"] = top
        decays = sent_to(rates * self.decays if len(self.decays) and self.kind.decoupled else self.decays, self.device)
        for p in self.parameters if len(decays) else ():
            if p.grad is None:  # as torch's own decay
                continue
            if self.kind.decoupled:
                rows(p, M).mul_(1 - spread(decays, p))
            else:
                rows(p.grad, M).add_(rows(p, M) * spread(decays, p))
        before = [p.clone() for p in self.parameters] if (rates != top).any() else []
        self.scaler.step(self.optimiser)
        self.scaler.update()
        shares = sent_to(rates / top if top else rates, self.device) if before else rates
        for p, old in zip(self.parameters, before, strict=False):
            rows(p, M).sub_(rows(old, M)).mul_(spread(shares, p)).add_(rows(old, M))

    def tensors(self) -> dict[str, Tensor]:
        """What the optimiser remembers, by the names that it has in the file of the state."""
        return {
            f"optimiser.{index}.{name}": value
            for index, p in enumerate(self.parameters)
            for name, value in self.optimiser.state[p].items()
            if isinstance(value, Tensor)
        }

    def restore(self, tensors: Mapping[str, Tensor], scaler: dict[str, Any]) -> None:
        """Continue from these `tensors`; torch's own `load_state_dict` would round float64 to float32."""
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, index, name = key.split(".")
                parameter = self.parameters[int(index)]
                state = self.optimiser.state[parameter]
                # torch counts steps on the host, unless the count is part of a fused or captured step
                on_host = name == "step" and not {True} & {
                    self.optimiser.defaults.get(k) for k in ("fused", "capturable")
                }
                home = state[name].device if name in state else "cpu" if on_host else parameter.device
                state[name] = value.to(home, copy=True)
        self.scaler.load_state_dict(scaler)


def forward_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """(B, inputs) -> (1, B, C): a single model's logits for inputs that are cast to the type of its weights."""

    def forward(x: Tensor) -> Tensor:
        answer = model(rows_for(model, x))
        logits = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
        if not isinstance(logits, Tensor):  # in training, since in evaluation it is examined
            msg = f"expected a tensor of logits from a {type(model).__name__}, got a {type(answer).__name__}; "
            raise ValueError(msg + "return further outputs otherwise than with the logits")
        return logits[None]

    return forward


def epoch_seed(seed: int, epoch: int, what: str) -> int:
    """32 bits that depend on all three; neighbouring seeds and epochs have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{what} {seed} {epoch}".encode()).digest()[:4])


def _generator(seed: int, epoch: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(epoch_seed(seed, epoch, what))


def objective(logits: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """(M, B) losses in nats of (M, B, C) logits: of the labels, of the teacher's answers, or of both by their weights.

    A mixed window has two labels, each counts with its share; a frame without a label has no loss of that kind.
    """
    soft = None if batch.soft is None else soft_losses(logits, batch.soft, recipe.temperature)
    if soft is not None and not recipe.hard_weight:
        return soft
    hard = losses(logits, batch.labels, recipe.label_smoothing)
    if batch.others is not None and batch.share is not None:
        hard = losses(logits, batch.others, recipe.label_smoothing).lerp(hard, batch.share)
    return hard if soft is None else soft.lerp(hard, recipe.hard_weight)


def losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(M, B) cross-entropies in nats of (M, B, C) logits; labels (B,) for all members or (M, B), 0 where one is -1."""
    M, B, _ = logits.shape
    rows, wanted = logits.flatten(0, 1), labels.expand(M, B).flatten()
    flat = functional.cross_entropy(rows, wanted, ignore_index=-1, reduction="none", label_smoothing=label_smoothing)
    return flat.view(M, B)


def soft_losses(logits: Tensor, probabilities: Tensor, temperature: float = 1.0) -> Tensor:
    """(M, B) cross-entropies in nats of (M, B, C) logits at a temperature, times its square, with (B, C) or (M, B, C).

    The gradients shrink with the square of the temperature, hence the factor: so they weigh as much as those of hard
    labels whatever it is (Hinton, Vinyals, Dean 2015, section 2.1).
    """
    logs = (logits / temperature).log_softmax(dim=-1)
    return temperature**2 * -(probabilities * logs).sum(dim=-1)


def labels_of(frames: FrameSet, what: str) -> Tensor:
    """The labels of the frames, which a message calls `what` where there are none."""
    if frames.labels is None:
        msg = f"expected {what} frames with labels, got none; is there a transcript folder?"
        raise ValueError(msg)
    return frames.labels


def joined(parts: Sequence[Windows], counts: Sequence[int]) -> Windows:
    """The windows of frame sets one after another, with so many frames each; without a wait for their device."""
    if len(parts) == 1:
        return parts[0]

    def made(which: Tensor | slice) -> Tensor:
        index = torch.arange(sum(counts))[which] if isinstance(which, slice) else which
        found, first = parts[0](index.clamp(max=counts[0] - 1)), counts[0]
        for part, count in zip(parts[1:], counts[1:], strict=True):
            there = part((index - first).clamp(0, count - 1))
            found, first = there.where((index >= first)[:, None], found), first + count
        return found

    return made


def _mixing(frames: int, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each of B frames the position of the one that is mixed in, and its own share: from Beta(alpha, alpha).

    Of two shares that add up to one the larger is its own, so that a frame is mostly itself.

    References:
        Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018.
    """
    partner = torch.randperm(frames, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # as in `zoo.data.audio.drawn_runs`
        share = torch.distributions.Beta(alpha, alpha).sample((frames,))
    return partner, torch.maximum(share, 1 - share)


def within(groups: Tensor, order: Tensor) -> Tensor:
    """(B,) for each position the one after it in an order (B,) of its group's, for the last of a group itself.

    Example:
        >>> within(torch.tensor([7, 5, 7, 5, 7]), torch.tensor([4, 3, 2, 1, 0]))
        tensor([0, 1, 0, 1, 2])
    """
    order = order[groups[order].argsort(stable=True)]  # group after group
    after = order.roll(-1)
    return torch.empty_like(order).scatter_(0, order, after.where(groups[after] == groups[order], order))


def _copy(batch: Batch) -> Batch:
    """The batch with windows of its own, since a model may change its input."""
    return replace(batch, windows=batch.windows.clone())


def evenly(count: int, most: int) -> Tensor:
    """Indices of about `most` of so many frames, spread evenly over them."""
    return torch.arange(0, count, max(count // most, 1))


def spread_batches(windows: Windows, frames: Tensor, size: int) -> Iterator[Tensor]:
    """The windows (`size`, inputs) of these frames."""
    for batch in torch.split(frames, size):
        if len(batch) > 1:  # the variance of one frame is not defined
            yield windows(batch)
