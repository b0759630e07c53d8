"""You train hundreds of small members of one shape: together, stored once, chosen under a budget, with intervals.

    python examples/many_members.py --members 100 --epochs 3
    python examples/many_members.py --members 300 --max-members 8 --folder study

Members are trained at once and run as one model. Their outputs are kept in a store on disk, so that judging them again
takes no model, and adding members computes only the new ones.
"""

import argparse
from pathlib import Path

import ensemble
import zoo

SPEC = zoo.Spec("cylinder", features=27, context=5, classes=40, options={"width": 48, "depth": 2, "dropout": 0.1})


def train_members(registry: zoo.Registry, device: str, *, members: int, epochs: int, fraction: float) -> None:
    """Train all members together and register them in one step: all of them, or none."""
    recipe = zoo.Recipe(epochs=epochs, fraction=fraction, batch_size=128, learning_rate=0.003, schedule="one_cycle")
    train, valid = (zoo.sample_corpus(part).to(device) for part in ("train", "valid"))
    checkpoints = ensemble.cotrain(SPEC, recipe, train, valid, seeds=range(members), own_order=True)
    with registry.transaction():
        for seed, checkpoint in enumerate(checkpoints):
            registry.register(f"member-{seed:03}", checkpoint)


def main() -> None:
    """Train, collect, select, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("study"), help="of the registry and the stores")
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--max-members", type=int, default=8, help="budget, in members of this one shape")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--fraction", type=float, default=0.5, help="share of the training frames seen per epoch")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto, which is cuda where there is one")
    arguments = parser.parse_args()

    registry, device = zoo.Registry(arguments.folder / "registry.json"), arguments.device
    train_members(registry, device, members=arguments.members, epochs=arguments.epochs, fraction=arguments.fraction)
    members = ensemble.load(registry, "member-*", device=device)
    valid, test = (
        ensemble.collect(members, zoo.sample_corpus(part), cache=arguments.folder / part) for part in ("valid", "test")
    )

    budget = arguments.max_members * zoo.count_parameters(SPEC)
    selection = ensemble.select(valid, max_parameters=budget)
    proof = "proven best" if selection.proven else f"at most {selection.loss - selection.bound:.4f} nats from the best"
    print(f"{len(selection.members)} of {len(members)} members fit the budget of {budget:,} parameters ({proof}):")

    # How far the weights of the selected members can be trusted: the recordings are drawn again 200 times.
    intervals = ensemble.fit.bootstrap_weights(valid.subset(selection.members))
    for name, weight, low, high in zip(
        intervals.members, intervals.weights, intervals.low, intervals.high, strict=True
    ):
        print(f"  {name}  weight {weight:.3f}  95 % interval {low:.3f} to {high:.3f}")

    report = ensemble.evaluate(
        test,
        {"mean of all": ensemble.mean, "selection": selection.rule},
        baseline=ensemble.judge.best_member(valid),
    )
    print(report.rules[["name", "accuracy", "log_loss", "gain", "gain_low", "gain_high"]].to_string(index=False))
    print(f"Some member is right on {report.oracle:.2%} of the frames; votes tie on {report.tie_rate:.2%}.")


if __name__ == "__main__":
    main()
