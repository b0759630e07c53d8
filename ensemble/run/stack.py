"""`Stack`: models that compute the same with other weights, as one module.

The only door to torch.func. What may be stacked is decided here; how it runs fast, in `_engine`.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, eq, is_
from types import MethodType
from typing import Any, Self
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from zoo._names import checked
from zoo.models.spec import refuse_lazy

_PROBED = 4  # rows on which a stack is compared with its members
_LOOKED_AT, _PER_FRAME = 2000, 16  # attributes that are compared before every batch, or for each frame of a larger one
_FEW, _SMALL, _MANY = 64, 2**18, 2048  # tensors and bytes of small models; frames before which all values are summed
_version = attrgetter("_version")  # how often a tensor was written in place
_OWN = frozenset(nn.Module().__dict__) - {"training"}


class Stack(nn.Module):
    """M models of one structure with their parameters and buffers stacked: (B, ...) -> (M, B, C).

    torch's own check before stacking looks at the class only: it stacks ReLU with GELU, or a deeper
    model with a shallower one, and computes something else. Here models stack when their specs, if they have any, and
    all their modules, attributes and shapes agree; and then only if on a probe the stack's outputs are those of the
    models one by one. Inputs that the models write into are copied first.

    In train mode BatchNorm keeps statistics per member and dropout draws per member. The stacked
    parameters are ordinary ones: one optimiser over `parameters()` of the *sum* of the members'
    losses is M separate runs.

    Args:
        modules: at least one; they are copied, never changed.
        names: M names for messages; "0", "1", ... if empty.
        specs: M values that have to be equal, such as `zoo.Spec`.
        probe: (b, ...) inputs for the comparison, of which some are drawn; if None and the first layer is a Linear,
            random ones, where the models take those.

    Raises:
        ValueError: two models cannot be stacked (the message names both and the difference), a model's weights are not
            there yet, or it is random in evaluation mode.

    Example:
        >>> models = [nn.Linear(3, 2) for _ in range(5)]
        >>> Stack(models)(torch.zeros(7, 3)).shape
        torch.Size([5, 7, 2])
    """

    template: nn.Module
    names: tuple[str, ...]

    @checked
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
            refuse_lazy(module, names[place])
            differs = bool(specs) and specs[place] != specs[0]
            difference = f"{specs[place]} differs from {specs[0]}" if differs else unlike(module, modules[0])
            if difference:
                way_out = f"group members by {'spec' if differs else 'structure'} first"
                msg = f"cannot stack {names[place]!r} with {names[0]!r}: {difference}; {way_out}"
                raise ValueError(msg)
        states = [dict(chain(module.named_parameters(), module.named_buffers())) for module in modules]
        stacked = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
        hollow = {name: tensor.detach().to("meta") for name, tensor in states[0].items()}
        self._set(_holding(modules[0], hollow), stacked, names)
        guessed, inputs = probe is None, linear_inputs(modules[0])
        if probe is None and inputs is not None:
            random = torch.randn(_PROBED, inputs, generator=torch.Generator().manual_seed(0))
            probe = random.to(next(modules[0].parameters()))
        if probe is not None:
            self._refuse_disparity(modules, probe[drawn(len(probe), _PROBED)], guessed=guessed)

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
        self._writes: bool | None = None  # into its inputs
        own = dict(chain(template.named_parameters(), template.named_buffers()))
        self._keys = {name: name.replace(".", "/") for name in own}  # torch allows no dot here
        for name, tensor in own.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(self._keys[name], nn.Parameter(state[name], tensor.requires_grad))
            else:
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
        if self._writes:
            return self._together(x.clone())
        if self._writes is None:  # the first time: an inference tensor does not count how often it is written
            with torch.inference_mode(False):
                own = x.clone()
            version = own._version
            outputs = self._together(own)
            self._writes = own._version != version
            return outputs
        return self._together(x)

    def _together(self, x: Tensor) -> Tensor:
        def one(state: dict[str, Tensor], x: Tensor) -> Tensor:
            answer: Tensor = tensor_in(functional_call(self.template, state, (x,)))
            return answer

        randomness = "different" if self.training else "error"
        try:
            return vmap(one, in_dims=(0, None), randomness=randomness)(self.state(), x)
        except RuntimeError as error:
            if self.training or "randomness" not in str(error):
                raise
            msg = f"expected models that are not random in evaluation mode, got {', '.join(self.names)}: a layer draws "
            raise ValueError(msg + "random numbers, such as dropout that ignores the mode") from error

    def member(self, index: int) -> nn.Module:
        """One member as a module that shares its memory with the stack."""
        return _holding(self.template, {name: tensor.detach()[index] for name, tensor in self.state().items()})

    def unstack(self) -> list[nn.Module]:
        """The members as M ordinary modules with memory of their own, in order."""
        states = [{name: tensor.detach()[m].clone() for name, tensor in self.state().items()} for m in range(len(self))]
        return [_holding(self.template, state) for state in states]

    def _refuse_disparity(self, modules: Sequence[nn.Module], probe: Tensor, *, guessed: bool) -> None:
        modes = {part: part.training for whole in (*modules, self.template, self) for part in whole.modules()}
        try:
            for whole in (*modules, self):
                whole.eval()
            with torch.no_grad():
                try:
                    alone = torch.stack([tensor_in(module(probe.clone())) for module in modules])
                except Exception as error:
                    if guessed:  # it takes inputs of another form
                        return
                    msg = f"expected models that take {tuple(probe.shape)} inputs of {probe.dtype}, got: {error}"
                    raise ValueError(msg) from error
                try:
                    together = self(probe)
                except (RuntimeError, TypeError, NotImplementedError) as error:  # what vmap refuses
                    msg = f"cannot stack {', '.join(self.names)}: {first_line(error)}; run them one by one"
                    raise ValueError(msg) from error
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


class Watch:
    """Notices that models are changed: a tensor is written, or a tensor, layer, attribute or mode replaced.

    What is written behind torch's back, through `.data` or memory shared with NumPy, only a look at all values shows:
    it is taken where it costs little, for small models and for large batches.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self.renew()

    def renew(self) -> None:
        """Take the models as they should be from now on."""
        slots: list[tuple[int, dict[str, Any], str]] = []
        for place, module in enumerate(self._modules):
            for part in module.modules():
                tables = [vars(part), part._parameters, part._buffers, part._modules]
                tables += [value for name, value in vars(part).items() if name not in _OWN and isinstance(value, dict)]
                plain = [table for table in tables if isinstance(table, dict)]  # others in compiled modules
                slots += [(place, table, name) for table in plain for name in table if name not in _OWN]
        self._places, self._tables = [place for place, _, _ in slots], [table for _, table, _ in slots]
        self._names = [name for _, _, name in slots]
        self._values = [table[name] for _, table, name in slots]
        both = list(zip(self._places, self._values, strict=True))
        held = [(place, value) for place, value in both if isinstance(value, Tensor) and _has_memory(value)]
        self._owners, self._tensors = [place for place, _ in held], [tensor for _, tensor in held]
        self._versions, self._memory = [*map(_version, self._tensors)], [*map(Tensor.data_ptr, self._tensors)]
        self._lists = [(place, value, [*value]) for place, value in both if isinstance(value, list)]
        self._small = len(held) <= _FEW and sum(tensor.nbytes for tensor in self._tensors) <= _SMALL
        self._sums = self._summed()

    def changed(self, frames: int) -> int | None:
        """The position of a model that is no longer as it should be, or None; before a batch of so many frames."""
        if (now := [*map(_version, self._tensors)]) != self._versions:
            return self._owners[[*map(eq, now, self._versions)].index(False)]
        if len(self._values) > max(_LOOKED_AT, _PER_FRAME * frames):
            return None
        if (now := [*map(Tensor.data_ptr, self._tensors)]) != self._memory:
            return self._owners[[*map(eq, now, self._memory)].index(False)]
        kept = [*map(is_, map(dict.get, self._tables, self._names), self._values)]
        if not all(kept):
            return self._places[kept.index(False)]
        for place, value, items in self._lists:
            if len(value) != len(items) or not all(map(is_, value, items)):
                return place
        if (self._small or frames >= _MANY) and (sums := self._summed()) != self._sums:
            return self._owners[[*map(eq, sums, self._sums)].index(False)]
        return None

    def _summed(self) -> list[str]:
        """The sum of each tensor's values, as text, in which NaN is equal to NaN."""
        with torch.no_grad():
            sums = [tensor.detach().sum() for tensor in self._tensors]
            for device in {each.device for each in sums if each.is_cuda}:  # one wait for all that are there
                places = [place for place, each in enumerate(sums) if each.device == device]
                values = torch.stack([sums[place].to(torch.complex128) for place in places]).cpu()
                for place, value in zip(places, values, strict=True):
                    sums[place] = value
            return [repr(each.item()) for each in sums]


def _has_memory(tensor: Tensor) -> bool:
    """Whether it counts how often it is written, and has its values in one place."""
    return tensor.layout is torch.strided and not tensor.is_inference() and not tensor.is_meta


def tensor_in(answer: Any) -> Any:
    """A model's answer, or its `.logits` where it has such a tensor."""
    logits = None if isinstance(answer, Tensor) else getattr(answer, "logits", None)
    return logits if isinstance(logits, Tensor) else answer


def drawn(count: int, most: int) -> Tensor:
    """Positions of at most so many rows, spread evenly from the first to the last."""
    return torch.linspace(0, max(count - 1, 0), min(count, most)).round().long()


def first_line(error: Exception) -> str:
    """Of its message; its class where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unlike(one: nn.Module, other: nn.Module, known: frozenset[tuple[int, int]] = frozenset()) -> str:
    """The first difference between two models that may decide what they compute, other than weights; "" if none.

    Module by module it compares name, class, printed description, attributes, hooks, and the shapes and types of
    parameters and buffers, and whether these are trained. Attributes agree if they are the same object, or plain data
    of equal content: numbers, text, arrays, tensors, and containers of such. Two functions made by the same line of
    code do not agree, for each may hold values of its own. `known` are pairs of ids of objects that agree.

    Example:
        >>> unlike(nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU()))
        "'0' is ReLU() instead of GELU(approximate='none')"
    """
    paired = frozenset((id(a), id(b)) for a, b in zip(_parts(one), _parts(other), strict=False)) | known
    for (name, a), (path, b) in zip(one.named_modules(), other.named_modules(), strict=False):
        if name != path:
            return f"it has {name!r} instead of {path!r}"
        if type(a) is not type(b) or a.extra_repr() != b.extra_repr():
            first, second = (f"{type(module).__name__}({module.extra_repr()})" for module in (a, b))
            return f"{name!r} is {first} instead of {second}"
        if _tensors(a) != _tensors(b):
            return f"the tensors of {name!r} are {_tensors(a)} instead of {_tensors(b)}"
        mine, theirs = _attributes(a), _attributes(b)
        if mine.keys() != theirs.keys():
            return f"the attributes of {name!r} are {sorted(mine)} instead of {sorted(theirs)}"
        for key, value in mine.items():
            if not _same(value, theirs[key], paired):
                return f"{key!r} of {name!r} is {_brief(value)} instead of {_brief(theirs[key])}"
    counts = [sum(1 for _ in module.modules()) for module in (one, other)]
    if counts[0] != counts[1]:
        return f"it has {counts[0]} modules instead of {counts[1]}"
    names = [{name for name, _ in chain(model.named_parameters(), model.named_buffers())} for model in (one, other)]
    return "" if names[0] == names[1] else f"it shares other tensors between layers ({sorted(names[0] ^ names[1])})"


def _parts(model: nn.Module) -> Iterator[object]:
    """What is compared, or stacked, in its own right."""
    yield from chain(model.modules(), model.parameters(), model.buffers())


def _tensors(module: nn.Module) -> dict[str, tuple[object, ...]]:
    """Shape, type and whether it is trained of a module's own parameters and buffers."""
    own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return {name: (tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in own}


def _attributes(module: nn.Module) -> dict[str, object]:
    """What decides, besides its layers and tensors, what a module computes: attributes, absent parts, hooks."""
    found: dict[str, object] = {name: value for name, value in vars(module).items() if name not in _OWN}
    hooks = [*module._forward_pre_hooks.values()], [*module._forward_hooks.values()]
    return found | ({"its hooks": hooks} if any(hooks) else {})


def _same(one: object, other: object, paired: frozenset[tuple[int, int]]) -> bool:
    """Whether two attributes certainly have one effect; `paired` are modules that are compared elsewhere."""
    if one is other or (id(one), id(other)) in paired:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.dtype, one.shape, one.layout, one.device) == (other.dtype, other.shape, other.layout, other.device)
        return alike and not one.is_meta and torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and not one.dtype.hasobject and np.array_equal(one, other)
    paired = paired | {(id(one), id(other))}  # what contains itself is not entered twice
    if isinstance(one, nn.Module) and isinstance(other, nn.Module):
        states = [dict(chain(part.named_parameters(), part.named_buffers())) for part in (one, other)]
        return not unlike(one, other, paired) and all(
            torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return [*one] == [*other] and all(_same(value, other[key], paired) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b, paired) for a, b in zip(one, other, strict=True))
    if isinstance(one, partial) and isinstance(other, partial):
        return _same((one.func, one.args, one.keywords), (other.func, other.args, other.keywords), paired)
    if isinstance(one, ref) and isinstance(other, ref):
        return _same(one(), other(), paired)
    if isinstance(one, MethodType) and isinstance(other, MethodType):
        return one.__func__ is other.__func__ and _same(one.__self__, other.__self__, paired)
    if isinstance(one, float | complex):
        return repr(one) == repr(other)  # which tells 0.0 from -0.0
    try:  # equality that a class declares, not that of places in memory
        return type(one).__eq__ is not object.__eq__ and bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return False


def _brief(value: object) -> str:
    """For a message: a value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def linear_inputs(module: nn.Module) -> int | None:
    """Length of the inputs of the first layer with weights, where that is a Linear."""
    first = next((m for m in module.modules() if any(True for _ in m.parameters(recurse=False))), None)
    return first.in_features if isinstance(first, nn.Linear) else None


def _holding(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `module` with these tensors as its own; tied tensors stay tied."""
    given: dict[int, Tensor] = {id(p): nn.Parameter(state[n], p.requires_grad) for n, p in module.named_parameters()}
    given |= {id(buffer): state[name] for name, buffer in module.named_buffers()}
    return copy.deepcopy(module, given)
