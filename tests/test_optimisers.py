"""Optimisers by a recipe against torch's own; SAM and Adam-then-SGD against their papers' formulas."""

import runpy
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import ensemble
import zoo
from zoo import FrameSet, Recipe
from zoo.training import optimiser
from zoo.training.optimisers import OPTIMISERS, AdamSGD, norms, perturb, restored
from zoo.training.recipe import keywords

SPEC = zoo.Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 2, "dropout": 0.2})
RATES = {"sgd": 0.1, "momentum": 0.1, "nesterov": 0.1, "sam": 0.1, "adadelta": 10.0, "adagrad": 0.1}
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


def made(parameter: Tensor, recipe: Recipe) -> optim.Optimizer:
    """The optimiser that a recipe names."""
    make = OPTIMISERS[recipe.optimiser].make
    return make([parameter], **recipe.arguments(make, members=1))


def start() -> Tensor:
    """A parameter away from the bottom."""
    return torch.tensor([1.0, -2.0, 3.0], requires_grad=True)


@pytest.mark.parametrize("name", sorted(OPTIMISERS))
def test_each_optimiser_walks_as_torchs(name: str) -> None:
    """The fields of the recipe reach the optimiser of that name."""
    fields = {"momentum": 0.8, "beta1": 0.85, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.01}
    taken = keywords(OPTIMISERS[name].make)
    recipe = Recipe.from_dict(
        {"optimiser": name, "learning_rate": 0.1} | {field: value for field, value in fields.items() if field in taken}
    )
    ours, theirs = start(), start()
    walked = walk(made(ours, recipe), ours)
    torch.testing.assert_close(walked, walk(TORCHS[name]([theirs]), theirs), rtol=1e-6, atol=1e-6)


class StopError(Exception):
    """Raised from on_epoch to stop a run."""


def check_laws(name: str, frames: FrameSet, folder: Path) -> None:
    """The loss falls; a run stopped after each epoch ends with the bits of the uninterrupted one."""
    rate = RATES.get(name, 0.01)
    recipe = Recipe(epochs=3, batch_size=32, optimiser=name, learning_rate=rate, mask_features=1)
    losses: list[float] = []
    whole = zoo.train(SPEC, recipe, frames, frames, on_epoch=lambda record: losses.append(record["train/loss"]))
    assert losses[-1] < losses[0]

    def stop(record: Any) -> None:
        raise StopError

    for _ in (1, 2):
        with pytest.raises(StopError):
            zoo.train(SPEC, recipe, frames, frames, directory=folder / "run", on_epoch=stop)
    assert zoo.train(SPEC, recipe, frames, frames, directory=folder / "run").digest == whole.digest


@pytest.mark.parametrize("name", sorted(OPTIMISERS))
def test_every_optimiser_learns_and_resumes_to_the_bit(name: str, frames: FrameSet, tmp_path: Path) -> None:
    """Whatever state it has is in the epoch's file."""
    check_laws(name, frames, tmp_path)


def test_perturbed_weights_are_rho_along_the_gradient() -> None:
    """Gradient (3, 4), rho 0.5: up by (0.3, 0.4)."""
    p = torch.tensor([1.0, 1.0], requires_grad=True)
    p.grad = torch.tensor([3.0, 4.0])
    perturb([p], 0.5, members=1)
    torch.testing.assert_close(p.detach(), torch.tensor([1.3, 1.4]))


def test_a_module_is_restored_to_the_bit() -> None:
    """Parameters that are moved or get new memory, BatchNorm's statistics, and a buffer replaced by another."""
    norm = nn.BatchNorm1d(2)
    before = deepcopy(norm.state_dict())
    with restored(norm):
        norm(torch.randn(8, 2) + 5)
        norm.weight.data += 1 / 3
        norm.bias.data = norm.bias.data + 1
        norm.running_var = norm.running_var * 2
        assert not torch.equal(norm.running_mean, before["running_mean"])
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, before[name])


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
    assert optimiser.shared["switched"].item() == 1
    torch.testing.assert_close(optimiser.shared["rate"] * 0.01, torch.tensor([0.01 / 4], dtype=torch.float64))
    before = p.item()
    optimiser.step()  # SGD: velocity is the gradient, the step (1 - beta1) * rate * velocity
    assert before - p.item() == pytest.approx(0.1 * 0.01 / 4 * 4, rel=1e-5)


def test_members_switch_on_their_own() -> None:
    """One member's gradient is constant, the other's changes its size: only the first becomes SGD."""
    p = torch.tensor([0.0, 0.0], requires_grad=True)
    optimiser = AdamSGD([p], lr=0.01, betas=(0.9, 0.999), eps=1e-8, members=2, switch_epoch=1)
    for step in range(1, 4):
        p.grad = torch.tensor([4.0, float(step**3)])
        optimiser.step()
    assert optimiser.shared["switched"].tolist() == [1, 0]
    optimiser.begin_epoch(2)
    assert optimiser.shared["switched"].tolist() == [1, 1]


MODULE = """
from functools import partial
from torch import optim
from zoo.training import optimiser


@partial(optimiser, decoupled=True)
def shrinking(parameters, *, learning_rate, weight_decay):
    return optim.NAdam(parameters, learning_rate, weight_decay=weight_decay, decoupled_weight_decay=True)


@optimiser
def undecayed(parameters, *, learning_rate, epsilon):
    return optim.NAdam(parameters, learning_rate, eps=epsilon)
"""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[None]:
    """Two optimisers of a user's module, for the length of a test."""
    before = dict(OPTIMISERS)
    (tmp_path / "own.py").write_text(MODULE)
    runpy.run_path(str(tmp_path / "own.py"), run_name="own")
    yield
    OPTIMISERS.clear()
    OPTIMISERS.update(before)


@pytest.mark.usefixtures("own")
def test_an_optimiser_of_ones_own_is_one_function(frames: FrameSet, tmp_path: Path) -> None:
    """It obeys the laws of the table, and members with decays of their own are what each is alone."""
    check_laws("shrinking", frames, tmp_path)
    recipe = Recipe(optimiser="shrinking", epochs=3, batch_size=32, learning_rate=0.01)
    for one in ensemble.cotrain(SPEC, recipe, frames, frames, seeds=[1, 2], weight_decays=[0.0, 0.5], together=2):
        alone = zoo.train(SPEC, Recipe.from_dict(one.recipe or {}), frames, frames)
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(one.tensors[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("own")
def test_what_an_optimiser_does_not_take_is_refused() -> None:
    """A weight decay that it would ignore; an argument that is no field; a name that is taken."""
    with pytest.raises(ValueError, match=r"undecayed takes no weight_decay, got 0\.1; use l2"):
        Recipe(optimiser="undecayed", weight_decay=0.1)

    @optimiser
    def strange(parameters: object, *, viscosity: float) -> None: ...

    with pytest.raises(TypeError, match="strange takes viscosity, which is no field"):
        made(start(), Recipe(optimiser="strange"))
    with pytest.raises(ValueError, match=r"'adam' is already registered by zoo\.training\.optimisers"):

        @optimiser
        def adam(parameters: object) -> None: ...
