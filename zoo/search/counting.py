"""Counting trainable parameters by arithmetic, thousands of specs in the time of one built model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from zoo.models.spec import Spec, count_parameters

BUILT_IN = ("basic", "bottleneck", "cylinder", "diamond", "inverted_pyramid", "mlp", "pyramid")


def fast_count(spec: Spec) -> int:
    """Trainable parameters: of a built-in architecture by arithmetic, of any other as `count_parameters` says."""
    if spec.architecture not in BUILT_IN:
        return count_parameters(spec)
    options = spec.options
    width, depth, narrow = (int(options.get(key, 0)) for key in ("width", "depth", "narrow"))
    norm = bool(options["batchnorm"])
    match spec.architecture:
        case "mlp":
            chain: list[int] = list(options["widths"])
        case "cylinder":
            chain = [width] * depth
        case "pyramid":
            chain = _steps(width, narrow, depth)
        case "inverted_pyramid":
            chain = _steps(narrow, width, depth)
        case "diamond":
            rising = _steps(narrow, width, (depth + 1) // 2)
            chain = rising + rising[::-1][depth % 2 :]
        case "basic":
            chain = [width] * (1 + 2 * depth)
        case _:  # bottleneck
            first = _chain([width, width, width, 4 * width], norm) + _chain([width, 4 * width], norm)
            later = (depth - 1) * _chain([4 * width, width, width, 4 * width], norm)
            ends = _chain([spec.inputs, width], norm) + (4 * width + 1) * spec.classes
            return first + later + ends
    return _chain([spec.inputs, *chain], norm) + (chain[-1] + 1) * spec.classes


def _chain(sizes: Sequence[int], norm: bool) -> int:
    """Weights of dense layers one after another, with two numbers a unit for a norm or one for a bias."""
    per_unit = 2 if norm else 1
    return sum((before + per_unit) * after for before, after in pairwise(sizes))


def _steps(first: int, last: int, depth: int) -> list[int]:
    if depth == 1:
        return [max(first, last)]
    return [round(first + (last - first) * i / (depth - 1)) for i in range(depth)]
