"""Schedules of the learning rate: functions of the position in the run, so resuming needs no state.

One that reacts to results instead, such as `plateau`, is a function of each member's epochs without gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from zoo._names import checked, enter

if TYPE_CHECKING:
    from torch import Tensor  # at run time its methods are enough

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Position:
    """Where a run stands: the number of the next step, from 0, of `steps` in each of `epochs` epochs."""

    step: int
    steps: int
    epochs: int

    @property
    def epoch(self) -> int:
        """Number of whole epochs done."""
        return self.step // self.steps

    @property
    def share(self) -> float:
        """Share of the run that is done, 0 at the first step and 1 at the last."""
        return self.step / max(self.steps * self.epochs - 1, 1)


@dataclass(frozen=True)
class Schedule:
    """An entry of the table.

    Args:
        function: (`Position`, *, fields of a recipe by name) -> what the learning rate is multiplied by.
        reactive: the function is instead called after each epoch with the members' factors so far (M,) and their
            epochs without gain (M,), and returns their new factors (M,).
    """

    function: Callable[..., Any]
    reactive: bool = False


SCHEDULES: dict[str, Schedule] = {}


@checked
def schedule(function: Function, *, reactive: bool = False) -> Function:
    """Register a schedule under the function's name, so that recipes may name it; ValueError if it is taken."""
    enter(SCHEDULES, "schedule", function, Schedule(function, reactive))
    return function


@schedule
def constant(at: Position) -> float:
    """The learning rate as it is."""
    return 1.0


@partial(schedule, reactive=True)
def plateau(factors: Tensor, waited: Tensor, *, every: int, gamma: float, final_rate: float) -> Tensor:
    """Times `gamma` whenever `monitor` has not improved for `every` epochs, but not below `final_rate`."""
    lowered = (factors * gamma).clamp(min=final_rate)
    return lowered.where((waited > 0) & (waited % every == 0), factors)


@schedule
def time(at: Position, *, gamma: float) -> float:
    """1 / (1 + gamma * epoch), time-based decay."""
    return 1 / (1 + gamma * at.epoch)


@schedule
def step(at: Position, *, every: int, gamma: float) -> float:
    """Times `gamma` after every `every` epochs."""
    return gamma ** (at.epoch // every)


@schedule
def multi_step(at: Position, *, milestones: tuple[int, ...], gamma: float) -> float:
    """Times `gamma` after each of the `milestones`."""
    return gamma ** sum(milestone <= at.epoch for milestone in milestones)


@schedule
def exponential(at: Position, *, gamma: float) -> float:
    """Times `gamma` after every epoch."""
    return gamma**at.epoch


@schedule
def linear(at: Position, *, final_rate: float) -> float:
    """A straight line from 1 to `final_rate`, step by step."""
    return 1 + (final_rate - 1) * at.share


@schedule
def cosine(at: Position, *, final_rate: float, restart: int, restart_factor: int) -> float:
    """Half a cosine from 1 to `final_rate`, step by step; with `restart`, again and again.

    References:
        Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts", ICLR 2017.
    """
    share = at.share
    if restart:
        begin, length = 0, restart * at.steps
        while at.step >= begin + length:
            begin, length = begin + length, length * restart_factor
        share = (at.step - begin) / length
    return _half_cosine(1.0, final_rate, share)


@schedule
def one_cycle(at: Position, *, peak: float, final_rate: float) -> float:
    """Up from 1/25 to 1 over the share `peak` of the steps, then down to `final_rate`, each half a cosine.

    References:
        Smith and Topin, "Super-convergence", 2018; the form is that of torch's OneCycleLR.
    """
    if at.share < peak:
        return _half_cosine(1 / 25, 1.0, at.share / peak)
    return _half_cosine(1.0, final_rate, (at.share - peak) / max(1 - peak, 1e-9))


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
