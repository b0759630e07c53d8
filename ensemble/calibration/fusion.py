"""Fits of rules with more numbers than one weight per member: log-linear pool, Bayes votes, stacking."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from ensemble.outputs import MemberOutputs
from ensemble.rules import BayesVote, LogPool, Stacked

Floats = NDArray[np.float64]

_CELLS = 2**21  # probabilities looked at together
_LEAST = 2.0**-126  # stands for a probability of zero


def fit_log_pool(outputs: MemberOutputs, *, alpha: float = 0.0) -> LogPool:
    """The log-linear pool of least log-loss: a convex problem in its M weights, which need not sum to one.

    Args:
        outputs: with labels; read in blocks.
        alpha: pull towards equal weights of 1 / M: adds alpha times the squared distance to the loss.

    Raises:
        ValueError: no labels, or no frames.

    Example:
        >>> p, q = [[0.9, 0.1], [0.9, 0.1]], [[0.5, 0.5], [0.5, 0.5]]
        >>> outputs = MemberOutputs.from_probabilities({"sure": p, "blank": q}, labels=[0, 1])
        >>> fit_log_pool(outputs).weights[0] < 1e-6  # right half of the time: ignore it
        True

    References:
        Heskes, "Selecting weighting factors in logarithmic opinion pools", NIPS 1998.
    """
    labels, (members, frames, classes) = _labelled(outputs), outputs.shape
    equal = np.full(members, 1 / members)

    def objective(weights: Floats) -> tuple[float, Floats]:
        loss, slope = alpha * float(np.square(weights - equal).sum()), 2 * alpha * (weights - equal)
        w = torch.tensor(weights)
        for block, probabilities in outputs.blocks(max(1, _CELLS // (members * classes))):
            logs = probabilities.double().clamp(min=_LEAST).log()  # (M, b, C)
            truth = labels[block][:, None]
            pooled = torch.einsum("m,mnc->nc", w, logs).log_softmax(dim=-1)
            loss -= float(pooled.gather(1, truth).sum()) / frames
            residual = pooled.exp().scatter_add(1, truth, -torch.ones_like(truth, dtype=torch.float64))
            slope = slope + torch.einsum("nc,mnc->m", residual, logs).numpy() / frames
        return loss, slope

    found = minimize(
        objective,
        equal,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * members,
        options={"ftol": 1e-13, "gtol": 1e-9, "maxiter": 500},
    )
    return LogPool(tuple(found.x.tolist()), outputs.fingerprint)


def fit_bayes_vote(outputs: MemberOutputs, *, smoothing: float = 1.0) -> BayesVote:
    """Count what each member says for each true class.

    Args:
        outputs: with labels; read in blocks.
        smoothing: added to each count, divided by C, so nothing unseen becomes impossible.

    Raises:
        ValueError: no labels, or no frames.
    """
    labels, (members, _, classes) = _labelled(outputs), outputs.shape
    counts = np.zeros((members, classes * classes))
    for block, probabilities in outputs.blocks(max(1, _CELLS // (members * classes))):
        cells = probabilities.argmax(dim=-1) * classes + labels[block]  # (M, b), said then true
        for member, row in enumerate(cells.numpy()):
            counts[member] += np.bincount(row, minlength=classes * classes)
    tables = counts.reshape(members, classes, classes) + smoothing / classes
    priors = np.bincount(labels.numpy(), minlength=classes) + smoothing / classes
    likelihoods: Any = np.log(tables / tables.sum(axis=1, keepdims=True))
    log_priors: Any = np.log(priors / priors.sum())
    return BayesVote(likelihoods, log_priors, outputs.fingerprint)


def fit_stacked(
    outputs: MemberOutputs, *, strength: float = 1.0, floor: float = 1e-6, max_iterations: int = 200
) -> Stacked:
    """Multinomial logistic regression on all log-probabilities, with a ridge, by scikit-learn.

    Holds (N, M C) numbers in memory at once: fit on some tens of thousands of frames. Classes that do not
    occur in the labels get an intercept that rules them out.

    Args:
        outputs: with labels of two classes or more.
        strength: of the ridge; coefficients shrink to nought as it grows.
        floor: probabilities below it count as it.
        max_iterations: of L-BFGS.

    Raises:
        ValueError: no labels, or fewer than two classes among them.
    """
    from sklearn.linear_model import LogisticRegression

    labels, (members, frames, classes) = _labelled(outputs), outputs.shape
    present = np.unique(labels.numpy())
    if len(present) < 2:
        msg = f"expected labels of two classes or more to stack on, got only {outputs.classes[int(present[0])]!r}"
        raise ValueError(msg)
    logs = outputs.log_probabilities.double().clamp(min=float(np.log(floor))).numpy()
    table = logs.transpose(1, 0, 2).reshape(frames, members * classes)
    model = LogisticRegression(C=1 / strength, max_iter=max_iterations).fit(table, labels.numpy())
    slopes, intercepts = model.coef_, model.intercept_
    if len(present) == 2:  # one row stands for both classes
        slopes, intercepts = np.vstack([0 * slopes, slopes]), np.array([0.0, intercepts[0]])
    coefficients: Any = np.zeros((classes, members, classes))
    offsets: Any = np.full(classes, intercepts.min() - 50.0 - np.abs(slopes).sum() * abs(np.log(floor)))
    coefficients[present], offsets[present] = slopes.reshape(-1, members, classes), intercepts
    return Stacked(coefficients, offsets, floor, outputs.fingerprint)


def _labelled(outputs: MemberOutputs) -> torch.Tensor:
    labels = outputs.require_labels()
    if len(labels) == 0:
        msg = "expected frames to fit on, got none"
        raise ValueError(msg)
    return labels
