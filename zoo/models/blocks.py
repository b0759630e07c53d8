"""The pieces that architectures are made of: activations, hidden layers, two residual blocks, initialisations.

Every piece maps (B, inputs) to (B, outputs), keeps no state except parameters and the statistics of BatchNorm,
and runs unchanged under `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo._names import checked, enter, find

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """A pointwise activation, and all that training and inference need to know about it.

    Args:
        name: what the option `activation` of an architecture calls it.
        layer: class of the module that computes it; the module has no parameters and no buffers.
        functions: functions that compute the same, as a hand-written `forward` may call them.
        in_place: overwrites its input with the result, or None.
        onednn: the name under which oneDNN fuses it with a matrix product, or None where it cannot.
    """

    name: str
    layer: type[nn.Module]
    functions: tuple[Function, ...] = ()
    in_place: Function | None = None
    onednn: str | None = None


_BUILT_IN = (
    Activation("relu", nn.ReLU, (torch.relu, functional.relu), in_place=torch.relu_, onednn="relu"),
    Activation("gelu", nn.GELU, (functional.gelu,), onednn="gelu"),
    Activation("sigmoid", nn.Sigmoid, (torch.sigmoid,), onednn="sigmoid"),
    Activation("softplus", nn.Softplus),
    Activation("tanh", nn.Tanh, (torch.tanh,), onednn="tanh"),
    Activation("silu", nn.SiLU, (functional.silu,), onednn="swish"),
    Activation("elu", nn.ELU),
    Activation("leaky_relu", nn.LeakyReLU),
    Activation("mish", nn.Mish),
    Activation("hardswish", nn.Hardswish),
)
ACTIVATIONS: dict[str, Activation] = {entry.name: entry for entry in _BUILT_IN}


@checked
def activation(function: Function) -> Function:
    """Register a pointwise function of your own under its own name, so that every architecture can use it.

    Example:
        >>> @activation
        ... def squared_relu(x):
        ...     return x.relu().square()
        >>> Layers("squared_relu").nonlinear()
        squared_relu()
        >>> ACTIVATIONS.pop("squared_relu").layer()(torch.tensor([-1.0, 3.0]))
        tensor([0., 9.])

    Raises:
        ValueError: the name is taken.
    """
    name = function.__name__
    body = {"forward": lambda self, x: function(x), "__doc__": function.__doc__, "__module__": function.__module__}
    enter(ACTIVATIONS, "activation", function, Activation(name, type(name, (nn.Module,), body), (function,)))
    return function


def activation_of(operation: Any) -> Activation | None:
    """The entry whose layer, function or in-place function `operation` is; None for anything else, also a subclass.

    Example:
        >>> activation_of(nn.ReLU()) is activation_of(torch.relu) is ACTIVATIONS["relu"]
        True
    """
    for entry in ACTIVATIONS.values():
        if type(operation) is entry.layer or operation in entry.functions or operation is entry.in_place:
            return entry
    return None


class Dropout(nn.Dropout):
    """nn.Dropout whose masks cost little on a CPU, where torch draws every unit by itself.

    On another device, and under `torch.func.vmap`, it is nn.Dropout.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not self.training or input.device.type != "cpu" or torch._C._functorch.is_batchedtensor(input):
            return super().forward(input)
        return input * dropout_mask(input, self.p)


def dropout_mask(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """What dropout multiplies `x` with, in its shape and type: 0 with probability `p`, and otherwise 1 / (1 - p).

    Four units share a random number of 64 bits, so `p` counts as the nearest multiple of 2 ** -16. Draws from
    `generator`, or else from torch's global one of the CPU, where `x` has to be.

    Example:
        >>> dropout_mask(torch.zeros(2, 3), p=1.0)
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """
    dropped, n = round(p * 2**16), x.numel()
    if dropped in (0, 2**16):
        return torch.full_like(x, float(not dropped))
    words = torch.randint(-(2**63), 2**63 - 1, (-(-n // 4),), generator=generator)
    kept = words.view(torch.int16)[:n].view(x.shape) >= dropped - 2**15
    return kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


@dataclass(frozen=True)
class Layers:
    """How the hidden layers of a model are made; the options that the built-in architectures share.

    Args:
        activation: a name in `ACTIVATIONS`.
        batchnorm: BatchNorm after every hidden Linear, which then has no bias, since the norm would subtract it again.
        dropout: probability of dropping a hidden unit during training; 0 makes no Dropout at all.

    Example:
        >>> [type(layer).__name__ for layer in Layers(dropout=0.1).dense(3, 8)]
        ['Linear', 'BatchNorm1d', 'ReLU', 'Dropout']
    """

    activation: str = "relu"
    batchnorm: bool = True
    dropout: float = 0.0

    def nonlinear(self) -> nn.Module:
        """A new activation, or a ValueError with the nearest names in the table."""
        return find(ACTIVATIONS, "activation", self.activation).layer()

    def linear(self, inputs: int, outputs: int) -> nn.Sequential:
        """Linear and BatchNorm."""
        norm = [nn.BatchNorm1d(outputs)] if self.batchnorm else []
        return nn.Sequential(nn.Linear(inputs, outputs, bias=not self.batchnorm), *norm)

    def dense(self, inputs: int, outputs: int) -> nn.Sequential:
        """One hidden layer: Linear, BatchNorm, activation, Dropout."""
        drop = [Dropout(self.dropout)] if self.dropout else []
        return nn.Sequential(*self.linear(inputs, outputs), self.nonlinear(), *drop)


class BasicBlock(nn.Module):
    """Two Linear + BatchNorm layers beside the identity; the sum goes through the last activation.

    References:
        He et al., "Deep residual learning for image recognition", CVPR 2016, figure 5 left, for vectors.
    """

    def __init__(self, width: int, layers: Layers) -> None:
        super().__init__()
        self.residual = nn.Sequential(layers.dense(width, width), layers.linear(width, width))
        self.activation = layers.nonlinear()

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        return self.activation(x + self.residual(x))  # type: ignore[no-any-return]  # Module is untyped


class Bottleneck(nn.Module):
    """Three Linear + BatchNorm layers `inputs -> width -> width -> 4 width` beside a shortcut.

    The shortcut is the identity where the sizes agree, and otherwise a Linear + BatchNorm projection
    `inputs -> 4 width`. As in the lecture, the first block of a model has `width` inputs, and only the later ones
    have the `4 width` of He et al.

    References:
        He et al., "Deep residual learning for image recognition", CVPR 2016, figure 5 right.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, layers: Layers) -> None:
        super().__init__()
        outputs = self.expansion * width
        hidden = [layers.dense(inputs, width), layers.dense(width, width)]
        self.residual = nn.Sequential(*hidden, layers.linear(width, outputs))
        self.shortcut = nn.Identity() if inputs == outputs else layers.linear(inputs, outputs)
        self.activation = layers.nonlinear()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, 4 * width)."""
        return self.activation(self.shortcut(x) + self.residual(x))  # type: ignore[no-any-return]  # likewise


INITIALISATIONS: dict[str, Function | None] = {
    "default": None,  # torch's own: uniform weights and biases within fan_in ** -0.5
    "xavier": nn.init.xavier_uniform_,
    "kaiming": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "uniform": lambda weight: nn.init.uniform_(weight, -((3 / weight.shape[1]) ** 0.5), (3 / weight.shape[1]) ** 0.5),
    "gaussian": lambda weight: nn.init.normal_(weight, std=weight.shape[1] ** -0.5),
}


def initialise(model: nn.Module, name: str) -> nn.Module:
    """Draw the weights of every Linear of `model` anew and set its bias to zero; return `model`.

    `xavier`: uniform, variance 2 / (fan_in + fan_out). `kaiming`: normal, variance 2 / fan_in.
    `uniform`, `gaussian`: variance 1 / fan_in. `default` keeps torch's own draw, biases included. Another name raises
    ValueError.

    References:
        LeCun et al., "Efficient BackProp", 1998; Glorot and Bengio, AISTATS 2010; He et al., ICCV 2015.
    """
    draw = find(INITIALISATIONS, "initialisation", name)
    if draw is None:
        return model
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model
