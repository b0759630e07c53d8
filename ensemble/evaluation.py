"""`evaluate`: how good are the members, how good are the rules, and is the gain real? The answer is a `Report`.

One walk over the frames in blocks collects sums; every figure is made from the sums, so memory does not grow
with the number of frames. The only door to pandas. Nothing is fitted here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from ensemble.diversity import PAIR_MEASURES, Joint
from ensemble.outputs import MemberOutputs
from ensemble.rules import Rule, mean, tie_rate
from ensemble.significance import cluster_bootstrap, percentile_ends

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

BINS = 15  # equal widths, as in Guo et al., "On calibration of modern neural networks", 2017
_LEAST = 2.0**-52  # probabilities below this count as this in log-loss, as in scikit-learn
_CELLS = 2**24  # probabilities looked at together: 64 MiB
_PILES = 10_000  # beyond so many recordings, they are dealt at random into piles and piles are resampled
_TOLERANCE = 1e-3
_UNIFORM = "\0mean"  # the uniform mean is always judged, under a name nobody else has


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate` found.

    Args:
        members: one row per member: name, accuracy, log_loss (nats), calibration_error, macro_f1, parameters.
        rules: the same per rule, then gain (accuracy minus the baseline's) with gain_low and gain_high,
            mean_gain over the uniform mean with its ends, loss_gain (the baseline's log-loss minus the
            rule's) with its ends, and fitted_here: whether the rule was fitted on these very frames.
        pairs: one row per pair of members: first, second, and every pairwise measure of `diversity`.
        classes: one row per class: frames, accuracy of the baseline and of the best rule, what the rule
            takes it for most often, the member to trust, and the oracle.
        reliability: per member and rule, the bins behind calibration_error.
        baseline: the best single member, or the one named.
        best: the rule of highest accuracy, lower log-loss where equal.
        frames: how many were judged.
        recordings: how many groups they come from.
        oracle: fraction of the frames where some member is right: no choice among members beats it.
        tie_rate: fraction of the frames where the members' top votes tie.
        seconds: taken by the walk over the frames.
        notes: what to keep in mind when reading the figures.
        fingerprint: of the frames judged.
    """

    members: pd.DataFrame
    rules: pd.DataFrame
    pairs: pd.DataFrame
    classes: pd.DataFrame
    reliability: pd.DataFrame
    baseline: str
    best: str | None
    frames: int
    recordings: int
    oracle: float
    tie_rate: float
    seconds: float
    notes: tuple[str, ...]
    fingerprint: str

    @property
    def frames_per_second(self) -> float:
        """Frames judged per second, all members and rules together."""
        return self.frames / self.seconds if self.seconds else math.nan

    def to_json(self) -> dict[str, Any]:
        """The whole report as plain data; what is not a number becomes None."""
        tables = {
            name: _records(getattr(self, name)) for name in ("members", "rules", "pairs", "classes", "reliability")
        }
        plain = {
            name: _plain(getattr(self, name))
            for name in (
                "baseline", "best", "frames", "recordings", "oracle", "tie_rate", "seconds", "frames_per_second",
                "fingerprint",
            )
        }  # fmt: skip
        return tables | plain | {"notes": list(self.notes)}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): _plain(v) for k, v in row.items()} for row in table.to_dict("records")]


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    outputs: MemberOutputs,
    rules: Mapping[str, Rule],
    *,
    baseline: str | None = None,
    parameters: Mapping[str, int] | None = None,
    trained_on: Mapping[str, str] | None = None,
    replicates: int = 2000,
    seed: int = 0,
) -> Report:
    """Judge members and rules on frames whose truth is known.

    Args:
        outputs: of all members, with labels; intervals resample its groups.
        rules: name in the report -> rule.
        baseline: the member that gains are measured against, chosen on other frames. If None, the most
            accurate member on these frames, which makes gains look smaller than they are; a note says so.
        parameters: member -> number of parameters, for the tables.
        trained_on: member -> fingerprint of the frames it was trained on; a note says where these frames
            or a rule's fitting frames are among them.
        replicates: resamples behind each interval.
        seed: of the resampling.

    Raises:
        ValueError: no labels; an unknown baseline; a rule whose rows are not distributions.

    Example:
        >>> p = [[0.9, 0.1], [0.2, 0.8]]
        >>> outputs = MemberOutputs.from_probabilities({"a": p, "b": p}, labels=[0, 1])
        >>> evaluate(outputs, {"mean": mean}).rules[["name", "accuracy", "gain"]].values.tolist()
        [['mean', 1.0, 0.0]]
    """
    labels = outputs.require_labels()
    if baseline is not None and baseline not in outputs.members:
        msg = f"expected the baseline among the members {list(outputs.members)}, got {baseline!r}"
        raise ValueError(msg)
    began = time.perf_counter()
    tally = _walk(outputs, labels, {**rules, _UNIFORM: mean})
    seconds = time.perf_counter() - began
    members, combined = _tables(outputs, rules, tally, parameters or {})
    chosen = baseline or _best(members) or outputs.members[0]
    gains = _gains(outputs, rules, tally, chosen, replicates=replicates, seed=seed)
    combined = pd.concat([combined, gains], axis=1)
    combined["fitted_here"] = [getattr(rule, "fingerprint", "") == outputs.fingerprint for rule in rules.values()]
    best = _best(combined)
    names = [*outputs.members, *rules]
    return Report(
        members=members,
        rules=combined,
        pairs=_pairs(outputs.members, tally.joint),
        classes=_classes(outputs, tally, outputs.members.index(chosen), None if best is None else names.index(best)),
        reliability=_reliability(names, tally),
        baseline=chosen,
        best=best,
        frames=len(labels),
        recordings=tally.recordings,
        oracle=_share(tally.some_right.sum(), len(labels)),
        tie_rate=_share(tally.ties, len(labels)),
        seconds=seconds,
        notes=tuple(_notes(outputs, rules, tally, baseline, chosen, trained_on or {})),
        fingerprint=outputs.fingerprint,
    )


@dataclass(eq=False)
class _Tally:
    """Sums over frames for A answers: the M members, then the rules, then the uniform mean."""

    confusion: Counts  # (A, C, C): true class, predicted class
    loss: Floats  # (A, G)
    right: Floats  # (A, G)
    sizes: Floats  # (G,)
    bins: Floats  # (A, 3, BINS): frames, confidence, right
    clipped: Counts  # (A,) frames whose true class had no probability
    joint: Joint
    some_right: Counts  # (C,) frames where any member is right, by true class
    ties: float
    recordings: int


def _walk(outputs: MemberOutputs, labels: Tensor, rules: Mapping[str, Rule]) -> _Tally:
    members, frames, classes = outputs.shape
    where, recordings = _piles(outputs.groups)
    groups = min(recordings, _PILES)
    answers = members + len(rules)
    tally = _Tally(
        confusion=np.zeros((answers, classes, classes), dtype=np.int64),
        loss=np.zeros((answers, groups)),
        right=np.zeros((answers, groups)),
        sizes=np.bincount(where, minlength=groups).astype(np.float64),
        bins=np.zeros((answers, 3, BINS)),
        clipped=np.zeros(answers, dtype=np.int64),
        joint=Joint(np.zeros((members, members)), frames),
        some_right=np.zeros(classes, dtype=np.int64),
        ties=0.0,
        recordings=recordings,
    )
    for block, probabilities in outputs.blocks(max(1, _CELLS // (members * classes))):
        truth = labels[block]
        correct = np.zeros((members, len(truth)), dtype=bool)
        for index in range(members):
            correct[index] = _add(tally, index, probabilities[index], truth, where[block])
        for index, (name, rule) in enumerate(rules.items(), start=members):
            _add(tally, index, _distribution(name, rule(probabilities), probabilities), truth, where[block])
        tally.joint.both[:] += Joint.of(correct).both
        tally.some_right += np.bincount(truth.numpy()[correct.any(axis=0)], minlength=classes)
        tally.ties += tie_rate(probabilities) * len(truth)
    return tally


def _piles(groups: Tensor | None) -> tuple[Counts, int]:
    """(N,) recording of each frame from 0, and how many there are; too many are dealt into piles."""
    assert groups is not None  # MemberOutputs fills them in
    distinct, where = np.unique(groups.numpy(), return_inverse=True)
    if len(distinct) > _PILES:
        where = (np.random.default_rng(0).permutation(len(distinct)) % _PILES)[where]
    return where, len(distinct)


def _add(tally: _Tally, index: int, rows: Tensor, truth: Tensor, where: Counts) -> NDArray[np.bool_]:
    """Add one answer's (B, C) rows for a block of frames; returns (B,) where it is right."""
    classes, groups = rows.shape[1], len(tally.sizes)
    confidence, predicted = rows.max(dim=1)
    labels, guesses, sure = truth.numpy(), predicted.numpy(), confidence.double().numpy()
    correct: NDArray[np.bool_] = labels == guesses
    likelihood = rows.gather(1, truth[:, None])[:, 0].double().numpy()
    tally.clipped[index] += int((likelihood <= 0).sum())
    loss = -np.log(np.maximum(likelihood, _LEAST))
    cells = np.bincount(labels * classes + guesses, minlength=classes**2)
    tally.confusion[index] += cells.reshape(classes, classes)
    tally.loss[index] += np.bincount(where, loss, minlength=groups)
    tally.right[index] += np.bincount(where, correct, minlength=groups)
    bins = np.clip(np.ceil(sure * BINS).astype(np.int64) - 1, 0, BINS - 1)
    for row, amounts in enumerate((np.ones_like(sure), sure, correct)):
        tally.bins[index, row] += np.bincount(bins, amounts, minlength=BINS)
    return correct


def _distribution(name: str, rows: Tensor, probabilities: Tensor) -> Tensor:
    if rows.shape != probabilities.shape[1:]:
        msg = f"expected rows of shape {tuple(probabilities.shape[1:])} from rule {name!r}, got {tuple(rows.shape)}"
        raise ValueError(msg)
    off = ~((rows.sum(dim=1) - 1).abs() <= _TOLERANCE)
    if off.any():
        frame = int(off.nonzero()[0])
        came = f"a row with sum {float(rows[frame].sum()):.6g}"
        msg = f"expected rows that sum to one from rule {name!r}, got {came} ({int(off.sum())} such rows)"
        raise ValueError(msg)
    return rows


def _share(part: float, whole: float) -> float:
    return float(part) / whole if whole else math.nan


def _tables(
    outputs: MemberOutputs, rules: Mapping[str, Rule], tally: _Tally, parameters: Mapping[str, int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The members' table and the rules', without gains."""
    own = [parameters.get(name) for name in outputs.members]
    sizes = own + [_used(rule, own) for rule in rules.values()]
    rows = [
        {
            "name": name,
            "accuracy": _share(tally.right[index].sum(), outputs.shape[1]),
            "log_loss": _share(tally.loss[index].sum(), outputs.shape[1]),
            "calibration_error": _calibration_error(tally.bins[index]),
            "macro_f1": _macro_f1(tally.confusion[index]),
            "parameters": sizes[index],
        }
        for index, name in enumerate([*outputs.members, *rules])
    ]
    table = pd.DataFrame(rows).astype({"parameters": "Int64"})
    cut = len(outputs.members)
    return table.iloc[:cut].reset_index(drop=True), table.iloc[cut:].reset_index(drop=True)


def _used(rule: Rule, own: Sequence[int | None]) -> int | None:
    """Parameters of the members that have a say in a rule; None where one is unknown."""
    weights = getattr(rule, "weights", None) or [1.0] * len(own)
    counted = [size for size, weight in zip(own, weights, strict=True) if weight]
    return None if None in counted else sum(size for size in counted if size is not None)


def _calibration_error(bins: Floats) -> float:
    """Mean distance of confidence from accuracy over bins, weighted by frames."""
    frames, confidence, right = bins
    return _share(np.abs(confidence - right).sum(), frames.sum())


def _macro_f1(confusion: Counts) -> float:
    """Mean F1 of the classes that occur, as a label or as a prediction."""
    hits, occurrences = np.diagonal(confusion), confusion.sum(axis=0) + confusion.sum(axis=1)
    seen = occurrences > 0
    return float((2 * hits[seen] / occurrences[seen]).mean()) if seen.any() else math.nan


def _best(table: pd.DataFrame) -> str | None:
    """The name with the highest accuracy, lower log-loss where equal; None in an empty table."""
    ordered = table.sort_values(["accuracy", "log_loss"], ascending=[False, True], kind="stable")
    return str(ordered["name"].iloc[0]) if len(ordered) else None


def _gains(
    outputs: MemberOutputs, rules: Mapping[str, Rule], tally: _Tally, baseline: str, *, replicates: int, seed: int
) -> pd.DataFrame:
    """Each rule's gains with the ends of their intervals, all from one resampling of recordings."""
    members, count = len(outputs.members), len(rules)
    sums = np.concatenate([tally.right, -tally.loss]).T  # (G, 2A)
    resampled = cluster_bootstrap(sums, tally.sizes, replicates=replicates, seed=seed)
    whole = np.array([[_share(total, outputs.shape[1]) for total in sums.sum(axis=0)]])
    answers = len(tally.right)
    ours = np.arange(members, members + count)
    single = outputs.members.index(baseline)
    columns: dict[str, Floats] = {}
    for name, mine, other in (
        ("gain", ours, single),
        ("mean_gain", ours, answers - 1),
        ("loss_gain", ours + answers, single + answers),
    ):
        columns[name] = (whole[:, mine] - whole[:, [other]])[0]
        low, high = percentile_ends(resampled[:, mine] - resampled[:, [other]])
        columns[f"{name}_low"], columns[f"{name}_high"] = low, high
    return pd.DataFrame(columns)


def _pairs(members: Sequence[str], joint: Joint) -> pd.DataFrame:
    first, second = np.triu_indices(len(members), k=1)
    names = np.array(members, dtype=object)
    table = {"first": names[first], "second": names[second]}
    return pd.DataFrame(table | {name: measure(joint)[first, second] for name, measure in PAIR_MEASURES.items()})


def _classes(outputs: MemberOutputs, tally: _Tally, baseline: int, best: int | None) -> pd.DataFrame:
    """One row per class; accuracies are shares of the class's own frames, NaN for a class without any."""
    confusion = tally.confusion
    frames = confusion[0].sum(axis=1)
    judged = confusion[baseline if best is None else best]
    wrong = judged - np.diag(np.diagonal(judged))
    hits = np.diagonal(confusion[: len(outputs.members)], axis1=1, axis2=2)  # (M, C)
    reach = confusion[: len(outputs.members)].sum(axis=1) + frames
    f1 = 2 * hits / np.maximum(reach, 1)
    with np.errstate(invalid="ignore"):
        table = pd.DataFrame(
            {
                "name": list(outputs.classes),
                "frames": frames,
                "baseline_accuracy": np.diagonal(confusion[baseline]) / frames,
                "rule_accuracy": np.diagonal(judged) / frames,
                "oracle": tally.some_right / frames,
                "confused_with": [outputs.classes[index] for index in wrong.argmax(axis=1)],
                "confused_share": wrong.max(axis=1) / frames,
                "trust": [outputs.members[index] for index in f1.argmax(axis=0)],
                "trust_f1": f1.max(axis=0),
            }
        )
    table.loc[wrong.sum(axis=1) == 0, "confused_with"] = None
    table.loc[frames == 0, ["trust", "trust_f1"]] = [None, math.nan]
    return table


def _reliability(names: Sequence[str], tally: _Tally) -> pd.DataFrame:
    frames, confidence, right = (tally.bins[: len(names), row].ravel() for row in range(3))
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


def _notes(
    outputs: MemberOutputs,
    rules: Mapping[str, Rule],
    tally: _Tally,
    baseline: str | None,
    chosen: str,
    trained_on: Mapping[str, str],
) -> list[str]:
    notes = []
    if baseline is None:
        notes.append(f"the best single member, {chosen}, was chosen on these frames: gains are understated")
    for name, rule in rules.items():
        fitted_on = getattr(rule, "fingerprint", "")
        if fitted_on == outputs.fingerprint:
            notes.append(f"rule {name} was fitted on these frames: its figures are optimistic")
        shared = [member for member, frames in trained_on.items() if fitted_on and frames == fitted_on]
        if shared:
            notes.append(f"rule {name} was fitted on frames that {', '.join(shared)} had been trained on")
    trained_here = [member for member, frames in trained_on.items() if frames == outputs.fingerprint]
    if trained_here:
        notes.append(f"trained on these frames, so optimistic: {', '.join(trained_here)}")
    for name, clipped in zip([*outputs.members, *rules], tally.clipped, strict=False):
        if clipped:
            notes.append(f"{name} gives the true class no probability on {clipped} frames, taken as 2^-52 in log_loss")
    if tally.recordings < 20:
        notes.append(f"{tally.recordings} recordings are few to resample: intervals are too narrow")
    elif tally.recordings == outputs.shape[1]:
        notes.append("every frame is its own group: if neighbours are alike, intervals are too narrow")
    return notes
