"""Commands that keep models: register, point, remove, tag, recover; and how an entry is told."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from zoo._console import print_json, print_table

if TYPE_CHECKING:
    from zoo.registry.entries import EnsembleEntry, Entry

Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]
RegistryFile = Annotated[
    Path | None, Parameter(help="the registry's file; else $ZOO_REGISTRY, else registry.json in this folder")
]
AsJson = Annotated[bool, Parameter(negative=(), help="print JSON")]
Switch = Annotated[bool, Parameter(negative=())]


def add_to(app: App) -> None:
    """Add these commands to `app`."""
    for command in (register, remove, alias, recover, tag, note):
        app.command(command)
    app.command(collect, name="gc")


def register(
    name: str,
    file: Path,
    *,
    spec: str | None = None,
    classes: Names = (),
    note: str | None = None,
    tags: Names = (),
    registry: RegistryFile = None,
    json: AsJson = False,
) -> None:
    """Register a safetensors file; it is checked against its spec and written anew.

    Example: zoo register cylinder-b weights.safetensors --spec spec.json --classes phonemes.txt

    Args:
        name: of the model.
        file: a checkpoint of zoo's, or any safetensors file together with --spec and --classes.
        spec: JSON, or a .json or .toml file, such as {"architecture": "cylinder", "features": 27, "context": 20,
            "classes": 40, "options": {"width": 512}}.
        classes: names of the classes in the order of the logits, or one text file with a name per line;
            "phonemes" stands for the 40 of the home task.
        note: free text.
        tags: short words.
    """
    from zoo.models.spec import Spec
    from zoo.registry import Registry

    made = None if spec is None else Spec.from_dict(spec_data(spec))
    entry = Registry(registry).register(name, file, spec=made, classes=_class_names(classes), note=note, tags=tags)
    tell(entry, json)


def remove(reference: str, *, force: Switch = False, registry: RegistryFile = None, json: AsJson = False) -> None:
    """Remove a version, an ensemble or an alias; `zoo gc` then frees the disk.

    Example: zoo remove cylinder-a@1

    Args:
        reference: NAME (its newest version), NAME@NUMBER, NAME@* (all of them), an ensemble, an alias.
        force: remove also the ensembles and aliases that hold it; they are named.
    """
    from zoo.registry import Registry

    held = Registry(registry).remove(reference, force=force)
    if json:
        print_json({"removed": reference, "held_by": held})
    else:
        print(f"removed {reference}" + (f" and {', '.join(held)}" if held else ""))


def alias(
    name: str,
    target: str | None = None,
    *,
    back: Switch = False,
    expect: str | None = None,
    registry: RegistryFile = None,
    json: AsJson = False,
) -> None:
    """Let an alias point to a version or an ensemble; without a target, say where it points.

    Example: zoo alias best cylinder-a@2 --expect cylinder-a@1

    Args:
        name: of the alias.
        target: a reference, or an ensemble.
        back: point again to what it pointed to before.
        expect: what it must point to now, else nothing changes; "" where it must not exist yet.
    """
    from zoo.registry import Registry
    from zoo.registry.references import RegistryError

    found = Registry(registry)
    if back and target is not None:
        raise RegistryError("ARGUMENT", "expected a target or --back, got both")
    if expect is not None and not back and target is None:
        raise RegistryError("ARGUMENT", "expected a target or --back with --expect, got neither; nothing was moved")
    if back:
        found.alias_back(name, expect=expect)
    elif target is not None:
        found.alias(name, target, expect=expect)
    now = found.aliases().get(name)
    if now is None:
        raise RegistryError("UNKNOWN", f"there is no alias {name!r}; expected one of {sorted(found.aliases())}")
    if json:
        print_json({"alias": name, "target": now})
    else:
        print(f"{name} -> {now}")


def collect(*, dry_run: Switch = False, registry: RegistryFile = None, json: AsJson = False) -> None:
    """Remove blobs and temporary files that nothing points to, if they are older than a day.

    Example: zoo gc --dry-run

    Args:
        dry_run: only say what would go.
    """
    from zoo.registry import Registry

    found = Registry(registry).collect_garbage(dry_run=dry_run)
    if json:
        print_json({"removed" if not dry_run else "would_remove": [str(path) for path in found]})
    else:
        for path in found:
            print(path)
        print(f"{len(found)} files {'would be ' if dry_run else ''}removed")


def recover(*, registry: RegistryFile = None, json: AsJson = False) -> None:
    """Rebuild a lost registry from what its blobs say of themselves; what is left out is told on stderr.

    Example: zoo recover
    """
    from zoo.registry import Registry

    with warnings.catch_warnings(record=True) as left_out:
        warnings.simplefilter("always")
        entries = Registry(registry).recover()
    for warning in left_out:
        print(f"warning: {warning.message}", file=sys.stderr)
    if json:
        print_json({"recovered": [entry.to_json() for entry in entries]})
    else:
        print_table([row(entry, [], []) for entry in entries], formats={"parameters": ","})
        print(f"{len(entries)} versions recovered")


def tag(reference: str, *tags: str, drop: Switch = False, registry: RegistryFile = None, json: AsJson = False) -> None:
    """Add tags to a version, or drop them.

    Example: zoo tag cylinder-a@2 submitted

    Args:
        reference: of a version.
        tags: short words.
        drop: take these tags off instead.
    """
    from zoo.registry import Registry

    found = Registry(registry)
    tell(found.annotate(reference, drop_tags=tags) if drop else found.annotate(reference, add_tags=tags), json)


def note(reference: str, text: str, *, registry: RegistryFile = None, json: AsJson = False) -> None:
    """Replace the note of a version; an empty text takes it off.

    Example: zoo note cylinder-a@2 "dropout 0.4, the one we submitted"

    Args:
        reference: of a version.
        text: the note.
    """
    from zoo.registry import Registry

    tell(Registry(registry).annotate(reference, note=text), json)


def row(entry: Entry, metrics: list[str], aliases: list[str]) -> dict[str, Any]:
    """A version among others, with these of its metrics."""
    values = {name: entry.metrics.get(name, {}).get("value") for name in metrics}
    head = {"name": entry.name, "number": entry.number, "id": entry.id, "architecture": entry.architecture}
    marks = {"aliases": " ".join(aliases), "tags": " ".join(entry.tags)}
    return {**head, "parameters": entry.parameters, **values, "created": entry.created, **marks}


def tell(entry: Entry | EnsembleEntry, as_json: bool) -> None:
    """All of an entry, a row per field, or as JSON."""
    if as_json:
        print_json(entry.to_json())
    else:
        print_table([{"field": key, "value": told(value)} for key, value in _flat(entry.to_json())])


def _flat(data: dict[str, Any]) -> list[tuple[str, Any]]:
    """Nested objects as dotted names, one row each."""
    rows = []
    for key, value in data.items():
        inner = value if isinstance(value, dict) and value else {}
        rows += [(f"{key}.{name}", item) for name, item in inner.items()] or [(key, value)]
    return rows


def told(value: Any) -> str:
    """A value in a cell: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def spec_data(text: str) -> dict[str, Any]:
    """JSON as given, or of a .json or .toml file."""
    import tomllib

    inline = text.lstrip()[:1] in ("{", "[")
    try:
        data = text if inline else Path(text).read_text(encoding="utf-8")
        found = tomllib.loads(data) if Path(text).suffix == ".toml" and not inline else json.loads(data)
    except (OSError, ValueError) as error:
        msg = f"expected a spec as a JSON object, or a .json or .toml file, got {text[:80]!r}: {error}"
        raise ValueError(msg) from error
    if not isinstance(found, dict):
        msg = f"expected a spec as a JSON object, got {str(found)[:80]}"
        raise ValueError(msg)
    return found


def _class_names(given: tuple[str, ...]) -> list[str] | None:
    if given == ("phonemes",):
        from zoo.data.corpus import PHONEMES

        return [*PHONEMES]
    if len(given) == 1 and Path(given[0]).is_file():
        return Path(given[0]).read_text(encoding="utf-8").split("\n")[: -1 or None]
    return [*given] or None
