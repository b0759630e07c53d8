"""From outputs to tables: one pass over the frames adds up sums, and every table of a report is made from them.

Memory does not grow with the number of frames, beyond one number per frame for its recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensemble.judge.diversity import PAIR_MEASURES, Joint
from ensemble.judge.metrics import METRICS, Answers, Counts, Metric, get_metric
from ensemble.judge.reliability import BINS, bin_sums, calibration_error
from ensemble.judge.significance import cluster_bootstrap, percentile_ends, piles
from ensemble.outputs import LEAST, Cost, MemberOutputs
from ensemble.outputs.arrays import numbers
from ensemble.rules.fitted import Among, WeightedMean, rule_for
from ensemble.rules.pooling import mean, tie_rate
from ensemble.rules.table import FittedRule, Rule, declared

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_CELLS = 2**24  # probabilities processed at once: 64 MiB
_PILES = 10_000  # beyond so many recordings, they are dealt at random into piles, and piles are resampled
_COUNTS = 2**25  # numbers of frames by answer, pile and class that are kept: piles are fewer where there are more
_TOGETHER = 64  # answers that are resampled together: limits memory
_FEW = 20  # recordings
_TOLERANCE = 1e-3


class Tally:
    """Sums over frames for A answers: the M members, then the rules, then the uniform mean.

    A member that abstains on a frame (a row of NaN, where the outputs declare it) counts as wrong there, with the
    loss of equal probabilities, and is left out of `confusion` and `bins`.
    """

    def __init__(self, outputs: MemberOutputs, rules: Mapping[str, FittedRule], metric: Metric) -> None:
        members, self.frames, classes = outputs.shape
        assert outputs.groups is not None  # MemberOutputs fills them in
        self.rules, self.metric, answers = rules, metric, members + len(rules) + 1
        counted = metric.of is Counts
        most = min(_PILES, max(100, _COUNTS // (3 * answers * classes))) if counted else _PILES
        self.group, self.recordings = piles(outputs.groups.numpy(), most)  # (N,) each frame's recording, or its pile
        groups = min(self.recordings, most)
        self.whole = self.frames or math.nan  # what fractions are of: NaN without frames
        self.sizes: Floats = np.bincount(self.group, minlength=groups).astype(np.float64)  # (G,)
        self.confusion: Integers = np.zeros((answers, classes, classes), dtype=np.int64)  # true class, predicted class
        frame_by_frame = [name for name, each in METRICS.items() if each.of is Answers]
        self.sums: dict[str, Floats] = {name: np.zeros((answers, groups)) for name in frame_by_frame}
        #: frames by recording, predicted rightly, predicted, and true, of each class; where the metric needs them
        self.counts = np.zeros((answers, groups if counted else 0, 3, classes), dtype=np.int32)
        self.bins: Floats = np.zeros((answers, 3, BINS))  # frames, confidence, right
        self.clipped: Integers = np.zeros(answers, dtype=np.int64)  # frames whose true class had less than LEAST
        self.abstained: Integers = np.zeros(answers, dtype=np.int64)
        self.joint = Joint(np.zeros((members, members)), self.frames)
        self.some_right: Integers = np.zeros(classes, dtype=np.int64)  # frames where any member is right, by true class
        self.ties = 0.0

    def add(self, index: int, rows: Tensor, truth: Tensor, where: Integers) -> NDArray[np.bool_]:
        """Add one answer's (B, C) rows for a block of frames; returns (B,) where it is right."""
        classes, groups = rows.shape[1], len(self.sizes)
        labels, guesses = truth.numpy(), rows.numpy().argmax(axis=1)  # NumPy's is five times as fast as torch's max
        confidence = rows.gather(1, torch.from_numpy(guesses)[:, None])[:, 0].double().numpy()
        answered = ~np.isnan(confidence)  # the largest of a row with NaN is NaN
        correct: NDArray[np.bool_] = (labels == guesses) & answered
        known = rows.numpy() if answered.all() else np.where(answered[:, None], rows.numpy(), 1 / classes)
        answers = Answers(known, labels, np.where(answered, guesses, -1))
        cells = np.bincount((labels * classes + guesses)[answered], minlength=classes**2)
        self.confusion[index] += cells.reshape(classes, classes)
        for name, sums in self.sums.items():
            sums[index] += np.bincount(where, METRICS[name].function(answers), minlength=groups)
        if self.counts.size:
            flat, place = self.counts[index].reshape(-1), where * 3 * classes
            for row, (chosen, column) in enumerate(answers.by_class):
                np.add.at(flat, (place + row * classes + column)[chosen], 1)
        self.bins[index] += bin_sums(confidence[answered], correct[answered])
        self.clipped[index] += int((answers.true_class < LEAST).sum())
        self.abstained[index] += int((~answered).sum())
        return correct

    def values(self, metric: Metric) -> Floats:
        """(A,) each answer's value of a metric over all frames; NaN without frames."""
        if metric.of is Answers:
            means: Floats = self.sums[metric.name].sum(axis=1) / self.whole
            return means
        hits = np.diagonal(self.confusion, axis1=1, axis2=2)
        values: Floats = metric.function(Counts(hits, self.confusion.sum(axis=1), self.confusion.sum(axis=2)))
        return values

    def resampled(self, metrics: Sequence[Metric], answers: Integers, *, replicates: int, seed: int) -> list[Floats]:
        """For each metric (R, K) values of K answers, the better the higher, all on the same resamples of recordings.

        A metric of `Counts` is no mean over frames: its counts are resampled, and it is computed from them; it must be
        the one that the sums were made for.
        """
        counted = len(answers) * 3 * self.confusion.shape[1]
        tables = [
            self.sums[each.name][answers].T
            if each.of is Answers
            else self.counts[answers].transpose(1, 0, 2, 3).reshape(len(self.sizes), counted)
            for each in metrics
        ]
        ends = np.cumsum([table.shape[1] for table in tables])[:-1].tolist()
        means = cluster_bootstrap(np.concatenate(tables, axis=1), self.sizes, replicates=replicates, seed=seed)
        found = []
        for each, part in zip(metrics, np.split(means, ends, axis=1), strict=True):
            if each.of is Counts:
                counts = part.reshape(replicates, len(answers), 3, -1)
                part = each.function(Counts(counts[:, :, 0], counts[:, :, 1], counts[:, :, 2]))
            found.append(each.goods(part))
        return found


def tally(outputs: MemberOutputs, rules: Mapping[str, Rule], metric: Metric = METRICS["accuracy"]) -> Tally:
    """Add up the sums, of rules over the members that they name; the uniform mean is always the last answer.

    What is needed to resample `metric` is kept, beside the means over frames, which always are.

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
    applied = {name: declared(rule.abstaining) if outputs.abstain else rule for name, rule in aligned.items()}
    sums = Tally(outputs, aligned, metric)
    for block, probabilities in outputs.blocks(max(1, _CELLS // (members * classes)), nan="if declared"):
        truth, where, logs = labels[block], sums.group[block], outputs.log_probabilities[:, block]
        right = [sums.add(member, rows, truth, where) for member, rows in enumerate(probabilities)]
        for index, (name, rule) in enumerate(applied.items(), start=members):
            rows = rule.of_logs(logs.float()) if rule.logarithmic else rule(probabilities)
            rows = numbers(rows, f"rows from rule {name!r}").detach().cpu()
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


def best(sums: Tally, answers: Iterable[int]) -> int:
    """Index of the best of some answers by the metric; equal ones by log-loss, or accuracy; then by their order."""
    second = METRICS["accuracy" if sums.metric.name == "log_loss" else "log_loss"]
    order = [metric.goods(sums.values(metric)) for metric in (sums.metric, second)]
    return max(answers, key=lambda index: (order[0][index], order[1][index]))


def best_member(outputs: MemberOutputs, metric: str = "accuracy") -> str:
    """The best member by a metric; of equals the one with the lower log-loss, or the more accurate one; then the first.

    A `ValueError` without labels, for an unknown metric, or where a member gives NaN that is not declared.
    """
    return outputs.members[best(tally(outputs, {}, get_metric(metric)), range(len(outputs.members)))]


def scores(
    outputs: MemberOutputs, sums: Tally, parameters: Mapping[str, int], costs: Mapping[str, Cost]
) -> pd.DataFrame:
    """One row per member, then one per rule, which counts parameters and bytes of the members that can influence it.

    The uniform mean, which is only a yardstick, has none.
    """
    used = [None if rule.used is None else list(rule.used) for rule in sums.rules.values()]

    def with_sums(known: Sequence[int | None]) -> pd.Series[int]:
        """Of the members, then of each rule; missing where a member's is."""
        own: pd.Series[int] = pd.Series([*known], dtype="Int64")
        sums = [(own if some is None else own.iloc[some]).sum(skipna=False) for some in used]
        return pd.Series([*own, *sums], dtype="Int64")

    names = [*outputs.members, *sums.rules]
    measured = [costs.get(name, Cost(math.nan)) for name in names]
    frame_by_frame, by_class = (
        {name: sums.values(metric)[:-1] for name, metric in METRICS.items() if metric.of is kind}
        for kind in (Answers, Counts)
    )
    table = {
        "name": names,
        **frame_by_frame,
        "calibration_error": [calibration_error(each) for each in sums.bins[:-1]],
        **by_class,
        "parameters": with_sums([parameters.get(name) for name in outputs.members]),
        "bytes": with_sums([about.bytes for about in outputs.about]),
        "microseconds": [cost.microseconds for cost in measured],
        "memory": pd.Series([cost.memory for cost in measured], dtype="Int64"),
        "abstained": sums.abstained[:-1],
    }
    return pd.DataFrame(table)


def gains(sums: Tally, judged: Sequence[int], *, baseline: int, replicates: int, seed: int) -> pd.DataFrame:
    """The gains of some answers with the ends of their intervals, all from one resampling of recordings.

    `baseline` is the index of the member that gains are measured against.
    """
    if len(judged) > _TOGETHER:  # equal seeds, equal resamples
        pieces = [judged[start : start + _TOGETHER] for start in range(0, len(judged), _TOGETHER)]
        each = [gains(sums, piece, baseline=baseline, replicates=replicates, seed=seed) for piece in pieces]
        return pd.concat(each, ignore_index=True)
    answers = np.array([baseline, len(sums.confusion) - 1, *judged])
    both = (sums.metric, METRICS["log_loss"])
    resampled = sums.resampled(both, answers, replicates=replicates, seed=seed)
    columns: dict[str, Floats] = {}
    for name, which, other in (("gain", 0, 0), ("mean_gain", 0, 1), ("loss_gain", 1, 0)):
        whole, drawn = both[which].goods(sums.values(both[which])[answers]), resampled[which]
        columns[name] = whole[2:] - whole[other]
        columns[f"{name}_low"], columns[f"{name}_high"] = percentile_ends(drawn[:, 2:] - drawn[:, [other]])
    return pd.DataFrame(columns)


def linear_weights(members: Sequence[str], rules: Mapping[str, FittedRule]) -> dict[str, dict[str, float]]:
    """Rule -> member -> weight, of the rules that are weighted means."""
    found = {}
    for name, rule in rules.items():
        inner, places = (rule.of, rule.places) if isinstance(rule, Among) else (rule, range(len(members)))
        if isinstance(inner, WeightedMean):
            weights = dict(zip(places, inner.weights, strict=True))
            found[name] = {member: weights.get(place, 0.0) for place, member in enumerate(members)}
    return found


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


def trained_on(fingerprints: Iterable[str], outputs: MemberOutputs) -> str:
    """The members that were trained on some of these frames."""
    known = {fingerprint for fingerprint in fingerprints if fingerprint}
    pairs = zip(outputs.members, outputs.about, strict=True)
    return ", ".join(name for name, about in pairs if about.trained_on in known)


def provenance(outputs: MemberOutputs, rules: Mapping[str, FittedRule]) -> Iterator[str]:
    """What makes figures too good: the frames that rules were fitted on, and members trained on."""
    for name, rule in rules.items():
        if outputs.fingerprint in rule.fingerprints:
            yield f"{name} was fitted on these frames: its figures are optimistic"
        if members := trained_on(rule.fingerprints, outputs):
            yield f"{name} was fitted on training frames of {members}, which it therefore trusts too much"
        if "" in rule.fingerprints:
            yield f"{name} has numbers of unknown origin: if they were fitted here, its figures are optimistic"
    if members := trained_on([outputs.fingerprint], outputs):
        yield f"these frames are training frames of {members}: their figures and those of all rules are optimistic"


def resampling(recordings: int, frames: int) -> Iterator[str]:
    """Whether intervals over so many recordings can be trusted."""
    if recordings < 2:
        yield f"{recordings} recording{'s' * (not recordings)} cannot be resampled: there are no intervals"
    elif recordings < _FEW:
        yield f"{recordings} recordings are few to resample: intervals are too narrow"
    elif recordings == frames:
        yield "every frame is its own recording: if neighbours are alike, intervals are too narrow"
