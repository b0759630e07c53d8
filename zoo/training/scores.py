"""How good models are on labelled frames: accuracy and loss, member by member."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zoo.data.frames import FrameSet, stretch
from zoo.models.spec import Spec

Forward = Callable[[Tensor], Tensor]
_AT_ONCE = 16_384  # frames times members; keeps the activations within the cache


class Scorer:
    """Labelled frames, prepared once to evaluate models of one spec on the frames' device."""

    def __init__(self, frames: FrameSet, spec: Spec) -> None:
        self.frames = frames
        self._labels = labels_of(frames, "valid").to(frames.features.device)
        self._stretch = stretch(frames, spec.context, spec.normalisation, spec.padding)

    @torch.no_grad()
    def __call__(self, forward: Forward, members: int = 1) -> tuple[Tensor, Tensor]:
        """Accuracy (M,) as a fraction and loss (M,) in nats, float64; forward: (B, inputs) -> (M, B, C) logits."""
        size = max(_AT_ONCE // members, 256)
        right, loss = torch.zeros(2, members, dtype=torch.float64)
        for at in range(0, len(self._labels), size):
            labels = self._labels[at : at + size]
            logits = forward(self._stretch.windows(slice(at, at + size))).float()
            right += (logits.argmax(dim=-1) == labels).sum(dim=1).cpu()
            loss += losses(logits, labels).double().sum(dim=1).cpu()
        return right / len(self._labels), loss / len(self._labels)

    def metrics(self, accuracy: Tensor, loss: Tensor) -> dict[str, dict[str, Any]]:
        """One member's scores as a checkpoint stores them: with the unit, number and fingerprint of the frames."""
        measured_on = {"n": len(self.frames), "frames": self.frames.fingerprint}
        return {
            "valid/accuracy": {"value": float(accuracy), "unit": "fraction", **measured_on},
            "valid/loss": {"value": float(loss), "unit": "nats", **measured_on},
        }


def losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(M, B) cross-entropies in nats of (M, B, C) logits; labels (B,) for all members or (M, B)."""
    M, B, _ = logits.shape
    flat = functional.cross_entropy(
        logits.flatten(0, 1), labels.expand(M, B).flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return flat.view(M, B)


def labels_of(frames: FrameSet, what: str) -> Tensor:
    """The labels of the frames, which a message calls `what` where there are none."""
    if frames.labels is None:
        msg = f"expected {what} frames with labels, got none; is there a transcript folder?"
        raise ValueError(msg)
    return frames.labels
