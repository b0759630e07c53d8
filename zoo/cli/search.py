"""Commands that look for architectures under a parameter budget: search, picture, study."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import zoo
from zoo._console import Answer, Table, progress
from zoo.cli.options import (
    NO_FLAGS,
    NO_PARTITIONS,
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
)
from zoo.cli.train import save_picture

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

    def specs(self, seed: int) -> list[zoo.Spec]:
        """The specs that are drawn with this seed."""
        from zoo.search.sample import random_budget, random_members

        settings: dict[str, Any] = {"contexts": self.contexts, "options": options_from(self.option), "seed": seed}
        settings["architectures"] = self.architectures or None
        if self.members:
            return random_members(self.max_parameters, self.members, **settings)
        return list(islice(random_budget(self.max_parameters, **settings), self.draws))


_NO_SAMPLING = Sampling()


def search(*, sampling: Sampling = _NO_SAMPLING, seed: int = 0) -> Answer:
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

    inputs = (2 * context + 1) * _FEATURES
    per_unit = 2 if options_from(option).get("batchnorm", True) else 1
    save_picture(plot_samples(draw_many(samples, max_parameters, inputs=inputs, per_unit=per_unit, seed=seed)), file)
    return Answer({"picture": str(file), "samples": samples}, [f"{samples:,} samples pictured in {file}"])


def study(
    *,
    sampling: Sampling = _NO_SAMPLING,
    draw_seed: int | None = None,
    optuna: int = 0,
    journal: Path | None = None,
    best: int = 1,
    save: str | None = None,
    recipe: RecipeFile = None,
    partitions: Partitions = NO_PARTITIONS,
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
    """
    from zoo.search.study import halving, one_by_one, optuna_study, optuna_trials

    home = zoo.Registry(registry)
    if save is not None:
        home.check_nameable(f"{save}-1")
    settings = recipe_from(recipe, flags, partitions.device)
    frames, valid = partitions.load()
    seed = settings.seed if draw_seed is None else draw_seed
    if optuna:
        limits: dict[str, Any] = {"budget": sampling.max_parameters, "contexts": sampling.contexts, "seed": seed}
        options = options_from(sampling.option)
        made = optuna_study(settings, frames, valid, trials=optuna, journal=journal, options=options, **limits)
        trials = optuna_trials(made)
    else:
        trials = halving(sampling.specs(seed), settings, frames, valid, trainer=partial(one_by_one, progress=progress))
    saved = []
    for index, trial in enumerate(trials[:best] if save else (), start=1):
        checkpoint = trial.checkpoint or zoo.train(trial.spec, settings, frames, valid, progress=progress)
        saved.append(home.register(f"{save}-{index}", checkpoint).reference)
    rows = [trial.row() for trial in trials]
    formats = {"parameters": ",", "accuracy": ".4f", "loss": ".4f"}
    table = Table([{**row, "options": _sizes(row["options"])} for row in rows], formats=formats)
    return Answer({"trials": rows, "saved": saved}, [table, *(f"saved as {reference}" for reference in saved)])


def _sizes(options: Any) -> str:
    return " ".join(f"{name}={options[name]}" for name in _SIZES if name in options)
