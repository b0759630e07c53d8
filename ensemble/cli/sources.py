"""Where a command takes its members and its frames from: the options that the commands share."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

import zoo
from ensemble.cli.naming import rule_names
from zoo import _console

if TYPE_CHECKING:
    from ensemble.outputs import MemberOutputs
    from ensemble.run.members import Members

Flag = Annotated[bool, Parameter(negative=())]
Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]


@dataclass(frozen=True)
class Spoken:
    """What members said about one partition, and what is known of them.

    Args:
        outputs: with labels.
        parameters: member -> trainable parameters.
        trained_on: member -> fingerprint of its training frames, "" if unknown.
        references: member -> the version that spoke, `name@id`; "" where stored outputs do not tell.
        seconds: that collecting took.
    """

    outputs: MemberOutputs
    parameters: dict[str, int]
    trained_on: dict[str, str]
    references: dict[str, str]
    seconds: float


@Parameter(name="*")
@dataclass(frozen=True)
class Source:
    """Members and frames.

    Args:
        members: names, wildcards or aliases in the registry, a saved ensemble for its members; all models if left out.
        registry: the registry's file; else $ZOO_REGISTRY, else registry.json in this folder.
        corpus: folder in the HW1P2 layout; the bundled synthesised speech if left out.
        valid: partition that weights are fitted on and the best single member is chosen on.
        test: partition that is judged.
        device: cpu, cuda, or auto for cuda where there is one.
        precision: float32 is exact; auto may use bf16 where a probe shows that it agrees.
        cache: folder that keeps the members' outputs, so that nothing is computed twice.
        outputs: folder written by `ensemble collect`, in place of registry, corpus and models.
    """

    members: Names = ("*",)
    registry: Path | None = None
    corpus: Path | None = None
    valid: str = "valid"
    test: str = "test"
    device: str = "auto"
    precision: Literal["float32", "auto"] = "float32"
    cache: Path | None = None
    outputs: Path | None = None

    def load(self) -> Members:
        """The members, hash-checked and ready to run."""
        return self._loaded(self._versions())

    def speakers(self, partition: str) -> dict[str, str]:
        """Member -> the version that speaks, `name@id`; "" where stored outputs do not tell."""
        if self.outputs is None:
            return self._versions()
        from ensemble.outputs.store import read_outputs

        outputs = read_outputs(self.outputs / partition)
        told = {name: about.reference for name, about in zip(outputs.members, outputs.about, strict=True)}
        return {name: told[name] for name in self._chosen(told)}

    def ensembles(self, names: Iterable[str]) -> dict[str, zoo.EnsembleEntry]:
        """Those of the names that are saved ensembles, or aliases of one; none where there is no registry."""
        names = [name for name in names if not set(name) & set("*?[") and name not in rule_names()]
        registry = zoo.Registry(self.registry)
        if not names or (self.outputs is not None and not registry.path.exists()):
            return {}
        known, aliases = registry.list_ensembles(), registry.aliases()
        return {name: registry.get_ensemble(name) for name in names if aliases.get(name, name) in known}

    def _versions(self) -> dict[str, str]:
        from ensemble.run.loading import versions

        saved = self.ensembles(self.members)
        wanted = [one for name in self.members for one in (saved[name].members if name in saved else (name,))]
        found = versions(zoo.Registry(self.registry), wanted)
        return {name: f"{entry.name}@{entry.id}" for name, entry in found.items()}

    def _loaded(self, references: Mapping[str, str]) -> Members:
        from ensemble.run.loading import load

        device = chosen_device(self.device)
        return load(zoo.Registry(self.registry), references.values(), device=device, precision=self.precision)

    def _chosen(self, told: Mapping[str, str]) -> list[str]:
        """Of stored members those that match; of a saved ensemble, the versions it was saved with."""
        saved, spoke = self.ensembles(self.members), {told[name].partition("@")[2]: name for name in told}
        found: dict[str, None] = {}
        for name in self.members:
            theirs = [spoke[id] for id in saved[name].members if id in spoke] if name in saved else matching(told, name)
            found |= dict.fromkeys(theirs)
        if not found:
            msg = f"expected members that match {list(self.members)}, got none; {self.outputs} has {list(told)}"
            raise ValueError(msg)
        return list(found)

    def frames(self, partition: str) -> zoo.FrameSet:
        """One partition of the corpus."""
        return frames_of(self.corpus, partition)

    def spoken(self, *partitions: str) -> list[Spoken]:
        """What the members say about each partition, which must have labels."""
        if self.outputs is not None:
            return [self._stored(self.outputs, partition) for partition in partitions]
        references = self._versions()
        members = self._loaded(references)
        return [self._collected(members, partition) for partition in partitions]

    def _collected(self, members: Members, partition: str) -> Spoken:
        from ensemble.run.collecting import collect

        frames = self.frames(partition)
        began = time.perf_counter()
        cache = None if self.cache is None else self.cache / partition
        outputs = collect(members, frames, cache=cache, progress=_console.progress)
        outputs.require_labels()
        return _spoken(outputs, began)

    def _stored(self, folder: Path, partition: str) -> Spoken:
        from ensemble.outputs.store import read_outputs

        began = time.perf_counter()
        outputs, names = read_outputs(folder / partition), list(self.speakers(partition))
        chosen = outputs if names == list(outputs.members) else outputs.subset(names)
        chosen.require_labels()
        return _spoken(chosen, began)


def _spoken(outputs: MemberOutputs, began: float) -> Spoken:
    known = dict(zip(outputs.members, outputs.about, strict=True))
    return Spoken(
        outputs,
        outputs.parameters,
        {name: about.trained_on for name, about in known.items()},
        {name: about.reference for name, about in known.items()},
        time.perf_counter() - began,
    )


def frames_of(corpus: Path | None, partition: str) -> zoo.FrameSet:
    """One partition of a corpus in the HW1P2 layout, or of the bundled one."""
    return zoo.sample_corpus(partition) if corpus is None else zoo.read_corpus(corpus, partition)


def chosen_device(name: str) -> str:
    """The device itself for "auto": cuda where there is one."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
