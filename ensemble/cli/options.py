"""Options that several commands share, and what they stand for: members, frames, rules by name, saved ensembles."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

import ensemble
import zoo
from zoo._console import Answer, progress
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


class Collection:
    """What a `Source` stands for: the members' outputs, partition by partition, and the versions that gave them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.registry = zoo.Registry(source.registry)
        self.seconds: float | None = None  # that the members ran on the last partition; None for stored outputs

    @cached_property
    def now(self) -> Snapshot:
        """The registry's content, read once."""
        return self.registry.snapshot()

    @cached_property
    def versions(self) -> dict[str, zoo.Entry]:
        """Name -> version of each member in the registry."""
        saved = self.ensembles(self.source.members)
        wanted = [id for name in self.source.members for id in (saved[name].members if name in saved else [name])]
        return ensemble.run.versions(self.now, wanted)

    @cached_property
    def members(self) -> ensemble.Members:
        """The members, hash-checked and ready to run."""
        source = self.source
        return ensemble.load(self.registry, self.versions.values(), device=source.device, precision=source.precision)

    @property
    def names(self) -> Iterable[str]:
        """Names of the members, known before any of them runs."""
        return self.versions if self.source.outputs is None else self.outputs(self.source.valid).members

    def ensembles(self, names: Iterable[str]) -> dict[str, zoo.EnsembleEntry]:
        """The saved ensembles, or aliases of one, among these names; none where there is no registry."""
        names = [name for name in names if not set(name) & set("*?[") and name not in rule_names()]
        if not names or (self.source.outputs is not None and not self.registry.path.exists()):
            return {}
        known, aliases = self.now.list_ensembles(), self.now.aliases()
        return {name: self.now.get_ensemble(name) for name in names if aliases.get(name, name) in known}

    def outputs(self, partition: str, *, cache: Path | None = None) -> ensemble.MemberOutputs:
        """The members' outputs on a partition, which must have labels; stored in `cache`, or in the source's cache."""
        if self.source.outputs is not None:
            outputs = self._stored(self.source.outputs, partition)
        else:
            members, frames = self.members, read_partition(self.source.corpus, partition)
            if cache is None and self.source.cache is not None:
                cache = self.source.cache / partition
            began = time.perf_counter()
            outputs = ensemble.collect(members, frames, cache=cache, progress=progress)
            self.seconds = time.perf_counter() - began
        outputs.require_labels()
        return outputs

    def _stored(self, folder: Path, partition: str) -> ensemble.MemberOutputs:
        """Stored outputs of the members that match; for a saved ensemble, of the versions it was saved with."""
        from ensemble.outputs.store import read_outputs

        outputs = read_outputs(folder / partition)
        saved, positions = self.ensembles(self.source.members), by_version(outputs)
        chosen: dict[str, None] = {}
        for name in self.source.members:
            if name in saved:
                chosen |= {outputs.members[positions[id]]: None for id in saved[name].members if id in positions}
            else:
                chosen |= dict.fromkeys(matching(outputs.members, name))
        if not chosen:
            msg = f"expected members that match {[*self.source.members]}, got none; {folder} has {[*outputs.members]}"
            raise ValueError(msg)
        return outputs if [*chosen] == [*outputs.members] else outputs.subset([*chosen])

    def saved_rules(self, names: Iterable[str], outputs: ensemble.MemberOutputs) -> dict[str, ensemble.Rule]:
        """Name -> rule of each saved ensemble, over exactly the versions that it was saved with."""
        positions = by_version(outputs)
        rules: dict[str, ensemble.Rule] = {}
        for name, entry in self.ensembles(names).items():
            if missing := [id for id in entry.members if id not in positions]:
                remedy = "collect the outputs again" if "" in positions else "name it with --members"
                msg = f"expected all members of the ensemble {name!r} among those judged"
                raise ValueError(f"{msg}, got none with the ids {missing}; {remedy}")
            if entry.classes != outputs.classes:
                msg = f"expected the classes in the order of the ensemble {name!r}"
                raise ValueError(f"{msg}; name it first, or alone, with --members")
            rule = ensemble.rules.rule_from_json(entry.rule)
            rules[name] = ensemble.rules.Among(rule, tuple(positions[id] for id in entry.members))
        return rules

    def require_savable(self, name: str | None) -> None:
        """Refuse before the work a result that `saved` could not register after it.

        The name may be taken, a version unknown or gone, or the members may have their classes in different orders.
        """
        if name is None:
            return
        now, folder = self.now, self.source.outputs
        taken = {other.casefold(): other for other in (*rule_names(), *now.list(), *now.aliases())}.get(name.casefold())
        if taken is not None:
            msg = "expected a name for the ensemble that no rule, model or alias has"
            raise ValueError(f"{msg}, got {name!r}, the name of {taken!r}")
        if folder is None:
            entries = self.versions
        else:
            stored = self.outputs(self.source.valid)
            references = {member: about.reference for member, about in zip(stored.members, stored.about, strict=True)}
            if unknown := [member for member, reference in references.items() if not reference]:
                msg = f"expected outputs in {folder} that record the versions of their members"
                raise ValueError(f"{msg}, got none for {unknown}; collect again")
            try:
                entries = {member: now.get(reference) for member, reference in references.items()}
            except zoo.RegistryError as error:
                msg = f"expected the versions of these outputs in {self.registry.path}, got: {error}; collect again"
                raise ValueError(msg) from error
        first = next(iter(entries))
        if other := [member for member, entry in entries.items() if entry.classes != entries[first].classes]:
            msg = f"expected members with their classes in one order, got another than that of {first!r} in {other}"
            remedy = f"register these again with the rows of their output layer in the order of {first!r}"
            raise ValueError(f"{msg}; to save them together {remedy}")

    def saved(self, answer: Answer, name: str | None, rule: ensemble.Rule, outputs: ensemble.MemberOutputs) -> Answer:
        """The answer, once the rule and the members that influence it are registered, in the judged versions."""
        if name is None:
            return answer
        whole, used = ensemble.rules.rule_for(rule, outputs.members), tuple(range(len(outputs.members)))
        if (positions := whole.used) is not None:
            whole, used = whole.restricted(positions), positions
        entries = [self.now.get(outputs.about[position].reference) for position in used]
        members = ensemble.load(self.registry, entries)
        self.registry.register_ensemble(name, ensemble.Ensemble(members, whole))
        parameters = sum(entry.parameters for entry in entries)
        line = f"saved as {name!r}: {len(entries)} of {len(outputs.members)} members, {parameters:,} parameters"
        return Answer(answer.data | {"saved": name}, [*answer.shown, line])


def by_version(outputs: ensemble.MemberOutputs) -> dict[str, int]:
    """Id of a version -> position of the member; members of unknown version share the id ""."""
    return {about.reference.partition("@")[2]: position for position, about in enumerate(outputs.about)}


def rule_names() -> list[str]:
    """Every name of a rule, fitted or not."""
    return [*ensemble.fit.FITTERS, *ensemble.list_rules()]


def require_rules(names: Iterable[str], others: Iterable[str] = ()) -> None:
    """Refuse before the work a name of no rule, unless it is one of the others."""
    known = [*(others := [*others]), *rule_names()]
    for name in names:
        if name not in known:
            raise ValueError(ensemble.rules.no_such("member or rule" if others else "rule", name, known))


def named_rules(
    names: Sequence[str], valid: ensemble.MemberOutputs, *, others: Sequence[str] = ()
) -> dict[str, ensemble.Rule]:
    """Name -> rule, fitted on `valid` where it has numbers; those of `others` are left out."""
    fitters = ensemble.fit.FITTERS
    wanted = [name for name in names if name not in others]
    return {name: fitters[name](valid) if name in fitters else ensemble.get_rule(name) for name in wanted}
