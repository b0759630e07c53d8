"""The table of rules: how a function becomes one, and how it is found by name."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor


class Rule(Protocol):
    """Anything that turns (M, N, C) probabilities into (N, C) rows that sum to one."""

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine the members' rows, frame by frame."""


RULES: dict[str, Callable[..., Tensor]] = {}

_F = TypeVar("_F", bound=Callable[..., Tensor])


def rule(function: _F) -> _F:
    """Enter a function into the table of rules under its own name, with the shape checked at the door.

    NumPy arrays are accepted too, and answered with NumPy arrays. Keyword arguments are the rule's settings.

    Raises:
        ValueError: another function has that name already.

    Example:
        >>> @rule
        ... def first(probabilities):
        ...     return probabilities[0]
        >>> "first" in list_rules()
        True
        >>> del RULES["first"]
    """
    name = function.__name__
    known = RULES.get(name)
    if known is not None and known.__module__ != function.__module__:
        msg = f"expected a new name for a rule, got {name!r}, which {known.__module__} has already"
        raise ValueError(msg)
    RULES[name] = on_arrays(function)
    return cast(_F, RULES[name])


def on_arrays(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, with its first argument checked; NumPy arrays in, NumPy arrays out."""

    @functools.wraps(function)
    def checked(probabilities: Any, **options: Any) -> Any:
        result = function(members_first(probabilities), **options)
        return result.numpy() if isinstance(probabilities, np.ndarray) else result

    return checked


def members_first(given: Any) -> Tensor:
    """(M, N, C) floating, M and C at least one."""
    tensor = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    if tensor.ndim != 3 or 0 in (tensor.shape[0], tensor.shape[2]):
        msg = f"expected probabilities of shape (members, frames, classes), got {tuple(tensor.shape)}"
        raise ValueError(msg)
    return tensor if tensor.is_floating_point() else tensor.float()


def wide(rows: Tensor) -> torch.dtype:
    """At least float32, for sums over many members."""
    return torch.promote_types(rows.dtype, torch.float32)


def list_rules(include: str | Iterable[str] = "*", exclude: str | Iterable[str] = ()) -> list[str]:
    """Sorted names of the rules in the table that match shell wildcards.

    Example:
        >>> list_rules("m*", exclude="me*")
        ['majority', 'maximum', 'minimum']
    """
    wanted = [include] if isinstance(include, str) else list(include)
    unwanted = [exclude] if isinstance(exclude, str) else list(exclude)

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return sorted(name for name in RULES if matches(name, wanted) and not matches(name, unwanted))


def get_rule(name: str) -> Rule:
    """The rule of that name in the table.

    Raises:
        ValueError: there is none; the message names the nearest.

    Example:
        >>> get_rule("majorty")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: no rule named 'majorty'; did you mean 'majority'? ...
    """
    if name not in RULES:
        raise ValueError(no_such("rule", name, RULES))
    return RULES[name]


def no_such(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not among those known: the nearest, then all of them.

    Example:
        >>> no_such("rule", "meen", ["mean", "borda"])
        "no rule named 'meen'; did you mean 'mean'? there are borda, mean"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"no {what} named {name!r}; {hint}there are {', '.join(names)}"
