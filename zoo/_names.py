"""Names that people type: tables of named entries, wildcards, mistyped words, devices; the distribution's version.

And what people pass: `checked` refuses arguments of other types than those that are declared.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache, wraps
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    import torch

Patterns = str | Iterable[str]
Entry = TypeVar("Entry")
P = ParamSpec("P")
R = TypeVar("R")

_NUMBERS = {bool: "__bool__", int: "__index__", float: "__float__"}  # what numbers of any library have
_ORIGINS: dict[tuple[str, str], str] = {}  # kind and name of an entry -> module and name of its function


def matching(names: Iterable[str], include: Patterns = "*", exclude: Patterns = ()) -> list[str]:
    """The names that match any `include` pattern and no `exclude` pattern, in their order.

    Patterns are shell wildcards (`*`, `?`, `[abc]`); case counts; a string stands for one pattern.

    Example:
        >>> matching(["diamond", "cylinder", "mlp"], include=["*d*"], exclude="cyl*")
        ['diamond']
    """
    wanted, unwanted = ([given] if isinstance(given, str) else [*given] for given in (include, exclude))

    def fits(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return [name for name in names if fits(name, wanted) and not fits(name, unwanted)]


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name: with the nearest known names, or all of them where none is near.

    Example:
        >>> unknown("architecture", "cylindr", ["cylinder", "mlp"])
        "unknown architecture 'cylindr'; did you mean 'cylinder'?"
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"unknown {what} {name!r}; did you mean {' or '.join(map(repr, near))}?"
    return f"unknown {what} {name!r}; expected one of {', '.join(known) or '(there are none)'}"


def find(table: Mapping[str, Entry], kind: str, name: str) -> Entry:
    """The entry of this name; where there is none, a ValueError has the nearest names."""
    if name not in table:
        raise ValueError(unknown(kind, name, table))
    return table[name]


def enter(table: MutableMapping[str, Entry], kind: str, function: Callable[..., Any], entry: Entry) -> None:
    """Put an entry into a table under its function's name, which no other function may have.

    A definition that is run again replaces its former entry.
    """
    name, origin = function.__name__, f"{function.__module__}.{function.__qualname__}"
    taken = _ORIGINS.get((kind, name), "zoo")
    if name in table and taken != origin:
        msg = f"{kind} {name!r} is already registered by {taken}; choose another name"
        raise ValueError(msg)
    table[name] = entry
    _ORIGINS[kind, name] = origin


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function that refuses, by a TypeError, arguments which are not of the types that it declares.

    Numbers of any library are numbers, and what can be iterated over is a sequence, but a text one of texts alone; what
    is in it is not looked at. What an annotation cannot tell, as that of a protocol, is accepted.

    Example:
        >>> checked(find)({}, "rule", 3)
        Traceback (most recent call last):
        TypeError: expected str as the name of find(), got int: 3
    """
    signature, hints = inspect.signature(function), cache(lambda: get_type_hints(function))
    title = function.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # too many or too few, which Python says best
            return function(*args, **kwargs)
        for name, value in given.items():
            if not _fits(value, hints().get(name, Any)):
                shape, wanted = getattr(value, "shape", None), signature.parameters[name].annotation
                came = f"of shape {tuple(shape)}" if shape else f"{value!r}"[:60]
                wanted = getattr(wanted, "__name__", wanted) if isinstance(wanted, type) else wanted
                msg = f"expected {wanted} as the {name} of {title}(), got {type(value).__name__}: {came}"
                raise TypeError(msg)
        return function(*args, **kwargs)

    return call


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value can be of a type, as far as that can be told."""
    if isinstance(hint, TypeVar):
        hint = hint.__bound__ or Any
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if inner and issubclass(kind, Iterable) and not issubclass(kind, Mapping):
        return hasattr(type(value), "__iter__") and (not isinstance(value, str) or _fits(value, inner[0]))
    if kind in _NUMBERS:
        return hasattr(type(value), _NUMBERS[kind])
    return isinstance(value, os.PathLike if kind is Path else kind)


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if torch can compute on it here; a CUDA device always with its index.

    "cuda" is the current CUDA device; "auto" is that where torch can use it, otherwise cpu.

    Raises:
        ValueError: another kind of device than the CPU and CUDA, a CUDA device that this machine does not have, or one
            that this build of torch has no code for.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    import torch

    automatic = device == "auto"
    try:
        wanted = torch.device("cuda" if automatic else device)
    except RuntimeError as error:
        msg = f"expected a device such as 'cpu', 'cuda', 'cuda:1' or 'auto', got {str(device)!r}"
        raise ValueError(msg) from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type != "cuda":
        msg = f"expected 'cpu' or a CUDA device, got {str(device)!r}, on which nothing here is tested; use 'cpu'"
        raise ValueError(msg)
    if not torch.cuda.is_available():
        if automatic:
            return torch.device("cpu")
        msg = f"expected a device of this machine, got {str(device)!r}, but torch finds no CUDA device; use 'cpu'"
        raise ValueError(msg)
    if wanted.index is not None and wanted.index >= (count := torch.cuda.device_count()):
        msg = f"expected one of this machine's {count} CUDA devices, got {str(device)!r}; use 'cuda'"
        raise ValueError(msg)
    place = torch.device("cuda", torch.cuda.current_device() if wanted.index is None else wanted.index)
    built, (major, minor) = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(place)
    if not _has_code(built, major, minor):
        if automatic:
            return torch.device("cpu")
        card = f"{torch.cuda.get_device_name(place)} has compute capability {major}.{minor}"
        msg = f"expected a CUDA device that this torch was built for ({', '.join(built)}), but {card}; use 'cpu'"
        raise ValueError(f"{msg}, or another build of torch")
    return place


def _has_code(built: Iterable[str], major: int, minor: int) -> bool:
    """Whether kernels for these architectures run on a CUDA device of this compute capability.

    Code for `sm_86` runs on 8.6 and later 8.x, that for `sm_90a` on 9.0 alone, and what is compiled on the spot from
    `compute_80` on 8.0 and anything later. Lists of other names, those of ROCm, are not judged.
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in built]
    matches = [match.groups() for match in found if match]
    for kind, most, least, suffix in matches:
        made, card = (int(most), int(least)), (major, minor)
        if made == card or (suffix != "a" and made <= card and (kind == "compute" or made[0] == major)):
            return True
    return not matches


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device itself multiplies in bfloat16; torch also counts the older ones, where it is emulated."""
    import torch

    return torch.cuda.get_device_capability(device) >= (8, 0)


def own_version() -> str:
    """Version of the distribution that holds both packages; "source" where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("zoo-ensemble")
    except PackageNotFoundError:
        return "source"
