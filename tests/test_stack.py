"""Stacking: what may be stacked, what must not, and that a stack is its members."""

import pytest
import torch
from torch import Tensor, nn

import zoo
from ensemble import Stack

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
    with pytest.raises(ValueError, match=r"cannot stack '1' with '0': the settings .* \{.*'scale': 2.0"):
        Stack([one, other])


def test_what_only_the_outputs_show_is_refused_too() -> None:
    """A probe compares the stack with the models one by one."""
    with pytest.raises(ValueError, match="cannot stack '1' with '0': on a probe their outputs differ"):
        Stack([Applied(torch.tanh), Applied(lambda x: x + 1)])


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
