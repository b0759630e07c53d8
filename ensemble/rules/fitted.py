"""Rules with numbers, and rules made of rules: frozen dataclasses under the interface `FittedRule`.

The `fit_*` functions return them as `fit.rule`. Their fields `fingerprint` and `members` are described in `FittedRule`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ensemble.outputs import MemberOutputs, expect_outputs
from ensemble.outputs.arrays import floats, numbers
from ensemble.rules.pooling import linear, weighted_sum
from ensemble.rules.table import Ask, FittedRule, Rule, Sums, declared, fitted_rule, present, read, take_over, wide

_CELLS = 2**22  # probabilities combined at once: 16 MiB


@fitted_rule
@dataclass(frozen=True)
class WeightedMean(FittedRule):
    """The linear pool: a convex combination of the members' rows.

    Args:
        weights: M finite, non-negative numbers with a positive sum, as a tensor, an array or any sequence;
            kept as floats that sum to one. A member of weight 0 has no effect, not even where it gives NaN.
        abstain: members may abstain by a row of NaN; the others' weights are then renormalised on that
            frame. Frames where every member with a weight abstains get equal probabilities. See `abstaining`.

    Raises:
        ValueError: the weights are not as above, or their number is not the number of members.

    Example:
        >>> WeightedMean([3, 1])(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([[0.7500, 0.2500]])
    """

    weights: tuple[float, ...]
    fingerprint: str = ""
    abstain: bool = False
    members: tuple[str, ...] = ()
    axes: ClassVar = {"weights": 0}

    def __post_init__(self) -> None:
        weights = _numbers(self.weights, "weights", least=0.0)
        total = math.fsum(weights)
        if total <= 0 or not math.isfinite(total):
            msg = f"expected weights with a positive sum, got {list(weights)}"
            raise ValueError(msg)
        if abs(total - 1) > np.finfo(float).eps:  # weights that were normalised before stay as they are
            weights = tuple(weight / total for weight in weights)
        self.put(weights=weights)

    @property
    def abstaining(self) -> WeightedMean:
        """The same weights, renormalised where members abstain."""
        return replace(self, abstain=True)

    def sums(self, members: int) -> Sums:
        """Those of a linear pool: that the weights of the members present are renormalised changes no class."""
        return present(linear(self.weights)) if self.abstain else linear(self.weights)

    def _combine(self, probabilities: Tensor) -> Tensor:
        if not self.abstain:
            return weighted_sum(probabilities, self.weights)
        absent = probabilities.isnan().any(dim=-1, keepdim=True)  # (M, N, 1)
        present = weighted_sum((~absent).to(probabilities.dtype), self.weights)  # (N, 1)
        pooled = weighted_sum(probabilities.masked_fill(absent, 0), self.weights)
        equal = torch.full_like(pooled, 1 / pooled.shape[-1])
        return torch.where(present > 0, pooled / present, equal)


@fitted_rule
@dataclass(frozen=True)
class ClasswiseMean(FittedRule):
    """A linear pool whose weights depend on the class that a common linear pool predicts.

    Args:
        common: M weights, as in `WeightedMean`, of the pool that predicts.
        weights: C rows of M weights, one for the frames that `common` predicts as that class.

    Raises:
        ValueError: a row is not M weights, or there are not as many rows as classes.

    Example:
        >>> rule = ClasswiseMean([1, 1], [[1, 0], [0, 1]])  # of two members, each decides one class
        >>> rule(torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]]))  # their mean predicts the first class
        tensor([[0.9000, 0.1000]])
    """

    common: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    fingerprint: str = ""
    members: tuple[str, ...] = ()
    axes: ClassVar = {"common": 0, "weights": 1}

    def __post_init__(self) -> None:
        common = WeightedMean(self.common).weights
        weights = tuple(WeightedMean(row).weights for row in self.weights)
        sizes = sorted({len(row) for row in weights})
        if sizes != [len(common)]:
            msg = f"expected a row of {len(common)} weights for each class, got rows of {sizes}"
            raise ValueError(msg)
        self.put(common=common, weights=weights)

    def _combine(self, probabilities: Tensor) -> Tensor:
        if probabilities.shape[-1] != len(self.weights):
            came = probabilities.shape[-1]
            msg = f"expected probabilities of {len(self.weights)} classes, as many as the rule has, got {came}"
            raise ValueError(msg)
        predicted = weighted_sum(probabilities, self.common).argmax(dim=-1)
        dtype = wide(probabilities)
        own = torch.tensor(self.weights, dtype=dtype, device=probabilities.device)[predicted]  # (N, M)
        total = torch.zeros(probabilities.shape[1:], dtype=dtype, device=probabilities.device)
        for row, weight in zip(probabilities, own.T, strict=True):
            total += torch.where(weight[:, None] > 0, weight[:, None] * row, 0)  # weight 0 never poisons
        return total.to(probabilities.dtype)


@fitted_rule
@dataclass(frozen=True)
class LogPool(FittedRule):
    """The log-linear pool: rows proportional to the product of the members' rows to the power of a weight.

    Probabilities below 1e-30 count as 1e-30, here and in `fit_log_linear`: one member's zero weighs much, but it
    is no veto.

    Args:
        weights: M finite, non-negative numbers; their sum is free: below one it softens, above it sharpens.

    Example:
        >>> LogPool([1, 1])(torch.tensor([[[0.6, 0.4]], [[0.6, 0.4]]]))  # .36 to .16
        tensor([[0.6923, 0.3077]])
    """

    weights: tuple[float, ...]
    fingerprint: str = ""
    members: tuple[str, ...] = ()
    axes: ClassVar = {"weights": 0}
    floor: ClassVar[float] = 1e-30

    def __post_init__(self) -> None:
        self.put(weights=_numbers(self.weights, "weights", least=0.0))

    @property
    def logarithmic(self) -> bool:
        """It is."""
        return True

    def log_scores(self, logs: Tensor, /) -> Tensor:
        """The weighted sum of logarithms."""
        return weighted_sum(logs.clamp(min=math.log(self.floor)), self.weights)


@fitted_rule
@dataclass(frozen=True)
class Temperature(FittedRule):
    """Softens (above one) or sharpens (below one) probabilities: softmax of their logarithms over a value.

    Not a rule by itself: a step in a `Chain`, before a rule with one value per member, or after it.

    Args:
        value: one positive number for rows of any origin, or M of them for (M, N, C).

    Example:
        >>> Temperature(0.5)(torch.tensor([[0.6, 0.4]]))  # squared and normalised
        tensor([[0.6923, 0.3077]])
    """

    value: float | tuple[float, ...]
    fingerprint: str = ""
    members: tuple[str, ...] = ()
    axes: ClassVar = {"value": 0}

    def __post_init__(self) -> None:
        values = _numbers(np.atleast_1d(floats(self.value)), "temperatures")
        if min(values) <= 0:
            msg = f"expected positive temperatures, got {list(values)}"
            raise ValueError(msg)
        self.put(value=values if floats(self.value).ndim else values[0])

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Rows of the same shape and order, (..., C), or (M, N, C) where there are M values."""
        if isinstance(self.value, tuple):
            return super().__call__(probabilities)
        rows = numbers(probabilities, "probabilities")
        result = self.log_scores(rows.to(wide(rows)).log()).softmax(dim=-1).to(rows.dtype)
        return cast(Tensor, result.numpy()) if isinstance(probabilities, np.ndarray) else result

    @property
    def logarithmic(self) -> bool:
        """It is."""
        return True

    @property
    def abstaining(self) -> Temperature:
        """Itself: it passes NaN on to the next step of its chain."""
        return self

    def log_scores(self, logs: Tensor, /) -> Tensor:
        """The logarithms over the value, of the shape that they have."""
        value = torch.tensor(self.value, dtype=logs.dtype, device=logs.device)
        return logs / (value[:, None, None] if value.ndim else value)


@fitted_rule
@dataclass(frozen=True)
class BayesVote(FittedRule):
    """Votes weighed by the mistakes each member is known to make, taken as independent given the truth.

    Args:
        log_likelihoods: (M, C, C), for each member a table by predicted class, then true class, of the logarithm
            of P(predicted | true).
        log_priors: (C,) logarithms of the classes' frequencies.

    References:
        Xu, Krzyzak, Suen, "Methods of combining multiple classifiers", IEEE Trans. SMC 22(3), 1992.
    """

    log_likelihoods: tuple[tuple[tuple[float, ...], ...], ...]
    log_priors: tuple[float, ...]
    fingerprint: str = ""
    members: tuple[str, ...] = ()
    axes: ClassVar = {"log_likelihoods": 0}

    def __post_init__(self) -> None:
        priors = _numbers(self.log_priors, "log priors")
        shape = ("M", len(priors), len(priors))
        self.put(log_priors=priors, log_likelihoods=_numbers(self.log_likelihoods, "log likelihoods", shape))

    def sums(self, members: int) -> Sums:
        """The log-likelihoods of what each member predicts."""
        tables = torch.tensor(self.log_likelihoods, dtype=torch.float64)  # (M, C, C)
        swings = torch.stack([(table[:, None, :] - table[:, :, None]).amax(dim=0) for table in tables])

        def add(position: int, rows: Tensor) -> Tensor:
            return tables[position].to(rows.device)[rows.argmax(dim=-1)]

        return Sums(add, swings, torch.tensor(self.log_priors, dtype=torch.float64), votes=True)

    def _combine(self, probabilities: Tensor) -> Tensor:
        tables = torch.tensor(self.log_likelihoods, dtype=torch.float64, device=probabilities.device)
        logs = torch.tensor(self.log_priors, dtype=torch.float64, device=probabilities.device)
        for row, table in zip(probabilities, tables, strict=True):
            logs = logs + table[row.argmax(dim=-1)]  # (N, C)
        return logs.softmax(dim=-1).to(probabilities.dtype)


@fitted_rule
@dataclass(frozen=True)
class Stacked(FittedRule):
    """Multinomial logistic regression on all members' log-probabilities.

    Args:
        coefficients: (C, M, C), by predicted class, member, and class whose log-probability the member gives.
        intercepts: (C,).
        floor: probabilities below it count as it.

    References:
        Wolpert, "Stacked generalization", Neural Networks 5, 1992.
    """

    coefficients: tuple[tuple[tuple[float, ...], ...], ...]
    intercepts: tuple[float, ...]
    floor: float = 1e-6
    fingerprint: str = ""
    members: tuple[str, ...] = ()
    axes: ClassVar = {"coefficients": 1}

    def __post_init__(self) -> None:
        intercepts = _numbers(self.intercepts, "intercepts")
        shape = (len(intercepts), "M", len(intercepts))
        self.put(intercepts=intercepts, coefficients=_numbers(self.coefficients, "coefficients", shape))

    def _combine(self, probabilities: Tensor) -> Tensor:
        dtype = wide(probabilities)
        slopes = torch.tensor(self.coefficients, dtype=dtype, device=probabilities.device)  # (C, M, C)
        logits = torch.tensor(self.intercepts, dtype=dtype, device=probabilities.device)
        for member, row in enumerate(probabilities):
            logits = logits + row.to(dtype).clamp(min=self.floor).log() @ slopes[:, member].T
        return logits.softmax(dim=-1).to(probabilities.dtype)


@fitted_rule
@dataclass(frozen=True)
class Chain(FittedRule):
    """Steps one after the other, as one rule: temperatures, a rule, a temperature on its result.

    Args:
        steps: each takes what the one before returns; exactly one turns (M, N, C) into (N, C).

    Example:
        >>> from ensemble import mean
        >>> sharper = Chain((Temperature((2.0, 1.0)), mean, Temperature(0.5)))
        >>> sharper(torch.tensor([[[0.9, 0.1]], [[0.6, 0.4]]]))
        tensor([[0.8118, 0.1882]])
    """

    steps: tuple[Rule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        take_over(self, self.steps)

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        for step in self.steps:
            probabilities = step(probabilities)
        return probabilities

    def log_scores(self, logs: Tensor, /) -> Tensor:
        """Those of the last step; the steps before it hand on log-probabilities."""
        *before, last = map(declared, self.steps)
        for step in before:
            logs = step.log_scores(logs).log_softmax(dim=-1)
        return last.log_scores(logs)

    @property
    def logarithmic(self) -> bool:
        """Whether a step is."""
        return any(declared(step).logarithmic for step in self.steps)

    def sums(self, members: int) -> Sums | None:
        """Those of its first step, where one temperature each follows: it keeps the order of the classes."""
        first, *after = self.steps
        found = declared(first).sums(members)
        values = [step.value for step in after if isinstance(step, Temperature) and isinstance(step.value, float)]
        if found is None or len(values) < len(after):
            return None
        return replace(found, stretch=math.prod(max(1.0, value) for value in values))

    @property
    def used(self) -> tuple[int, ...] | None:
        """The members that every step uses."""
        known = [set(used) for step in self.steps if (used := declared(step).used) is not None]
        return tuple(sorted(set.intersection(*known))) if known else None

    @property
    def abstaining(self) -> Chain:
        """Each step for members that may abstain."""
        return Chain(tuple(declared(step).abstaining for step in self.steps))

    def restricted(self, positions: Sequence[int]) -> Chain:
        """Each step over these members, except functions, which know no members."""
        steps = ((step, declared(step)) for step in self.steps)
        return Chain(tuple(rule.restricted(positions) if rule.has_numbers else step for step, rule in steps))


@fitted_rule
@dataclass(frozen=True)
class Among(FittedRule):
    """A rule applied to some of the members that are judged together, such as those of a saved ensemble.

    Args:
        of: the rule over these members.
        places: their positions among all members, in the rule's order.
    """

    of: Rule
    places: tuple[int, ...]

    def __post_init__(self) -> None:
        take_over(self, (self.of,))
        self.put(places=tuple(self.places), members=())

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine those of (M, N, C) into (N, C)."""
        return self.of(probabilities[list(self.places)])

    def log_scores(self, logs: Tensor, /) -> Tensor:
        """Those of the rule inside."""
        return declared(self.of).log_scores(logs[list(self.places)])

    @property
    def logarithmic(self) -> bool:
        """As the rule inside."""
        return declared(self.of).logarithmic

    @property
    def title(self) -> str:
        """That of the rule inside."""
        return declared(self.of).title

    @property
    def sparing(self) -> bool:
        """As the rule inside."""
        return declared(self.of).sparing

    def ask(self, answers: Ask, members: int, *, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
        """The rule inside asks; one that is sparing only those of its members."""
        if not self.sparing:
            return super().ask(answers, members, tolerance=tolerance)

        def among(positions: Sequence[int], frames: Tensor | None) -> Tensor:
            return answers([self.places[position] for position in positions], frames)

        return declared(self.of).ask(among, len(self.places), tolerance=tolerance)

    @property
    def used(self) -> tuple[int, ...]:
        """Of its members, those that the rule inside uses."""
        used = declared(self.of).used
        return self.places if used is None else tuple(self.places[position] for position in used)

    @property
    def abstaining(self) -> Among:
        """The rule inside for members that may abstain."""
        return Among(declared(self.of).abstaining, self.places)

    def restricted(self, positions: Sequence[int]) -> FittedRule:
        """The rule inside over those of its members that are left."""
        kept = [k for k, place in enumerate(self.places) if place in positions]
        places = [list(positions).index(self.places[k]) for k in kept]
        return _placed(declared(self.of).restricted(kept), places, len(positions))


def rule_for(rule: Rule, members: Sequence[str]) -> FittedRule:
    """The rule for outputs of these members, its own found among them by name where it knows names.

    Args:
        rule: any rule; one that knows no names takes the members as they come.
        members: M names in the order of the outputs' first axis. Members that the rule does not know get no weight. A
            member whose weight in the rule is zero may be missing.

    Returns:
        The rule by position, without names.

    Raises:
        ValueError: a member that the rule needs is missing; the message names it.

    Example:
        >>> rule_for(WeightedMean([1, 3], members=("a", "b")), ["b", "c", "a"])
        Among(of=WeightedMean(weights=(0.25, 0.75), fingerprint='', abstain=False, members=()), places=(2, 0))
    """
    asked, names = declared(rule), list(members)
    if not asked.members:
        return asked
    needed = range(len(asked.members)) if asked.used is None else asked.used
    missing = [asked.members[position] for position in needed if asked.members[position] not in names]
    if missing:
        msg = f"expected the members that the rule was fitted on, {list(asked.members)}, got none named {missing}"
        raise ValueError(f"{msg} among {names}")
    kept = [position for position, name in enumerate(asked.members) if name in names]
    return _placed(asked.restricted(kept), [names.index(asked.members[position]) for position in kept], len(names))


def combined(rule: Rule, outputs: MemberOutputs) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A rule over outputs, block by block: a slice of the frames, (M, b, C) probabilities, and the rule's (b, C) rows.

    A member that abstains on a frame, where the outputs declare it, is left out there.

    Raises:
        ValueError: a member that the rule needs is missing, NaN that is not declared, or rows that do not fit.
    """
    expect_outputs(outputs)
    members, _, classes = outputs.shape
    whole = rule_for(rule, outputs.members)
    whole = declared(whole.abstaining if outputs.abstain else whole)
    for where, probabilities in outputs.blocks(max(1, _CELLS // (members * classes)), nan="if declared"):
        logs = outputs.log_probabilities[:, where].float()
        rows = whole.of_logs(logs) if whole.logarithmic else whole(probabilities)
        rows = numbers(rows, "rows from the rule").detach().cpu()
        if rows.shape != probabilities.shape[1:]:
            msg = f"expected rows of shape {tuple(probabilities.shape[1:])} from the rule, got {tuple(rows.shape)}"
            raise ValueError(msg)
        yield where, probabilities, rows


def _placed(rule: FittedRule, places: Sequence[int], count: int) -> FittedRule:
    """The rule applied to its own among `count` members; itself where these are all of them, in its order."""
    return rule if list(places) == list(range(count)) else Among(rule, tuple(places))


def _numbers(values: Any, what: str, shape: tuple[int | str, ...] = ("M",), *, least: float = -math.inf) -> Any:
    """Nested tuples of finite numbers; a letter in the shape stands for any size but zero."""
    array = floats(values)
    fits = len(shape) == array.ndim and all(size in (n, "M") for size, n in zip(shape, array.shape, strict=True))
    if not fits or array.size == 0 or not np.isfinite(array).all():
        came = array.tolist() if array.ndim < 2 else f"shape {array.shape}"
        msg = f"expected finite {what} of shape {shape}, got {came}"
        raise ValueError(msg)
    if array.min() < least:
        msg = f"expected non-negative {what}, got {array.tolist()}"
        raise ValueError(msg)
    return read(array.tolist())
