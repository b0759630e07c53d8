"""Rules with numbers: frozen dataclasses made from what a `fit_*` function returned.

Each remembers the fingerprint of the frames it was fitted on, so a report can say when it judges a rule there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ensemble.rules.pooling import pooled_logs, weighted_sum
from ensemble.rules.table import Rule, members_first, on_arrays


@dataclass(frozen=True)
class WeightedMean:
    """The linear pool: a convex combination of the members' rows.

    Args:
        weights: M finite, non-negative numbers with a positive sum, as a tensor, an array or any sequence;
            kept as floats that sum to one. A member of weight 0 has no effect, not even where it says NaN.
        fingerprint: of the frames that the weights were fitted on; "" if they come from elsewhere.
        abstain: members may abstain by a row of NaN; the others' weights are then renormalised on that
            frame. Frames where nobody with a weight speaks get equal probabilities. See `abstaining`.

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
        weights = _non_negative(self.weights)
        total = math.fsum(weights)
        if total <= 0 or not math.isfinite(total):
            msg = f"expected weights with a positive sum, got {list(weights)}"
            raise ValueError(msg)
        object.__setattr__(self, "weights", tuple(weight / total for weight in weights))

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        return _called(self._renormalised if self.abstain else self._plain, probabilities, len(self.weights))

    def _plain(self, probabilities: Tensor) -> Tensor:
        return weighted_sum(probabilities, self.weights)

    def _renormalised(self, probabilities: Tensor) -> Tensor:
        silent = probabilities.isnan().any(dim=-1, keepdim=True)  # (M, N, 1)
        spoken = weighted_sum((~silent).to(probabilities.dtype), self.weights)  # (N, 1)
        pooled = weighted_sum(probabilities.masked_fill(silent, 0), self.weights)
        equal = torch.full_like(pooled, 1 / pooled.shape[-1])
        return torch.where(spoken > 0, pooled / spoken, equal)


@dataclass(frozen=True)
class ClasswiseMean:
    """A linear pool whose weights depend on the class that a common linear pool predicts.

    Args:
        common: M weights, as in `WeightedMean`, of the pool that predicts.
        weights: C rows of M weights, one for the frames that `common` predicts as that class.
        fingerprint: of the frames that the weights were fitted on.

    Raises:
        ValueError: a row is not M weights, or there are not as many rows as classes.

    Example:
        >>> rule = ClasswiseMean([1, 1], [[1, 0], [0, 1]])  # of two members, each is trusted with one class
        >>> rule(torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]]))  # their mean says the first
        tensor([[0.9000, 0.1000]])
    """

    common: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    fingerprint: str = ""

    def __post_init__(self) -> None:
        common = WeightedMean(self.common).weights
        weights = tuple(WeightedMean(row).weights for row in self.weights)
        sizes = sorted({len(row) for row in weights})
        if sizes != [len(common)]:
            msg = f"expected a row of {len(common)} weights for each class, got rows of {sizes}"
            raise ValueError(msg)
        object.__setattr__(self, "common", common)
        object.__setattr__(self, "weights", weights)

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        return _called(self._combine, probabilities, len(self.common))

    def _combine(self, probabilities: Tensor) -> Tensor:
        if probabilities.shape[-1] != len(self.weights):
            came = probabilities.shape[-1]
            msg = f"expected probabilities of {len(self.weights)} classes, as many as the rule has, got {came}"
            raise ValueError(msg)
        predicted = weighted_sum(probabilities, self.common).argmax(dim=-1)
        wide = torch.promote_types(probabilities.dtype, torch.float32)
        own = torch.tensor(self.weights, dtype=wide, device=probabilities.device)[predicted]  # (N, M)
        total = torch.zeros(probabilities.shape[1:], dtype=wide, device=probabilities.device)
        for row, weight in zip(probabilities, own.T, strict=True):
            total += torch.where(weight[:, None] > 0, weight[:, None] * row, 0)  # weight 0 never poisons
        return total.to(probabilities.dtype)


@dataclass(frozen=True)
class LogPool:
    """The log-linear pool: rows proportional to the product of the members' rows to the power of a weight.

    Probabilities below 1e-30 count as 1e-30, here and in `fit_log_linear`: one member's zero weighs much, but it
    is no veto.

    Args:
        weights: M finite, non-negative numbers; their sum is free: below one it softens, above it sharpens.
        fingerprint: of the frames that the weights were fitted on.

    Example:
        >>> LogPool([1, 1])(torch.tensor([[[0.6, 0.4]], [[0.6, 0.4]]]))  # .36 to .16
        tensor([[0.6923, 0.3077]])
    """

    weights: tuple[float, ...]
    fingerprint: str = ""
    floor: ClassVar[float] = 1e-30

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _non_negative(self.weights))

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        return _called(self._combine, probabilities, len(self.weights))

    def _combine(self, probabilities: Tensor) -> Tensor:
        return pooled_logs(probabilities, self.weights, floor=self.floor)


@dataclass(frozen=True)
class Temperature:
    """Softens (above one) or sharpens (below one) probabilities: softmax of their logarithms over a value.

    Not a rule by itself: a step in a `Chain`, before a rule with one value per member, or after it.

    Args:
        value: one positive number for rows of any origin, or M of them for (M, N, C).
        fingerprint: of the frames that the value was fitted on.

    Example:
        >>> Temperature(0.5)(torch.tensor([[0.6, 0.4]]))  # squared and normalised
        tensor([[0.6923, 0.3077]])
    """

    value: float | tuple[float, ...]
    fingerprint: str = ""

    def __post_init__(self) -> None:
        values = _numbers(np.atleast_1d(_array(self.value)), "temperatures")
        if min(values) <= 0:
            msg = f"expected positive temperatures, got {list(values)}"
            raise ValueError(msg)
        single = _array(self.value).ndim == 0
        object.__setattr__(self, "value", values[0] if single else values)

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Rows of the same shape and order, (..., C), or (M, N, C) where there are M values."""
        if isinstance(self.value, tuple):
            return _called(self._each, probabilities, len(self.value))
        rows = probabilities if isinstance(probabilities, Tensor) else torch.as_tensor(_array(probabilities))
        result = _tempered(rows, self.value)
        return cast(Tensor, result.numpy()) if isinstance(probabilities, np.ndarray) else result

    def _each(self, probabilities: Tensor) -> Tensor:
        values = cast(tuple[float, ...], self.value)
        return torch.stack([_tempered(row, value) for row, value in zip(probabilities, values, strict=True)])


def _tempered(rows: Tensor, value: float) -> Tensor:
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (wide.log() / value).softmax(dim=-1).to(rows.dtype)


@dataclass(frozen=True)
class Chain:
    """Steps one after the other, as one rule: temperatures, a rule, a temperature on what it gives.

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

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        for step in self.steps:
            probabilities = step(probabilities)
        return probabilities

    @property
    def fingerprint(self) -> str:
        """Of the frames that the first fitted step was fitted on."""
        return next((mark for step in self.steps if (mark := getattr(step, "fingerprint", ""))), "")


@dataclass(frozen=True)
class BayesVote:
    """Votes weighed by the mistakes each member is known to make, taken as independent given the truth.

    Args:
        log_likelihoods: (M, C, C), for each member a table by class said, then true class, of the logarithm
            of P(said | true).
        log_priors: (C,) logarithms of the classes' frequencies.
        fingerprint: of the frames that the tables were counted on.

    References:
        Xu, Krzyzak, Suen, "Methods of combining multiple classifiers", IEEE Trans. SMC 22(3), 1992.
    """

    log_likelihoods: tuple[tuple[tuple[float, ...], ...], ...]
    log_priors: tuple[float, ...]
    fingerprint: str = ""

    def __post_init__(self) -> None:
        priors = _numbers(self.log_priors, "log priors")
        shape = (-1, len(priors), len(priors))
        object.__setattr__(self, "log_priors", priors)
        object.__setattr__(self, "log_likelihoods", _cube(self.log_likelihoods, shape, "log likelihoods"))

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C); only each member's top class matters."""
        return _called(self._combine, probabilities, len(self.log_likelihoods))

    def _combine(self, probabilities: Tensor) -> Tensor:
        tables = torch.tensor(self.log_likelihoods, dtype=torch.float64, device=probabilities.device)
        logs = torch.tensor(self.log_priors, dtype=torch.float64, device=probabilities.device)
        logs = logs.expand(probabilities.shape[1:]).clone()  # (N, C)
        for row, table in zip(probabilities, tables, strict=True):
            logs += table[row.argmax(dim=-1)]
        return logs.softmax(dim=-1).to(probabilities.dtype)


@dataclass(frozen=True)
class Stacked:
    """Multinomial logistic regression on all members' log-probabilities.

    Args:
        coefficients: (C, M, C), by class predicted, member, and class the member speaks of.
        intercepts: (C,).
        floor: probabilities below it count as it.
        fingerprint: of the frames that the numbers were fitted on.

    References:
        Wolpert, "Stacked generalization", Neural Networks 5, 1992.
    """

    coefficients: tuple[tuple[tuple[float, ...], ...], ...]
    intercepts: tuple[float, ...]
    floor: float = 1e-6
    fingerprint: str = ""

    def __post_init__(self) -> None:
        intercepts = _numbers(self.intercepts, "intercepts")
        shape = (len(intercepts), -1, len(intercepts))
        object.__setattr__(self, "intercepts", intercepts)
        object.__setattr__(self, "coefficients", _cube(self.coefficients, shape, "coefficients"))

    def __call__(self, probabilities: Tensor, /) -> Tensor:
        """Combine (M, N, C) into (N, C)."""
        return _called(self._combine, probabilities, len(self.coefficients[0]))

    def _combine(self, probabilities: Tensor) -> Tensor:
        wide = torch.promote_types(probabilities.dtype, torch.float32)
        slopes = torch.tensor(self.coefficients, dtype=wide, device=probabilities.device)  # (C, M, C)
        logits = torch.tensor(self.intercepts, dtype=wide, device=probabilities.device)
        for member, row in enumerate(probabilities):
            logits = logits + row.to(wide).clamp(min=self.floor).log() @ slopes[:, member].T
        return logits.softmax(dim=-1).to(probabilities.dtype)


def _array(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)


def _numbers(values: Any, what: str) -> tuple[float, ...]:
    array = _array(values)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        msg = f"expected {what} as a non-empty list of finite numbers, got {array.tolist()}"
        raise ValueError(msg)
    return tuple(array.tolist())


def _non_negative(values: Any) -> tuple[float, ...]:
    weights = _numbers(values, "weights")
    if min(weights) < 0:
        msg = f"expected non-negative weights, got {list(weights)}"
        raise ValueError(msg)
    return weights


def _cube(values: Any, shape: tuple[int, int, int], what: str) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Nested tuples of finite numbers; -1 in the shape stands for M."""
    array = _array(values)
    fits = array.ndim == 3 and all(size in (-1, given) for size, given in zip(shape, array.shape, strict=True))
    if not fits or 0 in array.shape or not np.isfinite(array).all():
        wanted = tuple("M" if size == -1 else size for size in shape)
        msg = f"expected finite {what} of shape {wanted}, got shape {array.shape}"
        raise ValueError(msg)
    return tuple(tuple(tuple(row) for row in table) for table in array.tolist())


def _called(combine: Callable[[Tensor], Tensor], given: Any, members: int) -> Tensor:
    probabilities = members_first(given)
    if len(probabilities) != members:
        msg = f"expected probabilities of {members} members, as many as the rule has, got {len(probabilities)}"
        raise ValueError(msg)
    return on_arrays(combine)(given)
