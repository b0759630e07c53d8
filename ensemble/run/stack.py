"""`Stack`: models that compute the same with other weights, as one module.

The only door to torch.func. What may be stacked is decided here; how it runs fast, in `_engine`.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

_PLAIN = (bool, int, float, complex, str, bytes, tuple, frozenset, torch.dtype, torch.device, type(None))
_PROBED = 4  # rows on which a stack is compared with its members
_OWN = frozenset(nn.Module().__dict__) - {"training"}


class Stack(nn.Module):
    """M models of one structure with their parameters and buffers stacked: (B, ...) -> (M, B, C).

    torch's own check before stacking looks at the class only: it stacks ReLU with GELU, or a deeper
    model with a shallower one, and computes something else. Here models stack when their specs are
    equal, or, where there are none, when all their modules, settings and shapes agree; and then only
    if on a probe the stack's outputs are those of the models one by one.

    In train mode BatchNorm keeps statistics per member and dropout draws per member. The stacked
    parameters are ordinary ones: one optimiser over `parameters()` of the *sum* of the members'
    losses is M separate runs.

    Args:
        modules: at least one; they are copied, never changed.
        names: M names for messages; "0", "1", ... if empty.
        specs: M values whose equality means "stackable", such as `zoo.Spec`; compared instead of the structures.
        probe: (b, ...) inputs for the comparison; if None and the first layer is a Linear, random ones.

    Raises:
        ValueError: two models cannot be stacked; the message names both and the difference.

    Example:
        >>> models = [nn.Linear(3, 2) for _ in range(5)]
        >>> Stack(models)(torch.zeros(7, 3)).shape
        torch.Size([5, 7, 2])
    """

    template: nn.Module
    names: tuple[str, ...]

    def __init__(
        self,
        modules: Iterable[nn.Module],
        *,
        names: Sequence[str] = (),
        specs: Sequence[Hashable] = (),
        probe: Tensor | None = None,
    ) -> None:
        super().__init__()
        modules = list(modules)
        if not modules:
            msg = "expected at least one model to stack, got none"
            raise ValueError(msg)
        names = tuple(names) or tuple(map(str, range(len(modules))))
        for place, module in enumerate(modules):
            if specs:
                difference = "" if specs[place] == specs[0] else f"{specs[place]} differs from {specs[0]}"
            else:
                difference = unlike(module, modules[0])
            if difference:
                way_out = f"group members by {'spec' if specs else 'structure'} first"
                msg = f"cannot stack {names[place]!r} with {names[0]!r}: {difference}; {way_out}"
                raise ValueError(msg)
        states = [dict(chain(module.named_parameters(), module.named_buffers())) for module in modules]
        stacked = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
        hollow = {name: tensor.detach().to("meta") for name, tensor in states[0].items()}
        self._set(_holding(modules[0], hollow), stacked, names)
        inputs = linear_inputs(modules[0])
        if probe is None and inputs is not None:
            random = torch.randn(_PROBED, inputs, generator=torch.Generator().manual_seed(0))
            probe = random.to(next(modules[0].parameters()))
        if probe is not None:
            self._refuse_disparity(modules, probe[:_PROBED])

    @classmethod
    def from_state(cls, template: nn.Module, state: Mapping[str, Tensor], names: Sequence[str]) -> Self:
        """A stack of tensors that are stacked already, (M, ...) under the names of the template's state.

        Nothing is compared: their specs must be equal. The template, on the meta device, becomes the stack's own.
        """
        stack = cls.__new__(cls)
        nn.Module.__init__(stack)
        stack._set(template, state, tuple(names))
        return stack

    def _set(self, template: nn.Module, state: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
        self.names = names
        self._keys = {name: name.replace(".", "/") for name in state}  # torch allows no dot here
        for name, parameter in template.named_parameters():
            self.register_parameter(self._keys[name], nn.Parameter(state[name], parameter.requires_grad))
        for name, _ in template.named_buffers():
            self.register_buffer(self._keys[name], state[name])
        object.__setattr__(self, "template", template)  # not a submodule: its parameters must not count
        self.training = template.training

    def __len__(self) -> int:
        """Number of members, M."""
        return len(self.names)

    def train(self, mode: bool = True) -> Self:
        """Train mode, or evaluation mode, for all members."""
        self.template.train(mode)
        return super().train(mode)

    def state(self) -> dict[str, Tensor]:
        """Stacked parameters and buffers, (M, ...), under the members' own names."""
        return {name: getattr(self, key) for name, key in self._keys.items()}

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) shared by all members -> (M, B, C)."""

        def one(state: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.template, state, (x,))  # type: ignore[no-any-return]  # untyped in torch

        randomness = "different" if self.training else "error"
        return vmap(one, in_dims=(0, None), randomness=randomness)(self.state(), x)

    def member(self, index: int) -> nn.Module:
        """One member as a module that shares its memory with the stack."""
        return _holding(self.template, {name: tensor.detach()[index] for name, tensor in self.state().items()})

    def unstack(self) -> list[nn.Module]:
        """The members as M ordinary modules with memory of their own, in order."""
        states = [{name: tensor.detach()[m].clone() for name, tensor in self.state().items()} for m in range(len(self))]
        return [_holding(self.template, state) for state in states]

    def _refuse_disparity(self, modules: Sequence[nn.Module], probe: Tensor) -> None:
        modes = {part: part.training for whole in (*modules, self.template, self) for part in whole.modules()}
        try:
            for whole in (*modules, self):
                whole.eval()
            with torch.inference_mode():
                alone, together = torch.stack([module(probe) for module in modules]), self(probe)
        finally:
            for part, mode in modes.items():
                part.training = mode
        scale = alone.abs().amax().clamp(min=1)
        apart = (alone - together).abs().flatten(1).amax(1) / scale
        worst = int(apart.nan_to_num(torch.inf).argmax())
        tolerance = 1e-4 if alone.dtype in (torch.float32, torch.float64) else 5e-2
        if not apart[worst] <= tolerance:
            msg = (
                f"cannot stack {self.names[worst]!r} with {self.names[0]!r}: on a probe their outputs differ by "
                f"{float(apart[worst]):.2g} from those of the models one by one; run them apart"
            )
            raise ValueError(msg)


def unlike(one: nn.Module, other: nn.Module) -> str:
    """The first difference between two models that decides what they compute, other than weights; "" if none.

    Module by module it compares name, class, printed description, plain settings, and the shapes and types of
    parameters and buffers.

    Example:
        >>> unlike(nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU()))
        "'0' is ReLU() instead of GELU(approximate='none')"
    """
    for (name, a), (path, b) in zip(one.named_modules(), other.named_modules(), strict=False):
        if name != path:
            return f"it has {name!r} instead of {path!r}"
        if type(a) is not type(b) or a.extra_repr() != b.extra_repr():
            first, second = (f"{type(module).__name__}({module.extra_repr()})" for module in (a, b))
            return f"{name!r} is {first} instead of {second}"
        for what, mine in _fixed(a).items():
            if mine != _fixed(b)[what]:
                return f"the {what} of {name!r} are {mine} instead of {_fixed(b)[what]}"
    counts = [sum(1 for _ in module.modules()) for module in (one, other)]
    return "" if counts[0] == counts[1] else f"it has {counts[0]} modules instead of {counts[1]}"


def _fixed(module: nn.Module) -> dict[str, object]:
    """A module's plain settings, and the shapes and types of its own parameters and buffers."""
    settings = {name: value for name, value in vars(module).items() if name not in _OWN and isinstance(value, _PLAIN)}
    own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return {"settings": settings, "tensors": {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own}}


def linear_inputs(module: nn.Module) -> int | None:
    """Length of the inputs of the first layer with weights, where that is a Linear."""
    first = next((m for m in module.modules() if any(True for _ in m.parameters(recurse=False))), None)
    return first.in_features if isinstance(first, nn.Linear) else None


def _holding(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `module` with these tensors as its own; tied tensors stay tied."""
    given: dict[int, Tensor] = {id(p): nn.Parameter(state[n], p.requires_grad) for n, p in module.named_parameters()}
    given |= {id(buffer): state[name] for name, buffer in module.named_buffers()}
    return copy.deepcopy(module, given)
