"""Members from a registry, or from modules that exist already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

import zoo
from ensemble.outputs import About
from ensemble.run.members import Member, Members
from ensemble.run.stack import Stack
from zoo import _names


def from_modules(
    modules: Mapping[str, nn.Module],
    *,
    classes: Sequence[str] | Mapping[str, Sequence[str]],
    specs: Mapping[str, zoo.Spec] | None = None,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    plan: str = "auto",
) -> Members:
    """Members from your own models: any modules (B, ...) -> (B, C) logits.

    Args:
        modules: name -> module; put in evaluation mode and moved to `device`.
        classes: names of the C outputs; or model -> names of its own outputs, where the orders differ.
        specs: name -> spec, for models that are to run over a `FrameSet`.
        device: where they run.
        precision: see `Members`.
        plan: see `Members`.

    Raises:
        ValueError: as in `Members`, or a model has no class names.

    Example:
        >>> members = from_modules({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}, classes=["no", "yes"])
        >>> members.log_probabilities(torch.zeros(5, 3)).shape
        torch.Size([2, 5, 2])
    """
    named = classes if isinstance(classes, Mapping) else dict.fromkeys(modules, classes)
    nameless = sorted(set(modules) - set(named))
    if nameless:
        msg = f"expected names of classes for every model, got none for {nameless}"
        raise ValueError(msg)
    members = [
        Member(
            name,
            tuple(named[name]),
            partial(_itself, module),
            About(sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)),
            (specs or {}).get(name),
        )
        for name, module in modules.items()
    ]
    return Members(members, device=device, precision=precision, plan=plan)


def _itself(module: nn.Module) -> nn.Module:
    return module  # a lambda could not be sent to another process


def load(
    registry: zoo.Registry,
    references: str | Iterable[str | zoo.Entry],
    *,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    plan: str = "auto",
) -> Members:
    """Members from a registry; each blob is read and hashed once, straight into its place in a stack.

    Args:
        registry: where the models are.
        references: names, `name@version`, ids, aliases, shell wildcards, entries; each model is taken once, in this
            order. The registry's file is read once, and not at all where all are entries.
        device: where they run.
        precision: see `Members`.
        plan: see `Members`.

    Returns:
        Members named as in the registry; with their version where two versions of one name take part.

    Raises:
        ValueError: a wildcard matches nothing, a name is unknown, a blob is not what was registered.
    """
    where, named = _names.usable_device(device), versions(registry, references)
    kinds: dict[zoo.Spec, list[str]] = {}
    for name, entry in named.items():
        kinds.setdefault(entry.spec, []).append(name)
    members, stacks = {}, []
    for spec, names in kinds.items():
        state = registry.stacked([named[name] for name in names])
        template = zoo.build(spec, device="meta").eval()
        stack = Stack.from_state(template, {key: tensor.to(where) for key, tensor in state.items()}, names)
        stacks.append((stack, [list(named).index(name) for name in names]))
        for row, name in enumerate(names):
            entry = named[name]
            about = About(entry.parameters, entry.trained_on, f"{entry.name}@{entry.id}")
            members[name] = Member(name, entry.classes, partial(stack.member, row), about, spec, entry.sha256)
    ordered = [members[name] for name in named]
    return Members(ordered, device=where, precision=precision, plan=plan, stacks=stacks)


def versions(
    registry: zoo.Registry | zoo.registry.Snapshot, references: str | Iterable[str | zoo.Entry]
) -> dict[str, zoo.Entry]:
    """The versions that `load` would load, by the names that it gives the members; no blob is read.

    Raises:
        ValueError: a wildcard matches nothing, or a name is unknown.
    """
    wanted = [references] if isinstance(references, str) else list(references)
    if isinstance(registry, zoo.Registry) and any(isinstance(reference, str) for reference in wanted):
        registry = registry.snapshot()
    entries = {entry.id: entry for reference in wanted for entry in _matching(registry, reference)}.values()
    bare = Counter(entry.name for entry in entries)
    return {entry.name if bare[entry.name] == 1 else entry.reference: entry for entry in entries}


def _matching(registry: zoo.Registry | zoo.registry.Snapshot, reference: str | zoo.Entry) -> list[zoo.Entry]:
    if not isinstance(reference, str):
        return [reference]
    names = registry.list(reference) if set(reference) & set("*?[") else [reference]
    if not names:
        msg = f"expected models that match {reference!r}, got none; the registry has {registry.list()}"
        raise ValueError(msg)
    return [registry.get(name) for name in names]
