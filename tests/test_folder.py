"""An ensemble as a folder for the hub: it comes back the same, and its card says how good it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open

import ensemble
import zoo
from zoo import FrameSet


@pytest.fixture
def home(tmp_path: Path) -> zoo.Registry:
    """Three members, of two contexts, and an ensemble "final" in which one of them has no weight."""
    registry = zoo.Registry(tmp_path / "registry.json")
    for number, context in enumerate((1, 2, 1)):
        spec = zoo.Spec("mlp", features=6, context=context, classes=4, options={"widths": (5,)})
        registry.register(f"m{number}", zoo.build(spec, seed=number), spec=spec, classes=[*"abcd"])
    members = ensemble.load(registry, "m*")
    registry.register_ensemble("final", ensemble.Ensemble(members, ensemble.WeightedMean([0.5, 0.5, 0.0])))
    return registry


def test_it_comes_back_the_same(home: zoo.Registry, frames: FrameSet, tmp_path: Path) -> None:
    """Members, rule and classes, from the folder alone; and its ONNX file says the same."""
    folder = ensemble.run.export_folder(home, "final", tmp_path / "out", frames=frames)
    final, back = ensemble.load_ensemble(home, "final"), ensemble.from_pretrained(folder)
    np.testing.assert_array_equal(back.predict_proba(frames), final.predict_proba(frames))
    assert (back.members.names, back.rule) == (final.members.names, final.rule)
    one = frames.select(torch.tensor([0]))
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    rows = session.run(["probabilities"], {"features": one.features.numpy()})[0]
    np.testing.assert_allclose(rows, final.predict_proba(one), atol=1e-6)
    assert json.loads((folder / "model.onnx.json").read_text())["classes"] == [*"abcd"]


def test_a_model_comes_back_as_an_ensemble_of_one(home: zoo.Registry, frames: FrameSet, tmp_path: Path) -> None:
    """As `ensemble predict` takes it; and a folder of neither is refused."""
    folder = zoo.export(home, "m1", tmp_path / "out")
    rows = ensemble.from_pretrained(folder).predict_proba(frames)
    wanted = ensemble.Ensemble(ensemble.load(home, "m1"), ensemble.mean).predict_proba(frames)
    np.testing.assert_array_equal(rows, wanted)
    with pytest.raises(zoo.RegistryError, match=r"expected a folder with config\.json and model.safetensors"):
        ensemble.from_pretrained(tmp_path)


def test_other_tools_open_the_weights(home: zoo.Registry, tmp_path: Path) -> None:
    """The metadata name the format that they ask for; the weights are those of the checkpoint."""
    folder = zoo.export(home, "m0", tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    wanted = home.checkpoint("m0").tensors
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_card(home: zoo.Registry, frames: FrameSet, tmp_path: Path, command: Callable[..., Any]) -> None:
    """The figures of the report with their interval, the intended use, and the notes; by the command."""
    zoo.write_corpus(frames, tmp_path / "corpus", "dev")
    where = ("--registry", home.path, "--corpus", tmp_path / "corpus", "--valid", "dev", "--test", "dev")
    words = ("--use", "Lessons on frames.")
    answer = command("ensemble export final --json", tmp_path / "out", *where, *words, code=0).data
    card = (tmp_path / "out" / "README.md").read_text()
    (rule,) = answer["report"]["rules"]
    gain = f"{rule['gain']:+.4f} ({rule['gain_low']:+.4f} .. {rule['gain_high']:+.4f})"
    assert f"| **final** | {rule['accuracy']:.4f} | {rule['log_loss']:.4f} | " in card
    assert f"| {gain} |" in card
    assert "**Intended use.** Lessons on frames." in card
    assert f"**Results** on {len(frames)} frames of 5 recordings." in card
    assert all(note in card for note in answer["report"]["notes"])


def test_a_licence_is_kept_once_the_folder_is_written(
    home: zoo.Registry, frames: FrameSet, tmp_path: Path, command: Callable[..., Any]
) -> None:
    """A folder that cannot be written leaves the registry byte for byte; without a licence it is not written at all."""
    zoo.write_corpus(frames, tmp_path / "corpus", "dev")
    where = ("--registry", home.path, "--corpus", tmp_path / "corpus", "--valid", "dev", "--test", "dev")
    before, stamp = home.path.read_bytes(), home.path.stat().st_mtime_ns
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    wrong = command("ensemble export final --licence MIT", full, *where, code=2)
    assert "expected a new or empty folder" in wrong.err
    command("ensemble export final", tmp_path / "plain", *where, code=0)
    assert (home.path.read_bytes(), home.path.stat().st_mtime_ns) == (before, stamp)
    command("ensemble export final --licence MIT", tmp_path / "out", *where, code=0)
    assert home.get_ensemble("final").licence == "MIT"
    assert "**Licence.** MIT" in (tmp_path / "out" / "README.md").read_text()


def test_flags_that_cannot_act_are_refused(home: zoo.Registry, tmp_path: Path, command: Callable[..., Any]) -> None:
    """Those of a folder with a file, and those of a file with a folder; nothing is written."""
    where = ("--registry", home.path)
    assert "with a folder" in command("ensemble export final --licence MIT", tmp_path / "a.onnx", *where, code=2).err
    assert "with a file" in command("ensemble export final --each", tmp_path / "a", *where, code=2).err
    assert home.get_ensemble("final").licence == ""
    assert not list(tmp_path.glob("a*"))
