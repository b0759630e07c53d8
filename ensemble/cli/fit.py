"""The command `fit`: fit a rule on validation frames, show how certain its weights are, and save it."""

from __future__ import annotations

import ensemble
from ensemble.cli.evaluate import cross_fits, weights_in
from ensemble.cli.options import NO_SOURCE, Collection, Source, named_rules, require_savable
from ensemble.cli.options import save as save_ensemble
from zoo._console import Answer, Table, progress


def fit(*, source: Source = NO_SOURCE, rule: str = "weighted", save: str | None = None) -> Answer:
    """Fit the weights of the weighted mean, with their certificate, or another rule, on the validation partition.

    Beside each weight stand its 95 % interval and how often it is positive when recordings are resampled; a weight
    whose interval begins at zero may be noise.

    Example: ensemble fit --members "cyl*" "diamond*" --save final

    Args:
        rule: name of a rule, fitted or not, as in `ensemble evaluate --rules`.
        save: register the rule and its members as an ensemble of this name; members without influence are left out.
    """
    collection = Collection(source)
    if save is not None:
        require_savable(save, collection)
    valid = collection.outputs(source.valid)
    with progress(f"fitting {rule}"):
        found = ensemble.fit_weights(valid) if rule == "weighted" else None
        chosen = named_rules((rule,), valid)[rule] if found is None else found.rule
        answer = _other(rule, chosen, valid) if found is None else _weights(found, valid)
    if save is None:
        return answer
    line = save_ensemble(save, chosen, valid, collection)
    return Answer(answer.data | {"saved": save}, [*answer.shown, line])


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


def _other(name: str, rule: ensemble.Rule, outputs: ensemble.MemberOutputs) -> Answer:
    """How a rule does on its own fitting frames."""
    row = ensemble.evaluate(outputs, {name: rule}, replicates=1).rules.iloc[0]
    loss, accuracy = float(row["log_loss"]), float(row["accuracy"])
    return Answer(
        {"rule": name, "weights": weights_in({name: rule}, outputs), "loss": loss, "accuracy": accuracy},
        [f"{name}: log-loss {loss:.5f} nats, accuracy {accuracy:.4f}, on the frames it was fitted on"],
    )
