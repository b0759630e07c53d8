"""Weights of their own for frames of each predicted class, shrunk to the weights of all frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble.fit._solver.simplex import fit_simplex_weights
from ensemble.fit.weighted import fit_weights, true_class_matrix
from ensemble.outputs import MemberOutputs
from ensemble.rules.fitted import ClasswiseMean

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClasswiseFit:
    """Numbers for `ClasswiseMean`.

    Attributes:
        common: (M,) weights fitted on all frames.
        weights: (C, M), for the frames that `common` predicts as that class.
        gaps: (C,) certified distance from the optimum of each class's shrunk objective, in nats.
        frames: (C,) how many frames each row was fitted on.
        members: M names.
        fingerprint: of the frames.
    """

    common: Array
    weights: Array
    gaps: Array
    frames: NDArray[np.intp]
    members: tuple[str, ...]
    fingerprint: str = ""

    def rule(self) -> ClasswiseMean:
        """The rule made of these numbers."""
        weights = tuple(map(tuple, self.weights.tolist()))
        return ClasswiseMean(tuple(self.common.tolist()), weights, self.fingerprint)


def fit_class_weights(outputs: MemberOutputs, *, strength: float = 500.0) -> ClasswiseFit:
    """Log-loss weights for each predicted class, pulled to those of all frames.

    Args:
        outputs: with labels.
        strength: how many frames the pull is worth; a class with fewer frames stays close to `common`.

    Raises:
        ValueError: no labels, or a strength that is not positive.
    """
    if not 0 < strength < np.inf:
        msg = f"expected a positive number of frames as strength, got {strength}"
        raise ValueError(msg)
    common = fit_weights(outputs).weights
    P, _ = true_class_matrix(outputs)
    predicted = _predicted(outputs, common)
    classes = len(outputs.classes)
    weights, gaps = np.tile(common, (classes, 1)), np.zeros(classes)
    for c in range(classes):
        own = P[:, predicted == c]
        if own.any():
            alive = int((own.max(axis=0) > 0).sum())
            fit = fit_simplex_weights(own, alpha=strength / alive, towards=common, start=common)
            weights[c], gaps[c] = fit.weights, fit.gap
    frames = np.bincount(predicted, minlength=classes)
    return ClasswiseFit(common, weights, gaps, frames, outputs.members, outputs.fingerprint)


def _predicted(outputs: MemberOutputs, weights: Array) -> NDArray[np.intp]:
    predicted = np.empty(outputs.shape[1], dtype=np.intp)
    common = torch.tensor(weights, dtype=torch.float32)
    for where, block in outputs.blocks(8192):
        predicted[where] = torch.einsum("m,mnc->nc", common, block).argmax(dim=-1).numpy()
    return predicted
