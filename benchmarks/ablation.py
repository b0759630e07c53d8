"""What each part of a recipe adds: one change at a time against one base, judged on the validation speakers.

    python -m benchmarks.ablation [--corpus ROOT] [--epochs 8] [--seeds 2] [--only 'context *']

The difference in accuracy (in points: hundredths) is paired frame by frame, averaged over the seeds, and has the
95 % interval of resampled recordings. It holds for this base, these epochs and this corpus only. The frames that
judge also choose each run's best epoch, for all changes alike; so a test part stays unseen by who picks a recipe here.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ensemble
import zoo
from zoo import _console

OPTIONS = {"width": 256, "depth": 3, "activation": "gelu", "dropout": 0.2}
RECIPE = zoo.Recipe(
    batch_size=512,
    learning_rate=3e-3,
    weight_decay=0.1,
    schedule="one_cycle",
    label_smoothing=0.1,
    mask_time=8,
    mask_features=5,
)
CONTEXT = 15
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "residual blocks": {"architecture": "basic", "depth": 1},
    "no dropout": {"dropout": 0.0},
    "dropout .4": {"dropout": 0.4},
    "no masks": {"mask_time": 0, "mask_features": 0},
    "no label smoothing": {"label_smoothing": 0.0},
    "context 5": {"context": 5},
    "context 30": {"context": 30},
    "width 128": {"width": 128},
    "width 512": {"width": 512},
    "constant rate of .001": {"schedule": "constant", "learning_rate": 1e-3},
    "cosine from .001": {"schedule": "cosine", "learning_rate": 1e-3},
    "constant and EMA .998": {"schedule": "constant", "learning_rate": 1e-3, "ema": 0.998},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder of partitions; the bundled corpus without it")
    parser.add_argument("--partitions", nargs=2, default=["train", "valid"])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="*", help="changes, a shell wildcard")
    given = parser.parse_args()
    train, valid = (
        zoo.sample_corpus(part) if given.corpus is None else zoo.read_corpus(given.corpus, part)
        for part in given.partitions
    )
    recipe = replace(RECIPE, epochs=given.epochs, fraction=given.fraction)
    base, rows = torch.empty(0), []
    for name, change in CHANGES.items():
        if name == "base" or fnmatchcase(name, given.only):
            right = torch.stack([rights(change, recipe, seed, train, valid) for seed in range(given.seeds)])
            base = right if name == "base" else base
            gain = ensemble.judge.bootstrap_interval((right - base).mean(dim=0).numpy(), valid.groups.numpy())
            rows.append({"change": name, "accuracy": float(right.mean())} | points(gain))
            print(rows[-1], file=sys.stderr, flush=True)
    _console.show([_console.Table(rows, formats={"accuracy": ".4f", "gain": "+.2f", "low": "+.2f", "high": "+.2f"})])


def rights(change: dict[str, Any], recipe: zoo.Recipe, seed: int, train: zoo.FrameSet, valid: zoo.FrameSet) -> Tensor:
    """(N,) 1 where the changed model is right on the validation frames, else 0."""
    options = {key: change.get(key, value) for key, value in OPTIONS.items()}
    features, classes = train.features.shape[1], len(train.classes)
    architecture, context = change.get("architecture", "cylinder"), change.get("context", CONTEXT)
    spec = zoo.Spec(architecture, features, context, classes, options=options)
    fields = {key: value for key, value in change.items() if key not in (*OPTIONS, "architecture", "context")}
    model = zoo.train(spec, replace(recipe, seed=seed, **fields), train, valid).to_module()
    windows = zoo.data.stretch(valid, spec.context, spec.normalisation, spec.padding)
    with torch.no_grad():
        predicted = [model(windows.windows(slice(at, at + 4096))).argmax(dim=1) for at in range(0, len(valid), 4096)]
    assert valid.labels is not None
    return torch.cat(predicted).eq(valid.labels).double()


def points(gain: ensemble.judge.Interval) -> dict[str, float]:
    """An interval in hundredths."""
    return {"gain": 100 * gain.estimate, "low": 100 * gain.low, "high": 100 * gain.high}


if __name__ == "__main__":
    main()
