"""The safetensors format, read strictly: what a file's bytes must be before anything is made of them.

A file is 8 bytes with the length of its header (little-endian), the header (a JSON object that maps each
tensor's name to its dtype, shape and the range of its bytes), then the data. One file has one reading, or
is refused: every byte of the data belongs to exactly one tensor, no key appears twice, no number needs
more than 64 bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch

from zoo import _files
from zoo._json import RefusalError, TextError, depth, has_surrogate, parse_integers

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
MOST_HEADER = 100_000_000  # bytes, the format's own limit
_MOST_ELEMENTS = 2**63 - 1
_MOST_AXES = 64
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]{0,510}[A-Za-z0-9_])?")

_SIGNS = {  # how a file begins -> what it seems to be
    rb"PK\x03\x04": "a zip archive, as torch.save writes them: `zoo adopt` reads those",
    rb"\x80[\x02\x04\x05]": "a pickle, as torch.save wrote them: `zoo adopt` reads those of tensors",
    rb"\x1f\x8b": "a gzip archive",
    rb"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    rb"\x89HDF": "an HDF5 file",
    rb"\x93NUMPY": "a NumPy array",
    rb"\{": "JSON text",
    rb"\s*(?i:<!doctype|<html)": "an HTML page: the download went wrong",
}


class CheckpointError(RefusalError):
    """A checkpoint that cannot be trusted; `reason` says in one word why, `message` is the text without it.

    The file: TOO_SMALL, HEADER_LENGTH, HEADER_TOO_LARGE, HEADER_ENCODING, HEADER_JSON, HEADER_DEPTH,
    HEADER_ROOT, DUPLICATE_KEY, NUMBER_RANGE, NOT_INTEGER, METADATA_TYPE, TENSOR_NAME, TENSOR_FIELDS, DTYPE,
    SHAPE, OFFSETS, SIZE, BOOL_VALUE, NOT_A_FILE, UNREADABLE, DIGEST. Its content: METADATA, SPEC, STATE, MISFIT,
    NOT_FINITE, VARIANCE, CLASSES. The model made of it: ANSWERS, PROBE. Saved elsewhere: PICKLE, DAMAGED, CONTENT.
    """


@dataclass(frozen=True)
class Piece:
    """One tensor's place in the file: element type, shape, and the range of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The header of a well-formed file: its tensors by name, and its metadata."""

    pieces: Mapping[str, Piece]
    metadata: Mapping[str, str]


def bytes_of(path: Path) -> bytearray:
    """The bytes of a checkpoint's file; CheckpointError (NOT_A_FILE, UNREADABLE) where they cannot be read."""
    try:
        return _files.read(path)
    except _files.NotRegularError as error:
        raise CheckpointError("NOT_A_FILE", str(error)) from error
    except OSError as error:
        raise CheckpointError("UNREADABLE", f"cannot read the checkpoint {path}: {error}") from error


def read_header(data: bytes | bytearray) -> Header:
    """The header of a whole file, checked in every respect.

    Raises:
        CheckpointError: the first thing that is wrong, by its `reason`, with a hint at what the file seems
            to be; the hint never decides, since a valid header of 640 bytes begins like a pickle.

    Example:
        >>> read_header((2).to_bytes(8, "little") + b"{}").pieces
        {}
    """
    try:
        header = _located(data, len(data))
        for name, piece in header.pieces.items():
            if piece.dtype is torch.bool and data[piece.start : piece.stop].translate(None, b"\0\1"):
                _refuse("BOOL_VALUE", f"expected bytes 0 and 1 in the boolean tensor {name!r}, got another")
    except CheckpointError as error:
        start = bytes(data[:64])
        hint = next((kind for sign, kind in _SIGNS.items() if re.match(sign, start)), "")
        found = f"expected a safetensors file, got what looks like {hint}" if hint else error.message
        raise CheckpointError(error.reason, found) from None
    return header


def header_of(file: int, size: int) -> tuple[bytes, Header]:
    """The bytes before the data of an opened file, and the header in them; as `read_header`, but no data is checked."""
    first = _files.read_some(file, 8)
    length = int.from_bytes(first, "little") if len(first) == 8 else 0
    head = first + _files.read_some(file, min(length, MOST_HEADER + 1, size))
    return head, _located(head, size)


def _located(data: bytes | bytearray, size: int) -> Header:
    """The header from the beginning of a file of `size` bytes."""
    if size < 8:
        _refuse("TOO_SMALL", f"expected a safetensors file of at least 8 bytes, got {size}")
    length = int.from_bytes(data[:8], "little")
    if length > MOST_HEADER:
        _refuse("HEADER_TOO_LARGE", f"expected a header of at most {MOST_HEADER:,} bytes, got {length:,}")
    if not 2 <= length <= size - 8:
        _refuse("HEADER_LENGTH", f"expected a header of 2 to {size - 8:,} bytes, got {length:,}")
    table = _parsed(bytes(data[8 : 8 + length]))
    metadata = table.pop(_METADATA, {})
    try:
        strings = isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
        if not strings or any(has_surrogate(text) for pair in metadata.items() for text in pair):
            _refuse("METADATA_TYPE", f"expected {_METADATA} that maps strings to strings, got {str(metadata)[:60]}")
        pieces = {name: _piece(name, fields, base=8 + length) for name, fields in table.items()}
    except CheckpointError:
        _refuse_deep(table)  # only what is refused anyway can be nested so deep
        _refuse_deep(metadata)
        raise
    place = 8 + length
    for start, stop in [*sorted((piece.start, piece.stop) for piece in pieces.values()), (size, size)]:
        if start != place:  # every byte of the data belongs to one tensor, and nothing follows the last
            what = "overlap" if start < place else "a hole"
            _refuse("OFFSETS", f"expected tensors that fill the data, got {what} between bytes {place} and {start}")
        place = stop
    return Header(pieces, metadata)


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
        table = parse_integers(text)
    except UnicodeDecodeError as error:
        raise CheckpointError("HEADER_ENCODING", f"expected a header in UTF-8: {error}") from None
    except TextError as error:
        if raw.startswith(b"\xef\xbb\xbf"):
            _refuse("HEADER_ENCODING", "expected a header in UTF-8 without a byte order mark")
        reason = {"SYNTAX": "HEADER_JSON", "DEPTH": "HEADER_DEPTH"}.get(error.reason, error.reason)
        raise CheckpointError(reason, f"the header is {error}") from None
    if not isinstance(table, dict) or not text.startswith("{"):
        _refuse_deep(table)
        _refuse("HEADER_ROOT", f"expected a header that is a JSON object, got {text[:20]!r}")
    return table


def _refuse_deep(table: Any) -> None:
    if depth(table) > 64:
        _refuse("HEADER_DEPTH", "expected a header of names, fields and sizes, got one nested beyond 64 levels")


def _piece(name: str, fields: Any, base: int) -> Piece:
    if not _NAME.fullmatch(name) or ".." in name:
        _refuse("TENSOR_NAME", f"expected names of letters, digits and single dots for tensors, got {name[:80]!r}")
    if type(fields) is not dict or fields.keys() != _FIELDS:
        _refuse("TENSOR_FIELDS", f"expected {sorted(_FIELDS)} for tensor {name!r}, got {str(fields)[:80]}")
    kind, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    dtype = DTYPES.get(kind) if type(kind) is str else None
    if dtype is None:
        _refuse("DTYPE", f"expected a dtype of {', '.join(DTYPES)} for tensor {name!r}, got {kind!r}")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES or prod([n or 1 for n in shape]) > _MOST_ELEMENTS:
        _refuse("SHAPE", f"expected a list of sizes for tensor {name!r}, got {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse("OFFSETS", f"expected data_offsets [begin, end] for tensor {name!r}, got {str(offsets)[:80]}")
    size = prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        _refuse("SIZE", f"expected {size:,} bytes for tensor {name!r} {shape}, got {offsets[1] - offsets[0]:,}")
    return Piece(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _are_sizes(value: Any) -> bool:
    return type(value) is list and {*map(type, value)} <= {int} and (not value or min(value) >= 0)


def _refuse(reason: str, message: str) -> NoReturn:
    raise CheckpointError(reason, message)
