"""Commands that change what a registry holds: register, alias, tag, note, remove."""

from __future__ import annotations

from pathlib import Path

import zoo
from zoo._console import Answer
from zoo.cli.options import Names, RegistryFile, spec_fields
from zoo.cli.views import described


def register(
    name: str,
    file: Path,
    /,
    *,
    spec: str | None = None,
    classes: Names = (),
    note: str | None = None,
    tags: Names = (),
    registry: RegistryFile = None,
) -> Answer:
    """Check a safetensors file against its spec and save it in the registry.

    Example: zoo register cylinder-b weights.safetensors --spec spec.json --classes phonemes.txt

    Args:
        name: the model's name.
        file: a checkpoint written by zoo, or any safetensors file together with --spec and --classes.
        spec: JSON, or a .json or .toml file, such as {"architecture": "cylinder", "features": 27, "context": 20,
            "classes": 40, "options": {"width": 512}}.
        classes: names of the classes in the order of the logits, or a text file with one name per line;
            "phonemes" stands for the 40 classes of HW1P2.
        note: free text.
        tags: short words.
    """
    parsed = None if spec is None else zoo.Spec.from_dict(spec_fields(spec))
    home = zoo.Registry(registry)
    return described(home.register(name, file, spec=parsed, classes=_class_names(classes), note=note, tags=tags))


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
        raise zoo.RegistryError("UNKNOWN", f"there is no alias {name!r}; expected one of {sorted(aliases)}")
    return Answer({"alias": name, "target": aliases[name]}, [f"{name} -> {aliases[name]}"])


def tag(reference: str, /, *tags: str, drop: bool = False, registry: RegistryFile = None) -> Answer:
    """Add tags to a version, or take them off.

    Example: zoo tag cylinder-a@2 submitted

    Args:
        reference: a version.
        tags: short words.
        drop: take these tags off.
    """
    home = zoo.Registry(registry)
    return described(home.annotate(reference, drop_tags=tags) if drop else home.annotate(reference, add_tags=tags))


def note(reference: str, text: str, /, *, registry: RegistryFile = None) -> Answer:
    """Replace the note of a version; an empty text removes it.

    Example: zoo note cylinder-a@2 "dropout 0.4, the one we submitted"

    Args:
        reference: a version.
        text: the new note.
    """
    return described(zoo.Registry(registry).annotate(reference, note=text))


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


def _class_names(given: tuple[str, ...]) -> list[str] | None:
    if given == ("phonemes",):
        from zoo.data.corpus import PHONEMES

        return [*PHONEMES]
    if len(given) == 1 and Path(given[0]).is_file():
        return Path(given[0]).read_text(encoding="utf-8").split("\n")[: -1 or None]
    return [*given] or None
