"""You have a folder of training runs: keep their models, combine them, and find out whether that is worth it.

    python examples/combine_runs.py runs --registry mine.json

Every folder in `runs` is one run, as `zoo train --directory runs/NAME --keep 0` leaves it, and gives its best epoch;
without `--keep 0` only the last epoch is there. Where `runs` does not exist, three small models are trained first, so
that there is something to combine.
"""

import argparse
from pathlib import Path

import ensemble
import zoo
from zoo.checkpoint import read

SHAPES = {
    "narrow": zoo.Spec("cylinder", features=27, context=8, classes=40, options={"width": 64, "depth": 2}),
    "wide": zoo.Spec("cylinder", features=27, context=5, classes=40, options={"width": 128, "depth": 2}),
    "pyramid": zoo.Spec("pyramid", features=27, context=8, classes=40, options={"width": 128, "narrow": 64}),
}


def train_runs(folder: Path, *, epochs: int, fraction: float) -> None:
    """One run per shape, each in a folder of its own; a run that was interrupted is continued."""
    train, valid = zoo.sample_corpus("train"), zoo.sample_corpus("valid")
    for seed, (name, spec) in enumerate(SHAPES.items()):
        recipe = zoo.Recipe(
            epochs=epochs, fraction=fraction, learning_rate=0.003, schedule="one_cycle", seed=seed, keep=0
        )
        zoo.train(spec, recipe, train, valid, directory=folder / name)


def register_runs(folder: Path, registry: zoo.Registry) -> list[str]:
    """Register the best epoch that every run has kept under the name of its folder; return the references."""
    references = []
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        epochs = [read(path) for path in sorted(run.glob("epoch-*.safetensors"))]
        best = max(epochs, key=lambda epoch: epoch.metrics["valid/accuracy"]["value"])
        entry = registry.register(run.name, best)
        accuracy = entry.metrics["valid/accuracy"]["value"]
        print(f"{entry.reference:<14} {entry.parameters:>9,} parameters  validation accuracy {accuracy:.4f}")
        references.append(entry.reference)
    return references


def main() -> None:
    """Register, combine, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of run folders")
    parser.add_argument("--registry", type=Path, default=Path("mine.json"))
    parser.add_argument("--epochs", type=int, default=4, help="of the models trained where there are no runs")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the training frames they see per epoch")
    arguments = parser.parse_args()

    if not arguments.runs.exists():
        train_runs(arguments.runs, epochs=arguments.epochs, fraction=arguments.fraction)
    registry = zoo.Registry(arguments.registry)
    members = ensemble.load(registry, register_runs(arguments.runs, registry))

    # Fit and choose on the validation recordings, judge on the test recordings.
    valid = ensemble.collect(members, zoo.sample_corpus("valid"))
    test = ensemble.collect(members, zoo.sample_corpus("test"))
    weighted = ensemble.fit_weights(valid)
    best_single = ensemble.judge.best_member(valid)
    report = ensemble.evaluate(
        test,
        {"majority": ensemble.majority, "mean": ensemble.mean, "weighted": weighted.rule},
        baseline=best_single,
    )
    print(report.members[["name", "accuracy", "log_loss"]].to_string(index=False))
    print(report.rules[["name", "accuracy", "log_loss", "gain", "gain_low", "gain_high"]].to_string(index=False))

    row = report.rules.set_index("name").loc["weighted"]
    comparison = "better than" if row.gain_low > 0 else "worse than" if row.gain_high < 0 else "level with"
    print(f"The weighted combination is {comparison} {best_single}, the best single model on validation.")
    registry.register_ensemble("combined", ensemble.Ensemble(members, weighted.rule))


if __name__ == "__main__":
    main()
