"""Normalisations: how the features of a recording are scaled and shifted before a model sees them.

Each is a plain function from raw features to one scale and shift per recording, or one for all recordings. Its name
is what `Spec.normalisation` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoo._names import checked, enter

Affine = tuple[Tensor, Tensor]
Normalisation = Callable[[Tensor, Tensor], Affine | None]

NORMALISATIONS: dict[str, Normalisation] = {}

_BLOCK = 65_536  # frames of which moments are taken at a time, in float64
_TINY = torch.finfo(torch.float32).tiny  # below it float32 loses its digits, and 1 / x is soon no float32


@checked
def normalisation(function: Normalisation) -> Normalisation:
    """Register `function(features, starts)` under its own name.

    The function takes the raw features (T, F) float32 and the first frame of each recording, then T, as (U + 1,)
    int64. It returns scale and shift of `features * scale + shift`, float32 and each (U, F), or (1, F) for all
    recordings alike; None leaves the features as they are. Where one of them is not finite for a feature that does not
    vary, both are taken to be zero.

    Example:
        >>> @normalisation
        ... def peak(features, starts):
        ...     scale = 1 / features.abs().amax(dim=0, keepdim=True)
        ...     return scale, torch.zeros_like(scale)
        >>> NORMALISATIONS.pop("peak")(torch.tensor([[2.0], [-4.0]]), torch.tensor([0, 2]))[0]
        tensor([[0.2500]])

    Raises:
        ValueError: the name is taken.
    """
    enter(NORMALISATIONS, "normalisation", function, function)
    return function


@normalisation
def none(features: Tensor, starts: Tensor) -> None:
    """Raw features."""


@normalisation
def mean(features: Tensor, starts: Tensor) -> Affine:
    """Subtract each recording's mean over time (cepstral mean subtraction)."""
    means = torch.stack([recording.double().mean(dim=0) for recording in _split(features, starts)])
    return torch.ones_like(means).float(), -means.float()


@normalisation
def mean_std(features: Tensor, starts: Tensor) -> Affine:
    """Subtract each recording's mean over time, and divide by its standard deviation (of the population)."""
    return _standardise(_split(features, starts))


@normalisation
def z_score(features: Tensor, starts: Tensor) -> Affine:
    """The same as `mean_std` with one mean and one standard deviation over all frames of this frame set."""
    return _standardise([features])


@normalisation
def min_max(features: Tensor, starts: Tensor) -> Affine:
    """Map each feature's range over this frame set to 0 .. 1; a constant feature becomes zero."""
    low, high = (bound.double() for bound in features.aminmax(dim=0))
    scale = torch.where(high - low > _TINY, 1 / (high - low), 0.0)
    return scale.float()[None], (-low * scale).float()[None]


def affine_of(function: Normalisation, features: Tensor, starts: Tensor) -> Affine | None:
    """What a normalisation answers for these frames, so that finite features stay finite.

    Raises:
        ValueError: it answers with other than float32 tensors (U, F) or (1, F), or with NaN or infinity for a feature
            that varies.
    """
    answer = function(features, starts)
    if answer is None:
        return None
    found = [(tuple(part.shape), part.dtype) if isinstance(part, Tensor) else type(part) for part in answer]
    shapes = [(rows, features.shape[1]) for rows in (1, len(starts) - 1)]
    if found not in [[(shape, torch.float32)] * 2 for shape in shapes]:
        expected = f"a scale and a shift, both float32 {shapes[0]} or {shapes[1]}"
        msg = f"expected of the normalisation {function.__name__!r} {expected}, got {found}"
        raise ValueError(msg)
    scale, shift = answer
    wrong = ~(scale.isfinite() & shift.isfinite())
    for row, feature in wrong.nonzero().tolist():
        first, last = (0, len(features)) if len(scale) == 1 else starts[row : row + 2].tolist()
        low, high = features[first:last, feature].double().aminmax()
        if high - low > _TINY:
            values = f"{float(scale[row, feature])} and {float(shift[row, feature])}"
            where = f"feature {feature} of the frames {first} to {last - 1}, which varies from {low:g} to {high:g}"
            msg = f"expected a finite scale and shift of the normalisation {function.__name__!r}"
            raise ValueError(f"{msg}, got {values} for {where}")
    return scale.masked_fill(wrong, 0.0), shift.masked_fill(wrong, 0.0)


def _standardise(recordings: Sequence[Tensor]) -> Affine:
    """Subtract the mean of each and divide by its standard deviation, in float64; a constant feature becomes zero."""
    statistics = [_moments(recording) for recording in recordings]
    deviation, mean = (torch.stack(column) for column in zip(*statistics, strict=True))
    noise = (torch.finfo(torch.float32).eps * mean.abs()).clamp(min=_TINY)
    scale = torch.where(deviation > noise, 1 / deviation, 0.0)
    return scale.float(), (-mean * scale).float()


def _split(features: Tensor, starts: Tensor) -> Sequence[Tensor]:
    """The recordings, each (t, F); a single one without a look at its length, so that it can be traced."""
    return [features] if len(starts) == 2 else torch.split(features, starts.diff().tolist())


def _moments(recording: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation (of the population) and mean over time, each (F,) float64.

    Block by block, so that no copy of a corpus is made.

    References:
        Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American Statistician 37, 1983.
    """
    if torch.compiler.is_exporting():  # torch 2.11 writes `std_mean` in two types, which no ONNX runtime takes
        wide = recording.double()
        return wide.std(dim=0, correction=0), wide.mean(dim=0)
    first, *others = torch.split(recording, _BLOCK)
    deviation, mean = torch.std_mean(first.double(), dim=0, correction=0)
    count = len(first)
    for block in others:
        further, centre = torch.std_mean(block.double(), dim=0, correction=0)
        share = len(block) / (count := count + len(block))
        step = centre - mean
        variance = (1 - share) * deviation**2 + share * further**2 + share * (1 - share) * step**2
        deviation, mean = variance.sqrt(), mean + share * step
    return deviation, mean
