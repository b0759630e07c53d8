"""One combined model by three ways out: the registry, a folder, an ONNX file; sizes, start-up, latency, throughput.

    python -m benchmarks.shipping

The README's `weighted` ensemble of the bundled members, its weights fitted on the validation frames. Start-up is that
of whole processes, from their start to the first answer. Contenders take turns; a ratio is one of medians.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from torch import Tensor

import ensemble
import zoo
from benchmarks.contenders import Setting, machine, paired, seconds
from zoo import _console

Row = dict[str, object]
_HOME = Path(__file__).parents[1]
_REPORT = "; import pathlib; print(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
_READ = "import numpy as np, sys; x = np.load({x!r})"
_ONNX = (
    _READ
    + "; import onnxruntime; s = onnxruntime.InferenceSession({file!r}); s.run(None, {{s.get_inputs()[0].name: x}})"
)
_OURS = (
    _READ + "; import ensemble, zoo, torch; e = ensemble.load_ensemble(zoo.Registry({file!r}), 'final')"
    "; e.predict_proba(torch.from_numpy(x))"
)


def main() -> None:
    """Print four tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", type=Path, default=_HOME / "registry.json")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    print(machine(Setting(torch.device("cpu"), quick=True, ceilings={})))
    print(f"onnxruntime {onnxruntime.__version__}, {os.cpu_count()} processors")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        final = saved(zoo.Registry(given.registry), home)
        files = exported(final, home)
        for title, rows in (
            ("sizes", sizes(final, home, files)),
            ("agreement with predict_proba on the validation frames", agreements(files)),
            ("from the start of the process to the first answer", startup(home, files, given.repeats)),
            ("windows of the largest context: frames a second", throughput(final, files, given.repeats)),
            ("raw features, a recording at a time: frames a second", recordings(final, files, given.repeats)),
        ):
            print(f"\n{title}")
            _console.show([_console.Table(list(rows))])


def saved(source: zoo.Registry, home: Path) -> ensemble.Ensemble:
    """The weighted ensemble, registered as "final" with its members in a registry of its own."""
    registry = zoo.Registry(home / "registry.json")
    for entry in source.entries():
        registry.register(entry.name, source.checkpoint(entry))
    members = ensemble.load(registry, "*")
    rule = ensemble.fit_weights(ensemble.collect(members, zoo.sample_corpus("valid"))).rule
    registry.register_ensemble("final", ensemble.Ensemble(members, rule))
    zoo.export(registry, "final", home / "folder")
    return ensemble.load_ensemble(registry, "final")


def exported(final: ensemble.Ensemble, home: Path) -> dict[str, zoo.onnx.Exported]:
    """The ONNX files by name: windows in three precisions, and raw features in."""
    valid = zoo.sample_corpus("valid")
    files = {
        precision: final.to_onnx(home / f"{precision}.onnx", precision=precision, frames=valid, most_changed=1.0)
        for precision in ("float32", "float16", "int8")
    }
    return files | {"features in": final.to_onnx(home / "features.onnx", with_windows=True, frames=valid)}


def sizes(final: ensemble.Ensemble, home: Path, files: dict[str, zoo.onnx.Exported]) -> Iterator[Row]:
    """Bytes, and the ratio to four bytes for every parameter of the members that count."""
    used = final.rule.used if isinstance(final.rule, ensemble.rules.FittedRule) else None
    about = final.members.about
    weights = 4 * sum(about[place].parameters or 0 for place in used or range(len(about)))
    folder = sum(path.stat().st_size for path in (home / "folder").rglob("*") if path.is_file())
    for name, size in [("folder", folder), *((name, written.size) for name, written in files.items())]:
        yield {"way out": name, "bytes": f"{size:,}", "x weights": round(size / weights, 3)}


def agreements(files: dict[str, zoo.onnx.Exported]) -> Iterator[Row]:
    """As each file's export measured it."""
    for name, written in files.items():
        found = written.agreement
        assert found is not None
        moved, changed = f"{found.moved:.1e}", f"{found.changed:.3%}"
        yield {
            "file": name,
            "frames": f"{found.frames:,}",
            "moved": moved,
            "changed": changed,
            "accuracy": found.accuracy,
        }


def startup(home: Path, files: dict[str, zoo.onnx.Exported], repeats: int) -> Iterator[Row]:
    """Seconds and peak memory of a process that loads the ensemble and answers one frame."""
    x = str(home / "x.npy")
    np.save(x, np.zeros((1, columns(files["float32"].path)), dtype=np.float32))
    programs = {
        "onnxruntime, float32": _ONNX.format(x=x, file=str(files["float32"].path)),
        "onnxruntime, int8": _ONNX.format(x=x, file=str(files["int8"].path)),
        "this package, registry": _OURS.format(x=x, file=str(home / "registry.json")),
    }
    taken: dict[str, list[float]] = {name: [] for name in programs}
    peak: dict[str, int] = {}
    for _ in range(max(3, repeats // 3)):
        for name, program in programs.items():
            command = [sys.executable, "-c", program + _REPORT]
            done: list[str] = []
            taken[name].append(seconds(lambda: done.append(output(command))))  # noqa: B023  # called at once
            peak[name] = int(done[0]) // 1024
    for name, times in taken.items():
        yield {"process": name, "seconds": round(median(times), 2), "peak MiB": peak[name]}


def output(command: list[str]) -> str:
    """What a program prints, run with this project on its path."""
    environment = os.environ | {"PYTHONPATH": str(_HOME)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def columns(file: Path) -> int:
    """Length of one row of a file's input."""
    return int(onnxruntime.InferenceSession(file).get_inputs()[0].shape[1])


def runner(file: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A file as a function, on as many threads as torch has, which do not spin while other contenders run."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options)
    name = session.get_inputs()[0].name
    return lambda x: session.run(["probabilities"], {name: x})[0]


def throughput(final: ensemble.Ensemble, files: dict[str, zoo.onnx.Exported], repeats: int) -> Iterator[Row]:
    """Frames a second in batches of several sizes: onnxruntime, our engine, and the plain loop over the modules."""
    members = final.members
    modules = [(member.module, member.spec.context if member.spec else 0) for member in members]
    widest, features = max(context for _, context in modules), 27

    @torch.inference_mode()
    def loop(x: Tensor) -> Tensor:
        cut = [
            x[:, (widest - context) * features : x.shape[1] - (widest - context) * features] for _, context in modules
        ]
        return final.rule(torch.stack([m(y).softmax(-1) for (m, _), y in zip(modules, cut, strict=True)]))

    sessions = {name: runner(files[name].path) for name in ("float32", "float16", "int8")}
    for count in (1, 64, 1024):
        x = torch.randn(count, columns(files["float32"].path), generator=torch.Generator().manual_seed(0))
        array = x.numpy()
        works = [lambda: final.predict_proba(x), lambda: loop(x)]  # noqa: B023  # called before the loop goes on
        works += [lambda run=run: run(array) for run in sessions.values()]  # type: ignore[misc]  # noqa: B023
        names = ["ours", "loop", *(f"onnxruntime {name}" for name in sessions)]
        rates = [count / taken for taken in paired(works, repeats=repeats, least=1.0)]
        yield {"frames": count, **{name: f"{rate:,.0f}" for name, rate in zip(names, rates, strict=True)}} | {
            "float32 x ours": round(rates[2] / rates[0], 2),
            "float32 x loop": round(rates[2] / rates[1], 2),
        }


def recordings(final: ensemble.Ensemble, files: dict[str, zoo.onnx.Exported], repeats: int) -> Iterator[Row]:
    """Frames a second over whole recordings: windows cut inside the file, outside of it, and by our engine."""
    frames = zoo.sample_corpus("test").select(torch.arange(20))
    pieces = [slice(*bounds) for bounds in pairwise(frames.starts.tolist())]
    inside, outside = runner(files["features in"].path), runner(files["float32"].path)
    features = [frames.features[some].numpy() for some in pieces]
    places = [torch.arange(some.start, some.stop) for some in pieces]
    context = max(member.spec.context for member in final.members if member.spec)
    works = [
        lambda: [inside(x) for x in features],
        lambda: [outside(zoo.windows(frames, centres, context).numpy()) for centres in places],
        lambda: final.predict_proba(frames),
    ]
    taken = paired(works, repeats=repeats, least=1.0)
    for name, one in zip(("windows in the file", "windows outside", "this package"), taken, strict=True):
        yield {
            "way": name,
            "frames a second": f"{len(frames) / one:,.0f}",
            "x windows outside": round(taken[1] / one, 2),
        }


if __name__ == "__main__":
    main()
