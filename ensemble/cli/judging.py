"""Commands that judge: evaluate, fit, select, compare, diversity."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

import zoo
from ensemble.cli.sources import Source, best_member, registry_at

if TYPE_CHECKING:
    from ensemble.evaluation import Report
    from ensemble.outputs import MemberOutputs
    from ensemble.rules import Rule
    from ensemble.weights import WeightFit

FOUR = ("majority", "maximum", "mean", "weighted")
_FORMATS = {"accuracy": ".4f", "log_loss": ".4f", "calibration_error": ".4f", "macro_f1": ".4f", "parameters": ",.0f"}


def add_to(app: App) -> None:
    """Add these commands to `app`."""
    for command in (evaluate, fit):
        app.command(command)


def evaluate(
    source: Source = Source(),  # noqa: B008 - frozen
    *,
    rules: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = FOUR,
    report: Path | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Fit weights on one partition, judge members and rules on another, print one table.

    The gain of a rule is its accuracy minus that of the best single member, which is chosen on the
    validation frames; its 95 % interval resamples whole recordings.

    Example: ensemble evaluate --corpus my-corpus --valid dev --test test --members "cyl*" "diamond*"

    Args:
        rules: names of rules; "weighted" is the mean with weights fitted on the validation frames.
        report: also write a page to this HTML file (needs the extra `report`).
        json: print JSON for programs.
    """
    from ensemble.evaluation import evaluate as judge

    members = source.load()
    valid = source.collect(members, source.valid)
    chosen, fitted = named_rules(rules, valid)
    began = time.perf_counter()
    test = source.collect(members, source.test)
    seconds = time.perf_counter() - began
    result = judge(
        test, chosen, baseline=best_member(valid), parameters=members.parameters, trained_on=members.trained_on
    )
    if report is not None:
        write_page(result, report)
    if json:
        zoo.print_json(result.to_json() | {"weights": weights_of(fitted), "collect_seconds": seconds})
    else:
        print_report(result, fitted, seconds)


def fit(
    source: Source = Source(),  # noqa: B008 - frozen
    *,
    save: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Fit the weights of the weighted mean on the validation partition, with their certificate.

    Example: ensemble fit --members "cyl*" "diamond*" --save final

    Args:
        save: register members and weights as an ensemble of this name.
        json: print JSON for programs.
    """
    from ensemble.combined import Ensemble
    from ensemble.rules import WeightedMean
    from ensemble.weights import fit_weights

    members = source.load()
    found = fit_weights(source.collect(members, source.valid))
    if save is not None:
        rule = WeightedMean(tuple(found.weights), fingerprint=found.fingerprint)
        registry_at(source.registry).register_ensemble(save, Ensemble(members, rule))
    if json:
        zoo.print_json({"weights": weights_of(found), "loss": found.loss, "gap": found.gap, "passes": found.passes})
        return
    zoo.print_table([{"member": n, "weight": w} for n, w in weights_of(found).items()], formats={"weight": ".4f"})
    print(f"\nlog-loss {found.loss:.5f} nats, at most {found.gap:.1e} above the least that any weights reach")


def named_rules(names: tuple[str, ...], valid: MemberOutputs) -> tuple[dict[str, Rule], WeightFit | None]:
    """Rules by name; what has to be fitted is fitted on `valid`."""
    from ensemble.rules import WeightedMean, get_rule
    from ensemble.weights import fit_weights

    fitted = fit_weights(valid) if "weighted" in names else None
    rules: dict[str, Rule] = {}
    for name in names:
        if name == "weighted" and fitted is not None:
            rules[name] = WeightedMean(tuple(fitted.weights), fingerprint=fitted.fingerprint)
        else:
            rules[name] = get_rule(name)
    return rules, fitted


def weights_of(fitted: WeightFit | None) -> dict[str, float]:
    """Member -> weight."""
    return {} if fitted is None else dict(zip(fitted.members, map(float, fitted.weights), strict=True))


def write_page(result: Report, path: Path) -> None:
    """The report as one self-contained HTML file."""
    from ensemble.report import page

    zoo.write_file(path, page(result).encode())


def print_report(result: Report, fitted: WeightFit | None, seconds: float) -> None:
    """The table for people."""
    weights = weights_of(fitted)
    rows: list[dict[str, Any]] = []
    for row in result.members.to_dict("records"):
        mark = " (best on valid)" if row["name"] == result.baseline else ""
        rows.append(_judged(row, f"{row['name']}{mark}") | {"gain over best single": None, "95 % interval": None})
    for row in result.rules.to_dict("records"):
        gain = {
            "gain over best single": f"{row['gain']:+.4f}",
            "95 % interval": f"{row['gain_low']:+.4f} .. {row['gain_high']:+.4f}",
        }
        rows.append(_judged(row, f"= {row['name']}") | gain)
    zoo.print_table(rows, formats=_FORMATS)
    if weights:
        print("\nweights: " + ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items() if weight > 0))
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
