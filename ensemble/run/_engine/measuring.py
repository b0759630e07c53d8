"""Timing forms on a real batch, and remembering on this machine what was found.

The cache is a file per question in the user's cache folder; it holds a form and why it was taken, never
results, and what it says is compared with the loop anew before it is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

from ensemble.run._engine.plan import Agreement, Form, Trial

PROBED = 256  # frames on which a form is compared with the loop
_BUDGET = 1.2  # seconds for all forms of a group
_PROMISING = (3.0, 1.3, 1.2, 1.1, 1.1)  # times the best so far, round by round; the first takes place always

Run = Callable[[Form, int], Tensor]
"""Runs a form on the first so many frames: (M, frames, C) log-probabilities."""


def try_all(
    forms: Sequence[Form], run: Run, *, frames: int, compare: Callable[[Form, Tensor], Agreement]
) -> list[Trial]:
    """Try each form on as many frames as its tile has, until the time for it is used up.

    First every form once, which tells whether it agrees; then the promising ones in turn, so that a busy
    moment strikes all alike. The least time counts: noise only ever adds, and so does memory that is new.
    """
    trials: dict[Form, Trial] = {}
    end = time.perf_counter() + _BUDGET
    for form in forms:
        if time.perf_counter() < end or form.kind == "loop" or not _timed(trials):
            trials[form] = attempt(form, run, min(form.tile, frames), compare)
    for within in _PROMISING:
        best = min((trial.seconds for trial in _timed(trials)), default=0.0)
        for trial in _timed(trials):
            if trial.seconds <= within * best and (time.perf_counter() < end or within == _PROMISING[0]):
                seconds = _seconds(run, trial.form, min(trial.form.tile, frames))
                trials[trial.form] = replace(trial, seconds=min(seconds, trial.seconds))
    return list(trials.values())


def _timed(trials: Mapping[Form, Trial]) -> list[Trial]:
    return [trial for trial in trials.values() if trial.agreement.near]


def attempt(form: Form, run: Run, frames: int, compare: Callable[[Form, Tensor], Agreement]) -> Trial:
    """Run a form for its answer, which also prepares its weights and memory, then again for its time."""
    try:
        near = compare(form, run(form, frames))
        if not near.near:
            return Trial(form, float("inf"), near, "does not agree with the loop")
        seconds = _seconds(run, form, frames)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # what vmap refuses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Trial(form, float("inf"), Agreement(float("inf"), 1.0, near=False), reason)
    return Trial(form, seconds, near)


def _seconds(run: Run, form: Form, frames: int) -> float:
    """Seconds per frame of one run."""
    start = time.perf_counter()
    values = run(form, frames)
    if values.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / max(frames, 1)


def question(**facts: object) -> str:
    """One key for a machine and what is asked of it."""
    machine = {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability() + platform.machine() + platform.node(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }
    return hashlib.sha256(json.dumps({**machine, **facts}, sort_keys=True, default=str).encode()).hexdigest()


def recall(key: str) -> Form | None:
    """The form found earlier; None where there is none, or the file is not one of ours."""
    try:
        return Form(**json.loads(_path(key).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remember(key: str, form: Form) -> None:
    """Keep the form for next time; a folder that cannot be written is no reason to fail."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(asdict(form), file)
        os.replace(file.name, path)  # noqa: PTH105  # the same, and shorter
    except OSError:
        return


def _path(key: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zoo-ensemble" / "plans" / f"{key}.json"
