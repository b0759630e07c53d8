"""Keeping what a command found: a rule and the versions it was found for as one ensemble, a file where it shall be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import zoo
from ensemble.cli.naming import rule_names

if TYPE_CHECKING:
    from ensemble.cli.sources import Source, Spoken
    from ensemble.rules.table import Rule


def keep(name: str, rule: Rule, spoken: Spoken, registry: Path | None) -> str:
    """Register a rule over what was said, with exactly the versions that said it.

    Returns:
        A sentence that says what is kept.

    Raises:
        ValueError: what `require_savable` refuses, or the registry refuses the name.
    """
    from ensemble.run.combined import Ensemble
    from ensemble.run.loading import load

    home, (shorter, names) = zoo.Registry(registry), without_idle(rule, spoken.outputs.members)
    members = load(home, [spoken.references[member] for member in names])
    home.register_ensemble(name, Ensemble(members, shorter))
    size = sum(about.parameters or 0 for about in members.about)
    return f"kept as {name!r}: {len(names)} of {len(spoken.references)} members, {size:,} parameters"


def require_savable(name: str, source: Source) -> None:
    """Refuse before the work what `keep` could not register after it.

    Raises:
        ValueError: the name is that of a rule, a model or an alias; stored outputs do not tell which version spoke;
            a version is gone; the members have their classes in different orders.
    """
    home, references = zoo.Registry(source.registry), source.speakers(source.valid)
    taken = {one.casefold(): one for one in (*rule_names(), *home.list(), *home.aliases())}.get(name.casefold())
    if taken is not None:
        msg = f"expected a name for the ensemble that no rule, model or alias has, got {name!r}, the name of {taken!r}"
        raise ValueError(msg)
    untold = [name for name, reference in references.items() if not reference]
    if untold:
        msg = f"expected outputs in {source.outputs} that tell which versions spoke, got none for {untold}"
        raise ValueError(f"{msg}; collect again")
    try:
        classes = {name: home.get(reference).classes for name, reference in references.items()}
    except zoo.RegistryError as error:
        msg = f"expected the versions that spoke still to be in {home.path}, got: {error}; collect again"
        raise ValueError(msg) from error
    first = next(iter(classes))
    other = [name for name in classes if classes[name] != classes[first]]
    if other:
        msg = (
            f"expected members with their classes in one order, got another than that of {first!r} in {other}; to save "
            f"them together register these again with the rows of their output layer in the order of {first!r}"
        )
        raise ValueError(msg)


def require_place(path: Path) -> None:
    """Refuse before the work a path that its result could not be written to.

    Raises:
        ValueError: no such folder, one that cannot be written to, or the path is itself a folder.
    """
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


def without_idle(rule: Rule, members: Sequence[str]) -> tuple[Rule, list[str]]:
    """The same rule over the members that can influence it.

    Example:
        >>> from ensemble import WeightedMean
        >>> without_idle(WeightedMean((0.25, 0, 0.75)), ["a", "b", "c"])
        (WeightedMean(weights=(0.25, 0.75), fingerprint='', abstain=False, members=()), ['a', 'c'])
    """
    from ensemble.rules import rule_for

    whole = rule_for(rule, members)
    if whole.used is None:
        return whole, list(members)
    return whole.restricted(whole.used), [members[position] for position in whole.used]
