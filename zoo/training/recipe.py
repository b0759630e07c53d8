"""The fields of a recipe, what they mean, their bounds, and their form in JSON and TOML.

The command line takes its flags from here, so nothing at the top of this module imports torch.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Self

from zoo import _files
from zoo._names import unknown
from zoo.training.schedules import SCHEDULES

PRECISIONS = ("float32", "bfloat16", "float16")
MONITORS = ("valid/accuracy", "valid/loss")

_BOUNDS: dict[tuple[float, float], str] = {
    (0, 2**31 - 1): "seed order_seed",
    (0, 1): "momentum beta1 beta2 epsilon gamma final_rate peak label_smoothing hard_weight ema",
    (0, math.inf): "l1 l2 weight_decay clip_norm clip_value",
    (0, 10): "rho mix_up",
    (0.1, 100): "temperature",
    (0, 10_000): "mask_time mask_features",
    (0, 100_000): "switch_epoch warmup restart patience swa_from keep",
    (0, 1_000_000): "learning_rate",
    (1, 100): "restart_factor",
    (1, 10_000): "accumulate",
    (1, 100_000): "epochs every",
    (2, 10_000_000): "batch_size",
}
# fields that nothing reads but an optimiser, or a schedule, that takes them
_CHOSEN = {
    "optimiser": ["momentum", "beta1", "beta2", "epsilon", "rho", "switch_epoch", "weight_decay"],
    "schedule": ["gamma", "every", "milestones", "final_rate", "restart", "restart_factor", "peak"],
}
_FIRST = {"swa_from": 0, "switch_epoch": 1, "every": 1, "milestones": 1}  # n acts first in epoch n + this
_WITHIN = ("warmup", "restart")  # epochs that must be over by the end of the run


@dataclass(frozen=True)
class Recipe:
    """Everything that steers training, except the model (a `Spec`) and the frames.

    Zero switches off warm-up, penalties, clipping, masks, mix-up, patience and averages; elsewhere the field says its
    meaning. A field that differs from its default must be able to act: the optimiser or the schedule takes it, it comes
    into effect before the last epoch is over, and there is a teacher where it needs one. `patience` is a limit, which
    need not be reached.

    Args:
        epochs: passes over the training frames.
        batch_size: frames in a batch.
        accumulate: batches whose gradients are averaged for one step of the optimiser.
        fraction: share of the training frames to use, drawn once by `order_seed`; for quick trials.
        seed: seed of the initialisation and of dropout.
        order_seed: seed of the order of the frames and of the masks; the same as `seed` if left out.
        optimiser: sgd, momentum, nesterov, sam, adagrad, adadelta, rmsprop, adam, adamw, adam_sgd, or one of your own.
        learning_rate: the highest rate; the schedule and the warm-up multiply it.
        momentum: momentum of the optimisers "momentum", "nesterov" and "sam".
        beta1: decay of the mean of gradients, in Adam's family.
        beta2: decay of the mean of squares, in Adam's family, "rmsprop" (its alpha) and "adadelta" (its rho).
        epsilon: added to denominators.
        rho: radius of the neighbourhood of "sam".
        switch_epoch: epochs of Adam before "adam_sgd" continues with SGD; 0 leaves the moment to its criterion.
        schedule: constant, plateau, time, step, multi_step, exponential, linear, cosine, one_cycle, or one of your own.
        warmup: epochs (or parts of one) over which the rate rises linearly from almost 0, times the schedule.
        gamma: factor of "step", "multi_step", "exponential" and "plateau"; rate of decay of "time".
        every: epochs between the steps of "step"; epochs without gain after which "plateau" acts.
        milestones: epochs after which "multi_step" acts, rising.
        final_rate: share of the learning rate at which "linear", "cosine" and "one_cycle" end, and below which
            "plateau" does not go.
        restart: epochs in the first period of "cosine"; 0 for one period over all epochs.
        restart_factor: each period of "cosine" is this many times as long as the one before.
        peak: share of all steps after which "one_cycle" is at its highest.
        l1: adds to the loss this times the sum of abs(w) over the weight matrices.
        l2: adds to the loss this times half the sum of w squared over the weight matrices.
        weight_decay: the optimiser's decay of all parameters: decoupled in "adamw", else added to the gradient.
        label_smoothing: share of the target that is spread evenly over the classes; of the hard labels only.
        temperature: with a teacher, its probabilities and the student's are taken to the power of 1 / this.
        hard_weight: with a teacher, share of the labels' loss in the loss; that of the teacher's has the rest.
        clip_norm: largest norm of a member's whole gradient.
        clip_value: largest magnitude of a gradient's entries.
        mask_time: longest run of blanked frames in a window.
        mask_features: longest run of blanked features in a window.
        mix_up: each window is mixed with another of its batch, and the loss likewise, in shares from Beta(this, this).
        precision: "float32", or autocast to "bfloat16" or "float16" (with scaled gradients).
        monitor: the metric by which the best epoch is chosen: "valid/accuracy" or "valid/loss".
        patience: epochs without a better `monitor` after which training stops.
        ema: decay per step of an exponential moving average of the weights, which is then what is evaluated.
        swa_from: epoch from whose end on the plain mean of the epochs' weights is what is evaluated.
        keep: number of epoch checkpoints to keep in the directory, the newest ones; 0 keeps all.

    Raises:
        ValueError: an unknown name (the message names the nearest), a number outside its bounds, a contradiction, a
            field that can never act.
        TypeError: a field of the wrong type.

    Example:
        >>> Recipe(epochs=3, schedule="cosine").to_dict()["schedule"]
        'cosine'
    """

    epochs: int = 10
    batch_size: int = 1024
    accumulate: int = 1
    fraction: float = 1.0
    seed: int = 0
    order_seed: int | None = None
    optimiser: str = "adamw"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    rho: float = 0.05
    switch_epoch: int = 0
    schedule: str = "constant"
    warmup: float = 0.0
    gamma: float = 0.1
    every: int = 3
    milestones: tuple[int, ...] = ()
    final_rate: float = 0.0
    restart: int = 0
    restart_factor: int = 1
    peak: float = 0.3
    l1: float = 0.0
    l2: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    temperature: float = 1.0
    hard_weight: float = 0.0
    clip_norm: float = 0.0
    clip_value: float = 0.0
    mask_time: int = 0
    mask_features: int = 0
    mix_up: float = 0.0
    precision: str = "float32"
    monitor: str = "valid/accuracy"
    patience: int = 0
    ema: float = 0.0
    swa_from: int = 0
    keep: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), field.default))
        for (low, high), limited in _BOUNDS.items():
            for name in limited.split():
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    msg = f"expected {name} from {low:g} to {high:g}, got {value}"
                    raise ValueError(msg)
        from zoo.training.optimisers import OPTIMISERS  # needs torch

        names = {"optimiser": [*OPTIMISERS], "schedule": [*SCHEDULES], "precision": PRECISIONS, "monitor": MONITORS}
        for what, known in names.items():
            if getattr(self, what) not in known:
                raise ValueError(unknown(what, getattr(self, what), known))
        if not 0 < self.fraction <= 1:
            msg = f"expected a fraction above 0 and at most 1, got {self.fraction}"
            raise ValueError(msg)
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            msg = f"expected rising milestones from epoch 1 on, got {list(self.milestones)}"
            raise ValueError(msg)
        if self.ema and self.swa_from:
            msg = f"expected one average of weights, got ema={self.ema} and swa_from={self.swa_from}; set one to 0"
            raise ValueError(msg)
        for reason in _idle(vars(self)).values():
            raise ValueError(reason)
        for name in _WITHIN:
            if getattr(self, name) > self.epochs:
                msg = f"expected {name} to end within the {self.epochs} epochs of training, got {getattr(self, name)}"
                raise ValueError(msg)
        if OPTIMISERS[self.optimiser].gradients > 1 and self.precision == "float16":
            msg = f"{self.optimiser} takes several gradients a step: float16's scaling fails; use bfloat16 or float32"
            raise ValueError(msg)

    @property
    def data_seed(self) -> int:
        """The seed of the order of the frames: `order_seed`, or `seed` where that is None."""
        return self.seed if self.order_seed is None else self.order_seed

    def arguments(self, function: Callable[..., Any], **further: Any) -> dict[str, Any]:
        """The fields that a function takes as keyword-only arguments, and those of `further` that it takes.

        Raises:
            TypeError: it takes something else; the message names it.
        """
        available, names = vars(self) | further, keywords(function)
        for name in names:
            if name not in available:
                msg = f"{function.__name__} takes {name}, which is no field of a recipe"
                raise TypeError(msg)
        return {name: available[name] for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, every field."""
        return vars(self) | {"milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The recipe with these fields; those left out take their defaults.

        Raises:
            ValueError: an unknown field (the message names the nearest), or as in the class.
        """
        names = [field.name for field in fields(cls)]
        for name in data:
            if name not in names:
                raise ValueError(unknown("field of a recipe", name, names))
        return cls(**data)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The recipe in a `.json` or `.toml` file.

        Raises:
            ValueError: another suffix, a text not of that format, or as in `from_dict`; the message names the file.
        """
        path = Path(path)
        try:
            data = {".json": json.loads, ".toml": tomllib.loads}[_format(path)](path.read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                msg = f"expected a table of fields, got {type(data).__name__}"
                raise ValueError(msg)
            return cls.from_dict(data)
        except (ValueError, TypeError) as error:
            msg = f"{path}: {error}"
            raise ValueError(msg) from error

    def write(self, path: str | Path) -> None:
        """Write a `.json` or `.toml` file that `read` understands; any other suffix raises ValueError."""
        data = self.to_dict()
        lines = [f"{name} = {json.dumps(value)}" for name, value in data.items() if value is not None]
        text = json.dumps(data, indent=1) if _format(Path(path)) == ".json" else "\n".join(lines)
        _files.write(Path(path), f"{text}\n".encode())


def acting(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recorded recipe, without settings that could never act, which were once accepted.

    They take their defaults, milestones beyond the end are left out, and a schedule that would act only beyond the
    end becomes "constant": training is the same, to the bit.
    """
    values = dict(data)
    while idle := _idle(_DEFAULTS | values):
        name, early = next(iter(idle)), [m for m in values.get("milestones", ()) if m < values["epochs"]]
        if name == "every" and name in keywords(SCHEDULES[values["schedule"]].function):
            values["schedule"] = "constant"
        else:
            partly = len(early) < len(values.get("milestones", ()))
            values[name] = _DEFAULTS[name] if name != "milestones" else early if partly else []
    return values


def _idle(values: Mapping[str, Any]) -> dict[str, str]:
    """Why fields that differ from their defaults can never act, by their names."""
    from zoo.training.optimisers import OPTIMISERS  # needs torch

    if values["optimiser"] not in OPTIMISERS or values["schedule"] not in SCHEDULES:
        return {}  # of one's own, and not imported
    kind, schedule, epochs = OPTIMISERS[values["optimiser"]], SCHEDULES[values["schedule"]], values["epochs"]
    taken = {*keywords(kind.make), *keywords(schedule.function), *(["rho"] if kind.gradients > 1 else [])}
    given = {name: value for name, value in values.items() if value not in (_DEFAULTS[name], [])}
    found = {}
    for what, names in _CHOSEN.items():
        for name in names:
            if name in given and name not in taken:
                way_out = "use l2, which is part of the loss" if name == "weight_decay" else "leave it out"
                found[name] = f"{values[what]} takes no {name}, got {given[name]}; {way_out}"
    if "restart_factor" in given and not values["restart"]:
        found.setdefault("restart_factor", f"restart_factor={given['restart_factor']} needs restart, got none")
    for name, after in _FIRST.items():
        if name in given:
            first = after + (max(given[name]) if name == "milestones" else given[name])
            if first > epochs:
                late = f"{name}={given[name]} would act in epoch {first}, but training ends with epoch {epochs}"
                found.setdefault(name, late)
    return found


def _format(path: Path) -> str:
    """The suffix of a file, which says its format."""
    if path.suffix not in (".json", ".toml"):
        msg = f"expected a recipe in a file ending in .json or .toml, got {path.name}"
        raise ValueError(msg)
    return path.suffix


_DEFAULTS = {field.name: field.default for field in fields(Recipe)}


@cache
def keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a function's keyword-only arguments."""
    return tuple(p.name for p in signature(function).parameters.values() if p.kind is Parameter.KEYWORD_ONLY)


def _typed(name: str, value: Any, default: Any) -> Any:
    """The value as the type of its default: whole numbers may stand for floats, lists for tuples."""
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        value, fits = tuple(value), all(type(item) is int for item in value)
    else:
        fits = type(value) is type(default) or (default is None and type(value) is int)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        msg = f"expected {name} of the type of its default {default!r}, got {value!r}"
        raise TypeError(msg)
    return value
