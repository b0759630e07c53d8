"""Everything about a graphics card in one command of at most ten minutes: tests, then tables, in a file to send back.

    python -m benchmarks.gpu [--minutes 9] [--out benchmarks/results] [--quick]

First the tests that are marked `gpu` run, then what can go wrong on a card is looked at, then come the tables of the
engine, of training and of collecting. `<card>-torch-<version>.md` in the folder is written anew after every table, so
that a run that is cut short leaves what it has. Each table gets an equal share of the time that is left. The exit code
is 0, 1 where a test or a table failed, and 2 where there is no card. `--quick` takes tiny sizes, and leaves out the
tests.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ensemble
import zoo
from benchmarks import engine
from benchmarks.contenders import CONTEXT, FEATURES, Setting, ceilings, models_of, random_frames, seconds, spec_of
from ensemble.run.cotraining import stacked_group
from zoo import _console, _files
from zoo._names import usable_device

ROOT = Path(__file__).parents[1]
MASKS = {"mask_time": 8, "mask_features": 4}
TOGETHER = 16  # members
_TINY = ((2, 16, 1), (3, 16, 1), (2, 8, 2))
_LARGE = 36_000_000  # frames, whose windows have more than 2 ** 31 numbers
Row = dict[str, object]
Table = Callable[[Setting], Iterator[Row]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no tests: only whether it runs")
    given = parser.parse_args(arguments)
    end = time.monotonic() + 60 * given.minutes
    if not torch.cuda.is_available():
        print("error: expected a CUDA device to measure, but torch finds none on this machine", file=sys.stderr)
        return 2
    device = usable_device("cuda")
    given.out.mkdir(parents=True, exist_ok=True)
    named = re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).strip("-").lower()
    report = Report(given.out / f"{named}-torch-{torch.__version__.partition('+')[0]}.md", device)
    quick: dict[str, tuple[tuple[int, int, int], ...]] = {"shapes": _TINY} if given.quick else {}
    setting = Setting(device, given.quick, {}, **quick)
    setting.ceilings.update(ceilings(device, 64 if given.quick else 8192))
    tables = {name: table for name, table in TABLES.items() if name != "tests" or not given.quick}
    for left, (name, table) in zip(range(len(tables), 0, -1), tables.items(), strict=True):
        report.add(name, table, setting, share=(end - time.monotonic()) / left)
    print(f"written to {report.path}")
    return int(report.failed)


class Report:
    """The file, and what is printed."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.failed = path, False
        self.parts = [f"# {torch.cuda.get_device_name(device)}", datetime.now(UTC).strftime("%Y-%m-%d")]

    def add(self, name: str, table: Table, setting: Setting, *, share: float) -> None:
        """Measure a table for about so many seconds, print it, and write all there is so far."""
        began, rows, said = time.monotonic(), list[Row](), ""
        try:
            for row in table(setting):
                rows.append({key: float(f"{v:.3g}") if isinstance(v, float) else v for key, v in row.items()})
                if time.monotonic() - began > share:
                    said = "The time was up: rows are missing."
                    break
            self.failed |= any(row.get("failed") for row in rows)
        except Exception as error:  # the other tables are wanted all the same
            said, self.failed = f"Failed: {type(error).__name__}: {str(error)[:300]}", True
        text = (table.__doc__ or "").partition("\n\n")[0].strip()
        took = f"{time.monotonic() - began:.0f} s"
        self.parts += [f"## {name}", f"{text} ({took})", *([said] if said else []), markdown(rows)]
        _console.show([f"\n{name}: {text} {said}", _console.Table(rows)])
        _files.write(self.path, ("\n\n".join(filter(None, self.parts)) + "\n").encode())


def markdown(rows: Sequence[Row]) -> str:
    """A table; empty without rows.

    Example:
        >>> print(markdown([{"a": 1, "b": "x|y"}, {"a": None}]))
        | a | b |
        |---|---|
        | 1 | x/y |
        |  |  |
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [["" if (v := row.get(column)) is None else str(v).replace("|", "/") for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---").replace("---|", "---|")
    return text if rows else ""


# ---- the machine, tests, and what can go wrong


def machine(setting: Setting) -> Iterator[Row]:
    """What it ran on; products are of 8,192 rows and columns."""
    device = setting.device
    major, minor = torch.cuda.get_device_capability(device)
    query = [shutil.which("nvidia-smi") or "", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if query[0] else []
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    facts = {
        "card": torch.cuda.get_device_name(device),
        "compute capability": f"{major}.{minor}",
        "memory": f"{torch.cuda.mem_get_info(device)[1] / 2**30:.1f} GiB",
        "cards": torch.cuda.device_count(),
        "driver": driver[0] if driver else "unknown",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, built for {' '.join(torch.cuda.get_arch_list())}",
        "host": f"{system}, {os.cpu_count()} processors",
        **{f"product in {kind}": f"{rate / 1e12:.1f} TFLOP/s" for kind, rate in setting.ceilings.items()},
    }
    yield from ({"what": name, "value": value} for name, value in facts.items())


def tests(setting: Setting) -> Iterator[Row]:
    """The tests that are marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "4", "-p", "no:cacheprovider", "tests"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=170)
    except subprocess.TimeoutExpired:
        yield {"result": "not done after 170 s", "failed": True}
        return
    lines = [line for line in done.stdout.splitlines() if line.strip()] or done.stderr.splitlines()
    yield from ({"result": line[:200], "failed": True} for line in lines if line.startswith(("FAILED", "ERROR")))
    yield {"result": lines[-1] if lines else f"exit code {done.returncode}", "failed": done.returncode != 0}


def waits(setting: Setting) -> Iterator[Row]:
    """How often the host waits for the card, by torch's own count."""
    frames = random_frames(600 if setting.quick else 40_000)
    there, spec = frames.to(setting.device), spec_of(16, 1)
    ways: list[dict[str, Any]] = [{}, MASKS, {"precision": "bfloat16", "clip_norm": 1.0}, {"ema": 0.99}]
    for fields in ways:
        counts = []
        for size in (len(frames) // 4, len(frames) // 8):
            recipe = zoo.Recipe(epochs=1, batch_size=size, **fields)
            counts.append(synchronisations(partial(zoo.train, spec, recipe, there, there)))
        what = ", ".join(f"{name} {value}" for name, value in fields.items())
        yield {"work": f"training, {what or 'AdamW'}", "waits a step": (counts[1] - counts[0]) / 4}
    _, members = models_of(setting.shapes[2], setting, "float32")
    ensemble.collect(members, there)
    yield {"work": "ensemble.collect, all in all", "waits": synchronisations(lambda: ensemble.collect(members, there))}


def synchronisations(work: Callable[[], object]) -> int:
    """Warnings of torch's synchronisation debugger."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def hazards(setting: Setting) -> Iterator[Row]:
    """What only a card can tell."""
    device = setting.device
    count = _LARGE if torch.cuda.mem_get_info(device)[0] > 20e9 and not setting.quick else 20_000
    piece = zoo.data.Stretch(
        torch.randn(count + 2 * CONTEXT, FEATURES, device=device), torch.arange(count, device=device), CONTEXT
    )
    some = torch.randint(count, (4096,), device=device)
    found, expected = piece.windows(some), piece.rows[some[:, None] + torch.arange(2 * CONTEXT + 1, device=device)]
    right, took = torch.equal(found, expected.flatten(1)), min(seconds(lambda: piece.windows(some)) for _ in range(5))
    yield {"what": f"windows of {count:,} frames, GB/s", "value": found.nbytes / took / 1e9, "failed": not right}
    if setting.quick:
        return
    broken = sum(not captured_beside(device) for _ in range(10))
    yield {"what": "captures that fail beside a thread that copies, of 10", "value": broken, "failed": broken > 0}
    code = (
        "import torch, zoo, ensemble; members = ensemble.load(zoo.Registry('registry.json'), 'cylinder-*')\n"
        "ensemble.collect(members, zoo.sample_corpus('valid')); print(torch.cuda.is_initialized())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    yield {"what": "members on the CPU leave the card alone", "value": told == "False", "failed": told != "False"}


def captured_beside(device: torch.device) -> bool:
    """Whether a graph can be captured while another thread pins memory and copies, as a loader does."""
    over, x = threading.Event(), torch.randn(64, 64, device=device)

    def busy() -> None:
        while not over.is_set():
            torch.empty(1 << 20, pin_memory=True).to(device, non_blocking=True).cpu()

    thread = threading.Thread(target=busy)
    seconds(lambda: x @ x)
    thread.start()
    try:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            for _ in range(50):
                x @ x
    except RuntimeError:
        return False
    finally:
        over.set()
        thread.join()
    return True


# ---- training and collecting; the engine's tables are those of `benchmarks.engine`


def forms(setting: Setting) -> Iterator[Row]:
    """Every form that was tried on neighbouring frames: times the loop, how far from it, and what was chosen."""
    frames = random_frames(600 if setting.quick else 65_536)
    for shape in setting.shapes[1:3]:
        _, members = models_of(shape, setting, "auto")
        ensemble.collect(members, frames)
        yield from ({"M x width x depth": " x ".join(map(str, shape)), **row} for row in members.plan())


def collecting(setting: Setting) -> Iterator[Row]:
    """Recordings to memory, frames a second; the first call also measures."""
    frames = random_frames(600 if setting.quick else 262_144)
    for shape in setting.shapes[1:3]:
        for precision in ("float32", "auto"):
            _, members = models_of(shape, setting, precision)
            first, *later = (seconds(partial(ensemble.collect, members, frames)) for _ in range(4))
            yield {
                "M x width x depth": " x ".join(map(str, shape)),
                "precision": precision,
                "first s": first,
                "frames/s": round(len(frames) / min(later)),
            }


def training(setting: Setting) -> Iterator[Row]:
    """Thousand frames a second and member, alone and 16 members together, in steps of AdamW."""
    frames = random_frames(700 if setting.quick else 70_000).to(setting.device)
    narrow: dict[str, Any] = {"precision": "bfloat16"}
    ways = [{}, narrow, {"precision": "float16"}, narrow | MASKS]
    for width in (16,) if setting.quick else (64, 256, 1024):
        for batch in (64,) if setting.quick else (256, 1024, 4096):
            for fields in ways:
                recipe, rates = zoo.Recipe(batch_size=batch, order_seed=0, **fields), {}
                for many in (1, 2 if setting.quick else TOGETHER):
                    recipes = [replace(recipe, seed=seed) for seed in range(many)]
                    group = stacked_group(spec_of(width, 3), recipes, setting.device)
                    took = zoo.training.seconds_per_step(group, frames, patience=0.0 if setting.quick else 0.15)
                    rates[many] = batch * many / took / 1e3
                (_, alone), (many, together) = rates.items()
                yield {
                    "width": width,
                    "batch": batch,
                    "precision": recipe.precision,
                    "masks": "yes" if recipe.mask_time else "",
                    "alone": alone,
                    f"{many} together": together,
                    "ratio": together / alone,
                }


TABLES: dict[str, Table] = {
    "machine": machine,
    "tests": tests,
    "hazards": hazards,
    "waits": waits,
    "batches": engine.batches,
    "recordings": engine.recordings,
    "automatic": engine.automatic,
    "training": training,
    "collecting": collecting,
    "storing": engine.storing,
    "forms": forms,
}


if __name__ == "__main__":
    sys.exit(main())
