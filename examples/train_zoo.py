"""Train the bundled zoo: eight members of seven architectures and two contexts, each registered with its recipe.

    python examples/train_zoo.py --registry mine/registry.json
    python examples/train_zoo.py --registry real.json --corpus ROOT --train train --valid dev --scale 2.5 --dropout 0.35

Without --corpus the bundled synthesised speech is used. The same command trains the same members on the same machine.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import zoo

RECIPE = zoo.Recipe(
    epochs=30,
    batch_size=512,
    optimiser="adamw",
    learning_rate=3e-3,
    weight_decay=0.1,
    schedule="one_cycle",
    label_smoothing=0.1,
    mask_time=8,
    mask_features=5,
)


def members(features: int, classes: int, scale: float, dropout: float) -> dict[str, zoo.Spec]:
    """Names and specs; 2.9 million parameters together at scale 1 and 27 features."""

    def units(width: int) -> int:
        return max(round(width * scale), classes)

    def spec(architecture: str, context: int, **options: object) -> zoo.Spec:
        common = {"activation": "gelu", "dropout": dropout}
        return zoo.Spec(architecture, features=features, context=context, classes=classes, options=common | options)

    return {
        "cylinder-a": spec("cylinder", 20, width=units(224), depth=3),
        "cylinder-b": spec("cylinder", 12, width=units(288), depth=3),
        "pyramid-a": spec("pyramid", 20, width=units(256), narrow=units(128), depth=3),
        "inverted-a": spec("inverted_pyramid", 12, width=units(384), narrow=units(192), depth=3),
        "diamond-a": spec("diamond", 12, width=units(384), narrow=units(128), depth=5),
        "basic-a": spec("basic", 12, width=units(224), depth=2),
        "bottleneck-a": spec("bottleneck", 12, width=units(128), depth=2),
        "mlp-a": spec("mlp", 20, widths=(units(256), units(256))),
    }


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", type=Path, required=True, help="created if it does not exist")
    parser.add_argument("--corpus", type=Path, help="folder of partitions in the HW1P2 layout")
    parser.add_argument("--train", default="train", help="partition to learn from")
    parser.add_argument("--valid", default="valid", help="partition that decides which epoch is best")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all widths; 4 is worth it on real speech")
    parser.add_argument("--dropout", type=float, default=0.2, help="of every hidden unit during training")
    parser.add_argument("--only", default="*", help="which members, a shell wildcard")
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--fraction", type=float, default=RECIPE.fraction, help="share of the frames seen per epoch")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto, which is cuda where there is one")
    parser.add_argument("--recipe", type=Path, help=".toml or .json file that replaces the recipe in this script")
    return parser.parse_args()


def main() -> None:
    """Train and register the members."""
    given = arguments()
    train, valid = (
        (zoo.sample_corpus(part) if given.corpus is None else zoo.read_corpus(given.corpus, part)).to(given.device)
        for part in (given.train, given.valid)
    )
    recipe = RECIPE if given.recipe is None else zoo.Recipe.read(given.recipe)
    registry = zoo.Registry(given.registry)
    specs = members(train.features.shape[1], len(train.classes), given.scale, given.dropout)
    for number, (name, spec) in enumerate(specs.items()):
        if not fnmatchcase(name, given.only):
            continue
        own = replace(recipe, seed=recipe.seed + number, epochs=given.epochs, fraction=given.fraction)
        checkpoint = zoo.train(spec, own, train, valid)
        corpus = "the sample corpus" if given.corpus is None else given.corpus.name
        entry = registry.register(name, checkpoint, note=f"trained on {corpus}")
        accuracy = checkpoint.metrics["valid/accuracy"]["value"]
        print(
            f"{entry.reference:<18} {entry.parameters:>10,} parameters  validation accuracy {accuracy:.4f}", flush=True
        )


if __name__ == "__main__":
    main()
