"""How far confidence is from accuracy: bins, expected calibration error, the Brier score and its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ensemble.outputs.arrays import floats, rows_and_labels

Floats = NDArray[np.float64]

BINS = 15  # equal widths, as in Guo et al., "On calibration of modern neural networks", ICML 2017


def bin_sums(confidence: ArrayLike, right: ArrayLike, *, bins: int = BINS, unit: float = 0.0) -> Floats:
    """(3, bins) sums over frames: their number, their confidence, and the number of right ones.

    Args:
        confidence: (N,) probability of the top class.
        right: (N,) whether the top class is the true one.
        bins: number of bins of equal width; each includes its upper end, the first zero too. A `ValueError` below one.
        unit: confidences are rounded to multiples of it before they are added up; 0 leaves them as they are.
    """
    if bins < 1:
        msg = f"expected one bin or more, got {bins}"
        raise ValueError(msg)
    sure = floats(confidence, "confidence")
    scale = bins * (1 - 2.0**-51)  # rounding may put an end above itself: 7 / 25 x 25 > 7
    where = np.clip(np.ceil(sure * scale).astype(np.int64) - 1, 0, bins - 1)
    sure = np.rint(sure / unit) * unit if unit else sure
    return np.stack([np.bincount(where, amounts, minlength=bins) for amounts in (np.ones_like(sure), sure, right)])


def calibration_error(sums: Floats) -> float:
    """Mean distance of confidence from accuracy over `bin_sums`, weighted by frames; NaN for no frames."""
    frames, confidence, right = sums
    return float(np.abs(confidence - right).sum()) / (float(frames.sum()) or math.nan)


def expected_calibration_error(probabilities: Any, labels: Any, *, bins: int = BINS) -> float:
    """Expected calibration error of the top class: 0 where confidence equals accuracy in every bin, to 1.

    Args:
        probabilities: (N, C); N = 0 gives NaN.
        labels: (N,) class indices.
        bins: see `bin_sums`.

    Raises:
        ValueError: rows that are not distributions, or labels that are not among the C classes.

    Example:
        >>> round(expected_calibration_error([[0.9, 0.1], [0.9, 0.1]], [0, 1]), 6)
        0.4
    """
    return calibration_error(bin_sums(*_top(probabilities, labels), bins=bins))


def brier_score(probabilities: Any, labels: Any) -> float:
    """Mean squared distance from the one-hot truth, summed over classes: 0 to 2; NaN for no frames.

    See Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78, 1950.
    Arguments and errors are those of `expected_calibration_error`.
    """
    rows, truth = rows_and_labels(probabilities, labels)
    return float((rows - torch.nn.functional.one_hot(truth, rows.shape[1])).square().sum(dim=1).mean())


@dataclass(frozen=True)
class Murphy:
    """The Brier score of "the top class is right", in parts: reliability - resolution + uncertainty + within."""

    reliability: float  #: mean squared distance of confidence from accuracy over bins; lower is better
    resolution: float  #: variance of the bins' accuracies; higher is better
    uncertainty: float  #: accuracy x (1 - accuracy), whatever the confidences
    within: float  #: from confidences that differ inside one bin; zero with a bin for each confidence

    @property
    def score(self) -> float:
        """Mean squared distance of confidence from right (1) or wrong (0)."""
        return self.reliability - self.resolution + self.uncertainty + self.within


def murphy(probabilities: Any, labels: Any, *, bins: int = BINS) -> Murphy:
    """The parts of the top class's Brier score over bins of confidence.

    See Murphy, "A new vector partition of the probability score", J. Applied Meteorology 12, 1973, and for the part
    within bins Stephenson et al., Weather and Forecasting 23, 2008. Arguments and errors are those of
    `expected_calibration_error`.
    """
    confidence, right = _top(probabilities, labels)
    frames, sure, hits = bin_sums(confidence, right, bins=bins)
    full, total = frames > 0, len(right) or math.nan
    share, sure, hits = frames[full] / total, sure[full] / frames[full], hits[full] / frames[full]
    accuracy, score = float(right.sum() / total), float(np.square(confidence - right).sum() / total)
    reliability, resolution = float(share @ (sure - hits) ** 2), float(share @ (hits - accuracy) ** 2)
    uncertainty = accuracy * (1 - accuracy)
    return Murphy(reliability, resolution, uncertainty, score - (reliability - resolution + uncertainty))


def _top(probabilities: Any, labels: Any) -> tuple[Floats, Floats]:
    """(N,) confidence of the top class, and 1 where it is right."""
    rows, truth = rows_and_labels(probabilities, labels)
    confidence, top = rows.max(dim=1)
    return confidence.numpy(), (top == truth).double().numpy()
