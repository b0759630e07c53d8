"""ONNX files: what a runtime answers is what the model answers, and the file says how to use it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import zoo
import zoo.onnx
from zoo import FrameSet
from zoo.data.normalisation import NORMALISATIONS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def registry(tmp_path: Path) -> zoo.Registry:
    """One model "a" over windows of 3 frames of 6 features."""
    home = zoo.Registry(tmp_path / "registry.json")
    spec = zoo.Spec("basic", features=6, context=1, classes=4, options={"width": 8, "depth": 1})
    home.register("a", zoo.build(spec, seed=0), spec=spec, classes=["a", "b", "c", "d"])
    return home


def answers(file: Path, x: Tensor | np.ndarray) -> list[Any]:
    """What onnxruntime makes of an input."""
    session = onnxruntime.InferenceSession(file)
    found: list[Any] = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    return found


def test_the_file_answers_as_the_model(registry: zoo.Registry, frames: FrameSet, tmp_path: Path) -> None:
    """At batches of other sizes than it was traced with, with the classes that the probabilities say."""
    written = zoo.onnx.export_onnx(registry, "a", tmp_path / "a.onnx", frames=frames)
    model, x = registry.load("a"), zoo.windows(frames, torch.arange(len(frames)), 1)
    for count in (1, 7, 138):
        probabilities, best = answers(written.path, x[:count])
        torch.testing.assert_close(torch.tensor(probabilities), model(x[:count]).softmax(-1), atol=1e-6, rtol=0)
        assert best.tolist() == probabilities.argmax(1).tolist()
    assert written.agreement is not None
    assert written.agreement.frames == len(frames)
    assert written.agreement.changed == 0
    assert written.agreement.moved < 1e-6


def test_the_file_says_what_a_consumer_needs(registry: zoo.Registry, tmp_path: Path) -> None:
    """In its metadata, and the same in the JSON file beside it."""
    written = zoo.onnx.export_onnx(registry, "a", tmp_path / "a.onnx")
    entry = registry.get("a")
    proto = onnx.load(written.path)
    inside = {each.key: each.value for each in proto.metadata_props}
    beside = json.loads(Path(f"{written.path}.json").read_text())
    assert {key: json.loads(inside[key]) for key in ("classes", "input", "members", "outputs")} == {
        "classes": ["a", "b", "c", "d"],
        "input": {
            "kind": "windows",
            "columns": 18,
            "features": 6,
            "context": 1,
            "normalisation": "mean_std",
            "padding": "recording",
        },
        "members": [{"name": "a", "reference": f"a@{entry.id}", "sha256": entry.sha256}],
        "outputs": ["probabilities", "class"],
    }
    text = ("format", "precision", "version")
    assert beside == {key: value if key in text else json.loads(value) for key, value in inside.items()}
    assert written.size == written.path.stat().st_size


def test_windows_inside_the_file(frames: FrameSet, tmp_path: Path) -> None:
    """Every normalisation of the table: raw features of a recording become the windows that `zoo.windows` cuts."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = nn.ModuleList(zoo.onnx.Recording(2, name) for name in NORMALISATIONS)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            rows = torch.cat([each(x) for each in self.each])
            return rows, rows.argmax(-1)

    zoo.onnx.write(Windows(), tmp_path / "w.onnx", contract={"input": {"kind": "features"}}, columns=6)
    for recording in range(frames.recordings):  # one of them has a single frame
        one = frames.select(torch.tensor([recording]))
        wanted = torch.cat([zoo.windows(one, torch.arange(len(one)), 2, name) for name in NORMALISATIONS])
        torch.testing.assert_close(torch.tensor(answers(tmp_path / "w.onnx", one.features)[0]), wanted)


@pytest.mark.parametrize(("precision", "share"), [("float16", 0.6), ("int8", 0.4)])
def test_smaller_weights(precision: str, share: float, frames: FrameSet, tmp_path: Path) -> None:
    """The file shrinks; how it agrees is measured and recorded."""
    registry = zoo.Registry(tmp_path / "registry.json")
    spec = zoo.Spec("cylinder", features=6, context=3, classes=4, options={"width": 256, "depth": 2})
    entry = registry.register("m", zoo.build(spec, seed=1), spec=spec, classes=[*"abcd"])
    file = tmp_path / "small.onnx"
    small = zoo.onnx.export_onnx(registry, "m", file, precision=precision, frames=frames, most_changed=1.0)
    assert small.size < share * 4 * entry.parameters
    assert small.agreement is not None
    assert 1e-6 < small.agreement.moved < 0.1
    assert json.loads(Path(f"{file}.json").read_text())["agreement"]["moved"] == small.agreement.moved


def test_the_agreement_counts_by_hand(tmp_path: Path) -> None:
    """One of four frames changes its class, by a file whose third class is worth nothing."""

    class Turned(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            rows = x if torch.compiler.is_exporting() else x * torch.tensor([1.0, 1.0, 10.0])
            rows = rows / rows.sum(-1, keepdim=True)
            return rows, rows.argmax(-1)

    x = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.0, 0.0, 1.0]])
    wanted: dict[str, Any] = {"contract": {"input": {"kind": "inputs"}}, "columns": 3}
    wanted["probe"] = [(x[:3], torch.tensor([0, 0, 0])), (x[3:], None)]
    with pytest.raises(ValueError, match=r"at most 24.00% of the frames, but float32 changes 25.00%"):
        zoo.onnx.write(Turned(), tmp_path / "t.onnx", **wanted, most_changed=0.24)
    assert not list(tmp_path.iterdir())
    written = zoo.onnx.write(Turned(), tmp_path / "t.onnx", **wanted, most_changed=0.25)
    assert written.agreement is not None
    assert written.agreement.changed == 0.25
    assert written.agreement.accuracy == pytest.approx(2 / 3)
    assert written.agreement.accuracy_before == pytest.approx(1 / 3)
    assert written.agreement.moved == pytest.approx(2 / 2.8 - 0.2)


def other_classes(frames: FrameSet) -> FrameSet:
    """The same frames, their classes named in another order."""
    order = torch.tensor([2, 0, 3, 1])
    return FrameSet(frames.features, order.argsort()[frames.labels], frames.starts, tuple("abcd"[k] for k in order))


def test_labels_are_matched_by_name(frames: FrameSet) -> None:
    """Frames whose classes stand in another order have the same labels; those of other classes none."""
    spec = zoo.Spec("basic", features=6, context=1, classes=4)
    for with_windows in (False, True):
        pieces = zoo.onnx.probe(other_classes(frames), spec, [*"abcd"], with_windows=with_windows)
        assert torch.equal(torch.cat([labels for _, labels in pieces if labels is not None]), frames.labels)
    strange = FrameSet(frames.features, frames.labels, frames.starts, ("e", "f", "g", "h"))
    assert all(labels is None for _, labels in zoo.onnx.probe(strange, spec, [*"abcd"], with_windows=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "a.pt"}, r"ends in \.onnx, got 'a\.pt'"),
        ({"precision": "int4"}, "float32, float16, int8, got 'int4'"),
        ({"precision": "int8"}, "int8 is compared with float32, got none; give validation frames"),
        ({"frames": "thin"}, "frames of 6 features to compare on, got 3"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], words: str, registry: zoo.Registry, tmp_path: Path) -> None:
    """Each is refused by name before anything is written."""
    if change.get("frames") == "thin":
        change = {"frames": FrameSet(torch.zeros(4, 3), None, torch.tensor([0, 4]), ("a", "b"))}
    path = tmp_path / str(change.pop("path", "a.onnx"))
    if path.suffix == ".pt":
        words = words.replace("'a", f"'{path.with_suffix('')}")
    with pytest.raises(ValueError, match=words):
        zoo.onnx.export_onnx(registry, "a", path, **change)
    assert not path.exists()


def test_what_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    """A model that looks at its values leaves no file, and one line that says so."""

    class Looking(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            rows = x if float(x.sum()) > 0 else -x
            return rows, rows.argmax(-1)

    with pytest.raises(ValueError, match="expected a model and a rule that torch can export to ONNX, got: ") as caught:
        zoo.onnx.write(Looking(), tmp_path / "t.onnx", contract={"input": {"kind": "inputs"}}, columns=3)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_command_writes_it(
    registry: zoo.Registry, frames: FrameSet, tmp_path: Path, command: Callable[..., Any]
) -> None:
    """`zoo export --onnx`, compared on the partition named."""
    zoo.write_corpus(frames, tmp_path / "corpus", "dev")
    where = ["--registry", str(registry.path), "--corpus", str(tmp_path / "corpus"), "--valid", "dev"]
    outcome = command("zoo export a --onnx --json", tmp_path / "a.onnx", *where, code=0)
    assert outcome.data["agreement"]["frames"] == len(frames)
    assert outcome.data["agreement"]["accuracy"] is not None
    assert "with --onnx" in command("zoo export a --with-windows", tmp_path / "folder", *where, code=2).err
    assert outcome.data["bytes"] == (tmp_path / "a.onnx").stat().st_size


@pytest.fixture
def consumer(registry: zoo.Registry, frames: FrameSet, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a consumer: a file, and a recording; its answer stands in `expected`."""

    def make(*, with_windows: bool, suffix: str) -> list[str]:
        file = tmp_path / "shipped" / "a.onnx"
        file.parent.mkdir()
        zoo.onnx.export_onnx(registry, "a", file, with_windows=with_windows)
        one = frames.select(torch.tensor([2])).features.numpy()
        recording = tmp_path / "shipped" / f"recording{suffix}"
        recording.write_text(json.dumps(one.tolist()))
        if suffix == ".npy":
            np.save(recording, one)
        return [str(file), str(recording)]

    return make


def expected(registry: zoo.Registry, frames: FrameSet) -> str:
    """What both consumers print for the third recording."""
    one = frames.select(torch.tensor([2]))
    rows = registry.load("a")(zoo.windows(one, torch.arange(len(one)), 1)).softmax(-1)
    best = rows.argmax(-1)
    kept = [k for t, k in enumerate(best.tolist()) if t == 0 or k != best[t - 1]]
    return f"{' '.join('abcd'[k] for k in kept)}\n{len(one)} frames, mean confidence {rows.amax(-1).mean():.4f}\n"


@pytest.mark.parametrize("with_windows", [False, True])
def test_a_consumer_without_torch(
    *,
    with_windows: bool,
    consumer: Callable[..., list[str]],
    registry: zoo.Registry,
    frames: FrameSet,
    tmp_path: Path,
) -> None:
    """In a Python that has onnxruntime and NumPy, and neither torch nor this package."""
    site = tmp_path / "site"
    site.mkdir()
    home = Path(onnxruntime.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "google", "packaging"):
        if (home / name).exists():
            (site / name).symlink_to(home / name)
    environment = {"PYTHONPATH": str(site), "PATH": os.environ["PATH"]}
    python = [sys.executable, "-S"]  # without the packages of this environment
    absent = "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'zoo', 'ensemble')))"
    subprocess.run([*python, "-c", absent], env=environment, check=True, cwd=tmp_path)
    arguments = consumer(with_windows=with_windows, suffix=".npy")
    done = subprocess.run(
        [*python, str(EXAMPLES / "consume.py"), *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(registry, frames)


def test_a_consumer_in_javascript(
    consumer: Callable[..., list[str]], registry: zoo.Registry, frames: FrameSet, tmp_path: Path
) -> None:
    """The same file in Node, where it and its onnxruntime are installed."""
    node = shutil.which("node")
    found = node and subprocess.run(
        [node, "-e", "require.resolve('onnxruntime-node')"], cwd=EXAMPLES.parent, capture_output=True, check=False
    )
    if not found or found.returncode:
        pytest.skip("needs Node with the package onnxruntime-node, in node_modules here or in $NODE_PATH")
    arguments = consumer(with_windows=True, suffix=".json")
    done = subprocess.run(
        [str(node), str(EXAMPLES / "consume.mjs"), *arguments, f"{arguments[0]}.json"],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(registry, frames)


def test_a_file_beside_the_registry_leaves_it_alone(registry: zoo.Registry) -> None:
    """The JSON file is called after the whole name: `registry.onnx` does not write `registry.json`."""
    before = registry.path.read_bytes()
    written = zoo.onnx.export_onnx(registry, "a", registry.path.with_suffix(".onnx"))
    assert registry.path.read_bytes() == before
    assert json.loads(Path(f"{written.path}.json").read_text())["classes"] == [*"abcd"]
