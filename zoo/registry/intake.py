"""From a model in hand to what is registered: a checked checkpoint, its id, its blob, its line.

The blob holds all that the line says, except the number and the time, so equal content gives an equal blob
and a lost registry can be rebuilt from its blobs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from torch import nn

from zoo import _files
from zoo._names import own_version
from zoo.checkpoint import Checkpoint, about_of, decode, encode, foreign
from zoo.checkpoint.header import CheckpointError, read_header
from zoo.checkpoint.probe import probe
from zoo.models.spec import Spec, count_parameters
from zoo.registry.clock import now
from zoo.registry.document import printed
from zoo.registry.notes import tags_of, texts_of
from zoo.registry.references import RegistryError

Model = Checkpoint | nn.Module | str | os.PathLike[str]


@dataclass(frozen=True)
class Parcel:
    """What a registration puts into the store and into the file.

    Args:
        id: 12 hex digits of name, spec and weights.
        data: the blob.
        fields: the version's line, without its number.
    """

    id: str
    data: bytes
    fields: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Hash of the blob."""
        return str(self.fields["blob"]).removeprefix("sha256:")


def checkpoint_of(model: Model, spec: Spec | None, classes: Sequence[str] | None, **about: Any) -> Checkpoint:
    """A checkpoint from what `register` takes; `about` replaces fields of the checkpoint where not None.

    Raises:
        RegistryError: ARGUMENT, where spec or classes are missing, or differ from the checkpoint's own.
        CheckpointError: the file is malformed, or its tensors do not fit.
    """
    if spec is not None and not isinstance(spec, Spec):
        raise RegistryError("ARGUMENT", f"expected a zoo.Spec, such as Spec.from_dict(...) gives, got {str(spec)[:80]}")
    if classes is not None:
        classes = texts_of("classes", classes)
    if not isinstance(about.get("recipe") or {}, Mapping):
        raise RegistryError("ARGUMENT", f"expected a recipe as name -> value, got {str(about['recipe'])[:80]!r}")
    given = {key: value for key, value in about.items() if value is not None}
    if isinstance(model, str | os.PathLike):
        return _from_file(Path(model), spec, classes, given)
    if isinstance(model, Checkpoint):
        return _completed(model, spec, classes, given)
    if not isinstance(model, nn.Module):
        msg = f"expected a Checkpoint, a module or the path of a safetensors file, got {type(model).__name__}"
        raise RegistryError("ARGUMENT", msg)
    if spec is None or classes is None:
        raise RegistryError("ARGUMENT", "expected spec=... and classes=... with a module, which does not know them")
    return Checkpoint.from_module(model, spec, classes, **given)


def parcel(name: str, checkpoint: Checkpoint, *, tags: Iterable[str] = ()) -> Parcel:
    """What is to be kept of a checkpoint under a name.

    Raises:
        RegistryError: what cannot stand in the registry's file, such as control characters.
        CheckpointError: what cannot stand in the blob.
    """
    data = encode(checkpoint, name=name)
    fields = {
        "spec": checkpoint.spec.to_dict(),
        "classes": list(checkpoint.classes),
        "blob": f"sha256:{hashlib.sha256(data).hexdigest()}",
        "bytes": len(data),
        "parameters": count_parameters(checkpoint.spec),
        "created": now(),
        **described(checkpoint),
        "tags": tags_of(tags),
        "software": software(),
        "probe": probe(checkpoint.to_module(), checkpoint.spec.inputs),
    }
    kept = {key: value for key, value in fields.items() if value not in ("", [], {}, None)}
    made = Parcel(identity(name, checkpoint), data, kept)
    printed({(name, made.id): {"n": 1, **kept}})  # what the file would refuse is refused before the blob is written
    return made


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of where it comes from."""
    return {
        "metrics": {key: dict(value) for key, value in checkpoint.metrics.items()},
        "recipe": None if checkpoint.recipe is None else dict(checkpoint.recipe),
        "parents": list(checkpoint.parents),
        "kind": checkpoint.kind,
        "trained_on": checkpoint.trained_on,
        "note": checkpoint.note,
    }


def identity(name: str, checkpoint: Checkpoint) -> str:
    """12 hex digits of the content: name, spec, weights."""
    content = "\n".join((name, checkpoint.spec.canonical(), checkpoint.digest))
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def named(data: bytes | bytearray) -> tuple[str, Checkpoint]:
    """The name under which a blob was registered, and its checkpoint.

    Raises:
        CheckpointError: malformed, or none of ours.
    """
    return str(about_of(read_header(data))["name"]), decode(data)


@lru_cache(maxsize=1)
def software() -> dict[str, str]:
    """Versions of what computes."""
    return {"python": python_version(), "torch": str(torch.__version__), "zoo-ensemble": own_version()}


def _from_file(path: Path, spec: Spec | None, classes: Sequence[str] | None, about: Mapping[str, Any]) -> Checkpoint:
    """Read once; a file of ours knows its spec, any other must be told."""
    try:
        data = _files.read(path)
    except OSError as error:
        raise RegistryError("DISK", f"cannot read {path}: {error}") from error
    try:
        ours = "zoo" in read_header(data).metadata
        if ours:
            return _completed(decode(data), spec, classes, about)
        if spec is None or classes is None:
            raise RegistryError("ARGUMENT", f"expected a spec and class names with {path}, which does not know them")
        return foreign(data, spec, classes, **about)
    except CheckpointError as error:
        raise CheckpointError(error.reason, f"{path}: {str(error).removesuffix(f' [{error.reason}]')}") from error


def _completed(
    checkpoint: Checkpoint, spec: Spec | None, classes: Sequence[str] | None, about: Mapping[str, Any]
) -> Checkpoint:
    if spec is not None and spec != checkpoint.spec:
        raise RegistryError("ARGUMENT", f"expected the checkpoint's own spec {checkpoint.spec}, got {spec}")
    if classes is not None and tuple(classes) != checkpoint.classes:
        raise RegistryError("ARGUMENT", f"expected the checkpoint's own classes {checkpoint.classes}, got {classes}")
    return replace(checkpoint, **about) if about else checkpoint
