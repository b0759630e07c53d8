"""One checkpoint from several of one spec: the mean of their weights, or what a greedy soup takes of them.

Integer buffers cannot be averaged and are taken from the first; BatchNorm's statistics are seen anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.checkpoint import Checkpoint
from zoo.data.frames import FrameSet, Stretch, stretch
from zoo.training.batchnorm import reestimate
from zoo.training.scores import Judge

METHODS = ("uniform", "ema", "greedy")
_BATCH = 4096  # frames
_STATISTICS = 262_144  # frames from which BatchNorm's statistics are estimated


def average(
    checkpoints: Sequence[Checkpoint],
    *,
    frames: FrameSet | None = None,
    valid: FrameSet | None = None,
    method: str = "uniform",
    decay: float = 0.5,
) -> Checkpoint:
    """Average the weights of checkpoints of one spec, such as a run's last epochs.

    Args:
        checkpoints: at least one, of equal specs and classes, oldest first.
        frames: training frames on which BatchNorm's statistics are estimated anew; without them the
            statistics are averaged as the weights are, which is not what the averaged model would see.
        valid: frames with labels by which the result is judged, and by which "greedy" decides.
        method: "uniform", the plain mean. "ema": a moving average from the oldest on, each further checkpoint
            with the share 1 - `decay`. "greedy": by falling validation accuracy, each is taken into the mean if
            the mean does not get worse for it; so the result is never worse than the best on those frames.
        decay: of "ema".

    Returns:
        A checkpoint of kind "averaged" whose parents are the digests of those averaged.

    Raises:
        ValueError: no checkpoints, different specs or classes, an unknown method, "greedy" without `valid`.

    Example:
        >>> from zoo.models.spec import Spec, build
        >>> spec = Spec("cylinder", features=2, context=0, classes=2, options={"width": 4, "depth": 1})
        >>> one = Checkpoint.from_module(build(spec, seed=0), spec, ["a", "b"])
        >>> average([one, one]).digest == one.digest
        True

    References:
        Izmailov et al., UAI 2018 (stochastic weight averaging); Wortsman et al., "Model soups", ICML 2022.
    """
    _check(checkpoints, method, valid)
    statistics = None if frames is None else _Statistics(checkpoints[0], frames)
    judge = None if valid is None else _Tried(checkpoints[0], valid)
    if method == "greedy":
        assert judge is not None
        tensors, used = _greedy(checkpoints, statistics, judge)
    else:
        tensors, used = _mixed(checkpoints, _shares(len(checkpoints), method, decay)), list(checkpoints)
        tensors = tensors if statistics is None else statistics.seen(tensors)
    metrics = {} if judge is None else judge.metrics(tensors)
    return replace(
        checkpoints[0],
        tensors=tensors,
        metrics=metrics,
        recipe=None,
        kind="averaged",
        parents=tuple(dict.fromkeys(one.digest for one in used)),
        note=f"{method} average of {len(used)} of {len(checkpoints)}",
    )


def losses_along(first: Checkpoint, last: Checkpoint, frames: FrameSet, points: int = 11) -> tuple[Tensor, Tensor]:
    """The loss on frames along the straight line between two checkpoints' weights.

    A valley between them means that their mean is a good model; a ridge, that it is not.

    Args:
        first: where the line begins.
        last: where it ends; of the same spec.
        frames: with labels; BatchNorm's statistics are estimated anew on them at every point.
        points: at least 2, the ends included.

    Returns:
        Positions from 0 to 1 (points,) and mean losses in nats (points,).

    References:
        Goodfellow et al., "Qualitatively characterizing neural network optimization problems", ICLR 2015.
    """
    _check([first, last], "uniform", None)
    if points < 2:
        msg = f"expected at least 2 points, got {points}"
        raise ValueError(msg)
    statistics, judge = _Statistics(first, frames), _Tried(first, frames)
    positions = torch.linspace(0, 1, points)
    found = [judge(statistics.seen(_mixed([first, last], [1 - float(at), float(at)])))[1] for at in positions]
    return positions, torch.cat(found)


def _check(checkpoints: Sequence[Checkpoint], method: str, valid: FrameSet | None) -> None:
    if not checkpoints:
        msg = "expected at least one checkpoint to average, got none"
        raise ValueError(msg)
    if method not in METHODS:
        msg = f"expected a method of {', '.join(METHODS)}, got {method!r}"
        raise ValueError(msg)
    if method == "greedy" and valid is None:
        msg = "a greedy soup is chosen on validation frames; pass valid="
        raise ValueError(msg)
    first = checkpoints[0]
    for index, other in enumerate(checkpoints):
        for what in ("spec", "classes"):
            if getattr(other, what) != getattr(first, what):
                msg = (
                    f"cannot average checkpoint {index} with checkpoint 0: {what} {getattr(other, what)} "
                    f"differs from {getattr(first, what)}; the weights would not mean the same"
                )
                raise ValueError(msg)


def _shares(count: int, method: str, decay: float) -> list[float]:
    """What each checkpoint counts; the sum is one."""
    if method == "uniform":
        return [1 / count] * count
    if not 0 <= decay < 1:
        msg = f"expected a decay from 0 to below 1, got {decay}"
        raise ValueError(msg)
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]


def _mixed(checkpoints: Sequence[Checkpoint], shares: Sequence[float]) -> dict[str, Tensor]:
    """Weighted mean in float64; tensors that are not floating are the first's."""
    mixed = {}
    for name, first in checkpoints[0].tensors.items():
        if not first.is_floating_point():
            mixed[name] = first.clone()
            continue
        total = torch.zeros_like(first, dtype=torch.float64)
        for one, share in zip(checkpoints, shares, strict=True):
            total.add_(one.tensors[name].double(), alpha=share)
        mixed[name] = total.to(first.dtype)
    return mixed


def _greedy(
    checkpoints: Sequence[Checkpoint], statistics: _Statistics | None, judge: _Tried
) -> tuple[dict[str, Tensor], list[Checkpoint]]:
    """The soup's tensors and its ingredients; the best checkpoint alone if no other helps."""
    ranked = sorted(checkpoints, key=lambda one: -float(judge(one.tensors)[0]))  # stable: ties keep their order
    used, tensors = ranked[:1], dict(ranked[0].tensors)
    best = judge(tensors)[0]
    for candidate in ranked[1:]:
        trial = _mixed([*used, candidate], [1 / (len(used) + 1)] * (len(used) + 1))
        trial = trial if statistics is None else statistics.seen(trial)
        accuracy = judge(trial)[0]
        if accuracy >= best:
            used, tensors, best = [*used, candidate], trial, accuracy
    return tensors, used


class _Statistics:
    """Frames on which BatchNorm's statistics are estimated."""

    def __init__(self, checkpoint: Checkpoint, frames: FrameSet) -> None:
        self._module = checkpoint.to_module(frames.features.device)
        self._stretch = _prepared(checkpoint, frames)
        self._step = max(len(frames) // _STATISTICS, 1)

    def seen(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same weights with the statistics they bring about."""
        self._module.load_state_dict(tensors)
        reestimate(self._module, self._batches())
        found = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._module.state_dict().items()}
        return {name: found[name] if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    def _batches(self) -> Iterator[Tensor]:
        chosen = torch.arange(len(self._stretch.firsts))[:: self._step]
        for batch in torch.split(chosen, _BATCH):
            if len(batch) > 1:  # the variance of one frame is not defined
                yield self._stretch.windows(batch)


class _Tried:
    """Validation frames, and a module that takes on the weights to be judged."""

    def __init__(self, checkpoint: Checkpoint, frames: FrameSet) -> None:
        self._judge = Judge(frames, checkpoint.spec)
        self._module = checkpoint.to_module(frames.features.device)

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Accuracy (1,) as a fraction and loss (1,) in nats."""
        self._module.load_state_dict(tensors)
        return self._judge(lambda x: self._module(x)[None])

    def metrics(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """As a checkpoint keeps them."""
        return self._judge.metrics(*self(tensors))


def _prepared(checkpoint: Checkpoint, frames: FrameSet) -> Stretch:
    spec = checkpoint.spec
    return stretch(frames, spec.context, spec.normalisation, spec.padding)
