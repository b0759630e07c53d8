"""Recipes as data, and schedules against torch's own."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import optim

from zoo import Recipe
from zoo.training.optimisers import OPTIMISERS
from zoo.training.schedules import SCHEDULES, Position, schedule_factor


@given(
    st.builds(
        Recipe,
        epochs=st.integers(1, 99),
        learning_rate=st.floats(0, 10),
        schedule=st.sampled_from(sorted(SCHEDULES)),
        optimiser=st.sampled_from(sorted(OPTIMISERS)),
        milestones=st.sets(st.integers(1, 50), max_size=4).map(sorted).map(tuple),
        order_seed=st.none() | st.integers(0, 9),
    )
)
def test_a_recipe_survives_its_dictionary(recipe: Recipe) -> None:
    """There and back is the same recipe."""
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_a_recipe_survives_its_file(ending: str, tmp_path: Path) -> None:
    """TOML and JSON hold every field, None by leaving it out."""
    recipe = Recipe(optimiser="sam", milestones=(2, 5), epsilon=1e-9, ema=0.99, schedule="multi_step")
    recipe.write(tmp_path / f"recipe.{ending}")
    assert Recipe.read(tmp_path / f"recipe.{ending}") == recipe


def test_a_file_may_hold_single_fields(tmp_path: Path) -> None:
    """The rest takes the defaults; whole numbers stand for floats."""
    (tmp_path / "r.toml").write_text("epochs = 3\nlearning_rate = 1\n")
    assert Recipe.read(tmp_path / "r.toml") == Recipe(epochs=3, learning_rate=1.0)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("optimiser", "adm", "did you mean 'adam'"),
        ("schedule", "cosin", "did you mean 'cosine'"),
        ("precision", "float8", "unknown precision 'float8'"),
        ("monitor", "valid/acc", "did you mean 'valid/accuracy'"),
        ("epochs", 0, "expected epochs from 1"),
        ("label_smoothing", 1.5, "expected label_smoothing from 0 to 1, got 1.5"),
        ("fraction", 0.0, "fraction above 0"),
        ("milestones", (3, 2), "rising milestones"),
    ],
)
def test_a_wrong_value_is_refused_with_the_way_out(field: str, value: object, words: str) -> None:
    """The message names the field, its bounds or the nearest name."""
    with pytest.raises(ValueError, match=words):
        Recipe.from_dict({field: value})


@pytest.mark.parametrize(("field", "value"), [("epochs", 2.0), ("epochs", True), ("ema", "0.9"), ("l2", math.nan)])
def test_a_wrong_type_is_refused(field: str, value: object) -> None:
    """No silent conversion; NaN is no number."""
    with pytest.raises(TypeError, match=f"expected {field} of the type of its default"):
        Recipe.from_dict({field: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ema": 0.9, "swa_from": 2}, "one average of weights"),
        ({"optimiser": "adam_sgd", "weight_decay": 0.1}, "use l2"),
        ({"optimiser": "sam", "precision": "float16"}, "use bfloat16 or float32"),
        ({"optimizer": "sgd"}, "did you mean 'optimiser'"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], words: str) -> None:
    """Fields that exclude each other, and unknown ones, are named."""
    with pytest.raises(ValueError, match=words):
        Recipe.from_dict(fields)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    """The message begins with the file."""
    (tmp_path / "r.toml").write_text("epochs = [")
    with pytest.raises(ValueError, match=r"r\.toml: "):
        Recipe.read(tmp_path / "r.toml")
    (tmp_path / "r.yaml").write_text("epochs: 1")
    with pytest.raises(ValueError, match=r"ending in \.json or \.toml"):
        Recipe.read(tmp_path / "r.yaml")


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
