"""The log-linear pool's coefficients: a convex problem that needs all classes, not the true one alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from ensemble.fit._solver.simplex import at_least_zero
from ensemble.fit.weighted import labelled
from ensemble.outputs import MemberOutputs
from ensemble.rules.fitted import LogPool

Array = NDArray[np.float64]

_BLOCK = 8192  # frames looked at together
_LOWEST = math.log(LogPool.floor)


@dataclass(frozen=True, eq=False)
class LogLinearFit:
    """Coefficients for `LogPool`.

    Attributes:
        weights: (M,) non-negative; their sum is free, below one it softens.
        loss: log-loss of `LogPool` with these weights, in nats per frame.
        slope: the largest violation of the optimality conditions, in nats per unit of weight.
        members: M names.
        fingerprint: of the frames.
    """

    weights: Array
    loss: float
    slope: float
    members: tuple[str, ...]
    fingerprint: str = ""


def fit_log_linear(outputs: MemberOutputs, *, start: object | None = None, ridge: float = 0.0) -> LogLinearFit:
    """The best non-negative exponents of the normalised product of the members' rows, by log-loss.

    The loss is that of `LogPool`, where probabilities below 1e-30 count as 1e-30.

    Args:
        outputs: with labels; read in blocks, many times over.
        start: (M,) exponents to begin from; 1 / M each if None.
        ridge: adds ridge / 2 times the squared norm of the exponents.

    Raises:
        ValueError: no labels, no frames, NaN (the message names the member), a negative ridge, or a start that is
            not M finite, non-negative numbers.

    Example:
        >>> p, q = [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
        >>> fit_log_linear(MemberOutputs.from_probabilities({"a": p, "b": q}, labels=[0, 1, 1])).loss < 0.69
        True

    References:
        Hinton, "Products of experts", ICANN 1999.
    """
    at_least_zero("ridge", ridge)
    M = len(outputs.members)
    begin = np.full(M, 1.0 / M) if start is None else np.asarray(start, dtype=np.float64)
    if begin.shape != (M,) or not np.isfinite(begin).all() or (begin < 0).any():
        msg = f"expected a start of {M} finite, non-negative exponents, got {begin}"
        raise ValueError(msg)
    labelled(outputs)
    for _ in outputs.checked_blocks(_BLOCK):  # refuses NaN, by name
        pass
    found = minimize(
        _loss_and_slope,
        begin,
        args=(outputs, ridge),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, None)] * M,
        options={"ftol": 1e-13, "gtol": 1e-8, "maxiter": 500},
    )
    w = np.asarray(found.x, dtype=np.float64)
    loss, slope = _loss_and_slope(w, outputs, ridge)
    violation = np.where(w > 0, np.abs(slope), np.maximum(-slope, 0.0)).max()
    return LogLinearFit(w, loss - ridge / 2 * float(w @ w), float(violation), outputs.members, outputs.fingerprint)


def _loss_and_slope(w: Array, outputs: MemberOutputs, ridge: float) -> tuple[float, Array]:
    labels, frames = outputs.require_labels(), outputs.shape[1]
    exponents = torch.from_numpy(w)
    loss, slope = 0.0, torch.zeros(len(w), dtype=torch.float64)
    for start in range(0, frames, _BLOCK):
        where = slice(start, start + _BLOCK)
        logs = outputs.log_probabilities[:, where].double().clamp_min(_LOWEST)  # (M, b, C)
        pooled = torch.einsum("m,mbc->bc", exponents, logs).log_softmax(dim=-1)
        truth = labels[where, None]
        loss -= float(pooled.gather(1, truth).sum())
        error = pooled.exp().scatter_add_(1, truth, torch.full_like(truth, -1, dtype=torch.float64))
        slope += torch.einsum("bc,mbc->m", error, logs)
    return loss / frames + ridge / 2 * float(w @ w), slope.numpy() / frames + ridge * w
