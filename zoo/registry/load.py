"""From blobs back to models: checkpoints, stacked tensors, and what can be found out about versions from their weights.

Every function checks the bytes against the recorded size and hash, and the blob's own metadata against the record.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo import _files
from zoo._json import canonical
from zoo.checkpoint import Checkpoint, about_of, decode, tensors_of
from zoo.checkpoint.exam import check_probe, logits_of
from zoo.checkpoint.header import CheckpointError, header_of, read_header
from zoo.checkpoint.match import check_fit, check_values, template
from zoo.data.frames import FrameSet
from zoo.models.architectures import list_architectures
from zoo.registry.blobs import Blobs
from zoo.registry.types import Entry, Problem, RegistryError
from zoo.training.step import Scorer

_READERS = 4
_ALIGNED = 64  # bytes
_TOLERANCE = {"accuracy": 2e-3, "loss": 1e-2}  # frames near a tie and kernels of other machines differ by less
_ABOUT = ("kind", "trained_on", "parents", "note", "tags", "software")


# ---- one version


def known(entry: Entry) -> bool:
    """Whether this program knows the architecture and can therefore build the model."""
    return entry.architecture in list_architectures()


def checkpoint(entry: Entry, data: bytearray) -> Checkpoint:
    """The checkpoint in the bytes of a version, which `Blobs.read` gave.

    Raises:
        RegistryError: the blob is not what was registered.
        CheckpointError: it cannot be used by this program.
    """
    with _naming(entry):
        found = decode(data)
    _refuse_swapped(entry, found.spec.to_dict(), entry.spec.to_dict(), found.classes)
    return found


def tensors(entry: Entry, data: bytearray) -> Mapping[str, Tensor]:
    """The weights in the bytes of a version, checked as by `checkpoint`; for an unknown architecture, not the fit."""
    if known(entry):
        return checkpoint(entry, data).tensors
    with _naming(entry):
        header = read_header(data)
        about, found = about_of(header), tensors_of(data, header)
        check_values(found)
    _refuse_swapped(entry, about["spec"], entry.spec_data, about["classes"])
    return found


def _refuse_swapped(entry: Entry, spec: Any, expected: Any, classes: Sequence[str]) -> None:
    if canonical(spec) != canonical(expected) or tuple(classes) != entry.classes:
        msg = f"the blob of {entry.reference} has another spec or other classes than the registry; was it swapped?"
        raise RegistryError("BLOB", msg)


@contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    """Let an error of a checkpoint name the version."""
    try:
        yield
    except CheckpointError as error:
        raise error.about(entry.reference) from None


# ---- many versions as one set of stacked tensors

Head = tuple[bytes, Sequence[str]]  # the bytes before the data, and the names in the order of the data


def stacked(blobs: Blobs, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """The tensors of M versions of one spec by name, each (M, ...); each blob is read straight into its place.

    The bytes that are hashed are the bytes that are used: nothing is copied in between. A blob that is not as it was
    registered is read again by `checkpoint`, whose error names what is wrong.

    Raises:
        RegistryError: a blob is not what was registered.
        CheckpointError: one cannot be used by this program, or has another spec.
    """
    expected, count = template(entries[0].spec), len(entries)
    sizes = [-(-count * like.nbytes // _ALIGNED) * _ALIGNED for like in expected.values()]
    pieces = torch.split(torch.from_numpy(np.empty(sum(sizes), dtype=np.uint8)), sizes)  # NumPy asks for huge pages
    state = {
        name: piece[: count * like.nbytes].view(like.dtype).reshape(count, *like.shape)
        for (name, like), piece in zip(expected.items(), pieces, strict=True)
    }
    raw = {name: tensor.reshape(count, -1).view(torch.uint8).numpy() for name, tensor in state.items()}
    heads = [_head(blobs, entry, expected) for entry in entries]  # apart: it would hold Python's lock from the readers

    def fill(row: int) -> None:
        rows = {name: memoryview(array[row]) for name, array in raw.items()}
        if not _straight(blobs, entries[row], heads[row], rows):
            found = checkpoint(entries[row], blobs.read(entries[row])).tensors
            check_fit(expected, found)
            for name, tensor in found.items():
                state[name][row].copy_(tensor)

    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(count)))
    try:
        check_values(state)
    except CheckpointError:
        for entry in entries:
            checkpoint(entry, blobs.read(entry))  # names the version
        raise
    return state


def _head(blobs: Blobs, entry: Entry, expected: Mapping[str, Tensor]) -> Head | None:
    """What comes before a blob's data and where its tensors are; None where anything is not as expected."""
    try:
        with _files.opened(blobs.path(entry.sha256), follow=False) as (file, size):
            head, header = header_of(file, size)
        about, pieces = about_of(header), header.pieces
    except (OSError, CheckpointError):
        return None
    fits = (
        size == entry.bytes
        and about["spec"] == entry.spec_data
        and tuple(about["classes"]) == entry.classes
        and pieces.keys() == expected.keys()
        and all((pieces[n].shape, pieces[n].dtype) == (t.shape, t.dtype) for n, t in expected.items())
        and not any(piece.dtype is torch.bool for piece in pieces.values())  # whose bytes only a whole read checks
    )
    return (head, sorted(pieces, key=lambda name: pieces[name].start)) if fits else None


def _straight(blobs: Blobs, entry: Entry, head: Head | None, rows: Mapping[str, memoryview]) -> bool:
    """Read a blob's data into the rows; False where its hash is another, and the rows are meaningless."""
    if head is None:
        return False
    data = [rows[name] for name in head[1]]
    try:
        with _files.opened(blobs.path(entry.sha256), follow=False) as (file, _):
            if _files.read_some(file, len(head[0])) != head[0] or not _files.read_each(file, data):
                return False
    except OSError:
        return False
    digest = hashlib.sha256(head[0])
    for row in data:
        digest.update(row)
    return digest.hexdigest() == entry.sha256


# ---- whether a version is as it was


def problem_of(blobs: Blobs, entry: Entry, *, fast: bool = False, probe: bool = False) -> Problem | None:
    """What is wrong with a version's blob, or None; `fast` and `probe` are as in `Registry.verify`.

    A model of an architecture that this program does not know is not built: its bytes are checked, not its fit.
    """
    try:
        if fast:
            blobs.check_size(entry)
            with _naming(entry), _files.opened(blobs.path(entry.sha256), follow=False) as (file, size):
                header_of(file, size)
        elif not known(entry):
            tensors(entry, blobs.read(entry))
        else:
            found = checkpoint(entry, blobs.read(entry))
            if probe and entry.probe:
                with _naming(entry):
                    check_probe(entry.probe, found.exam().record)
    except OSError as error:
        message = f"the blob of {entry.reference} cannot be read: {error}"
        return Problem(entry, "DISK", str(RegistryError("DISK", message)))
    except ValueError as error:
        return Problem(entry, getattr(error, "reason", "BLOB"), str(error))
    return None


def measured_again(entry: Entry, found: Checkpoint, frames: FrameSet) -> list[dict[str, Any]]:
    """The rows of `Registry.measure`; ValueError for frames without labels, or with other features or classes."""
    recorded = {
        name: float(metric["value"])
        for name, metric in entry.metrics.items()
        if metric.get("frames") == frames.fingerprint and name.rpartition("/")[2] in _TOLERANCE
    }
    if not recorded:
        return []
    features = found.spec.features
    if frames.labels is None or frames.classes != found.classes or frames.features.shape[1] != features:
        msg = f"expected labelled frames of {features} features and the checkpoint's classes, got others"
        raise ValueError(msg)
    now = measured(found, frames)
    rows = []
    for name, value in recorded.items():
        kind = name.rpartition("/")[2]
        limit = _TOLERANCE[kind] * (max(1.0, abs(value)) if kind == "loss" else 1.0)
        row = {"version": entry.reference, "metric": name, "recorded": value}
        again = now[f"valid/{kind}"]["value"]
        rows.append({**row, "measured": again, "agrees": abs(again - value) <= limit})
    return rows


def measured(checkpoint: Checkpoint, frames: FrameSet) -> dict[str, dict[str, Any]]:
    """The metrics of a checkpoint on labelled frames, on their device, as training measures and records them.

    Raises:
        ValueError: the frames have another number of features or classes, or no labels.
    """
    spec = checkpoint.spec
    if (found := (frames.features.shape[1], len(frames.classes))) != (spec.features, spec.classes):
        expected = f"frames of {spec.features} features and {spec.classes} classes"
        raise ValueError(f"expected {expected} to measure it on, got {found[0]} and {found[1]}")
    model = checkpoint.to_module(frames.features.device)
    scorer = Scorer(frames, spec)
    scorer.whole = checkpoint.exam().needs_whole_batch
    accuracy, loss = scorer(lambda x: logits_of(model(x), x, spec.classes, spec.architecture)[None])
    return scorer.metrics(accuracy[0], loss[0])


# ---- how two versions differ


def difference(blobs: Blobs, first: Entry, second: Entry) -> dict[str, Any]:
    """What differs between two versions; a part that is equal is empty.

    Returns:
        `about`, `spec`, `recipe`: name -> [first, second], flat; `classes`: likewise, or empty; `metrics`:
        name -> [first, second, second - first], None where unknown; `tensors`: one row for each that
        differs, with `name`, both shapes, and where these agree the largest and the relative change,
        |a - b| / |a| in Euclidean norm.
    """
    sides = (first, second)
    a, b = (tensors(entry, blobs.read(entry)) for entry in sides)
    whole = [entry.to_json() for entry in sides]
    # a known architecture's spec has the options that were added to it since
    specs = [entry.spec.to_dict() if known(entry) else entry.spec_data for entry in sides]
    values = [{name: float(metric["value"]) for name, metric in entry.metrics.items()} for entry in sides]
    metrics = _changed(*values)
    rows = []
    for name in sorted({*a, *b}):
        x, y = a.get(name), b.get(name)
        row: dict[str, Any] = {"name": name}
        row |= {"first": None if x is None else [*x.shape], "second": None if y is None else [*y.shape]}
        if x is None or y is None or x.shape != y.shape:
            rows.append({**row, "largest": None, "relative": None})
        elif not torch.equal(x, y):
            moved, scale = x.double() - y.double(), float(x.double().norm())
            relative = float(moved.norm()) / scale if scale else None
            rows.append({**row, "largest": float(moved.abs().max()), "relative": relative})
    return {
        "first": first.reference,
        "second": second.reference,
        "about": _changed(*({key: fields.get(key) for key in _ABOUT} for fields in whole)),
        "spec": _changed(*({**spec, **spec["options"], "options": None} for spec in specs)),
        "recipe": _changed(first.recipe or {}, second.recipe or {}),
        "classes": _changed(*({"classes": list(entry.classes)} for entry in sides)),
        "metrics": {n: [x, y, None if x is None or y is None else y - x] for n, (x, y) in metrics.items()},
        "tensors": rows,
    }


def _changed(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    return {key: [a.get(key), b.get(key)] for key in sorted({*a, *b}) if a.get(key) != b.get(key)}
