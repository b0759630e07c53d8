"""What the registry costs at 10 to 100,000 versions, beside the costs to hold.

    python -m benchmarks.registry [--most 100000]

Each registry is a file with full lines (40 classes, recipe, metrics) and one blob that serves all versions.
Each row works in a new `Registry`, as a program that has just begun: `open` reads the file and resolves
one name; `register` adds one version; `transaction` adds 1,000 at once, beside twice what adding one takes
to the file as it is then (from 10 versions on, a thousand new lines are all the work there is). Both are
told without their blobs, which are put into the store apart. `verify` reads, hashes and checks the blobs of
at most 1,000 versions. Best of several, in milliseconds.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import zoo
from zoo.registry.document import Document, write
from zoo.registry.intake import Parcel, parcel
from zoo.registry.upkeep import problem_of

SIZES = (10, 1_000, 10_000, 100_000)
BATCH = 1_000
OPEN_MOST = {1_000: 15.0, 100_000: 3_000.0}
REGISTER_MOST = {1_000: 40.0, 10_000: 300.0}
COLUMNS = ("versions", "MB", "open", "most", "register", "most", "transaction", "most", "blob", "verify each")


def main() -> None:
    """Print one row per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=SIZES[-1], help="the largest registry")
    most = parser.parse_args().most
    print("  ".join(f"{name:>11}" for name in COLUMNS))
    for size in (size for size in SIZES if size <= most):
        with tempfile.TemporaryDirectory() as folder:
            numbers = measure(zoo.Registry(Path(folder) / "registry.json"), size)
        print("  ".join(f"{'' if number is None else f'{number:,.1f}':>11}" for number in numbers), flush=True)


def measure(registry: zoo.Registry, size: int) -> list[float | None]:
    """One row, in the order of `COLUMNS`."""
    spec = zoo.Spec("cylinder", features=27, context=1, classes=40, options={"width": 16, "depth": 1})
    checkpoint = zoo.Checkpoint.from_module(zoo.build(spec, seed=0), spec, zoo.PHONEMES)
    made = parcel("first", checkpoint)
    registry.deposit("first", made)
    registry.path.write_bytes(filled(size, made.fields))
    middle, times = f"model-{size // 2}", 7 if size < 100_000 else 3
    opening = best(lambda: zoo.Registry(registry.path).get(middle), times)
    names = iter(range(10**6))
    blob = best(lambda: [registry.blobs.put(made.data) for _ in range(BATCH)], 3) / BATCH
    one = best(lambda: deposit(registry, made, f"one-{next(names)}"), times) - blob
    batch, after = transaction(registry, made, 2 if size == 100_000 else 5)
    entries = registry.entries("model-*")[:BATCH]
    verify = best(lambda: [problem_of(registry.blobs, entry) for entry in entries], 1)
    limits = OPEN_MOST.get(size), REGISTER_MOST.get(size), 2 * (after - blob)
    megabytes, batch = registry.path.stat().st_size / 1e6, batch - BATCH * blob
    return [size, megabytes, opening, limits[0], one, limits[1], batch, limits[2], blob, verify / len(entries)]


def transaction(registry: zoo.Registry, made: Parcel, times: int) -> tuple[float, float]:
    """A thousand registrations in one transaction, and one more after them; with their blobs."""
    text, names = registry.path.read_bytes(), [f"many-{index}" for index in range(BATCH)]
    many = {name: replace(made, id=identity(name)) for name in names}
    batch, after = [], []
    for _ in range(times):
        registry.path.write_bytes(text)
        batch.append(best(lambda: deposit_many(registry, many), 1))
        after.append(best(lambda: deposit(registry, made, "one-more"), 1))
    return min(batch), min(after)


def filled(size: int, fields: Any) -> bytes:
    """The text of a registry of `size` models with one version each."""
    recipe = {"epochs": 10, "batch": 1024, "optimiser": "adamw", "learning_rate": 1e-3, "schedule": "one_cycle"}
    frames = hashlib.sha256(b"frames").hexdigest()
    metric = {"value": 0.8612345, "unit": "fraction", "n": 100_000, "frames": frames}
    more = {"recipe": recipe, "metrics": {"valid/accuracy": metric}, "trained_on": frames, "n": 1}
    models = {
        name: {"versions": {identity(name): {**fields, **more, "note": name}}}
        for name in (f"model-{index}" for index in range(size))
    }
    return write(Document(models))


def deposit(registry: zoo.Registry, made: Parcel, name: str) -> None:
    """One registration of a model that is prepared, as by a program that has just begun."""
    zoo.Registry(registry.path).deposit(name, replace(made, id=identity(name)))


def deposit_many(registry: zoo.Registry, many: Mapping[str, Parcel]) -> None:
    """A thousand in one transaction, likewise."""
    registry = zoo.Registry(registry.path)
    with registry.transaction():
        for name, made in many.items():
            registry.deposit(name, made)


def identity(name: str) -> str:
    """An id as of some content."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def best(call: Callable[[], object], times: int) -> float:
    """Milliseconds of the fastest of several calls."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return min(taken)


if __name__ == "__main__":
    main()
