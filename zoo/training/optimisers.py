"""Optimisers by name: how each is made from the fields of a recipe, and what is special about it.

A parameter may hold M members, one after another in memory. torch's optimisers work entry by entry, so M
members in one tensor step as M models would; what looks at a whole model looks at each member's row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from zoo._names import enter

Parameters = Sequence[Tensor]
Maker = TypeVar("Maker", bound=Callable[..., Optimizer])


@dataclass(frozen=True)
class Optimiser:
    """An entry of the table.

    Args:
        make: (parameters, *, fields of a recipe by name) -> optimiser. It may also take `members`, M. One that
            does not take `weight_decay` refuses recipes that ask for it.
        decoupled: weight decay shrinks the weights themselves, and is not added to the gradient.
        gradients: gradients per step, 1 or 2; the second is that of weights moved by `perturb`.
        proportional: a step is proportional to the learning rate; if not, all members must share one rate.
        begin_epoch: called with the optimiser and the epoch, from 1, before the epoch's first step.
    """

    make: Callable[..., Optimizer]
    decoupled: bool = False
    gradients: int = 1
    proportional: bool = True
    begin_epoch: Callable[[Any, int], None] = lambda optimiser, epoch: None


OPTIMISERS: dict[str, Optimiser] = {}


def optimiser(make: Maker, **special: Any) -> Maker:
    """Register an optimiser under the function's name, so that recipes may name it.

    Args:
        make: the function; its keyword-only arguments are fields of a recipe.
        **special: fields of `Optimiser` that differ from their defaults.

    Raises:
        ValueError: the name is taken.
    """
    enter(OPTIMISERS, "optimiser", make, Optimiser(make, **special))
    return make


@optimiser
def sgd(parameters: Parameters, *, learning_rate: float, weight_decay: float) -> Optimizer:
    """Plain stochastic gradient descent."""
    return optim.SGD(parameters, learning_rate, weight_decay=weight_decay, fused=True)


@optimiser
def momentum(parameters: Parameters, *, learning_rate: float, momentum: float, weight_decay: float) -> Optimizer:
    """SGD with momentum (Polyak's heavy ball)."""
    return optim.SGD(parameters, learning_rate, momentum, weight_decay=weight_decay, fused=True)


@optimiser
def nesterov(parameters: Parameters, *, learning_rate: float, momentum: float, weight_decay: float) -> Optimizer:
    """SGD with Nesterov's momentum."""
    return optim.SGD(parameters, learning_rate, momentum, weight_decay=weight_decay, nesterov=True, fused=True)


@partial(optimiser, gradients=2)
def sam(parameters: Parameters, *, learning_rate: float, momentum: float, weight_decay: float) -> Optimizer:
    """SGD with momentum along the gradient of the perturbed weights (Foret et al., ICLR 2021)."""
    return optim.SGD(parameters, learning_rate, momentum, weight_decay=weight_decay, fused=True)


@optimiser
def adagrad(parameters: Parameters, *, learning_rate: float, epsilon: float, weight_decay: float) -> Optimizer:
    """Duchi et al., JMLR 12, 2011."""
    return optim.Adagrad(parameters, learning_rate, weight_decay=weight_decay, eps=epsilon)


@optimiser
def adadelta(
    parameters: Parameters, *, learning_rate: float, beta2: float, epsilon: float, weight_decay: float
) -> Optimizer:
    """Zeiler, arXiv 1212.5701; the paper has a learning rate of 1 and epsilon 1e-6."""
    return optim.Adadelta(parameters, learning_rate, rho=beta2, eps=epsilon, weight_decay=weight_decay)


@optimiser
def rmsprop(
    parameters: Parameters, *, learning_rate: float, beta2: float, epsilon: float, weight_decay: float
) -> Optimizer:
    """Tieleman and Hinton, lecture 6.5, 2012."""
    return optim.RMSprop(parameters, learning_rate, alpha=beta2, eps=epsilon, weight_decay=weight_decay)


@optimiser
def adam(
    parameters: Parameters, *, learning_rate: float, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> Optimizer:
    """Kingma and Ba, ICLR 2015; weight decay goes into the gradient."""
    return optim.Adam(parameters, learning_rate, (beta1, beta2), epsilon, weight_decay, fused=True)


@partial(optimiser, decoupled=True)
def adamw(
    parameters: Parameters, *, learning_rate: float, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> Optimizer:
    """Loshchilov and Hutter, ICLR 2019; weight decay shrinks the weights themselves."""
    return optim.AdamW(parameters, learning_rate, (beta1, beta2), epsilon, weight_decay, fused=True)


class AdamSGD(Optimizer):
    """Adam until a member's step, projected on its gradient, says at which rate SGD would have made it.

    Each member switches by itself when the bias-corrected mean of that rate comes within 1e-9 of the
    current one, or all at `switch()`. SGD then continues at that rate with momentum `beta1`. Rates are
    stored in units of the learning rate, so that a schedule acts on both halves.

    References:
        Keskar and Socher, "Improving generalization performance by switching from Adam to SGD",
        arXiv 1712.07628, algorithm 1.
    """

    tolerance = 1e-9

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        members: int,
        switch_epoch: int = 0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        self.members, self.switch_epoch = members, switch_epoch
        shared = self.shared
        shared |= {name: torch.zeros(members, dtype=torch.float64) for name in ("mean", "rate", "switched")}
        shared["steps"] = torch.zeros((), dtype=torch.float64)

    @property
    def shared(self) -> dict[str, Tensor]:
        """`mean`, `rate`, `switched` (M,) and `steps` (), on the CPU: stored with the first parameter's state."""
        return self.state[self.param_groups[0]["params"][0]]  # type: ignore[no-any-return]

    def begin_epoch(self, epoch: int) -> None:
        """Switch where `switch_epoch` epochs are over."""
        if 0 < self.switch_epoch < epoch:
            self.switch()

    def switch(self) -> None:
        """Continue with SGD, for every member that still uses Adam, at the rate estimated so far."""
        shared = self.shared
        waiting = (shared["switched"] == 0) & (shared["steps"] > 0)
        shared["rate"][waiting] = self._corrected()[waiting]
        shared["switched"][waiting] = 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is used
        """One step of each member's current half."""
        group, shared, M = self.param_groups[0], self.shared, self.members
        shared["steps"] += 1
        moved = [p for p in group["params"] if p.grad is not None]
        directions = [self._directions(p, group) for p in moved]
        settled = self._project(moved, [adam for adam, _ in directions], group)
        for p, (adam, velocity) in zip(moved, directions, strict=True):
            sgd = rows(velocity, M) * spread(shared["rate"] * (1 - group["betas"][0]), p)
            chosen = torch.where(spread(shared["switched"], p) > 0, sgd, rows(adam, M))
            rows(p, M).sub_(chosen, alpha=group["lr"])
        shared["switched"][settled] = 1

    def _directions(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Adam's direction, to be multiplied by the learning rate, and SGD's velocity, zero until the switch."""
        state: dict[str, Tensor] = self.state[p]
        for name in ("exp_avg", "exp_avg_sq", "velocity"):
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        gradient, (beta1, beta2), steps = _gradient(p), group["betas"], float(self.shared["steps"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        adam: Tensor = state["exp_avg"] / (1 - beta1**steps)
        own = rows(gradient, self.members) * spread(self.shared["switched"], p)
        rows(state["velocity"], self.members).mul_(beta1).add_(own)
        return adam.div_(root), state["velocity"]

    def _project(self, moved: Sequence[Tensor], adam: Sequence[Tensor], group: dict[str, Any]) -> Tensor:
        """Update the rate at which SGD would have gone as far as Adam; (M,) whose mean has now settled."""
        shared, M, lr, (_, beta2) = self.shared, self.members, group["lr"], group["betas"]
        pairs = list(zip(moved, adam, strict=True))
        length = sum((rows(d, M).double().square().sum(1) for _, d in pairs), torch.zeros(()))
        along = sum((rows(d, M).double().mul(rows(_gradient(p), M)).sum(1) for p, d in pairs), torch.zeros(()))
        uses_adam = (shared["switched"] == 0) & (along.cpu() != 0)
        current = torch.where(uses_adam, length.cpu() / along.cpu(), shared["mean"])
        shared["mean"] = torch.where(uses_adam, beta2 * shared["mean"] + (1 - beta2) * current, shared["mean"])
        corrected = self._corrected()
        settled: Tensor = uses_adam & (shared["steps"] > 1) & (lr * (corrected - current).abs() < self.tolerance)
        settled &= corrected > 0
        shared["rate"] = torch.where(settled, corrected, shared["rate"])
        return settled

    def _corrected(self) -> Tensor:
        """(M,) the mean rate without its bias towards zero."""
        beta2: float = self.param_groups[0]["betas"][1]
        return self.shared["mean"] / (1 - beta2 ** self.shared["steps"])


@partial(optimiser, proportional=False, begin_epoch=AdamSGD.begin_epoch)
def adam_sgd(
    parameters: Parameters,
    *,
    members: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    switch_epoch: int,
) -> Optimizer:
    """Adam, then SGD at the rate that Adam showed (Keskar and Socher, arXiv 1712.07628); no weight decay, use l2."""
    return AdamSGD(
        parameters, lr=learning_rate, betas=(beta1, beta2), eps=epsilon, members=members, switch_epoch=switch_epoch
    )


@torch.no_grad()
def perturb(parameters: Sequence[Tensor], rho: float, members: int) -> None:
    """Move each member by `rho` in the direction of its gradient.

    References:
        Foret et al., "Sharpness-aware minimization", ICLR 2021, equation 2.
    """
    moved = [p for p in parameters if p.grad is not None]
    scale = rho / (norms([_gradient(p) for p in moved], members) + 1e-12)
    for p in moved:
        rows(p, members).addcmul_(rows(_gradient(p), members), spread(scale, p))


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


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
