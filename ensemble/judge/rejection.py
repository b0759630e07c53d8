"""When should one not trust it? Risk against coverage, for every score that frames could be rejected by.

`REJECTION_SCORES` holds the scores, each one decorated function of what is known of a frame before its label: the more,
the more the prediction is trusted. Rejecting the frames of least score leaves a share of the frames, the coverage, and
the fraction of wrong predictions among these, the risk. Frames of equal score are accepted together, so the order of
the frames does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensemble.judge.diversity import uncertainty
from ensemble.judge.significance import cluster_bootstrap, percentile_ends, piles, resampling
from ensemble.judge.tables import provenance
from ensemble.outputs import MemberOutputs, expect_outputs
from ensemble.outputs.arrays import numbers
from ensemble.rules.fitted import combined, rule_for
from ensemble.rules.table import FittedRule, Rule, enter, no_such

if TYPE_CHECKING:
    from ensemble.judge.plots import Axes

Floats = NDArray[np.float64]

_AREAS = ("aurc", "augrc", "coverage")
_STEPS, _CELLS = 512, 2**22  # steps of a curve that is resampled, at most; numbers of frames by recording and step
_ROWS = 256  # resampled curves measured at once

_F = TypeVar("_F", bound="Callable[[Evidence], Tensor]")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of B frames before their labels."""

    rows: Tensor  #: (B, C) distributions of the rule; equal probabilities where all members abstain
    members: Tensor  #: (M, B, C) of the members that can influence the rule; a row with NaN where one abstains

    @property
    def guesses(self) -> NDArray[np.intp]:
        """(B,) the predicted class, the first of equal ones."""
        return np.asarray(self.rows.numpy().argmax(axis=1))


REJECTION_SCORES: dict[str, Callable[[Evidence], Tensor]] = {}


def rejection_score(function: _F) -> _F:
    """Enter a function from `Evidence` to (B,) numbers into `REJECTION_SCORES` under its own name.

    The higher the number, the more a prediction is trusted; a frame with NaN is rejected first.

    Raises:
        ValueError: another function has that name already.
    """
    enter(function, function, REJECTION_SCORES, what="score")
    return function


@rejection_score
def confidence(evidence: Evidence) -> Tensor:
    """The probability of the predicted class."""
    return evidence.rows.amax(dim=1)


@rejection_score
def margin(evidence: Evidence) -> Tensor:
    """How far the probability of the predicted class is above the next one."""
    top = evidence.rows.topk(min(2, evidence.rows.shape[1]), dim=1).values
    return top[:, 0] - top[:, 1:].sum(dim=1)


@rejection_score
def entropy(evidence: Evidence) -> Tensor:
    """Minus the entropy of the rule's distribution, in nats."""
    nats: Tensor = torch.special.entr(evidence.rows.double()).sum(dim=1)
    return -nats


@rejection_score
def mutual_information(evidence: Evidence) -> Tensor:
    """Minus the mutual information of class and member, in nats: the members' disagreement (`uncertainty`)."""
    return -uncertainty(evidence.members).epistemic


@rejection_score
def vote_share(evidence: Evidence) -> Tensor:
    """The share of the members, of those that answer, whose top class is the predicted one."""
    answering = ~evidence.members.isnan().any(dim=-1)  # (M, B)
    votes = torch.from_numpy(evidence.members.numpy().argmax(axis=-1) == evidence.guesses)
    return (votes & answering).sum(dim=0) / answering.sum(dim=0)


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """The result of `risk_coverage`."""

    #: one row per score: name; aurc and augrc, areas of which less is better; coverage, the largest at which the risk
    #: is at most `risk`, 0 where there is none; behind, by how much augrc is above that of the best score; each with
    #: the ends of its 95 % interval, aurc_low, aurc_high, and so on, which are NaN for fewer than two recordings;
    #: threshold, the least score that is accepted at that coverage
    scores: pd.DataFrame
    #: points of each curve: name, threshold, coverage, risk, and generalised_risk, the fraction of all frames that are
    #: accepted and wrong; of curves with many steps about 512 of them
    curves: pd.DataFrame
    best: str  #: the score of least augrc on these frames; of equal ones the first
    risk: float  #: at which coverage was asked for
    error: float  #: the risk at full coverage, which no score changes
    frames: int  #: number of frames judged
    recordings: int  #: number of groups that they come from
    notes: tuple[str, ...]  #: what to keep in mind when reading the figures
    fingerprint: str  #: of the frames judged

    def figure(self, ax: Axes | None = None) -> Axes:
        """Draw the curves of all scores on these axes, or on new ones; needs the extra `report`."""
        from ensemble.judge import plots  # matplotlib belongs to an extra

        return plots.risk_coverage(self.curves, ax, scores=self.scores, risk=self.risk)

    def to_json(self) -> dict[str, Any]:
        """All of it but the curves as plain data; what is not a finite number becomes None."""
        known = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "curves"}
        table = self.scores.astype(object).where(self.scores.notna() & (self.scores != -np.inf), None)
        return known | {"scores": table.to_dict("records"), "notes": list(self.notes)}


def risk_coverage(
    outputs: MemberOutputs,
    rule: Rule,
    scores: str | Iterable[str] | None = None,
    *,
    risk: float = 0.05,
    replicates: int = 2000,
    seed: int = 0,
) -> RiskCoverage:
    """Judge the scores by which a rule's predictions could be rejected.

    With the frames in order of their score, all frames of one score are one step; A_k is the share of the frames that
    are accepted after step k, E_k the share that are accepted and wrong, and E_0 = A_0 = 0. Then

    - aurc = sum of (A_k - A_{k-1}) E_k / A_k: the risk, averaged over the frames as the last one to be accepted;
    - augrc = sum of (A_k - A_{k-1}) (E_k + E_{k-1}) / 2: the share of accepted mistakes, averaged over coverages. It is
      accuracy (1 - accuracy) (1 - AUROC) + (1 - accuracy)^2 / 2, with the AUROC of telling right predictions from
      wrong ones. Prefer it: aurc is ruled by the few frames of highest score;
    - coverage = the largest A_k with E_k / A_k <= `risk`.

    Intervals are percentiles over resampled recordings, each with its own curve; the same resamples serve all scores,
    so that their differences are paired. Resampled curves have at most 512 steps; the difference that this makes to
    the estimate is taken off.

    Args:
        outputs: of all members, with labels; read in blocks; memory grows by one number per score and frame.
        rule: what predicts; one that knows the names of its members is applied to those.
        scores: a name in `REJECTION_SCORES`, or several; all of them if None.
        risk: fraction of the accepted frames that may be wrong.
        replicates: resamples behind each interval.
        seed: of the resampling; equal seeds, equal intervals.

    Raises:
        ValueError: no labels or no frames; an unknown score, or none; a risk outside [0, 1); a score or a rule that
            does not return what it should.

    Example:
        >>> from ensemble import mean
        >>> p = [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.7, 0.3]]  # right, right, wrong, right
        >>> outputs = MemberOutputs.from_probabilities({"a": p}, labels=[0, 0, 0, 0])
        >>> risk_coverage(outputs, mean, ["confidence"]).scores[["aurc", "augrc", "coverage"]].values.tolist()
        [[0.0625, 0.03125, 0.75]]

    References:
        Geifman and El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017; Ding et al.,
        "Revisiting the evaluation of uncertainty estimation", CVPR Workshops 2020; Traub et al., "Overcoming common
        flaws in the evaluation of selective classification systems", NeurIPS 2024.
    """
    expect_outputs(outputs)
    aligned = rule_for(rule, outputs.members)
    names = [*REJECTION_SCORES] if scores is None else [scores] if isinstance(scores, str) else [*scores]
    if unknown := [name for name in names if name not in REJECTION_SCORES]:
        raise ValueError(no_such("score", unknown[0], REJECTION_SCORES))
    if not names or not 0 <= risk < 1:
        msg = f"expected names of scores, and a risk from 0 to below 1 such as 0.05, got {names} and {risk}"
        raise ValueError(msg)
    values, wrong = _scored(outputs, aligned, names)
    assert outputs.groups is not None  # filled in when made
    groups, recordings = piles(outputs.groups.numpy())
    sizes = np.bincount(groups).astype(np.float64)
    rows, drawn, points = [], [], []
    for name, own in zip(names, values, strict=True):
        curve = _Curve(own, wrong)
        few = curve.few(max(32, min(_STEPS, _CELLS // len(sizes))))
        means = cluster_bootstrap(curve.sums(few, groups), sizes, replicates=replicates, seed=seed)
        parts = [means[start : start + _ROWS] for start in range(0, replicates, _ROWS)]
        resampled = [_areas(np.cumsum(np.split(part, 2, axis=1), axis=2), risk) for part in parts]
        exact, coarse = _areas(curve.counts, risk), _areas(curve.counts[:, few], risk)
        rows.append({"name": name, **dict(zip(_AREAS, exact, strict=True)), "threshold": curve.threshold(risk)})
        drawn.append(np.concatenate(resampled, axis=1) + (exact - coarse)[:, None])
        points.append(curve.points(few, name))
    best = min(range(len(names)), key=lambda row: rows[row]["augrc"])
    return RiskCoverage(
        scores=_table(pd.DataFrame(rows), np.array(drawn), best),
        curves=pd.concat(points, ignore_index=True),
        best=names[best],
        risk=risk,
        error=float(wrong.mean()),
        frames=len(wrong),
        recordings=recordings,
        notes=(*provenance(outputs, {"the rule": aligned}), *resampling(recordings, len(wrong))),
        fingerprint=outputs.fingerprint,
    )


def _scored(
    outputs: MemberOutputs, rule: FittedRule, names: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(S, N) scores of every frame, -inf in place of NaN, and (N,) whether its prediction is wrong."""
    labels, frames = outputs.require_labels().numpy(), outputs.shape[1]
    if frames == 0:
        msg = "expected frames to judge scores on, got none"
        raise ValueError(msg)
    members = slice(None) if rule.used is None else list(rule.used)
    values, wrong = np.empty((len(names), frames), np.float32), np.empty(frames, np.bool_)
    for where, probabilities, rows in combined(rule, outputs):
        evidence = Evidence(rows, probabilities[members])
        wrong[where] = evidence.guesses != labels[where]
        for row, name in zip(values, names, strict=True):
            found = numbers(REJECTION_SCORES[name](evidence), f"scores {name!r}")
            if found.shape != rows.shape[:1]:
                msg = f"expected scores {name!r} of shape {tuple(rows.shape[:1])}, got {tuple(found.shape)}"
                raise ValueError(msg)
            row[where] = found.masked_fill(found.isnan(), -torch.inf).numpy()
    return values, wrong


class _Curve:
    """Steps of frames of equal score, from the most trusted down."""

    def __init__(self, scores: NDArray[np.float32], wrong: NDArray[np.bool_]) -> None:
        self.order = np.argsort(-scores, kind="stable")  # (N,)
        self.wrong, ranked = wrong[self.order], scores[self.order]
        last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # (K,) frame of each step
        self.counts = np.stack([last + 1, np.cumsum(self.wrong)[last]])  # (2, K) frames accepted, and wrong
        self.thresholds = ranked[last]

    def few(self, most: int) -> NDArray[np.intp]:
        """At most so many of the steps, the last one among them, at about equal distances in coverage."""
        accepted, frames = self.counts[0], len(self.order)
        if len(accepted) <= most:
            return np.arange(len(accepted))
        return np.unique(np.searchsorted(accepted, np.linspace(frames / most, frames, most)))

    def sums(self, few: NDArray[np.intp], groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """(G, 2 K) frames by recording and step of a few, then the wrong ones among them."""
        steps = len(few)
        cells = groups[self.order] * steps + np.repeat(np.arange(steps), np.diff(self.counts[0, few], prepend=0))
        size = (int(groups.max()) + 1) * steps
        tables = [np.bincount(own, minlength=size).reshape(-1, steps) for own in (cells, cells[self.wrong])]
        return np.concatenate(tables, axis=1)

    def threshold(self, risk: float) -> float:
        """The least score that is accepted at the largest coverage of at most this risk; NaN where there is none."""
        steps = np.flatnonzero(self.counts[1] / self.counts[0] <= risk)
        return float(self.thresholds[steps[-1]]) if len(steps) else math.nan

    def points(self, few: NDArray[np.intp], name: str) -> pd.DataFrame:
        """Rows of `RiskCoverage.curves`."""
        (accepted, errors), frames = self.counts[:, few], len(self.order)
        columns = {"coverage": accepted / frames, "risk": errors / accepted, "generalised_risk": errors / frames}
        return pd.DataFrame({"name": name, "threshold": self.thresholds[few], **columns})


def _areas(counts: NDArray[Any], risk: float) -> Floats:
    """(3, ...) aurc, augrc and coverage, from (2, ..., K) frames that are accepted, and wrong, after each step."""
    (accepted, errors), whole = counts, counts[0, ..., -1]
    rate = errors / np.where(accepted == 0, 1, accepted)
    step = np.diff(accepted, prepend=0)
    aurc = (step * rate).sum(axis=-1) / whole
    augrc = (step * (errors - np.diff(errors, prepend=0) / 2)).sum(axis=-1) / whole**2
    return np.stack([aurc, augrc, np.where(rate <= risk, accepted, 0).max(axis=-1) / whole])


def _table(table: pd.DataFrame, drawn: Floats, best: int) -> pd.DataFrame:
    """The scores' rows with the ends of the intervals of each area, from (S, 3, R) resampled ones."""
    table["behind"] = table["augrc"] - table["augrc"][best]
    differences = drawn[:, 1] - drawn[best, 1]
    columns = ["name"]
    for name, resampled in zip((*_AREAS, "behind"), (*drawn.swapaxes(0, 1), differences), strict=True):
        table[f"{name}_low"], table[f"{name}_high"] = percentile_ends(resampled.T)
        columns += [name, f"{name}_low", f"{name}_high"]
    return table[[*columns, "threshold"]]
