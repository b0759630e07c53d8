"""`Spec`: everything that decides what a model computes, except its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from zoo._names import checked, unknown, usable_device
from zoo.data.frames import PADDINGS
from zoo.data.normalisation import NORMALISATIONS
from zoo.models.architectures import find_architecture

_MOST_PARAMETERS = 4_000_000_000  # more than this is a typing error, not a frame classifier


@dataclass(frozen=True)
class Spec:
    """An architecture with all its options, and the input it is made for.

    The input is part of it, so that a model never gets frames that were prepared in another way. Members with equal
    specs can be stacked: nothing else decides what they compute.

    Args:
        architecture: a registered name, see `list_architectures`.
        features: features per frame, F.
        context: frames on each side of the classified one, K.
        classes: number of classes, C.
        normalisation: a name in `NORMALISATIONS`.
        padding: what is put beyond the ends of a recording, a name in `PADDINGS`.
        options: options of the architecture. The defaults of those left out are written into the spec, so that
            one read from a file means the same after a default has changed.

    Raises:
        ValueError: an unknown name (the message names the nearest), or a size below its minimum.
        TypeError: a field has another type than expected, or an option another type than its default.

    Example:
        >>> spec = Spec("cylinder", features=27, context=20, classes=40, options={"width": 64})
        >>> spec.inputs, spec.options["depth"]
        (1107, 3)
    """

    architecture: str
    features: int
    context: int
    classes: int
    normalisation: str = "mean_std"
    padding: str = "recording"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("features", 1), ("context", 0), ("classes", 2)):
            size = getattr(self, name)
            if type(size) is not int:
                msg = f"expected {name} as an integer, got {size!r}"
                raise TypeError(msg)
            if size < least:
                msg = f"expected {name} of at least {least}, got {size}"
                raise ValueError(msg)
        for name, kind in (("architecture", str), ("normalisation", str), ("padding", str), ("options", Mapping)):
            if not isinstance(getattr(self, name), kind):
                msg = f"expected {name} as {'text' if kind is str else 'names and values'}, got {getattr(self, name)!r}"
                raise TypeError(msg)
        for what, table in (("normalisation", NORMALISATIONS), ("padding", PADDINGS)):
            if getattr(self, what) not in table:
                raise ValueError(unknown(what, getattr(self, what), table))
        defaults = find_architecture(self.architecture).options
        for name in self.options:
            if name not in defaults:
                raise ValueError(unknown(f"option of {self.architecture!r}", name, defaults))
        complete = {**defaults, **self.options}
        typed = {name: self._typed(name, complete[name], defaults[name]) for name in sorted(complete)}
        object.__setattr__(self, "options", MappingProxyType(typed))

    def _typed(self, name: str, value: Any, default: Any) -> Any:
        """An option's value in the type of its default: an integer may stand for a float, a list for a tuple."""
        if isinstance(value, list | tuple):
            value = tuple(value)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        several = isinstance(default, list | tuple)
        fits = default is None or type(value) is (tuple if several else type(default))
        if fits and several and default:
            fits = all(type(item) is type(default[0]) for item in value)
        if not fits:
            like = [*default] if several else default  # as JSON and the command line write it
            msg = (
                f"expected option {name!r} of {self.architecture!r} of the type of its default {like!r}, got {value!r}"
            )
            raise TypeError(msg)
        return value

    @property
    def inputs(self) -> int:
        """Length of a window: (2 * context + 1) * features."""
        return (2 * self.context + 1) * self.features

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        fields = {name: getattr(self, name) for name in sorted(self.__dataclass_fields__)}
        return fields | {"options": {name: list(v) if isinstance(v, tuple) else v for name, v in self.options.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The spec that `to_dict` wrote; a missing or unknown field raises ValueError."""
        names = set(cls.__dataclass_fields__)
        if not names - {"normalisation", "padding", "options"} <= set(data) <= names:
            msg = f"expected a spec with the fields {sorted(names)}, got {sorted(data)}"
            raise ValueError(msg)
        return cls(**data)

    def canonical(self) -> str:
        """One JSON text per spec: sorted keys, no spaces, ASCII."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def __hash__(self) -> int:
        return hash(self.canonical())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (self.to_dict(),)  # deepcopy cannot copy a mappingproxy


@checked
def build(spec: Spec, *, seed: int | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """A new model with freshly drawn weights, in train mode: (B, spec.inputs) -> (B, spec.classes) logits.

    Args:
        spec: what to build.
        seed: seed of the draw, which leaves torch's global generator as it was; None draws from that generator.
        device: where the parameters go, as for `FrameSet.to`; "meta" allocates no memory.

    Raises:
        ValueError: the builder refuses an option, makes lazy layers or returns one module again and again, the model
            has more parameters than any frame classifier, or torch cannot compute on the device here.
    """
    place = None if str(device) == "meta" else usable_device(device)
    make = partial(find_architecture(spec.architecture).build, spec.inputs, spec.classes, **spec.options)
    try:
        with torch.device("meta"):
            shapes = make()
    except (RuntimeError, TypeError) as error:  # torch: sizes beyond 64 bits
        way_out = "; it is first built without values: compute constants from numbers" if "meta" in str(error) else ""
        msg = f"cannot build {spec.architecture!r} with {dict(spec.options)}: {error}{way_out}"
        raise ValueError(msg) from error
    refuse_lazy(shapes, spec.architecture)
    if (parameters := _trainable(shapes)) > _MOST_PARAMETERS:
        came = f"{parameters:,} from {spec.architecture!r} with {dict(spec.options)}"
        msg = f"expected at most {_MOST_PARAMETERS:,} parameters, got {came}; check the widths"
        raise ValueError(msg)
    if place is None:
        return shapes
    if seed is None:
        with place:
            module = make()
    else:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # not the accelerators', which are not restored
            module = make()
    if shared := dict(_tensors(shapes)).keys() & dict(_tensors(module)).keys():
        names = [name for tensor, name in _tensors(module) if tensor in shared]
        msg = f"expected a new module from {spec.architecture!r} each time, got one with the same {names[0]!r} again; "
        raise ValueError(msg + "make its layers inside the function")
    return module.to(place)


@checked
def count_parameters(spec: Spec) -> int:
    """Trainable parameters, counted on the meta device without allocating any memory; raises as `build` does."""
    return _trainable(build(spec, device="meta"))


@checked
def fast_count(spec: Spec) -> int:
    """Trainable parameters by arithmetic: thousands of specs in the time of one `count_parameters`.

    Architectures that declare no count are counted by `count_parameters`.
    """
    count = find_architecture(spec.architecture).count
    return count_parameters(spec) if count is None else count(spec.inputs, spec.classes, **spec.options)


def refuse_lazy(module: nn.Module, name: str) -> None:
    """Refuse (ValueError) a module with lazy layers, which have no sizes before their first batch; names them."""
    lazy = [
        f"{path or 'itself'!r} ({type(part).__name__})"
        for path, part in module.named_modules()
        if any(map(is_lazy, [*part.parameters(recurse=False), *part.buffers(recurse=False)]))
    ]
    if lazy:
        msg = f"expected a model whose layers have their sizes, got lazy layers in {name!r}: {', '.join(lazy)}; "
        raise ValueError(msg + "run one batch through it first, or give the sizes")


def _tensors(module: nn.Module) -> Iterator[tuple[int, str]]:
    """Identity and name of each parameter and buffer."""
    return ((id(tensor), name) for name, tensor in chain(module.named_parameters(), module.named_buffers()))


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
