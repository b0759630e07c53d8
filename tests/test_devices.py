"""Devices that this machine has, and those that it has not."""

import pytest
import torch

import zoo
from zoo import _names


def with_cuda(monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    """Let torch find so many CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)


def test_what_is_there_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's device."""
    with_cuda(monkeypatch, 2)
    assert _names.usable_device("cpu") == torch.device("cpu")
    assert _names.usable_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("device", "devices", "message"),
    [
        ("moon", 0, "expected a device such as 'cpu'"),
        ("cuda", 0, "got 'cuda', but torch finds no CUDA device; use 'cpu'"),
        ("cuda:2", 2, "2 CUDA devices, got 'cuda:2'; use 'cuda'"),
    ],
)
def test_what_is_not_there_is_refused(
    device: str, devices: int, message: str, frames: zoo.FrameSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the way out; before frames are moved there."""
    with_cuda(monkeypatch, devices)
    with pytest.raises(ValueError, match=message):
        frames.to(device)
