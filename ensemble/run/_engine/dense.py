"""`Dense`: a stack of models made of Linear layers, with BatchNorm folded in.

The first layer, whose input all members share, is one product with M * width outputs; every later layer is
one batched product. A layer's result has the shape (M, B, width), and lies in memory as (B, M * width) where possible.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor, fx, nn

from ensemble.run.stack import Stack
from zoo.models.blocks import activation_of

Operation = Callable[..., Tensor]

_SUMS = {operator.add, torch.add}


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

    def to(self, dtype: torch.dtype) -> Self:
        """The same in another type."""
        return type(self)(self.weight.to(dtype), self.bias.to(dtype))


@dataclass(frozen=True)
class Step:
    """`values[target] = operation(*values[sources])`; the values `dead` are not read again."""

    target: str
    operation: Operation
    sources: tuple[str, ...]
    dead: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dense:
    """M models as steps, BatchNorm folded into the Linears.

    Args:
        steps: in order; the first is a Linear on the shared input, the last a Linear that gives the logits.
    """

    steps: tuple[Step, ...]

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

        def cast_(step: Step) -> Step:
            return replace(step, operation=step.operation.to(dtype)) if isinstance(step.operation, Affine) else step

        return Dense(tuple(map(cast_, self.steps)))


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
    reader = _Reader(stack.template, state)
    for node in _traced(stack.template).nodes:
        reader.read(node)
    return reader.result()


class _Reader:
    """Turns the nodes of a traced model into steps, one after another."""

    def __init__(self, template: nn.Module, state: Mapping[str, Tensor]) -> None:
        self.template, self.state = template, state
        self.names: dict[fx.Node, str] = {}  # which value a node stands for
        self.steps: list[Step] = []
        self.inputs: list[str] = []
        self.output = ""

    def read(self, node: fx.Node) -> None:
        sources = [argument for argument in node.args if isinstance(argument, fx.Node)]
        plain = len(sources) == len(node.args) and not node.kwargs
        match node.op:
            case "placeholder":
                self.names[node] = node.name
                self.inputs.append(node.name)
            case "call_module" if plain and len(sources) == 1:
                self.names[node] = self._layer(node, sources[0])
            case "call_function" if plain and len(sources) == 2 and node.target in _SUMS:
                self.names[node] = self._step(node, torch.add, sources)
            case "call_function" if plain and (known := activation_of(node.target)) and node.target != known.in_place:
                self.names[node] = self._step(node, cast(Operation, node.target), sources)
            case "output" if plain:
                self.output = self.names[sources[0]]
            case _:
                raise NotDenseError(f"{node.name!r} is not a Linear, BatchNorm1d, activation or sum")

    def result(self) -> Dense:
        uses = [source for step in self.steps for source in step.sources] + [self.output]
        ends = [step.operation for step in (self.steps[:1] + self.steps[1:][-1:])]
        if len(ends) != 2 or not all(isinstance(end, Affine) for end in ends) or self.steps[-1].target != self.output:
            raise NotDenseError("it does not begin and end with a Linear")
        if self.steps[0].sources != tuple(self.inputs) or uses.count(self.inputs[0]) != 1:
            raise NotDenseError("its input goes to more than one layer")
        return Dense(tuple(_dying(step, self.steps[place + 1 :]) for place, step in enumerate(self.steps)))

    def _layer(self, node: fx.Node, source: fx.Node) -> str:
        path = str(node.target)
        layer = self.template.get_submodule(path)
        match layer:
            case nn.Identity() | nn.Dropout() | nn.AlphaDropout():
                return self.names[source]
            case nn.Linear() if type(layer) is nn.Linear:
                return self._step(node, self._affine(path, layer), [source])
            case nn.BatchNorm1d() if type(layer) is nn.BatchNorm1d:
                return self._fold(path, layer, source)
            case _ if activation_of(layer):
                return self._step(node, layer, [source])
        raise NotDenseError(f"{path!r} is {type(layer).__name__}, not Linear, BatchNorm1d or a pointwise activation")

    def _step(self, node: fx.Node, operation: Operation, sources: list[fx.Node]) -> str:
        self.steps.append(Step(node.name, operation, tuple(self.names[source] for source in sources)))
        return node.name

    def _affine(self, path: str, layer: nn.Linear) -> Affine:
        weight = self._tensor(f"{path}.weight")
        bias = weight.new_zeros(weight.shape[:2]) if layer.bias is None else self._tensor(f"{path}.bias")
        return Affine(weight, bias)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.state:
            raise NotDenseError(f"{name!r} is shared between layers")
        return self.state[name]

    def _fold(self, path: str, norm: nn.BatchNorm1d, source: fx.Node) -> str:
        """Let the Linear just before do the work of this norm; in float64, so that it is exact up to one rounding."""
        before = self.steps[-1] if self.steps else None
        if before is None or before.target != source.name or not isinstance(before.operation, Affine):
            raise NotDenseError(f"BatchNorm {path!r} does not come directly after a Linear")
        if len(source.users) > 1 or not norm.track_running_stats:
            raise NotDenseError(f"BatchNorm {path!r} has no running statistics, or its input is also used elsewhere")
        scale = (self._tensor(f"{path}.running_var").double() + norm.eps).rsqrt()
        shift = -scale * self._tensor(f"{path}.running_mean").double()
        if norm.affine:
            gain = self._tensor(f"{path}.weight").double()
            scale, shift = scale * gain, shift * gain + self._tensor(f"{path}.bias").double()
        old = before.operation
        folded = Affine((old.weight * scale.unsqueeze(-1)).float(), (old.bias * scale + shift).float())
        self.steps[-1] = Step(before.target, folded, before.sources)
        return before.target


def _dying(step: Step, later: Sequence[Step]) -> Step:
    """The step with the values that are not read after it; it overwrites its first source where that is one."""
    alive = {source for after in later for source in after.sources}
    dead = tuple(sorted(set(step.sources) - alive))
    operation = step.operation
    if step.sources[0] in dead and step.sources.count(step.sources[0]) == 1:
        known = activation_of(operation)
        if operation is torch.add:
            operation = Tensor.add_
        elif known and known.in_place:
            operation = known.in_place
    return Step(step.target, operation, step.sources, dead)


class _Tracer(fx.Tracer):
    """Torch's tracer, which also takes an activation of the user's own for one step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether not to look inside."""
        return super().is_leaf_module(m, module_qualified_name) or activation_of(m) is not None


def _traced(template: nn.Module) -> fx.Graph:
    hooked = [n for n, m in template.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        raise NotDenseError(f"module {hooked[0]!r} has a hook")
    try:
        return _Tracer().trace(template)
    except Exception as error:  # whatever a foreign forward does with a symbol
        raise NotDenseError(f"its forward cannot be traced ({error})") from error
