"""Which models to breed: seeded iterators of `Spec`, over a grid, at random, or under a parameter budget.

Every spec respects its budget as a built model does: biases and norms are counted. The same sampler in
vectorised form draws a million samples in seconds, for pictures of what a budget allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np

from zoo.architectures import list_architectures
from zoo.names import Patterns
from zoo.spec import Spec, count_parameters

Array = np.ndarray[Any, Any]
BUILT_IN = ("basic", "bottleneck", "cylinder", "diamond", "inverted_pyramid", "mlp", "pyramid")
LECTURE_INPUTS = 250
LECTURE_BUDGET = 10_000_000
_MOST_WIDTH, _MOST_CONTEXT = 8000, 64  # of the lecture's random grid
_MOST_DEPTH = 6


# ---- iterators of specs


def grid(
    architectures: Patterns = "*",
    *,
    features: int = 27,
    classes: int = 40,
    contexts: Sequence[int] = (10, 20, 30),
    options: Mapping[str, Sequence[Any]] | None = None,
) -> Iterator[Spec]:
    """Every combination, in a fixed order: architecture, then context, then the options as they are given.

    Args:
        architectures: names or shell wildcards.
        features: per frame.
        classes: C.
        contexts: frames on each side.
        options: for each option the values to try; one that an architecture does not have is left out there.

    Example:
        >>> specs = list(grid("cyl*", contexts=[5], options={"width": [64, 128], "narrow": [8, 16]}))
        >>> [spec.options["width"] for spec in specs]
        [64, 128]
    """
    for name in list_architectures(architectures):
        known = _options_of(name)
        tried = {key: values for key, values in (options or {}).items() if key in known}
        for context in contexts:
            for values in product(*tried.values()):
                yield Spec(name, features, context, classes, options=dict(zip(tried, values, strict=True)))


def random_grid(
    architectures: Patterns = BUILT_IN,
    *,
    seed: int = 0,
    features: int = 27,
    classes: int = 40,
    points: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Spec]:
    """Hidden width `int(x1 * 8000)` and context `int(x2 * 64)`, over the architectures in turn.

    Args:
        architectures: names or shell wildcards; those without an option `width` (mlp) get widths of one layer.
        seed: of the draw.
        features: per frame.
        classes: C.
        points: x1 and x2 run over this many steps of (0, 1) each, for every architecture, and the iterator
            ends; 0 draws both uniformly from (0, 1), without end.
        options: fixed options, such as {"activation": "gelu"}; those that an architecture lacks are left out.

    Raises:
        ValueError: no architecture of that name.
    """
    names = _named(architectures)
    if points:
        steps = (np.arange(points) + 0.5) / points
        pairs: Iterator[tuple[str, float, float]] = (
            (name, float(x1), float(x2)) for name in names for x1 in steps for x2 in steps
        )
    else:
        pairs = _uniform_pairs(names, seed)
    for name, x1, x2 in pairs:
        width, context = max(int(x1 * _MOST_WIDTH), 1), int(x2 * _MOST_CONTEXT)
        yield _spec_of_width(name, width, features=features, context=context, classes=classes, options=options)


def random_budget(
    max_parameters: int = LECTURE_BUDGET,
    *,
    seed: int = 0,
    features: int = 27,
    classes: int = 40,
    contexts: Sequence[int] = (20,),
    architectures: Patterns = BUILT_IN,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Spec]:
    """Specs at random whose built models have at most `max_parameters` trainable parameters; without end.

    `mlp` draws layer after layer as `draw_widths` does. The shaped architectures draw a depth from 1 to 6 and a
    width uniformly up to the widest that the budget allows (and `narrow` up to that width).

    Args:
        max_parameters: of each model.
        seed: of the draw.
        features: per frame.
        classes: C.
        contexts: drawn uniformly.
        architectures: names or shell wildcards, drawn uniformly; one of your own needs an option `width`.
        options: fixed options, such as {"activation": "gelu", "dropout": 0.2}.

    Raises:
        ValueError: a budget in which no model of a drawn architecture fits.

    Example:
        >>> from zoo.spec import count_parameters
        >>> specs = random_budget(100_000, seed=1, contexts=[5])
        >>> all(count_parameters(next(specs)) <= 100_000 for _ in range(5))
        True
    """
    rng, names = np.random.default_rng(seed), _named(architectures)
    while True:
        name, context = names[int(rng.integers(len(names)))], contexts[int(rng.integers(len(contexts)))]
        yield _drawn(name, rng, max_parameters, features=features, context=context, classes=classes, options=options)


def _drawn(
    name: str,
    rng: np.random.Generator,
    budget: int,
    *,
    features: int,
    context: int,
    classes: int,
    options: Mapping[str, Any] | None,
) -> Spec:
    fixed = _known(name, options)
    known = _options_of(name)
    free = {key: value for key, value in fixed.items() if key not in ("width", "narrow", "depth", "widths")}

    def spec(**more: Any) -> Spec:
        return Spec(name, features, context, classes, options=free | more)

    if "widths" not in known and "width" not in known:
        msg = f"cannot draw sizes for {name!r}: it has no option 'width' or 'widths'"
        raise ValueError(msg)
    if "widths" in known:
        inputs = (2 * context + 1) * features
        norm = bool(fixed.get("batchnorm", known["batchnorm"]))
        widths = draw_widths(rng, budget, inputs=inputs, classes=classes, batchnorm=norm)
        if not widths:
            _refuse_budget(name, budget, inputs)
        return spec(widths=tuple(widths))
    depth = int(rng.integers(1, _MOST_DEPTH + 1))

    def of_width(width: int, narrow: int) -> Spec:
        sizes = {"depth": depth, "width": width, "narrow": narrow}
        return spec(**{key: size for key, size in sizes.items() if key in known})

    most = _widest(lambda width: fast_count(of_width(width, width)), budget)
    if not most and depth > 1:
        depth = 1
        most = _widest(lambda width: fast_count(of_width(width, width)), budget)
    if not most:
        _refuse_budget(name, budget, (2 * context + 1) * features)
    width = int(rng.integers(1, most + 1))
    return of_width(width, int(rng.integers(1, width + 1)))


def random_members(budget: int, members: int, *, seed: int = 0, **settings: Any) -> list[Spec]:
    """Specs for an ensemble whose members together have at most `budget` parameters.

    Each member is drawn under an equal share of what is left, so what one leaves the next may use.

    Args:
        budget: of all members together.
        members: at least 1.
        seed: of the draw.
        settings: of `random_budget`.

    Raises:
        ValueError: a share in which no model fits.
    """
    specs: list[Spec] = []
    for index in range(members):
        share = (budget - sum(map(fast_count, specs))) // (members - index)
        specs.append(next(random_budget(share, seed=seed + index, **settings)))
    return specs


# ---- counting


def fast_count(spec: Spec) -> int:
    """Trainable parameters: of a built-in architecture by arithmetic, of any other as `count_parameters` says."""
    if spec.architecture not in BUILT_IN:
        return count_parameters(spec)
    options = spec.options
    width, depth, narrow = (int(options.get(key, 0)) for key in ("width", "depth", "narrow"))
    norm = bool(options["batchnorm"])
    match spec.architecture:
        case "mlp":
            chain = list(options["widths"])
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


# ---- the lecture's draw of layer widths


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


# ---- the rest


def _uniform_pairs(names: Sequence[str], seed: int) -> Iterator[tuple[str, float, float]]:
    rng, index = np.random.default_rng(seed), 0
    while True:
        x1, x2 = rng.uniform(np.nextafter(0, 1), 1, size=2)
        yield names[index % len(names)], float(x1), float(x2)
        index += 1


def _spec_of_width(
    name: str, width: int, *, features: int, context: int, classes: int, options: Mapping[str, Any] | None
) -> Spec:
    known = _options_of(name)
    size = {"widths": (width,)} if "widths" in known else {"width": width} if "width" in known else {}
    if "narrow" in known:
        size["narrow"] = min(known["narrow"], width)
    return Spec(name, features, context, classes, options=_known(name, options) | size)


def _named(architectures: Patterns) -> list[str]:
    names = list_architectures(architectures)
    if not names:
        msg = f"expected architectures, but no name matches {architectures!r}"
        raise ValueError(msg)
    return names


def _options_of(name: str) -> dict[str, Any]:
    """All options with their defaults."""
    return dict(Spec(name, 1, 0, 2).options)


def _known(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    known = _options_of(name)
    return {key: value for key, value in (options or {}).items() if key in known}


def _widest(count: Callable[[int], int], budget: int) -> int:
    """The largest width whose rising count is within the budget; 0 if not even 1 is."""
    low, high = 0, 1
    while count(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    return low


def _refuse_budget(name: str, budget: int, inputs: int) -> None:
    msg = f"no {name!r} fits into {budget:,} parameters with {inputs:,} inputs; raise the budget or lower the context"
    raise ValueError(msg)
