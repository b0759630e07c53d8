"""Names that people type: tables of named entries, wildcards, mistyped words, devices; the distribution's version."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Patterns = str | Iterable[str]
Entry = TypeVar("Entry")

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
