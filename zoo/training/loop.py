"""The loop: epochs of steps, each epoch judged, remembered and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.checkpoint import Checkpoint
from zoo.data.frames import FrameSet
from zoo.logs import JsonLines, Log, Progress, Several, silent
from zoo.models.spec import build
from zoo.training.batchnorm import reestimate
from zoo.training.descent import rows
from zoo.training.group import Feed, Group, TrainingError, check_frames, epoch_seed
from zoo.training.recipe import Recipe
from zoo.training.schedules import Position, schedule_factor
from zoo.training.scores import Judge
from zoo.training.state import Journal
from zoo.training.step import Stepper

Record = Mapping[str, Any]
_LOOK_EVERY = 16  # steps between looks at the loss, each of which waits for the device
_STATISTICS = 65_536  # frames from which BatchNorm's statistics of averaged weights are estimated


def train_group(
    group: Group,
    recipe: Recipe,
    train: FrameSet,
    valid: FrameSet,
    *,
    on_epoch: Callable[[list[Record]], object] | None = None,
    directory: str | Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
) -> list[Checkpoint]:
    """Train all members of a group at once; return each as it was after its best epoch.

    A member that has stopped early, or whose loss is no longer finite, keeps its best epoch and is not
    changed further; training ends when none goes on. Arguments are those of `zoo.train`, but `on_epoch` gets one
    record a member.

    Raises:
        TrainingError: a member's loss is not finite before its first whole epoch, or all have diverged.
    """
    check_frames(group.spec, recipe, train, valid)
    cuda = [train.features.device] if train.features.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        run = _Run(group, recipe, train, valid, progress or silent)
        return run.to_end(on_epoch, None if directory is None else Path(directory), log)


def seconds_per_step(group: Group, recipe: Recipe, train: FrameSet, *, patience: float = 0.5) -> float:
    """The least time that a step of this group took, over about `patience` seconds; the group is trained by it."""
    enough = torch.arange(int((train.starts[:-1] < 4 * recipe.batch_size * recipe.accumulate).sum()))
    feed = Feed(train.select(enough), group.spec, recipe, group.order_seeds or (recipe.data_seed,))
    stepper = Stepper(group, recipe, train.features.device.type)
    rates = torch.full((group.members,), recipe.learning_rate, dtype=torch.float64)
    group.module.train()
    with torch.random.fork_rng(devices=[]):
        took: list[float] = []
        coming = (batches for epoch in count(1) for batches in feed.epoch(epoch))
        while len(took) < 5 or sum(took) < patience:
            begin = time.perf_counter()
            stepper.step(next(coming), rates).cpu()
            took.append(time.perf_counter() - begin)
    return min(took[1:])


class _Run:
    """The state of a run: the module, its averages and best, the optimiser, and M-vectors of progress."""

    def __init__(self, group: Group, recipe: Recipe, train: FrameSet, valid: FrameSet, progress: Progress) -> None:
        M, self.progress = group.members, progress
        self.group, self.recipe, self.train, self.valid = group, recipe, train, valid
        self.feed = Feed(train, group.spec, recipe, group.order_seeds or (recipe.data_seed,))
        self.judge = Judge(valid, group.spec)
        self.stepper = Stepper(group, recipe, train.features.device.type)
        self.shapes = {name: t.shape for name, t in build(group.spec, device="meta").state_dict().items()}
        self.rates = torch.tensor(group.learning_rates or [recipe.learning_rate] * M, dtype=torch.float64)
        self.live = group.module.state_dict()  # shares memory with the module
        self.average = _copies(self.live) if recipe.ema or recipe.swa_from else {}
        self.averaged = 0  # steps or epochs that are in the average
        self.best = _copies(self.live)
        self.vectors = {
            "best": torch.full((M,), -torch.inf, dtype=torch.float64),
            "best_epoch": torch.zeros(M, dtype=torch.float64),
            "accuracy": torch.zeros(M, dtype=torch.float64),
            "loss": torch.zeros(M, dtype=torch.float64),
            "waited": torch.zeros(M, dtype=torch.float64),  # epochs without gain, for patience
            "patience": torch.zeros(M, dtype=torch.float64),  # epochs without gain, for plateau
            "factor": torch.ones(M, dtype=torch.float64),  # plateau's
            "stopped": torch.zeros(M, dtype=torch.float64),
        }
        self.history: list[list[Record]] = []

    # ---- the whole run

    def to_end(
        self, on_epoch: Callable[[list[Record]], object] | None, directory: Path | None, log: Log | None
    ) -> list[Checkpoint]:
        """All epochs that are still to be done, then each member's best."""
        journal = None if directory is None else Journal(directory, self.identity(), self.recipe.keep)
        found = None if journal is None else journal.read()
        if found is not None:
            self.restore(*found)
        logs = Several(*([] if log is None else [log]), *_file_in(directory, log))
        name = self.group.spec.architecture if directory is None else directory.name
        try:
            logs.init(name, {"recipe": self.recipe.to_dict(), "spec": self.group.spec.to_dict()})
            for number, records in enumerate(self.history, start=1):
                logs.log(_flat(records), number)
            for number in range(len(self.history) + 1, self.recipe.epochs + 1):
                if self.vectors["stopped"].all():
                    break
                records = self.epoch(number, journal)
                logs.log(_flat(records), number)
                if on_epoch is not None:
                    on_epoch(records)
        finally:
            logs.finish()
        return [self.checkpoint(m) for m in range(self.group.members)]

    def epoch(self, number: int, journal: Journal | None) -> list[Record]:
        """Train, judge, remember and write one epoch; one record a member."""
        begin = time.perf_counter()
        self.group.reseed([epoch_seed(seed, number, "dropout") for seed in self.group.seeds])
        self.stepper.begin(number)
        accuracy, loss, rate = self.learn(number)
        seconds = time.perf_counter() - begin
        if self.recipe.swa_from and number >= self.recipe.swa_from:
            self.take_into_mean()
        with self.judged():
            self.group.module.eval()
            valid_accuracy, valid_loss = self.judge(self.group.forward, self.group.members)
            self.remember(number, valid_accuracy, valid_loss)
            records: list[Record] = [
                {
                    "epoch": number,
                    "train/loss": _number(loss[m]),
                    "train/accuracy": _number(accuracy[m]),
                    "valid/loss": _number(valid_loss[m]),
                    "valid/accuracy": _number(valid_accuracy[m]),
                    "learning_rate": float(rate[m]),
                    "frames_per_second": round(self.feed.count / seconds),
                    "seconds": round(seconds, 3),
                }
                for m in range(self.group.members)
            ]
            self.history.append(records)
            checkpoints = {} if journal is None else self.present(valid_accuracy, valid_loss)
        if journal is not None:
            journal.write(number, checkpoints, *self.state())
        return records

    # ---- one epoch

    def learn(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over the training frames: accuracy, loss and last learning rate, (M,) each."""
        M, at = self.group.members, (number - 1) * self.feed.steps
        self.group.module.train()
        sums, seen = torch.zeros(2, M, dtype=torch.float64, device=self.train.features.device), 0
        unseen, begin = 0, time.perf_counter()
        with self.progress(f"epoch {number}/{self.recipe.epochs}", total=self.feed.count) as advance:
            for index, batches in enumerate(self.feed.epoch(number)):
                factor = schedule_factor(Position(at + index, self.feed.steps, self.recipe.epochs), self.recipe)
                rates = self.rates * self.vectors["factor"] * factor * (1 - self.vectors["stopped"])
                sums += self.stepper.step(batches, rates)
                if self.recipe.ema:
                    self.follow()
                frames = sum(y.shape[-1] for _, y in batches)
                seen += frames
                unseen += frames
                if index % _LOOK_EVERY == _LOOK_EVERY - 1 or index == self.feed.steps - 1:
                    self.refuse_divergence(number, sums[1].cpu())
                    accuracy, loss = (sums.nanmean(1) / seen).tolist()
                    speed = seen / (time.perf_counter() - begin)
                    figures = f"loss {loss:.3f} accuracy {accuracy:.3f} rate {float(rates.max()):.1e}"
                    advance(unseen, note=f"{figures} {speed:,.0f} frames/s")
                    unseen = 0
        self.refuse_divergence(number, self.largest())
        accuracies, means = (sums / seen).cpu()
        return accuracies, means, rates

    def largest(self) -> Tensor:
        """(M,) largest magnitude of each member's weights and statistics, to see whether they are finite."""
        floating = [t for t in self.live.values() if t.is_floating_point()]
        return torch.stack([rows(t, self.group.members).abs().amax(dim=1) for t in floating]).sum(dim=0).cpu()

    def refuse_divergence(self, number: int, figures: Tensor) -> None:
        """Stop the members whose loss or weights are not finite; raise where one has no epoch yet, or none goes on."""
        diverged = ~figures.isfinite()
        self.vectors["stopped"][diverged] = 1
        if not diverged.any() or (self.vectors["best_epoch"][diverged].all() and not diverged.all()):
            return
        best = [self.checkpoint(m) if self.vectors["best_epoch"][m] else None for m in range(self.group.members)]
        seeds = ", ".join(str(seed) for seed, bad in zip(self.group.seeds, diverged.tolist(), strict=True) if bad)
        kept = f"the best before is epoch {int(self.vectors['best_epoch'][diverged][0])}" if best[0] else "none is kept"
        msg = (
            f"the loss or a weight is no longer finite in epoch {number} (seed {seeds}); {kept}; "
            f"lower the learning rate ({self.recipe.learning_rate:g}) or clip the gradient"
        )
        raise TrainingError(msg, best)

    # ---- averages

    @torch.no_grad()
    def follow(self) -> None:
        """Move the exponential average, BatchNorm's statistics included; its decay rises from 2/11 at first."""
        self.averaged += 1
        share = 1 - min(self.recipe.ema, (1 + self.averaged) / (10 + self.averaged))
        self.mix(share)

    @torch.no_grad()
    def take_into_mean(self) -> None:
        """The plain mean of the weights at the ends of the epochs."""
        self.averaged += 1
        self.mix(1 / self.averaged)

    def mix(self, share: float) -> None:
        """Move the average towards the present weights; what is not floating is copied."""
        for name, tensor in self.live.items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, share)
            else:
                self.average[name].copy_(tensor)

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Let the module have, for the length of the block, the weights that are judged and kept."""
        if not self.averaged:
            yield
            return
        kept = _copies(self.live)
        _fill(self.live, self.average)
        if self.recipe.swa_from:
            reestimate(self.group.module, self.feed.plain(_STATISTICS))
        yield
        _fill(self.live, kept)

    # ---- what is kept

    def remember(self, number: int, accuracy: Tensor, loss: Tensor) -> None:
        """Keep the weights of the members that became better; count the epochs of those that did not."""
        now, recipe = self.vectors, self.recipe
        value = accuracy if recipe.monitor == "valid/accuracy" else -loss
        better = (value > now["best"]) & loss.isfinite() & (now["stopped"] == 0)
        for name, new in (("best", value), ("accuracy", accuracy), ("loss", loss)):
            now[name] = torch.where(better, new, now[name])
        now["best_epoch"][better] = number
        M = self.group.members
        for name, tensor in self.live.items():
            which = better.to(tensor.device)
            rows(self.best[name], M)[which] = rows(tensor, M)[which]
        for name in ("waited", "patience"):
            now[name] = torch.where(better, 0.0, now[name] + 1)
        if recipe.patience:
            now["stopped"][now["waited"] >= recipe.patience] = 1
        if recipe.schedule == "plateau":
            lowered = now["patience"] >= recipe.every
            now["factor"][lowered] = (now["factor"][lowered] * recipe.gamma).clamp(min=recipe.final_rate)
            now["patience"][lowered] = 0

    def present(self, accuracy: Tensor, loss: Tensor) -> dict[str, Checkpoint]:
        """A checkpoint of each finite member as it is judged now, by the ending of its file."""
        M = self.group.members
        finite = (loss.isfinite() & self.largest().isfinite()).nonzero().flatten().tolist()
        return {"" if M == 1 else f"-{m:03}": self.checkpoint(m, self.live, accuracy[m], loss[m]) for m in finite}

    def checkpoint(
        self,
        m: int,
        tensors: Mapping[str, Tensor] | None = None,
        accuracy: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> Checkpoint:
        """Member m at its best epoch, or as these tensors and figures say."""
        M, group = self.group.members, self.group
        source = self.best if tensors is None else tensors
        own = {name: rows(source[name], M)[m].view(shape) for name, shape in self.shapes.items()}
        figures = self.judge.metrics(
            self.vectors["accuracy"][m] if accuracy is None else accuracy,
            self.vectors["loss"][m] if loss is None else loss,
        )
        return Checkpoint(
            group.spec,
            {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in own.items()},
            self.train.classes,
            metrics=figures,
            recipe=self.recipe_of(m).to_dict(),
            trained_on=self.train.fingerprint,
        )

    def recipe_of(self, m: int) -> Recipe:
        """The recipe that trains member m alone."""
        group = self.group
        if group.members == 1:
            return self.recipe
        orders = group.order_seeds or (self.recipe.data_seed,)
        return replace(
            self.recipe,
            seed=group.seeds[m],
            order_seed=orders[m % len(orders)],
            learning_rate=float(self.rates[m]),
            weight_decay=group.weight_decays[m] if group.weight_decays else self.recipe.weight_decay,
        )

    # ---- stop and go on

    def identity(self) -> dict[str, Any]:
        """What makes a run this run."""
        group = self.group
        return {
            "spec": group.spec.to_dict(),
            "recipe": self.recipe.to_dict(),
            "members": [group.seeds, group.order_seeds, group.learning_rates, group.weight_decays],
            "train": self.train.fingerprint,
            "valid": self.valid.fingerprint,
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the coming epochs depend on, as tensors and as plain data."""
        optimiser, scaler = self.stepper.state()
        parts = {
            "live": self.live,
            "best": self.best,
            "average": self.average,
            "vectors": self.vectors,
            "optimiser": optimiser,
        }
        tensors = {f"{part}.{name}": t.detach().cpu() for part, some in parts.items() for name, t in some.items()}
        return tensors, {"scaler": scaler, "averaged": self.averaged, "history": self.history}

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Be where `state` was taken."""
        for part in ("live", "best", "average", "vectors"):
            _fill(getattr(self, part), _part(tensors, part))
        self.stepper.restore(_part(tensors, "optimiser"), plain["scaler"])
        self.averaged, self.history = plain["averaged"], plain["history"]


def _file_in(directory: Path | None, given: Log | None) -> list[Log]:
    """The log of JSON lines that every run with a directory keeps there, unless it is the one that was given.

    It is begun after the given one, so that it stays as it was where that cannot begin.
    """
    if directory is None:
        return []
    directory.mkdir(parents=True, exist_ok=True)
    file = JsonLines(directory / "log.jsonl")
    same = isinstance(given, JsonLines) and given.path.resolve() == file.path.resolve()
    return [] if same else [file]


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])


def _number(value: Tensor) -> float | None:
    """A float for JSON, None for what is not finite."""
    return float(value) if value.isfinite() else None


def _flat(records: Sequence[Record]) -> dict[str, Any]:
    """One record for the log: the figures of a single model, or those of M under `name/member`."""
    if len(records) == 1:
        return dict(records[0])
    return {f"{key}/{m}": value for m, record in enumerate(records) for key, value in record.items()}
