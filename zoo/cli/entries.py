"""Commands on single entries of a registry.

list, show, diff; register, alias, tag, note, remove; export, import, push, pull.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoo
from zoo._console import Answer, Table
from zoo._names import unknown
from zoo.cli.options import (
    Corpus,
    FilePrecision,
    Mapped,
    Names,
    RegistryFile,
    class_names,
    read_partition,
    require_writable,
    spec_fields,
)

if TYPE_CHECKING:
    from zoo.onnx import Exported


def list_(*names: str, registry: RegistryFile = None) -> Answer:
    """List models with their versions and metrics, and ensembles.

    Example: zoo list 'cyl*'

    Args:
        names: names or wildcards; everything if left out.
    """
    home = zoo.Registry(registry)
    now = home.snapshot()
    entries, aliases = now.entries(names or "*"), now.aliases()
    ensembles = [now.get_ensemble(name) for name in now.list_ensembles(names or "*")]
    data = {
        "models": [entry.to_json() for entry in entries],
        "ensembles": [entry.to_json() for entry in ensembles],
        "aliases": aliases,
    }
    if not entries and not ensembles:
        return Answer(data, [f"nothing matches {' '.join(names) or '*'} in {home.path}"])
    metrics = sorted({name for entry in entries for name in entry.metrics})
    combined = []
    for one in ensembles:
        members = " ".join(now.get(member).reference for member in one.members)
        rule = str(one.rule.get("rule", ""))
        combined.append({"name": one.name, "rule": rule, "members": members, "created": one.created})
    title = "\nensembles" if entries else "ensembles"
    return Answer(data, [versions(entries, metrics, aliases), Table(combined, title)])


def show(reference: str, /, *, registry: RegistryFile = None) -> Answer:
    """Show everything recorded about a version or an ensemble.

    Example: zoo show cylinder-a@2

    Args:
        reference: NAME, NAME@NUMBER, NAME@ID, an alias, or an ensemble.
    """
    return described(zoo.Registry(registry).snapshot().find(reference))


def diff(first: str, second: str, /, *, registry: RegistryFile = None) -> Answer:
    """Compare two versions: their fields, their metrics, and each tensor that differs; exit code 1 if they differ.

    Example: zoo diff cylinder-a@1 cylinder-a@2

    Args:
        first: a version.
        second: another version.
    """
    found = zoo.Registry(registry).diff(first, second)
    names = found["first"], found["second"]
    pairs = [
        {"part": part, "field": field, names[0]: as_text(values[0]), names[1]: as_text(values[1])}
        for part in ("about", "spec", "recipe", "classes", "metrics")
        for field, values in found[part].items()
    ]
    tensors = [{**row, "first": as_text(row["first"]), "second": as_text(row["second"])} for row in found["tensors"]]
    if not pairs and not tensors:
        return Answer(found, [f"{names[0]} and {names[1]} are equal"])
    title = "\ntensors: largest and relative difference"
    return Answer(found, [Table(pairs), Table(tensors, title)], code=1)


def register(
    name: str,
    file: Path,
    /,
    *,
    spec: str | None = None,
    classes: Names = (),
    note: str | None = None,
    licence: str = "",
    tags: Names = (),
    strip_prefix: bool = False,
    registry: RegistryFile = None,
) -> Answer:
    """Check a safetensors file against its spec and save it in the registry.

    Example: zoo register cylinder-b weights.safetensors --spec spec.json --classes phonemes.txt

    Args:
        name: the model's name.
        file: a checkpoint written by zoo, or any safetensors file together with --spec and --classes.
        spec: JSON, or a .json or .toml file, such as {"architecture": "cylinder", "features": 27, "context": 20,
            "classes": 40, "options": {"width": 512}}.
        classes: names of the classes in the order of the logits, or a text file with one name per line; "phonemes"
            stands for the 40 classes of HW1P2.
        note: free text.
        licence: under which licence the model may be used, such as Apache-2.0.
        tags: short words.
        strip_prefix: cut off what a wrapper put before every name, such as "module." or "model.".
    """
    names = class_names(classes) or None
    parsed = None if spec is None else zoo.Spec.from_dict(spec_fields(spec))
    about: dict[str, Any] = {"note": note, "licence": licence, "tags": tags, "strip_prefix": strip_prefix}
    return _saved(zoo.Registry(registry).register(name, file, spec=parsed, classes=names, **about))


def alias(
    name: str,
    target: str | None = None,
    /,
    *,
    back: bool = False,
    expect: str | None = None,
    registry: RegistryFile = None,
) -> Answer:
    """Point an alias to a version or an ensemble; without a target, print where it points.

    Example: zoo alias best cylinder-a@2 --expect cylinder-a@1

    Args:
        name: the alias.
        target: a version or an ensemble.
        back: return to the previous target.
        expect: the current target, or "" for a new alias; if the alias points elsewhere, nothing changes.
    """
    home = zoo.Registry(registry)
    moves = int(back) + (target is not None)
    if moves > 1 or (expect is not None and not moves):
        got = "both" if moves else "neither"
        raise zoo.RegistryError("ARGUMENT", f"expected a target or --back, got {got}; nothing was changed")
    if back:
        home.alias_back(name, expect=expect)
    elif target is not None:
        home.alias(name, target, expect=expect)
    aliases = home.aliases()
    if name not in aliases:
        raise zoo.RegistryError("UNKNOWN", unknown("alias", name, aliases))
    return Answer({"alias": name, "target": aliases[name]}, [f"{name} -> {aliases[name]}"])


def tag(reference: str, /, *tags: str, drop: bool = False, registry: RegistryFile = None) -> Answer:
    """Add tags to a version, or take them off.

    Example: zoo tag cylinder-a@2 submitted

    Args:
        reference: a version.
        tags: short words.
        drop: take these tags off.
    """
    if not tags:
        raise ValueError(f"expected tags for {reference}, got none; `zoo show {reference}` prints what it has")
    added, dropped = ((), tags) if drop else (tags, ())
    entry = zoo.Registry(registry).annotate(reference, add_tags=added, drop_tags=dropped)
    return Answer(entry.to_json(), [f"{entry.reference}: tags {', '.join(entry.tags) or 'none'}"])


def note(
    reference: str, text: str | None = None, /, *, licence: str | None = None, registry: RegistryFile = None
) -> Answer:
    """Replace the note or the licence of a version or an ensemble; an empty text removes it.

    Example: zoo note cylinder-a@2 "dropout 0.4, the one we submitted" --licence Apache-2.0

    Args:
        reference: a version or an ensemble.
        text: the new note.
        licence: under which licence the model may be used.
    """
    if text is None and licence is None:
        raise ValueError(f"expected a note or --licence for {reference}, got neither")
    entry = zoo.Registry(registry).annotate(reference, note=text, licence=licence)
    note = f"note {entry.note!r}" if entry.note else "no note"
    return Answer(entry.to_json(), [f"{entry.reference}: {note}" + f", licence {entry.licence}" * bool(entry.licence)])


def remove(reference: str, /, *, force: bool = False, registry: RegistryFile = None) -> Answer:
    """Remove a version, an ensemble or an alias; `zoo gc` then frees the disk space.

    Example: zoo remove cylinder-a@1

    Args:
        reference: NAME (its newest version), NAME@NUMBER, NAME@* (all versions), an ensemble, or an alias.
        force: also remove the ensembles and aliases that use it; they are printed.
    """
    users = zoo.Registry(registry).remove(reference, force=force)
    also = f" and {', '.join(users)}" if users else ""
    return Answer({"removed": reference, "held_by": users}, [f"removed {reference}{also}"])


def export(
    reference: str,
    place: Path,
    /,
    *,
    onnx: bool = False,
    with_windows: bool = False,
    precision: FilePrecision = "float32",
    corpus: Corpus = None,
    mapped: Mapped = None,
    valid: str = "valid",
    registry: RegistryFile = None,
) -> Answer:
    """Write a model or an ensemble as a plain folder: config.json, model.safetensors and a model card.

    With --onnx, write a model as one ONNX file instead, compared with the model on the validation frames before it
    appears (needs the extra `ship`); `ensemble export` does the same for an ensemble.

    Example: zoo export cylinder-a cylinder-a-folder; zoo export cylinder-a cylinder-a.onnx --onnx

    Args:
        reference: a version or an ensemble.
        place: a new or empty folder; or with --onnx a file, which replaces an existing one.
        onnx: write an ONNX file.
        with_windows: the file takes the raw features of a recording instead of normalised windows.
        valid: partition on which the file is compared with the model.
    """
    home = zoo.Registry(registry)
    if not onnx:
        if with_windows or precision != "float32":
            raise ValueError(f"expected --with-windows and --precision with --onnx, got the folder {place}")
        written = zoo.export(home, reference, place)
        return Answer({"exported": reference, "folder": str(written)}, [f"{reference} written to {written}"])
    from zoo.onnx import export_onnx

    require_writable(place)
    frames = read_partition(corpus, valid, own=home.get(reference).classes, mapped=mapped)
    return exported(
        reference,
        export_onnx(home, reference, place, with_windows=with_windows, precision=precision, frames=frames),
    )


def exported(name: str, written: Exported) -> Answer:
    """What was written, and how it agrees with what it was written from."""
    found = written.agreement
    data = {"exported": name, "file": str(written.path), "bytes": written.size, "agreement": found and asdict(found)}
    lines = [f"{name} written to {written.path}, {written.size:,} bytes"]
    if found:
        lines.append(
            f"on {found.frames:,} frames, onnxruntime changes no probability by more than {found.moved:.1e}, and the "
            f"class of {found.changed:.4%} of them"
        )
    if found and found.accuracy is not None:
        lines.append(f"accuracy {found.accuracy:.4f}, before {found.accuracy_before:.4f}")
    return Answer(data, lines)


def import_(folder: Path, /, *, save: str | None = None, registry: RegistryFile = None) -> Answer:
    """Register the model or ensemble in a folder written by `zoo export`.

    Example: zoo import cylinder-a-folder

    Args:
        folder: the folder.
        save: name to register it under; its exported name if left out.
    """
    return _saved(zoo.import_folder(zoo.Registry(registry), folder, name=save))


def push(reference: str, repository: str, /, *, public: bool = False, registry: RegistryFile = None) -> Answer:
    """Upload a model or an ensemble to the Hugging Face hub (needs the extra `hub`).

    Example: zoo push cylinder-a somebody/cylinder-a

    Args:
        reference: a version or an ensemble.
        repository: OWNER/NAME.
        public: make a new repository public; it is private otherwise.
    """
    address = zoo.push(zoo.Registry(registry), reference, repository, private=not public)
    return Answer({"pushed": reference, "address": address}, [address])


def pull(
    repository: str, /, *, save: str | None = None, revision: str | None = None, registry: RegistryFile = None
) -> Answer:
    """Download a model or an ensemble from the Hugging Face hub and register it (needs the extra `hub`).

    Example: zoo pull somebody/cylinder-a

    Args:
        repository: OWNER/NAME.
        save: name to register it under; its exported name if left out.
        revision: branch, tag or commit.
    """
    return _saved(zoo.pull(zoo.Registry(registry), repository, name=save, revision=revision))


def versions(
    entries: Sequence[zoo.Entry], metrics: Sequence[str] = (), aliases: Mapping[str, str] | None = None
) -> Table:
    """One row for each version, with these of its metrics."""
    rows = [
        {
            "name": entry.name,
            "number": entry.number,
            "id": entry.id,
            "architecture": entry.architecture,
            "parameters": entry.parameters,
            **{name: entry.metrics.get(name, {}).get("value") for name in metrics},
            "created": entry.created,
            "aliases": " ".join(name for name, target in (aliases or {}).items() if target == entry.reference),
            "tags": " ".join(entry.tags),
        }
        for entry in entries
    ]
    return Table(rows, formats={"parameters": ",", **dict.fromkeys(metrics, ".4f")})


def described(entry: zoo.Entry | zoo.EnsembleEntry) -> Answer:
    """Everything in an entry, one row for each field, nested fields by dotted names."""
    rows = []
    for key, value in entry.to_json().items():
        nested = value if isinstance(value, dict) and value else {}
        pairs = [(f"{key}.{name}", item) for name, item in nested.items()] or [(key, value)]
        rows += [{"field": name, "value": as_text(item)} for name, item in pairs]
    return Answer(entry.to_json(), [Table(rows)])


def as_text(value: Any) -> str | None:
    """A value in a cell: text as it is, None as an empty cell, everything else as JSON."""
    return value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)


def _saved(entry: zoo.Entry | zoo.EnsembleEntry) -> Answer:
    """The entry for programs; for people one line, as `zoo show` prints the rest."""
    return Answer(entry.to_json(), [f"saved as {entry.reference}"])
