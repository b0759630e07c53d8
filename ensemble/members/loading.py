"""Where members come from: a registry, or modules that exist already."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

import zoo
from ensemble.members.roster import Member, Members, usable_device
from ensemble.stack import Stack

_READERS = 4  # checkpoints in memory at a time beside the stack


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
    references: str | Iterable[str],
    *,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    plan: str = "auto",
) -> Members:
    """Members from a registry; each blob is read and hashed once, straight into its place in a stack.

    Args:
        registry: where the models are.
        references: names, `name@version`, ids, aliases, shell wildcards; each model is taken once, in this order.
        device: where they run.
        precision: see `Members`.
        plan: see `Members`.

    Returns:
        Members named as in the registry; with their version where two versions of one name take part.

    Raises:
        ValueError: a wildcard matches nothing, a name is unknown, a blob is not what was registered.
    """
    where = usable_device(device)
    entries = list({entry.id: entry for entry in _expanded(registry, references)}.values())
    specs = [entry.spec for entry in entries]
    stacks = [(_read(registry, [entries[p] for p in ps], specs[ps[0]], where), ps) for ps in _kinds(specs)]
    homes = {place: (stack, row) for stack, places in stacks for row, place in enumerate(places)}
    bare = [entry.name for entry in entries]
    members = []
    for place, entry in enumerate(entries):
        stack, row = homes[place]
        members.append(
            Member(
                entry.name if bare.count(entry.name) == 1 else entry.reference,
                entry.classes,
                lambda stack=stack, row=row: stack.member(row),  # type: ignore[misc]  # defaults bind the loop's values
                entry.parameters,
                specs[place],
                entry.sha256,
                entry.trained_on,
                entry.reference,
            )
        )
    return Members(members, device=where, precision=precision, plan=plan, stacks=stacks)


def _member(name: str, module: nn.Module, classes: Sequence[str], spec: zoo.Spec | None) -> Member:
    size = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return Member(name, tuple(classes), lambda: module, size, spec)


def _expanded(registry: zoo.Registry, references: str | Iterable[str]) -> Iterator[zoo.Entry]:
    for reference in [references] if isinstance(references, str) else references:
        if not set(reference) & set("*?["):
            yield registry.get(reference)
            continue
        found = registry.list(reference)
        if not found:
            msg = f"expected models that match {reference!r}, got none; the registry has {registry.list()}"
            raise ValueError(msg)
        yield from map(registry.get, found)


def _kinds(specs: Sequence[zoo.Spec]) -> list[list[int]]:
    """Places of equal specs."""
    kinds: dict[zoo.Spec, list[int]] = {}
    for place, spec in enumerate(specs):
        kinds.setdefault(spec, []).append(place)
    return list(kinds.values())


def _read(registry: zoo.Registry, entries: Sequence[zoo.Entry], spec: zoo.Spec, device: torch.device) -> Stack:
    """The stack of some entries of one spec; a checkpoint is let go as soon as its place in the stack is filled."""
    template = zoo.build(spec, device="meta").eval()
    first = registry.checkpoint(entries[0].reference).tensors
    state = {name: torch.empty(len(entries), *t.shape, dtype=t.dtype, device=device) for name, t in first.items()}

    def fill(row: int, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            state[name][row].copy_(tensor)

    fill(0, first)
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:  # hashing leaves Python's lock alone
        rest = range(1, len(entries))
        list(pool.map(lambda row: fill(row, registry.checkpoint(entries[row].reference).tensors), rest))
    return Stack.from_state(template, state, [entry.reference for entry in entries])
