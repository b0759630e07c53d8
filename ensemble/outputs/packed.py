"""`MemberOutputs` as bytes and back: one safetensors document, for judging elsewhere without any model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from ensemble.outputs import MemberOutputs

_FORMAT = "member-outputs"
_MOST_HEAD = 100_000_000  # bytes; safetensors reads no more either
_STRANGE = (SafetensorError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError)
_NOBODY: Mapping[str, str] = MappingProxyType({})


def pack(outputs: MemberOutputs, references: Mapping[str, str] = _NOBODY) -> bytes:
    """Everything of the outputs; equal outputs give equal bytes.

    Args:
        outputs: what members said.
        references: member -> the version in a registry that said it, as far as that is known.
    """
    about = {
        "abstain": outputs.abstain,
        "classes": outputs.classes,
        "fingerprint": outputs.fingerprint,
        "format": _FORMAT,
        "members": outputs.members,
        "references": dict(references),
    }
    tensors = {"log_probabilities": outputs.log_probabilities, "groups": outputs.groups, "labels": outputs.labels}
    present = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    return save(present, metadata={_FORMAT: json.dumps(about, sort_keys=True)})


def unpack(data: bytes) -> MemberOutputs:
    """The outputs that `pack` wrote.

    Raises:
        ValueError: the bytes are something else.
    """
    try:
        tensors, about = load(data), _about(data)
        return MemberOutputs(
            tensors["log_probabilities"],
            about["members"],
            about["classes"],
            labels=tensors.get("labels"),
            groups=tensors["groups"],
            fingerprint=about["fingerprint"],
            abstain=about.get("abstain", False),
        )
    except _STRANGE as error:
        raise _other(error) from error


def speakers(path: Path) -> dict[str, str]:
    """Member -> the reference given to `pack` for it, "" where none was; only the file's head is read.

    Raises:
        ValueError: `pack` did not write the file.
    """
    with path.open("rb") as file:
        length = file.read(8)
        head = length + file.read(min(int.from_bytes(length, "little"), _MOST_HEAD))
    try:
        about = _about(head)
        return {name: about.get("references", {}).get(name, "") for name in about["members"]}
    except _STRANGE as error:
        raise _other(error) from error


def _other(error: Exception) -> ValueError:
    return ValueError(f"expected members' outputs as written by `ensemble collect`, got something else ({error})")


def _about(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + length])
    about: dict[str, Any] = json.loads(header["__metadata__"][_FORMAT])
    return about
