"""Corpora in and out: folders in the HW1P2 layout, and the bundled corpus of synthesised speech.

The layout: `ROOT/<partition>/mfcc/<recording>.npy`, floating (T, F), and beside it
`ROOT/<partition>/transcript/<recording>.npy`, T + 2 strings, `[SOS]` first and `[EOS]` last. A partition
without a transcript folder has no labels. Nothing in these files is ever unpickled.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from torch import Tensor

from zoo._names import unknown
from zoo.data.frames import FrameSet

_PHONEMES = "[SIL] AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
PHONEMES: tuple[str, ...] = tuple(_PHONEMES.split())
_OTHER_SPELLINGS = {"SIL": "[SIL]"}
# all that NumPy raises over a header of nonsense
_NO_ARRAY = (
    ValueError,
    EOFError,
    OSError,
    OverflowError,
    MemoryError,
    SyntaxError,
    TypeError,
    RecursionError,
    TokenError,
)
_SENTENCE_ENDS = (("[SOS]", "<sos>"), ("[EOS]", "<eos>"))


class CorpusError(ValueError):
    """A corpus that is not in the layout it should have; the message names the file."""


def read_corpus(
    root: str | Path,
    partition: str,
    *,
    classes: Sequence[str] = PHONEMES,
    features: int | None = None,
) -> FrameSet:
    """All recordings of one partition, in the order of their file names.

    Where the partition holds a `test_order.csv` (a header, then a file name a line), its order counts.
    Features are read straight into one array, so the peak is little more than the result.

    Args:
        root: folder that holds the partitions.
        partition: such as "train-clean-100" or "dev-clean".
        classes: what the transcripts may say, in the order of the labels. "SIL" also stands for "[SIL]".
        features: expected number per frame; None takes that of the first recording.

    Returns:
        Raw features (T, F) float32; labels (T,) without the two ends, or None where there is no
        `transcript` folder.

    Raises:
        CorpusError: a folder or partner is missing, an array has another shape or type than expected, a
            feature is not finite, a phoneme is unknown.
    """
    folder = _partition(Path(root), partition)
    paths = _ordered(folder)
    transcripts = _partners(paths, folder / "transcript")
    shapes = [_shape(path) for path in paths]
    width = features or shapes[0][1]
    starts = torch.tensor([0] + [length for length, _ in shapes]).cumsum(0)
    values = torch.empty(int(starts[-1]), width)
    labels = None if transcripts is None else torch.empty(len(values), dtype=torch.int64)
    table = _LabelTable(classes)
    for index, path in enumerate(paths):
        span = slice(int(starts[index]), int(starts[index + 1]))
        values[span] = _features(path, width)
        if labels is not None and transcripts is not None:
            labels[span] = table.read(transcripts[index], shapes[index][0])
    return FrameSet(values, labels, starts, tuple(classes), tuple(path.stem for path in paths))


def write_corpus(frames: FrameSet, root: str | Path, partition: str) -> None:
    """Write recordings in the layout that `read_corpus` reads; float32, transcripts where there are labels.

    Raises:
        CorpusError: the partition is already there.
    """
    folder = Path(root) / partition
    if folder.exists():
        msg = f"expected a new partition, but {folder} is already there; choose another name"
        raise CorpusError(msg)
    (folder / "mfcc").mkdir(parents=True)
    if frames.labels is not None:
        (folder / "transcript").mkdir()
    names = np.array(frames.classes)
    for index, name in enumerate(frames.names):
        span = slice(int(frames.starts[index]), int(frames.starts[index + 1]))
        np.save(folder / "mfcc" / f"{name}.npy", frames.features[span].cpu().numpy(), allow_pickle=False)
        if frames.labels is not None:
            spoken = np.concatenate((["[SOS]"], names[frames.labels[span].numpy()], ["[EOS]"]))
            np.save(folder / "transcript" / f"{name}.npy", spoken, allow_pickle=False)


def sample_corpus(partition: str) -> FrameSet:
    """The bundled corpus: sentences synthesised in voices that differ between "train", "valid" and "test".

    It is clean of rights and small, so that everything runs at once; it is not real speech.

    Raises:
        ValueError: another partition.
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


class _LabelTable:
    """Class names to indices, a whole transcript at a time."""

    def __init__(self, classes: Sequence[str]) -> None:
        spellings = {name: index for index, name in enumerate(classes)}
        spellings |= {
            other: spellings[name]
            for other, name in _OTHER_SPELLINGS.items()
            if name in spellings and other not in spellings
        }
        self.names = np.array(sorted(spellings))
        self.indices = np.array([spellings[name] for name in self.names])

    def read(self, path: Path, frames: int) -> Tensor:
        """(frames,) int64 from a transcript of frames + 2 strings."""
        spoken = _load(path)
        if spoken.dtype.kind != "U" or spoken.shape != (frames + 2,):
            came = f"{spoken.dtype} {spoken.shape}"
            msg = f"{path}: expected {frames + 2} strings ({frames} frames, [SOS], [EOS]), got {came}"
            raise CorpusError(msg)
        for end, spellings in zip((spoken[0], spoken[-1]), _SENTENCE_ENDS, strict=True):
            if end not in spellings:
                msg = f"{path}: expected {spellings[0]!r} at its end of the transcript, got {str(end)!r}"
                raise CorpusError(msg)
        spoken = spoken[1:-1]
        places = np.searchsorted(self.names, spoken).clip(max=len(self.names) - 1)
        strange = self.names[places] != spoken
        if strange.any():
            frame = int(strange.argmax())
            msg = f"{path}: frame {frame}: " + unknown("phoneme", str(spoken[frame]), self.names.tolist())
            raise CorpusError(msg)
        return torch.from_numpy(self.indices[places])


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
    """The array of one file, no archive, no Python objects; mapped where only its header is wanted."""
    try:
        if header_only:
            return np.lib.format.open_memmap(path, mode="r")
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except _NO_ARRAY as error:
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
