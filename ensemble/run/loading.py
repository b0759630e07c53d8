"""Where members come from: a registry, or modules that exist already."""

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
    """Members from models you have: any modules (B, ...) -> (B, C) logits.

    Args:
        modules: name -> module; put in evaluation mode and moved to `device`.
        classes: names of the C outputs; or name of the model -> its own names, where the orders differ.
        specs: name -> spec, for models that shall be fed from a `FrameSet`.
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
    members = [_member(name, module, named[name], (specs or {}).get(name)) for name, module in modules.items()]
    return Members(members, device=device, precision=precision, plan=plan)


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
    where = _names.usable_device(device)
    named = versions(registry, references)
    entries = list(named.values())
    kinds = _kinds(entries)
    stacks = [(_read(registry, [entries[p] for p in ps], spec, where), ps) for spec, ps in kinds.items()]
    specs = {place: spec for spec, places in kinds.items() for place in places}
    homes = {place: (stack, row) for stack, places in stacks for row, place in enumerate(places)}
    members = []
    for place, (name, entry) in enumerate(named.items()):
        stack, row = homes[place]
        members.append(
            Member(
                name,
                entry.classes,
                partial(stack.member, row),
                About(entry.parameters, entry.trained_on, f"{entry.name}@{entry.id}"),
                specs[place],
                entry.sha256,
            )
        )
    return Members(members, device=where, precision=precision, plan=plan, stacks=stacks)


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
    entries = {entry.id: entry for reference in wanted for entry in _expanded(registry, reference)}.values()
    bare = Counter(entry.name for entry in entries)
    return {entry.name if bare[entry.name] == 1 else entry.reference: entry for entry in entries}


def _member(name: str, module: nn.Module, classes: Sequence[str], spec: zoo.Spec | None) -> Member:
    size = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return Member(name, tuple(classes), partial(_itself, module), About(size), spec)


def _itself(module: nn.Module) -> nn.Module:
    return module  # a lambda could not be sent to another process


def _expanded(registry: zoo.Registry | zoo.registry.Snapshot, reference: str | zoo.Entry) -> list[zoo.Entry]:
    if not isinstance(reference, str):
        return [reference]
    if not set(reference) & set("*?["):
        return [registry.get(reference)]
    if found := registry.list(reference):
        return [registry.get(name) for name in found]
    msg = f"expected models that match {reference!r}, got none; the registry has {registry.list()}"
    raise ValueError(msg)


def _kinds(entries: Sequence[zoo.Entry]) -> dict[zoo.Spec, list[int]]:
    """Spec -> places of the entries that have it."""
    kinds: dict[zoo.Spec, list[int]] = {}
    for place, entry in enumerate(entries):
        kinds.setdefault(entry.spec, []).append(place)
    return kinds


def _read(registry: zoo.Registry, entries: Sequence[zoo.Entry], spec: zoo.Spec, device: torch.device) -> Stack:
    """The stack of some entries of one spec."""
    state = {name: tensor.to(device) for name, tensor in registry.stacked(entries).items()}
    names = [entry.reference for entry in entries]
    return Stack.from_state(zoo.build(spec, device="meta").eval(), state, names)
