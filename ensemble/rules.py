"""Rules: functions from what M members say, (M, N, C) probabilities, to one distribution per frame, (N, C).

A rule is any callable of that shape whose rows sum to one, so argmax, log-loss and calibration serve every
rule alike. Rules without numbers are functions under `@rule`; rules with numbers are frozen dataclasses made
from what a `fit_*` function returned. Nothing is fitted here.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
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
    RULES[name] = _on_arrays(function)
    return cast(_F, RULES[name])


def _on_arrays(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def checked(probabilities: Any, **options: Any) -> Any:
        result = function(_members_first(probabilities), **options)
        return result.numpy() if isinstance(probabilities, np.ndarray) else result

    return checked


def _members_first(given: Any) -> Tensor:
    """(M, N, C) floating, M and C at least one."""
    tensor = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    if tensor.ndim != 3 or 0 in (tensor.shape[0], tensor.shape[2]):
        msg = f"expected probabilities of shape (members, frames, classes), got {tuple(tensor.shape)}"
        raise ValueError(msg)
    return tensor if tensor.is_floating_point() else tensor.float()


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
        near = difflib.get_close_matches(name, RULES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        msg = f"no rule named {name!r}; {hint}there are {', '.join(list_rules())}"
        raise ValueError(msg)
    return RULES[name]


@rule
def majority(probabilities: Tensor) -> Tensor:
    """One member, one vote; ties in votes fall to the higher mean probability.

    Args:
        probabilities: (M, N, C), each row summing to one.

    Returns:
        (N, C), `(votes + mean) / (M + 1)`: the mean is less than a whole vote, so it only decides ties
        (see `tie_rate`). Where a member's own top classes are equal, its vote goes to the first of them.
    """
    votes = _votes(probabilities).to(probabilities.dtype)
    return (votes + probabilities.mean(dim=0)) / (len(probabilities) + 1)


def _votes(probabilities: Tensor) -> Tensor:
    """(N, C) int64: how many members put each class first."""
    votes = torch.zeros(probabilities.shape[1:], dtype=torch.int64, device=probabilities.device)
    for row in probabilities:
        choice = row.argmax(dim=-1, keepdim=True)  # (N, 1)
        votes.scatter_add_(1, choice, torch.ones_like(choice))
    return votes


def tie_rate(probabilities: Tensor) -> float:
    """Fraction of the frames where two or more classes share the most votes; 0 where there are no frames.

    Example:
        >>> tie_rate(torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.2, 0.8], [0.6, 0.4]]]))
        0.5
    """
    votes = _votes(_members_first(probabilities))
    if len(votes) == 0:
        return 0.0
    tied = (votes == votes.amax(dim=1, keepdim=True)).sum(dim=1) > 1
    return float(tied.double().mean())


@rule
def maximum(probabilities: Tensor) -> Tensor:
    """Follow, frame by frame, the member that is most sure of itself.

    Args:
        probabilities: (M, N, C), each row summing to one.

    Returns:
        (N, C), the row of the surest member; on a tie, of the first.

    References:
        Kittler et al., "On combining classifiers", IEEE TPAMI 20(3), 1998.
    """
    surest = probabilities.amax(dim=-1).argmax(dim=0)  # (N,)
    return probabilities[surest, torch.arange(len(surest), device=surest.device)]


@rule
def minimum(probabilities: Tensor) -> Tensor:
    """Believe in a class as much as its greatest doubter does.

    Returns:
        (N, C), each class's lowest probability, normalised; the mean where every class has a doubter that
        gives it zero.
    """
    return _normalised(probabilities.amin(dim=0), probabilities)


@rule
def mean(probabilities: Tensor) -> Tensor:
    """The members' arithmetic mean: the linear pool with equal weights.

    Example:
        >>> mean(torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]]))
        tensor([[0.5000, 0.5000]])
    """
    return probabilities.mean(dim=0)


@rule
def median(probabilities: Tensor) -> Tensor:
    """Each class's median over the members, normalised: one wild member moves nothing.

    Returns:
        (N, C); for even M the mean of the middle two; the members' mean where all medians are zero.
    """
    members = len(probabilities)
    lower = probabilities.kthvalue((members + 1) // 2, dim=0).values
    upper = lower if members % 2 else probabilities.kthvalue(members // 2 + 1, dim=0).values
    return _normalised((lower + upper) / 2, probabilities)


@rule
def trimmed_mean(probabilities: Tensor, *, trim: float = 0.2) -> Tensor:
    """The mean of what is left when each class's most extreme members are set aside.

    Args:
        probabilities: (M, N, C), each row summing to one.
        trim: fraction of the members set aside at each end, rounded down; in [0, 0.5).

    Raises:
        ValueError: `trim` is outside its range.
    """
    if not 0 <= trim < 0.5:
        msg = f"expected trim in [0, 0.5), got {trim}"
        raise ValueError(msg)
    members = len(probabilities)
    aside = math.floor(trim * members + 1e-9)  # 0.2 * 5 is one, whatever the rounding
    kept = probabilities.sort(dim=0).values[aside : members - aside]
    return _normalised(kept.mean(dim=0), probabilities)


@rule
def product(probabilities: Tensor) -> Tensor:
    """The normalised product: what independent members with equal priors would conclude.

    Computed from sums of logarithms, so many members do not underflow. Overconfident when members agree
    for a common reason, as they do; see `log_mean`.

    Returns:
        (N, C); the members' mean where every class has a member that gives it zero.
    """
    return _pooled_logs(probabilities, [1.0] * len(probabilities))


@rule
def log_mean(probabilities: Tensor) -> Tensor:
    """The normalised geometric mean: the log-linear pool with equal weights.

    Returns:
        (N, C); the members' mean where every class has a member that gives it zero.

    References:
        Hinton, "Products of experts", ICANN 1999.
    """
    return _pooled_logs(probabilities, [1 / len(probabilities)] * len(probabilities))


@rule
def power_mean(probabilities: Tensor, *, power: float = 0.5) -> Tensor:
    """The normalised power mean: 1 is the arithmetic mean, towards 0 the geometric, large the maximum.

    Args:
        probabilities: (M, N, C), each row summing to one.
        power: the exponent, positive; half of it way between `mean` and `log_mean`.

    Raises:
        ValueError: `power` is not a positive number.
    """
    if not 0 < power < math.inf:
        msg = f"expected a positive power, got {power}; towards zero it becomes log_mean"
        raise ValueError(msg)
    top = probabilities.amax(dim=(0, 2), keepdim=True)  # keeps large powers from underflowing
    raised = (probabilities / top).pow(power).mean(dim=0).pow(1 / power)
    return _normalised(raised, probabilities)


@rule
def borda(probabilities: Tensor) -> Tensor:
    """Each member ranks the classes; a class's points are how many it beats, equal ones half.

    Returns:
        (N, C), points plus half the mean probability, normalised: the mean only decides ties.

    References:
        Ho, Hull, Srihari, "Decision combination in multiple classifier systems", IEEE TPAMI 16(1), 1994.
    """
    members, _, classes = probabilities.shape
    points = torch.zeros_like(probabilities[0])
    for row in probabilities:
        ranked, row = row.sort(dim=-1).values.contiguous(), row.contiguous()
        below, upto = torch.searchsorted(ranked, row), torch.searchsorted(ranked, row, right=True)
        points += (below + upto - 1) / 2
    return (points + probabilities.mean(dim=0) / 2) / (members * classes * (classes - 1) / 2 + 0.5)


def _normalised(scores: Tensor, probabilities: Tensor) -> Tensor:
    """(N, C) non-negative scores as rows that sum to one; the members' mean where a row is all zero."""
    total = scores.sum(dim=-1, keepdim=True)
    return torch.where(total == 0, probabilities.mean(dim=0), scores / total)


def _pooled_logs(probabilities: Tensor, weights: Iterable[float]) -> Tensor:
    """(N, C) rows proportional to the product of the members' powers; members of weight 0 stay out."""
    wide = torch.promote_types(probabilities.dtype, torch.float32)
    logs = torch.zeros(probabilities.shape[1:], dtype=wide, device=probabilities.device)
    for row, weight in zip(probabilities, weights, strict=True):
        if weight:
            logs += weight * row.to(wide).log()
    pooled = logs.softmax(dim=-1).to(probabilities.dtype)
    hopeless = (logs == -math.inf).all(dim=-1, keepdim=True)
    return torch.where(hopeless, probabilities.mean(dim=0), pooled) if hopeless.any() else pooled


@dataclass(frozen=True)
class WeightedMean:
    """The linear pool: a convex combination of the members' rows.

    Args:
        weights: M finite, non-negative numbers with a positive sum, as a tensor, an array or any sequence;
            kept as floats that sum to one. A member of weight 0 has no effect, not even where it says NaN.
        fingerprint: of the frames that the weights were fitted on, so a report can say when it judges
            a rule on these very frames; "" if the weights come from elsewhere.
        abstain: members may abstain by a row of NaN; the others' weights are then renormalised on that
            frame. Frames where nobody with a weight speaks get equal probabilities. See `abstentions`.

    Raises:
        ValueError: the weights are not as above, or their number is not the number of members.

    Example:
        >>> WeightedMean([3, 1])(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([[0.7500, 0.2500]])
    """

    weights: tuple[float, ...]
    fingerprint: str = ""
    abstain: bool = False

    def __post_init__(self) -> None:
        numbers = _numbers(self.weights, "weights")
        total = math.fsum(numbers)
        if min(numbers) < 0 or total <= 0:
            msg = f"expected non-negative weights with a positive sum, got {list(numbers)}"
            raise ValueError(msg)
        object.__setattr__(self, "weights", tuple(number / total for number in numbers))

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        return _call(self._combine, probabilities, len(self.weights))

    def _combine(self, probabilities: Tensor) -> Tensor:
        pooled = torch.zeros_like(probabilities[0])
        spoken = torch.zeros_like(pooled[:, :1])  # (N, 1), the weight that took part
        for row, weight in zip(probabilities, self.weights, strict=True):
            if weight == 0:
                continue
            speaks = ~row.isnan().any(dim=-1, keepdim=True) if self.abstain else None
            pooled += weight * (row if speaks is None else row.where(speaks, torch.zeros_like(row)))
            if speaks is not None:
                spoken += weight * speaks
        if not self.abstain:
            return pooled
        return torch.where(spoken > 0, pooled / spoken, torch.full_like(pooled, 1 / pooled.shape[-1]))


def abstentions(probabilities: Tensor) -> Tensor:
    """(M,) int64: on how many frames each member abstains, that is, has a NaN in its row."""
    return _members_first(probabilities).isnan().any(dim=-1).sum(dim=-1)


@dataclass(frozen=True)
class LogPool:
    """The log-linear pool: rows proportional to the product of the members' rows to the power of a weight.

    Args:
        weights: M finite, non-negative numbers; their sum is free (a sum below one softens the result).
        fingerprint: of the frames that the weights were fitted on.

    Example:
        >>> LogPool([1, 1])(torch.tensor([[[0.6, 0.4]], [[0.6, 0.4]]]))  # .36 to .16
        tensor([[0.6923, 0.3077]])
    """

    weights: tuple[float, ...]
    fingerprint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _numbers(self.weights, "weights"))
        if min(self.weights) < 0:
            msg = f"expected non-negative weights, got {list(self.weights)}"
            raise ValueError(msg)

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C); the members' mean where every class is ruled out by somebody."""
        return _call(lambda p: _pooled_logs(p, self.weights), probabilities, len(self.weights))


def _numbers(values: Any, what: str) -> tuple[float, ...]:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        msg = f"expected {what} as a non-empty list of finite numbers, got {array.tolist()}"
        raise ValueError(msg)
    return tuple(array.tolist())


def _call(combine: Callable[[Tensor], Tensor], given: Any, members: int) -> Tensor:
    probabilities = _members_first(given)
    if len(probabilities) != members:
        msg = f"expected probabilities of {members} members, one for each weight, got {len(probabilities)}"
        raise ValueError(msg)
    return _on_arrays(combine)(given)


_FITTED: Mapping[str, type[Any]] = {"WeightedMean": WeightedMean, "LogPool": LogPool}


def rule_to_json(rule: Rule) -> dict[str, Any]:
    """A rule as plain data: its name in the table, and its numbers.

    Raises:
        ValueError: the rule is neither in the table nor one of the fitted rules.

    Example:
        >>> rule_to_json(WeightedMean([1, 3]))
        {'rule': 'WeightedMean', 'weights': [0.25, 0.75], 'fingerprint': '', 'abstain': False}
    """
    name = type(rule).__name__
    if _FITTED.get(name) is type(rule):
        fields = asdict(cast(Any, rule))
        return {"rule": name} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    options = rule.keywords if isinstance(rule, functools.partial) else {}
    function = rule.func if isinstance(rule, functools.partial) else rule
    for known, entry in RULES.items():
        if entry is function:
            return {"rule": known, **options}
    msg = f"cannot write the rule {rule!r}: it is not in the table; put @ensemble.rule above its function"
    raise ValueError(msg)


def rule_from_json(data: Mapping[str, Any]) -> Rule:
    """The rule that `rule_to_json` wrote; names are looked up in the table, nothing is imported.

    Raises:
        ValueError: the name is unknown, or the numbers do not fit the rule.

    Example:
        >>> rule_from_json({"rule": "mean"}) is mean
        True
    """
    options = dict(data)
    name = str(options.pop("rule", None))
    maker = _FITTED.get(name)
    try:
        if maker is not None:
            return cast(Rule, maker(**options))
    except TypeError as error:
        msg = f"cannot read the rule {name!r} from {sorted(options)}: {error}"
        raise ValueError(msg) from error
    found = get_rule(name)
    return functools.partial(found, **options) if options else found
