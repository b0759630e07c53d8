"""Members as one module for training: what each computes, and what is refused."""

import pytest
import torch
from torch import nn

import zoo
from ensemble.run.training_stack import TrainingStack
from zoo.search import searched


def models(architecture: str, members: int = 3, **options: object) -> list[nn.Module]:
    """Members of a spec that differ in their seeds."""
    spec = zoo.Spec(architecture, features=4, context=1, classes=5, options=options)
    return [zoo.build(spec, seed=seed) for seed in range(members)]


@pytest.mark.parametrize("architecture", searched())
@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_stack_computes_and_learns_what_its_members_do(architecture: str, batchnorm: bool, shared: bool) -> None:
    """In train mode: logits, gradients of every parameter and running statistics, for shared and own inputs."""
    alone = models(architecture, batchnorm=batchnorm, activation="gelu", dropout=0.3)
    stack = TrainingStack(alone)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    own = x if shared else torch.stack([x, x + 1, x - 1])
    stack.reseed([10, 11, 12])
    together = stack(own)
    together.square().sum().backward()
    state = stack.body.state_dict()
    gradients = {name: p.grad for name, p in stack.body.named_parameters()}
    for m, model in enumerate(alone):
        torch.manual_seed(10 + m)
        logits = model(own if shared else own[m])
        torch.testing.assert_close(together[m], logits, rtol=1e-4, atol=1e-5)
        logits.square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name].view(3, -1)[m].view_as(p), p.grad, rtol=1e-3, atol=1e-4)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name].view(3, -1)[m].view_as(tensor), tensor, rtol=1e-4, atol=1e-5)


def test_an_architecture_of_ones_own_goes_together_where_its_layers_do() -> None:
    """Any module around layers that are known; here with a sum in between."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 6)
            self.last = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.left(x)) * self.right(x))  # type: ignore[no-any-return]

    alone = [Sum() for _ in range(2)]
    x = torch.randn(3, 4)
    torch.testing.assert_close(TrainingStack(alone)(x), torch.stack([model(x) for model in alone]))


class Own(nn.Module):
    """A layer with a parameter that cannot be stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Mixing(nn.Module):
    """Expects (B, features) as its input, which is not so in a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Softmax over the wrong axis."""
        return self.layer(x).softmax(dim=1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Sequential(nn.Linear(3, 3), nn.GELU())], r"model\.1 is ReLU"),
        ([nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 4))], r"model\.0 is Linear"),
        ([nn.Sequential(nn.Linear(3, 3), Own()) for _ in range(2)], r"cannot stack model\.1, a Own"),
        ([Mixing(), Mixing()], "one after another"),
        ([nn.Identity()], "begin with a Linear"),
    ],
)
def test_what_cannot_be_together_is_refused(members: list[nn.Module], words: str) -> None:
    """Other structures, layers that cannot be stacked, and outputs that differ."""
    with pytest.raises(ValueError, match=words):
        TrainingStack(members)
