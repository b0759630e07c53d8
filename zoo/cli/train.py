"""Commands that train models: train, average, runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoo
from zoo._console import Answer, Table, progress
from zoo.cli.options import (
    NO_FLAGS,
    NO_PARTITIONS,
    Options,
    Partitions,
    RecipeFile,
    RecipeFlags,
    RegistryFile,
    options_from,
    recipe_from,
    spec_fields,
)
from zoo.cli.views import described
from zoo.training.recipe import Recipe

if TYPE_CHECKING:
    from zoo.logs import Log

_CONTEXT = 20  # frames on each side where neither a flag nor a spec names another number, as in the lecture


def train(
    name: str | None = None,
    /,
    *,
    spec: str | None = None,
    context: int | None = None,
    option: Options = (),
    from_: str | None = None,
    recipe: RecipeFile = None,
    partitions: Partitions = NO_PARTITIONS,
    directory: Path | None = None,
    wandb: str | None = None,
    tensorboard: Path | None = None,
    registry: RegistryFile = None,
    flags: RecipeFlags = NO_FLAGS,
) -> Answer:
    """Train a model and save its best epoch in the registry.

    Example: zoo train cylinder-c --spec cylinder --option width=256 --epochs 5 --registry registry.json

    Args:
        name: name to save it under; it may be left out where a directory is given.
        spec: an architecture, or a whole spec as JSON or as a .json or .toml file.
        context: frames on each side, in place of the spec's own; 20 if the spec is an architecture.
        from_: a registered model whose spec and recipe are used; other flags replace single fields. With an
            architecture as --spec, its features, context and classes are used, but none of its options.
        directory: folder for a checkpoint of each epoch; the same command resumes an interrupted run there.
        wandb: Weights & Biases project to log to.
        tensorboard: folder for TensorBoard logs.
    """
    if name is None and directory is None:
        msg = "expected a name to save the model under, or --directory for its checkpoints, got neither"
        raise ValueError(msg)
    home = zoo.Registry(registry)
    if name is not None:
        home.check_nameable(name)
    frames, valid = partitions.load()
    known, base = _recorded(home, from_) if from_ else (None, None)
    wanted = _spec(spec, context, option, frames, known)
    settings, log = recipe_from(recipe, flags, partitions.device, base), _log(wandb, tensorboard)
    try:
        trained = zoo.train(wanted, settings, frames, valid, directory=directory, log=log, progress=progress)
    except KeyboardInterrupt:
        resumed = f"the same command resumes in {directory}" if directory else "nothing is saved without --directory"
        raise KeyboardInterrupt(f"interrupted; {resumed}") from None
    if name is not None:
        return described(home.register(name, trained))
    metrics = {metric: figure["value"] for metric, figure in trained.metrics.items()}
    return Answer(metrics, [Table([metrics], formats=dict.fromkeys(metrics, ".4f"))])


def average(
    name: str,
    /,
    *sources: str,
    method: str = "uniform",
    decay: float = 0.5,
    partitions: Partitions = NO_PARTITIONS,
    picture: Path | None = None,
    registry: RegistryFile = None,
) -> Answer:
    """Average the weights of registered models or of the epochs of a run, and save the mean.

    BatchNorm's statistics are estimated anew on the training frames.

    Example: zoo average cylinder-soup runs/cylinder-c --method greedy

    Args:
        name: name to save the average under.
        sources: at least two checkpoints of one spec: models (NAME, NAME@2), checkpoint files, or the folder of a run,
            of which `zoo train --keep 0` keeps every epoch.
        method: uniform, ema, or greedy, which chooses by the validation frames.
        decay: decay of ema.
        picture: file for a plot of the loss along the line from the first source to the last.
    """
    from zoo.training.averaging import losses_along

    home = zoo.Registry(registry)
    checkpoints = _checkpoints(home, sources)
    frames, valid = partitions.load()
    with progress(f"averaging {len(checkpoints)} checkpoints"):
        mean = zoo.average(checkpoints, frames=frames, valid=valid, method=method, decay=decay)
    if picture is not None:
        from zoo.search.pictures import plot_line

        save_picture(plot_line(*losses_along(checkpoints[0], checkpoints[-1], valid)), picture)
    return described(home.register(name, mean))


def runs(folder: Path = Path(), /) -> Answer:
    """Compare the training runs under a folder; only settings in which they differ are shown.

    Example: zoo runs runs

    Args:
        folder: folder with the directories of runs.
    """
    table = zoo.read_runs(folder).astype(object)
    rows: list[Mapping[str, Any]] = [
        {str(key): None if value != value else value for key, value in row.items()}  # pandas' missing values are NaN
        for row in table.to_dict("records")
    ]
    return Answer(rows, [Table(rows, formats={"best": ".4f", "loss": ".4f"})])


def save_picture(axes: Any, path: Path) -> None:
    """Write the figure that these axes belong to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=150)


def _spec(
    text: str | None, context: int | None, option: tuple[str, ...], frames: zoo.FrameSet, base: zoo.Spec | None
) -> zoo.Spec:
    """The spec of `text`, or `base`, with the given context and options in place of its own."""
    if text is None and base is None:
        msg = "expected --spec with an architecture or a spec, or --from with a registered model, got neither"
        raise ValueError(msg)
    if text is not None and (text.lstrip().startswith("{") or Path(text).suffix in (".json", ".toml")):
        spec = zoo.Spec.from_dict(spec_fields(text))
    elif base is None:
        spec = zoo.Spec(str(text), frames.features.shape[1], _CONTEXT, len(frames.classes))
    else:
        spec = base if text in (None, base.architecture) else replace(base, architecture=text, options={})
    options = {**spec.options, **options_from(option)}
    return replace(spec, context=spec.context if context is None else context, options=options)


def _recorded(home: zoo.Registry, reference: str) -> tuple[zoo.Spec, Recipe]:
    """Spec and recipe of a registered model."""
    entry = home.get(reference)
    if entry.recipe is None:
        msg = f"expected a model with a recipe, but {entry.reference} has none; give --spec and --recipe"
        raise ValueError(msg)
    return entry.spec, Recipe.from_dict(entry.recipe)


def _log(wandb: str | None, tensorboard: Path | None) -> Log:
    """All experiment trackers that were asked for, as one."""
    from zoo.logs import Several, TensorBoard, Wandb

    project: list[Log] = [] if wandb is None else [Wandb(wandb)]
    return Several(*project, *([] if tensorboard is None else [TensorBoard(tensorboard)]))


def _checkpoints(home: zoo.Registry, sources: tuple[str, ...]) -> list[zoo.Checkpoint]:
    """The checkpoints of all sources, those of a run in the order of its epochs.

    Raises:
        ValueError: there are fewer than two.
    """
    found = [checkpoint for source in sources for checkpoint in _checkpoints_at(home, source)]
    if len(found) < 2:
        msg = (
            f"expected at least 2 checkpoints to average, got {len(found)} from {' '.join(sources) or 'no source'}; "
            "a run keeps only its last epoch, zoo train --keep 0 keeps every epoch and --keep 5 the last five"
        )
        raise ValueError(msg)
    return found


def _checkpoints_at(home: zoo.Registry, source: str) -> list[zoo.Checkpoint]:
    from zoo.checkpoint import read

    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("epoch-*.safetensors"))
        if not files:
            msg = f"expected epoch-*.safetensors in {path}, found none; train with --keep 0 to keep every epoch"
            raise ValueError(msg)
        return [read(file) for file in files]
    return [read(path)] if path.is_file() else [home.checkpoint(source)]
