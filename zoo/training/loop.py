"""The one training loop: for one model, or for M models of one spec at once.

Everything that a resumed run needs is in one file that is replaced whole at the end of every epoch; the
randomness of an epoch is a function of the seeds and its number. So a run that is killed at any moment and
started again ends with the same bits.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from zoo import _files, checkpoint
from zoo._names import checked, usable_device
from zoo.checkpoint import Checkpoint, Exam, examine
from zoo.checkpoint.exam import probe_rows, rows_for
from zoo.checkpoint.header import CheckpointError
from zoo.data.frames import FrameSet
from zoo.logs import JsonLines, Log, Progress, Several, silent
from zoo.models.spec import Spec, build
from zoo.training.averaging import RunningAverage
from zoo.training.optimisers import restored, rows
from zoo.training.recipe import Recipe, acting
from zoo.training.schedules import SCHEDULES, Position
from zoo.training.step import OWN, Batches, Group, Scorer, State, Stepper, epoch_seed, forward_of
from zoo.training.teacher import Teacher, check_teacher, frame_sets

Record = Mapping[str, Any]
_STATE = "state.safetensors"
_LOOK_EVERY = 16  # steps between looks at the loss, each of which waits for the device
_STATISTICS = 65_536  # frames from which BatchNorm's statistics of averaged weights are estimated


class TrainingError(ValueError):
    """Training cannot continue; `checkpoints` holds each member's best so far, None where there is none."""

    def __init__(self, message: str, checkpoints: Sequence[Checkpoint | None] = ()) -> None:
        super().__init__(message)
        self.checkpoints = tuple(checkpoints)


@checked
def train(
    spec: Spec,
    recipe: Recipe,
    train: FrameSet,
    valid: FrameSet,
    *,
    teacher: Teacher | Callable[[Tensor], Tensor] | None = None,
    unlabelled: Sequence[FrameSet] = (),
    on_epoch: Callable[[Record], object] | None = None,
    directory: str | Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Train a new model and return it as it was after its best epoch on the validation frames.

    Args:
        spec: the model.
        recipe: how to train it.
        train: frames to learn from, with labels; the device of their features is where training happens.
        valid: frames on which each epoch is evaluated, with labels.
        teacher: gives the probabilities that the model learns from, besides the labels' share in the recipe: a
            `Teacher`, or a function from the windows that the model sees (B, inputs), augmented, to (B, C).
        unlabelled: sets of further frames to learn from, by the teacher's answers; labels that they have are unused.
        on_epoch: called after each epoch with its figures: epoch, train/loss (nats), train/accuracy
            (fraction), valid/loss, valid/accuracy, learning_rate, frames_per_second, seconds.
        directory: where each epoch leaves a checkpoint, and the run its state. If it holds this same run
            already, the run is resumed: the result is that of an uninterrupted run, to the bit on a CPU. A teacher
            needs a fingerprint for it.
        log: receives the figures too; with a directory, they are also written there as JSON lines. An error in it
            is a warning.
        progress: shows how far each epoch has come; None shows nothing.

    Raises:
        ValueError: frames or a teacher that do not fit the spec, the recipe or each other, a directory that holds
            another run, or a model that could not be kept as it was judged; that is, with tensors or answers that no
            checkpoint can give back.
        TrainingError: the loss became NaN or infinite, or that on the validation frames always was; it carries the best
            checkpoint so far.
        OSError: somebody else is training in the directory, unless that run is finished; or an epoch could not be
            written, and those before it are still there.

    Example:
        >>> import torch
        >>> from zoo.data.frames import FrameSet
        >>> features = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> frames = FrameSet(features, (features[:, 0] > 0).long(), torch.tensor([0, 64]), ("low", "high"))
        >>> spec = Spec("cylinder", features=3, context=0, classes=2, options={"width": 8, "depth": 1})
        >>> trained = train(spec, Recipe(epochs=5, batch_size=16, learning_rate=0.05), frames, frames)
        >>> trained.metrics["valid/accuracy"]["value"] > 0.9
        True
    """
    group = single_group(spec, recipe, train.features.device)
    report = None if on_epoch is None else lambda records: on_epoch(records[0])
    checkpoints = train_group(
        group,
        train,
        valid,
        teacher=teacher,
        unlabelled=unlabelled,
        on_epoch=report,
        directory=directory,
        log=log,
        progress=progress,
    )
    return checkpoints[0]


@checked
def single_group(spec: Spec, recipe: Recipe, device: torch.device | str = "cpu") -> Group:
    """A group of one new model."""
    place = usable_device(device)
    model = build(spec, seed=recipe.seed, device=place)

    def reseed(seeds: Sequence[int]) -> None:
        torch.default_generator.manual_seed(seeds[0])  # `torch.manual_seed` would reseed every accelerator as well
        if place.type == "cuda":
            with torch.cuda.device(place):
                torch.cuda.manual_seed(seeds[0])

    return Group(spec, (recipe,), model, forward_of(model), reseed)


@checked
def train_group(
    group: Group,
    train: FrameSet,
    valid: FrameSet,
    *,
    teacher: Teacher | Callable[[Tensor], Tensor] | None = None,
    unlabelled: Sequence[FrameSet] = (),
    on_epoch: Callable[[list[Record]], object] | None = None,
    directory: str | Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
) -> list[Checkpoint]:
    """Train all members of a group at once; return each as it was after its best epoch.

    A member that has stopped early, or whose loss is no longer finite, stays at its best epoch and is not
    changed further; training ends when no member is left. Arguments are those of `train`, but `on_epoch` gets one
    record a member. The teacher answers once for all members that share their batches.

    Raises:
        TrainingError: a member's loss is not finite before its first whole epoch, or all have diverged, or no epoch
            of a member had a finite loss on the validation frames.
    """
    teacher, unlabelled = None if teacher is None else Teacher.of(teacher), frame_sets(unlabelled)
    if teacher is not None and directory is not None and not teacher.fingerprint:
        msg = (
            "expected a teacher with a fingerprint where a directory is given, so that a run is resumed with the same "
        )
        raise ValueError(msg + "teacher; got none: use zoo.training.Teacher(..., fingerprint=...)")
    whole = check_group(group, train, valid, teacher, unlabelled).needs_whole_batch
    recipe, logs = group.recipes[0], [] if log is None else [log]
    with ExitStack() as stack, torch.random.fork_rng(devices=_generators(train)):
        run = _Run(group, train, valid, progress or silent, teacher, unlabelled)
        run.scorer.whole = whole
        if directory is not None:
            folder, busy = Path(directory), None
            try:
                stack.enter_context(_files.held(folder))
            except _files.HeldError as error:
                busy = error
            run.resume(folder)
            if busy is not None and not run.finished:
                raise busy
            lines = (folder / "log.jsonl").resolve()
            if not (busy or (isinstance(log, JsonLines) and log.path.resolve() == lines)):
                logs.append(JsonLines(lines))
        several = Several(*logs)
        config: dict[str, Any] = {"id": run.id, "recipe": recipe.to_dict(), "spec": group.spec.to_dict()}
        if group.members > 1:
            config["members"] = [{field: getattr(one, field) for field in OWN} for one in group.recipes]
        try:
            several.init(run.name, config)
            for number, records in enumerate(run.history, start=1):
                several.log(_flat(records), number)
            while not run.finished:
                records = run.epoch(len(run.history) + 1)
                several.log(_flat(records), len(run.history))
                if on_epoch is not None:
                    on_epoch(records)
        finally:
            several.finish()
        return run.result()


@checked
def seconds_per_step(group: Group, train: FrameSet, *, teacher: Teacher | None = None, patience: float = 0.5) -> float:
    """The least time that a whole step of this group took, over about `patience` seconds; the steps train the group."""
    recipe = group.recipes[0]
    enough = torch.arange(int((train.starts[:-1] < 4 * recipe.batch_size * recipe.accumulate).sum()))
    batches = Batches(train.select(enough), group.spec, group.recipes, teacher)
    stepper = Stepper(group, train.features.device)
    rates = torch.full((group.members,), recipe.learning_rate, dtype=torch.float64)
    group.module.train()
    with torch.random.fork_rng(devices=_generators(train)):
        took: list[float] = []
        order = (enumerate(batches.epoch(epoch), 1) for epoch in count(1))
        coming = (some for steps in order for n, some in steps if n == 1 or n < batches.steps)  # the last may be short
        while len(took) < 5 or sum(took) < patience:
            begin = time.perf_counter()
            stepper.step(next(coming), rates).cpu()
            took.append(time.perf_counter() - begin)
    return min(took[1:])


def _generators(frames: FrameSet) -> list[torch.device]:
    """The device whose generator training draws from, besides that of the CPU."""
    return [frames.features.device] if frames.features.device.type == "cuda" else []


def schedule_factor(at: Position, recipe: Recipe) -> float:
    """What the learning rate is multiplied by at this step: the warm-up times the schedule, if that is not reactive."""
    rise = min(1.0, (at.step + 1) / (recipe.warmup * at.steps)) if recipe.warmup else 1.0
    schedule = SCHEDULES[recipe.schedule]
    return rise if schedule.reactive else rise * schedule.function(at, **recipe.arguments(schedule.function))


class _Standing:
    """Where each of M members stands after an epoch, (M,) float64 each."""

    def __init__(self, members: int) -> None:
        zeros = torch.zeros(members, dtype=torch.float64)
        self.best = zeros - torch.inf  # the monitored value at the best epoch, higher is better
        self.best_epoch = zeros.clone()  # 0 before there is one
        self.accuracy = zeros.clone()  # on the validation frames, at the best epoch
        self.loss = zeros.clone()  # likewise
        self.waited = zeros.clone()  # epochs since the best one
        self.factor = zeros + 1  # of the learning rate, by a reactive schedule
        self.stopped = zeros.clone()  # 1 for a member that is not changed any more

    def update(self, number: int, accuracy: Tensor, loss: Tensor, recipe: Recipe) -> Tensor:
        """Take in the scores (M,) of an epoch; (M,) True for members for which it is the best so far."""
        value = accuracy if recipe.monitor == "valid/accuracy" else -loss
        better = (value > self.best) & loss.isfinite() & (self.stopped == 0)
        self.best = value.where(better, self.best)
        self.accuracy, self.loss = accuracy.where(better, self.accuracy), loss.where(better, self.loss)
        self.best_epoch[better] = number
        self.waited = torch.where(better, 0.0, self.waited + 1)
        if recipe.patience:
            self.stopped[self.waited >= recipe.patience] = 1
        schedule = SCHEDULES[recipe.schedule]
        if schedule.reactive:
            self.factor = schedule.function(self.factor, self.waited, **recipe.arguments(schedule.function))
        return better


class _Run:
    """A training run: weights, their average and their best, the optimiser, and where each member stands."""

    def __init__(
        self,
        group: Group,
        train: FrameSet,
        valid: FrameSet,
        progress: Progress,
        teacher: Teacher | None = None,
        unlabelled: Sequence[FrameSet] = (),
    ) -> None:
        self.group, self.recipe, self.train, self.progress = group, group.recipes[0], train, progress
        self.state = State(group.module, group.spec.architecture)
        self.numbers = self.state.numbers()  # of the new model
        self.batches = Batches(train, group.spec, group.recipes, teacher, unlabelled)
        self.origin: dict[str, Any] = {} if teacher is None else {"kind": "distilled", "parents": teacher.parents}
        self.scorer = Scorer(valid, group.spec)
        self.stepper = Stepper(group, train.features.device)
        self.rates = torch.tensor([recipe.learning_rate for recipe in group.recipes], dtype=torch.float64)
        self.best = {name: tensor.clone().contiguous() for name, tensor in self.state.tensors().items()}
        self.average = RunningAverage(self.state.tensors, self.recipe.ema, self.recipe.swa_from)
        self.standing = _Standing(group.members)
        self.history: list[list[Record]] = []
        self.name = group.spec.architecture
        self.id = _new_id(self.name)
        self.folder: Path | None = None
        self.identity = {
            "spec": group.spec.to_dict(),
            "recipes": [recipe.to_dict() for recipe in group.recipes],
            "train": train.fingerprint,
            "valid": valid.fingerprint,
        }
        if teacher is not None:  # runs without one are as those of older versions
            self.identity |= {"teacher": teacher.fingerprint, "unlabelled": [each.fingerprint for each in unlabelled]}

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return len(self.history) >= self.recipe.epochs or bool(self.standing.stopped.all())

    def epoch(self, number: int) -> list[Record]:
        """Train, evaluate and write one epoch; one record a member."""
        begin, M = time.perf_counter(), self.group.members
        self.stepper.check_parameters()
        self.group.reseed([epoch_seed(recipe.seed, number, "dropout") for recipe in self.group.recipes])
        self.stepper.kind.begin_epoch(self.stepper.optimiser, number)
        train_accuracy, train_loss, rate = self.learn(number)
        seconds = time.perf_counter() - begin
        self.average.add_epoch(number)
        with self.average.in_place(self.group.module, self.batches.unmasked(_STATISTICS)):
            self.group.module.eval()
            accuracy, loss = self.scorer(self.group.forward, M)
            better = self.standing.update(number, accuracy, loss, self.recipe).to(self.train.features.device)
            live = self.state.tensors()
            for name, tensor in live.items():
                rows(self.best[name], M)[better] = rows(tensor.contiguous(), M)[better]
            checkpoints = {}
            if self.folder is not None:
                finite = loss.isfinite() & _largest(live, M).isfinite()
                for m in finite.nonzero().flatten().tolist():
                    checkpoints["" if M == 1 else f"-{m:03}"] = self.checkpoint(m, live, accuracy, loss)
            if number == 1 < self.recipe.epochs and M == 1 and better.all():  # rather than after all epochs
                self.checkpoint(0, live, accuracy, loss).check_against(self.group.module)
        figures = {"train/loss": train_loss, "train/accuracy": train_accuracy}
        figures |= {"valid/loss": loss, "valid/accuracy": accuracy, "learning_rate": rate}
        speed = {"frames_per_second": round(self.batches.count / seconds), "seconds": round(seconds, 3)}
        records: list[Record] = [
            {"epoch": number} | {name: float(v[m]) if v[m].isfinite() else None for name, v in figures.items()} | speed
            for m in range(M)
        ]
        self.history.append(records)
        if self.folder is not None:
            self.write(self.folder, number, checkpoints)
        return records

    def learn(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over the training frames: accuracy, loss and last learning rate, (M,) each."""
        M, at = self.group.members, (number - 1) * self.batches.steps
        self.group.module.train()
        sums, seen = torch.zeros(3, M, dtype=torch.float64, device=self.train.features.device), 0
        shown, begin = 0, time.perf_counter()
        with self.progress(f"epoch {number}/{self.recipe.epochs}", total=self.batches.count) as advance:
            for index, batches in enumerate(self.batches.epoch(number)):
                factor = schedule_factor(Position(at + index, self.batches.steps, self.recipe.epochs), self.recipe)
                rates = self.rates * self.standing.factor * factor * (1 - self.standing.stopped)
                sums += self.stepper.step(batches, rates)
                self.average.add_step()
                seen += sum(batch.count for batch in batches)
                if index % _LOOK_EVERY == _LOOK_EVERY - 1 or index == self.batches.steps - 1:
                    self.stop_diverged(number, sums[1].cpu())
                    right, lost, labelled = sums.nanmean(1).tolist()
                    accuracy, loss = right / max(labelled, 1), lost / seen
                    speed = seen / (time.perf_counter() - begin)
                    figures = f"loss {loss:.3f} accuracy {accuracy:.3f} rate {float(rates.max()):.1e}"
                    advance(seen - shown, note=f"{figures} {speed:,.0f} frames/s")
                    shown = seen
        self.stop_diverged(number, _largest(self.state.checked(), M))
        right, lost, labelled = sums.cpu()
        return right / labelled.clamp(min=1), lost / seen, rates

    def stop_diverged(self, number: int, figures: Tensor) -> None:
        """Stop members whose figure (M,) is not finite; raise where one has no whole epoch yet, or none is left."""
        diverged, standing = ~figures.isfinite(), self.standing
        standing.stopped[diverged] = 1
        if not diverged.any() or (standing.best_epoch[diverged].all() and not diverged.all()):
            return
        bad = diverged.nonzero().flatten().tolist()
        seeds = ", ".join(str(self.group.recipes[m].seed) for m in bad)
        epoch, rate = int(standing.best_epoch[bad[0]]), self.group.recipes[bad[0]].learning_rate
        msg = (
            f"the loss or a weight is no longer finite in epoch {number} (seed {seeds}); "
            f"{f'the best epoch before is {epoch}' if epoch else 'there is no whole epoch before'}; "
            f"lower the learning rate ({rate:g}) or clip the gradient"
        )
        raise TrainingError(msg, self.found())

    def result(self) -> list[Checkpoint]:
        """Each member after its best epoch; of a single one it is checked that it answers as it did in training.

        Raises:
            TrainingError: no epoch of a member had a finite loss on the validation frames.
            CheckpointError: ANSWERS.
        """
        if never := [r.seed for r, best in zip(self.group.recipes, self.standing.best_epoch, strict=True) if not best]:
            msg = (
                f"the loss on the validation frames was NaN or infinite after every epoch (seed "
                f"{', '.join(map(str, never))}), so that none can be chosen; check the values of these frames, "
                f"and the spec's normalisation, {self.group.spec.normalisation!r}"
            )
            raise TrainingError(msg, self.found())
        best = self.best_checkpoints()
        if self.group.members == 1:  # the layers of a stack are known to keep nothing but their state
            with restored(self.group.module):
                for name, tensor in self.state.tensors().items():
                    tensor.copy_(self.best[name])
                best[0].check_against(self.group.module)
        return best

    def found(self) -> list[Checkpoint | None]:
        """Each member after its best epoch, None where there is none."""
        best = self.best_checkpoints()
        return [one if at else None for one, at in zip(best, self.standing.best_epoch, strict=True)]

    def best_checkpoints(self) -> list[Checkpoint]:
        """Each member after its best epoch."""
        accuracy, loss = self.standing.accuracy, self.standing.loss
        return [self.checkpoint(m, self.best, accuracy, loss) for m in range(self.group.members)]

    def checkpoint(self, m: int, tensors: Mapping[str, Tensor], accuracy: Tensor, loss: Tensor) -> Checkpoint:
        """Member m of these tensors and scores (M,)."""
        M, group = self.group.members, self.group
        present = {name: tensors[first] for name, first in self.state.first.items()}
        own = {name: rows(present[name].contiguous(), M)[m].view(shape) for name, shape in group.shapes.items()}
        return Checkpoint(
            group.spec,
            {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in own.items()},
            self.train.classes,
            metrics=self.scorer.metrics(accuracy[m], loss[m]),
            recipe=group.recipes[m].to_dict(),
            trained_on=self.train.fingerprint,
            **self.origin,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are changed in place, by the names that they have in the file of the state."""
        standing = vars(self.standing)
        parts = {"live": self.state.tensors(), "best": self.best, "average": self.average.tensors, "vectors": standing}
        return {f"{part}.{name}": tensor for part, some in parts.items() for name, tensor in some.items()}

    def write(self, folder: Path, number: int, checkpoints: Mapping[str, Checkpoint]) -> None:
        """Write an epoch's checkpoints, by the suffix of the file's stem, and, last, the whole state."""
        parts = self.tensors() | self.stepper.tensors()
        parts |= {f"aside.{name}": tensor for name, tensor in self.state.aside().items()}
        numbers = {path: own for path, own in self.state.numbers().items() if own != self.numbers[path]}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}
        plain = {
            "scaler": self.stepper.scaler.state_dict(),
            "averaged": self.average.count,
            "history": self.history,
            "id": self.id,
            "numbers": numbers,
        }
        text = json.dumps({"identity": self.identity, "plain": plain}, allow_nan=False)
        try:
            for suffix, one in checkpoints.items():
                _files.write(folder / f"epoch-{number:04}{suffix}.safetensors", checkpoint.encode(one))
            _files.write(folder / _STATE, checkpoint.pack(tensors, {"run": text}))
        except OSError as error:
            last = f"the run can be resumed from epoch {number - 1}" if number > 1 else "no epoch has been written yet"
            msg = f"cannot write epoch {number} to {folder}: {error.strerror}; {last}"
            raise OSError(error.errno, msg) from error
        for path in folder.glob("epoch-*.safetensors"):
            if self.recipe.keep and int(path.name[6:10]) <= number - self.recipe.keep:
                path.unlink(missing_ok=True)

    def resume(self, folder: Path) -> None:
        """Write to this folder from now on, and return to the last whole epoch that it holds, if there is one."""
        self.folder, self.name, path = folder, folder.resolve().name, folder / _STATE
        self.id = _new_id(self.name)
        if not path.exists():
            return
        try:
            data = _files.read(path)
            header = checkpoint.verify_bytes(data)
            about = json.loads(header.metadata["run"])
            tensors = checkpoint.tensors_of(data, header)
        except (CheckpointError, KeyError, ValueError, OSError) as error:
            msg = f"cannot resume from {path}: {error}; remove it to start anew"
            raise ValueError(msg) from error
        there, now = _current(about["identity"]), json.loads(json.dumps(self.identity))
        if there != now:
            details = [
                f"{name}: {old.get(name)!r} there, {value!r} now"
                for old, new in zip([there["spec"], *there["recipes"]], [now["spec"], *now["recipes"]], strict=False)
                for name, value in new.items()
                if value != old.get(name)
            ]
            details += ["another teacher"] if there.get("teacher") != now.get("teacher") else []
            reason = "; ".join(details) or "other frames or another number of members"
            msg = f"{folder} holds another run ({reason}); choose another directory"
            raise ValueError(msg)
        own, plain = self.tensors(), about["plain"]
        forms = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if misfits := [name for name, tensor in own.items() if forms.get(name) != (tensor.shape, tensor.dtype)]:
            msg = f"{folder} holds a run of a model with other tensors ({', '.join(misfits)}); choose another directory"
            raise ValueError(msg)
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        aside = {name.removeprefix("aside."): tensor for name, tensor in tensors.items() if name.startswith("aside.")}
        self.state.set_aside(aside, plain.get("numbers", {}))
        self.stepper.restore(tensors, plain["scaler"])
        self.average.count, self.history = plain["averaged"], plain["history"]
        self.id = plain.get("id", self.name)  # runs of older versions had none of their own


def _new_id(name: str) -> str:
    """The id of a new run: its name, and what no other run has, even of the same name and settings."""
    return f"{name}-{uuid4().hex[:12]}"


def _current(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity in its current form; it used to hold one recipe, and lists of what members had of their own."""
    if "recipes" in identity:
        recipes = [Recipe().to_dict() | recipe for recipe in identity["recipes"]]  # with the fields that came later
        return identity | {"recipes": [acting(recipe) for recipe in recipes]}
    recipe, (seeds, *lists) = identity.pop("recipe"), identity.pop("members")
    own = {"seed": seeds if len(seeds) > 1 else []} | dict(zip(OWN[1:], lists, strict=True))
    given = {name: values for name, values in own.items() if values}
    recipes = [recipe | {name: values[m % len(values)] for name, values in given.items()} for m in range(len(seeds))]
    return _current(identity | {"recipes": recipes})


@checked
def check_group(
    group: Group,
    train: FrameSet,
    valid: FrameSet,
    teacher: Teacher | None = None,
    unlabelled: Sequence[FrameSet] = (),
) -> Exam:
    """What a member answers before its training, if it can be trained on these frames, judged and kept.

    Raises:
        ValueError: frames, spec, recipe and teacher do not fit each other.
        CheckpointError: STATE, DTYPE, ANSWERS: tensors or answers of the model that no checkpoint can give back.
    """
    _check_frames(group, train, valid)
    check_teacher(teacher, group.spec, group.recipes[0], train, unlabelled)
    module = group.module if group.members == 1 else build(group.spec, seed=group.recipes[0].seed)
    Checkpoint.from_module(module, group.spec, train.classes)
    rows = rows_for(module, probe_rows(group.spec.inputs))
    exam = examine(module, rows, group.spec.classes, name=group.spec.architecture)
    if exam.needs_whole_batch:
        what = f"the answers of {group.spec.architecture!r} to a frame depend on the other frames of its batch"
        warnings.warn(f"{what}; the validation frames are evaluated as one batch", stacklevel=2)
    return exam


def _check_frames(group: Group, train: FrameSet, valid: FrameSet) -> None:
    """Raise ValueError where frames, spec and recipe do not fit each other."""
    spec, recipe, span = group.spec, group.recipes[0], 2 * group.spec.context + 1
    for what, frames in (("train", train), ("valid", valid)):
        found = (frames.features.shape[1], len(frames.classes))
        if found != (spec.features, spec.classes):
            sizes = f"{spec.features} features and {spec.classes} classes"
            msg = f"expected {what} frames of {sizes} as in the spec, got {found[0]} and {found[1]}"
            raise ValueError(msg)
    if train.classes != valid.classes:
        msg = "expected the same classes in the same order in the train and the valid frames"
        raise ValueError(msg)
    if train.features.device != valid.features.device:
        msg = f"expected all frames on {train.features.device}, got valid on {valid.features.device}; use .to()"
        raise ValueError(msg)
    if recipe.mask_time > span or recipe.mask_features > spec.features:
        masks = f"mask_time={recipe.mask_time} and mask_features={recipe.mask_features}"
        msg = f"expected masks within a window of {span} frames and {spec.features} features, got {masks}"
        raise ValueError(msg)


def _largest(tensors: Mapping[str, Tensor], members: int) -> Tensor:
    """(M,) largest magnitude of each member's weights and statistics, to see whether they are finite."""
    floating = [t for t in tensors.values() if t.is_floating_point() and t.numel()]
    return torch.stack([rows(t.contiguous(), members).abs().amax(dim=1) for t in floating]).sum(dim=0).cpu()


def _flat(records: Sequence[Record]) -> dict[str, Any]:
    """One record for the log: the figures of a single model, or those of M under `name/member`."""
    M = len(records)
    return {f"{key}/{m}" if M > 1 else key: value for m in range(M) for key, value in records[m].items()}
