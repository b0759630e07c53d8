"""`Dense`: a stack of models made of Linear layers, with BatchNorm folded in.

The first layer, whose input all members share, is one product with M * width outputs; every later layer is
one batched product. A layer's result has the shape (M, B, width), and lies in memory as (B, M * width) where possible.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_linear_bn_weights

from ensemble.run.stack import Stack
from zoo.models.blocks import Dropout, activation_of

Operation = Callable[..., Tensor]

_SUMS = (operator.add, torch.add)
_IDLE = (nn.Identity, nn.Dropout, Dropout, nn.AlphaDropout)  # in evaluation mode


class NotDenseError(ValueError):
    """The models do not fold; the message names the part that does not."""


@dataclass(frozen=True)
class Affine:
    """A Linear layer of every member: weight (M, outputs, inputs), bias (M, outputs)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(M, B, inputs), or (B, inputs) that all members share -> (M, B, outputs)."""
        if x.ndim == 3:
            return torch.bmm(x, self.weight.mT).add_(self.bias.unsqueeze(1))
        product = torch.addmm(self.bias.flatten(), x, self.weight.flatten(0, 1).t())
        return product.view(len(x), *self.bias.shape).transpose(0, 1)


@dataclass(frozen=True)
class Step:
    """`values[target] = operation(*values[sources])`; the values `dead` are not read again."""

    target: str
    operation: Operation
    sources: tuple[str, ...]
    dead: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dense:
    """M models as steps, BatchNorm folded into the Linears."""

    steps: tuple[Step, ...]  # the first is a Linear on the shared input, the last a Linear that gives the logits

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs of the first layer, such as (B, inputs) -> logits (M, B, C)."""
        values = dict.fromkeys(self.steps[0].sources, x)
        for step in self.steps:
            values[step.target] = step.operation(*(values[name] for name in step.sources))
            for name in step.dead:
                del values[name]
        return values[self.steps[-1].target]

    @property
    def first(self) -> Affine:
        """The first layer, as it was traced."""
        return cast(Affine, self.steps[0].operation)

    def to(self, dtype: torch.dtype) -> Dense:
        """The same with weights of another type."""
        steps = list(self.steps)
        for place, step in enumerate(steps):
            if isinstance(step.operation, Affine):
                layer = Affine(step.operation.weight.to(dtype), step.operation.bias.to(dtype))
                steps[place] = replace(step, operation=layer)
        return Dense(tuple(steps))


def dense(stack: Stack) -> Dense:
    """The stack's models, traced and folded.

    Raises:
        NotDenseError: the models contain anything but Linear, BatchNorm1d after a Linear, pointwise activations and
            sums, do not begin and end with a Linear, or have weights that are not float32.
    """
    state = {name: tensor.detach() for name, tensor in stack.state().items()}
    other = {t.dtype for t in state.values() if t.is_floating_point()} - {torch.float32}
    if other:
        raise NotDenseError(f"its weights are {other.pop()}")
    steps: list[Step] = []
    inputs: list[str] = []
    values: dict[fx.Node, str] = {}  # a layer that does nothing, or is folded, gives the value of the one before
    for node in _traced(stack.template).nodes:
        sources = [argument for argument in node.args if isinstance(argument, fx.Node)]
        layer = stack.template.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.op == "placeholder":
            inputs.append(node.name)
            values[node] = node.name
        elif len(sources) != len(node.args) or node.kwargs:
            raise NotDenseError(f"{node.name!r} is not a Linear, BatchNorm1d, activation or sum")
        elif node.op == "output" or type(layer) in _IDLE:
            values[node] = values[sources[0]]
        elif type(layer) is nn.BatchNorm1d:
            if not steps or steps[-1].target != sources[0].name or not isinstance(steps[-1].operation, Affine):
                raise NotDenseError(f"BatchNorm {node.target!r} does not come directly after a Linear")
            if len(sources[0].users) > 1 or not layer.track_running_stats:
                raise NotDenseError(f"BatchNorm {node.target!r} has no running statistics, or shares its input")
            steps[-1] = replace(steps[-1], operation=_folded(steps[-1].operation, layer, f"{node.target}.", state))
            values[node] = values[sources[0]]
        else:
            operation = _operation(node, layer, len(sources), state)
            steps.append(Step(node.name, operation, tuple(values[source] for source in sources)))
            values[node] = node.name
    read = Counter([source for step in steps for source in step.sources] + [values[node]])  # the last is the output
    ends = [step.operation for step in steps[:1] + steps[1:][-1:]]
    if len(ends) != 2 or not all(isinstance(end, Affine) for end in ends) or steps[-1].target != values[node]:
        raise NotDenseError("it does not begin and end with a Linear")
    if steps[0].sources != tuple(inputs) or read[inputs[0]] != 1:
        raise NotDenseError("its input goes to more than one layer")
    return Dense(_in_place(steps))


def _operation(node: fx.Node, layer: nn.Module | None, sources: int, state: Mapping[str, Tensor]) -> Operation:
    """What a node of so many sources computes for all members."""
    known = activation_of(node.target if layer is None else layer)
    if type(layer) is nn.Linear:
        weight = _tensor(state, f"{node.target}.weight")
        bias = weight.new_zeros(weight.shape[:2]) if layer.bias is None else _tensor(state, f"{node.target}.bias")
        return Affine(weight, bias)
    if node.op == "call_function" and sources == 2 and node.target in _SUMS:
        return torch.add
    if known and node.target != known.in_place:
        return cast(Operation, layer or node.target)
    what = repr(node.name) if layer is None else f"{node.target!r} is {type(layer).__name__}, which"
    raise NotDenseError(f"{what} is not a Linear, BatchNorm1d, activation or sum")


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise NotDenseError(f"{name!r} is shared between layers")
    return state[name]


def _folded(layer: Affine, norm: nn.BatchNorm1d, prefix: str, state: Mapping[str, Tensor]) -> Affine:
    """The layer with the work of the norm behind it; in float64, so that it is exact up to one rounding."""
    mean, variance = (_tensor(state, prefix + name).double() for name in ("running_mean", "running_var"))
    gain, shift = torch.ones_like(mean), torch.zeros_like(mean)
    if norm.affine:
        gain, shift = (_tensor(state, prefix + name).double() for name in ("weight", "bias"))
    weight, bias = layer.weight.double(), layer.bias.double()
    weight, bias = fuse_linear_bn_weights(weight, bias, mean, variance, norm.eps, gain, shift)
    return Affine(weight.detach().float(), bias.detach().float())


def _in_place(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps with the values that are not read after them; each overwrites its first source where that is one."""
    done: list[Step] = []
    alive: set[str] = set()
    for step in reversed(steps):
        dead = tuple(sorted(set(step.sources) - alive))
        operation, known = step.operation, activation_of(step.operation)
        if step.sources[0] in dead and step.sources.count(step.sources[0]) == 1:
            if operation is torch.add:
                operation = Tensor.add_
            elif known and known.in_place:
                operation = known.in_place
        done.append(Step(step.target, operation, step.sources, dead))
        alive.update(step.sources)
    return tuple(reversed(done))


class _Tracer(fx.Tracer):
    """Torch's tracer, which also takes an activation of the user's own for one step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether not to look inside."""
        return super().is_leaf_module(m, module_qualified_name) or type(m) is Dropout or activation_of(m) is not None


def _traced(template: nn.Module) -> fx.Graph:
    hooked = [n for n, m in template.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        raise NotDenseError(f"module {hooked[0]!r} has a hook")
    try:
        return _Tracer().trace(template)
    except Exception as error:  # whatever a foreign forward does with a symbol
        raise NotDenseError(f"its forward cannot be traced ({error})") from error
