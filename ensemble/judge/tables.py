"""From outputs to tables: one pass over the frames adds up sums, and every table of a report is made from them.

Memory does not grow with the number of frames, beyond one number per frame for its recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensemble.judge.diversity import PAIR_MEASURES, Joint
from ensemble.judge.reliability import BINS, bin_sums, calibration_error
from ensemble.judge.significance import cluster_bootstrap, percentile_ends
from ensemble.outputs import LEAST, MemberOutputs
from ensemble.rules.fitted import WeightedMean, rule_for
from ensemble.rules.pooling import mean, tie_rate
from ensemble.rules.table import FittedRule, Rule

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_CELLS = 2**24  # probabilities processed at once: 64 MiB
_PILES = 10_000  # beyond so many recordings, they are dealt at random into piles, and piles are resampled
_TOLERANCE = 1e-3


class Tally:
    """Sums over frames for A answers: the M members, then the rules, then the uniform mean.

    A member that abstains on a frame (a row of NaN, where the outputs declare it) counts as wrong there, with the
    loss of equal probabilities, and is left out of `confusion` and `bins`.
    """

    def __init__(self, outputs: MemberOutputs, rules: Mapping[str, FittedRule]) -> None:
        members, self.frames, classes = outputs.shape
        assert outputs.groups is not None  # MemberOutputs fills them in
        distinct, where = np.unique(outputs.groups.numpy(), return_inverse=True)
        if len(distinct) > _PILES:
            where = (np.random.default_rng(0).permutation(len(distinct)) % _PILES)[where]
        self.rules, answers, groups = rules, members + len(rules) + 1, min(len(distinct), _PILES)
        self.recordings = len(distinct)
        self.whole = self.frames or math.nan  # what fractions are of: NaN without frames
        self.group: Counts = where.astype(np.int64)  # (N,) recording of each frame, or its pile, from 0
        self.sizes: Floats = np.bincount(where, minlength=groups).astype(np.float64)  # (G,)
        self.confusion: Counts = np.zeros((answers, classes, classes), dtype=np.int64)  # true class, predicted class
        self.loss: Floats = np.zeros((answers, groups))
        self.right: Floats = np.zeros((answers, groups))
        self.bins: Floats = np.zeros((answers, 3, BINS))  # frames, confidence, right
        self.clipped: Counts = np.zeros(answers, dtype=np.int64)  # frames whose true class had less than LEAST
        self.abstained: Counts = np.zeros(answers, dtype=np.int64)
        self.joint = Joint(np.zeros((members, members)), self.frames)
        self.some_right: Counts = np.zeros(classes, dtype=np.int64)  # frames where any member is right, by true class
        self.ties = 0.0

    def add(self, index: int, rows: Tensor, truth: Tensor, where: Counts) -> NDArray[np.bool_]:
        """Add one answer's (B, C) rows for a block of frames; returns (B,) where it is right."""
        classes, groups = rows.shape[1], len(self.sizes)
        labels, guesses = truth.numpy(), rows.numpy().argmax(axis=1)  # NumPy's is five times as fast as torch's max
        confidence = rows.gather(1, torch.from_numpy(guesses)[:, None])[:, 0].double().numpy()
        answered = ~np.isnan(confidence)  # the largest of a row with NaN is NaN
        correct: NDArray[np.bool_] = (labels == guesses) & answered
        likelihood = np.where(answered, rows.gather(1, truth[:, None])[:, 0].double().numpy(), 1 / classes)
        loss = -np.log(np.maximum(likelihood, LEAST))
        cells = np.bincount((labels * classes + guesses)[answered], minlength=classes**2)
        self.confusion[index] += cells.reshape(classes, classes)
        self.loss[index] += np.bincount(where, loss, minlength=groups)
        self.right[index] += np.bincount(where, correct, minlength=groups)
        self.bins[index] += bin_sums(confidence[answered], correct[answered])
        self.clipped[index] += int((likelihood < LEAST).sum())
        self.abstained[index] += int((~answered).sum())
        return correct


def tally(outputs: MemberOutputs, rules: Mapping[str, Rule]) -> Tally:
    """Add up the sums, of rules over the members that they name; the uniform mean is always the last answer.

    Raises:
        ValueError: no labels; NaN that is not declared; a rule that needs a missing member, or whose rows are not
            distributions.
    """
    labels, (members, _, classes) = outputs.require_labels(), outputs.shape
    uniform = WeightedMean((1.0,) * members, abstain=True) if outputs.abstain else mean
    aligned = {}
    for name, rule in rules.items():
        try:
            aligned[name] = rule_for(rule, outputs.members)
        except ValueError as error:
            msg = f"rule {name!r}: {error}"
            raise ValueError(msg) from error
    applied = {name: rule.abstaining if outputs.abstain else rule for name, rule in aligned.items()}
    sums = Tally(outputs, aligned)
    for block, probabilities in outputs.blocks(max(1, _CELLS // (members * classes)), nan="if declared"):
        truth, where = labels[block], sums.group[block]
        right = [sums.add(member, rows, truth, where) for member, rows in enumerate(probabilities)]
        for index, (name, rule) in enumerate(applied.items(), start=members):
            rows = torch.as_tensor(rule(probabilities))
            if rows.shape != probabilities.shape[1:]:
                wanted, came = tuple(probabilities.shape[1:]), tuple(rows.shape)
                msg = f"expected rows of shape {wanted} from rule {name!r}, got {came}"
                raise ValueError(msg)
            off = ~((rows.sum(dim=1) - 1).abs() <= _TOLERANCE)
            if off.any():
                msg = f"expected rows that sum to one from rule {name!r}, got a sum of {float(rows[off][0].sum()):.6g}"
                raise ValueError(msg)
            sums.add(index, rows, truth, where)
        sums.add(-1, uniform(probabilities), truth, where)
        sums.joint.both[:] += Joint.of(right).both
        sums.some_right += np.bincount(truth.numpy()[np.any(right, axis=0)], minlength=classes)
        sums.ties += tie_rate(probabilities) * len(truth)
    return sums


def best(sums: Tally, answers: Iterable[int], *, by: Literal["accuracy", "log_loss"] = "accuracy") -> int:
    """Index of the best of some answers; the other measure decides where they are equal, then their order."""
    right, gain = sums.right.sum(axis=1), -sums.loss.sum(axis=1)
    first, second = (right, gain) if by == "accuracy" else (gain, right)
    return max(answers, key=lambda index: (first[index], second[index]))


def best_member(outputs: MemberOutputs) -> str:
    """The most accurate member; of equals the one with the lower log-loss, then the first.

    A `ValueError` without labels, or where a member gives NaN that is not declared.
    """
    return outputs.members[best(tally(outputs, {}), range(len(outputs.members)))]


def scores(outputs: MemberOutputs, sums: Tally, parameters: Mapping[str, int]) -> pd.DataFrame:
    """One row per member, then one per rule, which counts the parameters of the members that can influence it."""
    own = pd.Series([parameters.get(name) for name in outputs.members], dtype="Int64")
    used = [own if rule.used is None else own.iloc[list(rule.used)] for rule in sums.rules.values()]
    # all but the uniform mean, which is only a yardstick
    right, loss, bins, confusion = (each[:-1] for each in (sums.right, sums.loss, sums.bins, sums.confusion))
    hits = np.diagonal(confusion, axis1=1, axis2=2)  # (A - 1, C)
    occurrences = confusion.sum(axis=1) + confusion.sum(axis=2)  # as a prediction or as a label
    with np.errstate(invalid="ignore"):
        f1 = (2 * hits / np.maximum(occurrences, 1)).sum(axis=1) / (occurrences > 0).sum(axis=1)
    table = {
        "name": [*outputs.members, *sums.rules],
        "accuracy": right.sum(axis=1) / sums.whole,
        "log_loss": loss.sum(axis=1) / sums.whole,
        "calibration_error": [calibration_error(each) for each in bins],
        "macro_f1": f1,
        "parameters": pd.Series([*own, *(some.sum(skipna=False) for some in used)], dtype="Int64"),
        "abstained": sums.abstained[:-1],
    }
    return pd.DataFrame(table)


def gains(sums: Tally, *, members: int, baseline: int, replicates: int, seed: int) -> pd.DataFrame:
    """Each rule's gains with the ends of their intervals, all from one resampling of recordings.

    The rules follow the `members`; `baseline` is the index of the member that gains are measured against.
    """
    answers, rules = len(sums.right), np.arange(members, len(sums.right) - 1)
    goods = np.concatenate([sums.right, -sums.loss]).T  # (G, 2A)
    resampled = cluster_bootstrap(goods, sums.sizes, replicates=replicates, seed=seed)
    whole = goods.sum(axis=0) / sums.whole
    columns: dict[str, Floats] = {}
    for name, mine, other in (
        ("gain", rules, baseline),
        ("mean_gain", rules, answers - 1),
        ("loss_gain", rules + answers, baseline + answers),
    ):
        columns[name] = whole[mine] - whole[other]
        ends = percentile_ends(resampled[:, mine] - resampled[:, [other]])
        columns[f"{name}_low"], columns[f"{name}_high"] = ends
    return pd.DataFrame(columns)


def pairs(members: Sequence[str], joint: Joint) -> pd.DataFrame:
    """One row per pair of members, one column per pairwise measure."""
    first, second = np.triu_indices(len(members), k=1)
    names = np.array(members, dtype=object)
    measured = {name: measure(joint)[first, second] for name, measure in PAIR_MEASURES.items()}
    return pd.DataFrame({"first": names[first], "second": names[second]} | measured)


def by_class(outputs: MemberOutputs, sums: Tally, *, baseline: int, judged: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per class, and for each class up to three rows of what it is most often taken for.

    Accuracies and shares are fractions of the class's own frames, NaN for a class without any. `baseline` is the index
    of the best single member, `judged` that of the answer whose mistakes are counted.
    """
    names, members = (np.array(each, dtype=object) for each in (outputs.classes, outputs.members))
    frames = np.bincount(outputs.require_labels().numpy(), minlength=len(names))
    confusion, before, own = sums.confusion[judged], sums.confusion[baseline], sums.confusion[: len(members)]
    wrong = confusion - np.diag(np.diagonal(confusion))
    # over all frames of the class, so that neither predicting a class everywhere nor abstaining pays
    f1 = 2 * np.diagonal(own, axis1=1, axis2=2) / np.maximum(own.sum(axis=1) + frames, 1)  # (M, C)
    confused = np.where(wrong.any(axis=1), names[wrong.argmax(axis=1)], None)
    trust = np.where(frames > 0, members[f1.argmax(axis=0)], None)
    with np.errstate(invalid="ignore"):
        table = {
            "name": names,
            "frames": frames,
            "baseline_accuracy": np.diagonal(before) / frames,
            "rule_accuracy": np.diagonal(confusion) / frames,
            "oracle": sums.some_right / frames,
            "confused_with": pd.Series(confused, dtype=object),  # otherwise None becomes NaN
            "confused_share": wrong.max(axis=1) / frames,
            "trust": pd.Series(trust, dtype=object),
            "trust_f1": np.where(frames > 0, f1.max(axis=0), np.nan),
        }
    order = np.argsort(-wrong, axis=1, kind="stable")[:, :3]  # the three most frequent
    true, rank = np.nonzero(np.take_along_axis(wrong, order, axis=1))
    taken = order[true, rank]
    mistakes = {
        "name": names[true],
        "taken_for": names[taken],
        "frames": wrong[true, taken],
        "share": wrong[true, taken] / frames[true],
        "baseline_share": before[true, taken] / frames[true],
    }
    return pd.DataFrame(table), pd.DataFrame(mistakes)


def reliability(names: Sequence[str], sums: Tally) -> pd.DataFrame:
    """The bins behind each calibration error; NaN in a bin without frames."""
    frames, confidence, right = (sums.bins[: len(names), row].ravel() for row in range(3))
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "name": np.repeat(np.array(names, dtype=object), BINS),
                "low": np.tile(np.arange(BINS) / BINS, len(names)),
                "high": np.tile(np.arange(1, BINS + 1) / BINS, len(names)),
                "frames": frames.astype(np.int64),
                "confidence": confidence / frames,
                "accuracy": right / frames,
            }
        )
