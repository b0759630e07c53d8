"""The command that brings in checkpoints that were saved elsewhere: adopt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import zoo
from zoo._console import Answer, Table, progress
from zoo._names import find
from zoo.cli.options import (
    Corpus,
    Device,
    Mapped,
    Names,
    Options,
    RegistryFile,
    class_names,
    flag_fields,
    options_from,
    read_partition,
)

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.checkpoint.adoption import Chain, Foreign

T = TypeVar("T")
Made = TypeVar("Made")
_TRIED_ON = 2000  # frames on which settings are compared
_FINALISTS = 3  # settings that are compared on all frames
_CLOSE = 0.005  # accuracies that are no further apart do not tell settings apart
_EQUAL = 1e-6  # accuracies of one model on the same frames
_ROUNDED = 5e-4  # what an accuracy may have lost when it was written down, such as 77.2
_APART = 0.02  # accuracy: what a file says and what is measured differ by more only if something is wrong


@flag_fields
@dataclass(frozen=True)
class Told:
    """What the person tells, since the shapes of tensors do not.

    Args:
        activation: of the hidden layers: relu, gelu, sigmoid, ..., or your own.
        batchnorm: where BatchNorm stands, seen from the activation.
        context: frames on each side of the classified one.
        features: features per frame; each model's context then follows from its inputs.
        normalisation: how features were normalised: none, mean, mean_std, z_score, min_max, or your own.
        padding: zeros stood beyond the ends of each recording (recording), or only of the whole partition (corpus);
            recording if left out.
        classes: names of the classes in the order of the outputs, or a text file with one name per line; phonemes
            stands for the 40 classes of HW1P2.
    """

    activation: str | None = None
    batchnorm: Literal["before", "after"] | None = None
    context: int | None = None
    features: int | None = None
    normalisation: str | None = None
    padding: Literal["recording", "corpus"] | None = None
    classes: Names = ()


@dataclass(frozen=True)
class Found:
    """The tensors of a file, and the chain of layers that they are; None where the person names their class."""

    foreign: Foreign
    chain: Chain | None


class _NothingWantedError(Exception):
    """Some files cannot be adopted, and it was all or none."""


def adopt(
    *sources: Path,
    told: Told = Told(),
    architecture: str | None = None,
    option: Options = (),
    key: str | None = None,
    save: str | None = None,
    corpus: Corpus = None,
    mapped: Mapped = None,
    device: Device = "auto",
    valid: str | None = None,
    try_: bool = False,
    all_or_none: bool = False,
    registry: RegistryFile = None,
) -> Answer:
    """Register checkpoints that were saved elsewhere: .pt, .pth, .ckpt, .bin and .safetensors files.

    Tensors are found inside what people save, and the architecture of Linear and BatchNorm layers is read off their
    shapes; what these do not tell is asked for. A model of other layers needs its class: --import student.py:Network.
    No code in a file is run. The files are registered together, under their own names. The exit code is 1 if some of
    them could not be.

    Example: zoo adopt notebook --activation gelu --features 27 --normalisation mean_std --classes phonemes

    Args:
        sources: files, and folders in which files with these endings are looked for.
        architecture: a built-in one where the shapes allow several (mlp, basic), or your own from --import.
        key: where in a file the tensors stand, such as ema.module, if it holds several models.
        save: name to register a single file under; the file's own if left out.
        corpus: folder of partitions in the HW1P2 layout, to measure each model's accuracy on.
        valid: partition of the corpus, or of the bundled synthesised speech, to measure on.
        try_: measure every combination of what was not told, and take the one that fits.
        all_or_none: register nothing if one of the files cannot be adopted.
    """
    home = zoo.Registry(registry)
    files, problems = _named(sources, home, save)
    classes = class_names(told.classes)
    if try_ and corpus is None and valid is None:
        raise ValueError("expected frames to try settings on, got none: give --corpus ROOT --valid PARTITION")
    given = corpus is not None or valid is not None
    frames = read_partition(corpus, valid or "valid", classes, mapped=mapped).to(device) if given else None
    if frames is not None and frames.labels is None:
        raise ValueError(f"expected a partition with labels to measure on, got {valid or 'valid'!r} without")
    own = _own(architecture)
    maker = _Maker(told, classes, own, architecture or "", options_from(option), frames, try_)
    try:
        found = _each("reading", {**files}, lambda _, path: _found(path, key, own), problems)
        maker.require_told(found)
        made = _each("building", found, lambda _, one: maker.adopted(one), problems)
        rows = {name: row for name, (_, row) in made.items()}
        saved: dict[str, str] = {}
        with suppress(_NothingWantedError), home.transaction():
            if not (all_or_none and problems):
                saved = _each("registering", made, lambda name, one: home.register(name, one[0]).reference, problems)
            if all_or_none and problems:
                saved = {}
                raise _NothingWantedError
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; nothing was adopted") from None
    adopted = [
        {"file": str(files[name]), "saved": saved.get(name), **rows[name]} for name in rows if name not in problems
    ]
    refused = [{"file": str(files[name]), "message": message} for name, message in problems.items()]
    lines = [f"{row['file']}: {row['message']}" for row in refused]
    return Answer(
        {"adopted": adopted, "refused": refused},
        [*_tables(adopted), *lines, *_remarks(adopted, refused, own, frames, home)],
        code=1 if refused else 0,
    )


# ---- files and their names


def _named(sources: Sequence[Path], home: zoo.Registry, save: str | None) -> tuple[dict[str, Path], dict[str, str]]:
    """Name -> file, each file once; and name -> why no model can have that name."""
    from zoo.checkpoint.adoption import SUFFIXES

    files: dict[Path, Path] = {}
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
            hidden = [path for path in inside if any(part.startswith(".") for part in path.relative_to(source).parts)]
            some = [
                path for path in inside if path not in hidden and path.parent.resolve() != home.blobs.folder.resolve()
            ]
            if not some:
                raise ValueError(f"expected files {', '.join(SUFFIXES)} in {source}, found none")
        elif source.exists():
            some = [source]
        else:
            raise FileNotFoundError(f"expected a file or a folder to adopt, got {str(source)!r}, which does not exist")
        files |= {path.resolve(): path for path in some if path.resolve() not in files}
    if not files:
        raise ValueError("expected files or folders to adopt, got none")
    if save is not None and len(files) > 1:
        raise ValueError(f"expected a single file with --save, got {len(files)}; the others keep their own names")
    stems = Counter(_name(path.stem).casefold() for path in files.values())
    named: dict[str, Path] = {}
    problems: dict[str, str] = {}
    for path in files.values():
        name = _name(path.stem)
        if stems[name.casefold()] > 1:
            name = _name(f"{path.resolve().parent.name}-{path.stem}")
        name = save or name
        if name.casefold() in {other.casefold() for other in named}:
            name, problem = str(path), f"another file has the name {name!r} too; adopt it alone, with --save NAME"
            problems[name] = problem
        named[name] = path
        try:
            home.check_nameable(name)
        except zoo.RegistryError as error:
            problems.setdefault(name, f"{error.message}; adopt it alone, with --save NAME")
    return named, problems


def _name(stem: str) -> str:
    """A file's name as that of a model: other characters than letters, digits, ".", "_" and "-" become "-"."""
    return re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", stem)).strip("._-")


def _each(title: str, given: dict[str, T], make: Callable[[str, T], Made], problems: dict[str, str]) -> dict[str, Made]:
    """Apply `make` to everything that has no problem yet; an error becomes its problem and does not stop the others.

    `given` is emptied on the way, so that each model is in memory in one form only.
    """
    made: dict[str, Made] = {}
    with progress(title, total=len(given)) as advance:
        for name in [*given]:
            advance(note=name)
            one = given.pop(name)
            if name not in problems:
                try:
                    made[name] = make(name, one)
                except ValueError as error:
                    if getattr(error, "reason", "") == "DISK":  # of the registry, not of this file
                        raise
                    problems[name] = getattr(error, "message", str(error))
    return made


# ---- from a file to a checkpoint


def _own(architecture: str | None) -> str:
    """The architecture whose tensors are found by name: one that is named, or the class given to `--import`; or ""."""
    from zoo.checkpoint.adoption import READ_OFF
    from zoo.models.architectures import GIVEN, find_architecture

    if architecture is not None:
        find_architecture(architecture)
        return "" if architecture in READ_OFF else architecture
    if len(given := sorted({*GIVEN})) > 1:
        raise ValueError(f"expected --architecture with one of the classes {', '.join(given)}, got none")
    return "".join(given)


def _found(path: Path, key: str | None, own: str) -> Found:
    from zoo.checkpoint.adoption import chain_of, read_foreign

    foreign = read_foreign(path, key=key)
    return Found(foreign, None if own else chain_of(foreign))


@dataclass(frozen=True)
class _Maker:
    """Makes checkpoints of files from what the person told, and tries the rest on frames."""

    told: Told
    classes: tuple[str, ...]
    own: str
    architecture: str
    options: Mapping[str, Any]
    frames: zoo.FrameSet | None
    trying: bool

    def require_told(self, found: Mapping[str, Found]) -> None:
        """Refuse files that need further flags, with a message that names all of them; check the given ones."""
        from zoo.data.normalisation import NORMALISATIONS
        from zoo.models.blocks import ACTIVATIONS

        told = self.told
        chains = {name: one.chain for name, one in found.items() if one.chain is not None}
        for table, what in ((ACTIVATIONS, "activation"), (NORMALISATIONS, "normalisation")):
            if getattr(told, what) is not None:
                find(table, what, getattr(told, what))
        if told.activation is not None and self.own:
            raise ValueError(f"expected --option for the activation of {self.own}, if it has one, got --activation")
        if self.options and not self.own:
            raise ValueError("expected --option only with a class of your own, got it for layers read off the shapes")
        asking = [name for name, chain in chains.items() if chain.asks_place]
        unsure = [name for name, chain in chains.items() if chain.asks_architecture]
        featureless, contextless = told.features is None and self.frames is None, told.context is None
        flags = {
            f"--activation ({', '.join(ACTIVATIONS)})": chains and told.activation is None and not self.trying,
            f"--batchnorm (before or after the activation, of {', '.join(asking[:5])})": (
                asking and told.batchnorm is None and not self.trying
            ),
            f"--architecture (mlp, or basic where something is added around layers, of {', '.join(unsure[:5])})": (
                unsure and not self.architecture and not self.trying
            ),
            "--context (frames on each side) or --features (per frame)": chains and contextless and featureless,
            "--context (frames on each side)": self.own and contextless,
            "--features (per frame)": self.own and featureless,
            f"--normalisation ({', '.join(NORMALISATIONS)})": told.normalisation is None and not self.trying,
            "--classes (their names in the order of the outputs, or phonemes: the 40 of HW1P2)": not self.classes,
        }
        missing = [flag for flag, needed in flags.items() if needed]
        if missing and found:
            hint = "" if self.trying else "; with --corpus ROOT --valid PARTITION, --try measures which of them fit"
            raise ValueError(f"the files do not tell {'; '.join(missing)}; give these flags{hint}")

    def adopted(self, found: Found) -> tuple[zoo.Checkpoint, dict[str, Any]]:
        """The checkpoint made of a file, with its accuracy where there are frames; and all there is to say about it."""
        from zoo.models.spec import fast_count
        from zoo.registry.load import measured

        told, foreign = self.told, found.foreign
        tried: list[dict[str, Any]] = []
        settings: dict[str, Any] = {
            "architecture": self.architecture,
            "batchnorm": told.batchnorm or "",
            "activation": told.activation,
            "normalisation": told.normalisation,
            "padding": told.padding or "recording",
        }
        if self.trying:
            tried = self.tried(found, settings)
            settings = {name: tried[0][name] for name in settings}
        checkpoint = self.made(found, settings)
        checkpoint.exam()  # refuses what could not be registered, before any of them is
        if self.frames is not None:
            checkpoint = replace(checkpoint, metrics=measured(checkpoint, self.frames))
        stated, metrics = foreign.accuracy, checkpoint.metrics
        return checkpoint, {
            "spec": checkpoint.spec.to_dict(),
            "parameters": fast_count(checkpoint.spec),
            "taken": ".".join(part for part in (foreign.key, foreign.prefix.rstrip(".")) if part),
            "left": [*foreign.left],
            "converted": [*foreign.converted],
            "accuracy": metrics["valid/accuracy"]["value"] if metrics else None,
            "loss": metrics["valid/loss"]["value"] if metrics else None,
            "stated": None if stated is None else {"name": stated[0], "accuracy": stated[1]},
            "tried": tried,
            "digest": checkpoint.digest,
        }

    def made(self, found: Found, settings: Mapping[str, Any]) -> zoo.Checkpoint:
        """The checkpoint with these settings."""
        from zoo.checkpoint.adoption import checkpoint_by_name

        told, chain = self.told, found.chain
        features = told.features or (None if self.frames is None else self.frames.features.shape[1])
        given = {name: settings[name] for name in ("normalisation", "padding")}
        note = (
            "adopted"
            if found.foreign.accuracy is None
            else "adopted; its file says {} {:.4f}".format(*found.foreign.accuracy)
        )
        if chain is None:
            assert features is not None  # by `require_told`
            assert told.context is not None
            spec = zoo.Spec(self.own, features, told.context, len(self.classes), **given, options=self.options)
            return checkpoint_by_name(found.foreign, spec, self.classes, note=note)
        if told.context is not None:
            frames = 2 * told.context + 1
            if chain.inputs % frames or features not in (None, chain.inputs // frames):
                wanted = f"{frames} frames" + (f" of {features} features" if features else "")
                raise ValueError(
                    f"expected inputs of {wanted}, got {chain.inputs} in its first layer; give another --context"
                )
            features = chain.inputs // frames
        assert features is not None
        return chain.checkpoint(
            self.classes,
            activation=settings["activation"],
            features=features,
            **given,
            place=settings["batchnorm"],
            architecture=settings["architecture"],
            note=note,
        )

    def tried(self, found: Found, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The best of every combination of what was not told, compared on some of the frames; as of `finalists`."""
        import torch

        from zoo.checkpoint.adoption import PLACES
        from zoo.data.normalisation import NORMALISATIONS
        from zoo.models.blocks import ACTIVATIONS

        told, chain, frames = self.told, found.chain, self.frames
        assert frames is not None
        assert frames.labels is not None
        architectures = [self.architecture] if self.architecture or chain is None else chain.architectures
        asked = chain is not None and chain.asks_place and told.batchnorm is None
        places = PLACES if asked else [settings["batchnorm"]]
        activations = [told.activation] if told.activation or chain is None else [*ACTIVATIONS]
        normalisations = [told.normalisation] if told.normalisation else [*NORMALISATIONS]
        count = min(len(frames), _TRIED_ON)
        centres = torch.arange(count) * len(frames) // count
        labels = frames.labels[centres]
        rows: list[dict[str, Any]] = []
        ways = [
            {**settings, "architecture": a, "batchnorm": place, "normalisation": n}
            for a, place, n in product(architectures, places, normalisations)
            if not (place == "after" and a == "basic")
        ]
        with progress("trying", total=len(ways) * len(activations)) as advance:
            for way in ways:
                base = self.made(found, {**way, "activation": "relu"})  # tensors and windows serve every activation
                windows = zoo.windows(frames, centres, base.spec.context, base.spec.normalisation, base.spec.padding)
                for activation in activations:
                    options = {} if activation is None else {"activation": activation}
                    spec = replace(base.spec, options={**base.spec.options, **options})
                    logits = _logits(replace(base, spec=spec), windows).double()
                    accuracy = float((logits.argmax(dim=1) == labels).double().mean())
                    loss = float(torch.nn.functional.cross_entropy(logits, labels))
                    rows.append({**way, "activation": activation, "accuracy": accuracy, "loss": loss})
                    advance()
        chance, best = float(torch.bincount(labels).max()) / count, max(row["accuracy"] for row in rows)
        if best <= chance + _APART:
            msg = f"expected one of {len(rows)} settings to fit, got an accuracy of {best:.3f} from the best"
            raise ValueError(f"{msg}, no more than from the most frequent class; are the classes in another order?")
        stated = found.foreign.accuracy
        keys: list[Callable[[dict[str, Any]], float]] = [lambda row: -row["accuracy"], lambda row: row["loss"]]
        if stated is not None:
            keys.append(lambda row: abs(row["accuracy"] - stated[1]))
        finalists: list[dict[str, Any]] = []
        for key in keys:
            finalists += [row for row in sorted(rows, key=key)[:_FINALISTS] if row not in finalists]
        return self.finalists(found, [{name: row[name] for name in settings} for row in finalists])

    def finalists(self, found: Found, ways: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Accuracy and loss on all frames, of the first also with other padding; the one that fits best first.

        One whose accuracy is what the file says is preferred to any other; else the highest accuracy is, since another
        activation can lower the loss of a model that is too sure, and the usual padding unless another is much better.
        """
        from zoo.data.frames import PADDINGS
        from zoo.registry.load import measured

        assert self.frames is not None
        usual, stated = ways[0]["padding"], found.foreign.accuracy
        others = [] if self.told.padding else [padding for padding in PADDINGS if padding != usual]
        rows = []
        for way in (*ways, *({**ways[0], "padding": padding} for padding in others)):
            metrics = measured(self.made(found, way), self.frames)
            rows.append({**way, **{name: metrics[f"valid/{name}"]["value"] for name in ("accuracy", "loss")}})

        def rank(row: Mapping[str, Any]) -> tuple[int, float]:
            apart = 1.0 if stated is None else abs(row["accuracy"] - stated[1])
            return (apart > _EQUAL) + (apart > _ROUNDED), _CLOSE * (row["padding"] != usual) - row["accuracy"]

        return sorted(rows, key=rank)


def _logits(checkpoint: zoo.Checkpoint, windows: Tensor) -> Tensor:
    """Logits (B, C) of windows (B, inputs)."""
    import torch

    from zoo.checkpoint import logits_of

    with torch.inference_mode():
        answer = checkpoint.to_module().to(windows.device)(windows)
    return logits_of(answer, windows, checkpoint.spec.classes, checkpoint.spec.architecture).cpu()


# ---- tables and remarks


def _tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """One row for each adopted file; and for each that settings were tried for, the best of these."""
    columns = []
    for row in rows:
        spec, stated = row["spec"], row["stated"]
        options = spec["options"]
        sizes = options.get("widths") or [options[name] for name in ("width", "depth") if name in options]
        inner = "-".join(map(str, sizes))
        columns.append(
            {
                "file": row["file"],
                "saved as": row["saved"] or "",
                "architecture": f"{spec['architecture']} {inner}".strip(),
                "activation": options.get("activation", ""),
                "batchnorm": "yes" if options.get("batchnorm") else "",
                "context": spec["context"],
                "taken": row["taken"] or "all",
                "left": ", ".join(row["left"]),
                "accuracy": row["accuracy"],
                "its file says": None if stated is None else f"{stated['name']} {stated['accuracy']:.4f}",
            }
        )
    yield Table(columns, formats={"accuracy": ".4f"})
    for row in rows:
        some = [{name: value for name, value in tried.items() if value != ""} for tried in row["tried"]]
        title = f"\n{row['file']}: settings that fit, the best first"
        yield Table(some, title, {"accuracy": ".4f", "loss": ".4f"})


def _remarks(
    rows: Sequence[Mapping[str, Any]],
    refused: Sequence[object],
    own: str,
    frames: zoo.FrameSet | None,
    home: zoo.Registry,
) -> Iterator[str]:
    """What the reader should know."""
    for row in rows:
        if row["converted"]:
            yield f"{row['file']}: {', '.join(row['converted'])} converted to float32"
        stated = row["stated"]
        if stated is not None and row["accuracy"] is not None and abs(row["accuracy"] - stated["accuracy"]) > _APART:
            yield (
                f"{row['file']}: accuracy {row['accuracy']:.4f}, but its file says {stated['accuracy']:.4f}: "
                "another partition, or a wrong activation, normalisation or order of classes? --try measures"
            )
        best, *others = row["tried"] or [{}]
        close = [
            other
            for other in others
            if (other["activation"], other["normalisation"]) != (best["activation"], best["normalisation"])
            and other["accuracy"] > best["accuracy"] - _CLOSE
            and (stated is None or abs(best["accuracy"] - stated["accuracy"]) > _ROUNDED)
        ]
        if close:
            names = f"{close[0]['activation'] or ''} {close[0]['normalisation']}".strip()
            yield f"{row['file']}: {names} fits almost as well; if you know the settings, give them"
    digests = Counter(row["digest"] for row in rows)
    for digest in [digest for digest, count in digests.items() if count > 1]:
        yield f"the same weights are in {', '.join(row['file'] for row in rows if row['digest'] == digest)}"
    if frames is None and rows:
        yield "not measured: --corpus ROOT --valid PARTITION shows whether these settings fit"
    if own and rows:
        yield f"commands that run these models need --import FILE.py:{own}"
    done = [row for row in rows if row["saved"]]
    yield f"{len(done)} of {len(rows) + len(refused)} files adopted in {home.path}" + (
        "; nothing was registered" if rows and not done else ""
    )
