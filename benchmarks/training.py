"""Training 16 members of one spec together, against one after another and against plain vmap; what dropout costs.

    python -m benchmarks.training [--quick]

A cell is a width (three hidden layers, BatchNorm, GELU) and a batch size; its figures are the times of a whole
step of AdamW through zoo's own loop, windows included, per member, contenders in turn. "together" is the size
of the groups that `ensemble.cotrain` chooses by measuring. The second table steps one model with dropout, with the
masks that the built-in architectures draw and with those of nn.Dropout. Speeds of a shared machine mean nothing across
runs.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn

import zoo
from benchmarks.contenders import CLASSES, CONTEXT, FEATURES, random_frames
from ensemble.run.cotraining import fastest, measure_together, stacked_group
from ensemble.run.stack import Stack
from zoo import _console
from zoo.models.blocks import Dropout

MEMBERS = 16
PRECISIONS = ("float32", "bfloat16")
GOALS = {(64, 32): 2.5, (64, 128): 1.8, (128, 128): 1.4}  # elsewhere: not slower


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two widths, two batch sizes, two repeats")
    given = parser.parse_args()
    widths, batches, repeats = (
        ((64, 128), (32, 128), 2) if given.quick else ((64, 128, 256, 512), (32, 128, 1024, 4096), 3)
    )
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    frames = random_frames(max(batches) + 1000)
    rows = []
    for width in widths:
        for batch in batches:
            rows.append(cell(frames, width, batch, repeats))
            print(rows[-1], file=sys.stderr, flush=True)
    tables = [_console.Table(rows, title=f"\n{MEMBERS} members, three hidden layers, AdamW, float32")]
    rows = [dropout(frames, width, max(batches), precision, repeats) for width in widths for precision in PRECISIONS]
    _console.show([*tables, _console.Table(rows, title=f"\nOne model with dropout .3, batch {max(batches)}")])


def cell(frames: zoo.FrameSet, width: int, batch: int, repeats: int) -> dict[str, object]:
    """Milliseconds per step and member, and the ratio to one after another (above 1 = faster)."""
    options = {"width": width, "depth": 3, "activation": "gelu"}
    spec = zoo.Spec("cylinder", features=FEATURES, context=CONTEXT, classes=len(CLASSES), options=options)
    recipes = [zoo.Recipe(batch_size=batch, seed=seed, order_seed=0) for seed in range(MEMBERS)]
    together = fastest(measure_together(spec, recipes, frames))
    contenders = {
        "alone": zoo.training.single_group(spec, recipes[0]),
        "together": stacked_group(spec, recipes[:together]),
        "vmap": vmapped(spec, recipes),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, group in contenders.items():
            seconds = zoo.training.seconds_per_step(group, frames, patience=0.3)
            times[name].append(1000 * seconds / group.members)
    alone = median(times["alone"])
    return {
        "width": width,
        "batch": batch,
        "together": together,
        "alone ms": round(alone, 3),
        "together ms": round(median(times["together"]), 3),
        "ratio": round(alone / median(times["together"]), 2),
        "goal": GOALS.get((width, batch), 1.0),
        "vmap ratio": round(alone / median(times["vmap"]), 2),
    }


def dropout(frames: zoo.FrameSet, width: int, batch: int, precision: str, repeats: int) -> dict[str, object]:
    """Milliseconds per step without dropout, with that of the built-in architectures, and with torch's own."""
    contenders = {}
    for name, p in (("none", 0.0), ("built in", 0.3), ("nn.Dropout", 0.3)):
        options = {"width": width, "depth": 3, "activation": "gelu", "dropout": p}
        spec = zoo.Spec("cylinder", features=FEATURES, context=CONTEXT, classes=len(CLASSES), options=options)
        group = zoo.training.single_group(spec, zoo.Recipe(batch_size=batch, precision=precision))
        for layer in group.module.modules():
            if name == "nn.Dropout" and isinstance(layer, Dropout):
                layer.__class__ = nn.Dropout  # type: ignore[assignment]  # the same layer otherwise
        contenders[name] = group
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, group in contenders.items():
            times[name].append(1000 * zoo.training.seconds_per_step(group, frames, patience=0.3))
    middle = {name: median(values) for name, values in times.items()}
    found = {f"{name} ms": round(value, 2) for name, value in middle.items()}
    return {
        "width": width,
        "precision": precision,
        **found,
        "ratio": round(middle["nn.Dropout"] / middle["built in"], 2),
    }


def vmapped(spec: zoo.Spec, recipes: Sequence[zoo.Recipe]) -> zoo.training.Group:
    """The members as the tutorial stacks them."""
    stack = Stack([zoo.build(spec, seed=recipe.seed) for recipe in recipes])
    return zoo.training.Group(spec, tuple(recipes), stack, forward=stack, reseed=lambda seeds: None)


if __name__ == "__main__":
    main()
