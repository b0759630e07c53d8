"""MFCC frames of audio, and masks over windows."""

import subprocess
import sys
from importlib.resources import files
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import zoo

SAMPLES = Path(str(files("zoo") / "samples"))
AN4 = Path(__file__).parents[2] / "shared" / "data" / "an4" / "dev"


def noise(*shape: int) -> Tensor:
    """Quiet noise, the same in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.1


def slow_mfcc(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """MFCC frame by frame by its definition: Hann, power, HTK triangles, decibels down to -80, cosine transform."""
    padded = np.pad(samples, 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    mels = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42)
    corners = 700 * (10 ** (mels / 2595) - 1)
    hertz = np.arange(201) * 40.0
    frames = []
    for start in range(0, len(samples) + 1, 160):
        power = np.abs(np.fft.rfft(padded[start : start + 400] * window)) ** 2
        bands = [
            np.sum(power * np.maximum(0, np.minimum((hertz - a) / (b - a), (c - hertz) / (c - b))))
            for a, b, c in zip(corners, corners[1:], corners[2:], strict=False)
        ]
        frames.append(10 * np.log10(np.maximum(bands, 1e-10)))
    decibels = np.maximum(frames, np.max(frames) - 80)  # (T, 40)
    angles = np.pi / 40 * np.outer(np.arange(40) + 0.5, np.arange(27))
    scale = np.sqrt(np.where(np.arange(27) == 0, 1, 2) / 40)
    coefficients: NDArray[np.float64] = decibels @ (np.cos(angles) * scale)
    return coefficients


def test_mfcc_is_what_the_definitions_give() -> None:
    """Against a slow loop in float64; the tolerance is that of float32 over values near 500."""
    samples = noise(4_000)
    samples[1_500:3_000] *= 1e-5  # deep enough for the floor of -80 dB
    np.testing.assert_allclose(zoo.mfcc(samples), slow_mfcc(samples.double().numpy()), atol=5e-3)


@given(samples=st.integers(400, 3_000))
@settings(max_examples=20, deadline=None)
def test_one_frame_every_ten_milliseconds_and_one_more(samples: int) -> None:
    """T = S // 160 + 1 for any length of one window or more; float32, finite."""
    frames = zoo.mfcc(noise(samples), 16_000)
    assert frames.shape == (samples // 160 + 1, 27)
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()


def test_silence_has_finite_features() -> None:
    """All zeros: no logarithm of zero."""
    assert zoo.mfcc(torch.zeros(1_600)).isfinite().all()


def test_channels_are_averaged() -> None:
    """(channels, S) is averaged; NumPy arrays and float64 are accepted too."""
    stereo = noise(2, 1_600)
    torch.testing.assert_close(zoo.mfcc(stereo), zoo.mfcc(stereo.mean(dim=0)))
    torch.testing.assert_close(zoo.mfcc(stereo.double().numpy()), zoo.mfcc(stereo))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(rate: int) -> None:
    """A tone sampled at any rate is the tone sampled at 16 kHz, except at the ends of the filter."""

    def tone(rate: int) -> Tensor:
        return torch.sin(2 * torch.pi * 440 * torch.arange(rate) / rate)

    resampled = zoo.data.resample(tone(rate), rate)
    torch.testing.assert_close(resampled[100:-100], tone(16_000)[100:-100], atol=0.01, rtol=0)
    assert zoo.mfcc(tone(rate), rate).shape == (101, 27)


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.wav")), ids=lambda path: path.stem)
def test_a_bundled_recording_gives_its_features_in_the_corpus(path: Path) -> None:
    """The corpus was computed from the same 16-bit samples, so that only the rounding to float16 (2 ** -11) remains."""
    frames = zoo.sample_corpus(path.stem.split("-")[0])
    stored = frames.select(torch.tensor([frames.names.index(path.stem)])).features
    torch.testing.assert_close(zoo.data.mfcc_file(path), stored, rtol=2**-11, atol=1e-4)


@pytest.mark.skipif(not AN4.exists(), reason="no AN4 beside the project")
def test_real_recordings_give_the_features_others_computed() -> None:
    """AN4's FLAC files were cut after the features were computed, so that two frames at each end differ."""
    for path in sorted((AN4 / "wav").glob("*.flac"))[:10]:
        theirs = np.load(AN4 / "mfcc" / f"{path.stem}.npy", allow_pickle=False)
        ours = zoo.data.mfcc_file(path).numpy()[: len(theirs)]
        np.testing.assert_allclose(ours[2:-2], theirs[2:-2], atol=1e-3, err_msg=path.stem)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_audio_files_are_read_as_mono_with_their_rate(kind: str, tmp_path: Path) -> None:
    """Two channels come back as their mean, and the rate is the file's."""
    path = tmp_path / f"stereo.{kind}"
    stereo = noise(800, 2)
    soundfile.write(path, stereo.numpy(), 8_000, subtype="PCM_16")
    waveform, rate = zoo.read_audio(path)
    assert rate == 8_000
    torch.testing.assert_close(waveform, stereo.mean(dim=1), atol=2**-15, rtol=0)


REFUSED = {
    "empty": (torch.zeros(0), 16_000, ValueError, r"with samples in it, got shape \(0,\)"),
    "three axes": (torch.zeros(1, 1, 800), 16_000, ValueError, r"got shape \(1, 1, 800\)"),
    "short": (torch.zeros(399), 16_000, ValueError, "expected 400 samples .* got 399"),
    "time first": (torch.zeros(800, 2), 16_000, ValueError, "is time the last axis"),
    "nan": (torch.tensor([float("nan")] * 3 + [0.0] * 800), 16_000, ValueError, "got 3 NaN or infinite of 803"),
    "integers": (torch.zeros(800, dtype=torch.int16), 16_000, TypeError, "got torch.int16; divide"),
    "rate": (torch.zeros(800), 0, ValueError, "sample rates in whole Hz above 0, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_but_a_waveform_is_refused(case: str) -> None:
    """The message says what was expected and what was given."""
    waveform, rate, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        zoo.mfcc(waveform, rate)


def test_a_file_that_is_refused_is_named(tmp_path: Path) -> None:
    """Missing, not audio, too short: each message names the file."""
    text, short = tmp_path / "text.wav", tmp_path / "short.wav"
    text.write_text("no audio")
    soundfile.write(short, np.zeros(100), 16_000)
    with pytest.raises(FileNotFoundError, match=r"none at .*absent\.wav"):
        zoo.data.mfcc_file(tmp_path / "absent.wav")
    with pytest.raises(ValueError, match=r"text\.wav: expected audio"):
        zoo.data.mfcc_file(text)
    with pytest.raises(ValueError, match=r"short\.wav: expected 400 samples"):
        zoo.data.mfcc_file(short)


def test_without_soundfile_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that reads audio files is an extra."""
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"zoo-ensemble\[audio\]"):
        zoo.read_audio("any.wav")


def test_without_torchaudio_the_error_says_what_to_install() -> None:
    """That of torch's release; masks, and so training, do without it."""
    code = (
        "import sys; sys.modules['torchaudio'] = None; import torch, zoo, zoo.training; zoo.data.mask; print('fine'); "
    )
    code += "torch.__version__ = '2.9.1+cu128'; zoo.mfcc(torch.zeros(16_000))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n"
    assert (
        "ImportError: MFCCs and resampling need torchaudio for torch 2.9.1: pip install 'torchaudio<=2.9.1'"
        in done.stderr
    )


def runs(blank: Tensor) -> list[int]:
    """Lengths of the runs of true values."""
    return [len(list(group)) for value, group in groupby(blank.tolist()) if value]


@given(seed=st.integers(0, 2**31), max_time=st.integers(0, 9), max_features=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_mask_blanks_one_run_on_each_axis(seed: int, max_time: int, max_features: int) -> None:
    """At most one run per axis and window, no longer than the maximum; everything else is unchanged."""
    windows = noise(4, 9, 5) + 10
    generator = torch.Generator().manual_seed(seed)
    masked = zoo.data.mask(windows, max_time=max_time, max_features=max_features, generator=generator)
    for blank in masked == 0:
        rows, columns = blank.all(dim=1), blank.all(dim=0)
        assert len(runs(rows)) <= 1
        assert sum(runs(rows)) <= max_time or columns.all()
        assert len(runs(columns)) <= 1
        assert sum(runs(columns)) <= max_features or rows.all()
        assert torch.equal(blank, rows[:, None] | columns[None, :])
    assert torch.equal(masked[masked != 0], windows[masked != 0])


def test_masks_are_those_of_torchaudio() -> None:
    """The runs that torchaudio draws, time first, under the seed that the generator gives."""
    windows = noise(16, 41, 27)
    ours = zoo.data.mask(windows, max_time=12, max_features=6, generator=torch.Generator().manual_seed(7))
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(7)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theirs = torchaudio.functional.mask_along_axis_iid(windows, 13, 0.0, axis=1)
        theirs = torchaudio.functional.mask_along_axis_iid(theirs, 7, 0.0, axis=2)
    assert torch.equal(ours, theirs)


def test_masks_follow_the_generator_and_nothing_else() -> None:
    """Equal seeds give equal masks whatever torch's global state, which stays as it is; the next call draws anew."""
    windows = torch.ones(8, 41, 27)

    def draw(generator: torch.Generator) -> Tensor:
        return zoo.data.mask(windows, max_time=20, max_features=10, generator=generator)

    generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state()
    first, second = draw(generator), draw(generator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(first, draw(torch.Generator().manual_seed(3)))
    assert not torch.equal(first, second)
    assert any(not torch.equal(window, first[0]) for window in first)  # each window its own


def test_every_length_up_to_the_maximum_comes_up() -> None:
    """0, 1, 2 and 3 frames about equally often; with both maxima at 0 the windows come back unchanged."""
    windows = torch.ones(4_000, 10, 1)
    masked = zoo.data.mask(windows, max_time=3, max_features=0, generator=torch.Generator().manual_seed(0))
    lengths = (masked == 0).sum(dim=(1, 2)).bincount()
    torch.testing.assert_close(lengths / 4_000, torch.full((4,), 0.25), atol=0.03, rtol=0)
    whole = zoo.data.mask(windows, max_time=0, max_features=0, generator=torch.Generator())
    assert torch.equal(whole, windows)


def test_impossible_masks_are_refused() -> None:
    """A maximum beyond its axis, and features without the batch axis."""
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"expected max_time between 0 and 5, .* got 6"):
        zoo.data.mask(torch.ones(2, 5, 3), max_time=6, max_features=0, generator=generator)
    with pytest.raises(ValueError, match=r"expected max_features between 0 and 3, .* got -1"):
        zoo.data.mask(torch.ones(2, 5, 3), max_time=0, max_features=-1, generator=generator)
    with pytest.raises(ValueError, match=r"got shape \(5, 3\); pass one recording as features\[None\]"):
        zoo.data.mask(torch.ones(5, 3), max_time=1, max_features=1, generator=generator)
