"""`Group`: members of one structure, run in the fastest way that gives what the models give one by one.

In go M modules, the same modules as a `Stack` where they can be stacked, and a `Batch` of frames. Out come pieces of
logits (m, b, C) through a callback; together they cover every member and frame once. The law that proves it right: a
form runs only after `plan.agreement` has compared it with the plain loop over the modules, on frames of the very batch
that asked for it, and found no probability moved by more than 1e-5 (in faster types, by more than their rule allows).
So a mistake in one of the forms shows as a slower plan, not as a wrong number. The modules themselves are believed
once `zoo.checkpoint.examine` has asked each of them rows drawn from the real input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn

from ensemble.run._engine import forms, plan
from ensemble.run._engine.batch import Batch, hop, overlapping, take_rows
from ensemble.run._engine.dense import Dense, NotDenseError, dense
from ensemble.run._engine.forms import Form
from ensemble.run._engine.plan import Plan, Trial
from ensemble.run.stack import Stack, Watch, drawn, tensor_in
from zoo._names import multiplies_bfloat16
from zoo.checkpoint import Exam, examine

__all__ = ["Batch", "Form", "Group", "Plan", "fast_types", "overlapping", "size_of"]

_WORTH = 2e7  # multiplications below which a batch is done before a measurement pays
_AS_THEY_ARE = ("stack", "loop")  # kinds that run the models unchanged, in the type of their weights
_SIMPLE = ("prepacked", "folded", "stack", "loop")  # kinds that need no measurement to be worth it
_FEW = 128  # frames below which blocks of them do not pay
_LOOKED_AT, _PER_FRAME = (
    2000,
    16,
)  # attributes of the members that are compared at every batch: so many at least
_EXAMINED = 8  # rows of the real input that every model is asked before it is believed

_log = logging.getLogger("ensemble")

Write = Callable[[slice, slice, Tensor], None]


@dataclass(eq=False)
class Group:
    """M members of one structure, and the plan for each size of batch (a power of two), with or without overlaps."""

    make: Callable[[], Sequence[nn.Module]]  # the M modules, in evaluation mode on `device`, when first needed
    stack: Stack | None  # the same members; None where they cannot be stacked
    device: torch.device
    names: Sequence[str]  # M names, for messages
    classes: int  # C
    features: int = 0  # per frame, F, where the inputs are windows of frames
    precision: str = "float32"  # or "auto"
    forced: str = "auto"  # or "loop" or "stack"
    why: str = ""  # there is no stack
    outside: bool = False  # one member that is no torch module, and takes rows as they came
    watch: Watch | None = None  # over the modules, where somebody else has them too
    plans: dict[tuple[int, bool], Plan] = field(default_factory=dict, init=False)
    _examined: dict[torch.dtype | None, int] = field(default_factory=dict, init=False)  # type of inputs -> rows asked
    _own_copy: set[int] = field(default_factory=set, init=False)  # members that write into their inputs
    _as_given: set[torch.dtype] = field(default_factory=set, init=False)  # of integers that the models take themselves
    _too_narrow: set[str] = field(default_factory=set, init=False)  # precisions in which a batch overflowed
    _runners: dict[tuple[str, str], forms.Runner] = field(default_factory=dict, init=False)

    @cached_property
    def dense(self) -> Dense | None:
        """The members folded; None where they do not fold."""
        try:
            return None if self.stack is None else dense(self.stack)
        except NotDenseError as error:
            self.why = f"not folded: {error}"
            return None

    @cached_property
    def modules(self) -> list[nn.Module]:
        """The M modules, for the loop."""
        return list(self.make())

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        tensors = chain(self.modules[0].parameters(), self.modules[0].buffers())
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)

    def examine(self, batch: Batch, *, real: bool = True) -> None:
        """Ask every model some rows of a batch, unless they have been asked as many of that type already.

        Args:
            batch: inputs; rows with NaN or infinity are not asked.
            real: whether later batches need no further exam.

        Raises:
            ValueError: as `zoo.checkpoint.examine`; or a model's answer to a row depends on the other rows.
        """
        kind = None if self.outside or batch.floats else batch.windows.dtype
        if min(batch.count, _EXAMINED) <= self._examined.get(kind, 0):
            return
        if self.outside:
            self._examine_outside(batch)
            return
        rows = batch.at(drawn(batch.count, _EXAMINED))
        rows = rows[rows.isfinite().reshape(len(rows), -1).all(dim=1)]
        if len(rows) <= self._examined.get(kind, 0):
            return
        if kind is not None and _takes(self.modules[0], rows):
            self._as_given.add(kind)
        for place, (name, module) in enumerate(zip(self.names, self.modules, strict=True)):
            exam = examine(module, self.cast(rows), self.classes, name=name)
            self._refuse_batches(name, exam)
            self._own_copy |= {place} if exam.writes_input else set()
        if real:
            self._examined[kind] = len(rows)

    def _examine_outside(self, batch: Batch) -> None:
        """The same for a member that is no torch module: what it is asked is the positions of rows."""
        which = drawn(batch.count, _EXAMINED)
        (name,), (module,) = self.names, self.modules
        module(take_rows(batch.rows, which))  # an error of its own is clearer than the exam's
        exam = examine(lambda some: module(take_rows(batch.rows, some)), which, self.classes, name=name)
        self._refuse_batches(name, exam)
        self._examined[None] = len(which)

    def _refuse_changed(self, watch: Watch, frames: int) -> None:
        """Members are as they were when they became members: a stack holds what their modules held then."""
        if (place := watch.changed(frames)) is not None:
            msg = f"expected {self.names[place]!r} as it was when it became a member, but it was changed since then: "
            raise ValueError(f"{msg}its weights, layers, attributes, or train() was called; make the members again")

    def _refuse_batches(self, name: str, exam: Exam) -> None:
        """Answers that depend on the other rows would change with the size of batches and steps."""
        if exam.needs_whole_batch:
            msg = f"expected an answer to each row by itself from {name!r}, got others for a row alone than among "
            way_out = "is there a BatchNorm without running statistics, or a normalisation over the rows?"
            raise ValueError(f"{msg}{len(exam.logits)} rows; {way_out}")

    def cast(self, x: Tensor) -> Tensor:
        """Inputs in the type of the weights, except integers that the models take as they are."""
        return x if x.dtype in self._as_given else x.to(self.dtype)

    def run(self, batch: Batch, write: Write) -> None:
        """Give `write` the (m, b, C) logits of all members and frames, piece by piece.

        Where memory runs out, the tile is halved and the batch begun again; with the loop where a form just chosen does
        not agree with it on rows drawn from the whole batch; without float16 where a number is too large for that.
        """
        if self.watch is not None:
            self._refuse_changed(self.watch, batch.count)
        self.examine(batch)
        key = size_of(batch.count), batch.overlaps
        fresh = key not in self.plans
        sample = self._decide(key, batch) if fresh else None
        while True:
            chosen = self.plans[key]
            found = None if sample is None else torch.empty_like(sample.alone)
            sound: list[Tensor] = []  # whether a piece's numbers fit their type, to be looked at once for the batch
            try:
                for members, frames, logits in self.pieces(chosen.form, batch):
                    write(members, frames, logits)
                    if chosen.form.precision == "float16":
                        sound.append(logits.isfinite().all())
                    if sample is not None and found is not None:
                        sample.copy(found, members, frames, logits)
            except RuntimeError as error:
                memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
                if not memory or chosen.form.tile < 2:
                    raise
                self._runners.clear()
                half = replace(chosen.form, tile=chosen.form.tile // 2)
                self.plans[key] = Plan(half, f"{chosen.why}; memory ran out, tile halved", chosen.trials)
                continue
            if sound and not torch.stack(sound).all():
                self._too_narrow.add(chosen.form.precision)
                self.plans = {size: p for size, p in self.plans.items() if p.form.precision not in self._too_narrow}
                _log.warning("%d members no longer run in float16: a number is too large for it", len(self.names))
                sample = self._decide(key, batch)
                continue
            if sample is None or found is None or sample.agreement_drawn(chosen.form, found).near:
                break
            if self.forced == "stack":
                msg = f"expected members {[*self.names]} to give together what they give alone, got something else; "
                raise ValueError(f"{msg}use plan='loop'")
            loop = Form("loop", chosen.form.tile)
            note = f"{chosen.form.kind} does not agree with the loop on frames drawn from the whole batch"
            self.plans[key], sample = Plan(loop, note, chosen.trials), None
            _log.warning("%d members run one by one: %s", len(self.names), note)
        if self.watch is not None and (fresh or chosen.form.kind == "loop"):
            self.watch.renew()  # what a model itself keeps from call to call is its own affair

    def pieces(self, form: Form, batch: Batch) -> Iterator[forms.Piece]:
        """The logits of all members in one form; CUDA's float32 products use TF32 if that is its precision."""
        key = form.kind, form.precision
        if key not in self._runners:
            self._runners[key] = self._runner(form)
        found = self._runners[key](batch, form.tile)
        if self.device.type != "cuda":
            yield from found
            return
        while True:
            with torch.cuda.device(self.device), forms.products(tf32=form.precision == "tf32"):
                piece = next(found, None)
            if piece is None:
                return
            yield piece

    def _runner(self, form: Form) -> forms.Runner:
        if self.outside:
            return forms.outside(self.modules[0])
        if form.kind == "loop" or self.stack is None:
            return forms.windowed([self._alone(place) for place in range(len(self.modules))], self.cast)
        if form.kind == "stack" or self.dense is None:
            stack = self.stack
            return forms.windowed([lambda x, tile: stack(x)], self.cast)
        dtype = forms.DTYPES[form.precision]
        if form.kind == "overlap":
            return forms.overlapped(self.dense, dtype, self.features, self.device)
        run = forms.windowed([forms.FOLDED[form.kind](self.dense.to(dtype))], lambda x: x.to(dtype))
        return forms.keeping_nan(run) if form.kind == "prepacked" else run

    def _alone(self, place: int) -> forms.Step:
        """One model as it is, on inputs of its own where it writes into them."""
        module, own_copy = self.modules[place], place in self._own_copy

        def step(x: Tensor, tile: int) -> Tensor:
            logits: Tensor = tensor_in(module(x.clone() if own_copy else x))
            return logits.unsqueeze(0)

        return step

    def log_probabilities(self, form: Form, batch: Batch) -> Tensor:
        """(M, B, C) float32 in one form, for comparing and timing it."""
        out = torch.empty(0)
        for members, frames, logits in self.pieces(form, batch):
            if not len(out):
                out = logits.new_empty(len(self.modules), batch.count, logits.shape[-1], dtype=torch.float32)
            out[members, frames] = logits.log_softmax(-1, dtype=torch.float32)
        return out

    def candidates(self, batch: Batch) -> list[Form]:
        """The forms that this group, this batch and the caller's settings allow, the likeliest to win first.

        Those in faster types come before exact ones; the fastest type is tried in all tiles, another in the first.
        """
        cuda = self.device.type == "cuda"
        steps = (size_of(batch.count), 4096) if cuda else (512, 256, 1024)
        tiles: dict[str, tuple[int, ...]] = {}  # frames per step to try, by kind of form
        stackable = self.forced != "loop" and self.stack is not None
        if stackable and self.dense is None:
            tiles["stack"] = steps
        if stackable and self.dense is not None:
            if batch.overlaps and self.features and batch.count > _FEW:
                block = hop(self.dense.first.weight.shape[-1], self.features)
                tiles["overlap"] = tuple(blocks * block for blocks in ((512, 64) if cuda else (16,)))
            if forms.available(self.device):
                tiles |= {"prepacked": steps, "folded": steps[:1]}  # in case oneDNN refuses, or is slower
            else:
                tiles |= {"folded": steps} | ({"replay": steps} if cuda else {})
        if self.forced != "stack" or not tiles:
            tiles["loop"] = steps[:1]
        fast = fast_types(self.device) if self.precision == "auto" else []
        precisions = ["float32", *(kind for kind in fast if kind not in self._too_narrow)]
        found = []
        for precision in reversed(precisions):
            for kind in [kind for kind in tiles if kind not in _AS_THEY_ARE]:
                some = tiles[kind] if precision == precisions[-1] else tiles[kind][:1]
                found += [(kind, tile, precision) for tile in some]
        found += [(kind, tile, "float32") for kind in tiles if kind in _AS_THEY_ARE for tile in tiles[kind]]
        most = size_of(batch.count)
        return list(dict.fromkeys(Form(kind, min(tile, most), precision) for kind, tile, precision in found))

    def _decide(self, key: tuple[int, bool], batch: Batch) -> plan.Sample | None:
        """Choose a plan; where it is not simply the loop, frames on which the loop and the form must agree."""
        wanted = self.candidates(batch)
        if len(wanted) == 1:
            self.plans[key] = Plan(wanted[0], self.why or "the only form there is")
            return None
        where = plan.spread(batch.count)
        alone = self.log_probabilities(Form("loop", plan.PROBED), Batch.of(batch.at(where)))
        sound = ~alone.isnan().any(dim=2).any(
            dim=0
        )  # of NaN, such as inputs with NaN give, no form is nearer than another
        where, alone = where[sound.cpu()], alone[:, sound]
        sample = plan.Sample(where, alone, 2e-2 if self.dtype.itemsize < 4 else 1e-5)
        chosen = self.plans[key] = self._plan(batch, wanted, sample)
        self._runners.clear()  # let go of the weights and graphs of forms that were only tried
        failed = [trial.note for trial in chosen.trials if trial.note]
        if chosen.form.kind != "loop":
            return sample
        if self.forced != "loop" and failed:
            _log.warning("%d members run one by one: %s", len(self.modules), failed[0])
        return None

    def _plan(self, batch: Batch, wanted: Sequence[Form], sample: plan.Sample) -> Plan:
        """The likeliest form where there is little work, the form cached for this machine, or the fastest one tried."""

        def run(form: Form, count: int) -> Tensor:
            return self.log_probabilities(form, batch.head(count))

        probed, compare = min(batch.count, plan.PROBED), sample.agreement
        size = sum(parameter.numel() for module in self.modules for parameter in module.parameters())
        if size * batch.count < _WORTH:
            trials: list[Trial] = []
            for form in [form for form in wanted if form.precision == "float32" and form.kind in _SIMPLE]:
                trials.append(plan.attempt(form, run, probed, compare))
                if trials[-1].agreement.near:
                    return Plan(form, "too little work to measure", tuple(trials))
            return plan.choose(trials)
        asked = {"structure": str(self.modules[0]), "members": len(self.modules), "precision": self.precision}
        asked |= {"frames": size_of(batch.count), "overlaps": batch.overlaps, "forced": self.forced}
        file = plan.file_of(self.device, **asked)
        known = plan.recall(file)
        if known in wanted and known is not None:
            near = compare(known, run(known, probed))
            if near.near:
                return Plan(known, "measured earlier on this machine", (Trial(known, float("inf"), near),))
        chosen = plan.choose(plan.try_all(wanted, run, frames=batch.count, compare=compare))
        plan.remember(file, chosen.form)
        return replace(chosen, why=f"{chosen.why}; {self.why}") if self.why else chosen


def _takes(module: nn.Module, rows: Tensor) -> bool:
    """Whether a model answers such rows at all."""
    try:
        module(rows.clone())
    except Exception:  # a foreign forward may raise anything; what it says of the rows as floats will be reported
        return False
    return True


def size_of(frames: int) -> int:
    """The next power of two: batches of similar size share a plan."""
    return 1 << max(frames - 1, 0).bit_length()


def fast_types(device: torch.device) -> list[str]:
    """Precisions in which this hardware multiplies faster than in float32."""
    if device.type == "cuda":
        return ["tf32", "bfloat16"] if multiplies_bfloat16(device) else ["float16"]
    newer = getattr(torch.cpu, "get_capabilities", None)  # from torch 2.11 on
    able = newer() if newer else {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}
    limited = able.get("avx512_bf16") and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    has = able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16")
    return ["bfloat16"] if has and not limited else []  # ATEN_CPU_CAPABILITY=avx2 limits it
