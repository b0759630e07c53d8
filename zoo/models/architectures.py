"""The named architectures: plain functions from sizes to a module.

The function's name is the registered name, its keyword arguments are the hyper-parameters, its
docstring is the manual. All map (B, inputs) to (B, classes) logits and share one vocabulary:

    width           units of a hidden layer, the widest one where the widths differ
    narrow          units of the narrowest hidden layer
    depth           hidden layers, or residual blocks
    activation      relu, gelu, sigmoid, softplus, tanh, silu
    batchnorm       BatchNorm after every hidden Linear, which then has no bias
    dropout         probability of dropping a hidden unit while training
    initialisation  default, xavier, kaiming, uniform, gaussian
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from zoo._names import Patterns, matching, unknown
from zoo.models.blocks import BasicBlock, Bottleneck, dense, initialise

Builder = Callable[..., nn.Module]
_Builder = TypeVar("_Builder", bound=Builder)

_TABLE: dict[str, Builder] = {}
_MOST_LAYERS = 1000


def architecture(builder: _Builder) -> _Builder:
    """Register `builder(inputs, classes, *, option=default, ...)` under its own name.

    Example:
        >>> from torch import nn
        >>> @architecture
        ... def one_layer(inputs, classes, *, bias=True):
        ...     return nn.Linear(inputs, classes, bias=bias)
        >>> "one_layer" in list_architectures("one_*")
        True

    Raises:
        ValueError: the name is taken by another function, or the signature is of another form.
    """
    name = builder.__name__
    _check_signature(name, builder)
    taken = _TABLE.get(name)
    if taken is not None and _origin(taken) != _origin(builder):
        msg = f"architecture {name!r} is already registered by {_origin(taken)}; choose another name"
        raise ValueError(msg)
    _TABLE[name] = builder
    return builder


def list_architectures(include: Patterns = "*", exclude: Patterns = ()) -> list[str]:
    """Sorted names of the registered architectures; shell wildcards, one or several, in both.

    Example:
        >>> list_architectures("*pyramid")
        ['inverted_pyramid', 'pyramid']
    """
    return matching(sorted(_TABLE), include, exclude)


def builder_of(name: str) -> Builder:
    """The registered builder.

    Raises:
        ValueError: unknown name; the message gives the nearest ones.
    """
    if name not in _TABLE:
        raise ValueError(
            unknown("architecture", name, _TABLE) + "; a builder of your own registers with @zoo.architecture"
        )
    return _TABLE[name]


def _origin(builder: Builder) -> str:
    return f"{builder.__module__}.{builder.__qualname__}"


def _check_signature(name: str, builder: Builder) -> None:
    parameters = list(inspect.signature(builder).parameters.values())
    sizes, options = parameters[:2], parameters[2:]
    fits = [p.name for p in sizes] == ["inputs", "classes"] and all(
        p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in options
    )
    if not fits:
        msg = (
            f"expected a builder {name}(inputs, classes, *, option=default, ...), "
            f"got {name}{inspect.signature(builder)}"
        )
        raise ValueError(msg)


@architecture
def mlp(
    inputs: int,
    classes: int,
    *,
    widths: Sequence[int] = (512, 512),
    activation: str = "relu",
    batchnorm: bool = True,
    dropout: float = 0.0,
    initialisation: str = "default",
) -> nn.Module:
    """Hidden layers of the given widths, in order; the shapes below are special cases of it."""
    _check_widths(widths)
    sizes = [inputs, *widths]
    hidden = [
        dense(before, after, activation=activation, batchnorm=batchnorm, dropout=dropout)
        for before, after in zip(sizes, widths, strict=False)
    ]
    return initialise(nn.Sequential(*hidden, nn.Linear(sizes[-1], classes)), initialisation)


@architecture
def cylinder(
    inputs: int,
    classes: int,
    *,
    width: int = 512,
    depth: int = 3,
    activation: str = "relu",
    batchnorm: bool = True,
    dropout: float = 0.0,
    initialisation: str = "default",
) -> nn.Module:
    """`depth` hidden layers of one `width`."""
    return mlp(
        inputs,
        classes,
        widths=_steps(width, width, depth),
        activation=activation,
        batchnorm=batchnorm,
        dropout=dropout,
        initialisation=initialisation,
    )


@architecture
def pyramid(
    inputs: int,
    classes: int,
    *,
    width: int = 512,
    narrow: int = 128,
    depth: int = 3,
    activation: str = "relu",
    batchnorm: bool = True,
    dropout: float = 0.0,
    initialisation: str = "default",
) -> nn.Module:
    """Hidden layers that narrow in equal steps from `width` to `narrow`."""
    return mlp(
        inputs,
        classes,
        widths=_steps(width, narrow, depth),
        activation=activation,
        batchnorm=batchnorm,
        dropout=dropout,
        initialisation=initialisation,
    )


@architecture
def inverted_pyramid(
    inputs: int,
    classes: int,
    *,
    width: int = 512,
    narrow: int = 128,
    depth: int = 3,
    activation: str = "relu",
    batchnorm: bool = True,
    dropout: float = 0.0,
    initialisation: str = "default",
) -> nn.Module:
    """Hidden layers that widen in equal steps from `narrow` to `width`."""
    return mlp(
        inputs,
        classes,
        widths=_steps(narrow, width, depth),
        activation=activation,
        batchnorm=batchnorm,
        dropout=dropout,
        initialisation=initialisation,
    )


@architecture
def diamond(
    inputs: int,
    classes: int,
    *,
    width: int = 512,
    narrow: int = 128,
    depth: int = 5,
    activation: str = "relu",
    batchnorm: bool = True,
    dropout: float = 0.0,
    initialisation: str = "default",
) -> nn.Module:
    """Hidden layers that widen in equal steps from `narrow` to `width` in the middle, and narrow again.

    An even `depth` has two layers of `width` in the middle.
    """
    rising = _steps(narrow, width, (depth + 1) // 2)
    return mlp(
        inputs,
        classes,
        widths=rising + rising[::-1][depth % 2 :],
        activation=activation,
        batchnorm=batchnorm,
        dropout=dropout,
        initialisation=initialisation,
    )


@architecture
def basic(
    inputs: int,
    classes: int,
    *,
    width: int = 512,
    depth: int = 2,
    activation: str = "relu",
    batchnorm: bool = True,
    dropout: float = 0.0,
    initialisation: str = "default",
) -> nn.Module:
    """A dense layer to `width`, then `depth` residual `BasicBlock`s of two layers each."""
    widths = _steps(width, width, depth)
    _check_widths(widths)
    stem = dense(inputs, width, activation=activation, batchnorm=batchnorm, dropout=dropout)
    blocks = [BasicBlock(w, activation=activation, batchnorm=batchnorm, dropout=dropout) for w in widths]
    return initialise(nn.Sequential(stem, *blocks, nn.Linear(width, classes)), initialisation)


@architecture
def bottleneck(
    inputs: int,
    classes: int,
    *,
    width: int = 128,
    depth: int = 2,
    activation: str = "relu",
    batchnorm: bool = True,
    dropout: float = 0.0,
    initialisation: str = "default",
) -> nn.Module:
    """A dense layer to `width`, then `depth` residual `Bottleneck` blocks, each `4 width` wide at its end.

    The first block goes `width -> width -> width -> 4 width` beside a projection, as in the lecture;
    the following ones `4 width -> width -> width -> 4 width` beside the identity, as in He et al. (2016).
    """
    wide = Bottleneck.expansion * width
    entrances = [width, *_steps(wide, wide, depth)[1:]]
    _check_widths(entrances)
    stem = dense(inputs, width, activation=activation, batchnorm=batchnorm, dropout=dropout)
    blocks = [
        Bottleneck(before, width, activation=activation, batchnorm=batchnorm, dropout=dropout) for before in entrances
    ]
    return initialise(nn.Sequential(stem, *blocks, nn.Linear(wide, classes)), initialisation)


def _steps(first: int, last: int, depth: int) -> list[int]:
    """`depth` widths in equal steps; the wider end alone where there is only one."""
    if not 1 <= depth <= _MOST_LAYERS:
        msg = f"expected a depth from 1 to {_MOST_LAYERS}, got {depth}"
        raise ValueError(msg)
    if depth == 1:
        return [max(first, last)]
    return [round(first + (last - first) * i / (depth - 1)) for i in range(depth)]


def _check_widths(widths: Sequence[int]) -> None:
    if not 1 <= len(widths) <= _MOST_LAYERS or min(widths) < 1:
        msg = f"expected 1 to {_MOST_LAYERS} widths of at least 1 unit each, got {list(widths)[:10]}"
        raise ValueError(msg)
