"""From sums to tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ensemble.judge.diversity import PAIR_MEASURES, Joint
from ensemble.judge.reliability import BINS, calibration_error
from ensemble.judge.significance import cluster_bootstrap, percentile_ends
from ensemble.judge.tally import Counts, Floats, Tally
from ensemble.outputs import MemberOutputs
from ensemble.rules.table import FittedRule


def share(part: float, whole: float) -> float:
    """A fraction; NaN of nothing."""
    return float(part) / whole if whole else math.nan


def scores(names: Sequence[str], tally: Tally, sizes: Sequence[int | None], *, start: int) -> pd.DataFrame:
    """One row per name, whose answers begin at `start`; `sizes` are numbers of parameters."""
    rows = [
        {
            "name": name,
            "accuracy": share(tally.right[index].sum(), tally.frames),
            "log_loss": share(tally.loss[index].sum(), tally.frames),
            "calibration_error": calibration_error(tally.bins[index]),
            "macro_f1": _macro_f1(tally.confusion[index]),
            "parameters": size,
        }
        for index, (name, size) in enumerate(zip(names, sizes, strict=True), start=start)
    ]
    columns = ["name", "accuracy", "log_loss", "calibration_error", "macro_f1", "parameters"]
    return pd.DataFrame(rows, columns=columns).astype({"parameters": "Int64"})


def used_parameters(rule: FittedRule, own: Sequence[int | None]) -> int | None:
    """Parameters of the members that can influence a rule; None where one is unknown."""
    counted = list(own) if rule.used is None else [own[position] for position in rule.used]
    return None if None in counted else sum(size for size in counted if size is not None)


def _macro_f1(confusion: Counts) -> float:
    """Mean F1 of the classes that occur, as a label or as a prediction."""
    hits, occurrences = np.diagonal(confusion), confusion.sum(axis=0) + confusion.sum(axis=1)
    seen = occurrences > 0
    return float((2 * hits[seen] / occurrences[seen]).mean()) if seen.any() else math.nan


def best_of(table: pd.DataFrame) -> str | None:
    """The name with the highest accuracy, lower log-loss where equal; None in an empty table."""
    ordered = table.sort_values(["accuracy", "log_loss"], ascending=[False, True], kind="stable")
    return str(ordered["name"].iloc[0]) if len(ordered) else None


def gains(tally: Tally, *, members: int, baseline: int, replicates: int, seed: int) -> pd.DataFrame:
    """Each rule's gains with the ends of their intervals, all from one resampling of recordings.

    Args:
        tally: of members, rules, and the uniform mean.
        members: M; the rules follow.
        baseline: index of the member that gains are measured against.
        replicates: see `cluster_bootstrap`.
        seed: see `cluster_bootstrap`.
    """
    answers, ours = tally.answers, np.arange(members, tally.answers - 1)
    sums = np.concatenate([tally.right, -tally.loss]).T  # (G, 2A)
    resampled = cluster_bootstrap(sums, tally.sizes, replicates=replicates, seed=seed)
    whole = sums.sum(axis=0) / tally.frames if tally.frames else np.full(2 * answers, np.nan)
    columns: dict[str, Floats] = {}
    for name, mine, other in (
        ("gain", ours, baseline),
        ("mean_gain", ours, answers - 1),
        ("loss_gain", ours + answers, baseline + answers),
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


def classes(outputs: MemberOutputs, tally: Tally, *, baseline: int, judged: int) -> pd.DataFrame:
    """One row per class; accuracies are fractions of the class's own frames, NaN for a class without any.

    Args:
        outputs: for the names.
        tally: of members and rules.
        baseline: index of the best single member.
        judged: index of the answer whose confusions are told.
    """
    frames = np.bincount(outputs.require_labels().numpy(), minlength=len(outputs.classes))
    told = tally.confusion[judged]
    wrong = told - np.diag(np.diagonal(told))
    f1 = _f1(tally.confusion[: len(outputs.members)], frames)  # (M, C)
    with np.errstate(invalid="ignore"):
        table = pd.DataFrame(
            {
                "name": list(outputs.classes),
                "frames": frames,
                "baseline_accuracy": np.diagonal(tally.confusion[baseline]) / frames,
                "rule_accuracy": np.diagonal(told) / frames,
                "oracle": tally.some_right / frames,
                "confused_with": [outputs.classes[index] for index in wrong.argmax(axis=1)],
                "confused_share": wrong.max(axis=1) / frames,
                "trust": [outputs.members[index] for index in f1.argmax(axis=0)],
                "trust_f1": f1.max(axis=0),
            }
        ).astype({"confused_with": object, "trust": object})
    table.loc[wrong.sum(axis=1) == 0, "confused_with"] = None
    table.loc[frames == 0, "trust"] = None
    table.loc[frames == 0, "trust_f1"] = math.nan
    return table


def confusions(outputs: MemberOutputs, tally: Tally, *, baseline: int, judged: int, most: int = 3) -> pd.DataFrame:
    """Per class, the classes it is most often taken for, at most `most`, with how often; mistakes only.

    Args:
        outputs: for the names.
        tally: of members and rules.
        baseline: index of the member whose share of the same mistake stands beside.
        judged: index of the answer whose mistakes are told.
        most: rows per class.
    """
    told, before = tally.confusion[judged], tally.confusion[baseline]
    frames = np.bincount(outputs.require_labels().numpy(), minlength=len(outputs.classes))
    wrong = told - np.diag(np.diagonal(told))
    rows = [
        {
            "name": outputs.classes[true],
            "taken_for": outputs.classes[said],
            "frames": int(wrong[true, said]),
            "share": wrong[true, said] / frames[true],
            "baseline_share": before[true, said] / frames[true],
        }
        for true, order in enumerate(np.argsort(-wrong, axis=1, kind="stable")[:, :most])
        for said in order
        if wrong[true, said]
    ]
    return pd.DataFrame(rows, columns=["name", "taken_for", "frames", "share", "baseline_share"])


def _f1(confusion: Counts, frames: Counts) -> Floats:
    """(M, C): a member's hits in both directions, so claiming a class everywhere does not pay."""
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    return np.asarray(2 * hits / np.maximum(confusion.sum(axis=1) + frames, 1))


def reliability(names: Sequence[str], tally: Tally) -> pd.DataFrame:
    """The bins behind each calibration error; NaN in a bin without frames."""
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
