"""Specs: defaults, JSON, and everything that is refused."""

import pytest
import torch
from torch import nn

import zoo

SPEC = zoo.Spec("cylinder", features=5, context=1, classes=4, options={"width": 8, "depth": 3})


@pytest.mark.parametrize("field", SPEC.to_dict())
@pytest.mark.parametrize("value", [None, ["a"], 1.5, {"a": 1}, 2**70, ""], ids=str)
def test_a_field_of_another_type_is_refused(field: str, value: object) -> None:
    """Or a size beyond all models, as a file may contain it: the message says what was expected."""
    data = {**SPEC.to_dict(), field: value}
    with pytest.raises((TypeError, ValueError), match=r"expected|unknown|cannot build"):
        zoo.count_parameters(zoo.Spec.from_dict(data))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widht": 3}, "did you mean 'width'"),
        ({"activation": "rellu"}, "did you mean 'relu'"),
        ({"initialisation": "xavie"}, "did you mean 'xavier'"),
        ({"depth": 0}, "depth from 1 to 1000, got 0"),
        ({"depth": 10**9}, "depth from 1 to 1000"),
        ({"width": 0}, "at least 1 unit"),
        ({"width": 10**9}, "at most 4,000,000,000 parameters"),
        ({"width": 10**18}, "cannot build 'cylinder'"),
        ({"dropout": 1.5}, "dropout probability"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_allocated(options: dict[str, object], words: str) -> None:
    """The message names what was wrong."""
    with pytest.raises(ValueError, match=words):
        zoo.build(zoo.Spec("cylinder", features=5, context=1, classes=4, options=options))


@pytest.mark.parametrize(
    "options", [{"width": "8"}, {"width": 8.0}, {"width": True}, {"batchnorm": 1}, {"dropout": "0"}]
)
def test_an_option_of_another_type_is_refused(options: dict[str, object]) -> None:
    """No value is converted silently, except that an integer may stand for a float."""
    with pytest.raises(TypeError, match="expected option"):
        zoo.Spec("cylinder", features=5, context=1, classes=4, options=options)
    with pytest.raises(TypeError, match=r"of the type of its default \[512, 512\], got 32"):  # as --option takes it
        zoo.Spec("mlp", features=5, context=1, classes=4, options={"widths": 32})
    assert zoo.Spec("mlp", features=5, context=1, classes=4, options={"dropout": 0}).options["dropout"] == 0.0


def test_unknown_names_in_a_spec_name_the_nearest() -> None:
    """Architecture, normalisation and padding."""
    with pytest.raises(ValueError, match="did you mean 'cylinder'"):
        zoo.Spec("cylindre", features=5, context=1, classes=4)
    with pytest.raises(ValueError, match="did you mean 'mean_std'"):
        zoo.Spec("mlp", features=5, context=1, classes=4, normalisation="meanstd")
    with pytest.raises(ValueError, match="did you mean 'corpus'"):
        zoo.Spec("mlp", features=5, context=1, classes=4, padding="corpuss")


@pytest.mark.parametrize(("field", "value"), [("features", 0), ("context", -1), ("classes", 1)])
def test_a_size_below_its_minimum_is_refused(field: str, value: int) -> None:
    """Features from 1, context from 0, classes from 2."""
    with pytest.raises(ValueError, match=f"expected {field} of at least"):
        zoo.Spec("mlp", **{"features": 5, "context": 1, "classes": 4, field: value})


def test_defaults_are_written_into_the_spec() -> None:
    """Options that are left out have the defaults of the builder, and all are sorted by name."""
    spec = zoo.Spec("cylinder", features=5, context=1, classes=4)
    assert list(spec.options) == sorted(spec.options)
    assert spec.options["width"] == 512
    assert spec == zoo.Spec("cylinder", features=5, context=1, classes=4, options={"width": 512})
    with pytest.raises(TypeError, match="does not support item assignment"):
        spec.options["width"] = 1


def test_a_spec_with_unknown_fields_is_refused() -> None:
    """A field of a later version is not ignored silently."""
    data = zoo.Spec("mlp", features=5, context=1, classes=4).to_dict()
    with pytest.raises(ValueError, match="expected a spec with the fields"):
        zoo.Spec.from_dict({**data, "colour": "red"})


def test_a_builder_makes_a_new_model_each_time(monkeypatch):
    """One that returns layers which exist already is refused: models would share their weights."""
    monkeypatch.setattr("zoo.models.architectures.ARCHITECTURES", {})
    once = nn.Linear(3, 2)

    def same_again(inputs, classes):
        return nn.Sequential(once)

    def lazy(inputs, classes):
        return nn.Sequential(nn.LazyLinear(classes))

    def drawn(inputs, classes):
        return nn.Dropout(torch.linspace(0, 1, 3)[1].item())

    for builder, message in (
        (same_again, "expected a new module from 'same_again' each time, got one with the same '0.weight' again"),
        (lazy, r"lazy layers in 'lazy': '0' \(LazyLinear\)"),
        (drawn, "meta tensors; it is first built without values: compute constants from numbers"),
    ):
        zoo.architecture(builder)
        with pytest.raises(ValueError, match=message):
            zoo.build(zoo.Spec(builder.__name__, features=3, context=0, classes=2), seed=0)
