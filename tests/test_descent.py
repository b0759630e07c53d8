"""Optimisers by a recipe against torch's own; SAM and Adam-then-SGD against their papers' formulas."""

import pytest
import torch
from torch import Tensor, optim

from zoo import Recipe
from zoo.training.descent import AdamSGD, make_optimiser, norms, uphill
from zoo.training.optimisers import OPTIMISERS

TORCHS = {
    "sgd": lambda p: optim.SGD(p, 0.1, weight_decay=0.01),
    "momentum": lambda p: optim.SGD(p, 0.1, momentum=0.8, weight_decay=0.01),
    "nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    "sam": lambda p: optim.SGD(p, 0.1, momentum=0.8, weight_decay=0.01),
    "adagrad": lambda p: optim.Adagrad(p, 0.1, weight_decay=0.01, eps=1e-6),
    "adadelta": lambda p: optim.Adadelta(p, 0.1, rho=0.95, eps=1e-6, weight_decay=0.01),
    "rmsprop": lambda p: optim.RMSprop(p, 0.1, alpha=0.95, eps=1e-6, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, 0.1, (0.85, 0.95), 1e-6, weight_decay=0.01),
    "adamw": lambda p: optim.AdamW(p, 0.1, (0.85, 0.95), 1e-6, weight_decay=0.01),
    "adam_sgd": lambda p: optim.Adam(p, 0.1, (0.85, 0.95), 1e-6),
}


def walk(optimiser: optim.Optimizer, parameter: Tensor, steps: int = 6) -> Tensor:
    """Where some steps on a lopsided bowl lead."""
    for _ in range(steps):
        optimiser.zero_grad()
        (parameter.square() * torch.tensor([1.0, 5.0, 0.1])).sum().backward()
        optimiser.step()
    return parameter.detach()


def start() -> Tensor:
    """A parameter away from the bottom."""
    return torch.tensor([1.0, -2.0, 3.0], requires_grad=True)


@pytest.mark.parametrize("name", sorted(OPTIMISERS))
def test_each_optimiser_walks_as_torchs(name: str) -> None:
    """The fields of the recipe reach the optimiser of that name."""
    decay = 0.0 if name == "adam_sgd" else 0.01
    recipe = Recipe(
        optimiser=name, learning_rate=0.1, momentum=0.8, beta1=0.85, beta2=0.95, epsilon=1e-6, weight_decay=decay
    )
    ours, theirs = start(), start()
    walked = walk(make_optimiser([ours], recipe), ours)
    torch.testing.assert_close(walked, walk(TORCHS[name]([theirs]), theirs), rtol=1e-6, atol=1e-6)


def test_uphill_goes_rho_along_the_gradient_and_comes_back() -> None:
    """Gradient (3, 4), rho 0.5: up by (0.3, 0.4); afterwards the same bits as before."""
    p = torch.tensor([1.0, 1.0], requires_grad=True)
    p.grad = torch.tensor([3.0, 4.0])
    before = p.detach().clone()
    with uphill([p], 0.5, members=1):
        torch.testing.assert_close(p.detach(), torch.tensor([1.3, 1.4]))
    assert torch.equal(p.detach(), before)


def test_norms_are_taken_member_by_member() -> None:
    """Two members in two tensors: sqrt(9 + 16) and sqrt(25 + 144)."""
    found = norms([torch.tensor([3.0, 5.0]), torch.tensor([4.0, 12.0])], 2)
    torch.testing.assert_close(found, torch.tensor([5.0, 13.0]))


def test_adam_becomes_sgd_with_the_rate_that_adam_showed() -> None:
    """By hand: with a constant gradient Adam moves by lr, so SGD's rate is lr / gradient, found at the second step."""
    p = torch.tensor([0.0], requires_grad=True)
    optimiser = AdamSGD([p], lr=0.01, betas=(0.9, 0.999), eps=0.0, members=1)
    for _ in range(2):
        p.grad = torch.tensor([4.0])
        optimiser.step()
    assert optimiser.found["switched"].item() == 1
    torch.testing.assert_close(optimiser.found["rate"] * 0.01, torch.tensor([0.01 / 4], dtype=torch.float64))
    before = p.item()
    optimiser.step()  # SGD: velocity is the gradient, the step (1 - beta1) * rate * velocity
    assert before - p.item() == pytest.approx(0.1 * 0.01 / 4 * 4, rel=1e-5)


def test_members_switch_on_their_own() -> None:
    """One member's gradient is constant, the other's changes its size: only the first becomes SGD."""
    p = torch.tensor([0.0, 0.0], requires_grad=True)
    optimiser = AdamSGD([p], lr=0.01, betas=(0.9, 0.999), eps=1e-8, members=2)
    for step in range(1, 4):
        p.grad = torch.tensor([4.0, float(step**3)])
        optimiser.step()
    assert optimiser.found["switched"].tolist() == [1, 0]
    optimiser.switch()
    assert optimiser.found["switched"].tolist() == [1, 1]
