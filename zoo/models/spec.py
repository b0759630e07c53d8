"""`Spec`: everything that decides what a model computes, except its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn

from zoo._names import unknown
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
            _check_size(name, getattr(self, name), least)
        for name, kind in (("architecture", str), ("normalisation", str), ("padding", str), ("options", Mapping)):
            if not isinstance(getattr(self, name), kind):
                msg = f"expected {name} as {'text' if kind is str else 'names and values'}, got {getattr(self, name)!r}"
                raise TypeError(msg)
        for what, table in (("normalisation", NORMALISATIONS), ("padding", PADDINGS)):
            if getattr(self, what) not in table:
                raise ValueError(unknown(what, getattr(self, what), table))
        options = _complete(self.architecture, self.options)
        object.__setattr__(self, "options", MappingProxyType(options))

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
        """The spec that `to_dict` wrote.

        Raises:
            ValueError: a field is missing or unknown; and the errors of the class itself.
        """
        names = set(cls.__dataclass_fields__)
        required = names - {"normalisation", "padding", "options"}
        if not required <= set(data) <= names:
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


def build(spec: Spec, *, seed: int | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """A new model with freshly drawn weights, in train mode: (B, spec.inputs) -> (B, spec.classes) logits.

    Args:
        spec: what to build.
        seed: seed of the draw, which leaves torch's global generator as it was; None draws from that generator.
        device: where the parameters go; "meta" allocates no memory.

    Raises:
        ValueError: the builder refuses an option, or the model has more parameters than any frame classifier.
    """
    shapes = _shapes(spec)
    if torch.device(device).type == "meta":
        return shapes
    if seed is None:
        return _built(spec, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _built(spec, "cpu").to(device)


def count_parameters(spec: Spec) -> int:
    """Trainable parameters, counted on the meta device without allocating any memory; raises as `build` does."""
    return _trainable(_shapes(spec))


def fast_count(spec: Spec) -> int:
    """Trainable parameters by arithmetic: thousands of specs in the time of one `count_parameters`.

    Architectures that declare no count are counted by `count_parameters`.
    """
    count = find_architecture(spec.architecture).count
    return count_parameters(spec) if count is None else count(spec.inputs, spec.classes, **spec.options)


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _built(spec: Spec, device: torch.device | str) -> nn.Module:
    with torch.device(device):
        return find_architecture(spec.architecture).build(spec.inputs, spec.classes, **spec.options)


def _shapes(spec: Spec) -> nn.Module:
    """The model on the meta device; ValueError if its sizes are absurd."""
    try:
        module = _built(spec, "meta")
    except (RuntimeError, TypeError) as error:  # torch: sizes beyond 64 bits
        msg = f"cannot build {spec.architecture!r} with {dict(spec.options)}: {error}"
        raise ValueError(msg) from error
    parameters = _trainable(module)
    if parameters > _MOST_PARAMETERS:
        msg = (
            f"expected at most {_MOST_PARAMETERS:,} parameters, got {parameters:,} from "
            f"{spec.architecture!r} with {dict(spec.options)}; check the widths"
        )
        raise ValueError(msg)
    return module


def _check_size(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"expected {name} as an integer, got {value!r}"
        raise TypeError(msg)
    if value < least:
        msg = f"expected {name} of at least {least}, got {value}"
        raise ValueError(msg)


def _complete(architecture: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the architecture, sorted: the given ones, checked, and the defaults of the others."""
    defaults = find_architecture(architecture).options
    for name in options:
        if name not in defaults:
            raise ValueError(unknown(f"option of {architecture!r}", name, defaults))
    merged = {**defaults, **options}
    return {name: _typed(architecture, name, merged[name], defaults[name]) for name in sorted(merged)}


def _typed(architecture: str, name: str, value: Any, default: Any) -> Any:
    """The value in the type of the default: an integer may stand for a float, a list for a tuple."""
    if isinstance(value, list | tuple):
        value = tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wanted = tuple if isinstance(default, list | tuple) else type(default)
    fits = default is None or type(value) is wanted
    if fits and isinstance(default, list | tuple) and default:
        fits = all(type(item) is type(default[0]) for item in value)
    if not fits:
        msg = f"expected option {name!r} of {architecture!r} of the type of its default {default!r}, got {value!r}"
        raise TypeError(msg)
    return value
