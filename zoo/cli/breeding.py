"""Commands that breed models: train, average, runs, search."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, make_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

from cyclopts import App, Parameter

from zoo._console import print_json, print_table, progress
from zoo.cli.keeping import AsJson, RegistryFile, Switch, tell
from zoo.cli.values import (
    Draw,
    cell,
    checkpoints_of,
    frames_of,
    log_of,
    options_of,
    recipe_of,
    recorded,
    save_picture,
    spec_of,
    tell_metrics,
    tell_specs,
)
from zoo.training.recipe import Recipe

if TYPE_CHECKING:
    from zoo.search.study import Trial

    Fields = Recipe
else:  # the fields of a recipe, each of which may be left out
    _TYPES = get_type_hints(Recipe)
    Fields = make_dataclass(
        "Fields",
        [(field.name, _TYPES[field.name] | None, None) for field in fields(Recipe)],
        namespace={"__doc__": Recipe.__doc__, "__module__": __name__},
    )

RecipeFlags = Annotated[Fields, Parameter(name="*", group="Recipe")]
_NONE_GIVEN = Fields()
Corpus = Annotated[Path | None, Parameter(help="folder of partitions; the bundled corpus without it")]
Options = Annotated[tuple[str, ...], Parameter(name="--option", negative=(), help="NAME=VALUE of the architecture")]


def add_to(app: App) -> None:
    """Add these commands to `app`."""
    for command in (train, average, runs, search):
        app.command(command)


def train(
    name: str | None = None,
    *,
    spec: str | None = None,
    context: int | None = None,
    option: Options = (),
    from_: Annotated[str | None, Parameter(name="--from")] = None,
    recipe: Path | None = None,
    corpus: Corpus = None,
    train_partition: Annotated[str, Parameter(name="--train")] = "train",
    valid_partition: Annotated[str, Parameter(name="--valid")] = "valid",
    directory: Path | None = None,
    device: str = "cpu",
    wandb: str | None = None,
    tensorboard: Path | None = None,
    registry: RegistryFile = None,
    json: AsJson = False,
    flags: RecipeFlags = _NONE_GIVEN,
) -> int:
    """Train a model and register its best epoch.

    Example: zoo train cylinder-c --spec cylinder --option width=256 --epochs 5 --registry registry.json

    Args:
        name: under which it is registered; without it nothing is, and a directory must be given.
        spec: an architecture, or a whole spec as JSON or as a .json or .toml file.
        context: frames on each side, in place of the spec's own; 20 where the spec is an architecture.
        option: of the architecture, such as width=256, in place of the spec's own; again for each.
        from_: a registered model whose spec and recipe are taken; flags change single fields. An architecture
            as --spec keeps its features, context and classes, but not another architecture's options.
        recipe: a .toml or .json file; flags change single fields.
        corpus: folder of partitions in the HW1P2 layout.
        train_partition: to learn from.
        valid_partition: to choose the best epoch by.
        directory: where each epoch leaves a checkpoint; the same command goes on with what is there.
        device: such as cpu or cuda.
        wandb: project of Weights & Biases to log to.
        tensorboard: folder to log to.
    """
    from zoo.registry import Registry
    from zoo.registry.changes import check_nameable
    from zoo.registry.document import Document
    from zoo.training.run import train as train_model

    if name is None and directory is None:
        msg = "expected a name to register the model under, or --directory to leave it in"
        raise ValueError(msg)
    keep = Registry(registry)
    if name is not None:  # before hours of work, not after
        check_nameable(keep.document() if keep.path.exists() else Document(), name)
    frames, judged = (frames_of(corpus, part).to(device) for part in (train_partition, valid_partition))
    known, base = recorded(keep, from_) if from_ else (None, Recipe())
    wanted = spec_of(spec, context, option, frames, known)
    settings = recipe_of(base if recipe is None else Recipe.read(recipe), flags)
    try:
        log = log_of(wandb, tensorboard)
        found = train_model(wanted, settings, frames, judged, directory=directory, log=log, progress=progress)
    except KeyboardInterrupt:
        kept = "nothing is kept; --directory keeps" if directory is None else f"the same command goes on in {directory}"
        print(f"error: interrupted; {kept}", file=sys.stderr)
        return 130
    if name is not None:
        tell(keep.register(name, found), json)
    else:
        tell_metrics(found, json)
    return 0


def average(
    name: str,
    *sources: str,
    method: str = "uniform",
    decay: float = 0.5,
    corpus: Corpus = None,
    train_partition: Annotated[str, Parameter(name="--train")] = "train",
    valid_partition: Annotated[str, Parameter(name="--valid")] = "valid",
    picture: Path | None = None,
    registry: RegistryFile = None,
    json: AsJson = False,
) -> int:
    """Average the weights of registered models or of a run's epochs, and register the mean.

    Example: zoo average cylinder-soup runs/cylinder-c --method greedy

    Args:
        name: of the average.
        sources: models of one spec (NAME, NAME@2), checkpoint files, or folders of a run with its epochs, of which
            zoo train --keep 0 keeps all; at least two checkpoints.
        method: uniform, ema or greedy.
        decay: of ema.
        corpus: folder of partitions in the HW1P2 layout.
        train_partition: frames on which BatchNorm's statistics are estimated anew.
        valid_partition: frames that judge, and by which greedy chooses.
        picture: a file for the loss along the line from the first to the last source.
    """
    from zoo.registry import Registry
    from zoo.training.averaging import average as averaged
    from zoo.training.averaging import losses_along

    keep = Registry(registry)
    found = checkpoints_of(keep, sources)
    frames, judged = (frames_of(corpus, part) for part in (train_partition, valid_partition))
    mean = averaged(found, frames=frames, valid=judged, method=method, decay=decay)
    if picture is not None:
        from zoo.search.pictures import plot_line

        positions, losses = losses_along(found[0], found[-1], judged)
        save_picture(plot_line(positions, losses), picture)
    tell(keep.register(name, mean), json)
    return 0


def runs(folder: Path = Path(), *, json: AsJson = False) -> int:
    """Compare the runs whose logs lie under a folder; only settings in which they differ are shown.

    Example: zoo runs runs

    Args:
        folder: with the directories of runs.
    """
    from zoo.logs import read_runs

    rows = read_runs(folder).astype(object)
    plain = [{str(key): cell(value) for key, value in row.items()} for row in rows.to_dict("records")]
    if json:
        print_json(plain)
    else:
        print_table(plain, formats={"best": ".4f", "loss": ".4f"})
    return 0


def search(
    *,
    budget: int = 10_000_000,
    members: int = 0,
    draws: int = 8,
    architectures: tuple[str, ...] = (),
    contexts: tuple[int, ...] = (20,),
    option: Options = (),
    draw_seed: int | None = None,
    picture: Path | None = None,
    samples: int = 1_000_000,
    study: Switch = False,
    optuna: int = 0,
    journal: Path | None = None,
    best: int = 1,
    register: str | None = None,
    recipe: Path | None = None,
    corpus: Corpus = None,
    train_partition: Annotated[str, Parameter(name="--train")] = "train",
    valid_partition: Annotated[str, Parameter(name="--valid")] = "valid",
    registry: RegistryFile = None,
    json: AsJson = False,
    flags: RecipeFlags = _NONE_GIVEN,
) -> int:
    """Draw specs under a parameter budget; picture the draw, or try the specs and register the best.

    Example: zoo search --budget 20_000_000 --members 8
    Example: zoo search --budget 400_000 --draws 9 --study --epochs 4 --fraction 0.3 --register found --best 2
    Example: zoo search --budget 10_000_000 --contexts 20 --picture draws.png

    Args:
        budget: parameters of a model, or with --members of all of them together.
        members: of an ensemble; 0 draws single models.
        draws: single models to draw.
        architectures: names or wildcards; the built-in ones by default.
        contexts: to choose from.
        option: fixed options, such as activation=gelu.
        draw_seed: of the draw; that of the recipe if left out.
        picture: a file for samples against depth, parameters against depth, and samples against layer width, where
            models of the architecture mlp are drawn layer by layer; nothing else is drawn without --study.
        samples: drawn for the picture.
        study: train what was drawn by successive halving.
        optuna: trials of optuna's sampler in place of the draw.
        journal: file of optuna's study, which several processes may share.
        best: how many of the best to register.
        register: name for them, with -1, -2, ... behind it.
        recipe: a .toml or .json file; flags change single fields.
        corpus: folder of partitions in the HW1P2 layout.
        train_partition: to learn from.
        valid_partition: to judge by.
    """
    settings = recipe_of(Recipe() if recipe is None else Recipe.read(recipe), flags)
    options, seed = options_of(option), settings.seed if draw_seed is None else draw_seed
    draw = Draw(budget, members, draws, architectures, contexts, options, seed)
    if register and not study and not optuna:
        msg = f"expected --study or --optuna with --register {register}: what is only drawn is not trained"
        raise ValueError(msg)
    if picture is not None:
        from zoo.search.pictures import plot_samples

        save_picture(plot_samples(draw.samples(samples)), picture)
    if not study and not optuna:
        if picture is None:
            tell_specs(draw.specs(), json)
        return 0
    from zoo.registry import Registry
    from zoo.search.study import halving, one_by_one, optuna_study, optuna_trials
    from zoo.training.run import train as train_model

    frames, judged = (frames_of(corpus, part) for part in (train_partition, valid_partition))
    if optuna:
        tried = optuna_study(
            settings,
            frames,
            judged,
            budget=budget,
            trials=optuna,
            journal=journal,
            contexts=contexts,
            options=options,
            seed=seed,
        )
        trials = optuna_trials(tried)
    else:
        trials = halving(draw.specs(), settings, frames, judged, trainer=partial(one_by_one, progress=progress))
    _tell_trials(trials, json)
    for index, trial in enumerate(trials[:best] if register else (), start=1):
        checkpoint = trial.checkpoint or train_model(trial.spec, settings, frames, judged, progress=progress)
        tell(Registry(registry).register(f"{register}-{index}", checkpoint), False)
    return 0


def _tell_trials(trials: Sequence[Trial], json: bool) -> None:
    rows = [trial.row() for trial in trials]
    if json:
        print_json(rows)
        return
    shown = [{**row, "options": " ".join(f"{k}={v}" for k, v in row["options"].items())} for row in rows]
    print_table(shown, formats={"parameters": ",", "accuracy": ".4f", "loss": ".4f"})
