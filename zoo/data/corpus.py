"""Corpora: folders in the HW1P2 layout, read and written, and the bundled corpus of synthesised speech.

The layout is `ROOT/<partition>/mfcc/<recording>.npy`, floating point (T, F), and beside it
`ROOT/<partition>/transcript/<recording>.npy`, T + 2 strings, `[SOS]` first and `[EOS]` last. A partition
without a transcript folder has no labels. Nothing in these files is ever unpickled.
"""

from __future__ import annotations

import csv
import math
import os
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.resources import as_file, files
from io import BytesIO
from itertools import pairwise, zip_longest
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo._names import checked, unknown
from zoo.data.frames import FrameSet
from zoo.data.packed import SUFFIX, Memory, Packed, source_of
from zoo.logs import Progress, silent

_PHONEMES = "[SIL] AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
PHONEMES: tuple[str, ...] = tuple(_PHONEMES.split())
_SENTENCE_ENDS = (("[SOS]", "<sos>"), ("[EOS]", "<eos>"))
_SPELLINGS = (("[SIL]", "SIL"), *_SENTENCE_ENDS)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_PARSING = Lock()  # Python 3.11 may raise SystemError where two threads parse a literal, as headers are
_SUFFIX = ".npy"
_MOST_HEADER = 2**16  # bytes; NumPy itself reads fewer
_LARGE = 2**20  # bytes; most recordings are smaller, and are read without a look at their headers
_THREADS, _AHEAD = 4, 8  # that read ahead, and how many recordings

Item = TypeVar("Item")
Result = TypeVar("Result")
Shapes = Callable[[Sequence[str]], list[tuple[int, int]]]
"""Files -> number of frames and of features of each."""


class CorpusError(ValueError):
    """A corpus is not in the expected layout; the message names the file."""


class _OtherShapeError(CorpusError):
    """The header of a recording says otherwise than its size, or than it did a moment ago."""


@checked
def read_corpus(
    root: str | Path,
    partition: str,
    *,
    classes: Sequence[str] = PHONEMES,
    features: int | None = None,
    mapped: bool | str | Path = False,
    progress: Progress | None = None,
) -> FrameSet:
    """All recordings of one partition, in the order of their file names.

    If the partition has a `test_order.csv`, its order is used instead: a recording on each line, with or without a
    header, `.npy`, a path, and other columns. It must name every recording once. Hidden files, such as the `._*.npy`
    of macOS, are no recordings. A few threads read ahead, a few recordings far, so that the peak of memory is
    little more than the result.

    Args:
        root: the folder of the partitions.
        partition: a folder name such as "train-clean-100" or "dev-clean".
        classes: the names that transcripts may contain, in the order of the labels. The two spellings of silence and
            of the ends ("[SIL]" and "SIL", "[SOS]" and "<sos>", "[EOS]" and "<eos>") are one name, unless both are
            among the classes.
        features: expected number of features per frame; None takes that of the first recording.
        mapped: leave the frames on the disk, for a corpus that is larger than memory: they are copied to one file,
            `<partition>.frames.safetensors`, in this folder, or in `root` if True, and mapped from there. Later calls
            take that file at once, unless the names, sizes or times of the corpus's files have changed, or the classes.
        progress: shows how many recordings have been read; None shows nothing.

    Returns:
        Raw features (T, F) float32; labels (T,) without the two ends, or None if there is no `transcript` folder.

    Raises:
        CorpusError: a folder or a recording's partner is missing, an array has another shape or type than
            expected, a feature is not finite, a name in a transcript is not among the classes, a class is named
            twice, `test_order.csv` does not name every recording once, or the file of `mapped` cannot be written.
    """
    _indices(classes)  # a wrong list of classes is an error now
    paths, transcripts = _files(Path(root), partition)

    def read(memory: Memory, shapes: Shapes = _by_header) -> FrameSet:
        with (progress or silent)(f"reading {partition}", total=len(paths)) as advance:
            return _read(paths, transcripts, classes, features, shapes, memory, advance)

    if mapped is False:
        with suppress(_OtherShapeError, RuntimeError):  # torch's own, where sizes mislead beyond all memory
            return read(_new_memory, _by_size)
        return read(_new_memory)
    path = Path(root if mapped is True else mapped, partition + SUFFIX)
    packed = Packed(path, source_of([*paths, *transcripts], classes), tuple(classes), _names(paths))
    try:
        frames = packed.frames(read)
    except OSError as error:
        remedy = "name a folder for it that can be written to (mapped= or --mapped)"
        msg = f"expected to write the frames of {partition!r} to {path}, got: {error.strerror or error}; {remedy}"
        raise CorpusError(msg) from error
    _check_width(paths[0], frames.features.shape[1], features)
    return frames


@checked
def write_corpus(frames: FrameSet, root: str | Path, partition: str) -> None:
    """Write recordings in the layout of `read_corpus`, with transcripts if there are labels, as a new partition.

    Raises:
        CorpusError: the partition exists, a recording's name is no visible file's, or two would be one file, since
            their names are equal or, on a file system that ignores capitals, nearly so; nothing is left of it then.
    """
    folder = Path(root) / partition
    if folder.exists():
        msg = f"expected a new partition, but {folder} exists; choose another name"
        raise CorpusError(msg)
    if unfit := [name for name in frames.names if name.startswith(".") or not name or Path(name).name != name]:
        msg = f"expected recordings with names of visible files, got {unfit[:5]}"
        raise CorpusError(msg)
    classes = np.array(frames.classes)
    try:
        for name, (start, stop) in zip(frames.names, pairwise(frames.starts.tolist()), strict=True):
            arrays = {"mfcc": frames.features[start:stop].cpu().numpy()}
            if frames.labels is not None:
                words = classes[frames.labels[start:stop].numpy()]
                arrays["transcript"] = np.concatenate((["[SOS]"], words, ["[EOS]"]))
            for kind, array in arrays.items():
                (folder / kind).mkdir(parents=True, exist_ok=True)
                with (folder / kind / f"{name}.npy").open("xb") as file:
                    np.save(file, array, allow_pickle=False)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, FileExistsError):
            msg = f"expected recordings with names that differ as file names, got {error.filename} twice"
            raise CorpusError(msg) from error
        raise


@checked
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


def _new_memory(starts: Tensor, width: int, labelled: bool) -> tuple[Tensor, Tensor | None]:
    frames = int(starts[-1])
    return torch.empty(frames, width), torch.empty(frames, dtype=torch.int64) if labelled else None


def _read(
    paths: Sequence[str],
    transcripts: Sequence[str],
    classes: Sequence[str],
    features: int | None,
    find_shapes: Shapes,
    memory: Memory,
    advance: Callable[..., None],
) -> FrameSet:
    """The frames of these files, in the memory that is given for them."""
    indices = _indices(classes)
    shapes = find_shapes(paths)
    width = features or shapes[0][1]
    starts = torch.tensor([0] + [length for length, _ in shapes]).cumsum(0)
    values, labels = memory(starts, width, bool(transcripts))
    files = [*zip(paths, transcripts, strict=True)] if transcripts else [(path,) for path in paths]
    spans = [slice(start, stop) for start, stop in pairwise(starts.tolist())]
    for found, names, span, (_, own) in zip(_ahead(_contents, files), files, spans, shapes, strict=True):
        _check_width(names[0], own, width)
        _read_features(names[0], found[0], values[span].numpy())
        if labels is not None:
            _read_labels(names[1], found[1], labels[span].numpy(), indices)
        advance(1)
    return FrameSet(values, labels, starts, tuple(classes), _names(paths))


def _names(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path.rpartition("/")[2].removesuffix(_SUFFIX) for path in paths)


def _check_width(path: str, found: int, features: int | None) -> None:
    if found != (features or found):
        msg = f"{path}: expected {features} features per frame, got {found}"
        raise CorpusError(msg)


def _indices(classes: Sequence[str]) -> dict[str, int]:
    """Name -> label, with the other spelling of a name where only one of them is a class."""
    indices = {name: index for index, name in enumerate(classes)}
    if isinstance(classes, str) or len(indices) < len(classes) or not all(isinstance(n, str) and n for n in indices):
        msg = f"expected a sequence of class names, each of them once, got {str(classes)[:200]!r}"
        raise CorpusError(msg)
    for one, other in (*_SPELLINGS, *(pair[::-1] for pair in _SPELLINGS)):
        if one in classes:
            indices.setdefault(other, indices[one])
    return indices


def _ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The function of each item in their order, computed ahead by a few threads; the first error ends it.

    For what mostly waits for the disk: threads that compute in Python hold up each other.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _recordings(folder: Path) -> list[str]:
    """The names of a folder's arrays in order, without the hidden files that systems put beside them."""
    names = os.listdir(folder)  # noqa: PTH208  # as text: see `_files`
    return sorted(name for name in names if name.endswith(_SUFFIX) and not name.startswith("."))


def _files(root: Path, partition: str) -> tuple[list[str], list[str]]:
    """The recordings of a partition in their order, and their transcripts; no transcripts if there is no folder.

    As text: a partition has tens of thousands of files, and to make a `Path` takes longer than to ask for its time.
    """
    folder, order, transcripts = (root / partition / name for name in ("mfcc", "test_order.csv", "transcript"))
    if not folder.is_dir():
        others = sorted(path.parent.name for path in root.glob("[!.]*/mfcc"))
        msg = f"expected a folder {folder}; partitions under {root}: {', '.join(others) or 'none'}"
        raise CorpusError(msg)
    names = _recordings(folder)
    if not names:
        msg = f"expected recordings *.npy in {folder}, got none"
        raise CorpusError(msg)
    if order.is_file():
        names = [name + _SUFFIX for name in _order(order, [name.removesuffix(_SUFFIX) for name in names])]
    paths = [f"{folder}/{name}" for name in names]
    if not transcripts.is_dir():
        return paths, []
    if alone := sorted(set(names) ^ {*_recordings(transcripts)}):
        present, lacking = (folder, transcripts) if alone[0] in names else (transcripts, folder)
        came = f"none ({len(alone)} such files)"
        msg = f"{present / alone[0]}: expected a partner of the same name in {lacking}, got {came}"
        raise CorpusError(msg)
    return paths, [f"{transcripts}/{name}" for name in names]


def _order(path: Path, recordings: Sequence[str]) -> list[str]:
    """The recordings in the order of the lines of a file, which must name each of them once."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        tables = [[*csv.reader(lines, delimiter=mark)] for mark in ",;\t"]
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"{path}: expected UTF-8 text with a recording on each line, got: {error}"
        raise CorpusError(msg) from error
    known, columns = set(recordings), list[tuple[list[str], tuple[str, ...]]]()
    for cells in (cells for rows in tables for cells in zip_longest(*rows, fillvalue="")):
        names = [_named(cell, known) for cell in cells]
        if all(names != others for others, _ in columns):
            columns.append((names, cells))
    columns.sort(key=lambda column: column[0].count(""))
    if len(columns) > 1 and columns[0][0].count("") == columns[1][0].count(""):
        first, second = (cells[-1] for _, cells in columns[:2])
        msg = f"{path}: expected one column that names recordings, got those of {first!r} and of {second!r}; leave one"
        raise CorpusError(msg)
    names, cells = columns[0] if columns else ([], ())
    header = len(names) > 1 and not names[0] and _form(cells[0]) not in {_form(cell) for cell in cells[1:]}
    names, cells = names[header:], cells[header:]
    problems = {
        "there is no": [cell for cell, name in zip(cells, names, strict=True) if not name],
        "there is more than one": [name for name, count in Counter(names).items() if name and count > 1],
        "it leaves out": [name for name in recordings if name not in set(names)],
    }
    for problem, which in problems.items():
        if which:
            expected = f"expected each of the {len(recordings)} recordings of {path.with_name('mfcc')} once"
            msg = f"{path}: {expected}, but {problem} {', '.join(which[:5])}{', ...' * (len(which) > 5)}"
            raise CorpusError(f"{msg}; mend the file, or remove it to read them in the order of their names")
    return names


def _named(cell: str, recordings: Collection[str]) -> str:
    """The recording that a cell names, with or without folders and a suffix; empty if there is none."""
    name = cell.strip().replace("\\", "/").rpartition("/")[2]
    return next((known for known in (name, name.rpartition(".")[0]) if known in recordings), "")


def _form(cell: str) -> str:
    """How a name with digits or a suffix is written, by which a missing recording is told from a header."""
    form = re.sub(r"[0-9]+", "0", re.sub(r"[^\W\d_]+", "a", cell.strip()))
    return form if "0" in form or "." in form else cell


@lru_cache(4096)
def _parsed(version: tuple[int, int], header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type in a header, of which a corpus has few: its recordings are of similar lengths."""
    with _PARSING:
        return _HEADERS[version](BytesIO(header))


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Any error of NumPy's, or of the system's, becomes a CorpusError that names the file."""
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:  # a malformed header makes NumPy raise anything from SyntaxError to MemoryError
        hint = "; Python objects are never unpickled: save plain arrays" if "Python objects" in str(error) else ""
        msg = f"{path}: expected an array written by numpy.save, got: {str(error)[:200]}{hint}"
        raise CorpusError(msg) from error


def _contents(paths: Sequence[str]) -> list[bytes]:
    """The bytes of some files; of large ones not those behind the array."""
    found = []
    for path in paths:
        with _reading(path), open(path, "rb") as file:  # noqa: PTH123  # as text: see `_files`
            size = os.fstat(file.fileno()).st_size
            data = file.read(-1 if size < _LARGE else _MOST_HEADER)
            if size >= _LARGE:
                place, shape, _, dtype = _header(data, size)
                data += file.read(max(0, place + math.prod(shape) * dtype.itemsize - len(data)))
            found.append(data)
    return found


def _header(start: bytes, size: int) -> tuple[int, tuple[int, ...], bool, np.dtype]:
    """The length of a file's header, and shape, Fortran order and type in it, for a file that begins like this.

    No archives, no Python objects, and a file that is long enough; otherwise an error of any kind.
    """
    file = BytesIO(start)
    version = np.lib.format.read_magic(file)
    length = file.read(2 if version == (1, 0) else 4)
    shape, fortran, dtype = _parsed(version, length + file.read(int.from_bytes(length, "little")))
    there = size - file.tell()
    if dtype.hasobject or min(shape, default=0) < 0 or there < math.prod(shape) * dtype.itemsize:
        what = "Python objects" if dtype.hasobject else f"{there:,} bytes"
        msg = f"{what} for shape {shape} {dtype}"
        raise ValueError(msg)
    return file.tell(), shape, fortran, dtype


def _array(path: str, data: bytes) -> NDArray[Any]:
    """The array in a file."""
    with _reading(path):
        place, shape, fortran, dtype = _header(data, len(data))
        return np.frombuffer(data, dtype, math.prod(shape), place).reshape(shape, order="F" if fortran else "C")


def _by_header(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Number of frames and of features of each recording, from the header of its file."""
    return [shape for shape, _ in _ahead(_shape, paths)]


def _by_size(paths: Sequence[str]) -> list[tuple[int, int]]:
    """The same without a look into any file but the first, as if the others had its type and as long a header.

    A disk that is asked for the headers of a whole corpus first is kept busy nearly as long as by all the data.
    """
    (frames, width), size = _shape(paths[0])
    header = Path(paths[0]).stat().st_size - size
    sizes = [os.stat(path).st_size - header for path in paths]  # noqa: PTH116  # as text: see `_files`
    return [(max(one * frames // size, 0), width) for one in sizes]


def _shape(path: str) -> tuple[tuple[int, int], int]:
    """Number of frames and of features of one recording, and how many bytes they take, from the header of its file."""
    with _reading(path), open(path, "rb", buffering=0) as file:  # noqa: PTH123  # as text: see `_files`
        _, shape, _, dtype = _header(file.read(_MOST_HEADER), os.fstat(file.fileno()).st_size)
    if len(shape) != 2 or dtype.kind != "f" or not math.prod(shape):
        msg = f"{path}: expected features (T, F) of a floating type, at least one frame, got {shape} {dtype}"
        raise CorpusError(msg)
    return shape, math.prod(shape) * dtype.itemsize


def _read_features(path: str, data: bytes, rows: NDArray[np.float32]) -> None:
    """Fill rows (T, F) with the features in a file."""
    values = _array(path, data)
    if values.shape != rows.shape or values.dtype.kind != "f":
        came = f"{values.shape} {values.dtype}"
        msg = f"{path}: expected features {rows.shape} of a floating type, as a moment ago, got {came}"
        raise _OtherShapeError(msg)
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinity
        rows[:] = values
    finite = np.isfinite(rows)
    if not finite.all():
        frame = int(finite.all(axis=1).argmin())
        msg = f"{path}: expected finite features, got NaN or infinity at frame {frame}"
        raise CorpusError(msg)


def _read_labels(path: str, data: bytes, labels: NDArray[np.int64], indices: Mapping[str, int]) -> None:
    """Fill labels (T,) from the T + 2 strings in a file."""
    frames, transcript = len(labels), _array(path, data)
    if transcript.dtype.kind not in "US" or transcript.shape != (frames + 2,):
        came = f"{transcript.dtype} {transcript.shape}"
        msg = f"{path}: expected {frames + 2} strings ({frames} frames, [SOS], [EOS]), got {came}"
        raise CorpusError(msg)
    with _reading(path):
        transcript = np.char.decode(transcript, "utf-8") if transcript.dtype.kind == "S" else transcript
    for place, end, spellings in zip(("first", "last"), transcript[[0, -1]].tolist(), _SENTENCE_ENDS, strict=True):
        if end not in spellings:
            msg = f"{path}: expected {spellings[0]!r} as its {place} string, got {end!r}"
            raise CorpusError(msg)
    inner = transcript[1:-1]
    firsts = np.flatnonzero(np.append(True, inner[1:] != inner[:-1]))  # a phoneme lasts for some frames
    found = np.array([indices.get(name, -1) for name in inner[firsts].tolist()])
    if found.min() < 0:
        frame = int(firsts[found.argmin()])
        what = unknown("class", str(inner[frame]), indices)
        msg = f"{path}: frame {frame}: {what}; other names than these are given by classes= or --classes"
        raise CorpusError(msg)
    labels[:] = np.repeat(found, np.diff(firsts, append=frames))
