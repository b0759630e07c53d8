"""Corpora: folders in the HW1P2 layout, read and written, and the bundled corpus of synthesised speech.

The layout is `ROOT/<partition>/mfcc/<recording>.npy`, floating point (T, F), and beside it
`ROOT/<partition>/transcript/<recording>.npy`, T + 2 strings, `[SOS]` first and `[EOS]` last. A partition
without a transcript folder has no labels. Nothing in these files is ever unpickled.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo._names import unknown
from zoo.data.frames import FrameSet

_PHONEMES = "[SIL] AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
PHONEMES: tuple[str, ...] = tuple(_PHONEMES.split())
_SENTENCE_ENDS = (("[SOS]", "<sos>"), ("[EOS]", "<eos>"))


class CorpusError(ValueError):
    """A corpus is not in the expected layout; the message names the file."""


def read_corpus(
    root: str | Path, partition: str, *, classes: Sequence[str] = PHONEMES, features: int | None = None
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
        Raw features (T, F) float32; labels (T,) without the two ends, or None if there is no `transcript` folder.

    Raises:
        CorpusError: a folder or a recording's partner is missing, an array has another shape or type than
            expected, a feature is not finite, or a phoneme is unknown.
    """
    paths, transcripts = _files(Path(root), partition)
    shapes = [_shape(path) for path in paths]
    width = features or shapes[0][1]
    starts = torch.tensor([0] + [length for length, _ in shapes]).cumsum(0)
    values = torch.empty(int(starts[-1]), width)
    labels = torch.empty(len(values), dtype=torch.int64) if transcripts else None
    indices = {name: index for index, name in enumerate(classes)}
    if "[SIL]" in indices:
        indices.setdefault("SIL", indices["[SIL]"])
    for index, path in enumerate(paths):
        span = slice(int(starts[index]), int(starts[index + 1]))
        array = _load(path).astype(np.float32, copy=False)
        if array.shape[1] != width:
            msg = f"{path}: expected {width} features per frame, got {array.shape[1]}"
            raise CorpusError(msg)
        finite = np.isfinite(array).all(axis=1)
        if not finite.all():
            msg = f"{path}: expected finite features, got NaN or infinity at frame {int(finite.argmin())}"
            raise CorpusError(msg)
        values[span] = torch.from_numpy(array)
        if labels is not None:
            labels[span] = _labels(transcripts[index], shapes[index][0], indices)
    return FrameSet(values, labels, starts, tuple(classes), tuple(path.stem for path in paths))


def write_corpus(frames: FrameSet, root: str | Path, partition: str) -> None:
    """Write recordings in the layout of `read_corpus`, with transcripts if there are labels, as a new partition.

    A partition that exists raises CorpusError.
    """
    folder = Path(root) / partition
    if folder.exists():
        msg = f"expected a new partition, but {folder} exists; choose another name"
        raise CorpusError(msg)
    (folder / "mfcc").mkdir(parents=True)
    if frames.labels is not None:
        (folder / "transcript").mkdir()
    classes = np.array(frames.classes)
    for name, (start, stop) in zip(frames.names, pairwise(frames.starts.tolist()), strict=True):
        np.save(folder / "mfcc" / f"{name}.npy", frames.features[start:stop].cpu().numpy(), allow_pickle=False)
        if frames.labels is not None:
            transcript = np.concatenate((["[SOS]"], classes[frames.labels[start:stop].numpy()], ["[EOS]"]))
            np.save(folder / "transcript" / f"{name}.npy", transcript, allow_pickle=False)


def sample_corpus(partition: str) -> FrameSet:
    """The bundled corpus: sentences synthesised in voices that differ between "train", "valid" and "test".

    It is free of rights and small, so that everything can be tried at once; it is not real speech. Another name raises
    ValueError.
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


def _files(root: Path, partition: str) -> tuple[list[Path], list[Path]]:
    """The recordings of a partition in their order, and their transcripts; no transcripts if there is no folder."""
    folder, order, transcripts = (root / partition / name for name in ("mfcc", "test_order.csv", "transcript"))
    if not folder.is_dir():
        others = sorted(path.parent.name for path in root.glob("*/mfcc"))
        msg = f"expected a folder {folder}; partitions under {root}: {', '.join(others) or 'none'}"
        raise CorpusError(msg)
    paths = sorted(folder.glob("*.npy"))
    if order.is_file():
        with order.open(newline="") as lines:
            paths = [folder / f"{Path(row[0]).stem}.npy" for row in list(csv.reader(lines))[1:] if row]
        if missing := [path.name for path in paths if not path.is_file()]:
            msg = f"{order}: expected only files of {folder}, but there is no {', '.join(missing[:5])}"
            raise CorpusError(msg)
    if not paths:
        msg = f"expected recordings *.npy in {folder}, got none"
        raise CorpusError(msg)
    if not transcripts.is_dir():
        return paths, []
    recordings = {path.name for path in paths}
    if alone := sorted(recordings ^ {path.name for path in transcripts.glob("*.npy")}):
        present, lacking = (folder, transcripts) if alone[0] in recordings else (transcripts, folder)
        came = f"none ({len(alone)} such files)"
        msg = f"{present / alone[0]}: expected a partner of the same name in {lacking}, got {came}"
        raise CorpusError(msg)
    return paths, [transcripts / path.name for path in paths]


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
    """Number of frames and of features of one recording, from the header of its file."""
    array = _load(path, header_only=True)
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        came = f"{array.shape} {array.dtype}"
        msg = f"{path}: expected features (T, F) of a floating type, at least one frame, got {came}"
        raise CorpusError(msg)
    return array.shape


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
