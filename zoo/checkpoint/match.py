"""Whether tensors fit a model, and the model that they make.

torch's own strict loading raises after it has changed some tensors, and lets pass other element types, NaN, and
negative variances. Here all differences are found first and reported at once, before one tensor is touched; nothing is
broadcast into place, and what is one tensor under two names stays one tensor.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo._names import usable_device
from zoo.checkpoint.header import DTYPES, CheckpointError
from zoo.models.architectures import find_architecture
from zoo.models.spec import Spec, build, refuse_lazy

Tensors = Mapping[str, Tensor]
_COUNTER = "num_batches_tracked"
_MOST_LISTED = 20


# ---- the tensors of a model


def state_of(module: nn.Module, name: str = "the model") -> dict[str, Tensor]:
    """A module's `state_dict`, in which every entry is a parameter or a buffer of its own that a file can hold.

    Raises:
        CheckpointError: STATE, DTYPE: lazy layers, extra state, what a hook makes or renames, quantised, sparse or
            complex tensors, elements that share one place in memory; names every such entry.
    """
    try:
        refuse_lazy(module, name)
    except ValueError as error:
        raise CheckpointError("STATE", str(error)) from None
    state = module.state_dict()
    _refuse_strange(state, _strange, name)
    own = dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))
    _refuse_strange({key: (value, own.get(key)) for key, value in state.items()}, _strange_place, name)
    if unknown := [key for key, value in state.items() if value.dtype not in DTYPES.values()]:
        kinds = ", ".join(f"{key} of {state[key].dtype}" for key in unknown)
        raise CheckpointError("DTYPE", f"expected tensors of {', '.join(DTYPES)} in {name}, got {kinds}")
    return state


def _refuse_strange(state: Mapping[str, Any], why: Callable[[Any], str], name: str) -> None:
    listed = [f"{key}: {reason}" for key, value in state.items() if (reason := why(value))]
    if listed:
        found = "; ".join(listed[:_MOST_LISTED])
        raise CheckpointError("STATE", f"expected plain tensors as the state of {name}, got {found}")


def _strange(value: object) -> str:
    """Why a file cannot hold a value, in a few words, or ""."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__}, which is no tensor"
    wrapped = type(value) is not Tensor and hasattr(value, "__tensor_flatten__")
    plain = value.layout is torch.strided and not value.is_quantized and not value.is_nested and not wrapped
    return "" if plain else "a quantised, sparse, nested or wrapped tensor"


def _strange_place(both: tuple[Tensor, Tensor | None]) -> str:
    """Why an entry, beside the tensor of that name in its module, cannot be given back to it; "" if it can."""
    value, own = both
    if own is None or _storage(own) != _storage(value) or own.shape != value.shape:
        return "extra state, or made by a hook"
    overlaps = any(size > 1 and step == 0 for size, step in zip(value.shape, value.stride(), strict=True))
    return "elements that share one place in memory" if overlaps else ""


def owned(tensors: Tensors, name: str) -> dict[str, Tensor]:
    """Tensors as a file holds them: on the CPU, contiguous, each in a memory of its own; others are copied.

    Raises:
        CheckpointError: STATE: what is no plain tensor, or has no values.
    """
    _refuse_strange(tensors, _strange, name)
    if hollow := [key for key, value in tensors.items() if value.is_meta]:
        raise CheckpointError("STATE", f"expected values in {name}, got tensors on the meta device: {hollow}")
    found: dict[str, Tensor] = {}
    memory: set[int] = set()
    for key, tensor in tensors.items():
        plain = tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad and not tensor.is_neg()
        own = tensor if plain else tensor.detach().resolve_neg().cpu().contiguous()
        place = _storage(own)
        found[key] = own.clone() if place in memory else own
        memory.add(place)
    return found


def _storage(tensor: Tensor) -> int:
    """Identity of a tensor's memory, also on the meta device."""
    return int(tensor.untyped_storage()._cdata)


# ---- models made of tensors


def restore(module: nn.Module, tensors: Tensors) -> nn.Module:
    """Copy `tensors` into the parameters and buffers of `module`, all of them or none.

    Returns:
        `module`.

    Raises:
        CheckpointError: STATE, MISFIT, NOT_FINITE or VARIANCE; `module` is then as it was.
    """
    _refuse_strange(tensors, _strange, "a model")
    state = _fitting(module, tensors)
    check_values(tensors)
    _copy(tensors, state)
    return module


def rebuilt(spec: Spec, tensors: Tensors, device: torch.device | str = "cpu") -> nn.Module:
    """A new model of these tensors, in eval mode.

    What is in no `state_dict` is as the architecture's builder makes it with seed 0.
    """
    hollow = outline(spec)
    place = usable_device(device)
    module = build(spec, seed=0, device=place) if hollow is None else hollow.to_empty(device=place)
    _copy(tensors, _fitting(module, tensors))
    return module.eval()


def _fitting(module: nn.Module, tensors: Tensors) -> Tensors:
    """The state of a module that the tensors fit."""
    state = state_of(module)
    check_fit(state, tensors)
    return state


def _copy(tensors: Tensors, state: Tensors) -> None:
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])


def outline(spec: Spec) -> nn.Module | None:
    """The spec's model on the meta device; None if tensors of its state are not all that it holds.

    Then a builder has made other tensors that decide what the model computes: buffers that are in no `state_dict`,
    plain attributes, constants of a closure, a second name for one tensor. Such a model must be built with values.
    """
    with _Made() as made:
        module = build(spec, device="meta")
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    single = len({_storage(tensor) for _, tensor in tensors}) == len(tensors)
    hollow = all(tensor.is_meta for _, tensor in tensors)
    if single and hollow and module.state_dict().keys() == dict(tensors).keys() and not made.beside(module):
        return module
    return None


class _Made(TorchFunctionMode):
    """Remembers, without keeping it alive, each tensor that torch returns to Python meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        several = result if isinstance(result, tuple | list) else (result,)
        self._tensors += [weakref.ref(item) for item in several if isinstance(item, Tensor)]
        return result

    def beside(self, module: nn.Module) -> list[Tensor]:
        """Those that somebody still holds, and that are no parameters or buffers of the module."""
        own = {id(tensor) for tensor in chain(module.parameters(), module.buffers())}
        return [tensor for ref in self._tensors if (tensor := ref()) is not None and id(tensor) not in own]


# ---- whether tensors fit


def template(spec: Spec) -> Tensors:
    """Names, shapes and types of a spec's tensors, on the meta device; CheckpointError SPEC if none can be built."""
    try:
        return state_of(build(spec, device="meta"), repr(spec.architecture))
    except CheckpointError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError("SPEC", f"cannot build {spec.architecture!r}: {error}") from error


def check_spec(spec: Spec, found: Tensors) -> None:
    """Refuse (SPEC, MISFIT) tensors that do not fit the spec's model, as its architecture is defined now."""
    try:
        _check_fit(*_remembered(spec, find_architecture(spec.architecture).build), found)
    except CheckpointError:  # what a builder calls may have been defined anew since
        check_fit(template(spec), found)


@lru_cache(maxsize=64)
def _remembered(spec: Spec, builder: Callable[..., nn.Module]) -> tuple[Tensors, list[list[str]]]:
    expected = template(spec)
    return expected, _shared(expected)


def check_fit(expected: Tensors, found: Tensors) -> None:
    """Refuse (MISFIT) tensors of other names, shapes or types, with all differences, and a hint at a wrong prefix.

    Names of one tensor must have one value.
    """
    _check_fit(expected, _shared(expected), found)


def _check_fit(expected: Tensors, shared: list[list[str]], found: Tensors) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    differences = [f"missing {', '.join(missing)}"] if missing else []
    differences += [f"not in the model {', '.join(extra)}"] if extra else []
    for name in sorted(expected.keys() & found.keys()):
        a, b = expected[name], found[name]
        if a.shape != b.shape:
            differences.append(f"{name}: expected shape {tuple(a.shape)}, got {tuple(b.shape)}")
        if a.dtype != b.dtype:
            differences.append(f"{name}: expected {a.dtype}, got {b.dtype}")
    if not differences:
        torn = [names for names in shared if _torn({name: expected[name] for name in names}, found)]
        differences = [f"{' and '.join(names)}: one tensor, with different values" for names in torn]
    if not differences:
        return
    listed = "; ".join(differences[:_MOST_LISTED])
    if len(differences) > _MOST_LISTED:
        listed += f"; and {len(differences) - _MOST_LISTED} more"
    if any(found_under := prefixes(expected, found)):
        listed += f"; the names begin with {' or '.join(map(repr, found_under))}, which a wrapper puts there: "
        listed += "save the state_dict of the module inside it, or strip it with strip_prefix=True (--strip-prefix)"
    raise CheckpointError("MISFIT", f"the tensors do not fit the model: {listed}")


def _shared(expected: Tensors) -> list[list[str]]:
    """Groups of names whose tensors share memory."""
    homes = defaultdict(list)
    for name, tensor in expected.items():
        homes[_storage(tensor)].append(name)
    return [names for names in homes.values() if len(names) > 1]


def _torn(shared: Tensors, found: Tensors) -> bool:
    """Whether tensors that share memory in the model have values that cannot stand in one memory."""
    places = {}
    memory = torch.zeros(next(iter(shared.values())).untyped_storage().nbytes(), dtype=torch.uint8)
    for name, like in shared.items():
        places[name] = memory.view(like.dtype).as_strided(like.shape, like.stride(), like.storage_offset())
        places[name].copy_(found[name])
    return any(not torch.equal(place, found[name].cpu()) for name, place in places.items())


def prefixes(expected: Iterable[str], found: Iterable[str]) -> list[str]:
    """What may stand before the expected names so that all of them are found, such as "module." or "net.model.".

    Counters of BatchNorm may be missing. Prefixes end with a dot, or are empty; the shortest comes first.

    Example:
        >>> prefixes(["0.weight", "0.bias"], ["model.0.weight", "model.0.bias", "loss.weight"])
        ['model.']
    """
    wanted = [name for name in expected if not name.endswith(_COUNTER)]
    have = set(found)
    if not wanted:
        return []
    first = max(wanted, key=len)
    fronts = {name.removesuffix(first) for name in have if name == first or name.endswith(f".{first}")}
    return sorted((front for front in fronts if all(front + name in have for name in wanted)), key=len)


def prefix_of(expected: Iterable[str], found: Iterable[str], wanted: bool | str = True) -> str:
    """The prefix to strip: the one that is `wanted`, or the only one of `prefixes` where that is True.

    Raises:
        CheckpointError: MISFIT: no prefix makes the names fit, or several do.
    """
    if not isinstance(wanted, bool):
        return f"{wanted.removesuffix('.')}." if wanted else ""
    names = [*found]
    fitting = prefixes(expected, names) if wanted else [""]
    if len(fitting) != 1:
        came = " and ".join(map(repr, fitting)) or f"none among {', '.join(names[:5])}"
        raise CheckpointError("MISFIT", f"expected one prefix with which the names fit the model, got {came}")
    return fitting[0]


def adapted(expected: Tensors, found: Tensors, *, prefix: str = "") -> dict[str, Tensor]:
    """Tensors from elsewhere under the model's own names, completed as torch does.

    A missing counter of BatchNorm is zero, one of another integer type is cast; a tensor that the model has under
    several names may be there under one of them. What else differs stays as it is, for `check_fit` to report.

    Args:
        expected: the model's tensors, as `template` or `state_of` gives them.
        found: the others.
        prefix: what to cut off the names; those that do not begin with it stay.

    Raises:
        CheckpointError: MISFIT: without the prefix, two names are equal.
    """
    given = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if len(given) != len(found):
        raise CheckpointError("MISFIT", f"expected names that differ without {prefix!r}, got some twice")
    names_of = defaultdict(list)
    for name, like in expected.items():
        names_of[_storage(like), like.storage_offset(), like.shape, like.stride()].append(name)
        if name.endswith(_COUNTER) and like.dtype is torch.int64 and not like.shape:
            own = given.setdefault(name, torch.zeros((), dtype=torch.int64))
            if not own.is_floating_point() and not own.shape and own.dtype is not torch.bool:
                given[name] = own.to(torch.int64)
    for names in names_of.values():
        present = [name for name in names if name in given]
        given |= {name: given[present[0]] for name in names if present and name not in given}
    return given


def check_values(tensors: Tensors) -> None:
    """Refuse NaN, infinity (NOT_FINITE) and running variances below zero (VARIANCE), naming all such tensors."""
    wild = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if wild:
        raise CheckpointError("NOT_FINITE", f"expected finite weights, got NaN or infinity in {', '.join(wild)}")
    variances = [name for name in tensors if name.rpartition(".")[2] == "running_var"]
    negative = [name for name in variances if tensors[name].numel() and float(tensors[name].min()) < 0]
    if negative:
        raise CheckpointError("VARIANCE", f"expected variances of at least 0, got less in {', '.join(negative)}")


def _finite(tensor: Tensor) -> bool:
    """Whether all elements are finite: a sum is, unless an element is not or, rarely, it overflows. Reads once."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())
