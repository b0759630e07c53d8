"""Commands that find an ensemble on validation frames, and save it: fit, select."""

from __future__ import annotations

import math
from typing import Any

import ensemble
from ensemble.cli.evaluate import cross_fits, interval, weights_in
from ensemble.cli.options import Collection, Source, named_rules, require_rules
from zoo._console import Answer, Table, progress


def fit(*, source: Source = Source(), rule: str = "weighted", save: str | None = None) -> Answer:
    """Fit the weights of the weighted mean, with their certificate, or another rule, on the validation partition.

    Beside each weight stand its 95 % interval and how often it is positive when recordings are resampled; a weight
    whose interval begins at zero may be noise.

    Example: ensemble fit --members "cyl*" "diamond*" --save final

    Args:
        rule: name of a rule, fitted or not, as in `ensemble evaluate --rules`.
        save: register the rule and its members as an ensemble of this name; members without influence are left out.
    """
    collection = Collection(source)
    require_rules([rule])
    collection.require_savable(save)
    valid = collection.outputs(source.valid)
    with progress(f"fitting {rule}"):
        if rule == "weighted":
            found = ensemble.fit_weights(valid)
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
    front: bool = False,
    save: str | None = None,
) -> Answer:
    """Find the best ensemble under a parameter budget, with a proof, on the validation partition.

    Its gain over the best single member is measured on the test partition.

    Example: ensemble select --max-parameters 20_000_000 --max-members 6 --save final

    Args:
        max_parameters: largest number of parameters of all members together; 20 million if left out, where the
            members have parameters.
        max_members: largest number of members.
        front: also find the best ensemble for every smaller budget.
        save: register the selection as an ensemble of this name.
    """
    collection = Collection(source)
    collection.require_savable(save)
    valid, test = collection.both()
    known = 20_000_000 if len(valid.parameters) == len(valid.members) else math.inf
    limits: dict[str, Any] = {"max_parameters": known if max_parameters is None else max_parameters}
    limits["max_members"] = max_members
    with progress("searching"):
        found = ensemble.select(valid, **limits)
        smaller = ensemble.selection.pareto_front(valid, **limits) if front else []
    report = ensemble.evaluate(test, {"selected": found.rule}, baseline=ensemble.judge.best_member(valid))
    row = report.rules.iloc[0]
    measured = {name: float(row[name]) for name in ("accuracy", "log_loss", "gain", "gain_low", "gain_high")}
    data = _data(found) | {"baseline": report.baseline} | measured | {"front": [_data(one) for one in smaller]}
    sizes = valid.parameters
    rows = [{"member": name, "weight": w, "parameters": sizes.get(name)} for name, w in data["weights"].items()]
    front_rows = [{"parameters": one.cost, "log_loss": one.loss, "members": " ".join(one.members)} for one in smaller]
    excess, proof = max(found.loss - found.bound, 0), "proven" if found.proven else "not proven"
    gain = f"{measured['gain']:+.4f} ({interval(measured['gain_low'], measured['gain_high'])})"
    shown: list[Table | str] = [
        Table(rows, formats={"weight": ".4f", "parameters": ",d"}),
        f"\n{f'{found.cost:,.0f} parameters, ' if sizes else ''}log-loss {found.loss:.5f} nats on {collection.fitted}",
        f"{proof}: no ensemble within the limits is better by more than {excess:.1e} nats "
        f"({found.nodes} problems solved)",
        f"on {collection.judged}: accuracy {measured['accuracy']:.4f}, gain over {report.baseline} {gain}",
        Table(front_rows, "\nthe best ensemble of each size", {"parameters": ",.0f", "log_loss": ".5f"}),
    ]
    return collection.saved(Answer(data, shown), save, found.rule, valid)


def _weights(found: ensemble.fit.WeightFit, outputs: ensemble.MemberOutputs) -> Answer:
    """Weights with their certificate, their spread over resampled recordings, and their loss on left-out ones."""
    spread, crossed = ensemble.fit.bootstrap_weights(outputs), cross_fits(("weighted",), outputs).get("weighted")
    columns = zip(found.members, found.weights, spread.low, spread.high, spread.inclusion, strict=True)
    rows = [
        {"member": name, "weight": float(weight), "low": float(low), "high": float(high), "included": float(share)}
        for name, weight, low, high, share in columns
    ]
    data = {
        "weights": {row["member"]: row["weight"] for row in rows},
        "members": rows,
        "cross_fitted_loss": None if crossed is None else crossed.loss,
        "loss": found.loss,
        "gap": found.gap,
        "passes": found.passes,
    }
    shown: list[Table | str] = [
        Table(rows, formats=dict.fromkeys(("weight", "low", "high"), ".4f") | {"included": ".0%"}),
        f"\nlog-loss {found.loss:.5f} nats, at most {found.gap:.1e} above the least that any weights reach",
    ]
    if crossed is not None:
        shown.append(
            f"on recordings left out of the fit: log-loss {crossed.loss:.5f} nats ({crossed.optimism:+.5f}), "
            f"accuracy {crossed.accuracy:.4f} ({-100 * crossed.optimism_accuracy:+.2f} points)"
        )
    return Answer(data, shown)


def _data(found: ensemble.Selection) -> dict[str, Any]:
    return {
        "members": list(found.members),
        "weights": dict(zip(found.members, map(float, found.weights), strict=True)),
        "parameters": found.cost,
        "loss": found.loss,
        "bound": found.bound,
        "proven": found.proven,
        "nodes": found.nodes,
    }
