"""Which ways of running a group there are, which of them agree with the loop, and which to take.

All of it decides on numbers; `measuring` gets them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_PLAIN = ("stack", "loop")  # kinds that run the models as they are
_EXACT = 1e-5  # furthest that a probability may move in float32
_MOVED = 0.01  # furthest that it may move in a faster type
_MARGIN = 0.02  # lead of the best class above which its frame may not change sides


@dataclass(frozen=True)
class Form:
    """One way of running M members.

    Args:
        kind: "loop": the modules as they are, one by one. "stack": all at once by vmap. "folded": by
            `Dense`. "prepacked": the same with layers laid out by oneDNN. "replay": the same by CUDA graphs.
            "overlap": with the first layer in the frequency domain.
        tile: frames per step.
        precision: "float32", "bfloat16" or "tf32".
    """

    kind: str
    tile: int
    precision: str = "float32"

    @property
    def weights(self) -> tuple[str, str]:
        """What decides the prepared weights; forms that differ in the tile share them."""
        return "folded" if self.kind == "replay" else self.kind, self.precision


@dataclass(frozen=True)
class Agreement:
    """How far a form's probabilities are from the loop's, and whether that is near enough.

    Args:
        moved: largest difference of a probability.
        changed: fraction of frames and members whose likeliest class is another.
        near: whether the form may stand for the loop.
    """

    moved: float
    changed: float
    near: bool


@dataclass(frozen=True)
class Trial:
    """What came of trying a form: seconds per frame (infinite where it was not timed) and agreement."""

    form: Form
    seconds: float
    agreement: Agreement
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """The form taken for one size of batch, why, and what was tried."""

    form: Form
    why: str
    trials: tuple[Trial, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One row per trial, the fastest first, for a table."""
        loop = next((t.seconds for t in self.trials if t.form.kind == "loop"), None)
        return [
            {
                "form": trial.form.kind,
                "frames per step": trial.form.tile,
                "precision": trial.form.precision,
                "x loop": loop / trial.seconds if loop and trial.seconds < float("inf") else None,
                "moved": trial.agreement.moved,
                "changed": trial.agreement.changed,
                "chosen": "yes" if trial.form == self.form else "",
                "why": self.why if trial.form == self.form else trial.note,
            }
            for trial in sorted(self.trials, key=lambda trial: trial.seconds)
        ]


def candidates(*, tiles: Mapping[str, Sequence[int]], frames: int, precisions: Sequence[str]) -> list[Form]:
    """The forms worth trying, the likeliest to win first, faster types before exact ones.

    Args:
        tiles: frames per step to try for each kind that the group and the batch allow; all of them in the
            fastest type, else the first.
        frames: in the batch.
        precisions: those that are wanted and that the hardware has; "stack" and "loop" run in the models' own.
    """
    forms = []
    for precision in reversed(precisions):
        for kind in [kind for kind in tiles if kind not in _PLAIN]:
            some = tiles[kind] if precision == precisions[-1] else tiles[kind][:1]
            forms += [Form(kind, min(tile, frames), precision) for tile in some]
    forms += [Form(kind, min(tile, frames)) for kind in tiles if kind in _PLAIN for tile in tiles[kind]]
    return list(dict.fromkeys(forms))


def agreement(alone: Tensor, together: Tensor, *, exact: bool, tolerance: float = _EXACT) -> Agreement:
    """Compare log-probabilities (M, B, C) of a form with those of the loop.

    Exact: no probability moves by more than `tolerance`. Otherwise none by more than 0.01, and where
    the likeliest class changes the loop's lead was below 0.02.

    Example:
        >>> import torch
        >>> p = torch.tensor([[[0.505, 0.495]]])
        >>> agreement(p.log(), p.flip(-1).log(), exact=False)
        Agreement(moved=0.009999990463256836, changed=1.0, near=True)
    """
    if not alone.numel():
        return Agreement(0.0, 0.0, near=True)
    p, q = alone.exp(), together.exp()
    moved = float((p - q).abs().amax().nan_to_num(float("inf")))
    changed = p.argmax(-1) != q.argmax(-1)
    best = p.topk(min(2, p.shape[-1]), dim=-1).values
    sure = changed & (best[..., 0] - best[..., -1] >= _MARGIN)
    near = moved <= tolerance if exact else moved <= _MOVED and not bool(sure.any())
    return Agreement(moved, float(changed.float().mean()), near)


def choose(trials: Sequence[Trial]) -> Plan:
    """The fastest form that agrees; the loop agrees with itself.

    Raises:
        ValueError: none agrees.
    """
    fitting = [trial for trial in trials if trial.agreement.near and trial.seconds < float("inf")]
    if not fitting:
        tried = ", ".join(f"{t.form.kind} {t.form.precision} moved {t.agreement.moved:.2g} {t.note}" for t in trials)
        msg = f"expected a way of running the members that agrees with the loop, got none: {tried}; use plan='loop'"
        raise ValueError(msg)
    best = min(fitting, key=lambda trial: trial.seconds)
    return Plan(best.form, f"fastest of {len(trials)} tried", tuple(trials))
