"""The named architectures: functions from sizes to a module, and shapes, functions that only choose layer widths.

A function's name is its registered name, its keyword arguments are the options, its docstring is the manual. Every
model maps (B, inputs) to (B, classes) logits, and the built-in ones share one vocabulary:

    width           units of a hidden layer, of the widest one where the widths differ
    narrow          units of the narrowest hidden layer
    depth           number of hidden layers, or of residual blocks
    initialisation  a name in `blocks.INITIALISATIONS`
    activation, batchnorm, dropout: those of `blocks.Layers`
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from torch import nn

from zoo._names import Patterns, checked, enter, matching, unknown
from zoo.models.blocks import BasicBlock, Bottleneck, Layers, initialise

Builder = Callable[..., nn.Module]
_Builder = TypeVar("_Builder", bound=Builder)
_Shape = TypeVar("_Shape", bound=Callable[..., Sequence[int]])
_MOST_LAYERS = 1000
_SHARED = {**asdict(Layers()), "initialisation": "default"}


@dataclass(frozen=True)
class Architecture:
    """An entry of the table: the options with their defaults, and two functions of `(inputs, classes, **options)`.

    `build` gives the module, and `count` its trainable parameters by arithmetic; None where only a built model can be
    counted.
    """

    build: Builder
    options: Mapping[str, Any]
    count: Callable[..., int] | None = None


ARCHITECTURES: dict[str, Architecture] = {}
GIVEN: list[str] = []  # names of the architectures that the person gave directly, by `--import FILE.py:CLASS`


@checked
def architecture(builder: _Builder, /, *, count: Callable[..., int] | None = None) -> _Builder:
    """Register `builder(inputs, classes, *, option=default, ...)` under its own name.

    Args:
        builder: gives the module, which maps (B, inputs) to (B, classes). A builder with a third argument `layers`
            gets a `blocks.Layers` to make hidden layers with; then `activation`, `batchnorm`, `dropout` and
            `initialisation` are options of the architecture too. It makes new layers at each call, also on the meta
            device; constants that it draws are kept with the weights only as persistent buffers.
        count: takes the same arguments and gives the number of trainable parameters; with it, the searches draw
            the architecture by default, provided that it has an option `width` or `widths`. In a decorator write
            `@functools.partial(architecture, count=...)`.

    Example:
        >>> from torch import nn
        >>> @architecture
        ... def one_layer(inputs, classes, *, bias=True):
        ...     return nn.Linear(inputs, classes, bias=bias)
        >>> "one_layer" in list_architectures("one_*")
        True

    Raises:
        ValueError: the name is taken by another function, the signature has another form, or an option has the
            name of a shared one.
    """
    layered = "layers" in inspect.signature(builder).parameters
    leading = ["inputs", "classes", "layers"] if layered else ["inputs", "classes"]
    options = _options("builder", builder, leading) | (_SHARED if layered else {})
    build = partial(_layered, builder) if layered else builder
    enter(ARCHITECTURES, "architecture", builder, Architecture(build, options, count))
    return builder


@checked
def shape(widths: _Shape) -> _Shape:
    """Register the architecture whose hidden layers have the widths `widths(*, option=default, ...)`, in order.

    Its options are those of the function together with `activation`, `batchnorm`, `dropout` and `initialisation`.
    Parameters are counted by arithmetic, and the searches draw it if it has an option `width` or `widths`. Raises
    ValueError as `architecture` does.

    Example:
        >>> @shape
        ... def hourglass(*, width=512, narrow=64):
        ...     return [width, narrow, width]
        >>> ARCHITECTURES.pop("hourglass").options["narrow"]
        64
    """
    own = _options("shape", widths, [])

    def chain(inputs: int, classes: int, layers: Layers, **options: Any) -> nn.Module:
        sizes = [inputs, *_checked(widths(**options))]
        hidden = [layers.dense(before, after) for before, after in pairwise(sizes)]
        return nn.Sequential(*hidden, nn.Linear(sizes[-1], classes))

    def count(inputs: int, classes: int, *, batchnorm: bool, **options: Any) -> int:
        hidden = _checked(widths(**{name: options[name] for name in own}))
        return _dense([inputs, *hidden], batchnorm) + (hidden[-1] + 1) * classes

    entry = Architecture(partial(_layered, chain), own | _SHARED, count)
    enter(ARCHITECTURES, "architecture", widths, entry)
    return widths


def architecture_of(model: Callable[..., nn.Module]) -> str:
    """Register a class, or a function that gives a module, as it stands, and return the name of its architecture.

    Arguments whose defaults are plain data become options, and so do those without a default; of those that are left
    out, the first is given the number of inputs and the second that of the classes. What is registered already, by its
    own decorator, stays as it is.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self, n_in, n_out, hidden=8):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Linear(n_in, hidden), nn.Tanh(), nn.Linear(hidden, n_out))
        >>> from zoo import Spec, build
        >>> build(Spec(architecture_of(Net), features=6, context=0, classes=2, options={"hidden": 3})).net[0]
        Linear(in_features=6, out_features=3, bias=True)
        >>> dict(ARCHITECTURES.pop("Net").options)
        {'n_in': None, 'n_out': None, 'hidden': 8}
    """
    name, entry = model.__name__, ARCHITECTURES.get(model.__name__)
    if entry is not None and model in (entry.build, *getattr(entry.build, "args", ())[:1]):
        return name
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    defaults = {p.name: p.default for p in inspect.signature(model).parameters.values() if p.kind in kinds}
    options = {name: None if value is inspect.Parameter.empty else value for name, value in defaults.items()}
    plain = {name: value for name, value in options.items() if _is_plain(value)}
    enter(ARCHITECTURES, "architecture", model, Architecture(partial(_constructed, model, defaults), plain))
    return name


def _constructed(
    model: Callable[..., nn.Module], defaults: Mapping[str, Any], inputs: int, classes: int, /, **options: Any
) -> nn.Module:
    """What a class makes of its options, with the sizes in place of required arguments that are left out."""
    required = [name for name, default in defaults.items() if default is inspect.Parameter.empty]
    left_out = [name for name in required if options.get(name) is None]
    if len(left_out) > 2:
        msg = f"{model.__name__} requires {', '.join(left_out)}: expected options for all but two of them, which are"
        raise ValueError(f"{msg} given the number of inputs and that of the classes")
    listed = {  # a spec has tuples alone
        name: list(value) if type(value) is tuple and type(defaults[name]) is not tuple else value
        for name, value in options.items()
    }
    try:
        return model(**listed | dict(zip(left_out, (inputs, classes), strict=False)))
    except Exception as error:  # the class is the user's own
        msg = f"cannot make {model.__name__} of {listed}: {type(error).__name__}: {error}"
        raise ValueError(msg) from error


def _is_plain(value: Any) -> bool:
    """Whether a default can stand in a spec."""
    kinds = {type(item) for item in value} if type(value) in (list, tuple) else {type(value)}
    return kinds <= {bool, int, float, str, type(None)}


def list_architectures(include: Patterns = "*", exclude: Patterns = ()) -> list[str]:
    """Sorted names of the registered architectures; both arguments take one shell wildcard or several.

    Example:
        >>> list_architectures("*pyramid")
        ['inverted_pyramid', 'pyramid']
    """
    return matching(sorted(ARCHITECTURES), include, exclude)


def find_architecture(name: str) -> Architecture:
    """The entry of this name, or a ValueError with the nearest names."""
    if name not in ARCHITECTURES:
        hint = "; one of your own is known once its file is: --import FILE.py, or FILE.py:CLASS"
        raise ValueError(unknown("architecture", name, ARCHITECTURES) + hint)
    return ARCHITECTURES[name]


def _options(kind: str, function: Callable[..., Any], leading: list[str]) -> dict[str, Any]:
    """A function's own options and their defaults: its keywords after the leading arguments."""
    name, parameters = function.__name__, list(inspect.signature(function).parameters.values())
    own = parameters[len(leading) :]
    fits = [p.name for p in parameters[: len(leading)]] == leading
    if not fits or any(p.kind is not p.KEYWORD_ONLY or p.default is p.empty for p in own):
        wanted = f"{name}({', '.join([*leading, '*', 'option=default', '...'])})"
        msg = f"expected a {kind} {wanted}, got {name}{inspect.signature(function)}"
        raise ValueError(msg)
    options = {p.name: p.default for p in own}
    taken = sorted(options.keys() & _SHARED.keys())
    if taken and leading != ["inputs", "classes"]:
        msg = f"expected options of {name!r} besides {sorted(_SHARED)}, got {taken} among them"
        raise ValueError(msg)
    return options


def _layered(builder: Builder, inputs: int, classes: int, *, initialisation: str, **options: Any) -> nn.Module:
    """What `builder(inputs, classes, layers, **own options)` builds, with its weights initialised."""
    layers = Layers(**{name: options.pop(name) for name in asdict(Layers())})
    return initialise(builder(inputs, classes, layers, **options), initialisation)


@shape
def mlp(*, widths: Sequence[int] = (512, 512)) -> Sequence[int]:
    """Hidden layers of the given widths; the other shapes are special cases of it."""
    return widths


@shape
def cylinder(*, width: int = 512, depth: int = 3) -> Sequence[int]:
    """`depth` hidden layers of one `width`."""
    return _steps(width, width, depth)


@shape
def pyramid(*, width: int = 512, narrow: int = 128, depth: int = 3) -> Sequence[int]:
    """Hidden layers that narrow in equal steps from `width` to `narrow`."""
    return _steps(width, narrow, depth)


@shape
def inverted_pyramid(*, width: int = 512, narrow: int = 128, depth: int = 3) -> Sequence[int]:
    """Hidden layers that widen in equal steps from `narrow` to `width`."""
    return _steps(narrow, width, depth)


@shape
def diamond(*, width: int = 512, narrow: int = 128, depth: int = 5) -> Sequence[int]:
    """Hidden layers that widen in equal steps from `narrow` to `width` in the middle, and narrow again.

    An even `depth` has two layers of `width` in the middle.
    """
    rising = _steps(narrow, width, (depth + 1) // 2)
    return rising + rising[::-1][depth % 2 :]


def _count_basic(inputs: int, classes: int, *, width: int, depth: int, batchnorm: bool, **_: Any) -> int:
    return _dense([inputs, *[width] * (1 + 2 * depth)], batchnorm) + (width + 1) * classes


@partial(architecture, count=_count_basic)
def basic(inputs: int, classes: int, layers: Layers, *, width: int = 512, depth: int = 2) -> nn.Module:
    """A dense layer to `width`, then `depth` residual `BasicBlock`s of two layers each."""
    stem = layers.dense(inputs, width)  # made first, since weights are drawn in the order of making
    blocks = [BasicBlock(w, layers) for w in _checked(_steps(width, width, depth))]
    return nn.Sequential(stem, *blocks, nn.Linear(width, classes))


def _count_bottleneck(inputs: int, classes: int, *, width: int, depth: int, batchnorm: bool, **_: Any) -> int:
    wide = Bottleneck.expansion * width
    first = _dense([inputs, width, width, width, wide], batchnorm) + _dense([width, wide], batchnorm)
    later = (depth - 1) * _dense([wide, width, width, wide], batchnorm)
    return first + later + (wide + 1) * classes


@partial(architecture, count=_count_bottleneck)
def bottleneck(inputs: int, classes: int, layers: Layers, *, width: int = 128, depth: int = 2) -> nn.Module:
    """A dense layer to `width`, then `depth` residual `Bottleneck` blocks, each with `4 width` outputs.

    The first block goes `width -> width -> width -> 4 width` beside a projection, as in the lecture;
    the following ones `4 width -> width -> width -> 4 width` beside the identity, as in He et al. (2016).
    """
    wide = Bottleneck.expansion * width
    stem = layers.dense(inputs, width)
    blocks = [Bottleneck(before, width, layers) for before in _checked([width, *_steps(wide, wide, depth)[1:]])]
    return nn.Sequential(stem, *blocks, nn.Linear(wide, classes))


def _steps(first: int, last: int, depth: int) -> list[int]:
    """`depth` widths in equal steps; only the wider end where there is one layer."""
    if not 1 <= depth <= _MOST_LAYERS:
        msg = f"expected a depth from 1 to {_MOST_LAYERS}, got {depth}"
        raise ValueError(msg)
    if depth == 1:
        return [max(first, last)]
    return [round(first + (last - first) * i / (depth - 1)) for i in range(depth)]


def _checked(widths: Sequence[int]) -> Sequence[int]:
    if not 1 <= len(widths) <= _MOST_LAYERS or min(widths) < 1:
        msg = f"expected 1 to {_MOST_LAYERS} widths of at least 1 unit each, got {list(widths)[:10]}"
        raise ValueError(msg)
    return widths


def _dense(sizes: Sequence[int], batchnorm: bool) -> int:
    """Parameters of the dense layers between these sizes; a unit has two numbers for its norm, or one bias."""
    per_unit = 2 if batchnorm else 1
    return sum((before + per_unit) * after for before, after in pairwise(sizes))
