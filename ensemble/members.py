"""`Members`: models from a registry or from your own code, as a set that runs as one.

Here the models meet the frames; how a group of equal models runs fast is `engine`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

import zoo
from ensemble.engine import Group
from ensemble.outputs import MemberOutputs
from ensemble.stack import Stack, unlike

_TILE = 4096  # frames per step
PRECISIONS = ("float32", "auto")
PLANS = ("auto", "loop", "stack")


@dataclass(frozen=True, eq=False)
class Member:
    """One model of a set: a module in evaluation mode and what is known of it.

    Args:
        name: distinct within the set.
        module: (B, ...) -> (B, C) logits.
        classes: names of its C outputs in its own order.
        spec: its input contract; None for a foreign module, which takes tensors only.
        sha256: of its checkpoint; computed from the weights if empty.
        trained_on: fingerprint of the frames it was trained on; "" if unknown.
        reference: name and version in its registry; "" if it comes from none.
    """

    name: str
    module: nn.Module
    classes: tuple[str, ...]
    spec: zoo.Spec | None = None
    sha256: str = ""
    trained_on: str = ""
    reference: str = ""

    @cached_property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    @cached_property
    def digest(self) -> str:
        """64 hex digits that change with the weights or the structure."""
        if self.sha256:
            return self.sha256
        digest = hashlib.sha256(repr(self.module).encode())
        for name, tensor in chain(self.module.named_parameters(), self.module.named_buffers()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Members:
    """M models that answer together, in the order they were named.

    Args:
        members: at least one; names are distinct; all know the same classes, in any order.
        device: where they run.
        precision: "float32", or "auto": whatever is fastest and agrees.
        plan: "auto", or "loop" or "stack" to force one.

    Raises:
        ValueError: no members, a name twice, other classes (the message names the difference), a
            device, precision or plan that does not exist here.
    """

    def __init__(
        self,
        members: Iterable[Member],
        *,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        plan: str = "auto",
    ) -> None:
        self._members = tuple(members)
        _check_names(self._members)
        _check_choice("precision", precision, PRECISIONS)
        _check_choice("plan", plan, PLANS)
        self.device = usable_device(device)
        self.precision, self.forced = precision, plan
        self.classes = self._members[0].classes
        self._orders = [_order(member, self._members[0]) for member in self._members]
        for member in self._members:
            member.module.eval().to(self.device)
        self._groups = _grouped(self._members, loop=plan == "loop")

    def __len__(self) -> int:
        """Number of members, M."""
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    @property
    def names(self) -> tuple[str, ...]:
        """M names, in the user's order."""
        return tuple(member.name for member in self._members)

    @property
    def parameters(self) -> dict[str, int]:
        """Trainable parameters by name."""
        return {member.name: member.parameters for member in self._members}

    @property
    def digests(self) -> dict[str, str]:
        """By name, what identifies the weights: the checkpoint's sha256, else a hash of the tensors."""
        return {member.name: member.digest for member in self._members}

    @property
    def specs(self) -> dict[str, zoo.Spec | None]:
        """By name, the spec; None for a foreign module."""
        return {member.name: member.spec for member in self._members}

    @property
    def trained_on(self) -> dict[str, str]:
        """By name, the fingerprint of the frames it was trained on; "" if unknown."""
        return {member.name: member.trained_on for member in self._members}

    def subset(self, names: Sequence[str]) -> Members:
        """Only these members, in this order.

        Raises:
            ValueError: a name is not among the members.
        """
        missing = [name for name in names if name not in self.names]
        if missing:
            msg = f"no member named {missing}; there are {list(self.names)}"
            raise ValueError(msg)
        chosen = [self._members[self.names.index(name)] for name in names]
        return Members(chosen, device=self.device, precision=self.precision, plan=self.forced)

    @torch.inference_mode()
    def log_probabilities(self, x: Tensor) -> Tensor:
        """(B, inputs) windows of the member with the largest context -> (M, B, C) float32 on the device."""
        x = x.to(self.device)
        out = x.new_empty(len(self), len(x), len(self.classes), dtype=torch.float32)
        for start in range(0, len(x), _TILE):
            self._into(out[:, start : start + _TILE], x[start : start + _TILE])
        return out

    def _into(self, out: Tensor, x: Tensor) -> None:
        widest = self.widest
        for group, rows in self._groups:
            spec = self._members[rows[0]].spec
            inputs = x if spec is None or widest is None else _middle(x, spec, widest)
            values = group(inputs).float().log_softmax(dim=-1)
            for row, value in zip(rows, values, strict=True):
                order = self._orders[row]
                out[row] = value if order is None else value[:, order]

    @cached_property
    def widest(self) -> zoo.Spec | None:
        """The spec with the largest context; None among foreign modules."""
        specs = [member.spec for member in self._members if member.spec is not None]
        return max(specs, key=lambda spec: spec.context, default=None)


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

    Example:
        >>> members = from_modules({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}, classes=["no", "yes"])
        >>> collect(members, torch.zeros(5, 3)).shape
        (2, 5, 2)
    """
    named = classes if isinstance(classes, Mapping) else dict.fromkeys(modules, tuple(classes))
    specs = specs or {}
    members = [Member(name, module, tuple(named[name]), specs.get(name)) for name, module in modules.items()]
    return Members(members, device=device, precision=precision, plan=plan)


class Registered(Protocol):
    """What is needed of an entry of the registry."""

    name: str
    id: str
    sha256: str
    trained_on: str


class Registry(Protocol):
    """What is needed of a registry; `zoo.Registry` is one."""

    def list(self, pattern: str) -> Sequence[str]:
        """Names that match a shell wildcard."""
        ...

    def get(self, reference: str) -> Registered:
        """The entry of a name, an alias, or a name with a version."""
        ...

    def checkpoint(self, reference: str) -> Loaded:
        """Its checkpoint, hash checked."""
        ...


class Loaded(Protocol):
    """What is needed of a checkpoint."""

    spec: zoo.Spec
    classes: tuple[str, ...]

    def to_module(self) -> nn.Module:
        """The model, in evaluation mode."""
        ...


def load(
    registry: Registry,
    references: str | Iterable[str],
    *,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    plan: str = "auto",
) -> Members:
    """Members from a registry, each blob's hash checked.

    Args:
        registry: a `zoo.Registry`.
        references: names, `name@version`, aliases, shell wildcards; each model is taken once, in this order.
        device: where they run.
        precision: see `Members`.
        plan: see `Members`.

    Returns:
        Members named as in the registry; with their version where two versions of one name take part.

    Raises:
        ValueError: a wildcard matches nothing, or a name is unknown; a blob is not what was registered.
    """
    entries = {entry.id: entry for reference in _expanded(registry, references) for entry in [registry.get(reference)]}
    bare = [entry.name for entry in entries.values()]
    members = []
    for reference, entry in entries.items():
        checkpoint = registry.checkpoint(reference)
        name = entry.name if bare.count(entry.name) == 1 else reference
        module, known = checkpoint.to_module(), (checkpoint.classes, checkpoint.spec)
        members.append(Member(name, module, *known, entry.sha256, entry.trained_on, reference))
    return Members(members, device=device, precision=precision, plan=plan)


def _expanded(registry: Registry, references: str | Iterable[str]) -> Iterator[str]:
    for reference in [references] if isinstance(references, str) else references:
        if not set(reference) & set("*?["):
            yield reference
            continue
        found = registry.list(reference)
        if not found:
            msg = f"expected models that match {reference!r}, got none; the registry has {list(registry.list('*'))}"
            raise ValueError(msg)
        yield from found


def collect(members: Members, x: zoo.FrameSet | Tensor | Iterable[object], cache: str | None = None) -> MemberOutputs:
    """What every member says about every frame.

    Args:
        members: M models.
        x: frames; or (N, inputs) inputs; or batches, each of them inputs or a pair (inputs, labels).
        cache: a folder for a resumable store.

    Returns:
        (M, N, C) float32 log-probabilities with the labels, groups and fingerprint of the frames.

    Raises:
        ValueError: a member cannot take these inputs, or the classes of the frames are not the members'.
    """
    if isinstance(x, zoo.FrameSet):
        return _from_frames(members, x)
    if isinstance(x, Tensor):
        return MemberOutputs(members.log_probabilities(x).cpu(), members.names, members.classes)
    values, labels = [], []
    for batch in x:
        inputs, target = batch if isinstance(batch, tuple | list) else (batch, None)
        values.append(members.log_probabilities(inputs).cpu())
        labels.append(target)
    truth = None if any(target is None for target in labels) else torch.cat(labels)
    return MemberOutputs(torch.cat(values, dim=1), members.names, members.classes, labels=truth)


def _from_frames(members: Members, frames: zoo.FrameSet) -> MemberOutputs:
    spec = members.widest
    if spec is None:
        msg = "no spec"
        raise ValueError(msg)
    resident = frames.to(members.device)
    out = torch.empty(len(members), len(frames), len(members.classes))
    for start in range(0, len(frames), _TILE):
        stop = min(start + _TILE, len(frames))
        tile = zoo.stretch(resident, spec.context, spec.normalisation, spec.padding, start=start, stop=stop)
        with torch.inference_mode():
            members._into(out[:, start:stop], tile.windows())
    return MemberOutputs(
        out, members.names, members.classes, frames.labels, frames.groups, fingerprint=frames.fingerprint
    )


def usable_device(device: torch.device | str) -> torch.device:
    """The device, if this machine has it.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    wanted = torch.device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        msg = (
            f"expected a device of this machine, got {str(device)!r} where torch finds no CUDA; use device='cpu'"
        )
        raise ValueError(msg)
    return wanted


def _grouped(members: Sequence[Member], *, loop: bool) -> list[tuple[Group, list[int]]]:
    """Members that stack with each other, and their places among all."""
    kinds: list[list[int]] = []
    for index, member in enumerate(members):
        home = next((kind for kind in kinds if _alike(member, members[kind[0]])), None)
        if home is None:
            kinds.append([index])
        else:
            home.append(index)
    return [(_group([members[i] for i in kind], loop=loop), kind) for kind in kinds]


def _alike(one: Member, other: Member) -> bool:
    if one.spec is not None and other.spec is not None:
        return one.spec == other.spec
    return one.spec is other.spec and not unlike(one.module, other.module)


def _group(members: Sequence[Member], *, loop: bool) -> Group:
    names, modules = [member.name for member in members], [member.module for member in members]
    if loop:
        return Group(names, modules, None, "forced")
    try:
        return Group(names, modules, Stack(modules, names=names))
    except (ValueError, RuntimeError) as error:
        return Group(names, modules, None, str(error))


def _middle(x: Tensor, spec: zoo.Spec, widest: zoo.Spec) -> Tensor:
    """The part of the widest windows that a member of smaller context sees."""
    beyond = (widest.context - spec.context) * spec.features
    return x[:, beyond : x.shape[1] - beyond] if beyond else x


def _order(member: Member, first: Member) -> Tensor | None:
    """Places of the first member's classes among this one's; None where the orders are equal."""
    if member.classes == first.classes:
        return None
    mine, theirs = set(member.classes), set(first.classes)
    if mine != theirs or len(member.classes) != len(first.classes):
        msg = (
            f"expected members of the same classes, got {sorted(mine - theirs)} only in {member.name!r} and "
            f"{sorted(theirs - mine)} only in {first.name!r}"
        )
        raise ValueError(msg)
    return torch.tensor([member.classes.index(name) for name in first.classes])


def _check_names(members: Sequence[Member]) -> None:
    names = [member.name for member in members]
    if not names:
        msg = "expected at least one member, got none"
        raise ValueError(msg)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        msg = f"expected distinct names of members, got {twice} more than once"
        raise ValueError(msg)


def _check_choice(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        msg = f"expected {what} {' or '.join(map(repr, known))}, got {value!r}"
        raise ValueError(msg)
