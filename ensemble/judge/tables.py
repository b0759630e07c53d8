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
    uniform, aligned = WeightedMean((1.0,) * members, abstain=True) if outputs.abstain else mean, {}
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
            sums.add(index, _distribution(name, rule, probabilities), truth, where)
        sums.add(-1, uniform(probabilities), truth, where)
        sums.joint.both[:] += Joint.of(right).both
        sums.some_right += np.bincount(truth.numpy()[np.any(right, axis=0)], minlength=classes)
        sums.ties += tie_rate(probabilities) * len(truth)
    return sums


def _distribution(name: str, rule: Rule, probabilities: Tensor) -> Tensor:
    """The rule's (B, C) rows, checked."""
    rows = torch.as_tensor(rule(probabilities))
    if rows.shape != probabilities.shape[1:]:
        msg = f"expected rows of shape {tuple(probabilities.shape[1:])} from rule {name!r}, got {tuple(rows.shape)}"
        raise ValueError(msg)
    off = ~((rows.sum(dim=1) - 1).abs() <= _TOLERANCE)
    if off.any():
        msg = f"expected rows that sum to one from rule {name!r}, got a sum of {float(rows[off][0].sum()):.6g}"
        raise ValueError(msg)
    return rows


def best(sums: Tally, answers: Iterable[int], *, by: Literal["accuracy", "log_loss"] = "accuracy") -> int:
    """Index of the best of some answers; the other measure decides where they are equal, then their order."""
    right, gain = sums.right.sum(axis=1), -sums.loss.sum(axis=1)
    first, second = (right, gain) if by == "accuracy" else (gain, right)
    return max(answers, key=lambda index: (first[index], second[index]))


def best_member(outputs: MemberOutputs) -> str:
    """The most accurate member; of equals the one with the lower log-loss, then the first.

    Raises:
        ValueError: no labels, or NaN that is not declared.
    """
    return outputs.members[best(tally(outputs, {}), range(len(outputs.members)))]


def scores(outputs: MemberOutputs, sums: Tally, parameters: Mapping[str, int]) -> pd.DataFrame:
    """One row per member, then one per rule.

    Args:
        outputs: for the members' names.
        sums: of them and of the rules.
        parameters: of the members, as far as known; a rule counts those of the members that can influence it.
    """
    own = pd.Series([parameters.get(name) for name in outputs.members], dtype="Int64")
    used = [own if rule.used is None else own.iloc[list(rule.used)] for rule in sums.rules.values()]
    hits = np.diagonal(sums.confusion, axis1=1, axis2=2)  # (A, C)
    occurrences = sums.confusion.sum(axis=1) + sums.confusion.sum(axis=2)  # as a prediction or as a label
    with np.errstate(invalid="ignore"):
        f1 = (2 * hits / np.maximum(occurrences, 1)).sum(axis=1) / (occurrences > 0).sum(axis=1)
    table = {
        "accuracy": sums.right.sum(axis=1) / sums.whole,
        "log_loss": sums.loss.sum(axis=1) / sums.whole,
        "calibration_error": np.array([calibration_error(bins) for bins in sums.bins]),
        "macro_f1": f1,
        "abstained": sums.abstained,
    }
    judged = pd.DataFrame(table)[:-1]  # without the uniform mean
    judged.insert(0, "name", [*outputs.members, *sums.rules])
    judged.insert(5, "parameters", pd.Series([*own, *(some.sum(skipna=False) for some in used)], dtype="Int64"))
    return judged


def gains(sums: Tally, *, members: int, baseline: int, replicates: int, seed: int) -> pd.DataFrame:
    """Each rule's gains with the ends of their intervals, all from one resampling of recordings.

    Args:
        sums: of members, rules, and the uniform mean.
        members: M; the rules follow.
        baseline: index of the member that gains are measured against.
        replicates: see `cluster_bootstrap`.
        seed: see `cluster_bootstrap`.
    """
    answers = len(sums.right)
    rules = np.arange(members, answers - 1)
    goods = np.concatenate([sums.right, -sums.loss]).T  # (G, 2A)
    resampled = cluster_bootstrap(goods, sums.sizes, replicates=replicates, seed=seed)
    columns: dict[str, Floats] = {}
    whole = goods.sum(axis=0) / sums.whole
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


def by_class(
    outputs: MemberOutputs, sums: Tally, *, baseline: int, judged: int, most: int = 3
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per class, and for each class the classes that it is most often taken for.

    Accuracies and shares are fractions of the class's own frames, NaN for a class without any.

    Args:
        outputs: for labels and names.
        sums: of members and rules.
        baseline: index of the best single member.
        judged: index of the answer whose mistakes are counted.
        most: mistakes per class, at most.
    """
    names, confusion, before = outputs.classes, sums.confusion[judged], sums.confusion[baseline]
    frames = np.bincount(outputs.require_labels().numpy(), minlength=len(names))
    wrong = confusion - np.diag(np.diagonal(confusion))
    members = sums.confusion[: len(outputs.members)]
    hits = np.diagonal(members, axis1=1, axis2=2)  # (M, C)
    f1 = 2 * hits / np.maximum(members.sum(axis=1) + frames, 1)  # predicting a class everywhere does not pay
    with np.errstate(invalid="ignore"):
        table = pd.DataFrame(
            {
                "name": list(names),
                "frames": frames,
                "baseline_accuracy": np.diagonal(before) / frames,
                "rule_accuracy": np.diagonal(confusion) / frames,
                "oracle": sums.some_right / frames,
                "confused_with": [names[index] for index in wrong.argmax(axis=1)],
                "confused_share": wrong.max(axis=1) / frames,
                "trust": [outputs.members[index] for index in f1.argmax(axis=0)],
                "trust_f1": np.where(frames, f1.max(axis=0), np.nan),
            }
        ).astype({"confused_with": object, "trust": object})
    table.loc[wrong.sum(axis=1) == 0, "confused_with"] = None
    table.loc[frames == 0, "trust"] = None
    rows = [
        {
            "name": names[true],
            "taken_for": names[predicted],
            "frames": int(wrong[true, predicted]),
            "share": wrong[true, predicted] / frames[true],
            "baseline_share": before[true, predicted] / frames[true],
        }
        for true, order in enumerate(np.argsort(-wrong, axis=1, kind="stable")[:, :most])
        for predicted in order
        if wrong[true, predicted]
    ]
    return table, pd.DataFrame(rows, columns=["name", "taken_for", "frames", "share", "baseline_share"])


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
