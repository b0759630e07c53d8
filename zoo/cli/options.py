"""Options that several commands share, and the values that they stand for."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from cyclopts import Group, Parameter

import zoo
from zoo._console import progress
from zoo._names import multiplies_bfloat16, usable_device
from zoo.training.recipe import Recipe, acting

if TYPE_CHECKING:
    Fields = Recipe
else:  # the fields of a recipe, each of which may be left out
    _PRECISION = "float32, bfloat16 or float16; auto is bfloat16 on a GPU that computes in it, otherwise float32."
    _TYPES = get_type_hints(Recipe) | {"precision": Annotated[str, Parameter(help=_PRECISION)]}
    _DEFAULTS = {field.name: False if field.default in (None, ()) else str(field.default) for field in fields(Recipe)}
    Fields = make_dataclass(
        "Fields",
        [
            (name, Annotated[_TYPES[name] | None, Parameter(show_default=text)], None)
            for name, text in _DEFAULTS.items()
        ],
        namespace={"__doc__": Recipe.__doc__, "__module__": __name__},
    )

Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]
Contexts = Annotated[tuple[int, ...], Parameter(consume_multiple=True)]
Corpus = Annotated[
    Path | None,
    Parameter(help="folder of partitions in the HW1P2 layout; the bundled synthesised speech if left out."),
]
Mapped = Annotated[
    Path | None,
    Parameter(
        help="folder for one file per partition, from which its frames are mapped instead of read into memory; often "
        "the corpus itself. The file is made where there is none."
    ),
]
Classes = Annotated[
    tuple[str, ...],
    Parameter(
        consume_multiple=True,
        help="names of the classes in the order of the labels, or a text file with one name per line; `phonemes` "
        "stands for the 40 classes of HW1P2. If left out, those of the models that are named, otherwise the phonemes.",
    ),
]
Device = Annotated[str, Parameter(help="where the work runs: cpu, cuda, or auto, which is cuda where there is one.")]
FilePrecision = Annotated[
    Literal["float32", "float16", "int8"], Parameter(help="of the weights in an ONNX file; smaller ones are compared.")
]
RegistryFile = Annotated[
    Path | None,
    Parameter(help="the registry's file; otherwise $ZOO_REGISTRY, otherwise registry.json in the working folder."),
]
Options = Annotated[
    tuple[str, ...],
    Parameter(
        name="--option",
        help="NAME=VALUE, an option of the architecture, such as width=256 or widths=[512,256]; may be repeated.",
    ),
]
RecipeFile = Annotated[Path | None, Parameter(help="a .toml or .json file; the flags below replace single fields.")]
RecipeFlags = Annotated[Fields, Parameter(name="*", group=Group("Recipe", sort_key=1))]
NO_FLAGS = Fields()
_CONTEXT = 20  # frames on each side where neither a flag nor a spec names another number, as in the lecture
flag_fields = Parameter(name="*")  # above a dataclass whose fields are flags


@flag_fields
@dataclass(frozen=True)
class Partitions:
    """Frames to train on, and frames to choose by.

    Args:
        train: partition to train on.
        valid: partition on which models are compared and the best epoch is chosen.
    """

    corpus: Corpus = None
    mapped: Mapped = None
    classes: Classes = ()
    train: str = "train"
    valid: str = "valid"
    device: Device = "auto"

    def load(self, own: Sequence[str] = ()) -> tuple[zoo.FrameSet, zoo.FrameSet]:
        """The training and the validation frames on the device; `own` are the classes of the models, if any."""
        return self.read(self.train, own), self.read(self.valid, own)

    def read(self, name: str, own: Sequence[str] = ()) -> zoo.FrameSet:
        """Another partition of the same corpus, likewise."""
        return read_partition(self.corpus, name, self.classes, own, mapped=self.mapped).to(self.device)


def class_names(words: Sequence[str]) -> tuple[str, ...]:
    """The names that `--classes` stands for: themselves, "phonemes", or the lines of a file; none where it is left out.

    A ValueError where one word is neither a file nor "phonemes".
    """
    if tuple(words) == ("phonemes",):
        return zoo.PHONEMES
    if len(words) != 1:
        return tuple(words)
    if not Path(words[0]).is_file():
        msg = f"expected names of classes with blanks between them, or a file with one name per line, got {words[0]!r}"
        raise ValueError(msg)
    return tuple(line.strip() for line in Path(words[0]).read_text(encoding="utf-8-sig").rstrip().splitlines())


def read_partition(
    corpus: Path | None,
    name: str,
    classes: Sequence[str] = (),
    own: Sequence[str] = (),
    *,
    mapped: Path | None = None,
) -> zoo.FrameSet:
    """A partition of a corpus, or of the bundled one, whose classes are the phonemes.

    A corpus has the classes that `--classes` gives, otherwise the models' `own`, otherwise the phonemes.
    """
    given = class_names(classes)
    if corpus is not None:
        wanted = given or own or zoo.PHONEMES
        return zoo.read_corpus(corpus, name, classes=wanted, mapped=mapped or False, progress=progress)
    if mapped is not None:
        msg = "expected --mapped beside --corpus, got it without; the bundled speech is small"
        raise ValueError(msg)
    frames = zoo.sample_corpus(name)
    if given in ((), frames.classes):
        return frames
    if sorted(given) != sorted(frames.classes):
        msg = f"expected --corpus with other classes than the phonemes of the bundled speech, got {[*given]}"
        raise ValueError(msg)
    order = frames.starts.new_tensor([given.index(phoneme) for phoneme in frames.classes])
    return replace(frames, classes=given, labels=order[frames.labels])


def recipe_from(file: Path | None, flags: Recipe, device: str, base: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a file, or a recorded one, with the fields that were given as flags in place of its own."""
    given = {name: value for name, value in vars(flags).items() if value is not None}
    if given.get("precision") == "auto":  # a recipe records what was done
        place = usable_device(device)
        fast = place.type == "cuda" and multiplies_bfloat16(place)
        given["precision"] = "bfloat16" if fast else "float32"
    if file is not None or base is None:
        return replace(Recipe() if file is None else Recipe.read(file), **given)
    return Recipe.from_dict(acting({**base, **given}) | given)  # another schedule needs no fields of the recorded one


def options_from(pairs: tuple[str, ...]) -> dict[str, Any]:
    """The options in NAME=VALUE pairs; a value is read as JSON where it is JSON, otherwise as text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            msg = f"expected an option as NAME=VALUE, got {pair!r}"
            raise ValueError(msg)
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def spec_from(
    text: str | None, context: int | None, options: Mapping[str, Any], frames: zoo.FrameSet, base: zoo.Spec | None
) -> zoo.Spec:
    """The spec of `text`, or `base`, with the given context and options in place of its own."""
    if text is None:
        if base is None:
            msg = "expected --spec with an architecture or a spec, or --from with a registered model, got neither"
            raise ValueError(msg)
        spec = base
    elif text.lstrip().startswith("{") or Path(text).suffix in (".json", ".toml"):
        spec = zoo.Spec.from_dict(spec_fields(text))
    elif base is None:
        spec = zoo.Spec(text, frames.features.shape[1], _CONTEXT, len(frames.classes))
    else:
        spec = base if text == base.architecture else replace(base, architecture=text, options={})
    return replace(spec, context=spec.context if context is None else context, options={**spec.options, **options})


def spec_fields(text: str) -> dict[str, Any]:
    """The fields of a spec that is written as JSON, or in a .json or .toml file."""
    inline = text.lstrip()[:1] in ("{", "[")
    try:
        data = text if inline else Path(text).read_text(encoding="utf-8")
        found = tomllib.loads(data) if Path(text).suffix == ".toml" and not inline else json.loads(data)
        if not isinstance(found, dict):
            raise TypeError(f"that is {found!r}"[:80])
    except (OSError, TypeError, ValueError) as error:
        msg = f"expected a spec as a JSON object, or a .json or .toml file, got {text[:80]!r}: {error}"
        raise ValueError(msg) from error
    return found


def require_writable(path: Path) -> None:
    """Refuse before the work a path that its result could not be written to."""
    if path.is_dir():
        wrong = "a folder itself"
    elif not path.parent.is_dir():
        wrong = "no such folder"
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        wrong = "read-only"
    else:
        return
    msg = f"expected the path of a file in a folder that can be written to, got {str(path)!r}: {wrong}"
    raise ValueError(msg)


def require_folders(*paths: Path | None) -> None:
    """Refuse before the work what is to be a folder, now or once it is made, but is a file or lies in one."""
    for path in filter(None, paths):
        nearest = next((each for each in (path, *path.parents) if each.exists()), path)
        if nearest.exists() and not nearest.is_dir():
            msg = f"expected a folder, or the path of a new one, got {str(path)!r}: {str(nearest)!r} is none"
            raise ValueError(msg)
