"""Commands that keep models: look, register, verify, point, remove, recover."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from zoo.terminal import print_json, print_table, progress

if TYPE_CHECKING:
    from zoo.registry import EnsembleEntry, Entry

Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]
RegistryFile = Annotated[
    Path | None, Parameter(help="the registry's file; else $ZOO_REGISTRY, else registry.json in this folder")
]
AsJson = Annotated[bool, Parameter(negative=(), help="print JSON")]
Switch = Annotated[bool, Parameter(negative=())]


def add_to(app: App) -> None:
    """Add these commands to `app`."""
    app.command(list_, name="list")
    for command in (show, register, load, verify, remove, alias, diff, recover, tag, note):
        app.command(command)
    app.command(collect, name="gc")


def list_(*names: str, registry: RegistryFile = None, json: AsJson = False) -> None:
    """List the models, their versions and metrics, and the ensembles.

    Example: zoo list 'cyl*'

    Args:
        names: names or wildcards; all if left out.
    """
    from zoo.registry import Registry

    found = Registry(registry)
    wanted = names or "*"
    entries = found.entries(wanted)
    ensembles = [found.get_ensemble(name) for name in found.list_ensembles(wanted)]
    aliases = found.aliases()
    if json:
        models = [entry.to_json() for entry in entries]
        print_json({"models": models, "ensembles": [entry.to_json() for entry in ensembles], "aliases": aliases})
        return
    metrics = sorted({name for entry in entries for name in entry.metrics})
    rows = [_row(entry, metrics, [name for name, to in aliases.items() if to == entry.reference]) for entry in entries]
    if rows:
        print_table(rows, formats={"parameters": ",", **dict.fromkeys(metrics, ".4f")})
    if ensembles:
        print_table(
            [_ensemble_row(found.get, entry) for entry in ensembles], title="\nensembles" if rows else "ensembles"
        )
    if not rows and not ensembles:
        print(f"nothing matches {' '.join(names) or '*'} in {found.path}")


def show(reference: str, *, registry: RegistryFile = None, json: AsJson = False) -> None:
    """Show all that is recorded of a version or an ensemble.

    Example: zoo show cylinder-a@2

    Args:
        reference: NAME, NAME@NUMBER, NAME@ID, an alias, or an ensemble.
    """
    from zoo.registry import Registry

    found = Registry(registry)
    ensemble = reference in found.list_ensembles() or found.aliases().get(reference) in found.list_ensembles()
    data = (found.get_ensemble(reference) if ensemble else found.get(reference)).to_json()
    if json:
        print_json(data)
        return
    print_table([{"field": key, "value": _told(value)} for key, value in _flat(data)])


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
    from zoo.registry import Registry
    from zoo.spec import Spec

    made = None if spec is None else Spec.from_dict(spec_data(spec))
    entry = Registry(registry).register(name, file, spec=made, classes=_class_names(classes), note=note, tags=tags)
    tell(entry, json)


def load(reference: str, *, registry: RegistryFile = None, json: AsJson = False) -> None:
    """Load a model, all checks made, and say what came of it; a rehearsal for your own program.

    Example: zoo load cylinder-a

    Args:
        reference: NAME, NAME@NUMBER, NAME@ID or an alias.
    """
    from zoo.registry import Registry

    found = Registry(registry)
    entry, model = found.get(reference), found.load(reference)
    tensors = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if json:
        print_json({"version": entry.reference, "sha256": entry.sha256, "tensors": tensors})
        return
    print_table([{"tensor": name, "shape": " x ".join(map(str, shape))} for name, shape in tensors.items()])
    print(f"{entry.reference} is whole and fits: {entry.parameters:,} parameters, sha256 {entry.sha256}")


def verify(
    *names: str,
    fast: Switch = False,
    probe: Switch = False,
    metrics: Switch = False,
    corpus: Path | None = None,
    partition: str = "valid",
    registry: RegistryFile = None,
    json: AsJson = False,
) -> int:
    """Check blobs against the registry; exit code 1 where something is wrong.

    Example: zoo verify --probe

    Args:
        names: names or wildcards; all if left out.
        fast: sizes and headers only, nothing is hashed.
        probe: also run each model on a fixed batch and compare with what it said when it was registered.
        metrics: also evaluate again on frames and compare with the metrics that were recorded on them.
        corpus: folder in the HW1P2 layout for --metrics; the bundled synthesised speech if left out.
        partition: its part.
    """
    from zoo.registry import Registry

    found = Registry(registry)
    entries = found.entries(names or "*")
    if names and not entries:  # a typing error must not pass for a clean bill of health
        raise ValueError(f"nothing matches {' '.join(names)} in {found.path}; it has {', '.join(found.list())}")
    problems = []
    with progress("verifying", total=len(entries)) as advance:
        for entry, problem in found.verified(names or "*", fast=fast, probe=probe):
            advance(note=entry.reference)
            problems += [problem] if problem else []
    whole = [entry for entry in entries if entry not in [problem.entry for problem in problems]]
    measured = _measured(found, whole, corpus, partition) if metrics else []
    wrong = [row for row in measured if not row["agrees"]]
    told = [{"version": p.entry.reference, "reason": p.reason, "message": p.message} for p in problems]
    if json:
        print_json({"checked": len(entries), "problems": told, "metrics": measured})
    else:
        for table in filter(None, (measured, told)):
            print_table(table, formats={"recorded": ".4f", "measured": ".4f"})
        print(f"{len(entries)} versions checked, {len(problems)} damaged, {len(wrong)} metrics differ")
    return 1 if problems or wrong else 0


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
    from zoo.registry import Registry, RegistryError

    found = Registry(registry)
    if back and target is None:
        found.alias_back(name)
    elif target is not None and not back:
        found.alias(name, target, expect=expect)
    elif back:
        raise RegistryError("ARGUMENT", "expected a target or --back, got both")
    now = found.aliases().get(name)
    if now is None:
        raise RegistryError("UNKNOWN", f"there is no alias {name!r}; expected one of {sorted(found.aliases())}")
    if json:
        print_json({"alias": name, "target": now})
    else:
        print(f"{name} -> {now}")


def diff(first: str, second: str, *, registry: RegistryFile = None, json: AsJson = False) -> int:
    """Compare two versions: config, metrics, and which tensors differ by how much; exit code 1 if they differ.

    Example: zoo diff cylinder-a@1 cylinder-a@2

    Args:
        first: a reference.
        second: another.
    """
    from zoo.registry import Registry

    found = Registry(registry).diff(first, second)
    parts = ("about", "spec", "recipe", "classes", "metrics")
    if json:
        print_json(found)
    else:
        pairs = [(part, key, values) for part in parts for key, values in found[part].items()]
        rows = [{"part": p, "field": k, found["first"]: _told(v[0]), found["second"]: _told(v[1])} for p, k, v in pairs]
        if rows:
            print_table(rows)
        if found["tensors"]:
            print_table(
                [{**row, "first": _told(row["first"]), "second": _told(row["second"])} for row in found["tensors"]]
            )
    return 1 if found["tensors"] or any(found[part] for part in parts) else 0


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
    """Rebuild a lost registry from what its blobs say of themselves.

    Example: zoo recover
    """
    from zoo.registry import Registry

    entries = Registry(registry).recover()
    if json:
        print_json({"recovered": [entry.to_json() for entry in entries]})
    else:
        print_table([_row(entry, [], []) for entry in entries], formats={"parameters": ","})
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


def _row(entry: Entry, metrics: list[str], aliases: list[str]) -> dict[str, Any]:
    values = {name: entry.metrics.get(name, {}).get("value") for name in metrics}
    head = {"name": entry.name, "number": entry.number, "id": entry.id, "architecture": entry.architecture}
    marks = {"aliases": " ".join(aliases), "tags": " ".join(entry.tags)}
    return {**head, "parameters": entry.parameters, **values, "created": entry.created, **marks}


def _ensemble_row(get: Any, entry: EnsembleEntry) -> dict[str, Any]:
    members = " ".join(get(member).reference for member in entry.members)
    return {"name": entry.name, "rule": str(entry.rule.get("rule", "")), "members": members, "created": entry.created}


def tell(entry: Entry | EnsembleEntry, as_json: bool) -> None:
    """All of an entry, a row per field, or as JSON."""
    if as_json:
        print_json(entry.to_json())
    else:
        print_table([{"field": key, "value": _told(value)} for key, value in _flat(entry.to_json())])


def _flat(data: dict[str, Any]) -> list[tuple[str, Any]]:
    """Nested objects as dotted names, one row each."""
    rows = []
    for key, value in data.items():
        inner = value if isinstance(value, dict) and value else {}
        rows += [(f"{key}.{name}", item) for name, item in inner.items()] or [(key, value)]
    return rows


def _told(value: Any) -> str:
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
        from zoo.corpus import PHONEMES

        return [*PHONEMES]
    if len(given) == 1 and Path(given[0]).is_file():
        return Path(given[0]).read_text(encoding="utf-8").split("\n")[: -1 or None]
    return [*given] or None


def _measured(registry: Any, entries: list[Entry], corpus: Path | None, partition: str) -> list[dict[str, Any]]:
    from zoo.corpus import read_corpus, sample_corpus

    frames = sample_corpus(partition) if corpus is None else read_corpus(corpus, partition)
    with progress("evaluating", total=len(entries)) as advance:
        rows = []
        for entry in entries:
            rows += registry.measure(f"{entry.name}@{entry.id}", frames)
            advance(note=entry.reference)
        return rows
