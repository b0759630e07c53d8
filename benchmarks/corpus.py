"""A corpus of the course's layout from end to end: seconds, and the memory that each step has of its own.

    python -m benchmarks.corpus [--recordings 1000] [--frames 1265] [--steps 100] [--folder FOLDER] [--keep]

Random features of 40 classes are written as the partitions train, dev (a nineteenth of it) and test (a quarter of it,
as links). Then every step runs as a process of its own, and is looked at from outside: memory is the peak of what no
file backs (RssAnon of /proc), fifty times a second, over the process and those that it starts; pages of mapped files,
which the system takes back when it needs them, are not part of it. Before a corpus is read, its files are dropped from
the page cache. The course's own size is `--recordings 28539 --steps 2000`: 36.1 million frames; it takes about half an
hour, and 25 GB in the folder. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ensemble
import zoo
from zoo import _console

FEATURES, MEMBERS, BATCH = 27, 8, 1024
_PARTS = {"dev": 19, "test": 4}  # what share of the recordings of train
_SHORTEST, _LONGEST = 0.3, 1.7  # recordings, as a share of the mean
_PHONEME = 8  # frames
_SPEC = ["--spec", "cylinder", "--context", 20, "--option", "width=256", "--option", "depth=3"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=1000, help="of the partition train")
    parser.add_argument("--frames", type=int, default=1265, help="mean length of a recording")
    parser.add_argument("--steps", type=int, default=100, help="of training, at 1,024 frames each")
    parser.add_argument(
        "--folder", type=Path, help="for the corpus and everything made of it; otherwise a temporary one"
    )
    parser.add_argument("--keep", action="store_true", help="keep what is in the folder")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(STEPS[given.step](given.folder)))
        return
    folder = Path(tempfile.mkdtemp()) if given.folder is None else given.folder
    (folder / "corpus").mkdir(parents=True)
    try:
        run(folder, given.recordings, given.frames, given.steps)
    finally:
        if not given.keep:
            for name in ("corpus", "outputs", "checkpoints", "registry.json", "registry.json.lock"):
                place = folder / name
                shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def run(folder: Path, recordings: int, frames: int, steps: int) -> None:
    """Make the corpus and all steps on it; each prints its line when it is done."""
    rows: list[dict[str, object]] = []

    def step(name: str, *command: object, at_most: str = "", **about: Callable[[Any], object]) -> Any:
        words = [sys.executable, "-m", *map(str, command or ("benchmarks.corpus", "--step", name, "--folder", folder))]
        seconds, busy, peak, answer = watched(words)
        row = {"step": name, "seconds": round(answer.get("took", seconds), 1), "of processors": round(busy, 1)}
        row["own memory, GB"] = round(peak, 2)
        rows.append(row | {"": ", ".join(f"{key} {value(answer)}" for key, value in about.items())} | {"goal": at_most})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        return answer

    began = time.perf_counter()
    count = make(folder / "corpus", recordings, frames)
    print(
        f"{recordings:,} recordings, {count:,} frames, written in {time.perf_counter() - began:.0f} s", file=sys.stderr
    )
    step("plain threads", gigabytes=lambda answer: round(answer["bytes"] / 1e9, 2))
    plain = step("plain threads that keep", gigabytes=lambda answer: round(answer["bytes"] / 1e9, 2))
    ready = f"{1.333 * plain['took']:.1f} s"
    step("read", at_most=f"{ready}; 1.2 times", result=lambda answer: f"{answer['bytes'] / 1e9:.2f} GB")
    step("map, first time")
    step("map, second time", at_most="1 s")
    corpus = ["--corpus", folder / "corpus", "--mapped", folder / "corpus", "--registry", folder / "registry.json"]
    trained = ["--train", "train", "--valid", "dev", "--epochs", 1, "--batch-size", BATCH, "--device", "cpu", "--json"]
    fraction = min(1.0, steps * BATCH / count)
    step(
        f"zoo train, {steps:,} steps",
        *("zoo", "train", "trained", *_SPEC, *corpus, *trained, "--fraction", fraction),
        at_most="2 GiB",
        accuracy=lambda answer: round(answer["metrics"]["valid/accuracy"]["value"], 4),
    )
    step("a whole epoch begins", at_most="2 GiB", steps=lambda answer: answer["steps"])
    step("members")
    judged = ["--members", "m*", "--valid", "dev", "--test", "test", "--json"]
    stored = [*judged, "--outputs", folder / "outputs", "--registry", folder / "registry.json"]
    tested = len_of(folder, "test")
    step(
        "ensemble collect",
        *("ensemble", "collect", folder / "outputs", *corpus, *judged, "--device", "cpu"),
        at_most="2 GiB",
    )
    step("ensemble fit", "ensemble", "fit", *stored, at_most="2 GiB")
    step("ensemble select", "ensemble", "select", *stored, at_most="2 GiB")
    step("ensemble evaluate, stored", "ensemble", "evaluate", *stored, at_most="2 GiB")
    step(
        "ensemble evaluate",
        *("ensemble", "evaluate", *corpus, *judged, "--device", "cpu"),
        at_most="2 GiB",
        speed=lambda answer: f"{tested / answer['collect_seconds']:,.0f} frames/s of {tested:,}",
    )
    machine = f"{os.cpu_count()} processors, torch {torch.__version__}"
    _console.show([_console.Table(rows, title=f"\n{recordings:,} recordings, {count:,} frames; {machine}")])


def make(root: Path, recordings: int, frames: int) -> int:
    """Write the corpus; the number of training frames."""
    generator = np.random.default_rng(0)
    means = generator.normal(size=(len(zoo.PHONEMES), FEATURES)).astype(np.float32)
    names, total = np.array(zoo.PHONEMES), 0
    for partition, count in {"train": recordings, "dev": -(-recordings // _PARTS["dev"])}.items():
        for kind in ("mfcc", "transcript"):
            (root / partition / kind).mkdir(parents=True)
        for number in range(count):
            length = max(int(generator.uniform(_SHORTEST, _LONGEST) * frames), 2)
            labels = generator.integers(len(names), size=-(-length // _PHONEME)).repeat(_PHONEME)[:length]
            features = generator.standard_normal((length, FEATURES), np.float32)
            np.save(root / partition / "mfcc" / f"{number:06}.npy", 2 * features + means[labels])
            text = np.concatenate([["[SOS]"], names[labels], ["[EOS]"]])
            np.save(root / partition / "transcript" / f"{number:06}.npy", text)
            total += length * (partition == "train")
    for kind in ("mfcc", "transcript"):
        (root / "test" / kind).mkdir(parents=True)
        for number in range(-(-recordings // _PARTS["test"])):
            (root / "test" / kind / f"{number:06}.npy").hardlink_to(root / "train" / kind / f"{number:06}.npy")
    return total


def watched(command: list[str]) -> tuple[float, float, float, dict[str, Any]]:
    """Seconds, those of all processors, peak of its own memory in GB, and the JSON that a command prints."""
    began, used = time.perf_counter(), processors()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    peak, over = [0.0], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], sum(map(anonymous, family(process.pid))))

    watch = threading.Thread(target=look)
    watch.start()
    text, _ = process.communicate()
    over.set()
    watch.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - began, processors() - used, peak[0], json.loads(text)


def processors() -> float:
    """Seconds that all processes that have ended kept a processor busy, start and imports included."""
    used = os.times()
    return used.children_user + used.children_system


def family(pid: int) -> list[int]:
    """A process and those that it has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in family(int(child)))]


def anonymous(pid: int) -> float:
    """GB of a process that no file backs; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0) * 1024 / 1e9


# ---- steps that are no command


def plain_threads(folder: Path) -> dict[str, float]:
    """Read the bytes of the training partition with four threads, as fast as the disk gives them, and drop them."""
    paths = dropped(folder)

    def read(path: Path) -> int:
        return len(path.read_bytes())

    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        total = sum(pool.map(read, paths))
    return {"took": time.perf_counter() - began, "bytes": total}


def keeping_threads(folder: Path) -> dict[str, float]:
    """The same with all of them in memory at the end, which the system has to hand out."""
    paths = dropped(folder)
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        kept = [*pool.map(Path.read_bytes, paths)]
    return {"took": time.perf_counter() - began, "bytes": sum(map(len, kept))}


def read_whole(folder: Path) -> dict[str, float]:
    """Into memory."""
    dropped(folder)
    began = time.perf_counter()
    frames = zoo.read_corpus(folder / "corpus", "train")
    assert frames.labels is not None
    return {"took": time.perf_counter() - began, "bytes": frames.features.nbytes + frames.labels.nbytes}


def map_first(folder: Path) -> dict[str, float]:
    """With the file made."""
    dropped(folder)
    return map_again(folder)


def map_again(folder: Path) -> dict[str, float]:
    """From the file."""
    began = time.perf_counter()
    zoo.read_corpus(folder / "corpus", "train", mapped=True)
    return {"took": time.perf_counter() - began}


def begin_epoch(folder: Path) -> dict[str, float]:
    """Train on all frames, whose order is drawn as a whole, but only for a moment."""
    from zoo.training.step import Batches, Stepper

    frames = zoo.read_corpus(folder / "corpus", "train", mapped=True)
    options = {"width": 256, "depth": 3}
    spec, recipe = zoo.Spec("cylinder", FEATURES, 20, len(zoo.PHONEMES), options=options), zoo.Recipe(batch_size=BATCH)
    group = zoo.training.single_group(spec, recipe)
    batches, stepper = Batches(frames, spec, [recipe]), Stepper(group, "cpu")
    began, number = time.perf_counter(), 0
    for number, some in enumerate(batches.epoch(1), start=1):
        stepper.step(some, torch.tensor([1e-3]))
        if number == 100:
            break
    return {"took": time.perf_counter() - began, "steps": number}


def members(folder: Path) -> dict[str, float]:
    """Train a few small members for a moment, together, and register them."""
    frames = zoo.read_corpus(folder / "corpus", "dev", mapped=True)
    frames = frames.select(torch.arange(min(frames.recordings, 20)))
    spec = zoo.Spec("cylinder", FEATURES, 10, len(zoo.PHONEMES), options={"width": 64, "depth": 2})
    found = ensemble.cotrain(spec, zoo.Recipe(epochs=1, batch_size=256), frames, frames, seeds=range(MEMBERS))
    registry = zoo.Registry(folder / "registry.json")
    for number, one in enumerate(found):
        registry.register(f"m{number}", one)
    return {}


def dropped(folder: Path) -> list[Path]:
    """The files of the training partition, which the page cache does not hold any more."""
    paths = sorted((folder / "corpus" / "train").rglob("*.npy"))
    os.sync()
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return paths


def len_of(folder: Path, partition: str) -> int:
    """Frames of a partition."""
    return len(zoo.read_corpus(folder / "corpus", partition, mapped=True))


STEPS: dict[str, Callable[[Path], dict[str, float]]] = {
    "plain threads": plain_threads,
    "plain threads that keep": keeping_threads,
    "read": read_whole,
    "map, first time": map_first,
    "map, second time": map_again,
    "a whole epoch begins": begin_epoch,
    "members": members,
}


if __name__ == "__main__":
    main()
