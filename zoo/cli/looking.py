"""Commands that look at models and change nothing: list, show, load, verify, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from zoo._console import print_json, print_table, progress
from zoo.cli.keeping import AsJson, RegistryFile, Switch, row, tell, told

if TYPE_CHECKING:
    from zoo.registry.entries import EnsembleEntry, Entry


def add_to(app: App) -> None:
    """Add these commands to `app`."""
    app.command(list_, name="list")
    for command in (show, load, verify, diff):
        app.command(command)


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
    rows = [row(entry, metrics, [name for name, to in aliases.items() if to == entry.reference]) for entry in entries]
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
    tell(found.get_ensemble(reference) if ensemble else found.get(reference), json)


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

    Of an architecture that this program does not know the bytes are checked, but no model is built.

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
    from zoo.registry.reading import known

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
    foreign = [] if fast else [entry for entry in whole if not known(entry)]
    measured = _measured(found, [one for one in whole if one not in foreign], corpus, partition) if metrics else []
    wrong = [row for row in measured if not row["agrees"]]
    told = [{"version": p.entry.reference, "reason": p.reason, "message": p.message} for p in problems]
    not_built = [entry.reference for entry in foreign]
    if json:
        print_json({"checked": len(entries), "problems": told, "metrics": measured, "not_built": not_built})
    else:
        for table in filter(None, (measured, told)):
            print_table(table, formats={"recorded": ".4f", "measured": ".4f"})
        print(f"{len(entries)} versions checked, {len(problems)} damaged, {len(wrong)} metrics differ")
        if foreign:
            strange = ", ".join(sorted({entry.architecture for entry in foreign}))
            print(
                f"{len(foreign)} not built, only their bytes are checked: this program does not know {strange};"
                " start it through the file that does, see the README"
            )
    return 1 if problems or wrong else 0


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
        rows = [{"part": p, "field": k, found["first"]: told(v[0]), found["second"]: told(v[1])} for p, k, v in pairs]
        if rows:
            print_table(rows)
        if found["tensors"]:
            print_table(
                [{**row, "first": told(row["first"]), "second": told(row["second"])} for row in found["tensors"]]
            )
    return 1 if found["tensors"] or any(found[part] for part in parts) else 0


def _ensemble_row(get: Any, entry: EnsembleEntry) -> dict[str, Any]:
    members = " ".join(get(member).reference for member in entry.members)
    return {"name": entry.name, "rule": str(entry.rule.get("rule", "")), "members": members, "created": entry.created}


def _measured(registry: Any, entries: list[Entry], corpus: Path | None, partition: str) -> list[dict[str, Any]]:
    from zoo.data.corpus import read_corpus, sample_corpus

    frames = sample_corpus(partition) if corpus is None else read_corpus(corpus, partition)
    with progress("evaluating", total=len(entries)) as advance:
        rows = []
        for entry in entries:
            rows += registry.measure(f"{entry.name}@{entry.id}", frames)
            advance(note=entry.reference)
        return rows
