"""You ship one model: fit a rule, save members and rule as one, hand over a folder, and load it somewhere else.

    python examples/ship_ensemble.py --registry registry.json --members "cylinder-*" basic-a --folder shipped

The folder is all that the other side needs. It holds no code and nothing pickled, and every file is checked when it is
imported there.
"""

import argparse
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import ensemble
import zoo


def ship(registry: zoo.Registry, names: list[str], name: str, folder: Path) -> np.ndarray:
    """Fit weights and a temperature, save the ensemble, and export it; return its probabilities on the test frames."""
    members = ensemble.load(registry, names)
    valid = ensemble.collect(members, zoo.sample_corpus("valid"))
    weighted = ensemble.fit_weights(valid)
    calibrated = ensemble.fit.fit_temperature(valid, rule=weighted.rule)
    final = ensemble.Ensemble(members, calibrated.rule)
    registry.register_ensemble(name, final, note="weights and temperature fitted on valid")
    zoo.export(registry, name, folder)
    return final.predict_proba(zoo.sample_corpus("test"))


def receive(folder: Path, registry: zoo.Registry) -> ensemble.Ensemble:
    """On the other machine: import the folder, and load the ensemble by its name."""
    entry = zoo.import_folder(registry, folder)
    return ensemble.load_ensemble(registry, entry.name)


def main() -> None:
    """Ship, receive, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", type=Path, default=Path("registry.json"))
    parser.add_argument("--members", nargs="+", default=["*"], help="names or wildcards")
    parser.add_argument("--name", default="shipped", help="of the ensemble")
    parser.add_argument("--folder", type=Path, default=Path("shipped"), help="must not exist yet")
    arguments = parser.parse_args()

    sent = ship(zoo.Registry(arguments.registry), arguments.members, arguments.name, arguments.folder)
    test = zoo.sample_corpus("test")
    with TemporaryDirectory() as elsewhere:
        received = receive(arguments.folder, zoo.Registry(Path(elsewhere) / "registry.json"))
        difference = float(np.abs(received.predict_proba(test) - sent).max())
        print(f"{len(received.members)} members: {', '.join(received.members.names)}")
        print(f"accuracy on the test frames {received.score(test):.4f}")
        print(f"largest difference of a probability after the journey {difference:.1e}")
        first = received.predict(test)[: int(test.starts[1])]
        print("first recording:", *(phoneme for phoneme, _ in groupby(first)))


if __name__ == "__main__":
    main()
