"""Studies: many specs tried cheaply, the better ones trained longer."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo import _files, checkpoint
from zoo._names import checked
from zoo.checkpoint import Checkpoint
from zoo.data.frames import FrameSet, require_sendable
from zoo.logs import Progress
from zoo.models.spec import Spec, fast_count
from zoo.search.sample import searched, widest_spec
from zoo.training.loop import TrainingError, train
from zoo.training.recipe import Recipe, acting
from zoo.workers import Workers, carry_out

if TYPE_CHECKING:
    import optuna

Trainer = Callable[[Sequence[Spec], Recipe, FrameSet, FrameSet], Sequence[Checkpoint | None]]

_PATIENCE = 60.0  # seconds to wait for another process that writes to the journal of a study


class _JournalLock:
    """The system's lock of a journal, for optuna: its own are links or files, which it takes from a living process."""

    def __init__(self, journal: Path) -> None:
        self._path, self._held = journal.with_name(f"{journal.name}.flock"), ExitStack()

    def acquire(self) -> bool:
        """Wait for it; the errors of `_files.locked`."""
        self._held.enter_context(_files.locked(self._path, timeout=_PATIENCE))
        return True

    def release(self) -> None:
        """Let the next process have it."""
        self._held.close()


@dataclass(frozen=True, eq=False)
class Trial:
    """A spec that was tried, with the epochs and the result of its longest training.

    The checkpoint is None where the loss diverged, and in optuna's trials, which only have figures; the score is the
    validation accuracy, a fraction.
    """

    spec: Spec
    epochs: int
    checkpoint: Checkpoint | None
    score: float | None

    @property
    def accuracy(self) -> float:
        """The score, -1 where there is none, so that trials sort."""
        return -1.0 if self.score is None else self.score

    def row(self) -> dict[str, Any]:
        """Plain figures for a table."""
        options = self.spec.to_dict()["options"]
        return {
            "architecture": self.spec.architecture,
            "context": self.spec.context,
            "parameters": fast_count(self.spec),
            "epochs": self.epochs,
            "accuracy": self.score,
            "loss": _figure(self.checkpoint, "valid/loss"),
            "options": {key: options[key] for key in ("width", "narrow", "widths", "depth") if key in options},
        }


def _figure(checkpoint: Checkpoint | None, name: str) -> float | None:
    return None if checkpoint is None else float(checkpoint.metrics[name]["value"])


@checked
def one_by_one(
    specs: Sequence[Spec],
    recipe: Recipe,
    train_frames: FrameSet,
    valid: FrameSet,
    *,
    workers: Workers | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Checkpoint | None]:
    """The plain trainer: each spec by `zoo.train`; None for one whose loss diverges.

    Args:
        specs: one model is trained for each; equal ones are trained once, as they would learn the same to the bit.
        recipe: of all of them, which learn from `train_frames` and choose their best epoch on `valid`.
        workers: who trains them, one spec each at a time, with the same bits; here, one after another, if None.
        folder: where each checkpoint is kept, so that a study that is started again goes on from them; all machines
            must see it.
        progress: shows how many are done.

    Raises:
        ValueError: a part of mapped frames, which would be copied to every worker.
        OSError: somebody else is training in the folder.
    """
    if workers is not None:
        require_sendable(train_frames, valid)
    home = None if folder is None else Path(folder).absolute()
    about = recipe.to_dict(), train_frames.fingerprint, valid.fingerprint
    known = [
        home and home / f"{hashlib.sha256(repr((each.canonical(), *about)).encode()).hexdigest()}" for each in specs
    ]
    job = partial(_trial, recipe, train_frames, valid, torch.get_num_threads())
    first = {spec: number for number, spec in reversed([*enumerate(specs)])}  # equal specs would learn the same
    names = [f"trial {first[spec]} ({spec.architecture})" for spec in specs]
    title = f"{recipe.epochs} epochs each"
    with _files.held(home):
        items = {
            name: partial(_Trial, spec, file)
            for name, spec, file in zip(names, specs, known, strict=True)
            if file is None or not file.exists()
        }
        found = dict(carry_out(job, items, workers, title=title, progress=progress))
    return [found[name] if file is None else _kept(file) for name, file in zip(names, known, strict=True)]


@dataclass(frozen=True)
class _Trial:
    """A spec to train, and the file for its checkpoint."""

    spec: Spec
    file: Path | None


def _trial(
    recipe: Recipe, train_frames: FrameSet, valid: FrameSet, threads: int
) -> Callable[[_Trial], Checkpoint | None]:
    """The job of a worker; to the bit, what is learnt depends on the number of threads."""
    torch.set_num_threads(threads)

    def trained(trial: _Trial) -> Checkpoint | None:
        try:
            found = train(trial.spec, recipe, train_frames, valid)
        except TrainingError:
            found = None
        if trial.file is None:
            return found
        if found is None:
            _files.write(trial.file, b"")
        else:
            checkpoint.write(found, trial.file)
        return None

    return trained


def _kept(file: Path) -> Checkpoint | None:
    """The checkpoint that a worker left; an empty file stands for a loss that diverged."""
    if not file.exists():
        msg = f"expected the result of a trial at {file}, got none: all machines must see that folder"
        raise ValueError(msg)
    return checkpoint.read(file) if file.stat().st_size else None


@checked
def halving(
    specs: Iterable[Spec],
    recipe: Recipe,
    train_frames: FrameSet,
    valid: FrameSet,
    *,
    factor: int = 3,
    first_epochs: int = 1,
    trainer: Trainer = one_by_one,
) -> list[Trial]:
    """Successive halving: train all specs for few epochs, the best of them anew for more epochs, and so on.

    Args:
        specs: a finite number; they learn from `train_frames` and are scored on `valid`.
        recipe: the recipe of every trial; its epochs are those of the last round, its `fraction` shortens all rounds.
        factor: each round keeps one spec in `factor` and trains it `factor` times as long.
        first_epochs: length of the first round.
        trainer: trains many specs by one recipe; one that trains equal specs together saves time. For a progress
            bar pass `functools.partial(one_by_one, progress=...)`.

    Returns:
        A trial per spec, those of later rounds first, and within a round the better before the worse.

    Raises:
        ValueError: no specs, or a factor below 2.

    References:
        Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016.
    """
    going = list(specs)
    if not going or factor < 2:
        msg = f"expected specs and a factor of at least 2, got {len(going)} specs and factor {factor}"
        raise ValueError(msg)
    epochs, out = min(first_epochs, recipe.epochs), list[Trial]()
    while True:
        trained = zip(going, trainer(going, _shortened(recipe, epochs), train_frames, valid), strict=True)
        trials = [Trial(spec, epochs, one, _figure(one, "valid/accuracy")) for spec, one in trained]
        trials.sort(key=lambda trial: -trial.accuracy)
        if epochs == recipe.epochs or len(going) == 1:
            return trials + out
        kept = max(len(going) // factor, 1)
        out = trials[kept:] + out
        going, epochs = [trial.spec for trial in trials[:kept]], min(epochs * factor, recipe.epochs)


def _shortened(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe for fewer epochs, without what would act only later."""
    within = {name: min(getattr(recipe, name), epochs) for name in ("warmup", "restart")}
    return Recipe.from_dict(acting(vars(recipe) | within | {"epochs": epochs}))


def optuna_study(
    recipe: Recipe,
    train_frames: FrameSet,
    valid: FrameSet,
    *,
    budget: int,
    trials: int,
    journal: str | Path | None = None,
    name: str = "zoo",
    contexts: Sequence[int] = (10, 20, 30),
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> optuna.Study:
    """Search with optuna's TPE sampler and median pruner, under a parameter budget for each model.

    Several processes may share one study through its journal file; each runs `trials` trials. A trial whose
    process has died on this machine is marked as failed, and its settings are tried again. Without optuna it raises
    ImportError, and a ValueError for a journal on a file system without locks.

    Args:
        recipe: the recipe of every trial, which learns from `train_frames` and is scored on `valid`.
        budget: the most parameters that a model may have.
        trials: number of trials that this process runs.
        journal: the study's file, in which it has its `name`; None keeps the study in memory.
        contexts: the contexts to choose from; `options` are fixed, and `seed` is that of the sampler.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        msg = "an optuna study needs optuna: pip install 'zoo-ensemble[search]'"
        raise ImportError(msg) from error
    storage = None
    if journal is not None:
        lock: Any = _JournalLock(Path(journal))
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock))
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_warmup_steps=1),
    )
    free_dead(study)

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        spec = widest_spec(
            trial.suggest_categorical("architecture", searched("width")),
            budget,
            features=train_frames.features.shape[1],
            classes=len(train_frames.classes),
            context=trial.suggest_categorical("context", list(contexts)),
            depth=trial.suggest_int("depth", 1, 6),
            share=trial.suggest_float("share", 0.05, 1.0),
            options=options,
        )
        trial.set_user_attr("spec", spec.canonical())

        def report(record: Mapping[str, Any]) -> None:
            trial.report(record["valid/accuracy"] or 0.0, record["epoch"])
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            checkpoint = train(spec, recipe, train_frames, valid, on_epoch=report)
        except TrainingError as error:
            raise optuna.TrialPruned(str(error)) from error
        return float(checkpoint.metrics["valid/accuracy"]["value"])

    study.optimize(objective, n_trials=trials)
    return study


def optuna_trials(study: optuna.Study) -> list[Trial]:
    """The trials of a study that have a score, best first; a pruned trial has the score of its last epoch."""
    found = []
    for one in study.get_trials():
        if "spec" in one.user_attrs and one.intermediate_values:
            epochs = max(one.intermediate_values)
            score = one.value if one.value is not None else one.intermediate_values[epochs]
            found.append(Trial(Spec.from_dict(json.loads(one.user_attrs["spec"])), epochs, None, score))
    return sorted(found, key=lambda trial: -trial.accuracy)


def free_dead(study: optuna.Study) -> int:
    """Mark running trials whose process has died as failed and queue their settings again; return their number."""
    import optuna

    freed = 0
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        host, _, process = str(trial.user_attrs.get("worker", "")).rpartition(":")
        if host == socket.gethostname() and not _alive(int(process)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if trial.params:
                study.enqueue_trial(trial.params)
            freed += 1
    return freed


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # it belongs to another user
        return True
    except ProcessLookupError:
        return False
    return True
