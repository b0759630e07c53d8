"""One checkpoint = one safetensors file: weights, and all that is needed to use and to trust them.

The file has one metadata key with canonical JSON, so its bytes are a function of its content: the same weights give
the same blob. Reading checks everything before a model is made: the bytes (`verify_bytes`), the metadata, the fit to
the spec (`check_fit`), the values. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from zoo import _files
from zoo._json import TextError, canonical, depth, parse_strictly
from zoo.checkpoint.exam import FAR, Exam, asked, examine, logits_of, probe_rows, rows_for, same, unlike
from zoo.checkpoint.header import DTYPES, CheckpointError, Header, bytes_of, read_header
from zoo.checkpoint.match import (
    adapted,
    check_fit,
    check_spec,
    check_values,
    outline,
    owned,
    prefix_of,
    prefixes,
    rebuilt,
    restore,
    state_of,
    template,
)
from zoo.models.spec import Spec

__all__ = [
    "KINDS",
    "Checkpoint",
    "CheckpointError",
    "Exam",
    "Header",
    "adapted",
    "check_fit",
    "check_values",
    "decode",
    "encode",
    "examine",
    "foreign",
    "logits_of",
    "outline",
    "pack",
    "prefix_of",
    "prefixes",
    "read",
    "restore",
    "state_of",
    "template",
    "tensors_of",
    "verify",
    "verify_bytes",
    "write",
]

T = TypeVar("T")
KINDS = ("trained", "averaged", "imported", "distilled")
_KEY = "zoo"
_FORMAT = "zoo-checkpoint"
_SCHEMA = 1
_ABOUT = {"metrics": dict, "recipe": dict | None, "parents": list, "kind": str, "trained_on": str, "note": str}
_FIELDS: dict[str, Any] = {"name": str, "spec": dict, "classes": list, **_ABOUT}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights of one model with what they are and where they come from.

    Args:
        spec: what the model computes and which input it wants.
        tensors: the full `state_dict`; none shares memory with a live model. Held on the CPU, contiguous.
        classes: names of the C classes, in the order of the logits.
        metrics: such as `{"valid/accuracy": {"value": 0.86, "unit": "fraction", "n": 1000, "frames": fingerprint}}`.
        recipe: `Recipe.to_dict()`, or None.
        parents: ids of what it was averaged or distilled from.
        kind: a name in `KINDS`.
        trained_on: `FrameSet.fingerprint` of the training frames.
        note: free text.

    Raises:
        CheckpointError: tensors that do not fit the spec, are not finite, or class names that are too few
            or repeated.
    """

    spec: Spec
    tensors: Mapping[str, Tensor]
    classes: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    parents: tuple[str, ...] = ()
    kind: str = "trained"
    trained_on: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.spec, Spec) and isinstance(self.tensors, Mapping)):
            came = f"{type(self.spec).__name__} and {type(self.tensors).__name__}"
            msg = f"expected a Spec and a mapping of tensors, got {came}"
            raise TypeError(msg)
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "parents", tuple(self.parents))
        names, count = self.classes[:5], len(self.classes)
        if not all(isinstance(name, str) for name in self.classes):
            raise CheckpointError("CLASSES", f"expected names of classes as strings, got {names}")
        if count != self.spec.classes or len(set(self.classes)) != count:
            expected = f"expected {self.spec.classes} different names of classes"
            raise CheckpointError("CLASSES", f"{expected}, got {count}: {names}")
        if self.kind not in KINDS:
            raise CheckpointError("METADATA", f"expected a kind of {', '.join(KINDS)}, got {self.kind!r}")
        object.__setattr__(self, "tensors", owned(self.tensors, f"a model of {self.spec.architecture!r}"))
        check_spec(self.spec, self.tensors)
        check_values(self.tensors)

    @classmethod
    def from_module(
        cls, module: nn.Module, spec: Spec, classes: Sequence[str], *, strip_prefix: bool | str = False, **fields: Any
    ) -> Self:
        """A copy of a live model's weights, if the model made of them answers as the live one.

        Args:
            module: the live model, or a wrapper around it.
            spec, classes: as above, and so are `fields`.
            strip_prefix: where the model is in a wrapper, such as "module."; True finds it.

        Raises:
            CheckpointError: STATE, DTYPE: a state that tensors alone cannot hold. ANSWERS: no usable answers, or others
                than those of the model that is made of spec and tensors. Others as in the class.

        Example:
            >>> import zoo
            >>> spec = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})
            >>> checkpoint = Checkpoint.from_module(zoo.build(spec, seed=0), spec, ["a", "b"])
            >>> checkpoint.kind, len(checkpoint.digest)
            ('trained', 64)
        """
        if prefix := prefix_of(template(spec), module.state_dict(), strip_prefix) if strip_prefix else "":
            module = module.get_submodule(prefix.removesuffix("."))
        state = state_of(module, f"the model of {spec.architecture!r}")
        kept = cls(spec, {name: tensor.clone() for name, tensor in state.items()}, tuple(classes), **fields)
        kept.check_against(module)
        return kept

    @cached_property
    def digest(self) -> str:
        """sha256 of the tensors' content: names, element types, shapes and bytes; 64 hex digits."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().contiguous()
            digest.update(f"{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
            if tensor.numel():
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def exam(self) -> Exam:
        """What the model made of it answers to the probe batch; CheckpointError (ANSWERS) where that is unusable."""
        return self._asked(examine, self.to_module())

    def check_against(self, module: nn.Module) -> None:
        """Refuse (ANSWERS) a checkpoint whose model answers otherwise than `module`, from which its tensors were taken.

        It does where something else decides what the module computes: an activation that was changed after building,
        constants that were drawn, attributes. The message names the first such difference.
        """
        pair = module, self.to_module()
        near = self._asked(examine, module).logits, self._asked(asked, pair[1])
        far = [self._asked(asked, model, FAR) for model in pair]
        if same(*near) and same(*far):
            return
        why = unlike(*pair) or "its code computes otherwise, or its builder draws constants"
        msg = f"expected the model of {self.spec.architecture!r} that is kept to answer as the one in hand, but {why}"
        raise CheckpointError("ANSWERS", msg)

    def _asked(self, question: Callable[..., T], module: nn.Module, scale: float = 1.0) -> T:
        rows = rows_for(module, scale * probe_rows(self.spec.inputs))
        try:
            return question(module, rows, self.spec.classes, name=self.spec.architecture)
        except ValueError as error:
            raise CheckpointError("ANSWERS", str(error)) from error

    def about(self) -> dict[str, Any]:
        """Where the checkpoint comes from, as plain data: metrics, recipe, parents, kind, trained_on, note."""
        fields = {name: getattr(self, name) for name in _ABOUT}
        fields["metrics"] = {key: dict(value) for key, value in self.metrics.items()}
        fields["recipe"] = None if self.recipe is None else dict(self.recipe)
        return {**fields, "parents": list(self.parents)}

    def to_module(self, device: torch.device | str = "cpu") -> nn.Module:
        """A new model in eval mode with these weights; it shares no memory with the checkpoint."""
        return rebuilt(self.spec, self.tensors, device)


def encode(checkpoint: Checkpoint, *, name: str = "") -> bytes:
    """The bytes of the checkpoint's file, a function of its content and `name` alone.

    Raises:
        CheckpointError: METADATA; TENSOR_NAME, DTYPE, ...: what `decode` would refuse.
    """
    about: dict[str, Any] = {
        "format": _FORMAT,
        "schema": _SCHEMA,
        "name": name,
        "spec": checkpoint.spec.to_dict(),
        "classes": list(checkpoint.classes),
        **checkpoint.about(),
    }
    try:
        text = canonical(about)
        if parse_strictly(text) != about:
            raise TypeError("expected plain data: lists, not tuples, and keys that are strings")
    except (ValueError, TypeError) as error:
        raise CheckpointError("METADATA", f"cannot write the checkpoint's metadata: {error}") from error
    return pack(checkpoint.tensors, {_KEY: text})


def decode(data: bytes | bytearray) -> Checkpoint:
    """The checkpoint of a file's bytes; its tensors are views of `data`, nothing is copied.

    Raises:
        CheckpointError: malformed, no checkpoint of ours, or tensors that do not fit its spec.
    """
    header = read_header(data)
    about = about_of(header)
    try:
        spec = Spec.from_dict(about["spec"])
    except (ValueError, TypeError) as error:
        raise CheckpointError("SPEC", f"the checkpoint's spec cannot be used: {error}") from error
    known = {name: about[name] for name in _ABOUT}
    return Checkpoint(spec, tensors_of(data, header), tuple(about["classes"]), **known)


def about_of(header: Header) -> dict[str, Any]:
    """A checkpoint's metadata: name, spec, classes, metrics, recipe, parents, kind, trained_on, note.

    Raises:
        CheckpointError: METADATA: not written by this project, or by a newer version of it, or damaged.
    """
    text = header.metadata.get(_KEY)
    if text is None:
        _refuse("it has no key 'zoo'; register a foreign file with its spec and class names")
    try:
        about = parse_strictly(text)
    except TextError as error:
        raise CheckpointError("METADATA", f"the checkpoint's metadata are {error}") from None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        _refuse(f"expected the format {_FORMAT!r}")
    if about.get("schema") != _SCHEMA or (text.count("{") + text.count("[") > 64 and depth(about) > 64):
        _refuse(f"expected schema {_SCHEMA}, got {str(about.get('schema'))[:20]}; update this program")
    for key, kind in _FIELDS.items():
        if key not in about or not isinstance(about[key], kind):
            _refuse(f"the field {key!r} is missing or of another type")
    if unknown := sorted(set(about) - {*_FIELDS, "format", "schema"}):
        _refuse(f"unknown fields {unknown}")
    return about


def foreign(
    data: bytes | bytearray, spec: Spec, classes: Sequence[str], *, strip_prefix: bool | str = False, **fields: Any
) -> Checkpoint:
    """A checkpoint from any safetensors file, checked against a spec; the tensors are copies.

    Args:
        data: the file.
        spec, classes: as in `Checkpoint`, and so are `fields`.
        strip_prefix: what to cut off the names of the tensors, such as "module."; True finds it.

    Raises:
        CheckpointError: malformed, or tensors that do not fit.
    """
    expected = template(spec)
    given = tensors_of(data, read_header(data))
    found = adapted(expected, given, prefix=prefix_of(expected, given, strip_prefix))
    check_fit(expected, found)
    copies = {name: tensor.clone() for name, tensor in found.items()}
    return Checkpoint(spec, copies, tuple(classes), **{"kind": "imported", **fields})


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file of any tensors, such as a run's state; `tensors_of` reads them.

    Raises:
        CheckpointError: TENSOR_NAME, DTYPE, ...: what `read_header` would refuse, so that it is never written.
    """
    try:
        data = save(dict(tensors), dict(metadata))
    except KeyError as error:
        raise CheckpointError("DTYPE", f"expected tensors of {', '.join(DTYPES)}, got {error}") from error
    read_header(data)
    return data


def tensors_of(data: bytes | bytearray, header: Header) -> dict[str, Tensor]:
    """The tensors as views of the file's bytes, in the order of the header."""
    buffer = data if isinstance(data, bytearray) else bytearray(data)
    found = {}
    for name, piece in header.pieces.items():
        raw, size = torch.empty(0, dtype=torch.uint8), piece.stop - piece.start
        if size:
            raw = torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=piece.start)
        if piece.start % piece.dtype.itemsize:  # a header of odd length: elements would lie across words
            raw = raw.clone()
        found[name] = raw.view(piece.dtype).reshape(piece.shape)
    return found


def write(checkpoint: Checkpoint, path: Path | str, *, name: str = "") -> None:
    """Put a checkpoint at `path`: whole and durable, or not at all.

    Raises:
        CheckpointError: UNREADABLE: the disk refused; what was there before is still there.
    """
    path = Path(path)
    try:
        _files.make_folders(path.parent)
        _files.write(path, encode(checkpoint, name=name))
    except OSError as error:
        raise CheckpointError("UNREADABLE", f"cannot write the checkpoint {path}: {error}") from error


def read(path: Path | str, *, sha256: str | None = None) -> Checkpoint:
    """The checkpoint at `path`, read once, checked, then parsed from those same bytes.

    Args:
        path: a file that `write` made.
        sha256: what the file's bytes must hash to; None takes any.

    Raises:
        CheckpointError: not a plain file, unreadable, another hash, malformed, or a misfit.
    """
    return _read(path, sha256, decode)


def verify(path: Path | str, *, sha256: str | None = None) -> Header:
    """The header of a whole, well-formed file; as `read`, but it need not be a checkpoint of ours."""
    return _read(path, sha256, read_header)


verify_bytes = read_header  # of a well-formed file, given as bytes


def _read(path: Path | str, sha256: str | None, parse: Callable[[bytearray], T]) -> T:
    """What `parse` makes of the bytes of a plain file, of this hash where one is given; its errors name the file."""
    data = bytes_of(Path(path))
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise CheckpointError("DIGEST", f"expected sha256 {sha256} at {path}, got {found}; the file was changed")
    try:
        return parse(data)
    except CheckpointError as error:
        raise error.about(path) from None


def _refuse(message: str) -> NoReturn:
    raise CheckpointError("METADATA", f"expected a checkpoint of this project: {message}")
