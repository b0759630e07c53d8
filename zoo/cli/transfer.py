"""Commands that move models between places: export, import, push, pull, merge."""

from __future__ import annotations

import sys
from pathlib import Path

import zoo
from zoo._console import Answer
from zoo.cli.entries import described
from zoo.cli.options import RegistryFile


def export(reference: str, folder: Path, /, *, registry: RegistryFile = None) -> Answer:
    """Write a model or an ensemble as a plain folder: config.json, model.safetensors and a model card.

    Example: zoo export cylinder-a cylinder-a-folder

    Args:
        reference: a version or an ensemble.
        folder: a new or empty folder.
    """
    written = zoo.export(zoo.Registry(registry), reference, folder)
    return Answer({"exported": reference, "folder": str(written)}, [f"{reference} written to {written}"])


def import_(folder: Path, /, *, save: str | None = None, registry: RegistryFile = None) -> Answer:
    """Register the model or ensemble in a folder written by `zoo export`.

    Example: zoo import cylinder-a-folder

    Args:
        folder: the folder.
        save: name to register it under; its exported name if left out.
    """
    return described(zoo.import_folder(zoo.Registry(registry), folder, name=save))


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
    return described(zoo.pull(zoo.Registry(registry), repository, name=save, revision=revision))


def merge(base: Path, ours: Path, theirs: Path, /) -> Answer:
    """Merge two versions of a registry file into OURS; on a conflict nothing is written and the exit code is 1.

    Git can run it: `git config merge.zoo.driver 'zoo merge %O %A %B'`, and `registry.json merge=zoo` in
    .gitattributes.

    Example: zoo merge base.json ours.json theirs.json

    Args:
        base: the common ancestor; an empty file stands for none.
        ours: one side; the result is written here.
        theirs: the other side.
    """
    from zoo.registry.merge import merge_files

    try:
        merge_files(base, ours, theirs)
    except zoo.RegistryError as error:
        if error.reason not in ("CONFLICT", "DANGLING", "NAME_COLLISION"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return Answer({"merged": None, "conflict": str(error)}, [], code=1)
    return Answer({"merged": str(ours), "conflict": None}, [])
