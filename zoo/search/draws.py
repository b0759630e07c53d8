"""Layer widths at random under a budget, as the lecture draws them: one by one, or a million at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LECTURE_INPUTS = 250
LECTURE_BUDGET = 10_000_000


def draw_widths(
    rng: np.random.Generator,
    budget: int = LECTURE_BUDGET,
    *,
    inputs: int = LECTURE_INPUTS,
    classes: int = 40,
    batchnorm: bool = True,
) -> list[int]:
    """Widths of hidden layers, drawn one after another until the budget has no room for a further one.

    From the size that a layer gets, the widest it may be is what is left over (size + classes); it is drawn
    uniformly from [classes, widest). Biases and norms are counted.
    """
    widths: list[int] = []
    size = inputs
    per_unit, unused = 2 if batchnorm else 1, budget - classes  # the last layer's biases
    while True:
        widest = unused // (size + per_unit + classes)
        if widest <= classes:
            return widths
        width = int(rng.integers(classes, widest))
        unused -= (size + per_unit) * width
        widths.append(width)
        size = width


@dataclass(frozen=True, eq=False)
class Samples:
    """Many draws at once.

    Args:
        widths: (n, D) int64, hidden widths, 0 behind the last layer.
        depths: (n,) int64, hidden layers.
        parameters: (n,) int64, of the whole model, biases and norms included where they were counted.
    """

    widths: Array
    depths: Array
    parameters: Array


def draw_many(
    count: int,
    budget: int = LECTURE_BUDGET,
    *,
    inputs: int = LECTURE_INPUTS,
    classes: int = 40,
    per_unit: int = 2,
    seed: int = 0,
) -> Samples:
    """`count` draws as `draw_widths` makes them, all layer by layer together.

    Args:
        count: n.
        budget: parameters of each model.
        inputs: size of the input.
        classes: C, also the least width.
        per_unit: numbers beside the weights that each hidden unit has: 2 with norms, 1 with biases, and 0
            counts as the lecture does, without biases anywhere.
        seed: of the draw.

    Example:
        >>> samples = draw_many(1000, 100_000)
        >>> bool((samples.parameters <= 100_000).all())
        True
    """
    rng = np.random.default_rng(seed)
    bias = classes if per_unit else 0
    size, unused = np.full(count, inputs), np.full(count, budget - bias)
    going, columns = np.arange(count), []
    while len(going):
        widest = unused[going] // (size[going] + per_unit + classes)
        going, widest = going[widest > classes], widest[widest > classes]
        widths = rng.integers(classes, widest)
        unused[going] -= (size[going] + per_unit) * widths
        size[going] = widths
        column = np.zeros(count, dtype=np.int64)
        column[going] = widths
        columns.append(column)
    table = np.stack(columns[:-1] or columns, axis=1)
    return Samples(table, (table > 0).sum(axis=1), budget - unused + size * classes)
