"""The one check of the device that somebody asks for."""

from __future__ import annotations

import torch


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if this machine has it.

    Raises:
        ValueError: no such kind of device, or CUDA is asked for and there is none, or not so many.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        msg = f"expected a device such as 'cpu', 'cuda' or 'cuda:1', got {str(device)!r}"
        raise ValueError(msg) from error
    if wanted.type != "cuda":
        return wanted
    if not torch.cuda.is_available():
        msg = f"expected a device of this machine, got {str(device)!r} where torch finds no CUDA; use device='cpu'"
        raise ValueError(msg)
    if wanted.index is not None and wanted.index >= torch.cuda.device_count():
        msg = f"expected a device of this machine, got {str(device)!r} of {torch.cuda.device_count()}; use 'cuda'"
        raise ValueError(msg)
    return wanted
