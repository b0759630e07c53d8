"""Members as one against a loop, the tutorial's stack, peers, and the machine's own limit.

    python -m benchmarks.engine [--quick] [--device cuda]

One row per goal: ours, the loop `torch.stack([m(x).softmax(-1) for m in models])`, the tutorial's
stack_module_state + functional_call + vmap, and the share of the best matrix product of this machine.
Contenders take turns; a ratio is one of medians. Speeds of a shared machine mean nothing across runs.
"""

# ruff: noqa: B023  # what is defined in a loop is called before the loop goes on

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import ensemble
import zoo

SHAPES = ((4, 2048, 4), (8, 512, 4), (32, 128, 4), (100, 64, 3))  # members, width, hidden layers
FEATURES, CONTEXT = 27, 20
CLASSES = tuple(f"class {index}" for index in range(40))
Row = dict[str, object]
Work = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """How much to measure, and where."""

    device: torch.device
    quick: bool
    ceilings: dict[str, float]  # floating-point operations per second of one large product, by type

    def repeats(self, flop: float) -> int:
        """Fewer of what takes long."""
        return 3 if self.quick or flop > 2e12 else 7


def main() -> None:
    """Print one table per kind of goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches, three repeats")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="one of the tables: " + ", ".join(TABLES))
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # the child of `memory`
    given = parser.parse_args()
    if given.peak is not None:
        print(_peak(given.peak))
        return
    device = torch.device(given.device)
    setting = Setting(device, given.quick, {name: ceiling(device, dtype) for name, dtype in _TYPES.items()})
    print(_machine(setting))
    for name, table in TABLES.items():
        if given.only in (None, name):
            rows = []
            for row in table(setting):
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
            zoo.print_table(rows, title=f"\n{name}")


_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def batches(setting: Setting) -> Iterator[Row]:
    """Windows as a tensor, float32: never slower than the loop or the tutorial."""
    for shape in SHAPES:
        models, members = _models(shape, setting, "float32")
        tutorial = _tutorial(models)
        for size in (1, 64, 1024, 8192, 65_536)[: 3 if setting.quick else 5]:
            x = torch.randn(size, (2 * CONTEXT + 1) * FEATURES, device=setting.device)
            flop = _flop(models) * size
            times = _paired(
                [lambda: members.log_probabilities(x), lambda: _loop(models, x), lambda: tutorial(x)],
                repeats=setting.repeats(3 * flop),
                least=0.2,
            )
            ours, loop, stack = times
            goal = 2.0 if size <= 64 and shape[0] >= 32 else 0.97
            ratio = loop / ours if goal == 2 else min(loop, stack) / ours
            yield _row(shape, size, times, goal, ratio, flop / ours / setting.ceilings["float32"], members)


def recordings(setting: Setting) -> Iterator[Row]:
    """Neighbouring frames: the first layer in the frequency domain."""
    frames = _frames(8192 if setting.quick else 65_536)
    every = zoo.windows(frames, torch.arange(len(frames)), CONTEXT).to(setting.device)
    for shape, precision, goal in (
        (SHAPES[1], "float32", 1.2),
        (SHAPES[2], "float32", 1.4),
        (SHAPES[1], "auto", 1.2),
        (SHAPES[2], "auto", 1.4),
    ):
        models, members = _models(shape, setting, precision)
        flop = _flop(models) * len(frames)
        ours, loop = _paired(
            [
                lambda: ensemble.collect(members, frames),
                lambda: torch.cat([_loop(models, x).cpu() for x in torch.split(every, 1024)], dim=1),
            ],
            repeats=setting.repeats(flop),
        )
        said = ensemble.collect(members, frames).probabilities[:, :4096]
        apart = float(
            (said - torch.cat([_loop(models, x).cpu() for x in torch.split(every[:4096], 1024)], dim=1)).abs().max()
        )
        share = flop / ours / setting.ceilings["bfloat16" if precision == "auto" else "float32"]
        near = apart <= (1e-5 if precision == "float32" else 1e-2)
        yield _row(shape, len(frames), [ours, loop, None], goal, loop / ours if near else 0.0, share, members) | {
            "moved": f"{apart:.1e}"
        }


def automatic(setting: Setting) -> Iterator[Row]:
    """Windows as a tensor, automatic precision."""
    for shape in SHAPES:
        models, members = _models(shape, setting, "auto")
        for size in (1024, 8192)[: 1 if setting.quick else 2]:
            x = torch.randn(size, (2 * CONTEXT + 1) * FEATURES, device=setting.device)
            flop = _flop(models) * size
            ours, loop = _paired(
                [lambda: members.log_probabilities(x), lambda: _loop(models, x)],
                repeats=setting.repeats(flop),
                least=0.2,
            )
            share = flop / ours / setting.ceilings["bfloat16"]
            goal = 3.5 if shape[1] >= 128 else 0.97
            yield _row(shape, size, [ours, loop, None], goal, loop / ours, share, members)


def loading(setting: Setting) -> Iterator[Row]:
    """Checkpoints, hash-verified, into one stack, against reading and hashing their bytes."""
    for count, width, depth in ((32, 128, 4), (8, 512, 4)):
        spec = _spec(width, depth)
        with tempfile.TemporaryDirectory() as folder:
            registry = zoo.Registry(Path(folder) / "registry.json")
            names = [f"m{seed}" for seed in range(count)]
            for seed, name in enumerate(names):
                registry.register(name, zoo.build(spec, seed=seed), spec=spec, classes=CLASSES)
            blobs = sorted(path for path in Path(folder).rglob("*.safetensors"))
            ours, plain = _paired(
                [
                    lambda: ensemble.load(registry, names, device=setting.device),
                    lambda: [hashlib.sha256(blob.read_bytes()).hexdigest() for blob in blobs],
                ],
                repeats=7,
            )
        yield {
            "checkpoints": f"{count} x {width} x {depth}",
            "ours s": ours,
            "read + hash s": plain,
            "ratio": ours / plain,
            "goal": "<= 1.5",
            "holds": _yes(ours / plain <= 1.5),
        }


def gathering(setting: Setting) -> Iterator[Row]:
    """Windows from resident frames, against single items from a DataLoader and a plain copy."""
    frames = _frames(50_000 if setting.quick else 200_000)
    piece = zoo.stretch(frames, CONTEXT)
    order = torch.randperm(len(frames))[:16_384]
    copy = torch.empty(1024, (2 * CONTEXT + 1) * FEATURES)
    source = torch.randn(16_384, copy.shape[1])

    def loader() -> None:
        for _ in DataLoader(_Items(piece, order), batch_size=1024, num_workers=2):
            pass

    ours, items, plain = _paired(
        [
            lambda: [piece.windows(part) for part in torch.split(order, 1024)],
            loader,
            lambda: [part.clone() for part in torch.split(source, 1024)],
        ],
        repeats=5,
    )
    for what, ratio, goal, holds in (
        ("DataLoader of items", items / ours, ">= 8", items / ours >= 8),
        ("plain copy", ours / plain, "<= 1.5", ours / plain <= 1.5),
    ):
        yield {"against": what, "ours us/frame": ours / 16_384e-6, "ratio": ratio, "goal": goal, "holds": _yes(holds)}


def storing(setting: Setting) -> Iterator[Row]:
    """Streaming to a store against computing alone."""
    _, members = _models(SHAPES[2], setting, "auto")
    frames = _frames(100_000 if setting.quick else 1_000_000)
    feed_of = ensemble.members.collecting.feed_of
    feed = feed_of(members, frames, torch.float16)

    def alone() -> None:
        for start in range(0, len(frames), members.step):
            feed(start, min(start + members.step, len(frames)))

    frames.fingerprint  # noqa: B018  # kept by the frames, and no part of either
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        store = Path(folder) / "store"
        ours, plain = _paired(
            [lambda: ensemble.collect(members, frames, cache=store, dtype="float16"), alone],
            repeats=5,
            tidy=lambda: shutil.rmtree(store),
        )
    yield {
        "frames": len(frames),
        "members": len(members),
        "stored s": ours,
        "alone s": plain,
        "ratio": ours / plain,
        "goal": "<= 1.1",
        "holds": _yes(ours / plain <= 1.1),
    }


def memory(setting: Setting) -> Iterator[Row]:
    """Peak memory of a process that streams N frames to a store, at two N."""
    small, large = (50_000, 200_000) if setting.quick else (200_000, 1_000_000)
    peaks = []
    for frames in (small, large):
        command = [sys.executable, "-m", "benchmarks.engine", "--peak", str(frames)]
        peaks.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    grown = peaks[1] - peaks[0]
    features = (large - small) * FEATURES * 4 / 2**20
    yield {
        "frames": f"{small:,} and {large:,}",
        "MiB": f"{peaks[0]:.0f} and {peaks[1]:.0f}",
        "grown MiB": grown,
        "of it features": features,
        "goal": "the features alone",
        "holds": _yes(grown < 4 * features + 32),  # making random frames takes copies of them
    }


def peers(setting: Setting) -> Iterator[Row]:
    """What a user would pick instead, over the same modules; only those that are installed."""
    models, members = _models(SHAPES[2], setting, "float32")
    x = torch.randn(1024, (2 * CONTEXT + 1) * FEATURES, device=setting.device)
    for name, forward in _peers(models):
        ours, theirs = _paired([lambda: members.log_probabilities(x), lambda f=forward: f(x)], repeats=5)  # type: ignore[misc]
        yield {"peer": name, "ours ms": ours * 1e3, "peer ms": theirs * 1e3, "ratio": theirs / ours}


TABLES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "batches": batches,
    "recordings": recordings,
    "automatic": automatic,
    "loading": loading,
    "gathering": gathering,
    "storing": storing,
    "memory": memory,
    "peers": peers,
}


def ceiling(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """Floating-point operations per second of one large product, the best of five."""
    size = size if device.type == "cuda" else size // 2
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / min(_seconds(lambda: a @ b) for _ in range(5))


class _Items(Dataset[Tensor]):
    """One window per item, as tutorials write it."""

    def __init__(self, piece: zoo.Stretch, order: Tensor) -> None:
        self.piece, self.order = piece, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Tensor:
        first = int(self.piece.firsts[self.order[index]])
        return self.piece.rows[first : first + 2 * self.piece.context + 1].reshape(-1)


def _spec(width: int, depth: int) -> zoo.Spec:
    options = {"width": width, "depth": depth}
    return zoo.Spec("cylinder", features=FEATURES, context=CONTEXT, classes=len(CLASSES), options=options)


def _models(shape: tuple[int, int, int], setting: Setting, precision: str) -> tuple[list[nn.Module], ensemble.Members]:
    gc.collect()
    count, width, depth = shape
    spec = _spec(width, depth)
    models = [zoo.build(spec, seed=seed).eval().to(setting.device) for seed in range(count)]
    named = {str(index): model for index, model in enumerate(models)}
    specs = dict.fromkeys(named, spec)
    return models, ensemble.from_modules(
        named, classes=CLASSES, specs=specs, device=setting.device, precision=precision
    )


def _loop(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.stack([model(x).softmax(-1) for model in models])


def _tutorial(models: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    stack = ensemble.Stack(models)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return stack(x).softmax(-1)  # type: ignore[no-any-return]  # Module is untyped

    return run


def _peers(models: list[nn.Module]) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    try:
        from torch_uncertainty.models import deep_ensembles

        yield "torch-uncertainty deep_ensembles", torch.inference_mode()(deep_ensembles(models).eval())
    except ImportError:
        print("torch-uncertainty is not installed: pip install zoo-ensemble[bench]", file=sys.stderr)
    try:
        from torchensemble import FusionClassifier, VotingClassifier

        for kind in (VotingClassifier, FusionClassifier):
            peer = kind(estimator=lambda: models[0], n_estimators=len(models), cuda=False)
            peer.estimators_, peer.n_outputs = nn.ModuleList(models), len(CLASSES)
            yield f"torchensemble {kind.__name__}", torch.inference_mode()(peer.eval())
    except ImportError:
        print("torchensemble is not installed: pip install zoo-ensemble[bench]", file=sys.stderr)


def _frames(count: int) -> zoo.FrameSet:
    """Recordings of 1,300 frames, about what read speech has."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.cat([torch.arange(0, count, 1300), torch.tensor([count])])
    return zoo.FrameSet(torch.randn(count, FEATURES, generator=generator), None, starts, CLASSES)


def _peak(frames: int) -> float:
    """MiB at most of this process after streaming so many frames."""
    members = _models((8, 128, 2), Setting(torch.device("cpu"), quick=True, ceilings={}), "float32")[1]
    with tempfile.TemporaryDirectory() as folder:
        ensemble.collect(members, _frames(frames), cache=folder, dtype="float16")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _flop(models: Sequence[nn.Module]) -> float:
    """Floating-point operations of the products for one frame."""
    return 2.0 * sum(p.numel() for model in models for p in model.parameters() if p.ndim == 2)


def _paired(works: Sequence[Work], *, repeats: int, least: float = 0.0, tidy: Work = lambda: None) -> list[float]:
    """Median seconds of each; they take turns, so that a busy moment strikes all alike. `tidy` is not timed."""
    seconds: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    tidy()
    start = time.perf_counter()
    while len(seconds[0]) < repeats or time.perf_counter() - start < least:
        for work, found in zip(works, seconds, strict=True):
            found.append(_seconds(work))
        tidy()
    return [median(found) for found in seconds]


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _row(
    shape: tuple[int, int, int],
    size: int,
    times: Sequence[float | None],
    goal: float,
    ratio: float,
    share: float,
    members: ensemble.Members,
) -> Row:
    ours, loop, stack = (None if t is None else t * 1e3 for t in times)
    (group, _), *_ = members._groups
    form = list(group.plans.values())[-1].form
    return {
        "M x width x depth": " x ".join(map(str, shape)),
        "frames": size,
        "ours ms": round(ours or 0, 3),
        "loop ms": round(loop or 0, 3),
        "tutorial ms": None if stack is None else round(stack, 3),
        "x loop": round((loop or 0) / (ours or 1), 2),
        "of ceiling": round(share, 2),
        "goal": goal,
        "got": round(ratio, 2),
        "holds": _yes(ratio >= goal),
        "plan": f"{form.kind} {form.precision} {form.together} at {form.tile}",
    }


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"


def _machine(setting: Setting) -> str:
    capabilities = torch.cpu.get_capabilities()
    name = torch.cuda.get_device_name() if setting.device.type == "cuda" else capabilities.get("cpu_name", "")
    rates = ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in setting.ceilings.items())
    return (
        f"{name}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; product: {rates}"
    )


if __name__ == "__main__":
    main()
