"""`Group`: members of one structure, run in the fastest way that gives what the models give one by one.

In go M modules, the same modules as a `Stack` where they can be stacked, and a `Batch` of frames. Out come pieces of
logits (m, b, C) through a callback; together they cover every member and frame once. The law that proves it right: a
form runs only after `plan.agreement` has compared it with the plain loop over the modules, on frames of the very batch
that asked for it, and found no probability moved by more than 1e-5 (in faster types, by more than their rule allows).
So a mistake in one of the forms shows as a slower plan, not as a wrong number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ensemble.run._engine import forms, plan
from ensemble.run._engine.batch import Batch, hop
from ensemble.run._engine.dense import Dense, NotDenseError, dense
from ensemble.run._engine.forms import Form
from ensemble.run._engine.plan import Agreement, Plan, Trial, first_line
from ensemble.run.stack import Stack

__all__ = ["Batch", "Form", "Group", "Plan", "fast_types", "first_line"]

_WORTH = 2e7  # multiplications below which a batch is done before a measurement pays
_AS_THEY_ARE = ("stack", "loop")  # kinds that run the models unchanged, in the type of their weights
_SIMPLE = ("prepacked", "folded", "stack", "loop")  # kinds that need no measurement to be worth it
_FEW = 128  # frames below which blocks of them do not pay

_log = logging.getLogger("ensemble")

Write = Callable[[slice, slice, Tensor], None]


@dataclass(eq=False)
class Group:
    """M members of one structure, and the plan for each size of batch (a power of two), with or without overlaps."""

    make: Callable[[], Sequence[nn.Module]]  # the M modules, in evaluation mode on `device`, when first needed
    stack: Stack | None  # the same members; None where they cannot be stacked
    device: torch.device
    features: int = 0  # per frame, F, where the inputs are windows of frames
    precision: str = "float32"  # or "auto"
    forced: str = "auto"  # or "loop" or "stack"
    why: str = ""  # there is no stack
    plans: dict[tuple[int, bool], Plan] = field(default_factory=dict, init=False)
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
        return next((p.dtype for p in self.modules[0].parameters()), torch.float32)

    def run(self, batch: Batch, write: Write) -> None:
        """Give `write` the (m, b, C) logits of all members and frames, piece by piece.

        Where memory runs out, the tile is halved and the batch begun again.
        """
        key = _bucket(batch.count), batch.overlaps
        if key not in self.plans:
            chosen = self.plans[key] = self._plan(batch)
            self._runners.clear()  # let go of the weights and graphs of forms that were only tried
            failed = [trial.note for trial in chosen.trials if trial.note]
            if chosen.form.kind == "loop" and self.forced != "loop" and failed:
                _log.warning("%d members run one by one: %s", len(self.modules), failed[0])
        chosen = self.plans[key]
        while True:
            try:
                for piece in self.pieces(chosen.form, batch):
                    write(*piece)
                return
            except RuntimeError as error:
                memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
                if not memory or chosen.form.tile < 2:
                    raise
                self._runners.clear()
                half = replace(chosen.form, tile=chosen.form.tile // 2)
                chosen = self.plans[key] = Plan(half, f"{chosen.why}; memory ran out, tile halved", chosen.trials)

    def pieces(self, form: Form, batch: Batch) -> Iterator[forms.Piece]:
        """The logits of all members in one form; CUDA's float32 products use TF32 if that is its precision."""
        key, before = (form.kind, form.precision), torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = form.precision == "tf32"
        try:
            if key not in self._runners:
                self._runners[key] = self._runner(form)
            yield from self._runners[key](batch, form.tile)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def _runner(self, form: Form) -> forms.Runner:
        if form.kind == "loop" or self.stack is None:
            steps = [lambda x, tile, module=module: module(x).unsqueeze(0) for module in self.modules]
            return forms.windowed(steps, self.dtype)
        if form.kind == "stack" or self.dense is None:
            stack = self.stack
            return forms.windowed([lambda x, tile: stack(x)], self.dtype)
        dtype = forms.DTYPES[form.precision]
        if form.kind == "overlap":
            return forms.overlapped(self.dense, dtype, self.features, self.device)
        return forms.windowed([forms.FOLDED[form.kind](self.dense.to(dtype))], dtype)

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
        steps = (_bucket(batch.count), 4096) if cuda else (512, 256, 1024)
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
        precisions = ["float32"] + fast_types(self.device) * (self.precision == "auto")
        found = []
        for precision in reversed(precisions):
            for kind in [kind for kind in tiles if kind not in _AS_THEY_ARE]:
                some = tiles[kind] if precision == precisions[-1] else tiles[kind][:1]
                found += [(kind, tile, precision) for tile in some]
        found += [(kind, tile, "float32") for kind in tiles if kind in _AS_THEY_ARE for tile in tiles[kind]]
        most = _bucket(batch.count)
        return list(dict.fromkeys(Form(kind, min(tile, most), precision) for kind, tile, precision in found))

    def _plan(self, batch: Batch) -> Plan:
        """The likeliest form where there is little work, the form cached for this machine, or the fastest one tried."""
        wanted = self.candidates(batch)
        if len(wanted) == 1:
            return Plan(wanted[0], self.why or "the only form there is")
        probe = batch.head(plan.PROBED)
        alone = self.log_probabilities(Form("loop", plan.PROBED), probe)
        tolerance = 2e-2 if self.dtype.itemsize < 4 else 1e-5

        def compare(form: Form, values: Tensor) -> Agreement:
            count, exact = min(plan.PROBED, values.shape[1]), form.precision == "float32"
            return plan.agreement(alone[:, :count], values[:, :count], exact=exact, tolerance=tolerance)

        def run(form: Form, count: int) -> Tensor:
            return self.log_probabilities(form, batch.head(count))

        size = sum(parameter.numel() for module in self.modules for parameter in module.parameters())
        if size * batch.count < _WORTH:
            trials: list[Trial] = []
            for form in [form for form in wanted if form.precision == "float32" and form.kind in _SIMPLE]:
                trials.append(plan.attempt(form, run, probe.count, compare))
                if trials[-1].agreement.near:
                    return Plan(form, "too little work to measure", tuple(trials))
            return plan.choose(trials)
        asked = {"structure": str(self.modules[0]), "members": len(self.modules), "precision": self.precision}
        asked |= {"frames": _bucket(batch.count), "overlaps": batch.overlaps, "forced": self.forced}
        file = plan.file_of(**asked, device=str(self.device))
        known = plan.recall(file)
        if known in wanted and known is not None:
            near = compare(known, run(known, probe.count))
            if near.near:
                return Plan(known, "measured earlier on this machine", (Trial(known, float("inf"), near),))
        chosen = plan.choose(plan.try_all(wanted, run, frames=batch.count, compare=compare))
        plan.remember(file, chosen.form)
        return replace(chosen, why=f"{chosen.why}; {self.why}") if self.why else chosen


def _bucket(frames: int) -> int:
    """The next power of two: batches of similar size share a plan."""
    return 1 << max(frames - 1, 0).bit_length()


def fast_types(device: torch.device) -> list[str]:
    """Precisions in which this hardware multiplies faster than in float32."""
    if device.type == "cuda":
        return ["tf32", "bfloat16"] if torch.cuda.is_bf16_supported() else []
    able = torch.cpu.get_capabilities()
    limited = able.get("avx512_bf16") and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    has = able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16")
    return ["bfloat16"] if has and not limited else []  # ATEN_CPU_CAPABILITY=avx2 limits it
