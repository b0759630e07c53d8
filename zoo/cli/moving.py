"""Commands that carry models from place to place: folders, the hub, two branches of one registry."""

from __future__ import annotations

import sys
from pathlib import Path

from cyclopts import App

from zoo._console import print_json
from zoo.cli.keeping import AsJson, RegistryFile, Switch, tell


def add_to(app: App) -> None:
    """Add these commands to `app`."""
    for command in (export, push, pull, merge):
        app.command(command)
    app.command(import_, name="import")


def export(reference: str, folder: Path, *, registry: RegistryFile = None, json: AsJson = False) -> None:
    """Write a model or an ensemble as a plain folder: config.json, model.safetensors, a card.

    Example: zoo export cylinder-a cylinder-a-folder

    Args:
        reference: of a version, or an ensemble.
        folder: a new or empty folder.
    """
    from zoo import exchange
    from zoo.registry import Registry

    made = exchange.export(Registry(registry), reference, folder)
    if json:
        print_json({"exported": reference, "folder": str(made)})
    else:
        print(f"{reference} written to {made}")


def import_(folder: Path, *, name: str | None = None, registry: RegistryFile = None, json: AsJson = False) -> None:
    """Register the model or ensemble of a folder that `zoo export` wrote.

    Example: zoo import cylinder-a-folder

    Args:
        folder: the folder.
        name: under which; the exported name if left out.
    """
    from zoo import exchange
    from zoo.registry import Registry

    tell(exchange.import_folder(Registry(registry), folder, name=name), json)


def push(
    reference: str, repository: str, *, public: Switch = False, registry: RegistryFile = None, json: AsJson = False
) -> None:
    """Upload a model or an ensemble to the hub (extra `hub`).

    Example: zoo push cylinder-a somebody/cylinder-a

    Args:
        reference: of a version, or an ensemble.
        repository: OWNER/NAME.
        public: let everybody see it.
    """
    from zoo import exchange
    from zoo.registry import Registry

    address = exchange.push(Registry(registry), reference, repository, private=not public)
    if json:
        print_json({"pushed": reference, "address": address})
    else:
        print(address)


def pull(
    repository: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    registry: RegistryFile = None,
    json: AsJson = False,
) -> None:
    """Fetch a model or an ensemble from the hub (extra `hub`) and register it.

    Example: zoo pull somebody/cylinder-a

    Args:
        repository: OWNER/NAME.
        name: under which; the exported name if left out.
        revision: branch, tag or commit.
    """
    from zoo import exchange
    from zoo.registry import Registry

    tell(exchange.pull(Registry(registry), repository, name=name, revision=revision), json)


def merge(base: Path, ours: Path, theirs: Path, *, json: AsJson = False) -> int:
    """Merge two registry files that grew from one, into OURS; exit code 1 on a conflict, nothing written then.

    Git can call it: `git config merge.zoo.driver 'zoo merge %O %A %B'`, and `registry.json merge=zoo` in
    .gitattributes.

    Example: zoo merge base.json ours.json theirs.json

    Args:
        base: the common ancestor; an empty file stands for none.
        ours: one side, and where the result goes.
        theirs: the other side.
    """
    from zoo.registry.merging import merge_files
    from zoo.registry.references import RegistryError

    conflict = None
    try:
        merge_files(base, ours, theirs)
    except RegistryError as error:
        if error.reason not in ("CONFLICT", "DANGLING", "NAME_COLLISION"):
            raise
        conflict = str(error)
        print(f"error: {conflict}", file=sys.stderr)
    if json:
        print_json({"merged": None if conflict else str(ours), "conflict": conflict})
    return 1 if conflict else 0
