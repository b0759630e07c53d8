"""`MemberOutputs` as bytes and back: one safetensors document, for judging elsewhere without any model."""

from __future__ import annotations

import json
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from ensemble.outputs import MemberOutputs

_FORMAT = "member-outputs"


def pack(outputs: MemberOutputs) -> bytes:
    """Everything of the outputs; equal outputs give equal bytes."""
    about = {
        "abstain": outputs.abstain,
        "classes": outputs.classes,
        "fingerprint": outputs.fingerprint,
        "format": _FORMAT,
        "members": outputs.members,
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
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        msg = f"expected members' outputs as written by `ensemble collect`, got something else ({error})"
        raise ValueError(msg) from error


def _about(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + length])
    about: dict[str, Any] = json.loads(header["__metadata__"][_FORMAT])
    return about
