"""Optimisers by name: how each is made from the fields of a recipe, and what is special about it.

A parameter may hold M members, one after another in memory. torch's optimisers work entry by entry, so M
members in one tensor step as M models would; what looks at a whole model looks at each member's row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from zoo._names import checked, enter
from zoo.data.frames import sent_to

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


@checked
def optimiser(make: Maker, **special: Any) -> Maker:
    """Register a function that makes an optimiser, so that recipes may name it; ValueError if its name is taken.

    Its keyword-only arguments are fields of a recipe; `special` are fields of `Optimiser` other than the defaults.
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

    Each member switches by itself when the bias-corrected mean of that rate comes within `tolerance` of the
    current one, or all when `switch_epoch` epochs are over. SGD then continues at that rate with momentum `beta1`.
    Rates are stored in units of the learning rate, so that a schedule acts on both halves. `lr`, `betas` and `eps` are
    those of torch's Adam.

    References:
        Keskar and Socher, "Improving generalization performance by switching from Adam to SGD",
        arXiv 1712.07628, algorithm 1.
    """

    tolerance = 1e-9

    def __init__(self, parameters: Parameters, *, members: int, switch_epoch: int = 0, **settings: Any) -> None:
        super().__init__(parameters, settings)
        self.members, self.switch_epoch = members, switch_epoch
        # (M,) and () on the CPU, stored with the first parameter's state
        self.shared: dict[str, Tensor] = self.state[self.param_groups[0]["params"][0]]
        self.shared |= {name: torch.zeros(members, dtype=torch.float64) for name in ("mean", "rate", "switched")}
        self.shared["steps"] = torch.zeros((), dtype=torch.float64)

    def begin_epoch(self, epoch: int) -> None:
        """Where `switch_epoch` epochs are over, let all members continue with SGD at the rate estimated so far."""
        if 0 < self.switch_epoch < epoch:
            waiting = (self.shared["switched"] == 0) & (self.shared["steps"] > 0)
            self.shared["rate"][waiting] = self._corrected()[waiting]
            self.shared["switched"][waiting] = 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is used
        """One step of each member's current half."""
        settings, shared, M = self.param_groups[0], self.shared, self.members
        lr, (beta1, beta2) = settings["lr"], settings["betas"]
        shared["steps"] += 1
        steps, length, along = float(shared["steps"]), torch.zeros(()), torch.zeros(())
        device = settings["params"][0].device
        switched, rate = (sent_to(shared[name], device) for name in ("switched", "rate"))
        for p in settings["params"]:
            if p.grad is None:
                continue
            gradient, state = rows(p.grad, M), self.state[p]
            if "velocity" not in state:
                for name in ("exp_avg", "exp_avg_sq", "velocity"):
                    state[name] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            mean, square, velocity = (rows(state[name], M) for name in ("exp_avg", "exp_avg_sq", "velocity"))
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            velocity.mul_(beta1).add_(gradient * spread(switched, p))  # zero until the switch
            adam = (mean / (1 - beta1**steps)).div_((square / (1 - beta2**steps)).sqrt_().add_(settings["eps"]))
            sgd = velocity * spread(rate * (1 - beta1), p)
            rows(p, M).sub_(torch.where(spread(switched, p) > 0, sgd, adam), alpha=lr)
            length = length + adam.double().square().sum(1)
            along = along + adam.double().mul(gradient).sum(1)
        self._settle(*torch.stack([length, along]).cpu())  # the one wait: whether to switch is decided on the host

    def _settle(self, length: Tensor, along: Tensor) -> None:
        """Update the mean rate by Adam's last move (squared length and product with the gradient, (M,) each)."""
        shared, (_, beta2) = self.shared, self.param_groups[0]["betas"]
        uses_adam = (shared["switched"] == 0) & (along != 0)
        current = torch.where(uses_adam, length / along, shared["mean"])
        shared["mean"] = torch.where(uses_adam, beta2 * shared["mean"] + (1 - beta2) * current, shared["mean"])
        mean = self._corrected()
        close = self.param_groups[0]["lr"] * (mean - current).abs() < self.tolerance
        settled = uses_adam & (shared["steps"] > 1) & (mean > 0) & close
        shared["rate"] = torch.where(settled, mean, shared["rate"])
        shared["switched"][settled] = 1

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
    """Move each member by `rho` in the direction of its gradient (Foret et al., ICLR 2021, equation 2)."""
    moved = {p: rows(p.grad, members) for p in parameters if p.grad is not None}
    scale = rho / (norms(list(moved.values()), members) + 1e-12)
    for p, gradient in moved.items():
        rows(p, members).addcmul_(gradient, spread(scale, p))


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Give a module the parameters and buffers back, with the values, to the bit, that they had before the block."""
    stores = [store for layer in module.modules() for store in (layer._parameters, layer._buffers)]
    before = [(store, key, t, t.detach().clone()) for store in stores for key, t in store.items() if t is not None]
    yield
    with torch.no_grad():
        for store, key, tensor, old in before:
            store[key] = tensor  # type: ignore[assignment]  # it came from there
            tensor.copy_(old)


def rows(tensor: Tensor, members: int) -> Tensor:
    """(M, n), the members' parts of a tensor as rows, without a copy."""
    return tensor.view(members, -1)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """(M, 1) of `like`'s type and device, to multiply rows with one value a member."""
    return values.to(like.device, like.dtype)[:, None]


def norms(tensors: Sequence[Tensor], members: int) -> Tensor:
    """(M,) Euclidean norm of each member's part of all tensors together."""
    parts = torch.stack([torch.linalg.vector_norm(rows(t, members), dim=1) for t in tensors])  # (tensors, M)
    return parts.square().sum(dim=0).sqrt()
