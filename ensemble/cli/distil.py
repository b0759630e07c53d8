"""The command that trains one model in place of an ensemble: distil."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ensemble
import zoo
from ensemble.cli.evaluate import interval
from ensemble.cli.predict import loaded
from zoo import _files
from zoo._console import Answer, Table, progress
from zoo.cli.options import (
    NO_FLAGS,
    Names,
    Options,
    Partitions,
    RecipeFile,
    RecipeFlags,
    RegistryFile,
    options_from,
    recipe_from,
    require_folders,
    spec_from,
)
from zoo.training.recipe import acting

_SIZES = ("width", "widths", "narrow")


def distil(
    name: str,
    /,
    *,
    save: str,
    spec: str | None = None,
    context: int | None = None,
    option: Options = (),
    max_parameters: float | None = None,
    students: int = 3,
    folds: int = 0,
    unlabelled: Names = (),
    metric: str = "accuracy",
    recipe: RecipeFile = None,
    partitions: Partitions = Partitions(),
    test: str = "test",
    directory: Path | None = None,
    registry: RegistryFile = None,
    flags: RecipeFlags = NO_FLAGS,
) -> Answer:
    """Train one model on what an ensemble answers, beside controls that learn the labels alone, and save it.

    The controls have the student's spec, recipe, seeds and epochs, and labels smoothed by .1 if the recipe does not say
    otherwise. The distillation ratio is the share of the ensemble's gain over the controls that arrived; its 95 %
    interval resamples whole recordings of the test partition. Only if the students are better than their controls, the
    interval of their gain above zero, the best of them on the validation frames is saved; otherwise the exit code is 1.

    Example: ensemble distil final --spec basic --option width=224 --epochs 60 --mask-time 8 --save student

    Args:
        name: an ensemble or a model in the registry.
        save: name to save the best student under.
        spec: an architecture (basic, bottleneck, cylinder, diamond, inverted_pyramid, pyramid, ..., or your own), or a
            whole spec as JSON or as a .json or .toml file. Beside an architecture, context and normalisation are those
            of the members, the context that of the one with the largest.
        context: frames on each side, in place of those.
        max_parameters: largest number of parameters of the student: the architecture is as wide as that allows.
        students: number of students, and of controls, each with a seed of its own.
        folds: also train the members anew on all recordings but those of one of so many folds, each by its own recipe;
            on a fold's recordings the students learn from those that were trained without it. 0 takes the members.
        unlabelled: further partitions to learn from, by the ensemble's answers; their labels are not used.
        metric: what the ratio is of: accuracy, log_loss, brier.
        test: partition on which students, controls and ensemble are compared.
        directory: folder for the runs; the same command resumes an interrupted one there.
    """
    home = zoo.Registry(registry)
    home.check_nameable(save)
    require_folders(directory)
    if students < 1:
        msg = f"expected at least one student, got {students}"
        raise ValueError(msg)
    final = loaded(home, name, device=partitions.device)
    known = final.members.classes
    train, valid = partitions.load(known)
    judged, *further = (partitions.read(each, known) for each in (test, *unlabelled))
    from ensemble.run import distillation

    # an architecture that is named has its own defaults, also where a member has the same one
    like = replace(final.members.widest[0], options={})
    wanted = _student(spec, context, options_from(option), max_parameters, train, like)
    settings = recipe_from(recipe, flags, partitions.device)
    fast = loaded(home, name, device=partitions.device, precision="auto")
    teacher = ensemble.run.teacher_of(fast)
    work: dict[str, Any] = {"metric": metric, "directory": directory, "progress": progress, "unlabelled": further}
    try:
        with _files.held(directory):
            if folds:  # whose training is long: what would be refused after it is refused before
                first = zoo.training.single_group(wanted, distillation.recipes_of(settings)[0])
                distillation.check_comparison(final, train, judged, metric)
                zoo.training.check_group(first, train, valid, teacher, further)
                found = _without_folds(home, final, train, valid, folds, directory)
                position = ensemble.rules.rule_for(final.rule, final.members.names)
                limits: dict[str, Any] = {"device": partitions.device, "precision": "auto"}
                own = ensemble.run.cross_fitted(found, train, folds=folds, rule=position, unlabelled=further, **limits)
                teacher = replace(own, parents=teacher.parents)
            seeds = range(settings.seed, settings.seed + students)
            result = ensemble.run.distil(
                final, wanted, settings, train, valid, judged, teacher=teacher, seeds=seeds, **work
            )
    except KeyboardInterrupt:
        resumed = f"the same command resumes in {directory}" if directory else "nothing is saved without --directory"
        raise KeyboardInterrupt(f"interrupted; {resumed}") from None
    saved = home.register(save, result.students[result.best]).reference if result.better else None
    return _answer(name, result, wanted, judged, test, saved)


def _student(
    text: str | None,
    context: int | None,
    options: Mapping[str, Any],
    max_parameters: float | None,
    frames: zoo.FrameSet,
    base: zoo.Spec,
) -> zoo.Spec:
    """The spec of the students; within a budget the widest of its architecture."""
    if text is None:
        msg = "expected --spec with the student's architecture or spec, got none"
        raise ValueError(msg)
    if max_parameters == math.inf:
        raise ValueError("expected a finite number for --max-parameters, got inf; leave it out for no limit")
    spec = spec_from(text, context, options, frames, base)
    if max_parameters is None:
        return spec
    named = text in zoo.list_architectures()
    if given := [size for size in _SIZES if named and size in options]:
        msg = f"expected no {', '.join(given)} beside --max-parameters, which gives the architecture its width"
        raise ValueError(msg)
    if named and "width" not in spec.options:
        msg = f"expected an architecture with a width beside --max-parameters, got {text!r}; give it a spec that fits"
        raise ValueError(msg)
    if named:
        sized = zoo.search.widest_spec(
            text,
            int(max_parameters),
            features=spec.features,
            classes=spec.classes,
            context=spec.context,
            depth=int(spec.options.get("depth", 1)),
            options=options,
        )
        return replace(spec, options=sized.options)
    if (count := zoo.count_parameters(spec)) > max_parameters:
        msg = f"expected a student of at most {max_parameters:,.0f} parameters, got {count:,}"
        raise ValueError(msg)
    return spec


def _without_folds(
    home: zoo.Registry,
    final: ensemble.Ensemble,
    train: zoo.FrameSet,
    valid: zoo.FrameSet,
    folds: int,
    directory: Path | None,
) -> list[zoo.Checkpoint]:
    """The members, each trained anew without the first fold, then all without the second, and so on."""
    trained: list[list[zoo.Checkpoint]] = []
    for about in final.members.about:
        entry = home.get(about.reference)
        if entry.recipe is None:
            msg = f"expected members with recipes to train them on folds, but {entry.reference} has none"
            raise ValueError(msg)
        own = zoo.Recipe.from_dict(acting(entry.recipe))
        place = None if directory is None else directory / "folds" / entry.id
        work: dict[str, Any] = {"seeds": [own.seed], "folds": folds, "directory": place, "progress": progress}
        trained.append(ensemble.cotrain(entry.spec, own, train, valid, **work))
    return [one[k] for k in range(folds) for one in trained]


def _answer(
    name: str, result: ensemble.run.Distillation, spec: zoo.Spec, frames: zoo.FrameSet, test: str, saved: str | None
) -> Answer:
    """Members, ensemble, students and controls, and how much arrived."""
    seeds, size = [(one.recipe or {})["seed"] for one in result.students], zoo.count_parameters(spec)
    lists: dict[str, list[dict[str, Any]]] = {
        "members": [{"name": member, **scores} for member, scores in result.member_scores.items()],
        "students": [{"seed": seed, **each} for seed, each in zip(seeds, result.student_scores, strict=True)],
        "controls": [{"seed": seed, **each} for seed, each in zip(seeds, result.control_scores, strict=True)],
    }
    teacher, gain, ratio = {"name": name, **result.teacher_scores}, result.gain, result.ratio
    data = lists | {
        "teacher": teacher,
        "metric": result.metric,
        "gain": gain.estimate,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "ratio": ratio.estimate,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "agreement": result.agreement,
        "spec": spec.to_dict(),
        "parameters": size,
        "saved": saved,
        "notes": [*result.notes],
    }
    rows = [{"model": one["name"], **_scores(one)} for one in lists["members"]]
    rows.append({"model": f"= {name}", **_scores(teacher)})
    for kind in ("student", "control"):
        rows += [{"model": f"{kind} of seed {one['seed']}", **_scores(one)} for one in lists[f"{kind}s"]]
    title, arrived = ensemble.judge.get_metric(result.metric).title, "none, it is no better than the controls"
    if not math.isnan(ratio.estimate):
        arrived = f"{ratio.estimate:.2f} ({interval(ratio.low, ratio.high, '.2f')}) of it arrived in the students"
    where = f"on {len(frames):,} frames of {frames.recordings:,} recordings of {test!r}"
    best = f"the student of seed {seeds[result.best]}, the best on the validation frames,"
    outcome = "not saved: students are better than their controls only where the interval of their gain is above zero"
    shown: list[Table | str] = [
        Table(rows, formats=dict.fromkeys(_scores(teacher), ".4f")),
        f"\ngain of students over controls in {title}: {gain.estimate:+.4f} ({interval(gain.low, gain.high)}), {where}",
        f"distillation ratio, of the gain of {name!r} over the controls: {arrived}",
        f"{best} predicts the class of {name!r} on {result.agreement:.2%} of the frames",
        f"saved as {saved}, {size:,} parameters" if saved else outcome,
    ]
    shown += [f"note: {note}" for note in result.notes]
    return Answer(data, shown, code=0 if saved else 1)


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("name", "seed")}
