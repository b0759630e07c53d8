"""Steps downhill: torch's optimisers by a recipe, SAM's look uphill, and Adam that becomes SGD.

A parameter may hold M members, one after another in memory. torch's optimisers work entry by entry, so M
members in one tensor step as M models would; what looks at a whole model looks at each member's row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, optim

from zoo.training.optimisers import OPTIMISERS
from zoo.training.recipe import Recipe


def make_optimiser(parameters: Sequence[Tensor], recipe: Recipe, members: int = 1) -> optim.Optimizer:
    """The recipe's optimiser over leaf parameters, each of whose memory is that of `members` equal parts."""
    choice = OPTIMISERS[recipe.optimiser](recipe)
    if choice.kind == "AdamSGD":
        return AdamSGD(parameters, members=members, **choice.settings)
    made: optim.Optimizer = getattr(optim, choice.kind)(parameters, **choice.settings)
    return made


def rows(tensor: Tensor, members: int) -> Tensor:
    """(M, n), the members' parts of a tensor as rows, without a copy."""
    return tensor.view(members, -1)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """(M, 1) of `like`'s type and device, to multiply rows with one value a member."""
    return values.to(like.device, like.dtype)[:, None]


def norms(tensors: Sequence[Tensor], members: int) -> Tensor:
    """(M,) Euclidean norm of each member's part of all tensors together."""
    parts: list[Tensor] = [torch.linalg.vector_norm(rows(t, members), dim=1) for t in tensors]
    return torch.stack(parts).square().sum(dim=0).sqrt()


@contextmanager
def uphill(parameters: Sequence[Tensor], rho: float, members: int) -> Iterator[None]:
    """Stand, for the length of the block, where each member's loss rises steepest at distance `rho`.

    Afterwards the parameters are as they were, to the bit.

    References:
        Foret et al., "Sharpness-aware minimization", ICLR 2021, equation 2.
    """
    moved = [p for p in parameters if p.grad is not None]
    before = [p.detach().clone() for p in moved]
    scale = rho / (norms([_gradient(p) for p in moved], members) + 1e-12)
    with torch.no_grad():
        for p in moved:
            rows(p, members).addcmul_(rows(_gradient(p), members), spread(scale, p))
    yield
    with torch.no_grad():
        for p, old in zip(moved, before, strict=True):
            p.copy_(old)


class AdamSGD(optim.Optimizer):
    """Adam until a member's step, projected on its gradient, says at which rate SGD would have made it.

    Each member switches by itself when the bias-corrected mean of that rate comes within 1e-9 of the
    present one, or all at `switch()`. SGD then goes on at the found rate with momentum `beta1`. Rates are
    kept in units of the learning rate, so that a schedule acts on both halves.

    References:
        Keskar and Socher, "Improving generalization performance by switching from Adam to SGD",
        arXiv 1712.07628, algorithm 1.
    """

    tolerance = 1e-9

    def __init__(
        self, parameters: Sequence[Tensor], *, lr: float, betas: tuple[float, float], eps: float, members: int
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        self.members = members
        first: Tensor = self.param_groups[0]["params"][0]
        self.state[first] |= {name: torch.zeros(members, dtype=torch.float64) for name in ("mean", "rate", "switched")}
        self.state[first]["steps"] = torch.zeros((), dtype=torch.float64)

    @property
    def found(self) -> dict[str, Tensor]:
        """`mean`, `rate`, `switched` (M,) and `steps` (): stored with the first parameter's state."""
        return self.state[self.param_groups[0]["params"][0]]  # type: ignore[no-any-return]

    def switch(self) -> None:
        """Go on with SGD, for every member still with Adam, at the rate found so far."""
        found = self.found
        waiting = (found["switched"] == 0) & (found["steps"] > 0)
        found["rate"][waiting] = self._corrected()[waiting]
        found["switched"][waiting] = 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is used
        """One step of each member's present half."""
        group, found, M = self.param_groups[0], self.found, self.members
        beta1, beta2 = group["betas"]
        found["steps"] += 1
        moved = [p for p in group["params"] if p.grad is not None]
        adam = [self._adam(p, group) for p in moved]
        momentum = [self._momentum(p, beta1, found["switched"]) for p in moved]
        settled = self._project(moved, adam, beta2, group["lr"])
        rate = found["rate"]
        for p, direction, velocity in zip(moved, adam, momentum, strict=True):
            chosen = torch.where(
                spread(found["switched"], p) > 0,
                rows(velocity, M) * spread(rate * (1 - beta1), p),
                rows(direction, M),
            )
            rows(p, M).sub_(chosen, alpha=group["lr"])
        found["switched"][settled] = 1

    def _adam(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's direction, to be multiplied by the learning rate."""
        state: dict[str, Tensor] = self.state[p]
        gradient = _gradient(p)
        for name in ("exp_avg", "exp_avg_sq", "velocity"):
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        steps = float(self.found["steps"])
        root = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        mean: Tensor = state["exp_avg"] / (1 - beta1**steps)
        return mean.div_(root)

    def _momentum(self, p: Tensor, beta1: float, switched: Tensor) -> Tensor:
        """SGD's velocity, which starts from zero at the switch."""
        velocity: Tensor = self.state[p]["velocity"]
        flat = rows(velocity, self.members)
        flat.mul_(beta1).add_(rows(_gradient(p), self.members) * spread(switched, p))
        return velocity

    def _project(self, moved: Sequence[Tensor], adam: Sequence[Tensor], beta2: float, lr: float) -> Tensor:
        """Take in the rate at which SGD would have gone as far as Adam; (M,) whose mean has now settled."""
        found, M = self.found, self.members
        pairs = list(zip(moved, adam, strict=True))
        length = sum((rows(d, M).double().square().sum(1) for _, d in pairs), torch.zeros(()))
        along = sum((rows(d, M).double().mul(rows(_gradient(p), M)).sum(1) for p, d in pairs), torch.zeros(()))
        adam_goes_on = (found["switched"] == 0) & (along.cpu() != 0)
        present = torch.where(adam_goes_on, length.cpu() / along.cpu(), found["mean"])
        found["mean"] = torch.where(adam_goes_on, beta2 * found["mean"] + (1 - beta2) * present, found["mean"])
        corrected = self._corrected()
        settled = adam_goes_on & (found["steps"] > 1) & (lr * (corrected - present).abs() < self.tolerance)
        settled &= corrected > 0
        found["rate"] = torch.where(settled, corrected, found["rate"])
        return settled

    def _corrected(self) -> Tensor:
        beta2: float = self.param_groups[0]["betas"][1]
        return self.found["mean"] / (1 - beta2 ** self.found["steps"])


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
