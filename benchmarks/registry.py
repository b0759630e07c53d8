"""What the registry costs at 10 to 100,000 versions, beside the costs to hold.

    python -m benchmarks.registry [--most 100000]

Each registry is a file with full lines (40 classes, recipe, metrics) and one blob that serves all versions.
Each row works in a new `Registry`, as a program that has just begun: `open` reads the file and resolves
one name; `register` adds one version; `transaction` adds 1,000 at once, to cost at most two registrations,
beside twice what one more takes in the file as it is then (`twice one`; from 10 versions on, a thousand new
lines are all the work there is). Both leave out the time that the store takes for their blobs.
`plain json` is what most programs do instead of `register`: load the file, add an entry, dump it with an indent,
nothing checked, locked or flushed.
`verify` reads, hashes and checks the blobs of at most 1,000 versions. Best of several, in milliseconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec

import zoo
from zoo.registry.blobs import Blobs
from zoo.registry.load import problem_of
from zoo.registry.register import Prepared, prepare
from zoo.registry.text import new_record, write
from zoo.registry.types import ModelRecord, Snapshot, VersionRecord, plain

SIZES = (10, 1_000, 10_000, 100_000)
BATCH = 1_000
OPEN_MOST = {1_000: 15.0, 100_000: 3_000.0}
REGISTER_MOST = {1_000: 40.0, 10_000: 300.0}
COLUMNS = (
    "versions",
    "MB",
    "open",
    "most",
    "register",
    "most",
    "plain json",
    "transaction",
    "most",
    "twice one",
    "blob",
    "verify each",
)


def main() -> None:
    """Print one row per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=SIZES[-1], help="the largest registry")
    most = parser.parse_args().most
    print("  ".join(f"{name:>11}" for name in COLUMNS))
    for size in (size for size in SIZES if size <= most):
        with tempfile.TemporaryDirectory() as folder:
            numbers = measure(Path(folder) / "registry.json", size)
        print("  ".join(f"{'' if number is None else f'{number:,.1f}':>11}" for number in numbers), flush=True)


class TimedBlobs(Blobs):
    """A store that counts the milliseconds it takes."""

    taken = 0.0

    def put(self, data: bytes) -> str:
        """As ever."""
        start = time.perf_counter()
        sha256 = super().put(data)
        self.taken += (time.perf_counter() - start) * 1e3
        return sha256


def measure(path: Path, size: int) -> list[float | None]:
    """One row, in the order of `COLUMNS`."""
    spec = zoo.Spec("cylinder", features=27, context=1, classes=40, options={"width": 16, "depth": 1})
    checkpoint = zoo.Checkpoint.from_module(zoo.build(spec, seed=0), spec, zoo.PHONEMES)
    made = prepare("first", checkpoint)
    deposited(path, ["first"], made)
    megabytes = path.write_bytes(filled(size, plain(made.record))) / 1e6
    middle, times = f"model-{size // 2}", 7 if size < 100_000 else 3
    opening = best(lambda: zoo.Registry(path).get(middle), times)
    one = min(deposited(path, [f"one-{index}"], made)[0] for index in range(times))
    naive = best(lambda: plainly(path, path.with_name("plain.json")), times)
    batch, after, blob = transaction(path, made, 3 if size == 100_000 else 7)
    registry = zoo.Registry(path)
    entries = registry.entries("model-*")[:BATCH]
    verify = best(lambda: [problem_of(registry.blobs, entry) for entry in entries], 1)
    most = REGISTER_MOST.get(size)
    costs = [opening, OPEN_MOST.get(size), one, most, naive, batch, most and 2 * most, 2 * after, blob]
    return [size, megabytes, *costs, verify / len(entries)]


def transaction(path: Path, made: Prepared, times: int) -> tuple[float, float, float]:
    """A thousand registrations in one transaction, one more after them, and the blob of one."""
    text, rows = path.read_bytes(), []
    for _ in range(times):
        path.write_bytes(text)
        batch, blobs = deposited(path, [f"many-{index}" for index in range(BATCH)], made)
        rows.append((batch, deposited(path, ["one-more"], made)[0], blobs / BATCH))
    batches, after, blob = (min(column) for column in zip(*rows, strict=True))
    return batches, after, blob


def plainly(path: Path, other: Path) -> None:
    """One more entry, as a program without a registry writes it."""
    table = json.loads(path.read_text(encoding="utf-8"))
    name, model = next(iter(table["models"].items()))
    table["models"][f"{name}-more"] = model
    other.write_text(json.dumps(table, indent=2), encoding="utf-8")


def filled(size: int, fields: Any) -> bytes:
    """The text of a registry of `size` models with one version each."""
    recipe = {"epochs": 10, "batch": 1024, "optimiser": "adamw", "learning_rate": 1e-3, "schedule": "one_cycle"}
    frames = hashlib.sha256(b"frames").hexdigest()
    metric = {"value": 0.8612345, "unit": "fraction", "n": 100_000, "frames": frames}
    more = {"recipe": recipe, "metrics": {"valid/accuracy": metric}, "trained_on": frames, "n": 1}
    line = new_record(VersionRecord, "model", {**fields, **more})
    models = {
        name: ModelRecord(versions={identity(name): msgspec.structs.replace(line, note=name)})
        for name in (f"model-{index}" for index in range(size))
    }
    return write(Snapshot(models))


def deposited(path: Path, names: Sequence[str], made: Prepared) -> tuple[float, float]:
    """Milliseconds to register a prepared model under new names, by a program that has just begun: lines, blobs."""
    registry, many = zoo.Registry(path), {name: msgspec.structs.replace(made, id=identity(name)) for name in names}
    registry.blobs = blobs = TimedBlobs(path)
    start = time.perf_counter()
    with registry.transaction() if len(names) > 1 else nullcontext():
        for name, prepared in many.items():
            registry.add(name, prepared)
    return (time.perf_counter() - start) * 1e3 - blobs.taken, blobs.taken


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
