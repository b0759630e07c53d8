"""Breed a zoo: eight members of seven architectures and two contexts, each registered with its recipe.

    python examples/breed.py --registry mine/registry.json
    python examples/breed.py --registry real.json --corpus ROOT --train train --valid dev --scale 2.5 --dropout 0.35

Without --corpus the bundled synthesised speech is used. The same command makes the same members on the same machine.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from cyclopts import App

import zoo
from zoo import _console

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
app = App(help=__doc__)


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


@app.default
def breed(
    *,
    registry: Path,
    corpus: Path | None = None,
    train: str = "train",
    valid: str = "valid",
    scale: float = 1.0,
    dropout: float = 0.2,
    only: str = "*",
    epochs: int = RECIPE.epochs,
    fraction: float = RECIPE.fraction,
    recipe: Path | None = None,
) -> None:
    """Train and register the members.

    Args:
        registry: the file that names the members; made where it is not there.
        corpus: folder of partitions in the HW1P2 layout; the bundled corpus without it.
        train: partition to learn from.
        valid: partition to choose the best epoch by.
        scale: of all widths; 1 keeps the blobs within 12 MB, 4 is worth it on real speech.
        dropout: of every hidden unit while training.
        only: which members, a shell wildcard.
        epochs: passes over the training frames.
        fraction: share of the training frames to use.
        recipe: a .toml or .json file in place of the recipe in this script.
    """
    frames, judged = (
        zoo.sample_corpus(part) if corpus is None else zoo.read_corpus(corpus, part) for part in (train, valid)
    )
    base = RECIPE if recipe is None else zoo.Recipe.read(recipe)
    keep = zoo.Registry(registry)
    specs = members(frames.features.shape[1], len(frames.classes), scale, dropout)
    for seed, (name, spec) in enumerate(specs.items()):
        if not fnmatchcase(name, only):
            continue
        own = replace(base, seed=base.seed + seed, epochs=epochs, fraction=fraction)
        checkpoint = zoo.train(spec, own, frames, judged)
        entry = keep.register(name, checkpoint, note=f"bred on {corpus.name if corpus else 'the sample corpus'}")
        accuracy, parameters = checkpoint.metrics["valid/accuracy"]["value"], zoo.count_parameters(spec)
        print(f"{entry.reference:<18} {parameters:>10,} parameters  validation accuracy {accuracy:.4f}", flush=True)


if __name__ == "__main__":
    sys.exit(_console.run_app(app))
