"""Commands that look at the members: select, diversity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cyclopts import App

from ensemble.cli.printing import interval, print_json
from ensemble.cli.saving import keep, require_savable
from ensemble.cli.sources import Flag, Source
from zoo import _console

if TYPE_CHECKING:
    from ensemble.outputs import MemberOutputs
    from ensemble.rules.fitted import WeightedMean
    from ensemble.selection.budget import Selection


def add_to(app: App) -> None:
    """Add these commands to `app`."""
    for command in (select, diversity):
        app.command(command)


def select(
    source: Source = Source(),  # noqa: B008 - frozen
    *,
    max_parameters: float = 20_000_000,
    max_members: int | None = None,
    front: Flag = False,
    save: str | None = None,
    json: Flag = False,
) -> None:
    """Find the best ensemble within a number of parameters, proven on the validation partition.

    Its gain over the best single member is then measured on the test partition.

    Example: ensemble select --max-parameters 20_000_000 --max-members 6 --save final

    Args:
        max_parameters: of all members together.
        max_members: how many, at most.
        front: also print the best ensemble for every smaller budget.
        save: register what was found as an ensemble of this name.
        json: print JSON for programs.
    """
    from ensemble.selection.budget import pareto_front
    from ensemble.selection.budget import select as search

    if save is not None:
        require_savable(save, source)
    valid, test = source.spoken(source.valid, source.test)
    found = search(valid.outputs, max_parameters, valid.parameters, max_members=max_members)
    others = []
    if front:
        others = pareto_front(valid.outputs, valid.parameters, max_parameters=max_parameters, max_members=max_members)
    answer = _told(found) | _gain(found.rule, valid.outputs, test.outputs)
    saved = None if save is None else keep(save, found.rule, valid, source.registry)
    if json:
        print_json(answer | {"front": [_told(one) for one in others]})
    else:
        _print_selection(answer, valid.parameters, source)
        _print_front(others)
        if saved:
            print(saved)


def diversity(
    source: Source = Source(),  # noqa: B008 - frozen
    *,
    json: Flag = False,
) -> None:
    """Show how the members differ on the test partition: all pairs, the whole, and what each contributes.

    Example: ensemble diversity --members "cyl*" "diamond*"

    Args:
        json: print JSON for programs.
    """
    from ensemble.judge import diversity as measures
    from ensemble.selection.contribution import contributions

    outputs = source.spoken(source.test)[0].outputs
    right = measures.correct(outputs)
    joint, crowd = measures.Joint.of(right), measures.crowd_histogram(right)
    shares = contributions(outputs)
    tables = {name: measure(joint) for name, measure in measures.PAIR_MEASURES.items()}
    names = outputs.members
    pairs = [
        {"first": names[i], "second": names[j], **{name: float(table[i, j]) for name, table in tables.items()}}
        for i in range(len(names))
        for j in range(i + 1, len(names))
    ]
    whole = {name: measure(crowd) for name, measure in measures.CROWD_MEASURES.items()}
    loss = measures.log_loss_split(outputs)
    whole |= {"members' mean log-loss": loss.members, "diversity (nats)": loss.diversity}
    members = [
        {"member": name, "leave_one_out": float(alone), "shapley": float(value)}
        for name, alone, value in zip(names, shares.leave_one_out, shares.shapley, strict=True)
    ]
    unsolved = dict(zip(outputs.classes, measures.unsolved(outputs).tolist(), strict=True))
    if json:
        print_json({"pairs": pairs, "whole": whole, "members": members, "unsolved": unsolved})
        return
    _console.print_table(pairs, title="pairs", formats=dict.fromkeys(tables, ".4f"))
    rows = [{"measure": name, "value": value} for name, value in whole.items()]
    _console.print_table(rows, title="\nall members", formats={"value": ".4f"})
    formats = {"leave_one_out": "+.5f", "shapley": "+.5f"}
    _console.print_table(members, title="\nnats that a member takes off the mean's log-loss", formats=formats)
    worst = sorted(unsolved.items(), key=lambda item: -item[1])[:8]
    print("\nframes that no member gets right: " + ", ".join(f"{name} {count}" for name, count in worst))


def _print_selection(answer: dict[str, Any], parameters: dict[str, int], source: Source) -> None:
    rows = [{"member": n, "weight": w, "parameters": parameters[n]} for n, w in answer["weights"].items()]
    _console.print_table(rows, formats={"weight": ".4f", "parameters": ",d"})
    excess, nodes = max(answer["loss"] - answer["bound"], 0), answer["nodes"]
    proof = "proven" if answer["proven"] else "not proven"
    print(f"\n{answer['parameters']:,.0f} parameters, log-loss {answer['loss']:.5f} nats on {source.valid!r}")
    print(f"{proof}: within the limits no ensemble is better by more than {excess:.1e} nats (problems solved: {nodes})")
    gain = f"{answer['gain']:+.4f} ({interval(answer['gain_low'], answer['gain_high'])})"
    print(f"on {source.test!r}: accuracy {answer['accuracy']:.4f}, gain over {answer['baseline']} {gain}")


def _print_front(front: list[Selection]) -> None:
    rows = [{"parameters": one.cost, "log_loss": one.loss, "members": " ".join(one.members)} for one in front]
    if rows:
        print("\nthe best ensemble of every size")
        _console.print_table(rows, formats={"parameters": ",.0f", "log_loss": ".5f"})


def _told(found: Selection) -> dict[str, Any]:
    weights = dict(zip(found.members, map(float, found.weights), strict=True))
    return {
        "members": list(found.members),
        "weights": weights,
        "parameters": found.cost,
        "loss": found.loss,
        "bound": found.bound,
        "proven": found.proven,
        "nodes": found.nodes,
    }


def _gain(rule: WeightedMean, valid: MemberOutputs, test: MemberOutputs) -> dict[str, Any]:
    from ensemble.judge.report import evaluate
    from ensemble.judge.tables import best_member

    report = evaluate(test, {"selected": rule}, baseline=best_member(valid))
    row = report.rules.iloc[0]
    columns = ("accuracy", "log_loss", "gain", "gain_low", "gain_high")
    return {"baseline": report.baseline, **{name: float(row[name]) for name in columns}}
