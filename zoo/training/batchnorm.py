"""BatchNorm's running statistics: estimated anew for given weights, or left alone for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def reestimate(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics by the plain mean over these batches, in place.

    Averaged weights have other activations than any of the averaged models, so their statistics must be
    seen, not averaged. Dropout stays off meanwhile; a module without BatchNorm is left as it is.

    Args:
        module: its parameters are not changed; afterwards it is in eval mode.
        batches: (B, inputs) each, B of at least 2.

    References:
        Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018.
    """
    layers = _layers(module)
    module.eval()
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.train()
            layer.num_batches_tracked.zero_()  # type: ignore[union-attr]  # with statistics, there is a count
        for index, batch in enumerate(batches):
            for layer in layers:
                layer.momentum = 1 / (index + 1)
            module(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    module.eval()


@contextmanager
def unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Let batches pass in train mode without a trace in the running statistics."""
    layers = _layers(module)
    kept = [(layer, layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer, _, count in kept:
        layer.momentum = 0.0
        layer.num_batches_tracked = count.clone()  # type: ignore[union-attr]  # as above
    yield
    for layer, momentum, count in kept:
        layer.momentum, layer.num_batches_tracked = momentum, count


def _layers(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
