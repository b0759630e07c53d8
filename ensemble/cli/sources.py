"""Where a command takes its members and its frames from: the options that the commands share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

import zoo

if TYPE_CHECKING:
    from ensemble.members import Members
    from ensemble.outputs import MemberOutputs


@Parameter(name="*")
@dataclass(frozen=True)
class Source:
    """Members and frames.

    Args:
        members: names, wildcards or aliases in the registry; all models if left out.
        registry: the registry's file; else $ZOO_REGISTRY, else registry.json in this folder.
        corpus: folder in the HW1P2 layout; the bundled synthesised speech if left out.
        valid: partition that weights are fitted on and the best single member is chosen on.
        test: partition that is judged.
        device: cpu, cuda, or auto for cuda where there is one.
        precision: float32 is exact; auto may use bf16 where a probe shows that it agrees.
        cache: folder that keeps the members' outputs, so that nothing is computed twice.
    """

    members: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = ("*",)
    registry: Path | None = None
    corpus: Path | None = None
    valid: str = "valid"
    test: str = "test"
    device: str = "auto"
    precision: Literal["float32", "auto"] = "float32"
    cache: Path | None = None

    def load(self) -> Members:
        """The members, hash-checked and ready to run."""
        from ensemble.members import load

        return load(
            registry_at(self.registry), self.members, device=chosen_device(self.device), precision=self.precision
        )

    def frames(self, partition: str) -> zoo.FrameSet:
        """One partition of the corpus."""
        if self.corpus is None:
            return zoo.sample_corpus(partition)
        return zoo.read_corpus(self.corpus, partition)

    def collect(self, members: Members, partition: str) -> MemberOutputs:
        """What the members say about one partition, which must have labels."""
        from ensemble.members import collect

        outputs = collect(members, self.frames(partition), cache=None if self.cache is None else str(self.cache))
        outputs.require_labels()
        return outputs


def registry_at(path: Path | None) -> zoo.Registry:
    """The registry of that path; else of $ZOO_REGISTRY, else registry.json in this folder."""
    return zoo.Registry(path or os.environ.get("ZOO_REGISTRY") or "registry.json")


def chosen_device(name: str) -> str:
    """The device itself for "auto": cuda where there is one."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def best_member(outputs: MemberOutputs) -> str:
    """The most accurate member; of equals the one of lower log-loss."""
    from ensemble.evaluation import evaluate

    table = evaluate(outputs, {}, replicates=1).members
    return str(table.sort_values(["accuracy", "log_loss"], ascending=[False, True]).iloc[0]["name"])
