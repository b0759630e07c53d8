"""Recorded metrics, measured again on the frames that they name."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from zoo.checkpoint import Checkpoint
from zoo.data.frames import FrameSet, stretch
from zoo.registry.entries import Entry

_BATCH = 8192
_TOLERANCE = {"accuracy": 2e-3, "loss": 1e-2}  # frames near a tie and kernels of other machines differ by less


def measured(checkpoint: Checkpoint, frames: FrameSet) -> dict[str, float]:
    """Accuracy (fraction) and loss (mean nats per frame) of a checkpoint on labelled frames.

    Raises:
        ValueError: frames without labels, of other features, or with other classes.
    """
    spec = checkpoint.spec
    if frames.labels is None or frames.classes != checkpoint.classes or frames.features.shape[1] != spec.features:
        msg = f"expected labelled frames of {spec.features} features and the checkpoint's classes, got others"
        raise ValueError(msg)
    model, labels = checkpoint.to_module(), frames.labels.cpu()
    right, loss = 0, 0.0
    with torch.inference_mode():
        prepared = stretch(frames.to("cpu"), spec.context, spec.normalisation, spec.padding)
        for start in range(0, len(frames), _BATCH):
            some = slice(start, start + _BATCH)
            logits = model(prepared.windows(some))  # (B, C)
            right += int((logits.argmax(dim=1) == labels[some]).sum())
            loss += float(functional.cross_entropy(logits.double(), labels[some], reduction="sum"))
    return {"accuracy": right / len(frames), "loss": loss / len(frames)}


def compare(entry: Entry, checkpoint: Checkpoint, frames: FrameSet) -> list[dict[str, Any]]:
    """One row for each recorded accuracy and loss on these very frames: recorded, measured, whether they agree."""
    recorded = {
        name: float(metric["value"])
        for name, metric in entry.metrics.items()
        if metric.get("frames") == frames.fingerprint and name.rpartition("/")[2] in _TOLERANCE
    }
    found = measured(checkpoint, frames) if recorded else {}
    rows = []
    for name, value in recorded.items():
        kind = name.rpartition("/")[2]
        scale = max(1.0, abs(value)) if kind == "loss" else 1.0
        agrees = abs(found[kind] - value) <= _TOLERANCE[kind] * scale
        rows.append(
            {"version": entry.reference, "metric": name, "recorded": value, "measured": found[kind], "agrees": agrees}
        )
    return rows
