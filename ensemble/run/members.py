"""`Members`: a set of models that runs as one, from a registry or from modules that exist already."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

import zoo
from ensemble.outputs import About
from ensemble.outputs.arrays import class_names
from ensemble.run._engine import Batch, Group
from ensemble.run._engine.batch import count_rows, take_rows
from ensemble.run.stack import Stack, Watch, first_line, linear_inputs, unlike
from zoo import _names, _notebook
from zoo._names import checked
from zoo.checkpoint import outline
from zoo.checkpoint.exam import probe_rows
from zoo.models.spec import refuse_lazy

_log = logging.getLogger("ensemble")
PRECISIONS = ("float32", "auto")
PLANS = ("auto", "loop", "stack")
_MODULE = frozenset(nn.Module().__dict__)  # attributes of every module
_STEP, _GPU_STEP = 4096, 32_768  # frames whose inputs are held at a time


@dataclass(frozen=True, eq=False)
class Member:
    """One model of a set."""

    name: str  # distinct within the set
    classes: tuple[str, ...]  # names of its C outputs, in its own order
    make: Callable[[], nn.Module] = field(repr=False)  # returns the module (B, ...) -> (B, C) logits, when first needed
    about: About = field(default_factory=About)  # its trainable parameters, training frames, version in a registry
    spec: zoo.Spec | None = None  # its input contract; None for a foreign module, which takes tensors only
    sha256: str = ""  # of its checkpoint, if it has one
    #: whether the module stands for something outside torch: it takes rows as they came (arrays, tables, text) and
    #: returns logarithms of probabilities, and there are no weights to keep
    outside: bool = False

    @cached_property
    def module(self) -> nn.Module:
        """The model in evaluation mode."""
        return self.make().eval()

    @property
    def digest(self) -> str:
        """64 hex digits that change with the weights, the structure or an attribute, computed at each call.

        It is empty where what decides the member's answers cannot be read off it: memory of a library in another
        language, a function outside torch.
        """
        if self.sha256:
            return self.sha256
        return content_digest((str(self.spec), self.classes, self.module))


class PlanTable(list[dict[str, Any]]):
    """Rows that print as a table."""

    def __repr__(self) -> str:
        import pandas as pd  # half a second that running members need not wait for

        numbers = {"x loop": "{:.2f}".format, "moved": "{:.1e}".format, "changed": "{:.4f}".format}
        return pd.DataFrame(list(self)).to_string(index=False, na_rep="", formatters=numbers if self else None)


class Members:
    """M models that run as one, in the order in which they were named. Nothing about them changes afterwards.

    Args:
        members: at least one; names are distinct; all have the same classes, in any order.
        device: where they run.
        precision: "float32": probabilities within 1e-5 of those of the models run one by one. "auto": a faster
            type where the hardware has one, if no probability moves by more than 0.01 and no predicted class
            changes except in near-ties.
        plan: "auto" measures; "loop" runs the models one by one, "stack" all at once.
        stacks: groups that are stacked already, with the positions of their members.
        classes: the order of the classes; that of the first member if empty.

    Raises:
        ValueError: no members, a name used twice, other classes, or a device, precision or plan that does not exist
            here.
    """

    @checked
    def __init__(
        self,
        members: Iterable[Member],
        *,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        plan: str = "auto",
        stacks: Sequence[tuple[Stack, list[int]]] = (),
        classes: Sequence[str] = (),
    ) -> None:
        self._members = tuple(members)
        self.names = tuple(member.name for member in self._members)  #: M names, in the user's order
        #: what is known of each: parameters, training frames, version in a registry
        self.about = tuple(member.about for member in self._members)
        if not self._members:
            msg = "expected at least one member, got none"
            raise ValueError(msg)
        if twice := sorted(name for name, count in Counter(self.names).items() if count > 1):
            msg = f"expected distinct names of members, got {twice} more than once"
            raise ValueError(msg)
        for what, value, known in (("precision", precision, PRECISIONS), ("plan", plan, PLANS)):
            if value not in known:
                msg = f"expected {what} {' or '.join(map(repr, known))}, got {value!r}"
                raise ValueError(msg)
        #: makes the same members in another process; None where only their own content does
        self.again: Callable[[], Members] | None = None
        self.device, self.precision, self.forced = _names.usable_device(device), precision, plan
        #: frames whose inputs are held at a time; memory grows with them, not with N
        self.step = _GPU_STEP if self.device.type == "cuda" else _STEP
        #: names of the C outputs, in the order of the first member
        self.classes = tuple(classes) or self._members[0].classes
        self._parts: dict[tuple[str, ...], Members] = {}
        wanted = "members of the same classes"
        found = [
            class_order(member.classes, self.classes, wanted, repr(member.name), repr(self.names[0]))
            for member in self._members
        ]
        self.orders = [None if order is None else order.to(self.device) for order in found]
        done = {place for _, places in stacks for place in places}
        given: list[tuple[Stack | None, list[int]]] = [*stacks]
        given += [(None, places) for places in _alike(self._members) if not done.issuperset(places)]
        self.groups = [(self._group(places, stack), places) for stack, places in given]

    def __len__(self) -> int:
        """Number of members, M."""
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def __add__(self, other: Members) -> Members:
        """These members, then those of the other set, in one.

        A ValueError where two members have one name, where classes differ, or where both sets hold torch modules and
        differ in device, precision or plan.
        """
        if not isinstance(other, Members):
            return NotImplemented
        both = [each for each in (self, other) if not all(member.outside for member in each)] or [self]
        settings = [{"device": each.device, "precision": each.precision, "plan": each.forced} for each in both]
        if settings[0] != settings[-1]:
            msg = f"expected two sets of members with equal settings, got {settings[0]} and {settings[-1]}"
            raise ValueError(msg)
        stacks = [
            (group.stack, [start + place for place in places])
            for start, each in ((0, self), (len(self), other))
            for group, places in each.groups
            if group.stack is not None and group.watch is None  # from a registry: nobody can have changed its models
        ]
        return Members([*self, *other], stacks=stacks, **settings[0])  # type: ignore[arg-type]  # a dict of mixed types

    def __deepcopy__(self, memo: object) -> Self:
        return self  # so that scikit-learn's `clone` shares them

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(Members, device=self.device, precision=self.precision, plan=self.forced, classes=self.classes)
        return make, (self._members,)

    def __repr__(self) -> str:
        return f"Members({_notebook.shortened(self.names)})"

    def _repr_html_(self) -> str:
        runs = {place: number for number, (_, places) in enumerate(self.groups, start=1) for place in places}
        rows = [
            {
                "member": member.name,
                "architecture": member.spec.architecture if member.spec else None,
                "context": member.spec.context if member.spec else None,
                "parameters": member.about.parameters,
                "bytes": member.about.size,
                "version": member.about.reference or None,
                "group": runs[place],
            }
            for place, member in enumerate(self)
        ]
        lines = [
            f"{len(self)} members of {len(self.classes)} classes on {self.device}, in {self.precision}; those of one "
            "group run as one"
        ]
        return _notebook.html("Members", lines, [_notebook.Table(rows, formats={"parameters": ",d", "bytes": ",d"})])

    @property
    def digests(self) -> tuple[str, ...]:
        """M hashes of the weights: the checkpoint's sha256, else one of the tensors."""
        return tuple(member.digest for member in self._members)

    @property
    def tolerance(self) -> float:
        """How far a probability may be from that of the model run by itself."""
        narrow = self.precision == "auto" or any(group.dtype.itemsize < 4 for group, _ in self.groups)
        return 1e-2 if narrow else 1e-5

    def subset(self, names: Sequence[str]) -> Members:
        """Only these members, in this order, the classes in theirs; a ValueError where a name is not among them."""
        if missing := [name for name in names if name not in self.names]:
            msg = f"no member named {missing}; there are {list(self.names)}"
            raise ValueError(msg)
        chosen = [self._members[self.names.index(name)] for name in names]
        return Members(chosen, device=self.device, precision=self.precision, plan=self.forced, classes=self.classes)

    def part(self, names: tuple[str, ...]) -> Members:
        """`subset`, which is made once and kept; all members are these members themselves."""
        if names not in self._parts:
            self._parts[names] = self if names == self.names else self.subset(names)
        return self._parts[names]

    def plan(self) -> PlanTable:
        """What was chosen for each group and size of batch so far, and why: rows that print as a table.

        Speeds are ratios to the loop; `moved` is the largest change of a probability, `changed` the
        fraction of frames whose most probable class is another. Empty before the first frames have run.
        """
        return PlanTable(
            {"group": self._title(places), "frames": frames, "rows": "yes" if neighbours else ""} | row
            for group, places in self.groups
            for (frames, neighbours), plan in group.plans.items()
            for row in plan.rows()
        )

    @torch.inference_mode()
    def log_probabilities(self, x: Any) -> Tensor:
        """(M, B, C) log-probabilities of all members for (B, ...) inputs, float32, on the members' device.

        Inputs are a tensor, an array or a table. They are cast to the type of each model's weights, except integers
        that a model takes as they are; a member outside torch gets them as they came. Where the members have specs, the
        inputs are windows of the largest context.

        Raises:
            ValueError: inputs of another length than the specs require, members that are prepared differently, or a
                model that is not believed: `zoo.checkpoint.examine` asks each some of the first rows.
        """
        first = self._members[0]
        other = next((member for member in self if preparation(member.spec) != preparation(first.spec)), None)
        if other is not None:
            msg = (
                f"expected members that share one input, got {first.name!r} with {first.spec} and {other.name!r} with "
                f"{other.spec}; collect over a FrameSet, which is prepared for each, or over a mapping of member name "
                "to input"
            )
            raise ValueError(msg)
        spec = next(iter(self.widest), None)
        if spec is not None and tuple(x.shape[1:]) != (spec.inputs,):
            msg = f"expected inputs (B, {spec.inputs}) for {spec}, got {tuple(x.shape)}"
            raise ValueError(msg)
        count = count_rows(x)
        out = torch.empty(len(self), count, len(self.classes), device=self.device)
        for start in range(0, count, self.step):
            some = slice(start, min(start + self.step, count))
            self.write(Batch.of(take_rows(x, some), self.device), spec, out[:, some])
        return out

    @torch.inference_mode()
    def write(self, batch: Batch, widest: zoo.Spec | None, out: Tensor) -> None:
        """Write log-probabilities into `out` (M, B, C): the rows of the members that a batch was prepared for.

        They are those whose frames are prepared as `widest`, one of `self.widest`, says; None stands for foreign ones.
        """
        for group, places in self.groups:
            spec = self._members[places[0]].spec
            if preparation(spec) != preparation(widest):
                continue
            cut, features = (widest.context - spec.context, spec.features) if spec and widest else (0, 0)
            group.run(batch.middle(cut, features), self._writer(places, out))

    def _writer(self, places: list[int], out: Tensor) -> Callable[[slice, slice, Tensor], None]:
        orders = [self.orders[place] for place in places]
        as_given = places == list(range(places[0], places[0] + len(places))) and all(each is None for each in orders)

        def write(members: slice, frames: slice, logits: Tensor) -> None:
            values = logits.log_softmax(-1, dtype=torch.float32)
            if as_given:
                out[places[0] + members.start : places[0] + members.stop, frames] = values
                return
            for place, order, value in zip(places[members], orders[members], values, strict=True):
                out[place, frames] = value if order is None else value[:, order]

        return write

    @cached_property
    def widest(self) -> list[zoo.Spec]:
        """For every way of preparing frames, the spec with the largest context; none for foreign modules."""
        specs = sorted((member.spec for member in self if member.spec), key=lambda spec: spec.context)
        return list({preparation(spec): spec for spec in specs}.values())

    @cached_property
    def inputs(self) -> int | None:
        """Length of the input vectors that `log_probabilities` takes; None where the members do not declare it."""
        return max((spec.inputs for spec in self.widest), default=None) or linear_inputs(self._members[0].module)

    def _title(self, places: list[int]) -> str:
        more = len(places) - 1
        return self.names[places[0]] + (f" and {more} more" if more else "")

    def _group(self, places: list[int], stack: Stack | None) -> Group:
        """Members of one structure: stacked already, or now where that is possible and wanted."""
        members = [self._members[place] for place in places]
        names, watch, outside = [member.name for member in members], None, members[0].outside
        why = "plan='loop'" if self.forced == "loop" else "no torch module" if outside else ""
        if stack is None and not outside:
            modules = [member.module.to(self.device) for member in members]
            try:
                stack = None if why else Stack(modules, names=names).eval()
            except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:  # what vmap refuses
                why = first_line(error)
                _log.warning("%s run one by one: %s", self._title(places), why)
            watch = Watch(modules)
        spec = members[0].spec
        group = Group(
            lambda: [each.module for each in members],
            stack,
            self.device,
            names,
            len(self.classes),
            spec.features if spec else 0,
            self.precision,
            self.forced,
            why,
            outside,
            watch,
        )
        if watch is not None and spec is not None:  # the form of its inputs is declared
            group.examine(Batch.of(probe_rows(spec.inputs).to(self.device)), real=False)
            watch.renew()  # a hook that makes weights has made them
        return group


def content_digest(value: Any) -> str:
    """64 hex digits that change with what decides how an object behaves; empty where that cannot be read off it."""
    digest = hashlib.sha256()
    try:
        _feed(digest.update, value, {})
    except (_OpaqueError, RecursionError):
        return ""
    return digest.hexdigest()


class _OpaqueError(Exception):
    """An object's content cannot be read."""


def _feed(update: Callable[[Any], object], value: Any, seen: dict[int, tuple[int, object]]) -> None:
    """Feed what decides how an object behaves into a hash: types by name, data by content, functions by their code.

    Not seen are globals that a function reads, and the code of classes. `seen` holds the objects that were fed before,
    which count by their number.

    Raises:
        _OpaqueError: memory that Python does not see.
    """
    kind = type(value)
    update(f"<{kind.__module__}.{kind.__qualname__} ".encode())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        update(repr(value).encode())
        return
    if id(value) in seen:
        update(str(seen[id(value)][0]).encode())
        return
    seen[id(value)] = len(seen), value  # kept alive, so that no other object gets its id
    for part in _content(update, value):
        _feed(update, part, seen)
    update(b">")


def _content(update: Callable[[Any], object], value: Any) -> Iterable[Any]:
    """The parts of an object, in order; bytes of tensors and arrays are fed at once."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise _OpaqueError
        update(f"{tuple(value.shape)} {value.dtype}".encode())
        update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return ()
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        update(f"{value.shape} {value.dtype.descr if value.dtype.names else value.dtype.str}".encode())
        if value.dtype.hasobject:
            return [*value.ravel()]
        if value.dtype.names:  # between the fields may be anything
            return [value[name] for name in value.dtype.names]
        update(value.tobytes())
        return ()
    if isinstance(value, nn.Module):
        own = {name: each for name, each in vars(value).items() if name not in _MODULE}
        hooks = [*value._forward_pre_hooks.values()], [*value._forward_hooks.values()]
        return own, hooks, value._parameters, value._buffers, value._modules
    if isinstance(value, dict):
        return chain.from_iterable(value.items())
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__module__, value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, held
    if isinstance(value, CodeType):
        return value.co_code, value.co_consts, value.co_names
    if isinstance(value, type | BuiltinFunctionType | np.ufunc):
        return getattr(value, "__module__", None), getattr(value, "__qualname__", value.__name__)
    try:
        state = value.__reduce_ex__(4)  # how it would be made again; nothing is made, and nothing pickled
    except Exception as error:  # whatever a foreign class does there
        raise _OpaqueError from error
    return (state,) if isinstance(state, str) else [[*part] if isinstance(part, Iterator) else part for part in state]


def preparation(spec: zoo.Spec | None) -> tuple[int, str, str] | None:
    """What decides how frames are prepared, except the context: a smaller one is the middle of a larger one."""
    return None if spec is None else (spec.features, spec.normalisation, spec.padding)


def _alike(members: Sequence[Member]) -> list[list[int]]:
    """Positions of members of equal spec, or of equal structure among foreign ones."""
    kinds: list[list[int]] = []
    by_spec: dict[zoo.Spec, list[int]] = {}
    for place, member in enumerate(members):
        if member.spec is not None:
            by_spec.setdefault(member.spec, []).append(place)
        elif home := next((kind for kind in kinds if _same_structure(member, members[kind[0]])), None):
            home.append(place)
        else:
            kinds.append([place])
    return sorted([*by_spec.values(), *kinds])


def _same_structure(one: Member, other: Member) -> bool:
    return not one.outside and not other.outside and not unlike(one.module, other.module)


def named_classes(
    models: Iterable[str], classes: Sequence[str] | Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Model -> names of its classes, as text; a ValueError where one has none."""
    named = classes if isinstance(classes, Mapping) else dict.fromkeys(models, classes)
    if nameless := sorted(set(models) - set(named)):
        msg = f"expected names of classes for every model, got none for {nameless}"
        raise ValueError(msg)
    return {name: class_names(named[name]) for name in models}


def class_order(found: Sequence[str], wanted: Sequence[str], expected: str, *names: str) -> Tensor | None:
    """Positions of the classes `wanted` among those `found`, None where they are equal; `names` are whose they are."""
    if found == wanted:
        return None
    if set(found) != set(wanted) or len(found) != len(wanted):
        more, fewer = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
        msg = f"expected {expected}, got {more} only in {names[0]} and {fewer} only in {names[1]}"
        raise ValueError(msg)
    return torch.tensor([found.index(name) for name in wanted])


class _Output(nn.Module):
    """A model that returns more than logits, and the function that gives them."""

    def __init__(self, model: nn.Module, output: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, C)."""
        return self.output(self.model(x))


@checked
def from_modules(
    modules: Mapping[str, nn.Module],
    *,
    classes: Sequence[str] | Mapping[str, Sequence[str]],
    specs: Mapping[str, zoo.Spec] | None = None,
    output: Callable[[Any], Tensor] | Mapping[str, Callable[[Any], Tensor]] | None = None,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    plan: str = "auto",
) -> Members:
    """Members from your own models: any modules (B, ...) -> (B, C) logits.

    A model is believed after it has answered some rows: of the first batch, and where it has a spec of a fixed one at
    once. It must give one tensor of floats (B, C), or an object with such a tensor `.logits`; the same each time; and
    for a row the same whatever the other rows are. One that writes into its inputs gets a copy. Models that agree in
    all that decides what they compute but the weights run as one stack, if the stack agrees with them. A model must not
    be changed while it is a member: it is then refused, and the members are to be made again.

    Args:
        modules: name -> module; put in evaluation mode and moved to `device`.
        classes: names of the C outputs; or model -> names of its own outputs, where the orders differ.
        specs: name -> spec, for models that are to run over a `FrameSet`.
        output: gives the logits in what a model returns, such as `lambda answer: answer[0]` for a tuple; or model ->
            that, for some models.
        device, precision, plan: as in `Members`.

    Raises:
        TypeError: something that is no module.
        ValueError: as in `Members`; a model has no class names, has lazy layers, or is not believed.

    Example:
        >>> members = from_modules({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}, classes=["no", "yes"])
        >>> members.log_probabilities(torch.zeros(5, 3)).shape
        torch.Size([2, 5, 2])
    """
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            came = f"the class {module.__name__}; make it" if isinstance(module, type) else type(module).__name__
            way_out = "see from_estimators and from_callables for models outside torch"
            msg = f"expected a torch.nn.Module for {name!r}, got {came}; {way_out}"
            raise TypeError(msg)
        refuse_lazy(module, name)
        if hollow := [path for path, parameter in module.named_parameters() if parameter.is_meta]:
            msg = f"expected weights with values in {name!r}, got {hollow[:8]} on the meta device; load them first"
            raise ValueError(msg)
    named = named_classes(modules, classes)
    outputs = output if isinstance(output, Mapping) else dict.fromkeys(modules, output)
    if unknown := sorted(set(outputs) - set(modules)):
        msg = f"expected output= of models among {[*modules]}, got {unknown}"
        raise ValueError(msg)
    members = []
    for name, module in modules.items():
        if (chosen := outputs.get(name)) is not None:
            module = _Output(module, chosen)
        size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        about = About(trained, size=size)
        make = module.eval  # a bound method can be sent to another process; it returns the module
        members.append(Member(name, named[name], make, about, (specs or {}).get(name)))
    return Members(members, device=device, precision=precision, plan=plan)


@checked
def load(
    registry: zoo.Registry,
    references: str | Iterable[str | zoo.Entry],
    *,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    plan: str = "auto",
) -> Members:
    """Members from a registry; each blob is read and hashed once, straight into its place in a stack.

    Members are named as in the registry, with their version where two versions of one name take part.

    Args:
        registry: where the models are.
        references: names, `name@version`, ids, aliases, shell wildcards, entries; each model is taken once, in this
            order. The registry's file is read once, and not at all where all are entries.
        device, precision, plan: as in `Members`.

    Raises:
        ValueError: a wildcard matches nothing, a name is unknown, a blob is not what was registered.
    """
    where, named = _names.usable_device(device), versions(registry, references)
    members = [
        Member(
            name,
            entry.classes,
            partial(registry.load, entry),
            About(entry.parameters, entry.trained_on, f"{entry.name}@{entry.id}", entry.bytes),
            entry.spec,
            entry.sha256,
        )
        for name, entry in named.items()
    ]
    stacked = _in_stacks(members, lambda names: registry.stacked([named[name] for name in names]), where)
    found = Members(stacked[0], device=where, precision=precision, plan=plan, stacks=stacked[1])
    found.again = partial(load, registry, [*named.values()], device=device, precision=precision, plan=plan)
    return found


@checked
def from_checkpoints(checkpoints: Mapping[str, zoo.Checkpoint], **options: Any) -> Members:
    """Members from trained models by their names; `options` are those of `Members`."""
    where = _names.usable_device(options.pop("device", "cpu"))
    members = []
    for name, one in checkpoints.items():
        size = sum(tensor.nbytes for tensor in one.tensors.values())
        about = About(zoo.count_parameters(one.spec), one.trained_on, size=size)
        members.append(Member(name, one.classes, one.to_module, about, one.spec))

    def state(names: Sequence[str]) -> dict[str, Tensor]:
        each = [checkpoints[name].tensors for name in names]
        return {key: torch.stack([tensors[key] for tensors in each]) for key in each[0]}

    members, stacks = _in_stacks(members, state, where)
    return Members(members, device=where, stacks=stacks, **options)


def _in_stacks(
    members: Sequence[Member], state: Callable[[Sequence[str]], Mapping[str, Tensor]], where: torch.device
) -> tuple[list[Member], list[tuple[Stack, list[int]]]]:
    """The members, made from the stacks of those of equal spec, and these stacks with their members' positions.

    `state` gives the tensors of such members. Members whose architecture cannot be outlined have no stack.
    """
    found, stacks = list(members), []
    for places in _alike(members):
        spec, names = members[places[0]].spec, [members[place].name for place in places]
        template = None if spec is None else outline(spec)
        if template is None:
            continue
        tensors = {key: tensor.to(where) for key, tensor in state(names).items()}
        stack = Stack.from_state(template.eval(), tensors, names)
        stacks.append((stack, places))
        for row, place in enumerate(places):
            found[place] = replace(members[place], make=partial(stack.member, row))
    return found, stacks


@checked
def versions(
    registry: zoo.Registry | zoo.registry.Snapshot, references: str | Iterable[str | zoo.Entry]
) -> dict[str, zoo.Entry]:
    """The versions that `load` would load, by the names that it gives the members; no blob is read.

    A `ValueError` where a wildcard matches nothing or a name is unknown.
    """
    wanted = [references] if isinstance(references, str) else list(references)
    if isinstance(registry, zoo.Registry) and any(isinstance(reference, str) for reference in wanted):
        registry = registry.snapshot()
    entries: dict[str, zoo.Entry] = {}
    for reference in wanted:
        if not isinstance(reference, str):
            entries[reference.id] = reference
            continue
        names = registry.list(reference) if set(reference) & set("*?[") else [reference]
        if not names:
            have = registry.list() or "no models yet"
            msg = f"expected models that match {reference!r}, got none; the registry has {have}"
            raise ValueError(msg)
        entries |= {entry.id: entry for entry in map(registry.get, names)}
    bare = Counter(entry.name for entry in entries.values())
    return {entry.name if bare[entry.name] == 1 else entry.reference: entry for entry in entries.values()}
