"""`TrainingStack`: members of one structure as one module for *training*, written to be fast on a CPU.

vmap over a training step is slower than one member after another beyond small batches: it treats the shared
input as M inputs and BatchNorm as M small ones. Here the few layers with parameters or random draws are
replaced by layers that hold all members: activations are (B, M, features), so the first layer is one wide
product over the shared input, and BatchNorm is a single one over M * features channels. All other layers work
entry by entry and stay. What cannot be replaced is refused, and the whole is compared with the single members.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from zoo.models.blocks import activation_of

_PROBED = 4  # frames


class TrainingStack(nn.Module):
    """M models of one structure: (B, inputs) for all, or (M, B, inputs) with one for each -> (M, B, C).

    The names in the `state_dict` of its `body` are those of one model; each tensor's memory is the members' tensors
    one after another, so `tensor.view(M, -1)` has a row for each member. A member computes, dropout included,
    what it would compute alone from the same seed.

    Args:
        models: at least one, in train mode, on the device where they are to be trained; they are copied.

    Raises:
        ValueError: the models differ, or have layers that cannot be stacked; the message names them.

    Example:
        >>> models = [nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(5)]
        >>> TrainingStack(models)(torch.zeros(7, 3)).shape
        torch.Size([5, 7, 2])
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = len(models)
        first = next((layer for layer in models[0].modules() if isinstance(layer, nn.Linear)), None)
        if first is None:
            msg = "expected models that begin with a Linear"
            raise ValueError(msg)
        device = first.weight.device
        self.generators = [torch.Generator(device) for _ in models]
        self.body = _stacked(list(models), self.generators, "model")
        x = torch.randn(_PROBED, first.in_features, generator=torch.Generator().manual_seed(0)).to(device)
        for model in (self, *models):
            model.eval()
        with torch.no_grad():
            alone, together = torch.stack([model(x) for model in models]), self(x)
        for model in (self, *models):
            model.train()
        if alone.shape != together.shape or not torch.allclose(alone, together, rtol=1e-4, atol=1e-4):
            msg = "the stacked members do not compute what each computes alone; train them one after another"
            raise ValueError(msg)

    def forward(self, x: Tensor) -> Tensor:
        """(M, B, C) of (B, inputs) or (M, B, inputs)."""
        found: Tensor = self.body(x if x.ndim == 2 else x.transpose(0, 1))  # (B, M, C)
        return found.transpose(0, 1)

    def reseed(self, seeds: Sequence[int]) -> None:
        """Restart each member's dropout from M seeds."""
        for generator, seed in zip(self.generators, seeds, strict=True):
            generator.manual_seed(seed)


class _WideLinear(nn.Module):
    """M Linear layers as one: (B, I) or (B, M, I) -> (B, M, O)."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.members = len(layers)
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]))  # (M * O, I)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases)) if biases else None  # (M * O)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return functional.linear(x, self.weight, self.bias).view(len(x), self.members, -1)
        weight = self.weight.view(self.members, -1, self.weight.shape[1])
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        y: Tensor = _Products.apply(x.to(dtype), weight.to(dtype))  # type: ignore[no-untyped-call]  # untyped in torch
        return y if self.bias is None else y + self.bias.view(self.members, -1)


class _Products(Function):
    """(B, M, I) by (M, O, I) -> (B, M, O), gradients laid out as the parameters are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        g = gradients[0].transpose(0, 1)  # (M, B, O)
        return torch.bmm(g, weight).transpose(0, 1).contiguous(), torch.bmm(g.transpose(1, 2), x.transpose(0, 1))


class _WideBatchNorm(nn.BatchNorm1d):
    """M BatchNorms as one over M * H channels: (B, M, H) -> (B, M, H)."""

    def __init__(self, layers: Sequence[nn.BatchNorm1d]) -> None:
        first = layers[0]
        super().__init__(
            len(layers) * first.num_features, first.eps, first.momentum, first.affine, first.track_running_stats
        )
        for name, own in [*self.named_parameters(), *self.named_buffers()]:
            own.data = torch.stack([getattr(layer, name).detach() for layer in layers]).flatten()

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1)).view_as(input)


class _WideDropout(nn.Module):
    """M Dropouts, each drawing from its member's generator what nn.Dropout would draw: (B, M, H) -> (B, M, H)."""

    def __init__(self, p: float, generators: list[torch.Generator]) -> None:
        super().__init__()
        self.p, self.generators = p, generators

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        B, M, H = x.shape
        kept = x.new_empty(M, B, H)
        for mask, generator in zip(kept, self.generators, strict=True):
            mask.bernoulli_(1 - self.p, generator=generator)
        return x * kept.div_(1 - self.p).transpose(0, 1)


def _stacked(layers: list[Any], generators: list[torch.Generator], name: str) -> nn.Module:
    """One layer for the members' layers, its parts stacked likewise."""
    first = layers[0]
    if any(type(layer) is not type(first) or layer.extra_repr() != first.extra_repr() for layer in layers):
        msg = f"expected members of one structure, but {name} is {first} in one member and differs in another"
        raise ValueError(msg)
    if type(first) is nn.Linear:
        return _WideLinear(layers)
    if type(first) is nn.BatchNorm1d:
        return _WideBatchNorm(layers)
    if type(first) is nn.Dropout:
        return _WideDropout(first.p, generators)
    if type(first) is nn.Identity or activation_of(first) is not None:
        return copy.deepcopy(first)  # type: ignore[no-any-return]  # layers are modules
    parts = list(first._modules)
    if first._parameters or first._buffers or not parts:
        msg = f"cannot stack {name}, a {type(first).__name__}; train the members one after another"
        raise ValueError(msg)
    hollow: nn.Module = copy.copy(first)
    hollow._modules = {
        part: _stacked([layer._modules[part] for layer in layers], generators, f"{name}.{part}") for part in parts
    }
    return hollow
