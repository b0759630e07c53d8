"""`Group`: equal members, and the plan by which they run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from ensemble.run._engine import forms, measuring
from ensemble.run._engine.batch import Batch
from ensemble.run._engine.dense import Affine, Dense, NotDenseError, dense
from ensemble.run._engine.overlap import hop, overlap
from ensemble.run._engine.plan import Agreement, Form, Plan, Trial, agreement, candidates, choose
from ensemble.run._engine.prepacked import Layouts, available
from ensemble.run.stack import Stack

_WORTH = 2e7  # multiplications below which a batch is over before a measurement pays
_FEW = 128  # frames below which blocks of them do not pay
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "tf32": torch.float32}

_log = logging.getLogger("ensemble")

Write = Callable[[slice, slice, Tensor], None]


class Group:
    """M members of one structure, run in the fastest form that agrees with the loop.

    Args:
        modules: makes the M modules, in evaluation mode on the device where they run; called when they are needed.
        stack: the same members stacked; None where they cannot be.
        members: M.
        size: parameters of all members.
        device: where they run.
        features: F per frame where the inputs are windows of frames, else 0.
        precision: "float32" or "auto".
        forced: "auto", "loop" or "stack".
        why: the reason where there is no stack.
    """

    def __init__(
        self,
        modules: Callable[[], Sequence[nn.Module]],
        stack: Stack | None,
        *,
        members: int,
        size: int,
        device: torch.device,
        features: int = 0,
        precision: str = "float32",
        forced: str = "auto",
        why: str = "",
    ) -> None:
        self._modules, self.stack, self.features = modules, stack, features
        self.members, self.size, self.device = members, size, device
        self.precision, self.forced, self.why = precision, forced, why
        self.plans: dict[tuple[int, bool], Plan] = {}
        self._replays: dict[str, dict[int, forms.Replay]] = {}
        self._prepared: dict[tuple[str, str], Layouts] = {}

    @cached_property
    def dense(self) -> Dense | None:
        """The members folded; None where they are of another form."""
        try:
            return None if self.stack is None else dense(self.stack)
        except NotDenseError as error:
            self.why = f"not folded: {error}"
            return None

    @cached_property
    def modules(self) -> list[nn.Module]:
        """The M modules, for the loop."""
        return list(self._modules())

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next((p.dtype for p in self.modules[0].parameters()), torch.float32)

    def __len__(self) -> int:
        """Number of members, M."""
        return self.members

    def run(self, batch: Batch, write: Write) -> None:
        """Give `write` the (m, b, C) logits of all members and frames, piece by piece.

        Where memory runs out the tile is halved and the batch begun again.
        """
        key = _bucket(batch.count), batch.overlaps
        if key not in self.plans:
            self.plans[key] = self._plan(batch)
            self._forget()
            self._tell(self.plans[key])
        plan = self.plans[key]
        while True:
            try:
                for piece in self.pieces(plan.form, batch):
                    write(*piece)
                return
            except RuntimeError as error:
                if not _out_of_memory(error) or plan.form.tile < 2:
                    raise
                form = plan.form
                self._replays.clear()
                half = replace(form, tile=form.tile // 2)
                plan = self.plans[key] = Plan(half, f"{plan.why}; memory ran out, tile halved", plan.trials)

    def pieces(self, form: Form, batch: Batch) -> Iterator[forms.Piece]:
        """The logits of all members in one form."""
        tile, dtype = form.tile, _DTYPES[form.precision]
        with forms.matmul_precision(form.precision):
            match form.kind:
                case "loop":
                    yield from forms.loop(self.modules, batch.typed(self.dtype), tile)
                case "stack" if self.stack is not None:
                    yield from forms.stacked(self.stack, batch.typed(self.dtype), tile)
                case "folded":
                    yield from forms.folded(self._ready(form).dense, batch, tile, dtype)
                case "prepacked":
                    yield from forms.prepacked(self._ready(form), batch, tile, dtype)
                case "replay":
                    known = self._replays.setdefault(form.precision, {})
                    yield from forms.replayed(self._ready(form).dense, batch, tile, dtype, known)
                case "overlap":
                    yield from forms.overlapped(self._ready(form), batch, tile)

    def log_probabilities(self, form: Form, batch: Batch) -> Tensor:
        """(M, B, C) float32 in one form, for comparing and timing it."""
        out: Tensor | None = None
        for members, frames, logits in self.pieces(form, batch):
            if out is None:
                out = logits.new_empty(len(self), batch.count, logits.shape[-1], dtype=torch.float32)
            out[members, frames] = logits.log_softmax(-1, dtype=torch.float32)
        assert out is not None
        return out

    def candidates(self, batch: Batch) -> list[Form]:
        """The forms that this group, this batch and the caller's wishes allow."""
        precisions = ["float32"] + _fast(self.device) * (self.precision == "auto")
        return candidates(tiles=self._tiles(batch), frames=_bucket(batch.count), precisions=precisions)

    def _tiles(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """Frames per step to try, by kind of form, the likeliest to win first."""
        cuda = self.device.type == "cuda"
        steps = (_bucket(batch.count), 4096) if cuda else (512, 256, 1024)
        if self.forced == "loop" or self.stack is None:
            return {"loop": steps[:1]}
        last = {"loop": steps[:1]} if self.forced != "stack" else {}
        if self.dense is None:
            return {"stack": steps, **last}
        found: dict[str, tuple[int, ...]] = {}
        if batch.overlaps and self.features and batch.count > _FEW:
            found["overlap"] = self._blocks(cuda)
        if available(self.device):
            found["prepacked"] = steps
        found["folded"] = steps[:1] if "prepacked" in found else steps  # should oneDNN refuse, or be slower
        if cuda:
            found["replay"] = steps
        return found | last

    def _blocks(self, cuda: bool) -> tuple[int, ...]:
        """Frames per step in whole blocks."""
        assert self.dense is not None
        step = hop(cast(Affine, self.dense.first).weight.shape[-1], self.features)
        return tuple(blocks * step for blocks in ((512, 64) if cuda else (16,)))

    def _plan(self, batch: Batch) -> Plan:
        wanted = self.candidates(batch)
        probe = batch.head(measuring.PROBED)
        alone = self.log_probabilities(Form("loop", measuring.PROBED), probe)

        def compare(form: Form, values: Tensor) -> Agreement:
            exact = form.precision == "float32"
            count = min(measuring.PROBED, values.shape[1])
            tolerance = 2e-2 if self.dtype.itemsize < 4 else 1e-5
            return agreement(alone[:, :count], values[:, :count], exact=exact, tolerance=tolerance)

        def run(form: Form, count: int) -> Tensor:
            return self.log_probabilities(form, batch.head(count))

        if len(wanted) == 1:
            return Plan(wanted[0], self.why or "the only form there is")
        if self.size * batch.count < _WORTH:
            return self._first_fit(wanted, run, compare, probe.count)
        key = self._question(batch)
        known = measuring.recall(key)
        if known in wanted and known is not None:
            near = compare(known, run(known, probe.count))
            if near.near:
                return Plan(known, "measured earlier on this machine", (Trial(known, float("inf"), near),))
        plan = choose(measuring.try_all(wanted, run, frames=batch.count, compare=compare))
        measuring.remember(key, plan.form)
        return replace(plan, why=f"{plan.why}; {self.why}") if self.why else plan

    def _first_fit(
        self, wanted: Sequence[Form], run: measuring.Run, compare: Callable[[Form, Tensor], Agreement], count: int
    ) -> Plan:
        """Small work: the likeliest exact form that agrees, untimed."""
        trials = []
        for form in [f for f in wanted if f.precision == "float32" and f.kind not in ("overlap", "replay")]:
            trials.append(measuring.attempt(form, run, count, compare))
            if trials[-1].agreement.near:
                return Plan(form, "too little work to measure", tuple(trials))
        return choose(trials)

    def _question(self, batch: Batch) -> str:
        return measuring.question(
            structure=str(self.modules[0]),
            members=len(self),
            frames=_bucket(batch.count),
            overlaps=batch.overlaps,
            precision=self.precision,
            forced=self.forced,
            device=str(self.device),
        )

    def _ready(self, form: Form) -> Layouts:
        """The folded weights that a form needs, made once."""
        key = form.weights
        if key not in self._prepared:
            assert self.dense is not None
            dtype = _DTYPES[form.precision]
            ready = self.dense.to(dtype)
            if form.kind == "overlap":
                ready = replace(ready, first=overlap(cast(Affine, self.dense.first), self.features, dtype))
            self._prepared[key] = Layouts(ready, able=available(self.device))
        return self._prepared[key]

    def _tell(self, plan: Plan) -> None:
        """One line where a stack was wanted and a loop is what runs."""
        failed = [trial.note for trial in plan.trials if trial.note]
        if plan.form.kind == "loop" and self.forced != "loop" and failed:
            _log.warning("%d members run one by one: %s", len(self), failed[0])

    def _forget(self) -> None:
        """Let go of the weights and graphs of forms that no plan takes."""
        self._replays.clear()
        taken = {plan.form.weights for plan in self.plans.values()}
        self._prepared = {key: ready for key, ready in self._prepared.items() if key in taken}
        for ready in self._prepared.values():
            ready.clear()


def _bucket(frames: int) -> int:
    """The next power of two: batches of like size share a plan."""
    return 1 << max(frames - 1, 0).bit_length()


def _fast(device: torch.device) -> list[str]:
    """Types in which this hardware multiplies faster than in float32."""
    if device.type == "cuda":
        return ["tf32", "bfloat16"] if torch.cuda.is_bf16_supported() else []
    able = torch.cpu.get_capabilities()
    return ["bfloat16"] if able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16") else []


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
