"""Stacking: what may be stacked, what must not, and that a stack is its members."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
from ensemble import Stack
from ensemble.run.stack import Watch, unlike

ARCHITECTURES = zoo.list_architectures(["basic", "bottleneck", "*cylinder", "diamond", "mlp", "*pyramid"])


def spec(architecture: str = "cylinder", **options: object) -> zoo.Spec:
    """A small spec: 18 inputs, 4 classes."""
    if architecture == "mlp" and "width" in options:
        options["widths"] = (options.pop("width"), 12)
    return zoo.Spec(architecture, features=6, context=1, classes=4, options=options)


def models(of: zoo.Spec, count: int = 3) -> list[nn.Module]:
    """Freshly drawn models whose BatchNorm has seen some data, in evaluation mode."""
    built = [zoo.build(of, seed=seed) for seed in range(count)]
    for model in built:
        model(torch.randn(32, of.inputs) * 3 + 1)
        model.eval()
    return built


def looped(several: list[nn.Module], x: Tensor) -> Tensor:
    """The slow obvious way."""
    return torch.stack([model(x) for model in several])


class Applied(nn.Module):
    """A Linear and a function that no comparison of structures can see into."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(3, 2), function

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3) -> (B, 2)."""
        return self.function(self.linear(x))  # type: ignore[operator]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("frames", [1, 7])
def test_a_stack_gives_what_its_members_give(architecture: str, frames: int) -> None:
    """Stacked equals looped, for every architecture."""
    several, x = models(spec(architecture, width=16)), torch.randn(frames, 18)
    torch.testing.assert_close(Stack(several)(x), looped(several, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unstacking_gives_the_members_back(architecture: str) -> None:
    """The modules are equal to the originals, and have memory of their own."""
    several, x = models(spec(architecture, width=16)), torch.randn(5, 18)
    stack = Stack(several)
    again = stack.unstack()
    torch.testing.assert_close(looped(again, x), looped(several, x), rtol=0, atol=0)
    with torch.no_grad():
        next(again[0].parameters()).zero_()
    torch.testing.assert_close(stack(x), looped(several, x), rtol=1e-5, atol=1e-6)


def test_a_member_shares_memory_with_its_stack() -> None:
    """`member` is a view, for loops over what is loaded only once."""
    stack = Stack(models(spec(width=8)))
    assert next(stack.member(1).parameters()).data_ptr() == next(iter(stack.state().values()))[1].data_ptr()


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (
            nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
            nn.Sequential(nn.Linear(3, 3), nn.GELU()),
            "GELU.* instead of ReLU",
        ),
        (nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "3 modules instead of 2"),
        (
            nn.Sequential(nn.Linear(3, 3)),
            nn.Sequential(nn.Linear(3, 4)),
            "out_features=4.* instead of .*out_features=3",
        ),
        (nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3).double()), "tensors of '0'"),
        (nn.Sequential(nn.ELU(1.0)), nn.Sequential(nn.ELU(2.0)), "alpha=2.0"),
    ],
)
def test_models_of_other_structure_are_refused(one: nn.Module, other: nn.Module, words: str) -> None:
    """Torch's own check sees the class only and stacks most of these; here both names are in the message."""
    with pytest.raises(ValueError, match=f"cannot stack 'b' with 'a': .*{words}"):
        Stack([one, other], names=["a", "b"])


def test_other_settings_of_one_class_are_refused() -> None:
    """A plain attribute decides what is computed as much as a layer does."""

    class Scaled(nn.Linear):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    one, other = Scaled(3, 2), Scaled(3, 2)
    other.scale = 2.0
    with pytest.raises(ValueError, match=r"cannot stack '1' with '0': the attributes of '' are .*'scale'"):
        Stack([one, other])


class Labelled(nn.Linear):
    """Multiplies by a factor that is kept outside the module, where no comparison of structures can see it."""

    factors: ClassVar[WeakKeyDictionary[nn.Module, float]] = WeakKeyDictionary()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3) -> (B, 2)."""
        return super().forward(x) * self.factors.get(self, 1.0)


def test_what_only_the_outputs_show_is_refused_too() -> None:
    """A probe compares the stack with the models one by one."""
    one, other = Labelled(3, 2), Labelled(3, 2)
    Labelled.factors[other] = 2.0
    with pytest.raises(ValueError, match="cannot stack '1' with '0': on a probe their outputs differ"):
        Stack([one, other])


def own(factor: float) -> object:
    """Functions that one line of code makes, each with a value of its own."""
    return lambda x: x * factor


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.relu, torch.tanh),
        (own(1.0), own(2.0)),
        (partial(nn.functional.leaky_relu, negative_slope=0.1), partial(nn.functional.leaky_relu, negative_slope=0.2)),
        (torch.zeros(3), torch.ones(3)),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64)),
        (np.zeros(3), np.ones(3)),
        ([1, [2, 3]], [1, [2, 4]]),
        ([torch.zeros(2)], [torch.ones(2)]),
        ({"scale": 1.0}, {"scale": 2.0}),
        ({"scale": 1}, {"scale": True}),
        (1.0, 2.0),
        (0.0, -0.0),
        ("mean", "sum"),
        ((1, 2), [1, 2]),
        (None, 0),
        ([nn.Linear(2, 2)], [nn.Linear(2, 2)]),
        (object(), object()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_attributes_of_any_type_are_compared(one: object, other: object) -> None:
    """What a model keeps besides its layers may decide what it computes, so it has to be the same."""
    a, b = nn.Flatten(), nn.Flatten()
    a.kept, b.kept = one, other
    assert unlike(b, a)
    a.kept = b.kept = one
    assert not unlike(b, a)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(3),
        lambda: np.arange(3),
        lambda: {"scale": [1.0, (2, "x")]},
        lambda: partial(nn.functional.leaky_relu, negative_slope=0.1),
        lambda: nn.Flatten(),
        lambda: slice(1, 2),
        lambda: torch.float32,
    ],
)
def test_equal_attributes_are_no_difference(make: Callable[[], object]) -> None:
    """Values of equal content, made twice; so are a model's own methods, layers and parameters, and loops of them."""
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    for module in (a, b):
        module.kept = make()
        module.own = [module.forward, module.weight, [module], weakref.ref(module.bias)]
    assert not unlike(b, a)


def test_hooks_and_what_is_trained_are_compared() -> None:
    """A hook may change an output; a frozen layer is trained differently."""
    hooked, frozen = nn.Linear(2, 2), nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    frozen.weight.requires_grad_(False)
    for other in (hooked, frozen):
        with pytest.raises(ValueError, match="cannot stack '1' with '0'"):
            Stack([nn.Linear(2, 2), other])


def test_equal_specs_do_not_hide_a_difference() -> None:
    """A model that was changed after it was built from its spec is another model."""
    one, other = zoo.build(spec(width=8), seed=0), zoo.build(spec(width=8), seed=1)
    other.eval()
    with pytest.raises(ValueError, match=r"cannot stack '1' with '0'.*group members by structure first"):
        Stack([one, other], specs=[spec(width=8)] * 2)


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)])
def test_inputs_are_not_written_into(first: nn.Module) -> None:
    """Models that change their inputs in place get a copy, at every call, with gradients or in inference mode."""
    several, x = [nn.Sequential(first, nn.Flatten(), nn.Linear(3, 2)) for _ in range(2)], torch.randn(4, 3)
    for stack in (Stack(several), Stack(several, probe=x)):
        kept = x.clone()
        for _ in range(2):
            torch.testing.assert_close(stack(x), looped(several, x.clone()))
            with torch.inference_mode():
                stack(x)
            assert torch.equal(x, kept)


class Answer:
    """What models of some libraries return."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_logits_in_an_object_are_taken() -> None:
    """As many libraries return them."""
    several, x = [Applied(Answer) for _ in range(2)], torch.randn(4, 3)
    torch.testing.assert_close(Stack(several)(x), torch.stack([model(x).logits for model in several]))


def test_models_of_which_a_stack_would_be_another_are_refused() -> None:
    """Random in evaluation mode; weights that do not exist yet."""
    with pytest.raises(ValueError, match="not random in evaluation mode, got 0, 1"):
        Stack([Applied(nn.functional.dropout) for _ in range(2)])
    with pytest.raises(ValueError, match="lazy layers in 'b': 'itself'"):
        Stack([nn.LazyLinear(2), nn.LazyLinear(2)], names=["b", "c"])


def test_a_guess_of_the_inputs_is_only_a_guess() -> None:
    """A model whose first layer is a Linear may take more than vectors; it is compared on the rows that it is given."""

    class Pooled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(dim=2).flatten(1)

    several, x = [Pooled(3, 2) for _ in range(2)], torch.randn(4, 2, 5, 3)
    torch.testing.assert_close(Stack(several)(x), looped(several, x))
    torch.testing.assert_close(Stack(several, probe=x)(x), looped(several, x))
    with pytest.raises(ValueError, match=r"models that take \(4, 3\) inputs of torch.float32, got"):
        Stack(several, probe=torch.zeros(4, 3))


def test_the_probe_is_drawn_from_all_rows() -> None:
    """A difference that only the last row shows is found."""

    class Late(Labelled):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 5, super().forward(x), x[:, :2])

    one, other = Late(3, 2), Late(3, 2)
    Labelled.factors[other] = 2.0
    x = torch.zeros(100, 3)
    Stack([one, other], probe=x)
    x[-1] = 9
    with pytest.raises(ValueError, match="on a probe their outputs differ"):
        Stack([one, other], probe=x)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.detach().mul_(2),
        lambda m: m.load_state_dict(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).state_dict()),
        lambda m: setattr(m[0].weight, "data", torch.zeros(3, 3)),
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(3, 3))),
        lambda m: m.__setitem__(1, nn.Tanh()),
        lambda m: setattr(m[1], "inplace", True),
        lambda m: m.train(),
        lambda m: m.half(),
        lambda m: m[0].weight.data.mul_(2),
        lambda m: m.factors.append(3.0),
        lambda m: m.factors.__setitem__(0, 3.0),
        lambda m: m.table.update(scale=3.0),
    ],
)
def test_changed_models_are_noticed(change: Callable[[nn.Sequential], object]) -> None:
    """Weights written or replaced, layers, attributes, mode."""
    several = [nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval() for _ in range(3)]
    for model in several:
        model.factors, model.table = [1.0], {"scale": 1.0}
    watch = Watch(several)
    for model in several:
        model(torch.zeros(2, 3))
    assert watch.changed(5) is None
    change(several[1])
    assert watch.changed(5) == 1
    watch.renew()
    assert watch.changed(5) is None


def test_other_specs_are_refused_by_name() -> None:
    """Where specs are given, their equality decides."""
    specs = [spec(width=8), spec(width=8, activation="gelu")]
    with pytest.raises(ValueError, match=r"cannot stack 'b' with 'a': Spec\(.*group members by spec first"):
        Stack([zoo.build(each, seed=0) for each in specs], names=["a", "b"], specs=specs)


def test_nothing_cannot_be_stacked() -> None:
    """No models is an error, not an empty tensor."""
    with pytest.raises(ValueError, match="at least one model to stack, got none"):
        Stack([])


def test_training_keeps_statistics_per_member() -> None:
    """In train mode outputs and BatchNorm's buffers are those of the members alone."""
    several = [zoo.build(spec(width=8), seed=seed) for seed in range(3)]
    stack, x = Stack(several), torch.randn(16, 18)
    torch.testing.assert_close(stack(x), looped(several, x), rtol=1e-4, atol=1e-5)
    for name, buffer in several[2].named_buffers():
        torch.testing.assert_close(stack.state()[name][2], buffer)


def test_dropout_draws_per_member() -> None:
    """Two copies of one model drop different units, and none in evaluation mode."""
    model = zoo.build(spec(width=64, dropout=0.5, batchnorm=False), seed=0)
    stack, x = Stack([model, model]), torch.randn(4, 18)
    assert not torch.equal(*stack.train()(x))
    assert torch.equal(*stack.eval()(x))


def test_one_optimiser_is_separate_runs() -> None:
    """The sum of the members' losses moves every member as its own loss would."""
    several = [zoo.build(spec(width=8, batchnorm=False), seed=seed) for seed in range(3)]
    stack, labels = Stack(several), torch.randint(0, 4, (16,))
    x = torch.randn(16, 18)
    together = torch.optim.SGD(stack.parameters(), lr=0.1)
    alone = [torch.optim.SGD(model.parameters(), lr=0.1) for model in several]
    for _ in range(5):
        together.zero_grad()
        sum(nn.functional.cross_entropy(logits, labels) for logits in stack(x)).backward()  # type: ignore[union-attr]
        together.step()
        for model, optimiser in zip(several, alone, strict=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimiser.step()
    torch.testing.assert_close(stack(x), looped(several, x), rtol=1e-5, atol=1e-5)


def test_tied_weights_stay_tied() -> None:
    """What two layers share in a member they share in what comes out of the stack."""

    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    several, x = [tied() for _ in range(2)], torch.randn(4, 3)
    stack = Stack(several)
    torch.testing.assert_close(stack(x), looped(several, x))
    again = stack.unstack()[0]
    assert again[0].weight is again[1].weight  # type: ignore[index]
    with pytest.raises(ValueError, match=r"it shares other tensors between layers \(\['1.weight'\]\)"):
        Stack([tied(), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))])
