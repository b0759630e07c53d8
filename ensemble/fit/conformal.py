"""Prediction sets: for each frame the classes that are possible, with a coverage that holds for new recordings.

Frames of one recording resemble each other, so a threshold that is fitted as if all frames were exchangeable promises
too much: n frames of K recordings are worth little more than K. What is exchangeable are whole recordings. `SET_SCORES`
holds the scores by which classes enter a set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensemble.judge.reliability import SetCoverage, set_coverage
from ensemble.judge.tables import provenance
from ensemble.outputs import MemberOutputs, expect_outputs
from ensemble.outputs.arrays import distributions
from ensemble.rules.fitted import combined, rule_for
from ensemble.rules.table import Rule, enter, no_such

_ROUNDING = 1e-9  # of the sum of the weights of millions of frames
_PLENTY = 3.0  # recordings, times the fraction that may be left uncovered
_HERE = "the sets were fitted on these frames: how often they cover here says nothing about new recordings"

_F = TypeVar("_F", bound=Callable[[Tensor], Tensor])

SET_SCORES: dict[str, Callable[[Tensor], Tensor]] = {}


def set_score(function: _F) -> _F:
    """Enter a function from (N, C) float64 probabilities to (N, C) numbers into `SET_SCORES` under its own name.

    The lower a class's number, the earlier it enters the frame's set.

    Raises:
        ValueError: another function has that name already.
    """
    enter(function, function, SET_SCORES, what="score")
    return function


@set_score
def lac(probabilities: Tensor) -> Tensor:
    """One minus the class's probability: sets that are smallest on average, and may be empty.

    See Sadinle, Lei and Wasserman, "Least ambiguous set-valued classifiers with bounded error levels", JASA 114, 2019.
    """
    return 1 - probabilities


@set_score
def aps(probabilities: Tensor) -> Tensor:
    """The probability of all classes that are more probable: a set is never empty, and grows with the doubt.

    This is the score of adaptive prediction sets without randomisation; see Romano, Sesia and Candès, "Classification
    with valid and adaptive coverage", NeurIPS 2020.
    """
    ordered = probabilities.sort(dim=1, descending=True).values
    above = torch.searchsorted(-ordered, -probabilities)  # (N, C) how many classes are more probable
    mass = torch.nn.functional.pad(ordered.cumsum(dim=1), (1, 0))
    return mass.gather(1, above)


@dataclass(frozen=True)
class PredictionSets:
    """A rule with the threshold that turns its probabilities into sets; the result of `fit_prediction_sets`."""

    rule: Rule  #: whose probabilities the threshold was fitted for
    coverage: float  #: that was asked for
    threshold: float  #: the score up to which a class is in the set
    score: str  #: its name in `SET_SCORES`
    classes: tuple[str, ...]  #: C names
    recordings: int  #: K, that it was fitted on
    fingerprint: str = ""  #: of the frames that it was fitted on
    notes: tuple[str, ...] = ()  #: why they may cover less, or more, than was asked

    def sets(self, probabilities: Any) -> NDArray[np.bool_]:
        """(N, C) whether a class is in the set of a frame.

        Args:
            probabilities: (N, C) of the rule.

        Raises:
            ValueError: rows that are no distributions over these classes.
        """
        rows = distributions(probabilities, "of the rule", dtype=torch.float64)
        if rows.shape[1] != len(self.classes):
            msg = f"expected probabilities of {len(self.classes)} classes, as the sets were fitted for, got "
            raise ValueError(msg + str(rows.shape[1]))
        return (SET_SCORES[self.score](rows) <= self.threshold).numpy()

    def judge(self, outputs: MemberOutputs) -> SetCoverage:
        """How often the sets hold the true class, on recordings other than those they were fitted on.

        Raises:
            ValueError: no labels, no frames, a member that the rule needs is missing, or other classes.
        """
        expect_outputs(outputs)
        here = [_HERE] if outputs.fingerprint == self.fingerprint else []
        pieces = [self.sets(rows) for _, _, rows in combined(self.rule, outputs)]
        held = np.concatenate(pieces) if pieces else np.empty((0, len(self.classes)), dtype=bool)
        known = provenance(outputs, {"the rule": rule_for(self.rule, outputs.members)})
        return set_coverage(outputs, held, asked=self.coverage, notes=(*here, *known))


def fit_prediction_sets(
    outputs: MemberOutputs, rule: Rule, coverage: float = 0.9, *, score: str = "lac"
) -> PredictionSets:
    """The threshold at which the sets of a new recording's frames hold the true class as often as asked.

    If the new recording and the K of `outputs` are exchangeable, as recordings drawn alike are, a frame drawn at random
    from the new one is in its set with a probability of at least `coverage`, and of at most 2 / (K + 1) more where no
    scores are equal: on average over new recordings, of whatever length, and over what might have been drawn to fit on.
    One recording may be covered less, and so may one class. For new speakers, let the groups of `outputs` be speakers.

    Every recording weighs alike: the threshold is the quantile of the true classes' scores, with the weight
    1 / (K + 1) for each recording, shared by its frames, and 1 / (K + 1) for the new one, above all others. That is
    hierarchical conformal prediction, the average over all ways to draw one frame from each recording (repeated
    subsampling), without randomness.

    Args:
        outputs: with labels, of recordings that neither the members nor the rule have seen; a note in the result tells
            where they have.
        rule: what predicts.
        coverage: between 0 and 1; K must be at least coverage / (1 - coverage), 9 recordings for 0.9 and 99 for 0.99.
        score: what classes enter a set by, a name in `SET_SCORES`: "lac", the probability, for the smallest sets, or
            "aps", the probability of the more probable classes, for sets that are never empty.

    Raises:
        ValueError: no labels, too few recordings, an unknown score, or a coverage outside (0, 1).

    Example:
        >>> from ensemble import mean
        >>> p = [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.7, 0.3]]
        >>> outputs = MemberOutputs.from_probabilities({"a": p}, labels=[0, 0, 0, 0], groups=[0, 1, 2, 3])
        >>> fit_prediction_sets(outputs, mean, 0.8).sets([[0.3, 0.7], [0.5, 0.5]]).tolist()
        [[False, True], [True, True]]

    References:
        Lee, Barber and Willett, "Distribution-free inference with hierarchical data", arXiv:2306.06342, 2023; Dunn,
        Wasserman and Ramdas, "Distribution-free prediction sets for two-layer hierarchical models", JASA 118, 2023.
    """
    expect_outputs(outputs)
    if score not in SET_SCORES:
        raise ValueError(no_such("score", score, SET_SCORES))
    if not 0 < coverage < 1:
        msg = f"expected a coverage between 0 and 1, for instance 0.9, got {coverage}"
        raise ValueError(msg)
    labels = outputs.require_labels()
    assert outputs.groups is not None  # filled in when made
    _, where, frames = np.unique(outputs.groups.numpy(), return_inverse=True, return_counts=True)
    count = len(frames)
    needed = coverage * (count + 1) * (1 - _ROUNDING)
    if needed > count:
        least, most = math.ceil(coverage / (1 - coverage) - _ROUNDING), math.floor(1000 * count / (count + 1)) / 1000
        msg = f"expected {least} recordings or more to fit sets that cover {coverage:g}, got {count}"
        raise ValueError(f"{msg}; fit on more recordings, or ask for at most {most:g}")
    plenty = math.ceil(_PLENTY / (1 - coverage) - _ROUNDING)
    words = f"{count} recordings are few to cover {coverage:g}: sets are larger than need be; {plenty} would do"
    few = [words] if count < plenty else []
    values = np.empty(len(labels))
    for block, _, rows in combined(rule, outputs):
        scores = SET_SCORES[score](distributions(rows, "of the rule", dtype=torch.float64))
        values[block] = scores.gather(1, labels[block][:, None])[:, 0].numpy()
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(1 / frames[where[order]])  # recordings whose frames have at most this score
    last = min(int(np.searchsorted(reached, needed)), len(order) - 1)
    return PredictionSets(
        rule=rule,
        coverage=coverage,
        threshold=float(values[order[last]]),
        score=score,
        classes=outputs.classes,
        recordings=count,
        fingerprint=outputs.fingerprint,
        notes=(*provenance(outputs, {"the rule": rule_for(rule, outputs.members)}), *few),
    )
