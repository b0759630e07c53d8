"""Commands that judge: evaluate, fit, compare."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cyclopts import App
from numpy.typing import NDArray

from ensemble.cli.naming import FOUR, cross_fits, named_rules, refuse_unknown, saved_rules
from ensemble.cli.printing import interval, print_json
from ensemble.cli.saving import keep, require_place, require_savable
from ensemble.cli.sources import Flag, Names, Source
from zoo import _console, _files

if TYPE_CHECKING:
    from ensemble.fit.weights import WeightFit
    from ensemble.judge.report import Report
    from ensemble.outputs import MemberOutputs
    from ensemble.rules.table import Rule

_FORMATS = {"accuracy": ".4f", "log_loss": ".4f", "calibration_error": ".4f", "macro_f1": ".4f", "parameters": ",.0f"}


def add_to(app: App) -> None:
    """Add these commands to `app`."""
    for command in (evaluate, fit, compare):
        app.command(command)


def evaluate(
    source: Source = Source(),  # noqa: B008 - frozen
    *,
    rules: Names = FOUR,
    report: Path | None = None,
    json: Flag = False,
) -> None:
    """Fit weights on one partition, judge members and rules on another, print one table.

    A saved ensemble among the members is judged too, by its own rule, in a row beside its members.

    The gain of a rule is its accuracy minus that of the best single member, which is chosen on the
    validation frames; its 95 % interval resamples whole recordings.

    Example: ensemble evaluate --corpus my-corpus --valid dev --test test --members "cyl*" "diamond*"

    Args:
        rules: names of rules. Fitted on the validation frames: "weighted" mean, "calibrated" (the same with
            a temperature), "log_pool", "bayes_vote", "stacked", and "auto", the simplest that is as good as the best.
        report: also write a page to this HTML file (needs the extra `report`).
        json: print JSON for programs.
    """
    from ensemble.judge.report import evaluate as judge
    from ensemble.judge.tables import best_member

    if report is not None:
        require_place(report)
    valid, test = source.spoken(source.valid, source.test)
    saved = saved_rules(source.ensembles(source.members), test)
    chosen = named_rules([name for name in rules if name not in saved], valid.outputs) | saved
    result = judge(
        test.outputs,
        chosen,
        baseline=best_member(valid.outputs),
        cross_fits=cross_fits(rules, valid.outputs),
    )
    if report is not None:
        _write_page(result, report)
    if json:
        print_json(result.to_json() | {"weights": weights_in(chosen, test.outputs), "collect_seconds": test.seconds})
    else:
        _print_report(result, weights_in(chosen, test.outputs), test.seconds)


def fit(
    source: Source = Source(),  # noqa: B008 - frozen
    *,
    rule: str = "weighted",
    save: str | None = None,
    json: Flag = False,
) -> None:
    """Fit the weights of the weighted mean on the validation partition, with their certificate; or another rule.

    Beside each weight stands its 95 % interval and how often it is positive when recordings are drawn
    anew; a weight whose interval begins at zero may be noise.

    Example: ensemble fit --members "cyl*" "diamond*" --save final

    Args:
        rule: name of a rule, fitted or not, as `ensemble evaluate --rules` takes it.
        save: register the rule and its members as an ensemble of this name; members of weight 0 are left out.
        json: print JSON for programs.
    """
    from ensemble.fit.weights import fit_weights

    if save is not None:
        require_savable(save, source)
    valid = source.spoken(source.valid)[0]
    found = fit_weights(valid.outputs) if rule == "weighted" else None
    chosen = named_rules((rule,), valid.outputs)[rule] if found is None else found.rule
    saved = None if save is None else keep(save, chosen, valid, source.registry)
    if found is None:
        _tell_rule(rule, chosen, valid.outputs, json=json)
    else:
        _tell_weights(found, valid.outputs, json=json)
    if saved and not json:
        print(saved)


def compare(
    first: str,
    second: str,
    source: Source = Source(),  # noqa: B008 - frozen
    *,
    json: Flag = False,
) -> int:
    """Is the first better than the second? Each is a member, a saved ensemble, or a rule over all members.

    Example: ensemble compare mean cylinder-a --members "cyl*"

    Args:
        first: name of a member, an ensemble or a rule.
        second: name of a member, an ensemble or a rule.
        json: print JSON for programs.

    Returns:
        0 where the 95 % interval of the difference lies above zero, else 1: the answer is no. One recording
        has no interval, so the answer is no.
    """
    from ensemble.judge.significance import bootstrap_interval, mcnemar, right_and_wrong

    valid, test = source.spoken(source.valid, source.test)
    saved = saved_rules(source.ensembles((first, second)), test)
    refuse_unknown((first, second), members=(*test.outputs.members, *saved))
    right = [_right(name, saved, valid.outputs, test.outputs) for name in (first, second)]
    found = bootstrap_interval(right[0].astype(float) - right[1], np.asarray(test.outputs.groups))
    table = right_and_wrong(right[0], right[1])
    answer = {
        "first": first,
        "second": second,
        "first_accuracy": float(right[0].mean()),
        "second_accuracy": float(right[1].mean()),
        "gain": found.estimate,
        "gain_low": found.low,
        "gain_high": found.high,
        "only_first_right": int(table[0, 1]),
        "only_second_right": int(table[1, 0]),
        "mcnemar_p": mcnemar(table).p_value,
    }
    if json:
        print_json(answer)
    else:
        _console.print_table([{"": key.replace("_", " "), "value": value} for key, value in answer.items()])
        print(f"\n95 % of the gain: {interval(found.low, found.high)}, which resamples recordings;")
        print("McNemar's test takes frames for independent, which they are not.")
    return 0 if found.low > 0 else 1


def weights_in(rules: Mapping[str, Rule], outputs: MemberOutputs) -> dict[str, float]:
    """Member -> weight of the first weighted mean among the rules; empty where there is none."""
    from ensemble.rules.fitted import WeightedMean

    for rule in rules.values():
        if isinstance(rule, WeightedMean):
            return dict(zip(outputs.members, rule.weights, strict=True))
    return {}


def _right(name: str, saved: Mapping[str, Rule], valid: MemberOutputs, test: MemberOutputs) -> NDArray[np.bool_]:
    """(N,): where a member, or a rule over all members, is right."""
    from ensemble.judge.diversity import correct
    from ensemble.rules import rule_for

    if name in test.members:
        right: NDArray[np.bool_] = correct(test.subset([name]))[0]
        return right
    labels = test.require_labels()
    rule = rule_for(saved.get(name) or named_rules((name,), valid)[name], test.members)
    applied = rule.abstaining if test.abstain else rule
    pieces = [applied(rows).argmax(dim=1) == labels[where] for where, rows in test.blocks()]
    return np.concatenate([piece.numpy() for piece in pieces])


def _tell_weights(found: WeightFit, outputs: MemberOutputs, *, json: bool) -> None:
    from ensemble.fit.crossfit import bootstrap_weights

    spread, crossed = bootstrap_weights(outputs), cross_fits(["weighted"], outputs).get("weighted")
    rows = [
        {"member": name, "weight": float(weight), "low": float(low), "high": float(high), "included": float(share)}
        for name, weight, low, high, share in zip(
            found.members, found.weights, spread.low, spread.high, spread.inclusion, strict=True
        )
    ]
    if json:
        weights = {row["member"]: row["weight"] for row in rows}
        left_out = None if crossed is None else crossed.loss
        figures = {"loss": found.loss, "gap": found.gap, "passes": found.passes}
        print_json({"weights": weights, "members": rows, "cross_fitted_loss": left_out, **figures})
        return
    _console.print_table(rows, formats=dict.fromkeys(("weight", "low", "high"), ".4f") | {"included": ".0%"})
    print(f"\nlog-loss {found.loss:.5f} nats, at most {found.gap:.1e} above the least that any weights reach")
    if crossed is not None:
        print(
            f"on recordings left out of the fit {crossed.loss:.5f} nats, {crossed.optimism:.5f} more than it "
            f"promises; accuracy {crossed.accuracy:.4f}, {100 * crossed.optimism_accuracy:.2f} points less"
        )


def _tell_rule(name: str, chosen: Rule, outputs: MemberOutputs, *, json: bool) -> None:
    from ensemble.judge.report import evaluate as judge

    row = judge(outputs, {name: chosen}, replicates=1).rules.iloc[0]
    figures = {"loss": float(row["log_loss"]), "accuracy": float(row["accuracy"])}
    if json:
        print_json({"rule": name, "weights": weights_in({name: chosen}, outputs), **figures})
    else:
        print(f"{name}: log-loss {figures['loss']:.5f} nats, accuracy {figures['accuracy']:.4f} on these very frames")


def _write_page(result: Report, path: Path) -> None:
    """The report as one self-contained HTML file."""
    from ensemble.judge.page import page

    _files.write(path, page(result).encode())


def _print_report(result: Report, weights: Mapping[str, float], seconds: float) -> None:
    """The table for people."""
    rows: list[dict[str, Any]] = []
    for row in result.members.to_dict("records"):
        mark = " (best on valid)" if row["name"] == result.baseline else ""
        rows.append(_judged(row, f"{row['name']}{mark}") | {"gain over best single": None, "95 % interval": None})
    for row in result.rules.to_dict("records"):
        gain = {
            "gain over best single": f"{row['gain']:+.4f}",
            "95 % interval": interval(row["gain_low"], row["gain_high"]),
        }
        rows.append(_judged(row, f"= {row['name']}") | gain)
    _console.print_table(rows, formats=_FORMATS)
    used = [f"{name} {weight:.3f}" for name, weight in weights.items() if weight > 0]
    if used:
        print("\nweights: " + ", ".join(used))
    for row in result.rules.dropna(subset="optimism").to_dict("records"):
        print(
            f"{row['name']}: fitted weights flatter themselves by {row['optimism']:.4f} nats and "
            f"{100 * row['optimism_accuracy']:.2f} points of accuracy on their own recordings"
        )
    print(_summary(result, seconds))
    for note in result.notes:
        print(f"note: {note}")


def _judged(row: Mapping[Hashable, Any], name: str) -> dict[str, Any]:
    return {"member or = rule": name} | {column: row[column] for column in _FORMATS}


def _summary(result: Report, seconds: float) -> str:
    return (
        f"{result.frames:,} frames of {result.recordings:,} recordings in {seconds:.2f} s "
        f"({result.frames / seconds:,.0f} frames/s); votes tie on {result.tie_rate:.2%} of them; "
        f"some member is right on {result.oracle:.2%}"
    )
