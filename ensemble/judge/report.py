"""`evaluate`: how good are the members, how good are the rules, and is the gain real? The answer is a `Report`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ensemble.judge import tables
from ensemble.judge.significance import CrossFit
from ensemble.judge.tally import Tally, walk
from ensemble.outputs import MemberOutputs
from ensemble.rules.fitted import rule_for
from ensemble.rules.table import Rule, declared

_TABLES = ("members", "rules", "pairs", "classes", "confusions", "reliability")
_FIGURES = (
    "baseline",
    "best",
    "frames",
    "recordings",
    "oracle",
    "tie_rate",
    "seconds",
    "frames_per_second",
    "fingerprint",
)
_FEW = 20  # recordings


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate` found.

    Args:
        members: one row per member: name, accuracy, log_loss (nats; a probability of the true class below 2^-52
            counts as 2^-52, and a note says on how many frames), calibration_error (of the top class, 15
            bins of equal width), macro_f1 (over classes that occur, of frames with an answer), parameters,
            abstained (frames).
        rules: the same per rule, then gain (accuracy minus the baseline's) with gain_low and gain_high, the
            ends of its 95 % interval, NaN for fewer than two recordings; mean_gain over the uniform mean, and
            loss_gain (the baseline's log-loss minus the rule's), each with its ends; fitted_here: whether it was
            fitted on these frames; fitted_on_training: whether on frames that a member was trained on; optimism: its
            log-loss in nats on recordings left out of the fit minus that on its own fitting frames, and
            optimism_accuracy what it loses of its accuracy there, NaN where `evaluate` was not told.
        pairs: one row per pair of members: first, second, and every pairwise measure of `diversity`.
        classes: one row per class: frames, accuracy of the baseline and of the best rule, what the rule
            takes it for most often, the member to trust (by F1), and the oracle.
        confusions: per class, the three it is most often taken for by the best rule, how often (frames, and share
            of the class's own), and the baseline's share of the same mistake.
        reliability: per member and rule, the bins behind calibration_error.
        baseline: the best single member, or the one named.
        best: the rule of highest accuracy, lower log-loss where equal; None where there are no rules.
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
    confusions: pd.DataFrame
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
        """The whole report as plain data; what is not a finite number becomes None."""
        told = {name: _records(getattr(self, name)) for name in _TABLES}
        return told | {name: _plain(getattr(self, name)) for name in _FIGURES} | {"notes": list(self.notes)}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): _plain(value) for key, value in row.items()} for row in table.to_dict("records")]


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
    cross_fits: Mapping[str, CrossFit] | None = None,
    replicates: int = 2000,
    seed: int = 0,
) -> Report:
    """Judge members and rules on frames whose truth is known.

    Args:
        outputs: of all members, with labels; read in blocks; intervals resample its groups.
        rules: name in the report -> rule.
        baseline: the member that gains are measured against, chosen on other frames. If None, the most
            accurate member on these frames, which makes gains look smaller than they are; a note says so.
        parameters: member -> number of parameters, for the tables.
        trained_on: member -> fingerprint of the frames it was trained on; a note says where these frames
            or a rule's fitting frames are among them.
        cross_fits: fitted rule -> what `cross_fit` found on its fitting frames, for the two columns of optimism.
        replicates: resamples behind each interval.
        seed: of the resampling; equal seeds, equal intervals.

    Raises:
        ValueError: no labels; an unknown baseline; a rule whose rows are not distributions.

    Example:
        >>> from ensemble import mean
        >>> p = [[0.9, 0.1], [0.2, 0.8]]
        >>> outputs = MemberOutputs.from_probabilities({"a": p, "b": p}, labels=[0, 1])
        >>> evaluate(outputs, {"mean": mean}).rules[["name", "accuracy", "gain"]].values.tolist()
        [['mean', 1.0, 0.0]]
    """
    names = list(outputs.members)
    if baseline is not None and baseline not in names:
        msg = f"expected the baseline among the members {names}, got {baseline!r}"
        raise ValueError(msg)
    began = time.perf_counter()
    tally = walk(outputs, rules)
    seconds = time.perf_counter() - began
    members, combined = _scored(outputs, rules, tally, parameters or {})
    single = baseline or tables.best_of(members) or names[0]
    index = names.index(single)
    gains = tables.gains(tally, members=len(names), baseline=index, replicates=replicates, seed=seed)
    best = tables.best_of(combined)
    judged = index if best is None else len(names) + list(rules).index(best)
    return Report(
        members=members,
        rules=pd.concat([combined, gains, _fitting(outputs, rules, trained_on or {}, cross_fits or {})], axis=1),
        pairs=tables.pairs(names, tally.joint),
        classes=tables.classes(outputs, tally, baseline=index, judged=judged),
        confusions=tables.confusions(outputs, tally, baseline=index, judged=judged),
        reliability=tables.reliability([*names, *rules], tally),
        baseline=single,
        best=best,
        frames=tally.frames,
        recordings=tally.recordings,
        oracle=tables.share(tally.some_right.sum(), tally.frames),
        tie_rate=tables.share(tally.ties, tally.frames),
        seconds=seconds,
        notes=tuple(_notes(outputs, rules, tally, baseline, single, trained_on or {})),
        fingerprint=outputs.fingerprint,
    )


def _scored(
    outputs: MemberOutputs, rules: Mapping[str, Rule], tally: Tally, parameters: Mapping[str, int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    own = [parameters.get(name) for name in outputs.members]
    members = tables.scores(outputs.members, tally, own, start=0)
    members["abstained"] = tally.abstained[: len(own)]
    used = [tables.used_parameters(rule_for(rule, outputs.members), own) for rule in rules.values()]
    return members, tables.scores(list(rules), tally, used, start=len(own))


def _fitting(
    outputs: MemberOutputs,
    rules: Mapping[str, Rule],
    trained_on: Mapping[str, str],
    cross_fits: Mapping[str, CrossFit],
) -> pd.DataFrame:
    marks = [declared(rule).fingerprint for rule in rules.values()]
    return pd.DataFrame(
        {
            "fitted_here": np.array([mark == outputs.fingerprint for mark in marks], dtype=bool),
            "fitted_on_training": np.array([bool(_who_saw(mark, trained_on)) for mark in marks], dtype=bool),
            **{
                column: [getattr(cross_fits[name], column) if name in cross_fits else math.nan for name in rules]
                for column in ("optimism", "optimism_accuracy")
            },
        }
    )


def _notes(
    outputs: MemberOutputs,
    rules: Mapping[str, Rule],
    tally: Tally,
    baseline: str | None,
    single: str,
    trained_on: Mapping[str, str],
) -> Iterator[str]:
    if baseline is None:
        yield f"the best single member, {single}, was chosen on these frames: gains are understated"
    for name, rule in rules.items():
        fitted_on = declared(rule).fingerprint
        if fitted_on == outputs.fingerprint:
            yield f"rule {name} was fitted on these frames: its figures are optimistic"
        learnt = _who_saw(fitted_on, trained_on)
        if learnt:
            yield f"rule {name} was fitted on frames that {learnt} had been trained on: it trusts them too much"
    if learnt := _who_saw(outputs.fingerprint, trained_on):
        yield f"trained on these frames, so their figures are optimistic: {learnt}"
    for name, clipped in zip([*outputs.members, *rules], tally.clipped, strict=False):
        if clipped:
            yield f"{name} gives the true class less than 2^-52 on {clipped} frames, which count as 2^-52 in log_loss"
    for name, silent in zip(outputs.members, tally.abstained, strict=False):
        if silent:
            yield f"{name} abstains on {silent} frames: counted as wrong, with the loss of equal probabilities"
    if tally.recordings < 2:
        yield f"{tally.recordings} recording{'s' * (not tally.recordings)} cannot be resampled: there are no intervals"
    elif tally.recordings < _FEW:
        yield f"{tally.recordings} recordings are few to resample: intervals are too narrow"
    elif tally.recordings == tally.frames:
        yield "every frame is its own recording: if neighbours are alike, intervals are too narrow"


def _who_saw(fingerprint: str, trained_on: Mapping[str, str]) -> str:
    return ", ".join(name for name, frames in trained_on.items() if fingerprint and frames == fingerprint)
