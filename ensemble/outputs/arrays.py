"""The one check of incoming arrays: rows that are distributions, and indices that are in range."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_TOLERANCE = 1e-3  # rows whose sum is further from one than this are refused


def distributions(values: Any, whose: str = "", *, dtype: torch.dtype = torch.float32, abstain: bool = False) -> Tensor:
    """(N, C) rows on the CPU, checked; not to be written to.

    Args:
        values: array or tensor of any number type. The sums of float16 and bfloat16 rows may be off by the machine
            epsilon of their type; these rows are divided by their sum.
        whose: for the message, such as "from member 'a'".
        dtype: of the rows returned.
        abstain: accept rows that are all NaN.

    Raises:
        ValueError: another shape, or a row that is no distribution: its sum is further from one than 1e-3 (logits,
            scores), or it holds a negative number or NaN.
    """
    given = values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    rows = given.to(dtype)
    whose = f" {whose}" if whose else ""
    if rows.ndim != 2:
        msg = f"expected probabilities of shape (N, C){whose}, got {tuple(rows.shape)}"
        raise ValueError(msg)
    sums, half = rows.sum(dim=1), given.dtype in (torch.float16, torch.bfloat16)
    tolerance = max(_TOLERANCE, torch.finfo(given.dtype).eps) if half else _TOLERANCE
    bad = ~((sums - 1).abs() <= tolerance) | (rows < 0).any(dim=1)
    if abstain:
        bad &= ~rows.isnan().all(dim=1)
    if bad.any():
        frame = int(bad.nonzero()[0])
        row, way_out = rows[frame], "apply softmax to logits first"
        if row.isnan().all():
            way_out = "if it abstains there, declare abstain=True to MemberOutputs, or leave those frames out"
        came = f"a row with sum {float(row.sum()):.6g} and minimum {float(row.min()):.6g} at frame {frame}"
        msg = (
            f"expected rows of probabilities that sum to one{whose}, got {came} ({int(bad.sum())} such rows); {way_out}"
        )
        raise ValueError(msg)
    return rows / sums[:, None] if half else rows


def indices(values: Any, what: str, frames: int, *, below: int | None = None) -> Tensor:
    """(N,) int64 on the CPU: labels or groups.

    Args:
        values: array or tensor of any integer type.
        what: for the message.
        frames: N.
        below: one more than the largest value allowed; None for any integers.

    Raises:
        ValueError: another shape or type, or a value out of range.
    """
    tensor = torch.as_tensor(values).detach().cpu()
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    if tensor.shape != (frames,) or (frames and not whole):
        came = f"{tuple(tensor.shape)} {tensor.dtype}"
        msg = f"expected {what} of shape ({frames},) and an integer type, got {came}"
        raise ValueError(msg)
    tensor = tensor.long()  # first, because torch has no minimum of small unsigned types
    if below is not None and frames and not 0 <= int(tensor.min()) <= int(tensor.max()) < below:
        msg = f"expected {what} from 0 to {below - 1}, got {int(tensor.min())} to {int(tensor.max())}"
        raise ValueError(msg)
    return tensor
