"""Commands that make models and look for architectures: train, average, runs, search, picture, study."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import zoo
from zoo import _files, logs
from zoo._console import Answer, Table, progress
from zoo.cli.entries import described
from zoo.cli.options import (
    NO_FLAGS,
    Contexts,
    Names,
    Options,
    Partitions,
    RecipeFile,
    RecipeFlags,
    RegistryFile,
    flag_fields,
    options_from,
    recipe_from,
    require_folders,
    require_writable,
    spec_from,
)

_FEATURES = 27  # per frame of HW1P2, for which specs are drawn
_SIZES = ("width", "narrow", "widths", "depth")


@flag_fields
@dataclass(frozen=True)
class Sampling:
    """Specs to draw at random.

    Args:
        max_parameters: largest number of parameters of a model, or with --members of all of them together.
        members: draw the members of one ensemble, this many; 0 draws single models.
        draws: number of single models to draw.
        architectures: names or wildcards; every architecture that can be searched if left out.
        contexts: contexts to choose from, in frames on each side.
    """

    max_parameters: int = 10_000_000
    members: int = 0
    draws: int = 8
    architectures: Names = ()
    contexts: Contexts = (20,)
    option: Options = ()

    def __post_init__(self) -> None:
        if self.draws < 1 or self.members < 0:
            msg = f"expected --draws of 1 or more and --members of 0 or more, got {self.draws} and {self.members}"
            raise ValueError(msg)

    def specs(self, seed: int, **sizes: int) -> list[zoo.Spec]:
        """The specs that are drawn with this seed, by default for the features and classes of HW1P2."""
        from zoo.search.sample import random_budget, random_members

        settings: dict[str, Any] = {
            "contexts": self.contexts,
            "options": options_from(self.option),
            "seed": seed,
            **sizes,
        }
        settings["architectures"] = self.architectures or None
        if self.members:
            return random_members(self.max_parameters, self.members, **settings)
        return list(islice(random_budget(self.max_parameters, **settings), self.draws))


def train(
    name: str | None = None,
    /,
    *,
    spec: str | None = None,
    context: int | None = None,
    option: Options = (),
    from_: str | None = None,
    recipe: RecipeFile = None,
    partitions: Partitions = Partitions(),
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
        spec: an architecture (basic, bottleneck, cylinder, diamond, inverted_pyramid, mlp, pyramid, or your own), or a
            whole spec as JSON or as a .json or .toml file.
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
    require_folders(directory, tensorboard)
    home = zoo.Registry(registry)
    if name is not None:
        home.check_nameable(name)
    base = base_recipe = None
    own: tuple[str, ...] = ()
    if from_ is not None:
        entry = home.get(from_)
        if entry.recipe is None:
            msg = f"expected a model with a recipe, but {entry.reference} has none; give --spec and --recipe"
            raise ValueError(msg)
        base, base_recipe, own = entry.spec, entry.recipe, entry.classes
    frames, valid = partitions.load(own)
    wanted = spec_from(spec, context, options_from(option), frames, base)
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
    except zoo.TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return Answer({"trained": None, "error": str(error)}, [], code=1)
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
    partitions: Partitions = Partitions(),
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

    if picture is not None:
        require_writable(picture)
    home = zoo.Registry(registry)
    home.check_nameable(name)
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
    frames, valid = partitions.load(checkpoints[0].classes)
    with progress(f"averaging {len(checkpoints)} checkpoints"):
        mean = zoo.average(checkpoints, frames=frames, valid=valid, method=method, decay=decay)
    if picture is not None:
        from zoo.search.pictures import plot_line
        from zoo.training.averaging import losses_along

        _save_picture(plot_line(*losses_along(checkpoints[0], checkpoints[-1], valid)), picture)
    return described(home.register(name, mean))


def runs(folder: Path = Path(), /) -> Answer:
    """Compare the training runs under a folder; only settings in which they differ are shown.

    Example: zoo runs runs

    Args:
        folder: folder with the directories of runs.
    """
    table = zoo.read_runs(folder).astype(object)
    rows: list[Any] = table.where(table.notna(), None).to_dict("records")
    return Answer(rows, [Table(rows, formats={"best": ".4f", "loss": ".4f"})])


def search(*, sampling: Sampling = Sampling(), seed: int = 0) -> Answer:
    """Draw random specs under a parameter budget and print them.

    Example: zoo search --max-parameters 20_000_000 --members 8

    Args:
        seed: seed of the draw.
    """
    from zoo.models.spec import fast_count

    counted = [(spec, fast_count(spec)) for spec in sampling.specs(seed)]
    total, columns = sum(count for _, count in counted), ("architecture", "context", "parameters", "options")
    drawn = [(spec.architecture, spec.context, count, _sizes(spec.options)) for spec, count in counted]
    rows = [dict(zip(columns, line, strict=True)) for line in (*drawn, ("total", None, total, ""))]
    found = [{"spec": spec.to_dict(), "parameters": count} for spec, count in counted]
    return Answer({"specs": found, "parameters": total}, [Table(rows, formats={"parameters": ","})])


def picture(
    file: Path,
    /,
    *,
    max_parameters: int = 10_000_000,
    context: int = 20,
    option: Options = (),
    samples: int = 1_000_000,
    seed: int = 0,
) -> Answer:
    """Plot random MLPs under a parameter budget: samples and parameters against depth, samples against layer width.

    Layer by layer, each width is drawn from what the budget leaves (needs the extra `report`).

    Example: zoo picture draws.png --max-parameters 10_000_000

    Args:
        file: the picture, such as a .png or .pdf file.
        max_parameters: largest number of parameters of a model.
        context: frames on each side.
        samples: number of models to draw.
        seed: seed of the draw.
    """
    from zoo.search.pictures import plot_samples
    from zoo.search.sample import draw_many

    require_writable(file)
    inputs = (2 * context + 1) * _FEATURES
    per_unit = 2 if options_from(option).get("batchnorm", True) else 1
    _save_picture(plot_samples(draw_many(samples, max_parameters, inputs=inputs, per_unit=per_unit, seed=seed)), file)
    return Answer({"picture": str(file), "samples": samples}, [f"{samples:,} samples pictured in {file}"])


def study(
    *,
    sampling: Sampling = Sampling(),
    draw_seed: int | None = None,
    optuna: int = 0,
    journal: Path | None = None,
    best: int = 1,
    save: str | None = None,
    jobs: int = 1,
    ray: bool = False,
    run: Path | None = None,
    recipe: RecipeFile = None,
    partitions: Partitions = Partitions(),
    registry: RegistryFile = None,
    flags: RecipeFlags = NO_FLAGS,
) -> Answer:
    """Train random specs by successive halving, or with optuna, and save the best.

    Example: zoo study --max-parameters 400_000 --draws 9 --epochs 4 --fraction 0.3 --save found --best 2

    Args:
        draw_seed: seed of the draw; the recipe's seed if left out.
        optuna: number of trials of optuna's sampler, in place of successive halving (needs the extra `search`).
        journal: file of optuna's study, which several processes may share.
        best: number of models to save.
        save: name to save the best under, followed by -1, -2, ...; nothing is saved if left out.
        jobs: processes that train, a spec each at a time; what they learn is the same to the bit.
        ray: actors of a Ray cluster do, the one that $RAY_ADDRESS names, otherwise one on this machine (needs the extra
            `ray`).
        run: folder in which what was trained is kept, so that the same command goes on from it; on a cluster, one that
            all machines see.
    """
    from zoo.search.study import halving, one_by_one, optuna_study, optuna_trials
    from zoo.workers import Processes, Ray, Workers

    home = zoo.Registry(registry)
    if save is not None:
        home.check_nameable(f"{save}-1")
    if optuna and (jobs != 1 or ray or run):
        msg = "expected no --jobs, --ray and --run beside --optuna, whose study several processes share by --journal"
        raise ValueError(msg)
    require_folders(run)
    if ray and jobs != 1:
        msg = "expected either --jobs or --ray, got both"
        raise ValueError(msg)
    workers: Workers | None = Ray() if ray else Processes(jobs) if jobs != 1 else None
    settings = recipe_from(recipe, flags, partitions.device)
    frames, valid = partitions.load()
    seed = settings.seed if draw_seed is None else draw_seed
    if optuna:
        limits: dict[str, Any] = {"budget": sampling.max_parameters, "contexts": sampling.contexts, "seed": seed}
        options = options_from(sampling.option)
        made = optuna_study(settings, frames, valid, trials=optuna, journal=journal, options=options, **limits)
        trials = optuna_trials(made)
    else:
        specs = sampling.specs(seed, features=frames.features.shape[1], classes=len(frames.classes))
        trainer = partial(one_by_one, workers=workers, folder=run, progress=progress)
        with _files.held(run):  # between its rounds as well
            trials = halving(specs, settings, frames, valid, trainer=trainer)
    saved = []
    for index, trial in enumerate(trials[:best] if save else (), start=1):
        checkpoint = trial.checkpoint or zoo.train(trial.spec, settings, frames, valid, progress=progress)
        saved.append(home.register(f"{save}-{index}", checkpoint).reference)
    rows = [trial.row() for trial in trials]
    formats = {"parameters": ",", "accuracy": ".4f", "loss": ".4f"}
    table = Table([{**row, "options": _sizes(row["options"])} for row in rows], formats=formats)
    return Answer({"trials": rows, "saved": saved}, [table, *(f"saved as {reference}" for reference in saved)])


def _save_picture(axes: Any, path: Path) -> None:
    """Write the figure that these axes belong to."""
    axes.figure.savefig(path, dpi=150)


def _sizes(options: Any) -> str:
    return " ".join(f"{name}={options[name]}" for name in _SIZES if name in options)
