"""One walk over the frames in blocks: the sums that every figure of a report is made from.

Memory does not grow with the number of frames, beyond one number per frame for its recording.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensemble.judge.diversity import Joint
from ensemble.judge.reliability import BINS, bin_sums
from ensemble.outputs import LEAST, MemberOutputs
from ensemble.rules.fitted import WeightedMean, rule_for
from ensemble.rules.pooling import mean, tie_rate
from ensemble.rules.table import Rule

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_CELLS = 2**24  # probabilities looked at together: 64 MiB
_PILES = 10_000  # beyond so many recordings, they are dealt at random into piles and piles are resampled
_TOLERANCE = 1e-3


@dataclass(eq=False)
class Tally:
    """Sums over frames for A answers: the M members, then the rules, then the uniform mean.

    A member abstains on a frame by a row of NaN, where the outputs declare it: it counts as wrong there, with
    the loss of equal probabilities, and is left out of `confusion` and `bins`.
    """

    confusion: Counts  # (A, C, C): true class, predicted class
    loss: Floats  # (A, G)
    right: Floats  # (A, G)
    sizes: Floats  # (G,)
    bins: Floats  # (A, 3, BINS): frames, confidence, right
    clipped: Counts  # (A,) frames whose true class had less probability than LEAST
    abstained: Counts  # (A,)
    joint: Joint
    some_right: Counts  # (C,) frames where any member is right, by true class
    ties: float
    recordings: int

    @property
    def answers(self) -> int:
        """A."""
        return len(self.clipped)

    @property
    def frames(self) -> int:
        """N."""
        return self.joint.frames


def walk(outputs: MemberOutputs, rules: Mapping[str, Rule]) -> Tally:
    """Collect the sums; the uniform mean is always judged, as the last answer."""
    labels, (members, _, classes) = outputs.require_labels(), outputs.shape
    uniform = WeightedMean((1.0,) * members, abstain=True) if outputs.abstain else mean
    where, recordings = _piles(outputs.groups)
    tally = _empty(outputs, members + len(rules) + 1, where, recordings)
    own = {name: rule_for(rule, outputs.members) for name, rule in rules.items()}
    applied = {name: rule.abstaining if outputs.abstain else rule for name, rule in own.items()}
    for block, probabilities in outputs.checked_blocks(max(1, _CELLS // (members * classes)), abstain=True):
        truth, groups = labels[block], where[block]
        right = [_add(tally, member, rows, truth, groups) for member, rows in enumerate(probabilities)]
        for index, (name, rule) in enumerate(applied.items(), start=members):
            _add(tally, index, _distribution(name, rule, probabilities), truth, groups)
        _add(tally, -1, uniform(probabilities), truth, groups)
        tally.joint.both[:] += Joint.of(right).both
        tally.some_right += np.bincount(truth.numpy()[np.any(right, axis=0)], minlength=classes)
        tally.ties += tie_rate(probabilities) * len(truth)
    return tally


def _empty(outputs: MemberOutputs, answers: int, where: Counts, recordings: int) -> Tally:
    members, frames, classes = outputs.shape
    groups = min(recordings, _PILES)
    return Tally(
        confusion=np.zeros((answers, classes, classes), dtype=np.int64),
        loss=np.zeros((answers, groups)),
        right=np.zeros((answers, groups)),
        sizes=np.bincount(where, minlength=groups).astype(np.float64),
        bins=np.zeros((answers, 3, BINS)),
        clipped=np.zeros(answers, dtype=np.int64),
        abstained=np.zeros(answers, dtype=np.int64),
        joint=Joint(np.zeros((members, members)), frames),
        some_right=np.zeros(classes, dtype=np.int64),
        ties=0.0,
        recordings=recordings,
    )


def _piles(groups: Tensor | None) -> tuple[Counts, int]:
    """(N,) recording of each frame from 0, and how many there are; too many are dealt into piles."""
    assert groups is not None  # MemberOutputs fills them in
    distinct, where = np.unique(groups.numpy(), return_inverse=True)
    if len(distinct) > _PILES:
        where = (np.random.default_rng(0).permutation(len(distinct)) % _PILES)[where]
    return where.astype(np.int64), len(distinct)


def _add(tally: Tally, index: int, rows: Tensor, truth: Tensor, where: Counts) -> NDArray[np.bool_]:
    """Add one answer's (B, C) rows for a block of frames; returns (B,) where it is right."""
    classes, groups = rows.shape[1], len(tally.sizes)
    labels, guesses = truth.numpy(), rows.numpy().argmax(axis=1)  # NumPy's is five times as fast as torch's max
    confidence = rows.gather(1, torch.from_numpy(guesses)[:, None])[:, 0].double().numpy()
    speaks = ~np.isnan(confidence)  # the largest of a row with NaN is NaN
    correct: NDArray[np.bool_] = (labels == guesses) & speaks
    likelihood = np.where(speaks, rows.gather(1, truth[:, None])[:, 0].double().numpy(), 1 / classes)
    loss = -np.log(np.maximum(likelihood, LEAST))
    cells = np.bincount((labels * classes + guesses)[speaks], minlength=classes**2)
    tally.confusion[index] += cells.reshape(classes, classes)
    tally.loss[index] += np.bincount(where, loss, minlength=groups)
    tally.right[index] += np.bincount(where, correct, minlength=groups)
    tally.bins[index] += bin_sums(confidence[speaks], correct[speaks])
    tally.clipped[index] += int((likelihood < LEAST).sum())
    tally.abstained[index] += int((~speaks).sum())
    return correct


def _distribution(name: str, rule: Rule, probabilities: Tensor) -> Tensor:
    """What the rule says, checked."""
    rows = torch.as_tensor(rule(probabilities))
    if rows.shape != probabilities.shape[1:]:
        msg = f"expected rows of shape {tuple(probabilities.shape[1:])} from rule {name!r}, got {tuple(rows.shape)}"
        raise ValueError(msg)
    off = ~((rows.sum(dim=1) - 1).abs() <= _TOLERANCE)
    if off.any():
        total = float(rows[off][0].sum())
        msg = f"expected rows that sum to one from rule {name!r}, got a sum of {total:.6g}"
        raise ValueError(msg)
    return rows
