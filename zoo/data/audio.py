"""MFCC frames from waveforms and audio files; time and frequency masks over windows of frames.

The only module that imports torchaudio, and it does so only where audio becomes features. The front end is fixed,
because a model is useless on features other than its own: 16 kHz, 25 ms Hann windows every 10 ms, 40 mel bands, 27
coefficients, raw. See `normalisation` for the rest.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo._names import checked

SAMPLE_RATE = 16_000  # Hz
WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
MEL_BANDS = 40
COEFFICIENTS = 27


def mfcc(waveform: Tensor | NDArray[np.floating], sample_rate: int = SAMPLE_RATE) -> Tensor:
    """MFCC frames of a waveform, as in the sample corpus and in the lectures.

    Frames are centred: frame t covers 25 ms around t * 10 ms, with mirrored ends. Nothing is normalised.
    See Davis and Mermelstein, "Comparison of parametric representations for monosyllabic word recognition in
    continuously spoken sentences", IEEE TASSP 28(4), 1980.

    Args:
        waveform: (S,) or (channels, S), floating point with full scale at 1; channels are averaged.
        sample_rate: Hz; any rate but 16,000 is resampled first.

    Returns:
        (T, 27) float32 on the waveform's device, T = S // 160 + 1 with S counted at 16 kHz.

    Raises:
        ImportError: torchaudio is not installed, or was built for another torch.
        TypeError: the samples are integers.
        ValueError: the waveform is shorter than one window, not finite, or not one- or two-dimensional.

    Example:
        >>> mfcc(torch.zeros(16_000)).shape
        torch.Size([101, 27])
    """
    samples = torch.as_tensor(waveform)
    if not samples.is_floating_point():
        msg = f"expected floating-point samples with full scale at 1, got {samples.dtype}; divide 16 bits by 32768"
        raise TypeError(msg)
    if samples.dim() not in (1, 2) or samples.numel() == 0:
        msg = f"expected a waveform (S,) or (channels, S) with samples in it, got shape {tuple(samples.shape)}"
        raise ValueError(msg)
    mono = resample(samples.float().reshape(-1, samples.shape[-1]).mean(dim=0), sample_rate)
    if len(mono) < WINDOW:
        msg = f"expected {WINDOW} samples (25 ms at {SAMPLE_RATE} Hz) or more, got {len(mono)}; is time the last axis?"
        raise ValueError(msg)
    if not mono.isfinite().all():
        msg = f"expected finite samples, got {int((~mono.isfinite()).sum())} NaN or infinite of {len(mono)}"
        raise ValueError(msg)
    frames: Tensor = _front_end(mono.device)(mono)
    return frames.T.contiguous()


def _torchaudio() -> ModuleType:
    """torchaudio, of which each release is built for one release of torch."""
    try:
        import torchaudio
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # its binary was built for another torch
        release = torch.__version__.partition("+")[0]
        msg = f"MFCCs and resampling need torchaudio for torch {release}: pip install 'torchaudio<={release}' ({error})"
        raise ImportError(msg) from error
    return torchaudio  # type: ignore[no-any-return, unused-ignore]  # untyped


@cache
def _front_end(device: torch.device) -> Any:
    spectrum = {"n_fft": WINDOW, "win_length": WINDOW, "hop_length": HOP, "n_mels": MEL_BANDS, "center": True}
    return _torchaudio().transforms.MFCC(SAMPLE_RATE, COEFFICIENTS, melkwargs=spectrum).to(device)


def mfcc_file(path: str | Path) -> Tensor:
    """MFCC frames of an audio file: `read_audio`, then `mfcc`; the errors of both name the file."""
    waveform, sample_rate = read_audio(path)
    try:
        return mfcc(waveform, sample_rate)
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error


def read_audio(path: str | Path) -> tuple[Tensor, int]:
    """The samples of an audio file that libsndfile can read (WAV, FLAC, OGG, MP3, ...), and their sample rate.

    Returns:
        (S,) float32 with full scale at 1, the mean of the channels; and the file's sample rate in Hz.

    Raises:
        ImportError: soundfile is not installed (the extra `audio`).
        FileNotFoundError: there is no such file.
        ValueError: the file is not audio.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile itself is missing
        msg = "reading audio files needs soundfile: pip install 'zoo-ensemble[audio]'"
        raise ImportError(msg) from error
    if not Path(path).is_file():
        msg = f"expected an audio file, found none at {path}"
        raise FileNotFoundError(msg)
    try:
        samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)  # (S, channels)
    except soundfile.LibsndfileError as error:
        msg = f"{path}: expected audio that libsndfile can read: {error}"
        raise ValueError(msg) from error
    return torch.from_numpy(samples).mean(dim=1), int(sample_rate)


@checked
def resample(waveform: Tensor, sample_rate: int, to: int = SAMPLE_RATE) -> Tensor:
    """The same sound at another sample rate, band-limited (Hann-windowed sinc).

    See Smith, "Digital Audio Resampling", https://ccrma.stanford.edu/~jos/resample/.

    Args:
        waveform: (..., S) floating point.
        sample_rate: rate of `waveform`, Hz.
        to: wanted rate, Hz; equal rates return `waveform` itself.

    Raises:
        ImportError: as `mfcc`, unless the rates are equal.
        ValueError: a rate is not a positive whole number of Hz.
    """
    if not all(isinstance(rate, int) and rate > 0 for rate in (sample_rate, to)):
        msg = f"expected sample rates in whole Hz above 0, got {sample_rate!r} and {to!r}"
        raise ValueError(msg)
    if sample_rate == to:
        return waveform
    resampled: Tensor = _torchaudio().functional.resample(waveform, sample_rate, to)
    return resampled


@checked
def mask(windows: Tensor, *, max_time: int, max_features: int, generator: torch.Generator, around: int = 0) -> Tensor:
    """Set one run of frames and one run of features to zero in every window, drawn separately for each window.

    Zero is the mean of a normalised recording. Run lengths are uniform from 0 to the maximum. The draws are those of
    torchaudio's `mask_along_axis_iid`, made on the CPU under a seed from `generator`: each call takes one number from
    it and leaves torch's global random state as it was, and the masks are the same on every device.
    See Park et al., "SpecAugment", Interspeech 2019.

    Args:
        windows: (B, W, F); the features of one recording can be passed as (1, T, F).
        max_time: longest run of frames, from 0 (none) to W.
        max_features: longest run of features, from 0 (none) to F.
        generator: a generator on the CPU.
        around: frames at each end of a window that are not part of W: the masks are those of the middle, where all
            runs of frames are.

    Returns:
        (B, W, F), a new tensor.

    Raises:
        ValueError: `windows` is not three-dimensional, or a maximum is longer than its axis.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> masked = mask(torch.ones(2, 41, 27), max_time=8, max_features=4, generator=generator)
        >>> bool((masked == 0).any()), masked.shape
        (True, torch.Size([2, 41, 27]))
    """
    if windows.dim() != 3:
        msg = f"expected windows (B, W, F), got shape {tuple(windows.shape)}; pass one recording as features[None]"
        raise ValueError(msg)
    longest = {"max_time": max_time, "max_features": max_features}
    runs = drawn_runs(windows.shape, **longest, generator=generator, around=around)
    return blank_(windows.clone(), runs.to(windows.device))


def drawn_runs(
    shape: Sequence[int], *, max_time: int, max_features: int, generator: torch.Generator, around: int = 0
) -> Tensor:
    """What `mask` draws for windows of this shape (B, W, F): (B, 2, 2) int64 on the CPU.

    For each window, of its frames and of its features: the first that is set to zero, and the one behind the last.
    """
    seed, runs = int(torch.randint(2**62, (), generator=generator)), torch.zeros(shape[0], 2, 2, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the accelerators
        for axis, (name, longest) in enumerate({"max_time": max_time, "max_features": max_features}.items()):
            beside = 0 if axis else around
            length = shape[axis + 1] - 2 * beside
            if not 0 <= longest <= length:
                msg = f"expected {name} between 0 and {length}, the length of its axis, got {longest}"
                raise ValueError(msg)
            if longest:
                run = torch.rand(shape[0]) * (longest + 1)  # truncated below, so that `longest` is possible
                start = (torch.rand(shape[0]) * (length - run)).long() + beside
                runs[:, axis] = torch.stack([start, start + run.long()], dim=1)
    return runs


def blank_(windows: Tensor, runs: Tensor) -> Tensor:
    """The windows (B, W, F) themselves, with these runs (B, 2, 2) of `drawn_runs` set to zero."""
    for axis in (1, 2):
        places = torch.arange(windows.shape[axis], device=windows.device)
        first, behind = runs[:, axis - 1, :1], runs[:, axis - 1, 1:]  # (B, 1)
        blank = (places >= first) & (places < behind)
        windows.masked_fill_(blank[:, :, None].movedim(1, axis), 0.0)
    return windows
