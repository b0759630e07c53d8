"""Commands that train models: train, average, runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import zoo
from zoo import logs
from zoo._console import Answer, Table, progress
from zoo.cli.entries import described
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
from zoo.training.recipe import Recipe

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
    base = base_recipe = None
    if from_ is not None:
        entry = home.get(from_)
        if entry.recipe is None:
            msg = f"expected a model with a recipe, but {entry.reference} has none; give --spec and --recipe"
            raise ValueError(msg)
        base, base_recipe = entry.spec, Recipe.from_dict(entry.recipe)
    wanted = _spec(spec, context, options_from(option), frames, base)
    settings = recipe_from(recipe, flags, partitions.device, base_recipe)
    trackers: list[logs.Log] = []
    if wandb is not None:
        trackers.append(logs.Wandb(wandb))
    if tensorboard is not None:
        trackers.append(logs.TensorBoard(tensorboard))
    try:
        trained = zoo.train(
            wanted, settings, frames, valid, directory=directory, log=logs.Several(*trackers), progress=progress
        )
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
    from zoo.checkpoint import read

    home = zoo.Registry(registry)
    checkpoints = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(path.glob("epoch-*.safetensors"))
            if not files:
                msg = f"expected epoch-*.safetensors in {path}, found none; train with --keep 0 to keep every epoch"
                raise ValueError(msg)
            checkpoints += [read(file) for file in files]
        else:
            checkpoints.append(read(path) if path.is_file() else home.checkpoint(source))
    if len(checkpoints) < 2:
        msg = (
            f"expected at least 2 checkpoints to average, got {len(checkpoints)} from "
            f"{' '.join(sources) or 'no source'}; a run keeps only its last epoch, zoo train --keep 0 keeps every "
            "epoch and --keep 5 the last five"
        )
        raise ValueError(msg)
    frames, valid = partitions.load()
    with progress(f"averaging {len(checkpoints)} checkpoints"):
        mean = zoo.average(checkpoints, frames=frames, valid=valid, method=method, decay=decay)
    if picture is not None:
        from zoo.search.pictures import plot_line
        from zoo.training.averaging import losses_along

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
    text: str | None, context: int | None, options: Mapping[str, Any], frames: zoo.FrameSet, base: zoo.Spec | None
) -> zoo.Spec:
    """The spec of `text`, or `base`, with the given context and options in place of its own."""
    if text is None:
        if base is None:
            msg = "expected --spec with an architecture or a spec, or --from with a registered model, got neither"
            raise ValueError(msg)
        spec = base
    elif text.lstrip().startswith("{") or Path(text).suffix in (".json", ".toml"):
        spec = zoo.Spec.from_dict(spec_fields(text))
    elif base is None:
        spec = zoo.Spec(text, frames.features.shape[1], _CONTEXT, len(frames.classes))
    else:
        spec = base if text == base.architecture else replace(base, architecture=text, options={})
    return replace(spec, context=spec.context if context is None else context, options={**spec.options, **options})
