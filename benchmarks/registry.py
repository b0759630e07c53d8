"""What the registry costs at 10 to 100,000 versions, beside the costs to hold.

    python -m benchmarks.registry [--most 100000]

Each registry is written as a file with full lines (40 classes, recipe, metrics); one blob serves all versions.
`open` parses the file, `resolve` is one lookup after that, `register` and `transaction` include their blobs,
whose share is measured apart on an empty registry; `verify` reads and hashes at most 1,000 blobs.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zoo
from zoo.registry.document import Document, write
from zoo.registry.upkeep import problem_of

SIZES = (10, 1_000, 10_000, 100_000)
BATCH = 1_000
OPEN_MOST = {1_000: 0.015, 100_000: 3.0}  # seconds to open and resolve
REGISTER_MOST = {1_000: 0.040, 10_000: 0.300}  # seconds for one registration, without its blob


def main() -> None:
    """Print one row per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=SIZES[-1], help="the largest registry")
    most = parser.parse_args().most
    print(
        f"{'versions':>9} {'MB':>7} {'open + resolve':>22} {'register':>26} {'transaction of 1,000':>28} {'verify each':>12}"
    )
    for size in (size for size in SIZES if size <= most):
        with tempfile.TemporaryDirectory() as folder:
            print(_row(Path(folder), size), flush=True)


def _row(folder: Path, size: int) -> str:
    spec = zoo.Spec("cylinder", features=27, context=1, classes=40, options={"width": 16, "depth": 1})
    registry = zoo.Registry(folder / "registry.json")
    first = registry.register("first", zoo.build(spec, seed=0), spec=spec, classes=zoo.PHONEMES)
    registry.path.write_bytes(_text(size, dict(first.fields)))
    middle = f"model-{size // 2}"
    opening = _best(lambda: zoo.Registry(registry.path).get(middle), 5 if size < 100_000 else 2)
    fresh = [zoo.Checkpoint.from_module(zoo.build(spec, seed=seed), spec, zoo.PHONEMES) for seed in range(8)]
    blob = _blob_seconds(folder / "empty", fresh[0])
    one = min(_seconds(lambda c=c, i=i: registry.register(f"new-{i}", c)) for i, c in enumerate(fresh[1:4]))
    batch = _seconds(lambda: _transaction(registry, fresh[4]))
    blobs = _seconds(lambda: _transaction(zoo.Registry(folder / "apart" / "registry.json"), fresh[4]))
    some = registry.entries("model-*")[:BATCH]
    verify = _seconds(lambda: [problem_of(registry.blobs, entry, fast=False, probe=False) for entry in some]) / len(
        some
    )
    megabytes = registry.path.stat().st_size / 1e6
    return (
        f"{size:>9,} {megabytes:>7.1f} {_held(opening, OPEN_MOST.get(size)):>22} "
        f"{_held(one - blob, REGISTER_MOST.get(size)):>26} {_held(batch - blobs, 2 * max(one - blob, 0.001)):>28} {verify * 1e3:>9.2f} ms"
    )


def _text(size: int, fields: dict[str, object]) -> bytes:
    """A registry of `size` models with one version each."""
    recipe = {"epochs": 10, "batch": 1024, "optimiser": "adamw", "learning_rate": 1e-3, "schedule": "one_cycle"}
    frames = hashlib.sha256(b"frames").hexdigest()
    metric = {"value": 0.8612345, "unit": "fraction", "n": 100_000, "frames": frames}
    more = {"recipe": recipe, "metrics": {"valid/accuracy": metric}, "trained_on": frames}
    models = {}
    for index in range(size):
        name = f"model-{index}"
        identity = hashlib.sha256(name.encode()).hexdigest()[:12]
        models[name] = {"versions": {identity: {**fields, **more, "n": 1, "note": f"number {index}"}}}
    return write(Document(models))


def _transaction(registry: zoo.Registry, checkpoint: zoo.Checkpoint) -> None:
    with registry.transaction():
        for index in range(BATCH):
            registry.register(f"batch-{index}", checkpoint)


def _blob_seconds(folder: Path, checkpoint: zoo.Checkpoint) -> float:
    """One registration where there is nothing else: the blob, the probe, the flushes of a small file."""
    registry = zoo.Registry(folder / "registry.json")
    taken = min(_seconds(lambda i=i: registry.register(f"blob-{i}", checkpoint)) for i in range(5))
    shutil.rmtree(folder)
    return taken


def _best(call: Callable[[], object], times: int) -> float:
    return min(_seconds(call) for _ in range(times))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _held(seconds: float, most: float | None) -> str:
    """Milliseconds, and the most it may be."""
    told = f"{seconds * 1e3:,.1f} ms"
    return told if most is None else f"{told} (most {most * 1e3:,.0f})"


if __name__ == "__main__":
    main()
