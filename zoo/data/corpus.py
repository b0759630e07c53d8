"""Corpora: folders in the HW1P2 layout, read and written, and the bundled corpus of synthesised speech.

The layout is `ROOT/<partition>/mfcc/<recording>.npy`, floating point (T, F), and beside it
`ROOT/<partition>/transcript/<recording>.npy`, T + 2 strings, `[SOS]` first and `[EOS]` last. A partition
without a transcript folder has no labels. Nothing in these files is ever unpickled.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo._names import unknown
from zoo.data.frames import FrameSet

_PHONEMES = "[SIL] AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
PHONEMES: tuple[str, ...] = tuple(_PHONEMES.split())
_OTHER_SPELLINGS = {"SIL": "[SIL]"}
_SENTENCE_ENDS = (("[SOS]", "<sos>"), ("[EOS]", "<eos>"))


class CorpusError(ValueError):
    """A corpus is not in the expected layout; the message names the file."""


def read_corpus(
    root: str | Path,
    partition: str,
    *,
    classes: Sequence[str] = PHONEMES,
    features: int | None = None,
) -> FrameSet:
    """All recordings of one partition, in the order of their file names.

    If the partition has a `test_order.csv` (a header, then one file name per line), its order is used instead.
    Features are read straight into one array, so that the peak of memory is little more than the result.

    Args:
        root: the folder of the partitions.
        partition: a folder name such as "train-clean-100" or "dev-clean".
        classes: the phonemes that transcripts may contain, in the order of the labels. "SIL" is read as "[SIL]".
        features: expected number of features per frame; None takes that of the first recording.

    Returns:
        Raw features (T, F) float32, and labels (T,) without the two ends, or None if there is no
        `transcript` folder.

    Raises:
        CorpusError: a folder or a recording's partner is missing, an array has another shape or type than
            expected, a feature is not finite, or a phoneme is unknown.
    """
    folder = _partition(Path(root), partition)
    paths = _ordered(folder)
    transcripts = _partners(paths, folder / "transcript")
    shapes = [_shape(path) for path in paths]
    width = features or shapes[0][1]
    starts = torch.tensor([0] + [length for length, _ in shapes]).cumsum(0)
    values = torch.empty(int(starts[-1]), width)
    labels = None if transcripts is None else torch.empty(len(values), dtype=torch.int64)
    indices = {name: index for index, name in enumerate(classes)}
    indices |= {other: indices[name] for other, name in _OTHER_SPELLINGS.items() if name in indices} | indices
    for index, path in enumerate(paths):
        span = slice(int(starts[index]), int(starts[index + 1]))
        values[span] = _features(path, width)
        if labels is not None and transcripts is not None:
            labels[span] = _labels(transcripts[index], shapes[index][0], indices)
    return FrameSet(values, labels, starts, tuple(classes), tuple(path.stem for path in paths))


def write_corpus(frames: FrameSet, root: str | Path, partition: str) -> None:
    """Write recordings in the layout of `read_corpus`: float32 features, and transcripts if there are labels.

    Raises:
        CorpusError: the partition exists.
    """
    folder = Path(root) / partition
    if folder.exists():
        msg = f"expected a new partition, but {folder} exists; choose another name"
        raise CorpusError(msg)
    (folder / "mfcc").mkdir(parents=True)
    if frames.labels is not None:
        (folder / "transcript").mkdir()
    names = np.array(frames.classes)
    for index, name in enumerate(frames.names):
        span = slice(int(frames.starts[index]), int(frames.starts[index + 1]))
        np.save(folder / "mfcc" / f"{name}.npy", frames.features[span].cpu().numpy(), allow_pickle=False)
        if frames.labels is not None:
            transcript = np.concatenate((["[SOS]"], names[frames.labels[span].numpy()], ["[EOS]"]))
            np.save(folder / "transcript" / f"{name}.npy", transcript, allow_pickle=False)


def sample_corpus(partition: str) -> FrameSet:
    """The bundled corpus: sentences synthesised in voices that differ between "train", "valid" and "test".

    It is free of rights and small, so that everything can be tried at once; it is not real speech.

    Raises:
        ValueError: the partition is none of the three.
    """
    if partition not in ("train", "valid", "test"):
        raise ValueError(unknown("partition of the sample corpus", partition, ("train", "valid", "test")))
    with as_file(files("zoo") / "samples" / "corpus.npz") as path, np.load(path, allow_pickle=False) as packed:
        return FrameSet(
            torch.from_numpy(packed[f"{partition}_features"].astype(np.float32)),
            torch.from_numpy(packed[f"{partition}_labels"].astype(np.int64)),
            torch.from_numpy(packed[f"{partition}_starts"]),
            PHONEMES,
            tuple(packed[f"{partition}_names"].tolist()),
        )


def _labels(path: Path, frames: int, indices: Mapping[str, int]) -> Tensor:
    """(frames,) int64 from a transcript of frames + 2 strings."""
    transcript = _load(path)
    if transcript.dtype.kind != "U" or transcript.shape != (frames + 2,):
        came = f"{transcript.dtype} {transcript.shape}"
        msg = f"{path}: expected {frames + 2} strings ({frames} frames, [SOS], [EOS]), got {came}"
        raise CorpusError(msg)
    for place, end, spellings in zip(("first", "last"), transcript[[0, -1]].tolist(), _SENTENCE_ENDS, strict=True):
        if end not in spellings:
            msg = f"{path}: expected {spellings[0]!r} as its {place} string, got {end!r}"
            raise CorpusError(msg)
    names, places = np.unique(transcript[1:-1], return_inverse=True)
    found = np.array([indices.get(name, -1) for name in names.tolist()])[places]
    if found.min() < 0:
        frame = int(found.argmin())
        msg = f"{path}: frame {frame}: " + unknown("phoneme", str(transcript[frame + 1]), indices)
        raise CorpusError(msg)
    return torch.from_numpy(found)


def _partition(root: Path, partition: str) -> Path:
    folder = root / partition
    if not (folder / "mfcc").is_dir():
        there = sorted(path.parent.name for path in root.glob("*/mfcc"))
        msg = f"expected a folder {folder / 'mfcc'}; partitions under {root}: {', '.join(there) or 'none'}"
        raise CorpusError(msg)
    return folder


def _ordered(folder: Path) -> list[Path]:
    order = folder / "test_order.csv"
    if order.is_file():
        with order.open(newline="") as lines:
            names = [row[0] for row in list(csv.reader(lines))[1:] if row]
        paths = [folder / "mfcc" / f"{Path(name).stem}.npy" for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            msg = f"{order}: expected only files of {folder / 'mfcc'}, but there is no {', '.join(missing[:5])}"
            raise CorpusError(msg)
    else:
        paths = sorted((folder / "mfcc").glob("*.npy"))
    if not paths:
        msg = f"expected recordings *.npy in {folder / 'mfcc'}, got none"
        raise CorpusError(msg)
    return paths


def _partners(paths: list[Path], folder: Path) -> list[Path] | None:
    if not folder.is_dir():
        return None
    here, there = {path.name for path in paths}, {path.name for path in folder.glob("*.npy")}
    alone = sorted(here ^ there)
    if alone:
        lacking, present = ("transcript", "mfcc") if alone[0] in here else ("mfcc", "transcript")
        msg = (
            f"{folder.parent / present / alone[0]}: expected a partner of the same name in "
            f"{folder.parent / lacking}, got none ({len(alone)} such files)"
        )
        raise CorpusError(msg)
    return [folder / path.name for path in paths]


def _load(path: Path, *, header_only: bool = False) -> np.ndarray:
    """The array of one file: no archives, no Python objects; mapped into memory if only its header is needed."""
    try:
        if header_only:
            return np.lib.format.open_memmap(path, mode="r")
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # a malformed header makes NumPy raise anything from SyntaxError to MemoryError
        objects = "Python objects" in str(error) or "Object arrays" in str(error)
        hint = "; Python objects are never unpickled: save plain arrays" if objects else ""
        msg = f"{path}: expected an array written by numpy.save, got: {str(error)[:200]}{hint}"
        raise CorpusError(msg) from error


def _shape(path: Path) -> tuple[int, int]:
    array = _load(path, header_only=True)
    if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
        msg = (
            f"{path}: expected features (T, F) of a floating type, at least one frame, got {array.shape} {array.dtype}"
        )
        raise CorpusError(msg)
    frames, features = array.shape
    return frames, features


def _features(path: Path, width: int) -> Tensor:
    array = _load(path).astype(np.float32, copy=False)
    if array.shape[1] != width:
        msg = f"{path}: expected {width} features per frame, got {array.shape[1]}"
        raise CorpusError(msg)
    if not np.isfinite(array).all():
        frame = int((~np.isfinite(array)).any(axis=1).argmax())
        msg = f"{path}: expected finite features, got NaN or infinity at frame {frame}"
        raise CorpusError(msg)
    return torch.from_numpy(array)
