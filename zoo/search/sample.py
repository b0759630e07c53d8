"""Which models to breed: seeded iterators of `Spec`, over a grid, at random, or under a parameter budget.

Every spec respects its budget as a built model does: biases and norms are counted. The same sampler in
vectorised form draws a million samples in seconds, for pictures of what a budget allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NoReturn

import numpy as np

from zoo._names import Patterns
from zoo.models.architectures import list_architectures
from zoo.models.spec import Spec
from zoo.search.counting import BUILT_IN, fast_count
from zoo.search.draws import LECTURE_BUDGET, Samples, draw_many, draw_widths

__all__ = [
    "BUILT_IN",
    "Samples",
    "draw_many",
    "draw_widths",
    "fast_count",
    "grid",
    "random_budget",
    "random_grid",
    "random_members",
    "widest_spec",
]

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
        >>> from zoo.models.spec import count_parameters
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


def widest_spec(
    architecture: str,
    budget: int,
    *,
    features: int,
    classes: int,
    context: int,
    depth: int,
    share: float = 1.0,
    options: Mapping[str, Any] | None = None,
) -> Spec:
    """The spec of this depth with `share` of the greatest width whose model stays within the budget.

    `narrow`, where there is one, is half the width. A depth that no width can pay for is lowered to 1.

    Raises:
        ValueError: a budget in which not even one layer of one unit fits.
    """
    fixed, known = _known(architecture, options), _options_of(architecture)

    def of_width(width: int, layers: int) -> Spec:
        sizes = {"depth": layers, "width": width, "narrow": max(width // 2, 1)}
        chosen = fixed | {key: size for key, size in sizes.items() if key in known}
        return Spec(architecture, features, context, classes, options=chosen)

    layers, most = depth, _widest(lambda width: fast_count(of_width(width, depth)), budget)
    if not most:
        layers, most = 1, _widest(lambda width: fast_count(of_width(width, 1)), budget)
    if not most:
        _refuse_budget(architecture, budget, (2 * context + 1) * features)
    return of_width(max(int(share * most), 1), layers)


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


def _refuse_budget(name: str, budget: int, inputs: int) -> NoReturn:
    msg = f"no {name!r} fits into {budget:,} parameters with {inputs:,} inputs; raise the budget or lower the context"
    raise ValueError(msg)
