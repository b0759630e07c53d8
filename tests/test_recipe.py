"""Recipes as data."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo import Recipe
from zoo.training.loop import schedule_factor
from zoo.training.optimisers import OPTIMISERS
from zoo.training.recipe import _CHOSEN, acting, keywords
from zoo.training.schedules import SCHEDULES, Position

RECORDED = st.builds(  # any fields, as older versions recorded them
    dict,
    epochs=st.integers(1, 99),
    learning_rate=st.floats(0, 10),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    optimiser=st.sampled_from(sorted(OPTIMISERS)),
    milestones=st.sets(st.integers(1, 50), max_size=4).map(sorted),
    every=st.integers(1, 50),
    momentum=st.sampled_from([0.5, 0.9]),
    swa_from=st.integers(0, 50),
    restart_factor=st.integers(1, 2),
    order_seed=st.none() | st.integers(0, 9),
)


@given(RECORDED)
def test_a_recipe_survives_its_dictionary(fields: dict[str, Any]) -> None:
    """There and back is the same recipe; one that was recorded becomes one without what can never act."""
    recipe = Recipe.from_dict(acting(fields))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert acting(recipe.to_dict()) == recipe.to_dict()


@given(RECORDED)
def test_what_can_never_act_changes_no_learning_rate(fields: dict[str, Any]) -> None:
    """The factors of the whole run with the fields as recorded are those without what is left out of them."""
    recipe = Recipe.from_dict(acting(fields))
    recorded = dict(fields, milestones=tuple(fields["milestones"]))
    schedule = SCHEDULES[recorded["schedule"]]
    then = {name: recorded.get(name, getattr(Recipe(), name)) for name in keywords(schedule.function)}
    for step in range(0 if schedule.reactive else 2 * recipe.epochs):
        at = Position(step, 2, recipe.epochs)
        assert schedule.function(at, **then) == schedule_factor(at, recipe)


@given(RECORDED)
def test_a_recipe_is_accepted_or_names_what_can_never_act(fields: dict[str, Any]) -> None:
    """A field that is refused is one that `acting` leaves out."""
    if changed := [name for name, value in fields.items() if acting(fields)[name] != value]:
        with pytest.raises(ValueError, match="|".join(changed)):
            Recipe.from_dict(fields)
    else:
        Recipe.from_dict(fields)


def test_the_fields_of_the_tables_are_those_that_only_they_read() -> None:
    """Every field that one of the optimisers or schedules takes, but those that each run reads."""
    for what, functions in {
        "optimiser": [one.make for one in OPTIMISERS.values()],
        "schedule": [one.function for one in SCHEDULES.values()],
    }.items():
        taken = {name for function in functions for name in keywords(function)}
        assert taken - {"learning_rate", "members"} == {*_CHOSEN[what]} - {"rho"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"momentum": 0.5}, r"adamw takes no momentum, got 0\.5; leave it out"),
        ({"optimiser": "sgd", "beta1": 0.5}, "sgd takes no beta1"),
        ({"rho": 0.1}, "adamw takes no rho"),
        ({"milestones": (1,)}, r"constant takes no milestones, got \(1,\)"),
        ({"schedule": "linear", "gamma": 0.5}, "linear takes no gamma"),
        ({"schedule": "cosine", "restart_factor": 2}, "restart_factor=2 needs restart"),
        ({"epochs": 2, "swa_from": 3}, "swa_from=3 would act in epoch 3, but training ends with epoch 2"),
        ({"epochs": 3, "schedule": "multi_step", "milestones": (1, 3)}, "would act in epoch 4"),
        ({"epochs": 3, "schedule": "step", "every": 4}, "every=4 would act in epoch 5"),
        ({"epochs": 3, "schedule": "plateau", "every": 4}, "every=4 would act in epoch 5"),
        ({"epochs": 3, "optimiser": "adam_sgd", "switch_epoch": 3}, "switch_epoch=3 would act in epoch 4"),
        ({"epochs": 3, "warmup": 3.5}, r"warmup to end within the 3 epochs of training, got 3\.5"),
        ({"epochs": 3, "schedule": "cosine", "restart": 4}, "restart to end within the 3 epochs"),
    ],
)
def test_what_can_never_act_is_refused(fields: dict[str, Any], words: str) -> None:
    """By the optimiser's and the schedule's own fields, and by the number of epochs."""
    with pytest.raises(ValueError, match=words):
        Recipe.from_dict(fields)


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_a_recipe_survives_its_file(ending: str, tmp_path: Path) -> None:
    """TOML and JSON hold every field, None by leaving it out."""
    recipe = Recipe(optimiser="adam", milestones=(2, 5), epsilon=1e-9, ema=0.99, schedule="multi_step")
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


def test_the_help_names_every_choice() -> None:
    """The description of a field is the help of its flag, where nobody can look up a table."""
    makers = {"optimiser": [one.make for one in OPTIMISERS.values()]}
    makers["schedule"] = [one.function for one in SCHEDULES.values()]
    for field, entries in makers.items():
        named = re.search(rf"^ +{field}: (.+), or one of your own", Recipe.__doc__ or "", flags=re.MULTILINE)
        assert named is not None
        assert named[1].split(", ") == [one.__name__ for one in entries if one.__module__.startswith("zoo.")]


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
