"""Which form to take: which candidates agree with the loop, and which is the fastest.

Deciding is pure; timing is in `try_all` and `attempt`. Choices are cached, a file each, in the user's cache folder. A
file holds a form and never results, and a form from the cache is compared with the loop again before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble.run._engine.forms import Form
from ensemble.run.stack import drawn, first_line
from zoo import _files

PROBED = 256  # frames on which a form is compared with the loop: half from the whole batch, half from its beginning
_EXACT = 1e-5  # largest change of a probability in float32
_MOVED = 0.01  # largest change of a probability in a faster type
_MARGIN = 0.02  # lead of the best class from which on a frame's class may not change
_NEVER = float("inf")
_BUDGET = 1.2  # seconds for all forms of a group
_PROMISING = (3.0, 1.3, 1.2, 1.1, 1.1)  # times the best so far, round by round; the first round always takes place


@dataclass(frozen=True)
class Agreement:
    """How far a form's probabilities are from the loop's."""

    moved: float  # largest difference of a probability
    changed: float  # fraction of frames and members whose most probable class is another
    near: bool  # whether the form may replace the loop


@dataclass(frozen=True)
class Trial:
    """The result of trying a form."""

    form: Form
    seconds: float  # per frame; infinite where it was not timed, or does not agree
    agreement: Agreement
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """The form chosen for one size of batch, why, and what was tried."""

    form: Form
    why: str
    trials: tuple[Trial, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One row per trial, the fastest first, for a table; and one for the form chosen where it was not tried."""
        loop = next((t.seconds for t in self.trials if t.form.kind == "loop"), None)
        tried = {trial.form: trial for trial in sorted(self.trials, key=lambda trial: trial.seconds)}
        return [
            {
                "form": form.kind,
                "frames per step": form.tile,
                "precision": form.precision,
                "x loop": loop / trial.seconds if loop and trial and trial.seconds < _NEVER else None,
                "moved": trial and trial.agreement.moved,
                "changed": trial and trial.agreement.changed,
                "chosen": "yes" if form == self.form else "",
                "why": self.why if form == self.form or not trial else trial.note,
            }
            for form, trial in (tried if self.form in tried else {self.form: None} | tried).items()
        ]


@dataclass(frozen=True, eq=False)
class Sample:
    """Frames drawn from a batch, and what the loop gives for them."""

    where: Tensor  # (r,) positions, ascending
    alone: Tensor  # (M, r, C) log-probabilities
    tolerance: float  # largest change of a probability in float32

    def agreement(self, form: Form, values: Tensor) -> Agreement:
        """Of the loop with a form's log-probabilities for the first b frames of the batch, (M, b, C)."""
        seen = self.where[self.where < values.shape[1]]
        return self.agreement_drawn(form, values[:, seen.to(values.device)])

    def agreement_drawn(self, form: Form, values: Tensor) -> Agreement:
        """Of the loop with a form's log-probabilities for the first of the frames drawn, (M, <= r, C)."""
        alone, exact = self.alone[:, : values.shape[1]], form.precision == "float32"
        return agreement(alone, values, exact=exact, tolerance=self.tolerance)

    def copy(self, into: Tensor, members: slice, frames: slice, logits: Tensor) -> None:
        """From a piece of logits, the log-probabilities for the frames drawn, into (M, r, C)."""
        inside = ((self.where >= frames.start) & (self.where < frames.stop)).nonzero().flatten()
        rows = (self.where[inside] - frames.start).to(logits.device)
        into[members, inside.to(into.device)] = logits[:, rows].log_softmax(-1, dtype=torch.float32)


def spread(count: int) -> Tensor:
    """Positions of at most `PROBED` frames: half from the whole batch, half from its beginning, which all forms run."""
    whole, beginning = drawn(count, PROBED // 2), drawn(min(count, PROBED), PROBED // 2)
    return torch.tensor(sorted({*whole.tolist(), *beginning.tolist()}), dtype=torch.long)


Run = Callable[[Form, int], Tensor]  # on the first so many frames: (M, frames, C) log-probabilities
Compare = Callable[[Form, Tensor], Agreement]  # of a form's log-probabilities with the loop's


def agreement(alone: Tensor, together: Tensor, *, exact: bool, tolerance: float = _EXACT) -> Agreement:
    """Compare log-probabilities (M, B, C) of a form with those of the loop.

    Exact: no probability moves by more than `tolerance`. Otherwise: none moves by more than 0.01, and where
    the most probable class changes, its lead in the loop was below 0.02.

    Example:
        >>> p = torch.tensor([[[0.505, 0.495]]])
        >>> agreement(p.log(), p.flip(-1).log(), exact=False)
        Agreement(moved=0.009999990463256836, changed=1.0, near=True)
    """
    if not alone.numel():
        return Agreement(0.0, 0.0, near=True)
    p, q = alone.exp(), together.exp()
    moved = float((p - q).abs().amax().nan_to_num(_NEVER))
    changed = p.argmax(-1) != q.argmax(-1)
    best = p.topk(min(2, p.shape[-1]), dim=-1).values
    sure = changed & (best[..., 0] - best[..., -1] >= _MARGIN)
    near = moved <= tolerance if exact else moved <= _MOVED and not bool(sure.any())
    return Agreement(moved, float(changed.float().mean()), near)


def choose(trials: Sequence[Trial]) -> Plan:
    """The fastest form that agrees; a ValueError where none does, for even the loop may give NaN."""
    fitting = [trial for trial in trials if trial.agreement.near and trial.seconds < _NEVER]
    if not fitting:
        tried = ", ".join(f"{t.form.kind} {t.form.precision} moved {t.agreement.moved:.2g} {t.note}" for t in trials)
        msg = f"expected a way of running the members that agrees with the loop, got none: {tried}; use plan='loop'"
        raise ValueError(msg)
    best = min(fitting, key=lambda trial: trial.seconds)
    return Plan(best.form, f"fastest of {len(trials)} tried", tuple(trials))


def try_all(forms: Sequence[Form], run: Run, *, frames: int, compare: Compare) -> list[Trial]:
    """Try each form on as many frames as its tile has, until the time for it is used up.

    First every form once, to see whether it agrees, the first exact one and the loop even where the time is up; then
    the promising ones in turn, so that a busy moment of the machine affects all alike. The smallest time counts: noise
    and new memory only ever add to it.
    """
    trials: dict[Form, Trial] = {}
    end = time.perf_counter() + _BUDGET
    exact = next((form for form in forms if form.precision == "float32"), None)
    for form in forms:
        due = form == exact or form.kind == "loop" or all(t.seconds == _NEVER for t in trials.values())
        if due or time.perf_counter() < end:
            trials[form] = attempt(form, run, min(form.tile, frames), compare)
    near = [form for form, trial in trials.items() if trial.seconds < _NEVER]
    for within in _PROMISING:
        best = min((trials[form].seconds for form in near), default=_NEVER)
        for form in near:
            before = trials[form].seconds
            if before <= within * best and (time.perf_counter() < end or within == _PROMISING[0]):
                seconds = _seconds(run, form, min(form.tile, frames))
                trials[form] = replace(trials[form], seconds=min(seconds, before))
    return list(trials.values())


def attempt(form: Form, run: Run, frames: int, compare: Compare) -> Trial:
    """Run a form for its results, which also prepares its weights and memory, then again for its time."""
    try:
        near = compare(form, run(form, frames))
        if not near.near:
            return Trial(form, _NEVER, near, "does not agree with the loop")
        seconds = _seconds(run, form, frames)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # what vmap refuses
        return Trial(form, _NEVER, Agreement(_NEVER, 1.0, near=False), first_line(error))
    return Trial(form, seconds, near)


def _seconds(run: Run, form: Form, frames: int) -> float:
    """Seconds per frame of one run."""
    start = time.perf_counter()
    values = run(form, frames)
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    return (time.perf_counter() - start) / max(frames, 1)


def file_of(device: torch.device, **facts: object) -> Path | None:
    """Where the choice for these facts and this device is cached; None for a user without a home folder.

    CUDA devices of one name share it, others not.
    """
    machine = {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability() + platform.machine() + platform.node(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "device": device.type,
    }
    key = hashlib.sha256(json.dumps({**machine, **facts}, sort_keys=True, default=str).encode()).hexdigest()
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither $HOME nor an entry of the user says where it is
        return None
    return base / "zoo-ensemble" / "plans" / f"{key}.json"


def recall(file: Path | None) -> Form | None:
    """The form chosen earlier; None where there is none, or the file is not one of ours."""
    try:
        return None if file is None else Form(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remember(file: Path | None, form: Form) -> None:
    """Cache the form for next time; no folder, or one that cannot be written, is no reason to fail."""
    if file is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        _files.write(file, json.dumps(asdict(form)).encode())
