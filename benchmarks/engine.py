"""Members as one against a loop, the tutorial's stack, peers, and the machine's own limit.

    python -m benchmarks.engine [--quick] [--device cuda]

One row per goal: ours, the loop `torch.stack([m(x).softmax(-1) for m in models])`, the tutorial's
stack_module_state + functional_call + vmap, and the share of the best matrix product of this machine.
Contenders take turns; a ratio is one of medians. Speeds of a shared machine mean nothing across runs.
"""

# ruff: noqa: B023  # what is defined in a loop is called before the loop goes on

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import ensemble
import zoo
from benchmarks.contenders import (
    CLASSES,
    CONTEXT,
    FEATURES,
    Setting,
    Shape,
    ceilings,
    compiled,
    flop_of,
    looped,
    machine,
    models_of,
    paired,
    peers_of,
    random_frames,
    seconds,
    spec_of,
    vmapped,
)
from ensemble.run.collection import feed_of
from zoo import _console

Row = dict[str, object]


def main() -> None:
    """Print one table per kind of goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches, three repeats")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=list(TABLES), help="one of the tables")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # the child of `memory`
    given = parser.parse_args()
    if given.peak is not None:
        print(_peak(given.peak))
        return
    device = torch.device(given.device)
    setting = Setting(device, given.quick, ceilings(device))
    print(machine(setting))
    for name in [given.only] if given.only else TABLES:
        rows = []
        for row in TABLES[name](setting):
            rows.append({key: float(f"{v:.3g}") if isinstance(v, float) else v for key, v in row.items()})
            print(name, *rows[-1].values(), file=sys.stderr, flush=True)
        if rows:
            _console.show([_console.Table(rows, title=f"\n{name}")])


def batches(setting: Setting) -> Iterator[Row]:
    """Windows as a tensor, float32: never slower than the loop or the tutorial."""
    for shape in setting.shapes:
        models, members = models_of(shape, setting, "float32")
        tutorial = vmapped(models)
        for size in (1, 64, 1024, 8192, 65_536)[: 3 if setting.quick else 5]:
            x = torch.randn(size, (2 * CONTEXT + 1) * FEATURES, device=setting.device)
            flop = flop_of(models) * size
            times = paired(
                [lambda: members.log_probabilities(x), lambda: looped(models, x), lambda: tutorial(x)],
                repeats=setting.repeats(3 * flop),
                least=0.0 if setting.quick else 0.2,
            )
            ours, loop, stack = times
            goal = 2.0 if size <= 64 and shape[0] >= 32 else 0.97
            ratio = loop / ours if goal == 2 else min(loop, stack) / ours
            yield _row(shape, size, times, goal, ratio, flop / ours / setting.ceilings["float32"], members)


def recordings(setting: Setting) -> Iterator[Row]:
    """Neighbouring frames: the first layer in the frequency domain."""
    frames = random_frames(2048 if setting.quick else 65_536)
    every = zoo.windows(frames, torch.arange(len(frames)), CONTEXT).to(setting.device)
    precisions = ["float32", "auto"] if setting.has_bfloat16 else ["float32"]
    for precision, (shape, goal) in product(precisions, ((setting.shapes[1], 1.2), (setting.shapes[2], 1.4))):
        models, members = models_of(shape, setting, precision)
        flop = flop_of(models) * len(frames)
        ours, loop = paired(
            [
                lambda: ensemble.collect(members, frames),
                lambda: torch.cat([looped(models, x).cpu() for x in torch.split(every, 1024)], dim=1),
            ],
            repeats=setting.repeats(flop),
        )
        found = ensemble.collect(members, frames).probabilities[:, :4096]
        expected = torch.cat([looped(models, x).cpu() for x in torch.split(every[:4096], 1024)], dim=1)
        apart = float((found - expected).abs().max())
        share = flop / ours / setting.ceilings["bfloat16" if precision == "auto" else "float32"]
        near = apart <= (1e-5 if precision == "float32" else 1e-2)
        yield _row(shape, len(frames), [ours, loop, None], goal, loop / ours if near else 0.0, share, members) | {
            "moved": f"{apart:.1e}"
        }


def automatic(setting: Setting) -> Iterator[Row]:
    """Windows as a tensor, automatic precision, where the hardware has a faster type."""
    for shape in setting.shapes if setting.has_bfloat16 else ():
        models, members = models_of(shape, setting, "auto")
        for size in (1024, 8192)[: 1 if setting.quick else 2]:
            x = torch.randn(size, (2 * CONTEXT + 1) * FEATURES, device=setting.device)
            flop = flop_of(models) * size
            ours, loop = paired(
                [lambda: members.log_probabilities(x), lambda: looped(models, x)],
                repeats=setting.repeats(flop),
                least=0.0 if setting.quick else 0.2,
            )
            share = flop / ours / setting.ceilings["bfloat16"]
            goal = 3.5 if shape[1] >= 128 else 0.97
            yield _row(shape, size, [ours, loop, None], goal, loop / ours, share, members)


def loading(setting: Setting) -> Iterator[Row]:
    """Checkpoints, hash-verified, into one stack, against reading and hashing their bytes."""
    for count, width, depth in ((32, 128, 4), (8, 512, 4)):
        spec = spec_of(width, depth)
        with tempfile.TemporaryDirectory() as folder:
            registry = zoo.Registry(Path(folder) / "registry.json")
            names = [f"m{seed}" for seed in range(count)]
            for seed, name in enumerate(names):
                registry.register(name, zoo.build(spec, seed=seed), spec=spec, classes=CLASSES)
            blobs = sorted(path for path in Path(folder).rglob("*.safetensors"))
            ours, plain = paired(
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
    frames = random_frames(50_000 if setting.quick else 200_000)
    piece = zoo.data.stretch(frames, CONTEXT)
    order = torch.randperm(len(frames))[:16_384]
    copy = torch.empty(1024, (2 * CONTEXT + 1) * FEATURES)
    source = torch.randn(16_384, copy.shape[1])

    def loader() -> None:
        for _ in DataLoader(_Items(piece, order), batch_size=1024, num_workers=2):
            pass

    ours, items, plain = paired(
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
    _, members = models_of(setting.shapes[2], setting, "auto")
    frames = random_frames(20_000 if setting.quick else 1_000_000)
    feed = feed_of(members, frames, torch.float16)

    def alone() -> None:
        for _ in feed(0, len(frames)):
            pass

    frames.fingerprint  # noqa: B018  # cached by the frames, and no part of either
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        store, raw = Path(folder) / "store", Path(folder) / "raw"
        block, blocks = os.urandom(len(members) * len(CLASSES) * 2 * members.step), -(-len(frames) // members.step)

        def disk() -> None:
            with raw.open("wb") as file:
                for _ in range(blocks):
                    file.write(block)
                os.fsync(file.fileno())

        def tidy() -> None:
            shutil.rmtree(store)
            raw.unlink()

        ours, plain, bare = paired(
            [lambda: ensemble.collect(members, frames, cache=store, dtype="float16"), alone, disk],
            repeats=setting.repeats(0),
            tidy=tidy,
        )
    yield {
        "frames": len(frames),
        "members": len(members),
        "stored s": ours,
        "alone s": plain,
        "disk alone s": bare,
        "ratio": ours / plain,
        "goal": "<= 1.1",
        "holds": _yes(ours / plain <= 1.1),
    }


def memory(setting: Setting) -> Iterator[Row]:
    """Peak memory of a process that streams N frames to a store, for two values of N."""
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
    models, members = models_of(setting.shapes[2], setting, "float32")
    x = torch.randn(1024, (2 * CONTEXT + 1) * FEATURES, device=setting.device)
    for name, forward in peers_of(models):
        ours, theirs = paired([lambda: members.log_probabilities(x), lambda f=forward: f(x)], repeats=5)  # type: ignore[misc]
        yield {"peer": name, "ours ms": ours * 1e3, "peer ms": theirs * 1e3, "ratio": theirs / ours}


def compiling(setting: Setting) -> Iterator[Row]:
    """What torch's own compiler makes of the loop in the same type."""
    for shape in setting.shapes[1:3]:
        types = {"float32": torch.float32} | ({"auto": torch.bfloat16} if setting.has_bfloat16 else {})
        for precision, dtype in types.items():
            models, members = models_of(shape, setting, precision)
            x = torch.randn(1024 if setting.quick else 4096, (2 * CONTEXT + 1) * FEATURES, device=setting.device)
            fast = compiled(models, dtype)
            making = seconds(lambda: fast(x))
            ours, theirs = paired(
                [lambda: members.log_probabilities(x), lambda: fast(x)],
                repeats=setting.repeats(flop_of(models) * len(x)),
            )
            yield {
                "M x width x depth": " x ".join(map(str, shape)),
                "precision": precision,
                "ours ms": ours * 1e3,
                "compiled ms": theirs * 1e3,
                "ratio": theirs / ours,
                "compiling s": making,
            }


def cascades(setting: Setting) -> Iterator[Row]:
    """Members that are asked only where they can change the class, against running all that have influence."""
    valid, test = (zoo.sample_corpus(part) for part in ("valid", "test"))
    if setting.quick:
        test = test.select(torch.arange(20))
    registry = zoo.Registry(Path(__file__).parents[1] / "registry.json")
    bundled = ensemble.load(registry, "*", device=setting.device)
    known = ensemble.collect(bundled, valid)
    weighted = ensemble.fit_weights(known).rule
    for rule in (ensemble.mean, ensemble.majority, weighted):
        yield from _cascaded("bundled", bundled, rule, known, test)
    stack = _perturbed(registry, "mlp-a", 8, setting)
    yield from _cascaded("in a stack", stack, ensemble.mean, ensemble.collect(stack, valid), test)
    untrained, frames = models_of(setting.shapes[2], setting, "float32")[1], random_frames(len(test))
    yield _against_all("untrained", untrained, ensemble.mean, ensemble.rules.Cascade(ensemble.mean), frames)


def _cascaded(
    what: str, members: ensemble.Members, rule: ensemble.Rule, valid: ensemble.MemberOutputs, test: zoo.FrameSet
) -> Iterator[Row]:
    judged = ensemble.collect(members, test)
    for loss in (None, 0.001):
        made = ensemble.fit.fit_cascade(valid, rule, loss=loss).rule
        lost = ensemble.fit.judge_cascade(judged, made).loss
        yield _against_all(what, members, rule, made, test) | {
            "accepted": "exact" if loss is None else f"{loss:.1%}",
            "lost": f"{lost.estimate:+.2%} ({lost.low:+.2%} .. {lost.high:+.2%})",
        }


def _against_all(
    what: str, members: ensemble.Members, rule: ensemble.Rule, made: ensemble.rules.Cascade, test: zoo.FrameSet
) -> Row:
    used = members.subset([members.names[place] for place in made.asked_in(len(members))])
    full, quick = ensemble.Ensemble(used, rule), ensemble.Ensemble(members, made)
    alone, ours = paired([lambda: full.predict_proba(test), lambda: quick.predict_proba(test)], repeats=5)
    asked = float(quick.ask(test)[1].mean()) / len(used)
    return {
        "members": f"{len(used)} {what}",
        "rule": getattr(rule, "__name__", type(rule).__name__),
        "asked": round(asked, 3),
        "all s": alone,
        "cascade s": ours,
        "x all": round(alone / ours, 2),
        "accepted": "exact",
        "lost": "",
    }


def _perturbed(registry: zoo.Registry, name: str, count: int, setting: Setting) -> ensemble.Members:
    """Copies of one trained model whose weights are moved at random by a quarter of their spread, as one stack."""
    entry, models = registry.get(name), {}
    torch.manual_seed(0)
    for number in range(count):
        model = registry.load(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.25 * float(parameter.std()))
        models[f"{name} {number}"] = model
    specs = dict.fromkeys(models, entry.spec)
    return ensemble.from_modules(models, classes=entry.classes, specs=specs, device=setting.device)


TABLES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "batches": batches,
    "recordings": recordings,
    "automatic": automatic,
    "loading": loading,
    "gathering": gathering,
    "storing": storing,
    "memory": memory,
    "peers": peers,
    "compiling": compiling,
    "cascade": cascades,
}


class _Items(Dataset[Tensor]):
    """One window per item, as tutorials write it."""

    def __init__(self, piece: zoo.data.Stretch, order: Tensor) -> None:
        self.piece, self.order = piece, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Tensor:
        first = int(self.piece.firsts[self.order[index]])
        return self.piece.rows[first : first + 2 * self.piece.context + 1].reshape(-1)


def _peak(frames: int) -> float:
    """Peak memory of this process in MiB, after streaming so many frames."""
    members = models_of((8, 128, 2), Setting(torch.device("cpu"), quick=True, ceilings={}), "float32")[1]
    with tempfile.TemporaryDirectory() as folder:
        ensemble.collect(members, random_frames(frames), cache=folder, dtype="float16")
    status = Path("/proc/self/status")  # getrusage would return the parent's peak, if that was higher
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024


def _row(
    shape: Shape,
    size: int,
    times: Sequence[float | None],
    goal: float,
    ratio: float,
    share: float,
    members: ensemble.Members,
) -> Row:
    ours, loop, stack = (None if t is None else t * 1e3 for t in times)
    plan = [row for row in members.plan() if row["chosen"]][-1]
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
        "plan": f"{plan['form']} {plan['precision']} at {plan['frames per step']}",
    }


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"


if __name__ == "__main__":
    main()
