"""From a model in hand to what is registered: a checked checkpoint, its id, its blob, its record; and the way back.

The blob holds everything in the record except the number and the time, so equal content gives an equal blob and
a lost registry can be rebuilt from its blobs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from platform import python_version
from typing import Any

import msgspec
import torch
from torch import nn

from zoo import _files
from zoo._names import own_version
from zoo.checkpoint import Checkpoint, about_of, decode, encode, foreign
from zoo.checkpoint.exam import check_probe
from zoo.checkpoint.header import CheckpointError, read_header
from zoo.models.spec import Spec, count_parameters
from zoo.registry.blobs import Blobs
from zoo.registry.changes import Change, add_version, now, strings_of, tags_of, written
from zoo.registry.text import new_record
from zoo.registry.transaction import disk_errors
from zoo.registry.types import Entry, RegistryError, Snapshot, VersionRecord, check_name

Model = Checkpoint | nn.Module | str | os.PathLike[str]


class Prepared(msgspec.Struct, frozen=True):
    """A model that is ready to be registered: its id, its blob, and its record, numbered when it is added."""

    id: str
    data: bytes
    record: VersionRecord


def checkpoint_of(
    model: Model, spec: Spec | None, classes: Sequence[str] | None, *, strip_prefix: bool | str = False, **about: Any
) -> Checkpoint:
    """A checkpoint from what `register` takes; `about` replaces fields of the checkpoint where not None.

    Raises:
        RegistryError: ARGUMENT, where spec or classes are missing, or differ from the checkpoint's own.
        CheckpointError: the file is malformed, or its tensors do not fit.
    """
    if spec is not None and not isinstance(spec, Spec):
        raise RegistryError("ARGUMENT", f"expected a zoo.Spec, such as Spec.from_dict(...) gives, got {str(spec)[:80]}")
    if classes is not None:
        classes = strings_of("classes", classes)
    if not isinstance(about.get("recipe") or {}, Mapping):
        raise RegistryError("ARGUMENT", f"expected a recipe as name -> value, got {str(about['recipe'])[:80]!r}")
    given = {key: value for key, value in about.items() if value is not None}
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        with disk_errors(f"cannot read {path}"):
            data = _files.read(path)
        try:
            if "zoo" in read_header(data).metadata:
                return checkpoint_of(decode(data), spec, classes, **about)
            if spec is None or classes is None:
                msg = f"expected a spec and class names with {path}, which does not know them"
                raise RegistryError("ARGUMENT", msg)
            return foreign(data, spec, classes, strip_prefix=strip_prefix, **given)
        except CheckpointError as error:
            raise error.about(path) from None
    if isinstance(model, Checkpoint):
        if spec is not None and spec != model.spec:
            raise RegistryError("ARGUMENT", f"expected the checkpoint's own spec {model.spec}, got {spec}")
        if classes is not None and tuple(classes) != model.classes:
            raise RegistryError("ARGUMENT", f"expected the checkpoint's own classes {model.classes}, got {classes}")
        return replace(model, **given) if given else model
    if not isinstance(model, nn.Module):
        msg = f"expected a Checkpoint, a module or the path of a safetensors file, got {type(model).__name__}"
        raise RegistryError("ARGUMENT", msg)
    if spec is None or classes is None:
        raise RegistryError("ARGUMENT", "expected spec=... and classes=... with a module, which does not know them")
    return Checkpoint.from_module(model, spec, classes, strip_prefix=strip_prefix, **given)


def prepare(
    name: str, checkpoint: Checkpoint, *, tags: Iterable[str] = (), licence: str = "", created: str | None = None
) -> Prepared:
    """What is registered of a checkpoint under a name; `created` is a time as the registry writes it, None is now.

    Raises:
        RegistryError: what cannot stand in the registry's file, such as control characters.
        CheckpointError: what cannot stand in the blob.
    """
    data = encode(checkpoint, name=name)
    content = "\n".join((name, checkpoint.spec.canonical(), checkpoint.digest))
    fields = {
        "n": 1,
        "spec": checkpoint.spec.to_dict(),
        "classes": list(checkpoint.classes),
        "blob": f"sha256:{hashlib.sha256(data).hexdigest()}",
        "bytes": len(data),
        "parameters": count_parameters(checkpoint.spec),
        "created": created or now(),
        **checkpoint.about(),
        "licence": licence,
        "tags": tags_of(tags),
        "software": software(),
        "probe": checkpoint.exam().record,
    }
    kept = {key: value for key, value in fields.items() if value not in ("", [], {}, None)}
    id = hashlib.sha256(content.encode()).hexdigest()[:12]
    return Prepared(id, data, new_record(VersionRecord, f"{name}@{id}", kept))


def check_code(entry: Entry, record: VersionRecord) -> None:
    """Refuse (PROBE) the same weights again where they answer otherwise than when they were registered."""
    if not entry.probe or isinstance(record.probe, msgspec.UnsetType):
        return
    try:
        check_probe(entry.probe, msgspec.json.decode(record.probe))
    except CheckpointError as error:
        raise error.about(entry.reference, "; give the changed architecture another name") from None


@lru_cache(maxsize=1)
def software() -> dict[str, str]:
    """Versions of the software that computes."""
    return {"python": python_version(), "torch": str(torch.__version__), "zoo-ensemble": own_version()}


# ---- a lost registry, rebuilt from its blobs


def recover(blobs: Blobs, commit: Callable[[Change], Snapshot]) -> tuple[list[Entry], list[str]]:
    """Register again what the blobs' own metadata describe.

    Returns:
        The versions, each once, by the age of their blobs; and each blob that was left out, with the reason.
    """
    found, damaged = {}, {}
    for path, sha256, modified in sorted(blobs.files(), key=lambda file: (file[2], file[1])):
        try:
            if sha256:
                found[path.name] = _read_back(path, sha256, modified)
        except (OSError, ValueError) as error:
            damaged[path.name] = str(error)
    if not found:
        also = f"; these are damaged: {', '.join(sorted(damaged))}" if damaged else ""
        raise RegistryError("MISSING", f"expected checkpoints to recover in {blobs.folder}, found none{also}")
    refused: dict[str, str] = {}

    def add_all(draft: Snapshot) -> None:
        refused.clear()
        for blob, (name, one) in found.items():
            try:
                add_version(draft, name, one.id, one.record)
            except RegistryError as error:
                refused[blob] = str(error)

    content = commit(add_all)
    versions = dict.fromkeys((name, one.id) for blob, (name, one) in found.items() if blob not in refused)
    reasons = [f"{blob}: {why}" for blob, why in sorted({**damaged, **refused}.items())]
    return [content.entry(name, id) for name, id in versions], reasons


def _read_back(path: Path, sha256: str, modified: float) -> tuple[str, Prepared]:
    data = _files.read(path, follow=False)
    if (got := hashlib.sha256(data).hexdigest()) != sha256:
        raise RegistryError("BLOB_DIGEST", f"expected the sha256 in its name, got {got}")
    name = str(about_of(read_header(data))["name"])
    check_name(name)
    return name, prepare(name, decode(data), created=written(datetime.fromtimestamp(modified, UTC)))
