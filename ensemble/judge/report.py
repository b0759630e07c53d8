"""`evaluate`: how good are members and rules, and is the gain real? `choose`: which rule is good and simple enough?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ensemble.judge import tables
from ensemble.judge.excerpt import Excerpt
from ensemble.judge.metrics import METRICS, get_metric
from ensemble.judge.significance import CrossFit, resampling
from ensemble.judge.tables import Tally
from ensemble.outputs import Cost, MemberOutputs, expect_outputs
from ensemble.rules.fitted import WeightedMean
from ensemble.rules.table import FittedRule, Rule, no_such
from zoo._notebook import Table, html

if TYPE_CHECKING:
    from ensemble.judge.plots import Axes

#: heading in a notebook -> column of a report's tables, where some row has it; and the form of its numbers
_SHOWN = {
    "calibration error": "calibration_error",
    "parameters": "parameters",
    "bytes": "bytes",
    "microseconds per frame": "microseconds",
    "bytes in memory": "memory",
}
_SHOWN_AS = {
    "calibration error": ".2%",
    "parameters": ",d",
    "bytes": ",d",
    "microseconds per frame": ".2f",
    "bytes in memory": ",d",
}


@dataclass(frozen=True, eq=False)
class Report:
    """The result of `evaluate`."""

    #: one row per member: name, accuracy, log_loss (nats; a probability of the true class below 2^-52 counts as 2^-52,
    #: and a note gives the number of such frames), brier (0 to 2), calibration_error (of the top class, 15 bins of
    #: equal width), macro_f1 (over classes that occur, on frames with an answer), further metrics of `METRICS`,
    #: parameters, bytes (of its weights), microseconds (per frame) and memory (bytes), both missing without `costs`,
    #: abstained (frames); then gain over the baseline in `metric` with its ends, as for rules
    members: pd.DataFrame
    #: the same per rule, then gain over the baseline in `metric`, positive where the rule is better, with gain_low and
    #: gain_high, the ends of its 95 % interval, NaN for fewer than two recordings; mean_gain over the uniform mean, and
    #: loss_gain (the baseline's
    #: log-loss minus the rule's), each with its ends; fitted_here: whether it was fitted on these frames;
    #: fitted_on_training: whether it was fitted on frames that a member was trained on; optimism: its log-loss in nats
    #: on recordings left out of the fit minus that on its own fitting frames, and optimism_accuracy how much less
    #: accurate it is there, both NaN without `cross_fits`
    rules: pd.DataFrame
    pairs: pd.DataFrame  #: one row per pair of members: first, second, and every pairwise measure of `diversity`
    #: one row per class: frames, accuracy of the baseline and of the best rule, the class that the rule takes it for
    #: most often, the member of highest F1 on it (trust), and the fraction of its frames on which some member is right
    #: (oracle)
    classes: pd.DataFrame
    #: per class, the three classes that the best rule takes it for most often, how often (frames, and share of the
    #: class's own), and the baseline's share of the same mistake
    confusions: pd.DataFrame
    reliability: pd.DataFrame  #: per member and rule, the bins behind calibration_error
    baseline: str  #: the best single member, or the one named
    best: str | None  #: the best rule by `metric`, by log-loss (or accuracy) where equal; None where there are none
    frames: int  #: number of frames judged
    recordings: int  #: number of groups that they come from
    oracle: float  #: fraction of the frames where some member is right: no choice among members beats it
    tie_rate: float  #: fraction of the frames where the members' votes tie for first place
    seconds: float  #: duration of the pass over the frames
    notes: tuple[str, ...]  #: what to keep in mind when reading the figures
    fingerprint: str  #: of the frames judged
    metric: str  #: what the baseline and the best rule are chosen by, and gains are of
    #: (M + R, C, C) frames with an answer, of every member, then of every rule, by true and by predicted class
    confusion: NDArray[np.int64]
    weights: dict[str, dict[str, float]]  #: each rule that is a weighted mean -> member -> weight
    sample: Excerpt  #: some frames of every recording
    whole: Excerpt  #: some whole recordings

    @property
    def frames_per_second(self) -> float:
        """Frames judged per second, all members and rules together."""
        return self.frames / self.seconds if self.seconds else math.nan

    @property
    def conclusion(self) -> str:
        """One sentence: whether these frames show that the best rule is better than the best single member."""
        if self.best is None or not self.frames:
            return "No rule was judged, or there were no frames to judge it on."
        row, metric = self.rules.set_index("name").loc[self.best], get_metric(self.metric)
        points = metric.unit == "%"
        gain, low, high = (
            f"{100 * row[column]:+.2f}" if points else f"{row[column]:+.4f}"
            for column in ("gain", "gain_low", "gain_high")
        )
        interval = f"95 % interval from {low} to {high}"
        if self.recordings < 2:
            interval = "no interval, because there is only one recording"
        best = f"{self.best}, the best of {len(self.rules)} rules here," if len(self.rules) > 1 else self.best
        answer = "Better" if row["gain_low"] > 0 else "Worse" if row["gain_high"] < 0 else "Not shown to be better"
        return f"{answer}. {best} against {self.baseline}: {gain} {metric.amount}, {interval}."

    def figure(self, name: str, ax: Axes | None = None, *, of: str | Iterable[str] | None = None) -> Axes:
        """Draw one of the report's figures; needs matplotlib, which comes with the extra `report`.

        Args:
            name: "gains": of each rule, with their intervals. "reliability": accuracy against confidence.
                "disagreement": of each pair of members, as a coloured table. "map": the same as distances on a
                map of the members. "classes": the accuracy on each, before and after. "confusion":
                what each class is taken for by the best rule.
            ax: matplotlib axes to draw on; new ones if None.
            of: for "reliability", the members and rules to draw, or one of them; the baseline and the best rule if
                None.

        Returns:
            The axes, which show themselves in a notebook; `ax.figure.savefig("gains.png")` writes a file.

        Raises:
            ValueError: there is no such figure, member or rule.
            TypeError: `ax` is no axes.
            ImportError: matplotlib is not installed.
        """
        from ensemble.judge import plots  # matplotlib belongs to an extra

        names, rules = self.members["name"].tolist(), self.rules["name"].tolist()
        best = self.best or self.baseline
        drawn = [*dict.fromkeys((self.baseline, best))] if of is None else [of] if isinstance(of, str) else [*of]
        for each in drawn:
            if each not in (known := [*names, *rules]):
                raise ValueError(no_such("member or rule", each, known))
        counts = self.confusion[len(names) + rules.index(best) if self.best else names.index(best)]
        figures: dict[str, Callable[[], Axes]] = {
            "gains": lambda: plots.gains(self.rules, ax, baseline=self.baseline, metric=get_metric(self.metric)),
            "reliability": lambda: plots.reliability(self.reliability, ax, names=drawn),
            "disagreement": lambda: plots.disagreement(self.pairs, ax, names=names),
            "map": lambda: plots.member_map(self.pairs, ax, members=self.members),
            "classes": lambda: plots.classes(self.classes, ax, baseline=self.baseline, best=best),
            "confusion": lambda: plots.confusion(counts, ax, names=self.classes["name"].tolist(), judged=best),
        }
        if name not in figures:
            raise ValueError(no_such("figure", name, figures))
        return figures[name]()

    def page(self, *, title: str = "Is the ensemble better?") -> str:
        """The report as HTML text to explore, one file that needs nothing else; needs the extra `report`."""
        from ensemble.judge.page import page  # jinja2 belongs to an extra

        return page(self, title=title)

    @property
    def _judged(self) -> str:
        """What was judged, in words."""
        return (
            f"{self.frames:,} frames of {self.recordings:,} recordings, {len(self.members)} members; votes tie on "
            f"{self.tie_rate:.2%} of the frames, some member is right on {self.oracle:.2%}"
        )

    def __repr__(self) -> str:
        shown = self.rules[["name", "accuracy", "log_loss", "gain", "gain_low", "gain_high"]].head(20).round(4)
        rules = f"\n{shown.to_string(index=False)}" if len(shown) else ""
        notes = "".join(f"\nnote: {note}" for note in self.notes[:5])
        more = f"\nand {len(self.notes) - 5} more notes" if len(self.notes) > 5 else ""
        return f"Report: {self.conclusion}{rules}\n{self._judged}{notes}{more}"

    def _repr_html_(self) -> str:
        metric = get_metric(self.metric)
        scale, form = (100, "+.2f") if metric.unit == "%" else (1, "+.4f")

        def shown(table: pd.DataFrame, title: str) -> Table:
            columns = {each.title: name for name, each in METRICS.items()} | _SHOWN
            columns = {head: name for head, name in columns.items() if table[name].notna().any()}
            formats = {each.title: ".2%" if each.unit == "%" else ".4f" for each in METRICS.values()}
            rows: list[dict[str, Any]] = []
            for row in table.to_dict("records"):
                gain, low, high = (scale * row[name] for name in ("gain", "gain_low", "gain_high"))
                interval = None if pd.isna(low) else f"{low:{form}} to {high:{form}}"
                cells = {head: None if pd.isna(row[name]) else row[name] for head, name in columns.items()}
                rows.append({title: row["name"], "gain": gain, "95 % interval": interval} | cells)
            return Table(rows, formats=formats | _SHOWN_AS | {"gain": form})

        gains = f"Gains are {metric.amount} over {self.baseline}."
        hint = "report.page() is the whole report to explore, report.figure(name) one of its figures."
        tables = [shown(self.rules, "rule"), shown(self.members, "member")]
        return html(self.conclusion, [self._judged, gains, hint], tables, self.notes)

    def to_json(self) -> dict[str, Any]:
        """The report's tables and figures as plain data; what is not a finite number becomes None."""
        kept = ("confusion", "weights", "sample", "whole")
        names = [field.name for field in fields(self) if field.name not in kept]
        return {name: _plain(getattr(self, name)) for name in (*names, "frames_per_second")}


def _plain(value: Any) -> Any:
    """Tables as rows by column, numbers of NumPy as Python's, and None for what is missing or not finite."""
    if isinstance(value, pd.DataFrame):
        return [{str(key): _plain(cell) for key, cell in row.items()} for row in value.to_dict("records")]
    if isinstance(value, tuple):
        return list(value)
    value = value.item() if isinstance(value, np.generic) else value
    return None if pd.isna(value) or value in (math.inf, -math.inf) else value


def evaluate(
    outputs: MemberOutputs | Tally,
    rules: Mapping[str, Rule],
    *,
    metric: str = "accuracy",
    baseline: str | None = None,
    parameters: Mapping[str, int] | None = None,
    costs: Mapping[str, Cost] | None = None,
    cross_fits: Mapping[str, CrossFit] | None = None,
    replicates: int = 2000,
    seed: int = 0,
) -> Report:
    """Judge members and rules on frames whose true classes are known.

    The report's notes point out figures that are better than they should be: of a rule judged on the frames that it
    was fitted on, of a member judged on its training frames, of a rule fitted on a member's training frames. Frames are
    recognised by their fingerprint, that is, as a whole: overlaps are not noticed.

    Args:
        outputs: of all members, with labels; read in blocks; intervals resample its groups. Or the `tally` of such
            outputs by the same rules and metric, for instance merged from tallies of their parts.
        rules: name in the report -> rule. One that knows the names of its members is applied to those, in any order.
        metric: what gains are of, a name in `METRICS`: "accuracy", "log_loss", "brier", "macro_f1". Intervals are
            percentiles over resampled recordings, for macro F1 too, which is computed anew from the counts of each
            resample (Field and Welsh, "Bootstrapping clustered data", JRSS B 69(3), 2007).
        baseline: the member that gains are measured against, chosen on other frames. If None, the best by the metric
            on these frames, which makes gains look smaller than they are; a note says so.
        parameters: member -> number of parameters, in place of those in `outputs.about`.
        costs: member or rule -> what running it costs, as `ensemble.run.measure_costs` measured it.
        cross_fits: fitted rule -> what `cross_fit` found on its fitting frames, for the two columns of optimism.
        replicates: resamples behind each interval.
        seed: of the resampling; equal seeds, equal intervals.

    Raises:
        ValueError: no labels; an unknown metric or baseline; a rule that needs a member that is not there, or whose
            rows are not distributions; a tally of other rules, for another metric or of a part of the frames.

    Example:
        >>> from ensemble import mean
        >>> p = [[0.9, 0.1], [0.2, 0.8]]
        >>> outputs = MemberOutputs.from_probabilities({"a": p, "b": p}, labels=[0, 1])
        >>> evaluate(outputs, {"mean": mean}).rules[["name", "accuracy", "gain"]].values.tolist()
        [['mean', 1.0, 0.0]]
    """
    if not isinstance(outputs, Tally):
        expect_outputs(outputs)
    tables.expect_rules(rules)
    judged, known = get_metric(metric), cross_fits or {}
    names = list((outputs.of if isinstance(outputs, Tally) else outputs).members)
    if baseline is not None and baseline not in names:
        msg = f"expected the baseline among the members {names}, got {baseline!r}"
        raise ValueError(msg)
    M = len(names)
    sums = _whole(outputs, rules, metric) if isinstance(outputs, Tally) else tables.tally(outputs, rules, judged)
    of, numbers = sums.of, tables.aligned(rules, names)
    single = tables.best(sums, range(M)) if baseline is None else names.index(baseline)
    best = tables.best(sums, range(M, M + len(rules))) if rules else None
    scores = tables.scores(sums, numbers.values(), parameters or {}, costs or {})
    gains = tables.gains(sums, range(M, M + len(rules)), baseline=single, replicates=replicates, seed=seed)
    behind = tables.gains(sums, range(M), baseline=single, replicates=replicates, seed=seed)
    own = scores[M:].drop(columns="abstained").reset_index(drop=True)
    classes, confusions = tables.by_class(sums, baseline=single, judged=single if best is None else best)
    sample, whole = sums.excerpts
    return Report(
        members=pd.concat([scores[:M], behind[["gain", "gain_low", "gain_high"]]], axis=1),
        rules=pd.concat([own, gains], axis=1).assign(
            fitted_here=[of.fingerprint in rule.fingerprints for rule in numbers.values()],
            fitted_on_training=[bool(tables.trained_on(rule.fingerprints, of)) for rule in numbers.values()],
            optimism=[known[name].optimism if name in known else math.nan for name in rules],
            optimism_accuracy=[known[name].optimism_accuracy if name in known else math.nan for name in rules],
        ),
        pairs=tables.pairs(names, sums.joint),
        classes=classes,
        confusions=confusions,
        reliability=tables.reliability(sums),
        baseline=names[single],
        best=None if best is None else list(rules)[best - M],
        frames=sums.frames,
        recordings=of.recordings,
        oracle=float(sums.some_right.sum() / sums.whole),
        tie_rate=float(sums.ties / sums.whole),
        seconds=sums.seconds,
        notes=tuple(_notes(sums, numbers, chosen=names[single] if baseline is None else "")),
        fingerprint=of.fingerprint,
        metric=metric,
        confusion=sums.confusion[: M + len(rules)],
        weights=tables.linear_weights(names, numbers),
        sample=sample,
        whole=whole,
    )


def _whole(sums: Tally, rules: Mapping[str, Rule], metric: str) -> Tally:
    """A tally that was given, if it is of all frames, and of these rules and this metric."""
    if (sums.of.rules, sums.of.metric) != (tuple(rules), metric):
        came = f"the rules {[*sums.of.rules]} and {sums.of.metric}"
        msg = f"expected a tally of the rules {[*rules]} and for the metric {metric}, got one of {came}"
        raise ValueError(msg)
    if sums.frames != sums.of.frames:
        msg = f"expected a tally of all {sums.of.frames:,} frames, got one of {sums.frames:,}; merge those of all parts"
        raise ValueError(msg)
    return sums


def _notes(sums: Tally, rules: Mapping[str, FittedRule], *, chosen: str) -> Iterator[str]:
    """What makes figures too good or too bad, what they rest on, and whether intervals can be trusted.

    `chosen` is the baseline that was chosen on these frames, "" where it was given.
    """
    of = sums.of
    if chosen:
        yield f"the best single member, {chosen}, was chosen on these frames: gains are understated"
    yield from tables.provenance(of, {f"rule {name}": rule for name, rule in rules.items()})
    for name, clipped in zip([*of.members, *of.rules], sums.clipped, strict=False):
        if clipped:
            yield f"{name} gives the true class less than 2^-52 on {clipped} frames, which count as 2^-52 in log_loss"
    for name, abstained in zip(of.members, sums.abstained, strict=False):
        if abstained:
            yield f"{name} abstains on {abstained} frames: counted as wrong, with the loss of equal probabilities"
    yield from resampling(of.recordings, sums.frames)


@dataclass(frozen=True)
class Choice:
    """What `choose` chose, and how the candidates compare."""

    name: str  #: of the rule, or of the single member
    rule: Rule  #: for a single member, the `WeightedMean` that gives it all the weight
    behind: dict[str, float]  #: each candidate's distance from the best on these frames, in the metric
    error: dict[str, float]  #: standard error of that distance over recordings; NaN for fewer than two


def choose(
    outputs: MemberOutputs,
    rules: Mapping[str, Rule],
    *,
    by: str = "accuracy",
    replicates: int = 1000,
    seed: int = 0,
) -> Choice:
    """The first candidate within one standard error of the best: a single member before any rule.

    The distance from the best is paired frame by frame and resampled over recordings, so that candidates which
    mostly agree are compared by the frames where they differ. On a single recording, whose spread is unknown, the best
    single member is chosen. The rule of one standard error is from Breiman et al., "Classification and regression
    trees", 1984, section 3.4.3.

    Args:
        outputs: with labels, of frames that no rule was fitted on; otherwise fitted rules look better than they are.
        rules: name -> rule, in order of preference, from simple to elaborate.
        by: the metric to compare by, a name in `METRICS`.
        replicates: number of resamples behind the standard errors.
        seed: of the resampling.

    Raises:
        ValueError: no labels, no frames, an unknown metric, or a rule with the name of a member.

    Example:
        >>> from ensemble import mean
        >>> p, q = [[0.9, 0.1], [0.2, 0.8]], [[0.8, 0.2], [0.4, 0.6]]
        >>> outputs = MemberOutputs.from_probabilities({"a": p, "b": q}, labels=[0, 1])
        >>> choose(outputs, {"mean": mean}).name  # both members are always right: no rule is needed
        'a'
    """
    expect_outputs(outputs)
    tables.expect_rules(rules)
    metric = get_metric(by)
    if taken := [name for name in rules if name in outputs.members]:
        msg = f"expected names for rules that no member has, got {taken}; the best member is a candidate already"
        raise ValueError(msg)
    sums, members = tables.tally(outputs, rules, metric), len(outputs.members)
    if sums.frames == 0:
        msg = "expected frames to choose on, got none"
        raise ValueError(msg)
    single = tables.best(sums, range(members))
    candidates = np.array([single, *range(members, members + len(rules))])
    values = metric.goods(sums.values(metric)[candidates])
    top = int(values.argmax())
    resampled = sums.resampled([metric], candidates, replicates=replicates, seed=seed)[0]
    behind, error = values[top] - values, (resampled[:, [top]] - resampled).std(axis=0)
    chosen = int(np.argmax(~(behind > error)))  # the single member where the errors are NaN
    alone = WeightedMean(np.eye(members)[single], outputs.fingerprint, members=outputs.members)
    names = [outputs.members[single], *rules]
    return Choice(
        names[chosen],
        [alone, *rules.values()][chosen],
        dict(zip(names, behind.tolist(), strict=True)),
        dict(zip(names, error.tolist(), strict=True)),
    )
