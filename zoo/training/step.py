"""One step of the optimiser: gradient, penalties, clipping, and each member's own rate and decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from zoo.models.spec import build
from zoo.training.batchnorm import unchanged_statistics
from zoo.training.descent import AdamSGD, make_optimiser, norms, rows, spread, uphill
from zoo.training.group import Group
from zoo.training.recipe import Recipe
from zoo.training.scores import losses


class Stepper:
    """A group's parameters with their optimiser and, for float16, the scaling of their gradients."""

    def __init__(self, group: Group, recipe: Recipe, device: str) -> None:
        self.group, self.recipe, self.device = group, recipe, device
        self.parameters = [p for p in group.module.parameters() if p.requires_grad]
        self.decays = torch.tensor(group.weight_decays, dtype=torch.float64)
        self.optimiser = make_optimiser(
            self.parameters, replace(recipe, weight_decay=0.0) if group.weight_decays else recipe, group.members
        )
        self.scaler = GradScaler(device, enabled=recipe.precision == "float16")
        matrices = {name for name, p in build(group.spec, device="meta").named_parameters() if p.ndim > 1}
        self.matrices = [p for name, p in group.module.named_parameters() if name in matrices and p.requires_grad]

    def begin(self, epoch: int) -> None:
        """What is to be decided as an epoch begins: whether adam_sgd goes on with SGD."""
        if isinstance(self.optimiser, AdamSGD) and 0 < self.recipe.switch_epoch < epoch:
            self.optimiser.switch()

    def step(self, batches: Sequence[tuple[Tensor, Tensor]], rates: Tensor) -> Tensor:
        """One step of the optimiser; (2, M) correct frames and summed losses of its batches."""
        sums = self.gradient(batches)
        if self.recipe.optimiser == "sam":
            with uphill(self.parameters, self.recipe.rho, self.group.members), unchanged_statistics(self.group.module):
                self.gradient(batches)
        self.clip()
        self.move(rates)
        return sums

    def gradient(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Put the gradient of each member's mean loss and penalties on the parameters."""
        recipe = self.recipe
        mixed = recipe.precision != "float32"
        self.optimiser.zero_grad(set_to_none=True)
        sums = torch.zeros(2, self.group.members, dtype=torch.float64, device=self.device)
        for windows, labels in batches:
            with torch.autocast(self.device, getattr(torch, recipe.precision)) if mixed else nullcontext():
                logits = self.group.forward(windows)
            loss = losses(logits.float(), labels, recipe.label_smoothing)  # (M, B)
            total = loss.mean(dim=1).sum() / len(batches)
            self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]  # untyped in torch
            sums[0] += (logits.detach().argmax(dim=-1) == labels).sum(dim=1)
            sums[1] += loss.detach().sum(dim=1)
        self.scaler.unscale_(self.optimiser)
        with torch.no_grad():
            for p in self.matrices if recipe.l1 or recipe.l2 else ():
                assert p.grad is not None
                p.grad.add_(p.sign(), alpha=recipe.l1).add_(p, alpha=recipe.l2)
        return sums

    @torch.no_grad()
    def clip(self) -> None:
        """Bound each gradient's entries, then each member's whole norm."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.recipe.clip_value:
            for gradient in gradients:
                gradient.clamp_(-self.recipe.clip_value, self.recipe.clip_value)
        if self.recipe.clip_norm:
            M = self.group.members
            factor = (self.recipe.clip_norm / (norms(gradients, M) + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                rows(gradient, M).mul_(spread(factor, gradient))

    @torch.no_grad()
    def move(self, rates: Tensor) -> None:
        """The optimiser's step at each member's own rate.

        All optimisers' steps are linear in the rate, so where members differ the step is taken at the
        highest rate and the others' part of the way back.
        """
        M, top = self.group.members, float(rates.max())
        for settings in self.optimiser.param_groups:
            settings["lr"] = top
        if len(self.decays):
            self.decay(rates)
        alike = bool((rates == top).all())
        before = [] if alike else [p.clone() for p in self.parameters]
        self.scaler.step(self.optimiser)
        self.scaler.update()
        for p, old in zip(self.parameters, before, strict=False):
            share = spread(rates / top if top else rates, p)
            rows(p, M).sub_(rows(old, M)).mul_(share).add_(rows(old, M))

    def decay(self, rates: Tensor) -> None:
        """Each member's own weight decay: on the weights in adamw, else in the gradient, as torch does."""
        for p in self.parameters:
            assert p.grad is not None
            flat = rows(p, self.group.members)
            if self.recipe.optimiser == "adamw":
                flat.mul_(1 - spread(rates * self.decays, p))
            else:
                rows(p.grad, self.group.members).add_(flat * spread(self.decays, p))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data from which `restore` makes the optimiser go on as if nothing had happened."""
        tensors = {
            f"{index}.{name}": value
            for index, p in enumerate(self.parameters)
            for name, value in self.optimiser.state[p].items()
            if isinstance(value, Tensor)
        }
        return tensors, self.scaler.state_dict()

    def restore(self, tensors: Mapping[str, Tensor], scaler: dict[str, Any]) -> None:
        """Take over what `state` gave; torch's own `load_state_dict` would round float64 to float32."""
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            self.optimiser.state[self.parameters[int(index)]][name] = value.to(self._place(name))
        self.scaler.load_state_dict(scaler)

    def _place(self, name: str) -> torch.device:
        own = isinstance(self.optimiser, AdamSGD) and name in ("mean", "rate", "switched", "steps")
        return torch.device("cpu") if own else self.parameters[0].device
