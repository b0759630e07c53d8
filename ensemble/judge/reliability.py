"""How far confidence is from accuracy: bins, expected calibration error, the Brier score and its parts.

Also how often sets of classes hold the true one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from ensemble.judge.significance import Interval, bootstrap_interval, resampling
from ensemble.outputs import MemberOutputs, expect_outputs
from ensemble.outputs.arrays import floats, rows_and_labels, truths

if TYPE_CHECKING:
    from ensemble.judge.plots import Axes

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


@dataclass(frozen=True, eq=False)
class SetCoverage:
    """How often sets of classes hold the true class; every interval, of 95 %, resamples recordings."""

    recordings: (
        Interval  #: the fraction of a recording's frames whose set holds the true class; its mean over recordings
    )
    frames: Interval  #: the fraction of all frames, to which long recordings contribute more
    size: Interval  #: classes in a set, the mean over frames
    empty: float  #: the fraction of the sets that are empty
    single: float  #: the fraction of the sets that hold one class
    classes: (
        pd.DataFrame
    )  #: one row per class: name, frames, and on these coverage and size, NaN for a class without any
    by_recording: pd.DataFrame  #: one row per recording: its number, frames, coverage, size
    asked: float  #: the coverage that the sets were made for; NaN if unknown
    notes: tuple[str, ...]  #: what to keep in mind when reading the figures

    def figure(self, ax: Axes | None = None) -> Axes:
        """Draw the coverage and the size of each class on these axes, or on new ones; needs the extra `report`."""
        from ensemble.judge import plots  # matplotlib belongs to an extra

        return plots.set_coverage(self.classes, ax, asked=self.asked)


def set_coverage(
    outputs: MemberOutputs, sets: ArrayLike, *, asked: float = math.nan, notes: Iterable[str] = ()
) -> SetCoverage:
    """Judge sets of classes on frames whose true classes are known.

    Args:
        outputs: with labels; its groups are the recordings that intervals resample.
        sets: (N, C) bool, whether a class is in the frame's set; of any origin.
        asked: the coverage that they were made for.
        notes: what is to stand before the notes of the result.

    Raises:
        ValueError: no labels, no frames, or sets of another shape.

    Example:
        >>> outputs = MemberOutputs.from_probabilities({"a": [[0.9, 0.1], [0.6, 0.4]]}, labels=[0, 1])
        >>> found = set_coverage(outputs, [[True, False], [True, True]])
        >>> found.frames.estimate, found.size.estimate, found.single
        (1.0, 1.5, 0.5)
    """
    expect_outputs(outputs)
    held, labels, (_, frames, classes) = truths(sets, "sets"), outputs.require_labels().numpy(), outputs.shape
    if held.shape != (frames, classes) or not frames:
        msg = f"expected sets of shape ({frames}, {classes}), for one frame or more, got {held.shape}"
        raise ValueError(msg)
    assert outputs.groups is not None  # filled in when made
    groups, sizes, covered = outputs.groups.numpy(), held.sum(axis=1), held[np.arange(frames), labels]
    table = pd.DataFrame({"frames": 1, "coverage": covered.astype(float), "size": sizes})
    means = {"frames": "sum", "coverage": "mean", "size": "mean"}
    recordings = table.groupby(groups).agg(means).rename_axis("recording").reset_index()
    by_class = table.groupby(labels).agg(means).reindex(range(classes)).assign(name=outputs.classes)
    by_class["frames"] = by_class["frames"].fillna(0).astype(int)
    count = len(recordings)
    return SetCoverage(
        recordings=bootstrap_interval(recordings["coverage"].to_numpy(), np.arange(count)),
        frames=bootstrap_interval(covered, groups),
        size=bootstrap_interval(sizes, groups),
        empty=float((sizes == 0).mean()),
        single=float((sizes == 1).mean()),
        classes=by_class[["name", "frames", "coverage", "size"]].reset_index(drop=True),
        by_recording=recordings,
        asked=asked,
        notes=(*notes, *resampling(count, frames)),
    )
