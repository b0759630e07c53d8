"""Temperatures: one number that makes a member, or a pool, as confident as it is accurate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ensemble.fit._solver import Array
from ensemble.outputs import MemberOutputs, expect_outputs
from ensemble.outputs.arrays import class_indices, distributions, floats, numbers, rows_and_labels
from ensemble.rules.fitted import Chain, Temperature, WeightedMean, rule_for
from ensemble.rules.table import Rule

_Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # (M, b, C) logarithms in float64 and (b,) labels

_CELLS = 2**21  # probabilities processed together
_LEAST = 2.0**-126  # stands for a probability of zero
_COLDEST, _HOTTEST = 0.01, 100.0
_STEPS = 60


@dataclass(frozen=True)
class TemperatureFit:
    """The temperature of least log-loss, or one for each member.

    Args:
        value: one number, or M for members.
        before: log-loss in nats of the probabilities as given, one number or M.
        after: log-loss at `value` on the same frames.
        rule: the rule whose result the temperature was fitted for, at that temperature; without one, the temperature
            as a step for a `Chain`.
    """

    value: float | tuple[float, ...]
    before: float | tuple[float, ...]
    after: float | tuple[float, ...]
    rule: Temperature | Chain


def fit_temperature(
    given: MemberOutputs | Any, labels: Any | None = None, *, rule: Rule | None = None
) -> TemperatureFit:
    """The temperature of least log-loss, by Newton's method in 1 / T, where the loss is convex.

    Args:
        given: outputs with labels, read in blocks; or (N, C) or (M, N, C) probabilities.
        labels: (N,) class indices, where `given` is an array.
        rule: where `given` is outputs, fit one temperature for this rule's result instead of one per member.

    Returns:
        One value for (N, C) and for a rule, M values for members; between 0.01 and 100. Where the loss falls without
        a minimum, as it does if every frame is right, the search stops when the loss no longer changes.

    Raises:
        ValueError: no labels, no frames, or outputs in which a member abstains; rows of an array that are not
            distributions; labels beside outputs, or a rule beside an array.

    Example:
        >>> fit = fit_temperature([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]], [0, 0, 1, 1])
        >>> round(fit.value, 6)  # right three times of four: odds of 9 become odds of 3
        2.0

    References:
        Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    if isinstance(given, MemberOutputs):
        if labels is not None:
            msg = "expected no labels beside outputs, which have labels of their own; leave them out"
            raise ValueError(msg)
        blocks, frames, mark = _from_outputs(given, rule), given.shape[1], given.fingerprint
        names = given.members if rule is None else ()
        members = len(names)
    else:
        blocks, members, frames = _from_array(given, labels, rule)
        mark, names = "", ()
    if frames == 0:
        msg = "expected frames to fit a temperature on, got none"
        raise ValueError(msg)
    inverse, before, after = _newton(blocks, members or 1, frames)
    value, old, new = [
        tuple(numbers.tolist()) if members else numbers.item() for numbers in (1 / inverse, before, after)
    ]
    step = Temperature(value, mark, names)
    return TemperatureFit(value, old, new, step if rule is None else Chain((rule, step)))


def _from_array(given: Any, labels: Any | None, rule: Rule | None) -> tuple[_Blocks, int, int]:
    """The logarithms as one block, and the numbers of members (0 where there is one row per frame) and of frames."""
    rows = numbers(given, "probabilities")
    if labels is None or rows.ndim not in (2, 3):
        came = f"{tuple(rows.shape)} and {labels if labels is None else type(labels).__name__}"
        msg = f"expected outputs with labels, or (N, C) or (M, N, C) probabilities and N labels, got {came}"
        raise ValueError(msg)
    if rule is not None:
        msg = "expected outputs beside a rule, got an array; for an array fit on rule(array)"
        raise ValueError(msg)
    single = rows.ndim == 2
    if single:
        checked, truth = rows_and_labels(given, labels)
        checked = checked[None]
    else:
        truth = class_indices(labels, None, rows.shape[-1], frames=rows.shape[-2])
        parts = [distributions(part, f"from member {m}", dtype=torch.float64) for m, part in enumerate(rows)]
        checked = torch.stack(parts)
    logs = checked.clamp(min=_LEAST).log()
    return (lambda: [(logs, truth)]), 0 if single else len(logs), len(truth)


def _from_outputs(outputs: MemberOutputs, rule: Rule | None) -> _Blocks:
    """Passes over the members' logarithms, or over those of the rule's result."""
    labels, (members, _, classes) = outputs.require_labels(), outputs.shape
    pool = None if rule is None else rule_for(rule, outputs.members)

    def blocks() -> Iterable[tuple[Tensor, Tensor]]:
        for where, probabilities in outputs.blocks(max(1, _CELLS // (members * classes)), nan="refuse"):
            logs = outputs.log_probabilities[:, where].float()
            rows = probabilities if pool is None else pool.of_logs(logs)[None]
            yield rows.double().clamp(min=_LEAST).log(), labels[where]

    return blocks


def _newton(blocks: _Blocks, members: int, frames: int) -> tuple[Array, Array, Array]:
    """(M,) inverse temperatures, losses before and after; all members share the passes over the blocks."""
    b = torch.ones(members, dtype=torch.float64)
    low, high = torch.full_like(b, 1 / _HOTTEST), torch.full_like(b, 1 / _COLDEST)
    loss, slope, curve = _moments(blocks, b)
    before = loss
    for _ in range(_STEPS):
        low, high = torch.where(slope < 0, b, low), torch.where(slope > 0, b, high)
        step = b - slope / curve
        inside = (step > low) & (step < high)
        following = torch.where(slope == 0, b, torch.where(inside, step, (low * high).sqrt()))
        moved = ((following - b) / b).abs().max()
        b = following
        loss, slope, curve = _moments(blocks, b)
        if moved < 1e-10:
            break
    return b.numpy(), before.numpy() / frames, loss.numpy() / frames


def _moments(blocks: _Blocks, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(M,) each: log-loss at softmax(b z) summed over frames, its slope and its curvature in b."""
    loss, slope, curve = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b)
    for z, labels in blocks():
        scaled = b[:, None, None] * z
        p = scaled.softmax(dim=-1)
        true = z.gather(-1, labels.expand(len(z), -1)[..., None]).squeeze(-1)  # (M, b)
        mean = (p * z).sum(dim=-1)
        loss += (scaled.logsumexp(dim=-1) - b[:, None] * true).sum(dim=-1)
        slope += (mean - true).sum(dim=-1)
        curve += (p * (z - mean[..., None]).square()).sum(dim=(-1, -2))
    return loss, slope, curve


@dataclass(frozen=True)
class PoolTemperatures:
    """Temperatures before and after a linear pool, fitted together.

    Args:
        each: M temperatures, one for each member, before the pool.
        pool: one temperature, after it.
        before: log-loss in nats of the pool without temperatures.
        after: log-loss with them.
        rule: the members at their temperatures, their weighted mean, and that at its temperature.
    """

    each: tuple[float, ...]
    pool: float
    before: float
    after: float
    rule: Chain


def fit_pool_temperatures(outputs: MemberOutputs, weights: Sequence[float] | None = None) -> PoolTemperatures:
    """Fit all temperatures of a linear pool together: the pool of calibrated members is underconfident.

    The loss may have several minima. Of two searches the better result is returned: one begins without temperatures,
    one at each member's own (`fit_temperature`), where no member is so confident that its gradient vanishes.

    Args:
        outputs: with labels; read in blocks, many times.
        weights: weights of the pool, as in `WeightedMean`; equal ones if None.

    Raises:
        ValueError: no labels, no frames, a member that abstains, or weights that are not M non-negative numbers
            with a positive sum.

    References:
        Rahaman and Thiery, "Uncertainty quantification and deep ensembles", NeurIPS 2021.
    """
    expect_outputs(outputs)
    members, frames = len(outputs.members), outputs.shape[1]
    blocks = _from_outputs(outputs, None)
    if frames == 0:
        msg = "expected frames to fit temperatures on, got none"
        raise ValueError(msg)
    given = (1.0,) * members if weights is None else tuple(floats(weights, "weights of the pool").ravel().tolist())
    pool = WeightedMean(given, outputs.fingerprint)
    if pool.count != members:
        msg = f"expected {members} weights, one for each member, got {pool.count}"
        raise ValueError(msg)
    shares = torch.tensor(pool.weights, dtype=torch.float64)

    def objective(logarithms: Array) -> tuple[float, Array]:
        x = torch.tensor(logarithms, requires_grad=True)
        total = 0.0
        for z, labels in blocks():
            rows = (z / x[:-1].exp()[:, None, None]).softmax(dim=-1)
            pooled = torch.einsum("m,mnc->nc", shares, rows).clamp(min=_LEAST).log() / x[-1].exp()
            loss = torch.nn.functional.cross_entropy(pooled, labels, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        assert x.grad is not None
        return total / frames, x.grad.numpy() / frames

    none: Array = np.zeros(members + 1)
    own: Array = np.append(np.log(np.atleast_1d(fit_temperature(outputs).value)), 0.0)
    settings: Any = {"method": "L-BFGS-B", "options": {"ftol": 1e-12, "gtol": 1e-9, "maxiter": 1000}}
    settings["bounds"] = [(float(np.log(_COLDEST)), float(np.log(_HOTTEST)))] * (members + 1)
    found = min((minimize(objective, start, jac=True, **settings) for start in (none, own)), key=lambda end: end.fun)
    values = np.exp(found.x).tolist()
    mark, each = outputs.fingerprint, tuple(values[:-1])
    rule = Chain((Temperature(each, mark, outputs.members), pool, Temperature(values[-1], mark)))
    return PoolTemperatures(each, values[-1], objective(none)[0], float(found.fun), rule)
