"""What a rule is: the interface, the tables that find one by name, JSON there and back, and members that abstain.

A rule is any callable from (M, N, C) probabilities to (N, C) rows that sum to one. A rule without numbers is a function
under `@rule`. A rule with numbers is a frozen dataclass under `@fitted_rule` that derives from `FittedRule`, where
everything stands that others may ask of it. `declared` gives any rule that interface.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol, Self, TypeVar, cast

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
    """Enter a function into the table of rules under its own name; its first argument is then checked at each call.

    NumPy arrays are accepted too, and answered with NumPy arrays. Keyword arguments are the rule's settings.

    Raises:
        ValueError: another rule has that name already.

    Example:
        >>> @rule
        ... def first(probabilities):
        ...     return probabilities[0]
        >>> "first" in list_rules()
        True
        >>> del RULES["first"]
    """
    _refuse_taken(function)
    RULES[function.__name__] = on_arrays(function)
    return cast(_F, RULES[function.__name__])


def on_arrays(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function with its first argument checked; NumPy arrays in, NumPy arrays out."""

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
    """The message for an unknown name: the nearest known names, then all of them.

    Example:
        >>> no_such("rule", "meen", ["mean", "borda"])
        "no rule named 'meen'; did you mean 'mean'? there are borda, mean"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"no {what} named {name!r}; {hint}there are {', '.join(names)}"


class FittedRule:
    """The interface of rules with numbers, with the answers that suit most of them.

    A new one is a frozen dataclass under `@fitted_rule` whose fields are its numbers, `fingerprint` and `members`;
    it defines `__call__`, and of the rest only what differs.

    Attributes:
        fingerprint: identifies the frames that the numbers were fitted on; "" if unknown.
        members: names of the members it was fitted on, in order; () where members are known by position only.
    """

    fingerprint: str = ""
    members: tuple[str, ...] = ()

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        raise NotImplementedError

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of all frames that some of its numbers were fitted on, "" among them where that is unknown."""
        return (self.fingerprint,)

    @property
    def has_numbers(self) -> bool:
        """False for plain functions, which nothing was fitted for."""
        return bool(self.fingerprints)

    @property
    def used(self) -> tuple[int, ...] | None:
        """Positions of the members that can influence the result; None for all."""
        return None

    @property
    def abstaining(self) -> Rule:
        """The same rule for members that may abstain on a frame by a row of NaN; see `ensemble.abstaining`."""
        return Abstaining(self)

    @property
    def by_position(self) -> Self:
        """The same rule without the members' names."""
        return cast(Self, replace(cast(Any, self), members=())) if self.members else self

    def restricted(self, positions: Sequence[int]) -> FittedRule:
        """The same rule over the members at these positions alone, by position; the others must be without influence.

        Raises:
            ValueError: every member matters to this kind of rule.
        """
        msg = f"expected a rule that can leave members out, got {type(self).__name__}, which needs all of them"
        raise ValueError(msg)

    def to_json(self) -> dict[str, Any]:
        """The rule as plain data: the name of its class and its fields; `members` only where they are known."""
        held = {field.name: _plain(getattr(self, field.name)) for field in fields(cast(Any, self))}
        if not held.get("members"):
            held.pop("members", None)
        return {"rule": type(self).__name__} | held


FITTED_RULES: dict[str, type[FittedRule]] = {}

_K = TypeVar("_K", bound=type[FittedRule])


def fitted_rule(kind: _K) -> _K:
    """Enter a class of rules with numbers into the table that `rule_from_json` reads from.

    Raises:
        ValueError: another rule has that name already.

    Example:
        >>> @fitted_rule
        ... @dataclass(frozen=True)
        ... class Favourite(FittedRule):
        ...     position: int
        ...     fingerprint: str = ""
        ...     members: tuple[str, ...] = ()
        ...
        ...     def __call__(self, probabilities):
        ...         return probabilities[self.position]
        >>> rule_from_json({"rule": "Favourite", "position": 1})
        Favourite(position=1, fingerprint='', members=())
        >>> del FITTED_RULES["Favourite"]
    """
    _refuse_taken(kind)
    FITTED_RULES[kind.__name__] = kind
    return kind


def _refuse_taken(made: Any) -> None:
    """A module that is loaded again may enter its rules again; anything else needs a name of its own."""
    known: Any = RULES.get(made.__name__) or FITTED_RULES.get(made.__name__)
    if known is not None and known.__module__ != made.__module__:
        msg = f"expected a new name for a rule, got {made.__name__!r}, which {known.__module__} has already"
        raise ValueError(msg)


def declared(rule: Rule) -> FittedRule:
    """Any rule under the interface of `FittedRule`: itself, or a function as a rule without numbers.

    Example:
        >>> declared(RULES["mean"]).has_numbers
        False
    """
    return rule if isinstance(rule, FittedRule) else _Plain(rule)


@dataclass(frozen=True)
class _Plain(FittedRule):
    """A rule without numbers: a function, perhaps with settings bound by `functools.partial`."""

    function: Rule

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        return self.function(probabilities)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """None: there is nothing to fit."""
        return ()

    @property
    def abstaining(self) -> Rule:
        """The function over those members that do not abstain."""
        return Abstaining(self.function)

    def to_json(self) -> dict[str, Any]:
        """Its name in the table, and its settings."""
        bound = self.function
        function, options = (bound.func, bound.keywords) if isinstance(bound, functools.partial) else (bound, {})
        for name, known in RULES.items():
            if known is function:
                return {"rule": name, **options}
        msg = f"cannot write the rule {bound!r}: it is not in the table; put @ensemble.rule above its function"
        raise ValueError(msg)


def rule_to_json(rule: Rule) -> dict[str, Any]:
    """A rule as plain data: its name in the table, and its numbers.

    Settings bound by `functools.partial` are kept: `partial(ensemble.rules.power_mean, power=2)`.

    Raises:
        ValueError: the rule is neither in the table nor one of the fitted rules.

    Example:
        >>> from ensemble.rules import LogPool
        >>> rule_to_json(LogPool([0.5, 0.25]))
        {'rule': 'LogPool', 'weights': [0.5, 0.25], 'fingerprint': ''}
    """
    return declared(rule).to_json()


def rule_from_json(data: Mapping[str, Any]) -> Rule:
    """The rule that `rule_to_json` wrote, by its name in a table: nothing is imported or run from a file.

    Raises:
        ValueError: the name is unknown, or the numbers do not fit the rule.

    Example:
        >>> rule_from_json({"rule": "LogPool", "weights": [0.5, 0.25]})
        LogPool(weights=(0.5, 0.25), fingerprint='', members=())
    """
    if not isinstance(data, Mapping):
        msg = f"expected a rule as names and values, got {str(data)[:60]}"
        raise ValueError(msg)  # it comes from a file
    options = {key: _read(value) for key, value in data.items() if key != "rule"}
    name = str(data.get("rule"))
    try:
        return FITTED_RULES[name](**options) if name in FITTED_RULES else _bound(get_rule(name), options)
    except TypeError as error:
        kind: Any = FITTED_RULES.get(name)
        known = sorted(field.name for field in fields(kind)) if kind else list(_settings(get_rule(name)).parameters)[1:]
        msg = f"expected the rule {name} with some of {known}, got {str(options)[:80]}"
        raise ValueError(msg) from error


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return declared(value).to_json() if callable(value) else value


def _read(value: Any) -> Any:
    """Values as they are, and the rules among them: those that a rule is made of."""
    if isinstance(value, list):
        return [_read(item) for item in value]
    return rule_from_json(value) if isinstance(value, Mapping) else value


def _bound(function: Rule, options: Mapping[str, Any]) -> Rule:
    """A rule of the table with its settings; TypeError where it has no such settings."""
    _settings(function).bind(None, **options)
    return functools.partial(function, **options) if options else function


def _settings(function: Rule) -> inspect.Signature:
    return inspect.signature(function)


def refuse_no_rule(given: Any) -> None:
    """Refuse what cannot be called where a rule is made of rules; it may come from a file."""
    if not callable(given):
        msg = f"expected a rule, got {str(given)[:60]}"
        raise ValueError(msg)


def abstentions(probabilities: Tensor) -> Tensor:
    """(M,) int64: on how many frames each member abstains, that is, has a NaN in its row."""
    return members_first(probabilities).isnan().any(dim=-1).sum(dim=-1)


def abstaining(rule: Rule) -> Rule:
    """The same rule, for members that may abstain on a frame by a row of NaN.

    - A rule of the table combines the members that do not abstain as if there were no others.
    - `WeightedMean` renormalises the weights of those members.
    - Other rules with numbers per member take, for a member that abstains, the mean of those that do not.
    - Where every member abstains, all classes are equal.

    `evaluate` does this by itself for outputs that declare abstentions.

    Args:
        rule: where no member abstains, the result is as before.

    Example:
        >>> from ensemble import mean
        >>> p = torch.tensor([[[0.9, 0.1], [0.7, 0.3]], [[torch.nan, torch.nan], [0.1, 0.9]]])
        >>> abstaining(mean)(p)
        tensor([[0.9000, 0.1000],
                [0.4000, 0.6000]])
    """
    return declared(rule).abstaining


@fitted_rule
@dataclass(frozen=True)
class Abstaining(FittedRule):
    """What `abstaining` makes of a rule that cannot deal with NaN itself.

    Args:
        of: that rule.
    """

    of: Rule

    def __post_init__(self) -> None:
        refuse_no_rule(self.of)
        object.__setattr__(self, "fingerprint", declared(self.of).fingerprint)
        object.__setattr__(self, "members", declared(self.of).members)

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        return on_arrays(self._combine)(probabilities)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Those of the rule inside."""
        return declared(self.of).fingerprints

    @property
    def abstaining(self) -> Rule:
        """Itself."""
        return self

    @property
    def by_position(self) -> Abstaining:
        """The rule inside, by position."""
        return Abstaining(declared(self.of).by_position) if self.members else self

    def _combine(self, probabilities: Tensor) -> Tensor:
        absent = probabilities.isnan().any(dim=-1)  # (M, N)
        if not absent.any():
            return self.of(probabilities)
        if declared(self.of).has_numbers:
            rows = self.of(_filled_in(probabilities, absent))
        else:
            rows = _without_absent(self.of, probabilities, absent)
        return rows.masked_fill(absent.all(dim=0)[:, None], 1 / rows.shape[-1])


def _without_absent(rule: Rule, probabilities: Tensor, absent: Tensor) -> Tensor:
    """Line up the members that answer, in their order; frames with equally many are combined together."""
    order = absent.int().argsort(dim=0, stable=True)  # (M, N)
    lined_up = probabilities.gather(0, order[..., None].expand_as(probabilities))
    present = (~absent).sum(dim=0)  # (N,)
    rows = torch.empty_like(probabilities[0])
    for count in range(1, len(probabilities) + 1):
        frames = present == count
        if frames.any():
            rows[frames] = rule(lined_up[:count, frames])
    return rows


def _filled_in(probabilities: Tensor, absent: Tensor) -> Tensor:
    """(M, N, C) with the mean of the members that answer in place of each that abstains."""
    total = probabilities.masked_fill(absent[..., None], 0).sum(dim=0, dtype=wide(probabilities))
    mean = total / (~absent).sum(dim=0).clamp(min=1)[:, None]
    return torch.where(absent[..., None], mean.to(probabilities.dtype), probabilities)
