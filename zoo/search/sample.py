"""Which models to train: seeded iterators of `Spec`, over a grid, at random, or under a parameter budget.

Every spec respects its budget as a built model does: biases and norms are counted. The lecture's draw of layer
widths makes a million samples in seconds, for pictures of what a budget allows.

The functions share some arguments: `architectures` are names or shell wildcards, None for all that `searched` lists;
`features` are F, `classes` C, and `contexts` the frames on each side to choose from; `options` are fixed options, such
as {"activation": "gelu"}, and those that an architecture lacks are left out there; `seed` is that of the draw.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from typing import Any

import numpy as np

from zoo._names import Patterns, checked
from zoo.models.architectures import find_architecture, list_architectures
from zoo.models.spec import Spec
from zoo.models.spec import fast_count as fast_count

Array = np.ndarray[Any, Any]
LECTURE_INPUTS = 250
LECTURE_BUDGET = 10_000_000
_MOST_WIDTH, _MOST_CONTEXT = 8000, 64  # of the lecture's random grid
_MOST_DEPTH = 6


def searched(*sizes: str) -> list[str]:
    """Sorted names of the architectures that searches draw by default.

    These declare a count of their parameters, and have an option among `sizes`, by default `width` or `widths`.
    """
    wanted = set(sizes or ("width", "widths"))
    entries = {name: find_architecture(name) for name in list_architectures()}
    return [name for name, entry in entries.items() if entry.count is not None and wanted & entry.options.keys()]


def grid(
    architectures: Patterns = "*",
    *,
    features: int = 27,
    classes: int = 40,
    contexts: Sequence[int] = (10, 20, 30),
    options: Mapping[str, Sequence[Any]] | None = None,
) -> Iterator[Spec]:
    """Every combination, in a fixed order: by architecture, then by context, then by the options as given.

    Here `options` are the values to try for each option; for the other arguments see `zoo.search.sample`.

    Example:
        >>> specs = list(grid("cyl*", contexts=[5], options={"width": [64, 128], "narrow": [8, 16]}))
        >>> [spec.options["width"] for spec in specs]
        [64, 128]
    """
    for name in list_architectures(architectures):
        known = find_architecture(name).options
        tried = {key: values for key, values in (options or {}).items() if key in known}
        for context in contexts:
            for values in product(*tried.values()):
                yield Spec(name, features, context, classes, options=dict(zip(tried, values, strict=True)))


def random_grid(
    architectures: Patterns | None = None,
    *,
    seed: int = 0,
    features: int = 27,
    classes: int = 40,
    points: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Spec]:
    """Specs with hidden width `int(x1 * 8000)` and context `int(x2 * 64)`, over the architectures in turn.

    With 0 `points`, x1 and x2 are drawn uniformly from (0, 1), without end; otherwise each runs over that many steps
    of (0, 1) for every architecture. One with an option `widths` instead of `width` (mlp) gets one hidden layer. No
    architecture of that name raises ValueError; for the other arguments see `zoo.search.sample`.
    """
    names = _named(architectures)
    rng, steps = np.random.default_rng(seed), ((np.arange(points) + 0.5) / max(points, 1)).tolist()
    endless = ((name, *rng.uniform(np.nextafter(0, 1), 1, size=2).tolist()) for name in cycle(names))
    for name, x1, x2 in product(names, steps, steps) if points else endless:
        width, known = max(int(x1 * _MOST_WIDTH), 1), find_architecture(name).options
        sizes = {"width": width, "widths": (width,), "narrow": min(known.get("narrow", width), width)}
        yield _sized(name, features, int(x2 * _MOST_CONTEXT), classes, options, **sizes)


def random_budget(
    max_parameters: int = LECTURE_BUDGET,
    *,
    seed: int = 0,
    features: int = 27,
    classes: int = 40,
    contexts: Sequence[int] = (20,),
    architectures: Patterns | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Spec]:
    """Random specs whose built models have at most `max_parameters` trainable parameters; without end.

    Architectures and contexts are drawn uniformly. `mlp` draws layer after layer, as `draw_many` does. The others draw
    a depth from 1 to 6 and a width uniformly up to the widest that the budget allows (and `narrow` up to that width);
    one of your own needs an option `width` or `widths`. For the arguments see `zoo.search.sample`. A budget in which no
    model of a drawn architecture fits raises ValueError.

    Example:
        >>> from zoo.models.spec import count_parameters
        >>> specs = random_budget(100_000, seed=1, contexts=[5])
        >>> all(count_parameters(next(specs)) <= 100_000 for _ in range(5))
        True
    """
    rng, names = np.random.default_rng(seed), _named(architectures)
    while True:
        name, context = names[int(rng.integers(len(names)))], contexts[int(rng.integers(len(contexts)))]
        sized, known = partial(_sized, name, features, context, classes, options), find_architecture(name).options
        if "widths" in known:
            yield _layer_by_layer(sized, rng, max_parameters)
        elif "width" in known:
            most, depth = _widest(sized, int(rng.integers(1, _MOST_DEPTH + 1)), max_parameters)
            width = int(rng.integers(1, most + 1))
            yield sized(depth=depth, width=width, narrow=int(rng.integers(1, width + 1)))
        else:
            msg = f"cannot draw sizes for {name!r}: it has no option 'width' or 'widths'"
            raise ValueError(msg)


@checked
def random_members(budget: int, members: int, *, seed: int = 0, **settings: Any) -> list[Spec]:
    """Specs for an ensemble whose members together have at most `budget` parameters.

    Each member is drawn by `random_budget` with these `settings` under an equal share of what is left, so what one
    leaves the next may use. A share in which no model fits raises ValueError.
    """
    specs: list[Spec] = []
    for index in range(members):
        share = (budget - sum(map(fast_count, specs))) // (members - index)
        specs.append(next(random_budget(share, seed=seed + index, **settings)))
    return specs


@checked
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

    `narrow`, where there is one, is half the width. A depth that the budget cannot pay for is lowered to 1; a budget
    in which not even one layer of one unit fits raises ValueError.
    """
    sized = partial(_sized, architecture, features, context, classes, options)
    most, layers = _widest(sized, depth, budget, narrowing=2)
    width = max(int(share * most), 1)
    return sized(depth=layers, width=width, narrow=max(width // 2, 1))


@dataclass(frozen=True, eq=False)
class Samples:
    """Many draws at once: (n, D) widths of hidden layers, 0 after the last, and (n,) depths and parameters, int64.

    The parameters are those of the whole model, with biases and norms where the draw counted them.
    """

    widths: Array
    depths: Array
    parameters: Array


@checked
def draw_many(
    count: int,
    budget: int = LECTURE_BUDGET,
    *,
    inputs: int = LECTURE_INPUTS,
    classes: int = 40,
    per_unit: int = 2,
    seed: int | np.random.Generator = 0,
) -> Samples:
    """The hidden widths of `count` models, drawn one layer after another until the budget has no room for another.

    A layer behind one of `size` units can be as wide as what is left divided by (size + classes); its width is
    drawn uniformly from [classes, widest). All models are drawn together, one layer at a time.

    Args:
        count: number of models.
        budget: the most parameters that a model may have.
        inputs: size of the input.
        classes: C, also the least width.
        per_unit: numbers of a hidden unit besides its weights: 2 with norms, 1 with biases, 0 as in the lecture.
        seed: seed of the draw, or the generator to draw from.

    Example:
        >>> samples = draw_many(1000, 100_000)
        >>> bool((samples.parameters <= 100_000).all())
        True
    """
    rng = np.random.default_rng(seed)
    bias = classes if per_unit else 0  # of the last layer
    size, unused = np.full(count, inputs), np.full(count, budget - bias)
    going, columns = np.arange(count), []
    while len(going):
        widest = unused[going] // (size[going] + per_unit + classes)
        going, widest = going[widest > classes], widest[widest > classes]
        widths = rng.integers(classes, widest)
        unused[going] -= (size[going] + per_unit) * widths
        size[going] = widths
        columns.append(np.zeros(count, dtype=np.int64))
        columns[-1][going] = widths
    table = np.stack(columns[:-1] or columns, axis=1)
    return Samples(table, (table > 0).sum(axis=1), budget - unused + size * classes)


def _sized(
    architecture: str, features: int, context: int, classes: int, options: Mapping[str, Any] | None, **sizes: Any
) -> Spec:
    """The spec with those of the fixed options and sizes that the architecture has; sizes win."""
    known, chosen = find_architecture(architecture).options, {**(options or {}), **sizes}
    fitting = {key: value for key, value in chosen.items() if key in known}
    return Spec(architecture, features, context, classes, options=fitting)


def _named(architectures: Patterns | None) -> list[str]:
    names = searched() if architectures is None else list_architectures(architectures)
    if not names:
        msg = f"expected architectures, but no name matches {architectures!r}"
        raise ValueError(msg)
    return names


def _layer_by_layer(sized: Callable[..., Spec], rng: np.random.Generator, budget: int) -> Spec:
    """As `draw_many` draws; an architecture that makes more of its widths than an mlp has them halved until it fits."""
    default, widths = sized(), list[int]()
    size, classes, per_unit = default.inputs, default.classes, 2 if default.options.get("batchnorm", True) else 1
    unused = budget - classes
    while (widest := unused // (size + per_unit + classes)) > classes:
        widths.append(int(rng.integers(classes, widest)))
        unused -= (size + per_unit) * widths[-1]
        size = widths[-1]
    while widths:
        spec = sized(widths=tuple(widths))
        if fast_count(spec) <= budget:
            return spec
        widths = [width // 2 for width in widths if width > 1]
    raise _too_small(default, budget)


def _widest(sized: Callable[..., Spec], depth: int, budget: int, *, narrowing: int = 1) -> tuple[int, int]:
    """The greatest width within the budget, and its depth: the wanted one, or 1 where not even one unit fits.

    Widths grow from below, since a built model of an absurd width is refused. A unit has at least one parameter,
    so no width beyond the budget is tried. `narrow` is the width divided by `narrowing`.
    """

    def count(layers: int, width: int) -> int:
        return fast_count(sized(depth=layers, width=width, narrow=max(width // narrowing, 1)))

    for layers in (depth, 1):
        low, high = 0, 1
        while high <= budget and count(layers, high) <= budget:
            low, high = high, 2 * high
        if low:
            return low + bisect_right(range(low + 1, high), budget, key=partial(count, layers)), layers
    raise _too_small(sized(), budget)


def _too_small(spec: Spec, budget: int) -> ValueError:
    return ValueError(
        f"no {spec.architecture!r} fits into {budget:,} parameters with {spec.inputs:,} inputs; "
        "raise the budget or lower the context"
    )
