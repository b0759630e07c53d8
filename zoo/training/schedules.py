"""Schedules of the learning rate: pure functions of the position in the run, so resuming needs no state.

The one schedule that looks at results, `plateau`, is 1 here; the training loop lowers its rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.training.recipe import Recipe


@dataclass(frozen=True)
class Position:
    """Where a run stands: the number of the coming step, from 0, of `steps` in each of `epochs` epochs."""

    step: int
    steps: int
    epochs: int

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps

    @property
    def share(self) -> float:
        """Share of the run that is done, 0 at the first step and 1 at the last."""
        return self.step / max(self.steps * self.epochs - 1, 1)


Schedule = Callable[[Position, "Recipe"], float]
SCHEDULES: dict[str, Schedule] = {}


def schedule_factor(at: Position, recipe: Recipe) -> float:
    """What the learning rate is multiplied by at this step: the schedule times the warm-up."""
    rise = min(1.0, (at.step + 1) / (recipe.warmup * at.steps)) if recipe.warmup else 1.0
    return rise * SCHEDULES[recipe.schedule](at, recipe)


def _schedule(function: Schedule) -> Schedule:
    SCHEDULES[function.__name__] = function
    return function


@_schedule
def constant(at: Position, recipe: Recipe) -> float:
    """The learning rate as it is."""
    return 1.0


@_schedule
def plateau(at: Position, recipe: Recipe) -> float:
    """Times `gamma` whenever `monitor` has not improved for `every` epochs; done by the training loop."""
    return 1.0


@_schedule
def time(at: Position, recipe: Recipe) -> float:
    """1 / (1 + gamma * epoch), time-based decay."""
    return 1 / (1 + recipe.gamma * at.epoch)


@_schedule
def step(at: Position, recipe: Recipe) -> float:
    """Times `gamma` after every `every` epochs."""
    return recipe.gamma ** (at.epoch // recipe.every)


@_schedule
def multi_step(at: Position, recipe: Recipe) -> float:
    """Times `gamma` after each of the `milestones`."""
    return recipe.gamma ** sum(milestone <= at.epoch for milestone in recipe.milestones)


@_schedule
def exponential(at: Position, recipe: Recipe) -> float:
    """Times `gamma` after every epoch."""
    return recipe.gamma**at.epoch


@_schedule
def linear(at: Position, recipe: Recipe) -> float:
    """Straight from 1 to `final_rate`, step by step."""
    return 1 + (recipe.final_rate - 1) * at.share


@_schedule
def cosine(at: Position, recipe: Recipe) -> float:
    """Half a cosine from 1 to `final_rate`, step by step; with `restart`, again and again.

    References:
        Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts", ICLR 2017.
    """
    return _anneal(1.0, recipe.final_rate, _share_of_period(at, recipe) if recipe.restart else at.share)


@_schedule
def one_cycle(at: Position, recipe: Recipe) -> float:
    """Up from 1/25 to 1 over the share `peak` of the steps, down to `final_rate`, both half a cosine.

    References:
        Smith and Topin, "Super-convergence", 2018; the form is that of torch's OneCycleLR.
    """
    if at.share < recipe.peak:
        return _anneal(1 / 25, 1.0, at.share / recipe.peak)
    return _anneal(1.0, recipe.final_rate, (at.share - recipe.peak) / max(1 - recipe.peak, 1e-9))


def _anneal(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def _share_of_period(at: Position, recipe: Recipe) -> float:
    """Share of the current period that is done; periods of restart, restart * factor, ... epochs."""
    begin, length = 0, recipe.restart * at.steps
    while at.step >= begin + length:
        begin, length = begin + length, length * recipe.restart_factor
    return (at.step - begin) / length
