"""Laws over every architecture in the table, shapes worked out by hand, and the user's own."""

import copy
import json
from collections.abc import Callable
from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn

import ensemble
import zoo
from zoo.models import architectures, fast_count
from zoo.models.architectures import cylinder, diamond, find_architecture, inverted_pyramid, mlp, pyramid
from zoo.models.blocks import ACTIVATIONS, Activation, Dropout, Layers
from zoo.search import searched, widest_spec

EVERY = zoo.list_architectures()
LAYERED = [name for name in EVERY if "batchnorm" in find_architecture(name).options]  # of `Layers`, with its options


def small(architecture: str, **options: object) -> zoo.Spec:
    """A spec of a few units, over 3 frames of 5 features."""
    sizes, known = {"widths": [6, 7], "width": 8, "depth": 3, "narrow": 4}, find_architecture(architecture).options
    sizes = {name: size for name, size in sizes.items() if name in known}
    return zoo.Spec(architecture, features=5, context=1, classes=4, options={**sizes, **options})


@pytest.mark.parametrize("name", EVERY)
def test_logits_have_one_column_per_class_and_finite_gradients(name: str) -> None:
    """(B, inputs) -> (B, classes), and the loss can be differentiated to every parameter."""
    model = zoo.build(small(name), seed=0)
    logits = model(torch.randn(9, 15))
    nn.functional.cross_entropy(logits, torch.arange(9) % 4).backward()
    assert logits.shape == (9, 4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_the_meta_count_is_that_of_the_built_model(name: str) -> None:
    """`count_parameters` allocates nothing and agrees with the real parameters."""
    spec = small(name)
    assert zoo.count_parameters(spec) == sum(p.numel() for p in zoo.build(spec).parameters())


@pytest.mark.parametrize("name", EVERY)
def test_equal_seeds_give_equal_models_and_leave_the_global_generator_alone(name: str) -> None:
    """The draw depends on the seed only."""
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, same, other = (zoo.build(small(name), seed=seed) for seed in (1, 1, 2))
    assert torch.rand(1) == expected
    x = torch.randn(5, 15)
    assert torch.equal(one(x), same(x))
    assert not torch.equal(one(x), other(x))


@pytest.mark.parametrize("name", LAYERED)
def test_weights_are_drawn_in_the_order_of_the_layers(name: str) -> None:
    """So that a seed gives the same model in every version: the first two Linears, drawn by hand."""
    linears = [m for m in zoo.build(small(name), seed=3).modules() if isinstance(m, nn.Linear)][:2]
    torch.manual_seed(3)
    for linear in linears:
        assert torch.equal(linear.weight, nn.Linear(linear.in_features, linear.out_features, bias=False).weight)


@pytest.mark.parametrize("name", LAYERED)
def test_a_spec_survives_json(name: str) -> None:
    """Written and read again, it is equal and has the same hash."""
    spec = small(name, dropout=0.1, activation="gelu")
    again = zoo.Spec.from_dict(json.loads(spec.canonical()))
    assert again == spec == copy.deepcopy(spec)
    assert hash(again) == hash(spec)


@pytest.mark.parametrize("name", LAYERED)
def test_a_linear_before_a_norm_has_no_bias(name: str) -> None:
    """With BatchNorm only the last Linear has a bias; without it all have one, and there is no norm."""
    with_norm = [m for m in zoo.build(small(name)).modules() if isinstance(m, nn.Linear)]
    plain = list(zoo.build(small(name, batchnorm=False)).modules())
    assert [layer.bias is not None for layer in with_norm] == [False] * (len(with_norm) - 1) + [True]
    assert all(m.bias is not None for m in plain if isinstance(m, nn.Linear))
    assert not any(isinstance(m, nn.BatchNorm1d) for m in plain)


@pytest.mark.parametrize("entry", ACTIVATIONS.values(), ids=lambda entry: entry.name)
@pytest.mark.parametrize("name", LAYERED)
def test_every_activation_replaces_every_other(name: str, entry: Activation) -> None:
    """No other activation is left in the model."""
    kinds = {type(m) for m in zoo.build(small(name, activation=entry.name)).modules()}
    assert kinds & {other.layer for other in ACTIVATIONS.values()} == {entry.layer}


@pytest.mark.parametrize("name", LAYERED)
def test_dropout_acts_while_training_only(name: str) -> None:
    """Two forward passes differ in train mode and agree in eval mode."""
    model = zoo.build(small(name, dropout=0.5), seed=0)
    x = torch.randn(64, 15)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_shapes_are_those_of_their_names() -> None:
    """Widths of the shapes, worked out by hand."""
    assert diamond(width=300, narrow=100, depth=3) == [100, 300, 100]
    assert diamond(width=300, narrow=100, depth=4) == [100, 300, 300, 100]
    assert diamond(width=300, narrow=100, depth=1) == [300]
    assert pyramid(width=300, narrow=100, depth=3) == [300, 200, 100]
    assert inverted_pyramid(width=300, narrow=100, depth=3) == [100, 200, 300]
    assert cylinder(width=300, depth=2) == [300, 300]
    assert mlp(widths=(3, 5)) == (3, 5)


@pytest.mark.parametrize("name", ["mlp", "pyramid"])
def test_a_shapes_widths_are_those_of_the_built_layers(name: str) -> None:
    """Hidden Linears in order; then the classes."""
    linears = [m.out_features for m in zoo.build(small(name)).modules() if isinstance(m, nn.Linear)]
    assert linears == {"mlp": [6, 7, 4], "pyramid": [8, 6, 4, 4]}[name]


@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("name", searched())
def test_the_count_by_arithmetic_is_the_built_models(name: str, batchnorm: bool) -> None:
    """For every architecture that declares one, with norms and with biases, and for depths that round differently."""
    for depth in (1, 2, 3, 4, 6):
        sizes = {"depth": depth, "width": 37, "narrow": 11, "widths": tuple(range(9, 9 + depth))}
        known = find_architecture(name).options
        spec = small(name, batchnorm=batchnorm, **{size: value for size, value in sizes.items() if size in known})
        assert fast_count(spec) == zoo.count_parameters(spec)


def test_parameters_of_a_cylinder_by_hand() -> None:
    """3 x 5 inputs, 8 units twice with norm (weights + 2 x 8), 4 classes with bias."""
    spec = zoo.Spec("cylinder", features=5, context=1, classes=4, options={"width": 8, "depth": 2})
    assert zoo.count_parameters(spec) == (15 * 8 + 16) + (8 * 8 + 16) + (8 * 4 + 4)


def test_a_builder_of_ones_own_is_one_function() -> None:
    """It is listed, built and counted like the others; another one of that name is refused."""

    @zoo.architecture
    def halves(inputs: int, classes: int, *, width: int = 6) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, classes))

    spec = zoo.Spec("halves", features=2, context=0, classes=3)
    assert zoo.list_architectures("halv*") == ["halves"]
    assert zoo.count_parameters(spec) == 2 * 6 + 6 + 6 * 3 + 3

    def other(inputs: int, classes: int) -> nn.Module:
        return nn.Linear(inputs, classes)

    other.__name__ = "halves"
    with pytest.raises(ValueError, match="already registered by"):
        zoo.architecture(other)


def test_a_builder_that_asks_for_layers_shares_the_options_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation, norm, dropout and initialisation are handed in; a count of its own makes the searches draw it."""
    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(architectures.ARCHITECTURES))

    @partial(zoo.architecture, count=lambda inputs, classes, *, width, **_: inputs * width + (width + 1) * classes)
    def single(inputs: int, classes: int, layers: Layers, *, width: int = 6) -> nn.Module:
        return nn.Sequential(layers.dense(inputs, width), nn.Linear(width, classes))

    for law in LAWS:
        law("single")
    kinds = [type(m) for m in zoo.build(small("single", activation="tanh", dropout=0.1))[0]]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.Tanh, Dropout]
    assert "single" in searched()
    assert fast_count(small("single")) == 15 * 8 + 9 * 4


def test_a_builder_of_another_form_is_refused() -> None:
    """Options must be keywords with defaults, or a stored spec could not be completed."""

    def wrong(inputs: int, classes: int, width: int) -> nn.Module:
        return nn.Linear(inputs, classes)

    def narrowing(width: int = 5) -> list[int]:
        return [width]

    def leaky(*, width: int = 5, dropout: float = 0.0) -> list[int]:
        return [width]

    with pytest.raises(ValueError, match=r"expected a builder wrong\(inputs, classes, \*, option=default, \.\.\.\)"):
        zoo.architecture(wrong)
    with pytest.raises(ValueError, match=r"expected a shape narrowing\(\*, option=default, \.\.\.\)"):
        zoo.shape(narrowing)
    with pytest.raises(ValueError, match=r"got \['dropout'\] among them"):
        zoo.shape(leaky)


LAWS = [
    test_logits_have_one_column_per_class_and_finite_gradients,
    test_the_meta_count_is_that_of_the_built_model,
    test_equal_seeds_give_equal_models_and_leave_the_global_generator_alone,
    test_weights_are_drawn_in_the_order_of_the_layers,
    test_a_spec_survives_json,
    test_a_linear_before_a_norm_has_no_bias,
    test_dropout_acts_while_training_only,
]


@pytest.fixture
def hourglass(own: Callable[..., str]) -> str:
    """A shape in a module of the user's own."""
    source = "@zoo.shape\ndef hourglass(*, width=512, narrow=64):\n    return [width, narrow, width]\n"
    return own(architectures.ARCHITECTURES, "hourglass", source)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_shape_of_ones_own_obeys_the_laws_of_the_others(hourglass: str, law: Callable[[str], None]) -> None:
    """One function, with nothing else entered anywhere."""
    law(hourglass)


@pytest.mark.parametrize("batchnorm", [True, False])
def test_a_shape_of_ones_own_is_counted_searched_and_stacked(hourglass: str, batchnorm: bool) -> None:
    """The arithmetic agrees with the built model, searches draw it by default, and members run as one."""
    test_the_count_by_arithmetic_is_the_built_models(hourglass, batchnorm)
    assert hourglass in searched()
    drawn = list(islice(zoo.random_budget(20_000, contexts=[1], seed=2), 60))
    assert {hourglass, "mlp"} <= {spec.architecture for spec in drawn}
    assert max(zoo.count_parameters(spec) for spec in drawn) <= 20_000
    assert hourglass in {spec.architecture for spec in islice(zoo.random_grid(), 20)}
    assert next(zoo.grid(hourglass, options={"narrow": [3]})).options["narrow"] == 3
    assert widest_spec(hourglass, 20_000, features=5, classes=4, context=1, depth=3).options["narrow"] > 1
    models = [zoo.build(small(hourglass, batchnorm=batchnorm), seed=seed).eval() for seed in range(3)]
    x = torch.randn(6, 15)
    torch.testing.assert_close(ensemble.Stack(models).eval()(x), torch.stack([model(x) for model in models]))


@pytest.mark.parametrize("name", LAYERED)
def test_an_activation_of_ones_own_replaces_every_other(own: Callable[..., str], name: str) -> None:
    """As those of the table do, from a module of the user's own; the spec survives JSON, and members run as one."""
    softsign = own(ACTIVATIONS, "softsign", "@zoo.models.activation\ndef softsign(x):\n    return x / (1 + x.abs())\n")
    test_every_activation_replaces_every_other(name, ACTIVATIONS[softsign])
    models = [zoo.build(small(name, activation=softsign), seed=seed).eval() for seed in range(3)]
    x = torch.randn(6, 15)
    torch.testing.assert_close(ensemble.Stack(models).eval()(x), torch.stack([model(x) for model in models]))
