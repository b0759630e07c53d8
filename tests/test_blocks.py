"""Activations in all their forms, the two residual blocks, and initialisations."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import zoo
from zoo.models import blocks
from zoo.models.blocks import (
    ACTIVATIONS,
    INITIALISATIONS,
    Activation,
    BasicBlock,
    Bottleneck,
    Dropout,
    Layers,
    activation,
    activation_of,
    dropout_mask,
    initialise,
)


def test_a_basic_block_adds_its_input_before_the_last_activation() -> None:
    """With the scale of the second norm at zero, the block is relu(x)."""
    block = BasicBlock(6, Layers())
    nn.init.zeros_(block.residual[1][1].weight)
    x = torch.randn(10, 6)
    assert torch.equal(block(x), x.relu())


def test_a_bottleneck_widens_fourfold_and_the_next_one_keeps_the_width() -> None:
    """N -> n -> n -> 4n beside a projection, then 4n -> n -> n -> 4n beside the identity."""
    first, second = (Bottleneck(n, 6, Layers()) for n in (6, 24))
    linears = [(m.in_features, m.out_features) for m in first.modules() if isinstance(m, nn.Linear)]
    assert linears == [(6, 6), (6, 6), (6, 24), (6, 24)]
    assert isinstance(second.shortcut, nn.Identity)
    assert second(first(torch.randn(3, 6))).shape == (3, 24)


@pytest.mark.parametrize(
    ("name", "deviation"),
    [("xavier", (2 / 1500) ** 0.5), ("kaiming", (2 / 1000) ** 0.5), ("uniform", 1000**-0.5), ("gaussian", 1000**-0.5)],
)
def test_initialisations_have_the_deviation_of_their_paper(name: str, deviation: float) -> None:
    """Standard deviation of a 500 x 1000 weight within 1 %, biases zero."""
    torch.manual_seed(0)
    layer = initialise(nn.Linear(1000, 500), name)
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.01)
    assert not layer.bias.any()


def test_the_default_initialisation_is_torchs_own() -> None:
    """It keeps the weights and biases that the layer drew."""
    layer = nn.Linear(4, 3)
    before = copy.deepcopy(layer.state_dict())
    assert all(torch.equal(before[key], value) for key, value in initialise(layer, "default").state_dict().items())
    assert sorted(INITIALISATIONS) == ["default", "gaussian", "kaiming", "uniform", "xavier"]


def test_an_activation_of_ones_own_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes what the function does in any architecture, is recognised by layer and function, and has one name."""
    monkeypatch.setattr("zoo.models.blocks.ACTIVATIONS", dict(ACTIVATIONS))

    @activation
    def squared_relu(x: torch.Tensor) -> torch.Tensor:
        return x.relu().square()

    options = {"activation": "squared_relu", "batchnorm": False, "width": 8}
    hidden = zoo.build(zoo.Spec("cylinder", features=5, context=1, classes=4, options=options), seed=0)[0]
    x = torch.randn(9, 15)
    assert torch.equal(hidden(x), nn.functional.linear(x, hidden[0].weight, hidden[0].bias).relu().square())
    assert activation_of(hidden[1]) == activation_of(squared_relu) == blocks.ACTIVATIONS["squared_relu"]
    assert repr(hidden[1]) == "squared_relu()"

    def relu(x: torch.Tensor) -> torch.Tensor:
        return x

    with pytest.raises(ValueError, match="activation 'relu' is already registered by zoo"):
        activation(relu)


def test_an_activation_is_recognised_in_each_of_its_forms() -> None:
    """By layer, function and in-place function; a subclass, or another layer, is not."""
    assert [activation_of(form) for form in (nn.GELU(), nn.functional.silu, torch.relu_, nn.Mish())] == [
        ACTIVATIONS[name] for name in ("gelu", "silu", "relu", "mish")
    ]
    assert [activation_of(form) for form in (type("Own", (nn.ReLU,), {})(), nn.Linear(1, 1), torch.add)] == [None] * 3


@pytest.mark.parametrize("entry", ACTIVATIONS.values(), ids=lambda entry: entry.name)
def test_the_forms_of_an_activation_agree(entry: Activation) -> None:
    """Each function and the in-place one give what the layer gives."""
    x = torch.randn(50)
    expected = entry.layer()(x)
    for function in entry.functions:
        assert torch.equal(function(x), expected)
    if entry.in_place is not None:
        again = x.clone()
        assert torch.equal(entry.in_place(again), expected)
        assert torch.equal(again, expected)


def test_an_activation_of_a_users_module_obeys_the_laws_of_the_others(own: Callable[..., str]) -> None:
    """Its layer computes its function, and is recognised in both forms."""
    source = "@zoo.models.activation\ndef softsign(x):\n    return x / (1 + x.abs())\n"
    entry = ACTIVATIONS[own(ACTIVATIONS, "softsign", source)]
    test_the_forms_of_an_activation_agree(entry)
    assert [activation_of(form) for form in (entry.layer(), *entry.functions)] == [entry, entry]
    assert entry.layer()(torch.tensor([-3.0, 1.0])).tolist() == [-0.75, 0.5]


@pytest.mark.parametrize("p", [0.0, 1e-7, 0.1, 0.5, 0.875, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_drops_that_share_of_the_units_and_scales_the_others(p: float, dtype: torch.dtype) -> None:
    """Each unit by itself: the share of neighbours at every distance up to 8 that stay is the square of a unit's."""
    n = 200_003
    kept = dropout_mask(torch.empty(n, dtype=dtype), p, torch.Generator().manual_seed(0)) != 0
    bound = 5 * (p * (1 - p) / n) ** 0.5 + 2**-16
    assert abs(kept.double().mean().item() - (1 - p)) <= bound
    for distance in range(1, 9):
        both = (kept[distance:] & kept[:-distance]).double().mean().item()
        assert abs(both - (1 - p) ** 2) <= 2 * bound
    x = torch.full((n,), 3.0, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    values = y.detach().unique().tolist()
    assert x.grad is not None
    assert torch.equal(y, 3 * x.grad)
    assert values == pytest.approx([v for v, there in ((0.0, p > 1e-6), (3 / (1 - p or 1), p < 1)) if there], rel=0.01)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0, 5), (2, 3, 7)])
def test_dropout_keeps_the_shape_and_is_idle_in_evaluation(shape: tuple[int, ...]) -> None:
    """Also where the units are no multiple of the four that share a draw."""
    x = torch.ones(shape)
    assert Dropout(0.5)(x).shape == shape
    assert Dropout(0.5).eval()(x) is x


def test_dropout_under_vmap_draws_for_each_member() -> None:
    x = torch.ones(3, 100)
    y = torch.func.vmap(Dropout(0.5), randomness="different")(x)
    assert len({tuple(row) for row in y.tolist()}) == 3
