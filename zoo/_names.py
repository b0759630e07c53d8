"""Names that people give: models by wildcard, mistyped words, devices; and this distribution's own version."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Patterns = str | Iterable[str]


def matching(names: Iterable[str], include: Patterns = "*", exclude: Patterns = ()) -> list[str]:
    """The names that any `include` pattern matches and no `exclude` pattern does, in their order.

    Patterns are shell wildcards (`*`, `?`, `[abc]`), case counts, a string stands for one pattern.

    Example:
        >>> matching(["diamond", "cylinder", "mlp"], include=["*d*"], exclude="cyl*")
        ['diamond']
    """
    wanted, unwanted = _as_list(include), _as_list(exclude)
    return [name for name in names if _any(name, wanted) and not _any(name, unwanted)]


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known: the nearest names first, else all of them.

    Example:
        >>> unknown("architecture", "cylindr", ["cylinder", "mlp"])
        "unknown architecture 'cylindr'; did you mean 'cylinder'?"
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"unknown {what} {name!r}; did you mean {' or '.join(map(repr, near))}?"
    return f"unknown {what} {name!r}; expected one of {', '.join(known) or '(there are none)'}"


def _as_list(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _any(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if this machine has it.

    Raises:
        ValueError: no such kind of device, or CUDA is asked for and there is none, or not so many.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        msg = f"expected a device such as 'cpu', 'cuda' or 'cuda:1', got {str(device)!r}"
        raise ValueError(msg) from error
    if wanted.type != "cuda":
        return wanted
    if not torch.cuda.is_available():
        msg = f"expected a device of this machine, got {str(device)!r} where torch finds no CUDA; use device='cpu'"
        raise ValueError(msg)
    if wanted.index is not None and wanted.index >= torch.cuda.device_count():
        msg = f"expected a device of this machine, got {str(device)!r} of {torch.cuda.device_count()}; use 'cuda'"
        raise ValueError(msg)
    return wanted


def own_version() -> str:
    """Of the distribution that both packages belong to; "source" where it is run from a folder."""
    try:
        return version("zoo-ensemble")
    except PackageNotFoundError:
        return "source"
