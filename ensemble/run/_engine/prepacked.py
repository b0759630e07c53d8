"""`Layouts`: the layers of a `Dense` as oneDNN runs them best on a CPU.

Weights are laid out once for a size of batch, bias and activation are part of the product, and all members are
one grouped convolution over "images" of one pixel per frame: activations stay (B, M * width) in memory from the
first layer to the last. The operators are those that torch's own compiler emits for frozen weights. With a batch
of another size the results are the same, but oneDNN may lay the weights out anew at every call, which is slow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ensemble.run._engine.dense import Affine, Dense, Step

_KEPT = 4  # sizes of batch: a tile and its quarters
_NO_PADDING, _ONE = [0, 0], [1, 1]
_ACTIVATIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    functional.relu: "relu",
    nn.ReLU: "relu",
    functional.gelu: "gelu",
    nn.GELU: "gelu",
    functional.silu: "swish",
    nn.SiLU: "swish",
    torch.tanh: "tanh",
    nn.Tanh: "tanh",
    torch.sigmoid: "sigmoid",
    nn.Sigmoid: "sigmoid",
}


@dataclass(frozen=True)
class Prepacked:
    """A Linear layer of every member and the activation behind it.

    Args:
        weight: (M * outputs, inputs) in oneDNN's own layout.
        bias: (M * outputs,).
        members: M.
        groups: M, or 1 where all members read the same input.
        activation: "none" or one of oneDNN's names.
        algorithm: of GELU, "none" or "tanh".
    """

    weight: Tensor
    bias: Tensor
    members: int
    groups: int
    activation: str
    algorithm: str

    def __call__(self, x: Tensor) -> Tensor:
        """(M, B, inputs) -> (M, B, outputs)."""
        return self._rows(x.transpose(0, 1).flatten(1))  # no copy of what such a layer gives

    def shared(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (M, B, outputs)."""
        return self._rows(x)

    def _rows(self, rows: Tensor) -> Tensor:
        image = rows.reshape(1, len(rows), 1, -1).permute(0, 3, 1, 2)
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            image, self.weight, self.bias, _NO_PADDING, _ONE, _ONE, self.groups, self.activation, [], self.algorithm
        )
        return result.permute(0, 2, 3, 1).reshape(len(rows), self.members, -1).transpose(0, 1)


def available(device: torch.device) -> bool:
    """Whether this build of torch has oneDNN's operators for that device."""
    wanted = ("_convolution_pointwise", "_reorder_convolution_weight")
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(torch.ops.mkldnn, name) for name in wanted)
    )


class Layouts:
    """The same models, laid out for each size of batch that is asked for; the last few are kept.

    Args:
        dense: layers that are `Affine` are laid out, others stay what they are.
        able: whether there is anything to lay out; if not, the models are what they are.
    """

    def __init__(self, dense: Dense, *, able: bool = True) -> None:
        self.dense, self.able = dense, able
        self._made: dict[int, Dense] = {}

    def __call__(self, frames: int) -> Dense:
        """For batches of so many frames."""
        if not self.able:
            return self.dense
        if frames not in self._made:
            if len(self._made) == _KEPT:  # each is a copy of all weights
                del self._made[next(iter(self._made))]
            self._made[frames] = prepack(self.dense, frames)
        return self._made[frames]

    def clear(self) -> None:
        """Forget what was made."""
        self._made.clear()


def prepack(dense: Dense, frames: int) -> Dense:
    """The same models with prepacked layers, for batches of `frames`; a first layer of another kind stays."""
    layers = {step.target for step in dense.steps if isinstance(step.operation, Affine)}
    layers |= {dense.entry} if isinstance(dense.first, Affine) else set()
    behind = {
        step.sources[0]: step
        for step in dense.steps
        if _name(step) and step.sources[0] in layers and step.sources[0] in step.dead
    }

    def packed(layer: Any, target: str, *, shared: bool = False) -> Any:
        return _packed(layer, frames, behind.get(target), shared=shared) if isinstance(layer, Affine) else layer

    def result(target: str) -> str:
        return behind[target].target if target in behind else target

    steps = tuple(
        replace(step, target=result(step.target), operation=packed(step.operation, step.target))
        for step in dense.steps
        if step not in behind.values()
    )
    first = packed(dense.first, dense.entry, shared=True)
    return Dense(first, steps, packed(dense.last, ""), result(dense.entry), dense.exit)


def _packed(layer: Affine, frames: int, behind: Step | None, *, shared: bool) -> Prepacked:
    members, outputs, inputs = layer.weight.shape
    groups = 1 if shared else members
    name = _name(behind) if behind else "none"
    algorithm = getattr(behind.operation, "approximate", "none") if behind and name == "gelu" else ""
    weight = torch.ops.mkldnn._reorder_convolution_weight(
        layer.weight.reshape(members * outputs, inputs, 1, 1),
        _NO_PADDING,
        _ONE,
        _ONE,
        groups,
        [1, groups * inputs, frames, 1],
    )
    return Prepacked(weight, layer.bias.flatten(), members, groups, name, algorithm)


def _name(step: Step) -> str:
    """What oneDNN calls a step's operation; empty for what it cannot run behind a product."""
    return _ACTIVATIONS.get(step.operation) or _ACTIVATIONS.get(type(step.operation), "")
