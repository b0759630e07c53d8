"""The bundled corpus has what it promises, and the script in the examples makes it."""

import runpy
import subprocess
import sys
from ctypes.util import find_library
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import zoo

SAMPLES = Path(str(files("zoo") / "samples"))
SCRIPT = Path(__file__).parents[1] / "examples" / "synthesise.py"
SENTENCES = SCRIPT.with_name("sentences.txt")
RECORDINGS = sorted(SAMPLES.glob("*.wav"))

needs_script = pytest.mark.skipif(not SCRIPT.exists(), reason="no examples beside the tests")
needs_espeak = pytest.mark.skipif(find_library("espeak-ng") is None, reason="eSpeak NG's library is not installed")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """The names in the script, which belongs to neither package."""
    return runpy.run_path(str(SCRIPT))


def packed() -> dict[str, np.ndarray]:
    """The arrays of the bundled corpus."""
    with np.load(SAMPLES / "corpus.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("partition", ["train", "valid", "test"])
def test_every_class_is_in_every_partition(partition: str) -> None:
    """All 40, each with at least a hundred frames; names are sorted, as they would be in folders."""
    frames = zoo.sample_corpus(partition)
    assert frames.labels is not None
    assert int(frames.labels.bincount(minlength=40).min()) >= 100
    assert list(frames.names) == sorted(set(frames.names))


def test_no_voice_speaks_in_two_partitions() -> None:
    """And each partition has enough voices and recordings for confidence intervals."""
    arrays = packed()
    voices = {partition: set(arrays[f"{partition}_voices"]) for partition in ("train", "valid", "test")}
    assert sum(map(len, voices.values())) == len(set().union(*voices.values())) >= 24
    assert all(len(names) >= 5 for names in voices.values())
    assert all(len(arrays[f"{partition}_names"]) >= 60 for partition in voices)


def test_the_samples_are_small() -> None:
    """At most 8 MB for the corpus and 100 kB for a recording."""
    assert (SAMPLES / "corpus.npz").stat().st_size <= 8_000_000
    assert len(RECORDINGS) == 3
    assert all(path.stat().st_size < 100_000 for path in RECORDINGS)


@needs_script
def test_a_frame_is_labelled_by_the_phoneme_at_its_centre(script: dict[str, Any]) -> None:
    """Silence to 15 ms, then AA R sharing 15 ... 55 ms evenly, then silence; centres at 0, 10, 20 ... ms."""
    labels = script["frame_labels"]([(0.015, "A@"), (0.055, "_")], 0.08, 8)
    assert [zoo.PHONEMES[label] for label in labels] == ["[SIL]", "[SIL]", "AA", "AA", "R", "R", "[SIL]", "[SIL]"]


@needs_script
def test_mnemonics_cover_all_phonemes(script: dict[str, Any]) -> None:
    """Every class can be synthesised, and nothing but classes."""
    assert set(" ".join(script["ARPABET"].values()).split()) == set(zoo.PHONEMES)


@needs_script
def test_an_unknown_mnemonic_is_named(script: dict[str, Any]) -> None:
    """A phoneme of another language stops the script."""
    with pytest.raises(SystemExit, match="'y:' has no ARPAbet phoneme"):
        script["frame_labels"]([(0.0, "y:")], 0.1, 10)


@needs_script
def test_no_two_recordings_say_the_same(script: dict[str, Any]) -> None:
    """In the whole plan, which depends on the seed."""
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    takes = script["plan"](sentences, 9, 0)
    assert len({take.sentence for take in takes}) == len(takes) == 558
    assert takes != script["plan"](sentences, 9, 1)


@needs_script
@needs_espeak
def test_the_script_makes_the_bundled_corpus(script: dict[str, Any]) -> None:
    """Its first recording: samples within one step of 16 bits (processors round differently), labels exactly."""
    espeak = script["Espeak"]()
    if espeak.version != "1.51":
        pytest.skip(f"eSpeak NG {espeak.version} speaks differently from 1.51")
    made = script["record"](espeak, script["plan"](SENTENCES.read_text(encoding="utf-8").splitlines(), 9, 0)[0])
    bundled, _ = soundfile.read(SAMPLES / f"{made.take.name}.wav", dtype="int16")
    np.testing.assert_allclose(made.samples, bundled, atol=1)
    first = zoo.sample_corpus("train").select(torch.tensor([0]))
    assert first.names == (made.take.name,)
    assert first.labels is not None
    assert first.labels.tolist() == made.labels.tolist()
    with pytest.raises(SystemExit, match="variant 'nobody'"):
        espeak.say("Hello.", "nobody", rate=170, pitch=50, spread=50)


@needs_script
@needs_espeak
def test_both_layouts_hold_the_same_corpus(tmp_path: Path) -> None:
    """One run packs, another writes folders: equal up to float16, so a run can be repeated."""
    for options in (["corpus.npz", "--wave", "test-max-00"], ["root", "--folders"]):
        command = [sys.executable, str(SCRIPT), *options, "--per-voice", "1", "--seed", "5"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with np.load(tmp_path / "corpus.npz", allow_pickle=False) as arrays:
        for partition in ("train", "valid", "test"):
            frames = zoo.read_corpus(tmp_path / "root", partition)
            assert frames.labels is not None
            assert list(arrays[f"{partition}_names"]) == list(frames.names)
            assert np.array_equal(arrays[f"{partition}_features"], frames.features.half().numpy())
            assert np.array_equal(arrays[f"{partition}_labels"], frames.labels.numpy())
            assert np.array_equal(arrays[f"{partition}_starts"], frames.starts.numpy())
    assert (tmp_path / "test-max-00.wav").exists()
