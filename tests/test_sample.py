"""Iterators of specs and the lecture's draw of widths."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
from torch import nn

import zoo
from zoo import Spec, count_parameters, grid, random_budget, random_grid
from zoo.models import architectures
from zoo.search import draw_many, random_members
from zoo.search.sample import searched, widest_spec


@pytest.mark.parametrize("architecture", searched())
def test_every_drawn_model_respects_its_budget(architecture: str) -> None:
    """As built, biases and norms included; and the draw is that of its seed."""
    draw = {"architectures": architecture, "features": 5, "classes": 10, "contexts": (0, 4)}
    for budget in (4_000, 100_000):
        specs = list(islice(random_budget(budget, seed=3, **draw), 12))
        assert all(count_parameters(spec) <= budget for spec in specs)
        assert specs == list(islice(random_budget(budget, seed=3, **draw), 12))
        assert specs != list(islice(random_budget(budget, seed=4, **draw), 12))


def test_all_architectures_and_contexts_come_up() -> None:
    """Uniformly, so sixty draws meet each; fixed options are kept."""
    specs = list(islice(random_budget(100_000, contexts=(2, 5), options={"activation": "gelu"}), 80))
    assert {spec.architecture for spec in specs} == set(searched())
    assert {spec.context for spec in specs} == {2, 5}
    assert {spec.options["activation"] for spec in specs} == {"gelu"}


def test_an_architecture_without_a_declared_count_is_drawn_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its models are counted as built; it needs a size to draw, and is not among those drawn by default."""
    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(architectures.ARCHITECTURES))

    @zoo.architecture
    def gated(inputs: int, classes: int, *, width: int = 6) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 2 * width), nn.GLU(), nn.Linear(width, classes))

    @zoo.architecture
    def fixed(inputs: int, classes: int) -> nn.Module:
        return nn.Linear(inputs, classes)

    specs = list(islice(random_budget(1_000_000, architectures="gated"), 5))
    assert len({spec.options["width"] for spec in specs}) == 5
    assert all(count_parameters(spec) <= 1_000_000 for spec in specs)
    assert not {"gated", "fixed"} & set(searched())
    with pytest.raises(ValueError, match="cannot draw sizes for 'fixed'"):
        next(random_budget(architectures="fixed"))


def test_a_shape_that_makes_more_of_its_widths_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths are drawn as for an mlp; they are halved until the model fits."""
    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(architectures.ARCHITECTURES))

    @zoo.shape
    def mirrored(*, widths: Sequence[int] = (8, 4)) -> list[int]:
        return [*widths, *widths[::-1]]

    specs = list(islice(random_budget(200_000, architectures="mirrored", contexts=(1,), seed=1), 20))
    assert all(count_parameters(spec) <= 200_000 for spec in specs)
    assert max(len(spec.options["widths"]) for spec in specs) > 1


def test_a_shape_whose_width_is_capped_has_a_widest_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search ends although no width exceeds the budget."""
    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(architectures.ARCHITECTURES))

    @zoo.shape
    def capped(*, width: int = 8) -> list[int]:
        return [min(width, 16)]

    spec = widest_spec("capped", 100_000, features=5, classes=4, context=1, depth=1)
    assert count_parameters(spec) == (15 + 2) * 16 + (16 + 1) * 4


def test_a_budget_without_room_is_refused() -> None:
    """The message has the sizes."""
    with pytest.raises(ValueError, match=r"fits into 100 parameters with 1,107 inputs"):
        next(random_budget(100))
    with pytest.raises(ValueError, match="no name matches 'cylindr'"):
        next(random_budget(architectures="cylindr"))


def test_an_ensemble_stays_within_its_budget() -> None:
    """All members together."""
    specs = random_members(2_000_000, 5, seed=1, contexts=(5,))
    assert len(specs) == 5
    assert sum(map(count_parameters, specs)) <= 2_000_000


def test_the_grid_has_every_combination_once() -> None:
    """In the order given; an option that an architecture lacks is left out there."""
    specs = list(grid(["cylinder", "pyramid"], contexts=[1, 2], options={"depth": [1, 2], "narrow": [4, 8]}))
    assert len(specs) == len(set(specs)) == 2 * 2 + 2 * 2 * 2
    assert [spec.architecture for spec in specs] == ["cylinder"] * 4 + ["pyramid"] * 8


def test_the_random_grid_draws_width_and_context_as_the_lecture() -> None:
    """Widths below 8000 and contexts below 64, uniformly; on a grid each pair of points for each architecture."""
    specs = list(islice(random_grid("cylinder", seed=1), 400))
    widths, contexts = (np.array([f(s) for s in specs]) for f in (lambda s: s.options["width"], lambda s: s.context))
    assert 0 < widths.min() < 100
    assert 7900 < widths.max() < 8000
    assert (contexts.min(), contexts.max()) == (0, 63)
    assert abs(widths.mean() / 4000 - 1) < 0.1
    cells = [(spec.options["width"], spec.context) for spec in random_grid("cylinder", points=2)]
    assert cells == [(2000, 16), (2000, 48), (6000, 16), (6000, 48)]


def by_hand(rng: np.random.Generator, inputs: int, classes: int, budget: int) -> tuple[list[int], int]:
    """The lecture's loop, word by word: no biases, no norms."""
    unused, size, widths = budget, inputs, []
    while (widest := unused // (size + classes)) > classes:
        width = int(rng.integers(classes, widest))
        unused -= size * width
        widths.append(width)
        size = width
    return widths, budget - unused + size * classes


def test_many_draws_are_distributed_as_single_ones() -> None:
    """Against the lecture's loop: mean depth, first width and parameters agree within five standard errors."""
    many = draw_many(20_000, 1_000_000, per_unit=0, seed=1)
    rng = np.random.default_rng(0)
    singles = [by_hand(rng, 250, 40, 1_000_000) for _ in range(4000)]
    for ours, theirs in (
        (many.depths, [len(widths) for widths, _ in singles]),
        (many.widths[:, 0], [widths[0] for widths, _ in singles]),
        (many.parameters, [count for _, count in singles]),
    ):
        error = np.std(theirs) / np.sqrt(len(theirs)) * 5
        assert abs(np.mean(ours) - np.mean(theirs)) < error
    assert many.parameters.max() <= 1_000_000


def test_the_counts_of_many_draws_are_the_built_models() -> None:
    """With norms, as `mlp` has them."""
    samples = draw_many(20, 50_000, inputs=15, classes=10, seed=2)
    for widths, depth, parameters in zip(samples.widths, samples.depths, samples.parameters, strict=True):
        spec = Spec("mlp", 15, 0, 10, options={"widths": tuple(int(w) for w in widths[:depth])})
        assert count_parameters(spec) == parameters <= 50_000
        assert (widths[depth:] == 0).all()


def test_a_draw_leaves_no_room_for_another_layer() -> None:
    """What is left does not pay for a layer wider than the classes; a generator is drawn from as it stands."""
    rng = np.random.default_rng(0)
    first, second = draw_many(1, 1_000_000, seed=rng), draw_many(1, 1_000_000, seed=rng)
    assert first.widths.tolist() != second.widths.tolist()
    spec = Spec("mlp", 250, 0, 40, options={"widths": tuple(first.widths[0, : first.depths[0]].tolist())})
    last = spec.options["widths"][-1]
    unused = 1_000_000 - count_parameters(spec) + 40 * last
    assert unused // (last + 2 + 40) <= 40


def test_the_widest_spec_is_the_widest() -> None:
    """One unit more would not fit; a depth that cannot be paid for is lowered."""
    spec = widest_spec("cylinder", 100_000, features=5, classes=10, context=4, depth=3)
    wider = Spec("cylinder", 5, 4, 10, options={**spec.options, "width": spec.options["width"] + 1})
    assert count_parameters(spec) <= 100_000 < count_parameters(wider)
    assert widest_spec("cylinder", 70, features=5, classes=10, context=4, depth=6).options["depth"] == 1
