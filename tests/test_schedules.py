"""Schedules against torch's own."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import optim

import zoo
from zoo import FrameSet, Recipe
from zoo.training import schedule
from zoo.training.loop import schedule_factor
from zoo.training.schedules import SCHEDULES, Position, plateau


def factors(recipe: Recipe, steps: int, epochs: int) -> list[float]:
    """The factor at every step of a run."""
    return [schedule_factor(Position(step, steps, epochs), recipe) for step in range(steps * epochs)]


def torch_factors(make: object, steps: int, every: int = 1) -> list[float]:
    """The same from one of torch's schedulers, at a learning rate of 1."""
    optimiser = optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimiser)  # type: ignore[operator]
    found = []
    for step in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return found


S, E = 5, 8
SAME = {
    "constant": ({}, lambda o: optim.lr_scheduler.ConstantLR(o, 1.0), 1),
    "step": ({"gamma": 0.5, "every": 3}, lambda o: optim.lr_scheduler.StepLR(o, 3, 0.5), S),
    "multi_step": ({"gamma": 0.1, "milestones": (2, 5)}, lambda o: optim.lr_scheduler.MultiStepLR(o, [2, 5], 0.1), S),
    "exponential": ({"gamma": 0.9}, lambda o: optim.lr_scheduler.ExponentialLR(o, 0.9), S),
    "time": ({"gamma": 0.3}, lambda o: optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + 0.3 * epoch)), S),
    "linear": ({"final_rate": 0.2}, lambda o: optim.lr_scheduler.LinearLR(o, 1.0, 0.2, S * E - 1), 1),
    "cosine": ({"final_rate": 0.1}, lambda o: optim.lr_scheduler.CosineAnnealingLR(o, S * E - 1, 0.1), 1),
    "one_cycle": (
        {"peak": 0.25},
        lambda o: optim.lr_scheduler.OneCycleLR(
            o, 1.0, S * E, pct_start=(0.25 * (S * E - 1) + 1) / (S * E), cycle_momentum=False, final_div_factor=1e9
        ),
        1,
    ),
    "plateau": ({}, lambda o: optim.lr_scheduler.ConstantLR(o, 1.0), 1),
}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_each_schedule_is_torchs(name: str) -> None:
    """Step by step the factor of torch's scheduler of that form; a new schedule has to name its own."""
    fields, make, every = SAME[name]
    ours = factors(Recipe(schedule=name, epochs=E, **fields), S, E)
    torch.testing.assert_close(ours, torch_factors(make, S * E, every), rtol=1e-6, atol=1e-6)


def test_cosine_restarts_as_torchs() -> None:
    """Periods of 2, 4, ... epochs, each from the top."""
    ours = factors(Recipe(schedule="cosine", restart=2, restart_factor=2, final_rate=0.1), S, E)
    make = lambda o: optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2 * S, 2, 0.1)  # noqa: E731
    torch.testing.assert_close(ours, torch_factors(make, S * E), rtol=1e-6, atol=1e-6)


def test_warm_up_rises_in_equal_steps() -> None:
    """Over half an epoch of four steps: one half, then all."""
    assert factors(Recipe(warmup=0.5), 4, 1) == [0.5, 1.0, 1.0, 1.0]


def test_plateau_lowers_each_member_after_epochs_without_gain() -> None:
    """By hand, every 2 epochs by a half, but not below 0.5: members that waited 0, 1, 2, 3 and 4 epochs."""
    found = plateau(torch.full((5,), 0.8), torch.arange(5.0), every=2, gamma=0.5, final_rate=0.5)
    torch.testing.assert_close(found, torch.tensor([0.8, 0.8, 0.5, 0.8, 0.5]))


MODULE = """
from functools import partial
from zoo.training import schedule


@schedule
def root(at, *, final_rate):
    return max(1 - at.share, final_rate) ** 0.5


@partial(schedule, reactive=True)
def after_each_epoch(factors, waited, *, gamma):
    return factors * gamma
"""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[None]:
    """Two schedules of a user's module, for the length of a test."""
    before = dict(SCHEDULES)
    (tmp_path / "own.py").write_text(MODULE)
    runpy.run_path(str(tmp_path / "own.py"), run_name="own")
    yield
    SCHEDULES.clear()
    SCHEDULES.update(before)


@pytest.mark.usefixtures("own")
def test_a_schedule_of_ones_own_is_one_function(frames: FrameSet) -> None:
    """By hand: of the position with warm-up, and one that reacts to what each epoch gave."""
    found = factors(Recipe(schedule="root", epochs=2, final_rate=0.25, warmup=1.0), 2, 2)
    assert found == pytest.approx([0.5, (2 / 3) ** 0.5, (1 / 3) ** 0.5, 0.5])
    spec = zoo.Spec("cylinder", features=6, context=1, classes=4, options={"width": 8})
    recipe = Recipe(schedule="after_each_epoch", gamma=0.5, learning_rate=0.01, epochs=3, batch_size=32)
    rates: list[float] = []
    zoo.train(spec, recipe, frames, frames, on_epoch=lambda record: rates.append(record["learning_rate"]))
    assert rates == pytest.approx([0.01, 0.005, 0.0025])


def test_a_taken_name_is_refused() -> None:
    """The message says whose it is."""
    with pytest.raises(ValueError, match=r"'cosine' is already registered by zoo\.training\.schedules"):

        @schedule
        def cosine(at: Position) -> float: ...
