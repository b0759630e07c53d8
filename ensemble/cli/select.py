"""Commands that look for the members worth combining: select, diversity."""

from __future__ import annotations

from typing import Any

import ensemble
from ensemble.cli.evaluate import interval
from ensemble.cli.options import NO_SOURCE, Collection, Source, require_savable
from ensemble.cli.options import save as save_ensemble
from zoo._console import Answer, Table, progress


def select(
    *,
    source: Source = NO_SOURCE,
    max_parameters: float = 20_000_000,
    max_members: int | None = None,
    front: bool = False,
    save: str | None = None,
) -> Answer:
    """Find the best ensemble under a parameter budget, with a proof, on the validation partition.

    Its gain over the best single member is measured on the test partition.

    Example: ensemble select --max-parameters 20_000_000 --max-members 6 --save final

    Args:
        max_parameters: largest number of parameters of all members together.
        max_members: largest number of members.
        front: also find the best ensemble for every smaller budget.
        save: register the selection as an ensemble of this name.
    """
    collection = Collection(source)
    if save is not None:
        require_savable(save, collection)
    valid, test = collection.outputs(source.valid), collection.outputs(source.test)
    limits: dict[str, Any] = {"max_parameters": max_parameters, "max_members": max_members}
    with progress("searching"):
        found = ensemble.select(valid, **limits)
        smaller = ensemble.selection.pareto_front(valid, **limits) if front else []
    data = _data(found) | _gain(found, valid, test)
    front_rows = [{"parameters": one.cost, "log_loss": one.loss, "members": " ".join(one.members)} for one in smaller]
    formats = {"parameters": ",.0f", "log_loss": ".5f"}
    shown = [
        *_shown(data, valid.parameters, source),
        Table(front_rows, title="\nthe best ensemble of each size", formats=formats),
    ]
    data |= {"front": [_data(selection) for selection in smaller]}
    if save is not None:
        shown.append(save_ensemble(save, found.rule, valid, collection))
        data |= {"saved": save}
    return Answer(data, shown)


def diversity(*, source: Source = NO_SOURCE) -> Answer:
    """Show how the members differ on the test partition: each pair, all together, and what each contributes.

    Example: ensemble diversity --members "cyl*" "diamond*"
    """
    from ensemble.judge import diversity as measures

    outputs = Collection(source).outputs(source.test)
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
        Table(pairs, title="pairs", formats=dict.fromkeys(tables, ".4f")),
        Table(
            [{"measure": name, "value": value} for name, value in whole.items()],
            title="\nall members",
            formats={"value": ".4f"},
        ),
        Table(members, title="\nreduction of the mean's log-loss by each member, in nats", formats=gains),
        "\nframes on which every member is wrong: " + ", ".join(f"{name} {count}" for name, count in hardest),
    ]
    return Answer({"pairs": pairs, "whole": whole, "members": members, "unsolved": unsolved}, shown)


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


def _gain(found: ensemble.Selection, valid: ensemble.MemberOutputs, test: ensemble.MemberOutputs) -> dict[str, Any]:
    """The selection on the test frames against the best member on the validation frames."""
    report = ensemble.evaluate(test, {"selected": found.rule}, baseline=ensemble.judge.best_member(valid))
    row = report.rules.iloc[0]
    columns = ("accuracy", "log_loss", "gain", "gain_low", "gain_high")
    return {"baseline": report.baseline, **{name: float(row[name]) for name in columns}}


def _shown(data: dict[str, Any], sizes: dict[str, int], source: Source) -> list[Table | str]:
    rows = [{"member": name, "weight": weight, "parameters": sizes[name]} for name, weight in data["weights"].items()]
    excess, proof = max(data["loss"] - data["bound"], 0), "proven" if data["proven"] else "not proven"
    gain = f"{data['gain']:+.4f} ({interval(data['gain_low'], data['gain_high'])})"
    return [
        Table(rows, formats={"weight": ".4f", "parameters": ",d"}),
        f"\n{data['parameters']:,.0f} parameters, log-loss {data['loss']:.5f} nats on {source.valid!r}",
        f"{proof}: no ensemble within the limits is better by more than {excess:.1e} nats "
        f"({data['nodes']} problems solved)",
        f"on {source.test!r}: accuracy {data['accuracy']:.4f}, gain over {data['baseline']} {gain}",
    ]
