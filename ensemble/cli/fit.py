"""Commands that find an ensemble on validation frames, and save it: fit, select."""

from __future__ import annotations

import math
from typing import Any, Literal

import ensemble
from ensemble.cli.evaluate import cross_fit, interval, weights_in
from ensemble.cli.options import Collection, Source, named_rules, require_rules
from zoo._console import Answer, Table, progress


def fit(
    *, source: Source = Source(), rule: str = "weighted", metric: str = "log_loss", save: str | None = None
) -> Answer:
    """Fit the weights of the weighted mean, with their certificate, or another rule, on the validation partition.

    Beside each weight stand its 95 % interval and how often it is positive when recordings are resampled; a weight
    whose interval begins at zero may be noise.

    Example: ensemble fit --members "cyl*" "diamond*" --save final

    Args:
        rule: name of a rule, fitted or not, as in `ensemble evaluate --rules`.
        metric: what the weights of "weighted" are fitted for: log_loss or brier, with a certificate; accuracy or
            macro_f1, by greedy picks.
        save: register the rule and its members as an ensemble of this name; members without influence are left out.
    """
    ensemble.judge.get_metric(metric)
    if rule != "weighted" and metric != "log_loss":
        msg = f"expected --metric beside --rule weighted, got it beside {rule}, which is fitted in one way"
        raise ValueError(msg)
    collection = Collection(source)
    require_rules([rule])
    collection.require_savable(save)
    valid = collection.outputs(source.valid, sampled=True)
    with progress(f"fitting {rule}"):
        if rule == "weighted":
            found = ensemble.fit_weights(valid, metric)
            chosen: ensemble.Rule = found.rule
            answer = _weights(found, valid)
        else:
            chosen = named_rules([rule], valid)[rule]
            row = ensemble.evaluate(valid, {rule: chosen}, replicates=1).rules.iloc[0]
            loss, accuracy = float(row["log_loss"]), float(row["accuracy"])
            data = {"rule": rule, "weights": weights_in({rule: chosen}, valid), "loss": loss, "accuracy": accuracy}
            line = f"{rule}: log-loss {loss:.5f} nats, accuracy {accuracy:.4f}, on the frames it was fitted on"
            answer = Answer(data, [line])
    return collection.saved(answer, save, chosen, valid)


def select(
    *,
    source: Source = Source(),
    max_parameters: float | None = None,
    max_members: int | None = None,
    max_bytes: float = math.inf,
    max_microseconds: float = math.inf,
    metric: str | None = None,
    front: bool = False,
    front_by: Literal["parameters", "bytes", "microseconds"] | None = None,
    save: str | None = None,
) -> Answer:
    """Find the best ensemble within limits, with a proof where there is one, on the validation partition.

    Its gain over the best single member is measured on the test partition.

    Example: ensemble select --max-parameters 20_000_000 --max-members 6 --save final

    Args:
        max_parameters: largest number of parameters of all members together; 20 million if left out, where the
            members have parameters.
        max_members: largest number of members.
        max_bytes: largest size of all checkpoints together.
        max_microseconds: longest time per frame of all members together, measured on this machine.
        metric: what the ensemble is best by and its gain is of: log_loss or brier, with a proof; accuracy or macro_f1,
            by greedy picks. If left out, it is best by log_loss, and its gain is of accuracy.
        front: also find the best ensemble for every smaller budget of parameters.
        front_by: the same for every smaller budget of these, the microseconds measured on this machine.
        save: register the selection as an ensemble of this name.
    """
    by, judged = (ensemble.judge.get_metric(metric or default) for default in ("log_loss", "accuracy"))
    collection = Collection(source)
    collection.require_savable(save)
    timed = "--max-microseconds" if max_microseconds < math.inf else "--front-by microseconds"
    if measured := max_microseconds < math.inf or front_by == "microseconds":
        collection.require_measurable(timed)
    valid, judging = collection.fitting_and_judging()
    known = 20_000_000 if len(valid.parameters) == len(valid.members) else math.inf
    limits: dict[str, Any] = {"max_parameters": known if max_parameters is None else max_parameters}
    limits |= {"max_members": max_members, "max_bytes": max_bytes, "max_microseconds": max_microseconds}
    limits |= {"metric": by.name, "costs": collection.costs({}) if measured else None}
    with progress("searching"):
        found = ensemble.select(valid, **limits)
        cost = front_by or "parameters"
        smaller = ensemble.selection.pareto_front(valid, by=cost, **limits) if front or front_by else []
    baseline = ensemble.judge.best_member(valid, judged.name)
    rules = {"selected": found.rule}
    report = ensemble.evaluate(judging(rules, judged.name)[0], rules, metric=judged.name, baseline=baseline)
    row = report.rules.iloc[0]
    judgement = {name: float(row[name]) for name in (*ensemble.judge.METRICS, "gain", "gain_low", "gain_high")}
    data = _data(found) | {"baseline": report.baseline} | judgement | {"front": [_data(one) for one in smaller]}
    sizes = valid.parameters
    rows = [{"member": name, "weight": w, "parameters": sizes.get(name)} for name, w in data["weights"].items()]
    needs = {"parameters": "cost", "bytes": "size", "microseconds": "microseconds"}[cost]
    front_rows = [{cost: getattr(one, needs), by.name: one.value, "members": " ".join(one.members)} for one in smaller]
    gain = f"{judgement['gain']:+.4f} ({interval(judgement['gain_low'], judgement['gain_high'])})"
    shown: list[Table | str] = [
        Table(rows, formats={"weight": ".4f", "parameters": ",d"}),
        f"\n{found.totals} on {collection.fitted}",
        found.conclusion,
        f"on {collection.judged}: {judged.title} {judgement[judged.name]:.4f}, gain over {report.baseline} {gain}",
        Table(
            front_rows,
            "\nthe best ensemble of each size",
            {cost: ",.2f" if cost == "microseconds" else ",.0f", by.name: ".5f"},
        ),
    ]
    return collection.saved(Answer(data, shown), save, found.rule, valid)


def _weights(found: ensemble.fit.WeightFit, outputs: ensemble.MemberOutputs) -> Answer:
    """Weights with their certificate, their spread over resampled recordings, and their loss on left-out ones."""
    metric = ensemble.judge.get_metric(found.metric)
    replicates = 200 if metric.name == "log_loss" else 50  # of which each is a fit of its own
    spread = ensemble.fit.bootstrap_weights(outputs, replicates, objective=metric.name)
    crossed = cross_fit(outputs, metric.name)
    columns = zip(found.members, found.weights, spread.low, spread.high, spread.inclusion, strict=True)
    rows = [
        {"member": name, "weight": float(weight), "low": float(low), "high": float(high), "included": float(share)}
        for name, weight, low, high, share in columns
    ]
    data = {
        "weights": {row["member"]: row["weight"] for row in rows},
        "members": rows,
        "metric": metric.name,
        "value": found.value,
        "cross_fitted_value": None if crossed is None else crossed.value,
        "cross_fitted_loss": None if crossed is None else crossed.loss,
        "loss": found.loss,
        "gap": found.gap,
        "passes": found.passes,
    }
    shown: list[Table | str] = [
        Table(rows, formats=dict.fromkeys(("weight", "low", "high"), ".4f") | {"included": ".0%"}),
        f"\n{found.conclusion}",
    ]
    if crossed is not None:
        loss = -crossed.optimism_value if metric.higher else crossed.optimism_value
        own = "" if metric.name in ("accuracy", "log_loss") else f"{metric.words(crossed.value)} ({loss:+.5f}), "
        shown.append(
            f"on recordings left out of the fit: {own}log-loss {crossed.loss:.5f} nats ({crossed.optimism:+.5f}), "
            f"accuracy {crossed.accuracy:.4f} ({-100 * crossed.optimism_accuracy:+.2f} points)"
        )
    return Answer(data, shown)


def _data(found: ensemble.Selection) -> dict[str, Any]:
    return {
        "members": list(found.members),
        "weights": dict(zip(found.members, map(float, found.weights), strict=True)),
        "parameters": found.cost,
        "bytes": found.size,
        "microseconds": found.microseconds,
        "metric": found.metric,
        "loss": found.loss,
        "bound": found.bound,
        "proven": found.proven,
        "nodes": found.nodes,
    }
