"""Options that several commands share, and what they stand for: members, frames, rules by name, saved ensembles."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

import ensemble
import zoo
from zoo import _console
from zoo.cli.options import Corpus, Device, Names, RegistryFile, flag_fields, read_partition

if TYPE_CHECKING:
    from zoo.registry import Snapshot

Precision = Annotated[
    Literal["float32", "auto"],
    Parameter(help="float32, which is exact, or auto, which is bfloat16 where it is faster and a probe agrees."),
]


@flag_fields
@dataclass(frozen=True)
class Source:
    """Members and frames.

    Args:
        members: names, wildcards or aliases in the registry; a saved ensemble stands for its members; all models if
            left out.
        valid: partition on which rules are fitted and the best single member is chosen.
        test: partition on which members and rules are judged.
        cache: folder that stores the members' outputs, so that nothing is computed twice.
        outputs: folder written by `ensemble collect`, in place of registry, corpus and models.
    """

    members: Names = ("*",)
    registry: RegistryFile = None
    corpus: Corpus = None
    valid: str = "valid"
    test: str = "test"
    device: Device = "auto"
    precision: Precision = "float32"
    cache: Path | None = None
    outputs: Path | None = None


NO_SOURCE = Source()


class Collection:
    """What a `Source` stands for: the members' outputs, partition by partition, and the versions that gave them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.registry = zoo.Registry(source.registry)

    @cached_property
    def now(self) -> Snapshot:
        """The registry's content, read once."""
        return self.registry.snapshot()

    def ensembles(self, names: Iterable[str]) -> dict[str, zoo.EnsembleEntry]:
        """The saved ensembles, or aliases of one, among these names; none where there is no registry."""
        names = [name for name in names if not set(name) & set("*?[") and name not in rule_names()]
        if not names or (self.source.outputs is not None and not self.registry.path.exists()):
            return {}
        known, aliases = self.now.list_ensembles(), self.now.aliases()
        return {name: self.now.get_ensemble(name) for name in names if aliases.get(name, name) in known}

    def references(self, partition: str) -> dict[str, str]:
        """Member -> its version, `name@id`; "" where stored outputs do not record it. Nothing is computed."""
        if self.source.outputs is None:
            return {name: f"{entry.name}@{entry.id}" for name, entry in self._versions.items()}
        stored = self._stored(partition)
        return {name: about.reference for name, about in zip(stored.members, stored.about, strict=True)}

    def outputs(self, partition: str) -> ensemble.MemberOutputs:
        """The members' outputs on a partition, which must have labels."""
        return self.timed_outputs(partition)[0]

    def timed_outputs(
        self, partition: str, *, cache: Path | None = None
    ) -> tuple[ensemble.MemberOutputs, float | None]:
        """The same, with the seconds that the members ran, without loading; None for stored outputs.

        Args:
            partition: its name.
            cache: folder that stores them, in place of one in the source's cache.
        """
        if self.source.outputs is not None:
            outputs, seconds = self._stored(partition), None
        else:
            members, frames = self.members, self.frames(partition)
            if cache is None and self.source.cache is not None:
                cache = self.source.cache / partition
            began = time.perf_counter()
            outputs = ensemble.collect(members, frames, cache=cache, progress=_console.progress)
            seconds = time.perf_counter() - began
        outputs.require_labels()
        return outputs, seconds

    def frames(self, partition: str) -> zoo.FrameSet:
        """A partition of the corpus."""
        return read_partition(self.source.corpus, partition)

    @cached_property
    def members(self) -> ensemble.Members:
        """The members, hash-checked and ready to run."""
        source = self.source
        return ensemble.load(self.registry, self._versions.values(), device=source.device, precision=source.precision)

    @cached_property
    def _versions(self) -> dict[str, zoo.Entry]:
        saved = self.ensembles(self.source.members)
        wanted = [id for name in self.source.members for id in (saved[name].members if name in saved else [name])]
        return ensemble.run.versions(self.now, wanted)

    def _stored(self, partition: str) -> ensemble.MemberOutputs:
        """Stored outputs of the members that match; for a saved ensemble, of the versions it was saved with."""
        from ensemble.outputs.store import read_outputs

        assert self.source.outputs is not None
        outputs = read_outputs(self.source.outputs / partition)
        saved, by_id = self.ensembles(self.source.members), by_version(outputs)
        chosen: dict[str, None] = {}
        for name in self.source.members:
            if name in saved:
                chosen |= {outputs.members[by_id[id]]: None for id in saved[name].members if id in by_id}
            else:
                chosen |= dict.fromkeys(matching(outputs.members, name))
        if not chosen:
            there = list(outputs.members)
            msg = (
                f"expected members that match {list(self.source.members)}, got none; {self.source.outputs} has {there}"
            )
            raise ValueError(msg)
        return outputs if list(chosen) == list(outputs.members) else outputs.subset(list(chosen))


def by_version(outputs: ensemble.MemberOutputs) -> dict[str, int]:
    """Id of a version -> position of the member; members of unknown version share the id ""."""
    return {about.reference.partition("@")[2]: position for position, about in enumerate(outputs.about)}


# ---- rules by name


def rule_names() -> list[str]:
    """Every name of a rule."""
    return [*ensemble.fit.FITTERS, *ensemble.list_rules()]


def require_known(names: Iterable[str], *, members: Iterable[str] = ()) -> None:
    """Refuse an unknown name before anything is fitted.

    Raises:
        ValueError: a name is neither that of a rule nor one of `members`; the message lists those that are.
    """
    known = [*members, *rule_names()]
    for name in names:
        if name not in known:
            raise ValueError(ensemble.rules.no_such("member or rule" if members else "rule", name, known))


def named_rules(names: Sequence[str], valid: ensemble.MemberOutputs) -> dict[str, ensemble.Rule]:
    """Name -> rule, fitted on the validation outputs where it has numbers.

    Raises:
        ValueError: a name is unknown.
    """
    require_known(names)
    fitters = ensemble.fit.FITTERS
    return {name: fitters[name](valid) if name in fitters else ensemble.get_rule(name) for name in names}


def saved_rules(
    ensembles: Mapping[str, zoo.EnsembleEntry], outputs: ensemble.MemberOutputs
) -> dict[str, ensemble.Rule]:
    """Name -> rule of a saved ensemble, over exactly the versions that it was saved with.

    Raises:
        ValueError: there are no outputs of one of them, or the ensemble has its classes in another order.
    """
    positions = by_version(outputs)
    rules: dict[str, ensemble.Rule] = {}
    for name, entry in ensembles.items():
        if missing := [id for id in entry.members if id not in positions]:
            remedy = "collect the outputs again" if "" in positions else "name it with --members"
            msg = f"expected all members of the ensemble {name!r} among those judged, got none with the ids {missing}"
            raise ValueError(f"{msg}; {remedy}")
        if entry.classes != outputs.classes:
            msg = f"expected the classes in the order of the ensemble {name!r}; name it first, or alone, with --members"
            raise ValueError(msg)
        rule = ensemble.rules.rule_from_json(entry.rule)
        rules[name] = ensemble.rules.Among(rule, tuple(positions[id] for id in entry.members))
    return rules


# ---- results that are saved


def require_savable(name: str, collection: Collection) -> None:
    """Refuse before the work a result that `save` could not register after it.

    Raises:
        ValueError: the name is that of a rule, a model or an alias; stored outputs do not record the versions of their
            members; a version is gone; the members have their classes in different orders.
    """
    now, references = collection.now, collection.references(collection.source.valid)
    taken = {other.casefold(): other for other in (*rule_names(), *now.list(), *now.aliases())}.get(name.casefold())
    if taken is not None:
        msg = f"expected a name for the ensemble that no rule, model or alias has, got {name!r}, the name of {taken!r}"
        raise ValueError(msg)
    if unknown := [member for member, reference in references.items() if not reference]:
        folder = collection.source.outputs
        msg = f"expected outputs in {folder} that record the versions of their members, got none for {unknown}"
        raise ValueError(f"{msg}; collect again")
    try:
        classes = {member: now.get(reference).classes for member, reference in references.items()}
    except zoo.RegistryError as error:
        msg = f"expected the versions of these outputs in {collection.registry.path}, got: {error}; collect again"
        raise ValueError(msg) from error
    first = next(iter(classes))
    if other := [member for member in classes if classes[member] != classes[first]]:
        msg = (
            f"expected members with their classes in one order, got another than that of {first!r} in {other}; to save "
            f"them together register these again with the rows of their output layer in the order of {first!r}"
        )
        raise ValueError(msg)


def save(name: str, rule: ensemble.Rule, outputs: ensemble.MemberOutputs, collection: Collection) -> str:
    """Register a rule and the members that influence it, in the versions that gave the outputs, as one ensemble.

    Returns:
        A sentence on what is saved.
    """
    whole, used = ensemble.rules.rule_for(rule, outputs.members), tuple(range(len(outputs.members)))
    if (positions := whole.used) is not None:
        whole, used = whole.restricted(positions), positions
    entries = [collection.now.get(outputs.about[position].reference) for position in used]
    members = ensemble.load(collection.registry, entries)
    collection.registry.register_ensemble(name, ensemble.Ensemble(members, whole))
    parameters = sum(entry.parameters for entry in entries)
    return f"saved as {name!r}: {len(entries)} of {len(outputs.members)} members, {parameters:,} parameters"


def require_writable(path: Path) -> None:
    """Refuse before the work a path that its result could not be written to.

    Raises:
        ValueError: there is no such folder, it is read-only, or the path is itself a folder.
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
