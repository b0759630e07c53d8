"""Commands that judge: evaluate, compare, diversity."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ensemble
from ensemble.cli.options import Collection, Source, applied, named_rules, recordings, require_coverage, require_rules
from zoo import _files
from zoo._console import Answer, Table, progress
from zoo.cli.options import Names, require_writable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FORMATS = {"accuracy": ".4f", "log_loss": ".4f", "calibration_error": ".4f", "macro_f1": ".4f", "parameters": ",.0f"}
_COSTS = {"bytes": ",.0f", "microseconds": ".2f", "memory": ",.0f"}
#: rule -> what its weights are fitted for
_OBJECTIVES = {"weighted": "log_loss"} | {f"weighted_{name}": name for name in ("accuracy", "brier", "macro_f1")}
_RULES = ("majority", "maximum", "mean", "weighted")


def evaluate(
    *,
    source: Source = Source(),
    rules: Names = _RULES,
    metric: str = "accuracy",
    costs: bool = False,
    sets: float | None = None,
    report: Path | None = None,
) -> Answer:
    """Fit rules on one partition, judge members and rules on another, and print one table.

    The gain of a rule is how much better it is than the best single member, which is chosen on the validation frames;
    its 95 % interval resamples whole recordings. A saved ensemble among the members is judged by its own rule too.

    Example: ensemble evaluate --corpus my-corpus --valid dev --test test --members "cyl*" "diamond*"

    Args:
        rules: names of rules: majority, maximum, minimum, mean, median, product, borda, log_mean, power_mean,
            trimmed_mean, or one of your own. Fitted on the validation frames are "weighted", the weighted mean of
            least log-loss; "weighted_accuracy", "weighted_brier" and "weighted_macro_f1", with weights for these;
            "calibrated", "weighted" with a temperature; "log_pool"; "bayes_vote"; "stacked"; "cascade", "weighted" of
            no more members than each frame needs; and "auto", the simplest of the rules that are about as good as the
            best.
        metric: what gains are of and the best single member is chosen by: accuracy, log_loss, brier, macro_f1.
        costs: also measure what each member, and each rule with its members, costs on this machine: microseconds per
            frame, bytes of memory while it runs.
        sets: also judge sets of the possible classes, made by the best rule and fitted on the validation frames to hold
            the true class for this fraction of a new recording's frames, such as 0.9.
        report: HTML file for the whole report as one page (needs the extra `report`).
    """
    if report is not None:
        require_writable(report)
    require_coverage(sets)
    ensemble.judge.get_metric(metric)
    collection = Collection(source)
    known = collection.ensembles(source.members)
    if strange := [name for name in collection.ensembles(rules) if name not in known]:
        msg = f"expected saved ensembles among the members, got {strange} as rules; give --members {' '.join(strange)}"
        raise ValueError(msg)
    require_rules(rules, known)
    if sets is not None and not (rules or known):
        raise ValueError("expected a rule that makes the sets beside --sets, got none; name one with --rules")
    if costs:
        collection.require_measurable("--costs")
    valid, judging = collection.fitting_and_judging()
    saved = collection.saved_rules(source.members, valid)
    with progress("fitting rules"):
        chosen = named_rules(rules, valid, others=[*saved]) | saved
        best = ensemble.judge.best_member(valid, metric)
        crossed = cross_fits(rules, valid)
    seen, test = judging(chosen, metric)
    found = collection.costs(chosen) if costs else None
    with progress("judging rules"):
        result = ensemble.evaluate(seen, chosen, metric=metric, baseline=best, costs=found, cross_fits=crossed)
        doubts = {}
        if result.best is not None and result.frames:
            doubts["rejection"] = rejection(result.best, chosen[result.best], test)
        if result.best is not None and sets is not None:
            doubts["sets"] = prediction_sets(result.best, chosen[result.best], valid, test, sets, said=result.notes)
    if report is not None:
        _files.write(report, result.page().encode())
    weights = weights_in(chosen, test)
    data = result.to_json() | {"weights": weights, "collect_seconds": collection.seconds}
    data |= {key: judged.data for key, judged in doubts.items()}
    where = f"fitted on {collection.fitted}, judged on {collection.judged}"
    shown: list[Table | str] = [
        _table(result, source.valid, costs=costs),
        *_remarks(result, weights, collection.seconds),
        *(line for judged in doubts.values() for line in judged.shown),
    ]
    usual = (collection.fitted, collection.judged) == (repr(source.valid), repr(source.test))
    if doubts and seen is not test:
        where += f", but for {' and '.join(doubts)}: on a sample of {test.shape[1]:,} frames"
    return Answer(data, shown if usual and seen is test else [*shown, where])


def compare(first: str, second: str, /, *, source: Source = Source()) -> Answer:
    """Is the first better than the second? Each is a member, a saved ensemble, or a rule over all members.

    The exit code is 0 if the 95 % interval of the difference lies above zero, otherwise 1: the answer is no. A single
    recording has no interval, so the answer is no.

    Example: ensemble compare mean cylinder-a --members "cyl*"

    Args:
        first: a member, an ensemble or a rule.
        second: a member, an ensemble or a rule.
    """
    source.refuse("sample", where="for `compare`, which needs the outputs on all frames")
    collection = Collection(source)
    require_rules((first, second), [*collection.names, *collection.ensembles((first, second))])
    valid, test = collection.both()
    saved = collection.saved_rules((first, second), test)
    rules = saved | named_rules((first, second), valid, others=(*test.members, *saved))
    right = [_right(name, rules, test) for name in (first, second)]
    gain = ensemble.judge.bootstrap_interval(right[0].astype(float) - right[1], recordings(test))
    table = ensemble.judge.right_and_wrong(right[0], right[1])
    data = {
        "first": first,
        "second": second,
        "first_accuracy": float(right[0].mean()),
        "second_accuracy": float(right[1].mean()),
        "gain": gain.estimate,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "only_first_right": int(table[0, 1]),
        "only_second_right": int(table[1, 0]),
        "mcnemar_p": ensemble.judge.mcnemar(table).p_value,
    }
    shown: list[Table | str] = [
        Table([{"": key.replace("_", " "), "value": value} for key, value in data.items()]),
        f"\n95 % interval of the gain, resampling recordings: {interval(gain.low, gain.high)}",
        "McNemar's test treats frames as independent, which they are not.",
    ]
    return Answer(data, shown, code=0 if gain.low > 0 else 1)


def diversity(*, source: Source = Source()) -> Answer:
    """Show how the members differ on the test partition: each pair, all together, and what each contributes.

    Example: ensemble diversity --members "cyl*" "diamond*"
    """
    from ensemble.judge import diversity as measures

    source.refuse("sample", where="for `diversity`, which needs the outputs on all frames")
    outputs = Collection(source).shown()
    names, right = outputs.members, measures.correct(outputs)
    joint, crowd = measures.Joint.of(right), measures.crowd_histogram(right)
    tables = {name: measure(joint) for name, measure in measures.PAIR_MEASURES.items()}
    pairs = [
        {"first": names[i], "second": names[j], **{name: float(table[i, j]) for name, table in tables.items()}}
        for i in range(len(names))
        for j in range(i + 1, len(names))
    ]
    loss = measures.log_loss_split(outputs)
    whole = {name: measure(crowd) for name, measure in measures.CROWD_MEASURES.items()}
    whole |= {"members' mean log-loss": loss.members, "diversity (nats)": loss.diversity}
    with progress("measuring contributions"):
        shares = ensemble.selection.contributions(outputs)
    members = [
        {"member": name, "leave_one_out": float(alone), "shapley": float(value)}
        for name, alone, value in zip(names, shares.leave_one_out, shares.shapley, strict=True)
    ]
    unsolved = dict(zip(outputs.classes, measures.unsolved(outputs).tolist(), strict=True))
    hardest = sorted(unsolved.items(), key=lambda item: -item[1])[:8]
    gains = {"leave_one_out": "+.5f", "shapley": "+.5f"}
    shown: list[Table | str] = [
        Table(pairs, "pairs", dict.fromkeys(tables, ".4f")),
        Table([{"measure": name, "value": value} for name, value in whole.items()], "\nall members", {"value": ".4f"}),
        Table(members, "\nreduction of the mean's log-loss by each member, in nats", gains),
        "\nframes on which every member is wrong: " + ", ".join(f"{name} {count}" for name, count in hardest),
    ]
    return Answer({"pairs": pairs, "whole": whole, "members": members, "unsolved": unsolved}, shown)


def cross_fits(rules: Names, valid: ensemble.MemberOutputs) -> dict[str, ensemble.judge.CrossFit]:
    """For the weighted means, their results on recordings left out of the fit."""
    found = {name: cross_fit(valid, _OBJECTIVES[name]) for name in rules if name in _OBJECTIVES}
    return {name: result for name, result in found.items() if result is not None}


def cross_fit(valid: ensemble.MemberOutputs, objective: str) -> ensemble.judge.CrossFit | None:
    """The results of weights on recordings left out of the fit; None on a single recording."""
    count = len(set(recordings(valid).tolist()))
    return None if count < 2 else ensemble.fit.cross_fit(valid, folds=min(5, count), objective=objective)


def rejection(name: str, rule: ensemble.Rule, test: ensemble.MemberOutputs) -> Answer:
    """How many frames can be kept at a risk of 5 % by the score that tells best which to reject."""
    found = ensemble.judge.risk_coverage(test, rule)
    row = next(row for row in found.to_json()["scores"] if row["name"] == found.best)
    ends = interval(row["coverage_low"], row["coverage_high"], ".1%")
    line = (
        f"{name}: at most {found.risk:.0%} of its answers are wrong on the {row['coverage']:.1%} of the frames ({ends})"
        f" that {found.best.replace('_', ' ')} trusts most, the best of {len(found.scores)} scores to reject frames by"
    )
    if not row["coverage"]:
        line = (
            f"{name}: none of {len(found.scores)} scores to reject frames by leaves a risk of at most {found.risk:.0%}"
        )
    return Answer({"rule": name} | found.to_json(), [line])


def prediction_sets(
    name: str,
    rule: ensemble.Rule,
    valid: ensemble.MemberOutputs,
    test: ensemble.MemberOutputs,
    coverage: float,
    *,
    said: Container[str],
) -> Answer:
    """How often sets of the possible classes, fitted on some frames, hold the true class on others.

    Notes that were `said` are not repeated.
    """
    fitted = ensemble.fit.fit_prediction_sets(valid, rule, coverage)
    found = fitted.judge(test)
    intervals = {key: vars(getattr(found, key)) for key in ("recordings", "frames", "size")}
    data = {"rule": name, "asked": coverage, "threshold": fitted.threshold, "fitted_on": fitted.recordings}
    data |= intervals | {"empty": found.empty, "single": found.single, "classes": found.classes.to_dict("records")}
    notes = [*dict.fromkeys((*fitted.notes, *found.notes))]
    data["notes"] = notes
    least = found.classes.dropna().nsmallest(3, "coverage")
    worst = ", ".join(f"{own} {share:.1%} of {frames:,}" for own, frames, share, _ in least.itertuples(index=False))
    mean = found.recordings
    line = (
        f"{name}: sets to cover {coverage:g} hold the true class on {mean.estimate:.1%} of a recording's frames "
        f"({interval(mean.low, mean.high, '.1%')}), and {found.size.estimate:.2f} classes on average; "
        f"{found.single:.1%} hold one class, {found.empty:.1%} none; least covered: {worst} frames"
    )
    return Answer(data, [line, *(f"note: sets of {name}: {note}" for note in notes if note not in said)])


def weights_in(rules: Mapping[str, ensemble.Rule], outputs: ensemble.MemberOutputs) -> dict[str, float]:
    """Member -> weight in the first weighted mean among the rules; empty where there is none."""
    weights = next((rule.weights for rule in rules.values() if isinstance(rule, ensemble.WeightedMean)), None)
    return {} if weights is None else dict(zip(outputs.members, weights, strict=True))


def interval(low: float | None, high: float | None, form: str = "+.4f") -> str:
    """The ends of an interval in words.

    Example:
        >>> interval(-0.01, 0.02), interval(math.nan, math.nan)
        ('-0.0100 .. +0.0200', 'no interval')
    """
    if low is None or high is None or math.isnan(low):
        return "no interval"
    return f"{low:{form}} .. {high:{form}}"


def _right(name: str, rules: Mapping[str, ensemble.Rule], test: ensemble.MemberOutputs) -> NDArray[np.bool_]:
    """(N,): where a member, or one of the rules over all members, is right."""
    from ensemble.judge.diversity import correct

    if name in test.members:
        right: NDArray[np.bool_] = correct(test.subset([name]))[0]
        return right
    found: NDArray[np.bool_] = (applied(rules[name], test).argmax(dim=1) == test.require_labels()).numpy()
    return found


def _table(result: ensemble.Report, valid: str, *, costs: bool) -> Table:
    """Members above, rules below."""
    rows: list[dict[str, Any]] = []
    formats = _FORMATS | {result.metric: ".4f"} | (_COSTS if costs else {})
    of = "" if result.metric == "accuracy" else f" in {ensemble.judge.get_metric(result.metric).title}"
    for row in (*result.members.to_dict("records"), *result.rules.to_dict("records")):
        single = len(rows) < len(result.members)
        mark = f" (best on {valid})" if row["name"] == result.baseline else ""
        rows.append(
            {
                "member or = rule": f"{row['name']}{mark}" if single else f"= {row['name']}",
                **{column: row[column] for column in formats},
                f"gain{of} over best single": None if single else f"{row['gain']:+.4f}",
                "95 % interval": None if single else interval(row["gain_low"], row["gain_high"]),
            }
        )
    return Table(rows, formats=formats)


def _remarks(result: ensemble.Report, weights: Mapping[str, float], seconds: float | None) -> list[str]:
    """The lines below the table."""
    positive = [f"{name} {weight:.3f}" for name, weight in weights.items() if weight > 0]
    lines = [f"\nweights: {', '.join(positive)}"] if positive else []
    lines += [
        f"{row['name']}: on recordings left out of the fit, the weights lose {row['optimism']:.4f} nats and "
        f"{100 * row['optimism_accuracy']:.2f} points of accuracy"
        for row in result.rules.dropna(subset="optimism").to_dict("records")
    ]
    speed = "" if seconds is None else f" in {seconds:.2f} s ({result.frames / seconds:,.0f} frames/s)"
    lines.append(
        f"{result.frames:,} frames of {result.recordings:,} recordings{speed}; votes tie on {result.tie_rate:.2%} of "
        f"them; some member is right on {result.oracle:.2%}"
    )
    return lines + [f"note: {note}" for note in result.notes]
