"""Fits of rules with more numbers than one weight per member: Bayes votes and stacking."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from ensemble.outputs import MemberOutputs
from ensemble.rules import BayesVote, Stacked

_CELLS = 2**21  # probabilities looked at together


def fit_bayes_vote(outputs: MemberOutputs, *, smoothing: float = 1.0) -> BayesVote:
    """Count what each member says for each true class.

    Args:
        outputs: with labels; read in blocks.
        smoothing: positive; added to each count, divided by C, so nothing unseen becomes impossible.

    Raises:
        ValueError: no labels, no frames, a member that abstains, or a smoothing that is not positive.
    """
    _positive("smoothing", smoothing)
    labels, (members, _, classes) = _labelled(outputs), outputs.shape
    counts = np.zeros((members, classes * classes))
    for block, probabilities in outputs.spoken_blocks(max(1, _CELLS // (members * classes))):
        cells = probabilities.argmax(dim=-1) * classes + labels[block]  # (M, b), said then true
        for member, row in enumerate(cells.numpy()):
            counts[member] += np.bincount(row, minlength=classes * classes)
    tables = counts.reshape(members, classes, classes) + smoothing / classes
    priors = np.bincount(labels.numpy(), minlength=classes) + smoothing / classes
    likelihoods: Any = np.log(tables / tables.sum(axis=1, keepdims=True))
    log_priors: Any = np.log(priors / priors.sum())
    return BayesVote(likelihoods, log_priors, outputs.fingerprint)


def fit_stacked(
    outputs: MemberOutputs, *, strength: float = 1.0, floor: float = 1e-6, max_iterations: int = 1000
) -> Stacked:
    """Multinomial logistic regression on all log-probabilities, with a ridge, by scikit-learn.

    Holds (N, M C) numbers in memory at once: fit on some tens of thousands of frames. Classes that do not
    occur in the labels get an intercept that rules them out.

    Args:
        outputs: with labels of two classes or more.
        strength: of the ridge, positive; coefficients shrink to nought as it grows.
        floor: probabilities below it count as it; positive.
        max_iterations: of L-BFGS.

    Raises:
        ValueError: no labels, fewer than two classes among them, a member that abstains, or a strength or floor
            that is not positive.

    Warns:
        RuntimeWarning: the iterations did not suffice; the rule is usable, only less exact.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    _positive("strength", strength)
    _positive("floor", floor)
    labels, (members, frames, classes) = _labelled(outputs), outputs.shape
    present = np.unique(labels.numpy())
    if len(present) < 2:
        msg = f"expected labels of two classes or more to stack on, got only {outputs.classes[int(present[0])]!r}"
        raise ValueError(msg)
    table = np.empty((frames, members * classes))
    for block, probabilities in outputs.spoken_blocks(max(1, _CELLS // (members * classes))):
        logs = probabilities.double().clamp(min=floor).log()
        table[block] = logs.transpose(0, 1).flatten(1).numpy()
    model = LogisticRegression(C=1 / strength, max_iter=max_iterations)
    with warnings.catch_warnings():  # scikit-learn's names settings that are not ours
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(table, labels.numpy())
    if model.n_iter_.max() >= max_iterations:
        msg = f"stacking on {frames} frames stopped after {max_iterations} iterations: raise max_iterations or strength"
        warnings.warn(msg, RuntimeWarning, stacklevel=2)
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


def _positive(name: str, value: float) -> None:
    if not 0 < value < np.inf:
        msg = f"expected a positive {name}, got {value}"
        raise ValueError(msg)
