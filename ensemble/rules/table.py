"""What a rule is: the interface, the tables that find one by name, JSON there and back, and members that abstain.

`FittedRule` has everything that others may ask of a rule, and `declared` gives any rule that interface.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ensemble.outputs.arrays import numbers


class Rule(Protocol):
    """Anything that turns (M, N, C) probabilities into (N, C) rows that sum to one."""

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine the members' rows, frame by frame."""


Ask = Callable[[Sequence[int], Tensor | None], Tensor]
"""Positions of m members and of n frames, None for all: their (m, n, C) log-probabilities."""


@dataclass(frozen=True, eq=False)
class Sums:
    """A rule that predicts the class with the largest sum over the members, which can be certain before all are known.

    To each class a member adds what its own row says. Of any two classes, where the first leads by more than the
    members that are not known yet can make up for, the second is not the one predicted.
    """

    add: Callable[[int, Tensor], Tensor]  #: a member's position and its (N, C) rows -> what it adds, (N, C)
    #: (M, 1, 1) or (M, C, C) float64: the most that a member can add to a class, the last axis, beyond what it adds to
    #: another, the axis before
    swings: Tensor
    start: Tensor | float = 0.0  #: (C,), before any member
    votes: bool = False  #: each member adds by its most probable class alone, so that near-ties in its row matter
    stretch: float = 1.0  #: by how much the lead may shrink on the way from the sums to the rule's probabilities

    @property
    def largest(self) -> Tensor:
        """(M,): the most that each member can add to any class beyond any other."""
        return self.swings.flatten(1).amax(dim=1)


RULES: dict[str, Callable[..., Tensor]] = {}
FITTED_RULES: dict[str, type[FittedRule]] = {}


@dataclass(frozen=True)
class _Declared:
    """What a function declares when it enters the table."""

    scores: Callable[..., Tensor] | None = None  # of a logarithmic rule: (M, N, C) log-probabilities -> (N, C)
    sums: Callable[[int], Sums] | None = None
    continuous: bool = True


_DECLARED: dict[object, _Declared] = {}

_F = TypeVar("_F", bound=Callable[..., Tensor])
_K = TypeVar("_K", bound="type[FittedRule]")


def rule(
    function: _F, *, logarithmic: bool = False, sums: Callable[[int], Sums] | None = None, continuous: bool = True
) -> _F:
    """Enter a function into the table of rules under its own name; its first argument is then checked at each call.

    NumPy arrays are accepted too, and answered with NumPy arrays. Keyword arguments are the rule's settings.

    Args:
        function: (M, N, C) probabilities, then keyword arguments -> (N, C) rows that sum to one.
        logarithmic: the function instead turns (M, N, C) log-probabilities into (N, C) scores of which the softmax is
            taken, so that nothing is lost where probabilities underflow; a frame where all scores are -inf gets the
            members' mean. Written `@functools.partial(rule, logarithmic=True)`.
        sums: from the number of members to the sums whose largest is the class, where the rule is one of that kind.
        continuous: see `FittedRule.continuous`.

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

    @functools.wraps(function)
    def checked(probabilities: Any, **options: Any) -> Any:
        rows = members_first(probabilities)
        if logarithmic:
            result = scores(rows.to(wide(rows)).log(), **options).softmax(dim=-1).to(rows.dtype)
        else:
            result = function(rows, **options)
        return result.numpy() if isinstance(probabilities, np.ndarray) else result

    def scores(logs: Tensor, **options: Any) -> Tensor:
        found = function(logs, **options)
        impossible = (found == -torch.inf).all(dim=-1, keepdim=True)
        if not torch.compiler.is_exporting() and not impossible.any():
            return found
        return torch.where(impossible, logs.exp().mean(dim=0).log(), found)

    enter(function, checked, RULES, FITTED_RULES)
    _DECLARED[checked] = _Declared(scores if logarithmic else None, sums, continuous)
    return cast(_F, checked)


def enter(given: Any, made: Any, table: dict[str, Any], *others: Mapping[str, Any], what: str = "rule") -> None:
    """Enter what was made of a function or class under its name, unless one of another module has it in any table."""
    if (name := getattr(given, "__name__", None)) is None:
        msg = f"expected a function or a class as a {what}, got {type(given).__name__}: {given!r:.60}"
        raise TypeError(msg)
    for names in (table, *others):
        if name in names and names[name].__module__ != made.__module__:
            msg = f"expected a new name for a {what}, got {name!r}, which {names[name].__module__} has already"
            raise ValueError(msg)
    table[name] = made


def members_first(given: Any) -> Tensor:
    """(M, N, C) floating, M and C at least one."""
    tensor = numbers(given, "probabilities")
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
    wanted, unwanted = ([given] if isinstance(given, str) else list(given) for given in (include, exclude))
    named = {name for name in RULES for pattern in wanted if fnmatchcase(name, pattern)}
    return sorted(name for name in named if not any(fnmatchcase(name, pattern) for pattern in unwanted))


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
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"no {what} named {name!r}; {hint}there are {', '.join(names)}"


class FittedRule:
    """The interface of rules with numbers, with the answers that suit most of them.

    A new one is a frozen dataclass under `@fitted_rule` whose fields are its numbers, `fingerprint` and `members`.
    It defines `_combine`, and of the rest only what differs. One that works on logarithms is `logarithmic`, and defines
    `log_scores` instead.

    Attributes:
        fingerprint: identifies the frames that the numbers were fitted on, so that a report can say when the rule is
            judged there; "" if unknown.
        members: names of the members it was fitted on, in order, so that no number reaches the wrong one; () where
            members are known by position only.
        axes: for each field with numbers per member, the axis of the members.
        parts: the rules that it is made of.
    """

    fingerprint: str = ""
    members: tuple[str, ...] = ()
    axes: ClassVar[Mapping[str, int]] = {}
    parts: tuple[Rule, ...] = ()

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        rows = members_first(probabilities)
        if self.count not in (None, len(rows)):
            msg = f"expected probabilities of {self.count} members, as many as the rule has, got {len(rows)}"
            raise ValueError(msg)
        if self.logarithmic:
            result = self.log_scores(rows.to(wide(rows)).log()).softmax(dim=-1).to(rows.dtype)
        else:
            result = self._combine(rows)
        return cast(Tensor, result.numpy()) if isinstance(probabilities, np.ndarray) else result

    def of_logs(self, logs: Tensor, /) -> Tensor:
        """Combine (M, N, C) log-probabilities into (N, C) probabilities.

        What `__call__` makes of their exponentials; a logarithmic rule loses nothing where these underflow.
        """
        return self.log_scores(logs).softmax(dim=-1) if self.logarithmic else self(logs.exp())

    def log_scores(self, logs: Tensor, /) -> Tensor:
        """Combine (M, N, C) log-probabilities into (N, C) numbers whose softmax is the result."""
        return self(logs.exp()).log()

    @property
    def logarithmic(self) -> bool:
        """Whether it works on logarithms, so that `of_logs` is more exact than the rule of the exponentials."""
        return False

    def ask(self, answers: Ask, members: int, *, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
        """Combine what `members` members answer, of which not all need be asked everywhere.

        Args:
            answers: asks some members about some frames.
            members: M.
            tolerance: how far a probability may be from what the same member gives when all are asked together.

        Returns:
            (N, C) probabilities, and (N,) int64, how many members were asked about each frame.
        """
        rows = self.of_logs(answers(range(members), None))
        return rows, torch.full(rows.shape[:1], members, device=rows.device)

    @property
    def continuous(self) -> bool:
        """Whether probabilities that differ by rounding give results that do, but for a frame here and there.

        Votes jump where the best two classes of a member are nearly equal, which is rare; ranks where any two classes
        are, which some of them are on every frame.
        """
        return all(declared(part).continuous for part in self.parts)

    @property
    def sparing(self) -> bool:
        """Whether it asks some members about some frames only."""
        return False

    def sums(self, members: int) -> Sums | None:
        """The sums whose largest is the class; None where the class can depend on all members to the last."""
        return None

    def _combine(self, probabilities: Tensor) -> Tensor:
        """Combine (M, N, C) into (N, C), after the type and the number of members were checked."""
        raise NotImplementedError

    def put(self, **numbers: Any) -> None:
        """For `__post_init__`: set fields to their checked values; then check the members' names."""
        for field, value in numbers.items():
            object.__setattr__(self, field, value)
        object.__setattr__(self, "members", tuple(self.members))
        count = self.count or len(self.members)
        if self.members and not len(self.members) == len(set(self.members)) == count:
            msg = f"expected {count} distinct names of members, or none, got {list(self.members)}"
            raise ValueError(msg)

    @property
    def title(self) -> str:
        """Its name in messages."""
        return type(self).__name__

    @property
    def rule(self) -> Self:
        """Itself: whatever a fit returns has a `rule`."""
        return self

    @property
    def count(self) -> int | None:
        """M, where the numbers determine it."""
        for field, axis in self.axes.items():
            value = getattr(self, field)
            for _ in range(axis):
                value = value[0]
            if isinstance(value, tuple):
                return len(value)
        return None

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Those of all frames that some of its numbers were fitted on, with "" where that is unknown."""
        marks = [mark for part in self.parts for mark in declared(part).fingerprints]
        return tuple(dict.fromkeys(marks)) if self.parts else (self.fingerprint,)

    @property
    def has_numbers(self) -> bool:
        """Whether the rule has numbers; plain functions have none."""
        return bool(self.fingerprints)

    @property
    def used(self) -> tuple[int, ...] | None:
        """Positions of the members that can influence the result; None for all."""
        if self.count is None:
            return None
        numbers = [np.moveaxis(np.abs(getattr(self, field)), axis, 0) for field, axis in self.axes.items()]
        largest = np.max([own.reshape(self.count, -1).max(axis=1) for own in numbers], axis=0)
        return tuple(np.flatnonzero(largest).tolist()) or None

    @property
    def abstaining(self) -> Rule:
        """The same rule for members that may abstain on a frame by a row of NaN; see `ensemble.abstaining`."""
        return Abstaining(self)

    def restricted(self, positions: Sequence[int]) -> FittedRule:
        """The same rule over the members at these positions, by position; the others must be without influence.

        A rule that declares no `axes` refuses to leave members out.
        """
        changed: dict[str, Any] = {"members": ()} if self.members else {}
        if self.count is not None:
            for field, axis in self.axes.items():
                changed[field] = np.take(getattr(self, field), positions, axis).tolist()
        elif self.members and list(positions) != list(range(len(self.members))):
            msg = f"expected a rule that can leave members out, got {type(self).__name__}, which needs all of them"
            raise ValueError(msg)
        return cast(FittedRule, replace(cast(Any, self), **changed))

    def to_json(self) -> dict[str, Any]:
        """The rule as plain data: the name of its class and its fields; `members` only where they are known."""
        held = {field.name: _plain(getattr(self, field.name)) for field in fields(cast(Any, self))}
        return {"rule": type(self).__name__} | {key: held[key] for key in held if key != "members" or held[key]}


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
        ...     def _combine(self, probabilities):
        ...         return probabilities[self.position]
        >>> rule_from_json({"rule": "Favourite", "position": 1})
        Favourite(position=1, fingerprint='', members=())
        >>> del FITTED_RULES["Favourite"]
    """
    enter(kind, kind, FITTED_RULES, RULES)
    return kind


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

    def __post_init__(self) -> None:
        if not callable(self.function):
            msg = f"expected a rule, such as ensemble.mean or the rule of a fit, got {str(self.function)[:60]!r}"
            raise TypeError(msg)

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        return self.function(probabilities)

    @property
    def logarithmic(self) -> bool:
        return self._declared.scores is not None

    def log_scores(self, logs: Tensor, /) -> Tensor:
        scores, options = self._declared.scores, self._bound[1]
        return super().log_scores(logs) if scores is None else scores(logs, **options)

    @property
    def title(self) -> str:
        return str(getattr(self._bound[0], "__name__", self.function))

    @property
    def _declared(self) -> _Declared:
        function = self._bound[0]
        return _DECLARED.get(function, _Declared()) if isinstance(function, Hashable) else _Declared()

    @property
    def _bound(self) -> tuple[Any, dict[str, Any]]:
        """The function, and the settings that are bound to it."""
        bound = self.function
        return (bound.func, bound.keywords) if isinstance(bound, functools.partial) else (bound, {})

    @property
    def fingerprints(self) -> tuple[str, ...]:
        return ()

    def sums(self, members: int) -> Sums | None:
        found = self._declared.sums
        return found(members) if found else None

    @property
    def continuous(self) -> bool:
        return self._declared.continuous

    @property
    def abstaining(self) -> Rule:
        return Abstaining(self.function)

    def to_json(self) -> dict[str, Any]:
        """Its name in the table, and its settings."""
        function, options = self._bound
        for name, known in RULES.items():
            if known is function:
                return {"rule": name, **options}
        msg = f"cannot write the rule {self.function!r}: it is not in the table; put @ensemble.rule above its function"
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
    options = {key: read(value) for key, value in data.items() if key != "rule"}
    name = str(data.get("rule"))
    kind: Any = FITTED_RULES.get(name) or get_rule(name)
    known = list(inspect.signature(kind).parameters)[name in RULES :]
    try:
        if unknown := set(options).difference(known):
            raise TypeError(unknown)
        if name in RULES:
            return functools.partial(kind, **options) if options else cast(Rule, kind)
        return cast(Rule, kind(**options))
    except TypeError as error:
        msg = f"expected the rule {name} with some of {known}, got {str({key: data[key] for key in options})[:80]}"
        raise ValueError(msg) from error


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return declared(value).to_json() if callable(value) else value


def read(value: Any) -> Any:
    """Lists as tuples, and the rules that a rule is made of."""
    if isinstance(value, list):
        return tuple(read(item) for item in value)
    return rule_from_json(value) if isinstance(value, Mapping) else value


def abstentions(probabilities: Tensor) -> Tensor:
    """(M,) int64: on how many frames each member abstains, that is, has a NaN in its row."""
    return members_first(probabilities).isnan().any(dim=-1).sum(dim=-1)


def abstaining(rule: Rule) -> Rule:
    """The same rule, for members that may abstain on a frame by a row of NaN.

    - A rule of the table combines the members that do not abstain as if there were no others.
    - `WeightedMean` renormalises the weights of those members.
    - Other rules with numbers per member take, for a member that abstains, the mean of those that do not.
    - Where every member abstains, all classes are equal; where none does, the result is as before.

    `evaluate` does this by itself for outputs that declare abstentions.

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
    """What `abstaining` makes of a rule, `of`, that cannot deal with NaN itself."""

    of: Rule

    def __post_init__(self) -> None:
        take_over(self, (self.of,))

    @property
    def abstaining(self) -> Rule:
        """Itself."""
        return self

    @property
    def title(self) -> str:
        """That of the rule inside."""
        return declared(self.of).title

    @property
    def logarithmic(self) -> bool:
        """As the rule inside."""
        return declared(self.of).logarithmic

    def sums(self, members: int) -> Sums | None:
        """Those of a rule without numbers, to which a member that abstains adds nothing."""
        found = None if self.has_numbers else declared(self.of).sums(members)
        return None if found is None else present(found)

    def restricted(self, positions: Sequence[int]) -> FittedRule:
        """The rule inside over these members."""
        return Abstaining(declared(self.of).restricted(positions)) if self.has_numbers else self

    def log_scores(self, logs: Tensor, /) -> Tensor:
        """Those of the rule inside over the members that answer."""
        return self._over_present(logs, declared(self.of).log_scores, logs=True)

    def _combine(self, probabilities: Tensor) -> Tensor:
        return self._over_present(probabilities, self.of, logs=False)

    def _over_present(self, given: Tensor, combine: Callable[[Tensor], Tensor], *, logs: bool) -> Tensor:
        """The rule over the members that answer; `given` are probabilities, or their logarithms."""
        absent = given.isnan().any(dim=-1)  # (M, N)
        if not absent.any():
            return combine(given)
        if self.has_numbers:  # the mean of the members that answer in place of each that abstains
            rows = given.to(wide(given)).exp() if logs else given
            total = rows.masked_fill(absent[..., None], 0).sum(dim=0, dtype=wide(rows))
            mean = (total / (~absent).sum(dim=0).clamp(min=1)[:, None]).to(given.dtype)
            rows = combine(torch.where(absent[..., None], mean.log() if logs else mean, given))
        else:
            # line up the members that answer, in their order; frames with equally many are combined together
            order, present = absent.int().argsort(dim=0, stable=True), (~absent).sum(dim=0)  # (M, N), (N,)
            lined_up = given.gather(0, order[..., None].expand_as(given))
            rows = torch.empty_like(given[0])
            for count in torch.unique(present[present > 0]).tolist():
                rows[present == count] = combine(lined_up[:count, present == count])
        return rows.masked_fill(absent.all(dim=0)[:, None], 1 / rows.shape[-1])


def present(sums: Sums) -> Sums:
    """The same sums, to which a member that abstains by a row of NaN adds nothing."""

    def add(position: int, rows: Tensor) -> Tensor:
        absent = rows.isnan().any(dim=-1, keepdim=True)
        return sums.add(position, rows).masked_fill(absent, 0)

    return replace(sums, add=add)


def take_over(rule: FittedRule, parts: tuple[Rule, ...]) -> None:
    """For `__post_init__` of a rule made of rules: the names of their members, and the first fingerprint they know."""
    if strange := [part for part in parts if not callable(part)]:
        msg = f"expected a rule, got {str(strange[0])[:60]}"
        raise ValueError(msg)  # it comes from a file
    names = list(dict.fromkeys(declared(part).members for part in parts if declared(part).members))
    if len(names) > 1:
        msg = f"expected rules that were fitted on the same members in one order, got {names[0]} and {names[1]}"
        raise ValueError(msg)
    object.__setattr__(rule, "parts", parts)
    rule.put(members=names[0] if names else (), fingerprint=next(filter(None, rule.fingerprints), ""))
