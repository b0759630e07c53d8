"""`METRICS`: what members, rules and weights are judged by, each one decorated function.

A metric is a mean over frames of numbers that come from the probabilities (`Answers`), or is computed from how often
each class is right, predicted and true (`Counts`). Both add up over recordings, which is what intervals resample.
Reports, pages, fits, selections and commands take the names from the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ensemble.outputs import LEAST
from ensemble.outputs.arrays import rows_and_labels
from ensemble.rules.table import no_such

Floats = NDArray[np.float64]

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Answers:
    """What one member or rule answers on B frames."""

    rows: NDArray[np.floating]  #: (B, C) distributions; equal probabilities where it abstains
    labels: NDArray[np.int64]  #: (B,)
    guesses: NDArray[np.int64]  #: (B,) the top class, the first of equal ones; -1 where it abstains

    @cached_property
    def true_class(self) -> Floats:
        """(B,) probability of the true class."""
        return self.rows[np.arange(len(self.labels)), self.labels].astype(np.float64)

    @property
    def by_class(self) -> list[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
        """For each field of `Counts` the frames that count, and their classes."""
        answered = self.guesses >= 0
        return [(self.guesses == self.labels, self.labels), (answered, self.guesses), (answered, self.labels)]


@dataclass(frozen=True, eq=False)
class Counts:
    """Numbers of frames by class, or shares of the frames, (..., C) each; frames without an answer are left out."""

    hits: NDArray[Any]  #: predicted rightly
    predicted: NDArray[Any]
    true: NDArray[Any]


@dataclass(frozen=True)
class Metric:
    """One entry of `METRICS`."""

    function: Callable[[Any], Any]  #: from `Answers` to (B,) numbers, whose mean is judged; or from `Counts` to (...)
    of: type[Answers] | type[Counts]
    title: str  #: in tables and sentences
    unit: str  #: "%" for fractions, "nats", or "" where there is none
    higher: bool  #: whether more is better; a gain is positive where something is better, either way

    @property
    def name(self) -> str:
        """Its name in tables, in JSON and on command lines."""
        return self.function.__name__

    @property
    def amount(self) -> str:
        """What a gain is counted in, for sentences: "points of accuracy"."""
        return f"{'points' if self.unit == '%' else self.unit or 'units'} of {self.title}"

    def words(self, value: float) -> str:
        """A value for sentences: "log-loss 0.44120 nats"."""
        return f"{self.title} {value:.5f}{self.nats}"

    @property
    def nats(self) -> str:
        """What follows a number of this metric in a sentence: " nats", or nothing."""
        return " nats" if self.unit == "nats" else ""

    def over(self, blocks: Iterable[Answers]) -> float:
        """Its value over all frames of some blocks; NaN without frames."""
        if self.of is Answers:
            numbers = [np.asarray(self.function(block), dtype=np.float64) for block in blocks]
            return float(np.concatenate(numbers).mean()) if sum(map(len, numbers)) else math.nan
        classes = [
            [np.bincount(each[chosen], minlength=block.rows.shape[1]) for chosen, each in block.by_class]
            for block in blocks
        ]
        return float(self.function(Counts(*np.sum(classes, axis=0))))

    def goods(self, values: Floats) -> Floats:
        """Values of this metric with such a sign that more is better."""
        return values if self.higher else -values


METRICS: dict[str, Metric] = {}


def metric(
    of: type[Answers] | type[Counts], *, title: str = "", unit: str = "", higher: bool = True
) -> Callable[[_F], _F]:
    """A decorator that enters a function into `METRICS` under its own name; the arguments are the fields of `Metric`.

    A `ValueError` where a function of another module has that name.
    """

    def enter(function: _F) -> _F:
        own = Metric(function, of, title or function.__name__.replace("_", " "), unit, higher)
        known = METRICS.get(own.name, own).function
        if known.__module__ != function.__module__:
            msg = f"expected a new name for a metric, got {own.name!r}, which {known.__module__} has already"
            raise ValueError(msg)
        METRICS[own.name] = own
        return function

    return enter


def get_metric(name: str) -> Metric:
    """The entry of that name; a `ValueError` that names the others where there is none."""
    if name not in METRICS:
        raise ValueError(no_such("metric", name, METRICS))
    return METRICS[name]


def score(probabilities: Any, labels: Any, metric: str = "accuracy") -> float:
    """The value of a metric for given answers; NaN without frames.

    Args:
        probabilities: (N, C) rows that sum to one: an array, a tensor, a table.
        labels: (N,) class indices, or names of the table's columns.
        metric: a name in `METRICS`.

    Raises:
        ValueError: rows that are not distributions, labels that are not among the classes, or an unknown metric.

    Example:
        >>> score([[0.9, 0.1], [0.4, 0.6]], [0, 0], "brier")
        0.37
    """
    own, (rows, truth) = get_metric(metric), rows_and_labels(probabilities, labels)
    return own.over([Answers(rows.numpy(), truth.numpy(), rows.numpy().argmax(axis=1))])


@metric(Answers, unit="%")
def accuracy(answers: Answers) -> NDArray[np.bool_]:
    """The fraction of the frames whose top class is the true one; a member that abstains is wrong."""
    right: NDArray[np.bool_] = answers.guesses == answers.labels
    return right


@metric(Answers, title="log-loss", unit="nats", higher=False)
def log_loss(answers: Answers) -> Floats:
    """Minus the logarithm of the true class's probability, of which less than 2^-52 counts as 2^-52."""
    nats: Floats = -np.log(np.maximum(answers.true_class, LEAST))
    return nats


@metric(Answers, title="Brier score", higher=False)
def brier(answers: Answers) -> Floats:
    """The squared distance from the one-hot truth, summed over classes: 0 to 2 (Brier, 1950)."""
    squares = np.einsum("bc,bc->b", answers.rows, answers.rows)
    distances: Floats = squares - 2 * answers.true_class + 1
    return distances


@metric(Counts, title="macro F1", unit="%")
def macro_f1(counts: Counts) -> Floats:
    """The mean of the classes' F1, over the classes that occur as a label or as a prediction; NaN where none does.

    This is the mean of harmonic means; see Opitz and Burst, "Macro F1 and macro F1", arXiv:1911.03347, 2019.
    """
    occurrences = counts.predicted + counts.true
    with np.errstate(invalid="ignore"):
        f1 = 2 * counts.hits / np.where(occurrences == 0, 1, occurrences)
        mean: Floats = f1.sum(axis=-1) / (occurrences > 0).sum(axis=-1)
    return mean
