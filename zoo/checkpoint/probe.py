"""A behaviour fingerprint: what a model says to a fixed batch, so that right bytes in wrong code are found.

The batch is drawn from a seed by arithmetic of our own, so that it is the same whatever torch's generators
become. The digest of the rounded logits is equal for equal behaviour on one machine; between machines the
last bits differ and may round apart, so a few sums over all logits are kept beside it and decide.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from zoo.checkpoint.header import CheckpointError

_ROWS = 4
_DIGITS = 3
_TOLERANCE = 1e-3  # of the largest value: far above the last bits, far below another activation


def probe(module: nn.Module, inputs: int) -> dict[str, Any]:
    """The fingerprint of a model in eval mode: `{"digest": 16 hex digits, "values": 4 numbers}`.

    Args:
        module: (B, inputs) -> (B, classes) logits, on the CPU.
        inputs: length of its windows.

    Example:
        >>> sorted(probe(nn.Identity(), inputs=3))
        ['digest', 'values']
    """
    with torch.inference_mode():
        logits = module(_batch(inputs)).double()  # (4, C)
    scale = float(logits.abs().max()) or 1.0
    rounded = (logits / scale * 10**_DIGITS).round().long()
    weights = torch.cos(torch.arange(logits.shape[1], dtype=torch.float64))
    values = [float(f"{float(value):.6g}") for value in logits @ weights]
    return {"digest": hashlib.sha256(str(rounded.tolist()).encode()).hexdigest()[:16], "values": values}


def check_probe(recorded: dict[str, Any], module: nn.Module, inputs: int) -> None:
    """Refuse a model that no longer says what it said when it was registered.

    Raises:
        CheckpointError: PROBE, with both sets of numbers.
    """
    now = probe(module, inputs)
    if now["digest"] == recorded.get("digest"):
        return
    before, after = recorded.get("values", []), now["values"]
    limit = _TOLERANCE * max([1e-6, *map(abs, before)])
    if len(before) == len(after) and all(abs(a - b) <= limit for a, b in zip(before, after, strict=True)):
        return
    raise CheckpointError(
        "PROBE",
        f"expected {before} from the probe batch, got {after}: the weights are right, the code computes otherwise",
    )


def _batch(inputs: int) -> Tensor:
    """(4, inputs) float32 between -2 and 2: a chaotic sequence of integers, scaled."""
    index = torch.arange(_ROWS * inputs, dtype=torch.int64)
    mixed = (index * 2_654_435_761 + 12_345) % 4_294_967_291 % 65_521
    return (mixed.double() / 65_521 * 4 - 2).float().reshape(_ROWS, inputs)
