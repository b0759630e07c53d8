"""Averages of weights: of several checkpoints, and during training; and BatchNorm's statistics for them.

Averaged weights have other activations than any of the averaged models, so the running statistics must be
estimated anew on frames, not averaged. Integer buffers cannot be averaged; they are taken from one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo._names import checked
from zoo.checkpoint import Checkpoint
from zoo.checkpoint.exam import rows_for
from zoo.data.frames import FrameSet, prepared
from zoo.training.optimisers import restored
from zoo.training.step import Scorer, evenly, forward_of, spread_batches

METHODS = ("uniform", "ema", "greedy")
_BATCH = 4096  # frames
_STATISTICS = 262_144  # frames from which BatchNorm's statistics are estimated
Tensors = Mapping[str, Tensor]


@checked
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
            statistics are averaged like the weights, which is not what the averaged model would see.
        valid: frames with labels on which the result is evaluated, and by which "greedy" decides.
        method: "uniform", the plain mean. "ema", a moving average from the oldest on, in which each further
            checkpoint has the share 1 - `decay`. "greedy", which adds checkpoints to the mean by falling validation
            accuracy, each only if the mean gets no worse; so the result is never worse than the best of them
            on those frames.
        decay: decay of "ema".

    Returns:
        A checkpoint of kind "averaged" whose parents are the digests of those in the average.

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
    if method not in METHODS:
        msg = f"expected one of the methods {', '.join(METHODS)}, got {method!r}"
        raise ValueError(msg)
    if method == "greedy" and valid is None:
        msg = "a greedy soup is chosen on validation frames; pass valid="
        raise ValueError(msg)
    if method == "ema" and not 0 <= decay < 1:
        msg = f"expected a decay from 0 to below 1, got {decay}"
        raise ValueError(msg)
    trials, count = _Trials(checkpoints, frames, valid), len(checkpoints)
    shares = [1 / count] * count
    if method == "ema":
        shares = [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]
    if method != "greedy":
        tensors, used = trials.mixed(checkpoints, shares), checkpoints
    else:
        tensors, used = _greedy(checkpoints, trials)
    return replace(
        checkpoints[0],
        tensors=tensors,
        metrics={} if trials.scorer is None else trials.scorer.metrics(*trials.scores(tensors)),
        recipe=None,
        kind="averaged",
        parents=tuple(dict.fromkeys(one.digest for one in used)),
        note=f"{method} average of {len(used)} of {len(checkpoints)}",
    )


@checked
def losses_along(first: Checkpoint, last: Checkpoint, frames: FrameSet, points: int = 11) -> tuple[Tensor, Tensor]:
    """The loss on frames along the straight line between two checkpoints' weights.

    If the loss stays low in between, their mean is a good model; if it rises, it is not.

    Args:
        first: where the line begins.
        last: where it ends; of the same spec.
        frames: with labels; BatchNorm's statistics are estimated anew on them at every point.
        points: number of points, at least 2, both ends included.

    Returns:
        Positions from 0 to 1 (points,) and mean losses in nats (points,).

    References:
        Goodfellow et al., "Qualitatively characterizing neural network optimization problems", ICLR 2015.
    """
    if points < 2:
        msg = f"expected at least 2 points, got {points}"
        raise ValueError(msg)
    ends, positions = [first, last], torch.linspace(0, 1, points)
    trials = _Trials(ends, frames, frames)
    found = [trials.scores(trials.mixed(ends, [1 - at, at]))[1] for at in positions.tolist()]
    return positions, torch.cat(found)


class _Trials:
    """A model that takes on averages in turn, with frames for BatchNorm's statistics and frames to evaluate it on."""

    def __init__(self, checkpoints: Sequence[Checkpoint], frames: FrameSet | None, valid: FrameSet | None) -> None:
        if not checkpoints:
            msg = "expected at least one checkpoint to average, got none"
            raise ValueError(msg)
        first, spec = checkpoints[0], checkpoints[0].spec
        for index, other in enumerate(checkpoints):
            if (other.spec, other.classes) != (spec, first.classes):
                what = "spec" if other.spec != spec else "classes"
                msg = (
                    f"cannot average checkpoint {index} with checkpoint 0: {what} {getattr(other, what)} "
                    f"differs from {getattr(first, what)}; the weights would not mean the same"
                )
                raise ValueError(msg)
        self.model = first.to_module()
        self.frames = frames
        if frames is not None:
            self.windows = prepared(frames, spec.context, spec.normalisation, spec.padding)
        self.scorer = None if valid is None else Scorer(valid, spec)

    def mixed(self, checkpoints: Sequence[Checkpoint], shares: Sequence[float]) -> dict[str, Tensor]:
        """The weighted mean, taken in float64, with statistics estimated anew; what is not floating is the first's."""
        mixture = {name: tensor.clone() for name, tensor in checkpoints[0].tensors.items()}
        floating = [name for name, tensor in mixture.items() if tensor.is_floating_point()]
        for name in floating:
            total = torch.zeros_like(mixture[name], dtype=torch.float64)
            for one, share in zip(checkpoints, shares, strict=True):
                total.add_(one.tensors[name].double(), alpha=share)
            mixture[name] = total.to(mixture[name].dtype)
        if self.frames is None:
            return mixture
        self.model.load_state_dict(mixture)
        device = self.frames.features.device
        model, some = self.model.to(device), evenly(len(self.frames), _STATISTICS).to(device)
        reestimate(model, spread_batches(self.windows, some, _BATCH))
        estimated = model.state_dict()
        return mixture | {name: estimated[name].detach().to("cpu", copy=True) for name in floating}

    def scores(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """Accuracy (1,) as a fraction and loss (1,) in nats, on the frames to evaluate on."""
        assert self.scorer is not None
        self.model.load_state_dict(tensors)
        model = self.model.to(self.scorer.frames.features.device).eval()
        return self.scorer(forward_of(model))


def _greedy(checkpoints: Sequence[Checkpoint], trials: _Trials) -> tuple[dict[str, Tensor], list[Checkpoint]]:
    """The soup's tensors and its ingredients; the best checkpoint alone if no other helps."""
    ranked = sorted(checkpoints, key=lambda one: -float(trials.scores(one.tensors)[0]))  # stable: ties keep their order
    used, tensors = ranked[:1], dict(ranked[0].tensors)
    best = trials.scores(tensors)[0]
    for candidate in ranked[1:]:
        trial = trials.mixed([*used, candidate], [1 / (len(used) + 1)] * (len(used) + 1))
        accuracy = trials.scores(trial)[0]
        if accuracy >= best:
            used, tensors, best = [*used, candidate], trial, accuracy
    return tensors, used


class RunningAverage:
    """The average of the live weights that a run keeps: exponential over steps, or plain from epoch `swa_from` on.

    `live` returns the weights as they are, by their names.
    """

    def __init__(self, live: Callable[[], Tensors], ema: float, swa_from: int) -> None:
        self.live, self.ema, self.swa_from = live, ema, swa_from
        self.tensors = {name: tensor.clone() for name, tensor in live().items()} if ema or swa_from else {}
        self.count = 0  # steps or epochs that are in the average

    def add_step(self) -> None:
        """Update the exponential average, BatchNorm's statistics included; its decay rises from 2/11 at first."""
        if self.ema:
            self._add(1 - min(self.ema, (2 + self.count) / (11 + self.count)))

    def add_epoch(self, number: int) -> None:
        """Update the plain mean of the weights at the ends of the epochs."""
        if self.swa_from and number >= self.swa_from:
            self._add(1 / (self.count + 1))

    def _add(self, share: float) -> None:
        """Move the average towards the current weights; what is not floating is copied."""
        self.count += 1
        live = self.live()
        floating = [name for name, tensor in live.items() if tensor.is_floating_point()]
        for name in live.keys() - set(floating):
            self.tensors[name].copy_(live[name])
        torch._foreach_lerp_([self.tensors[n] for n in floating], [live[n] for n in floating], share)  # a few kernels

    @contextmanager
    def in_place(self, module: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
        """Give the module the average, if there is one yet, for the length of the block."""
        with restored(module) if self.count else nullcontext():
            for name, tensor in self.live().items() if self.count else ():
                tensor.copy_(self.tensors[name])
            if self.count and self.swa_from:
                reestimate(module, batches)
            yield


def reestimate(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace BatchNorm's running statistics by the plain mean over batches (B, inputs), B of at least 2.

    Dropout stays off meanwhile, and afterwards the module is in eval mode.

    References:
        Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018.
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    module.eval()
    for layer in layers:
        layer.train()
        layer.num_batches_tracked.zero_()  # type: ignore[union-attr]  # with statistics, there is a count
    with torch.no_grad():
        for number, batch in enumerate(batches if layers else (), start=1):
            for layer in layers:
                layer.momentum = 1 / number
            module(rows_for(module, batch))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    module.eval()
