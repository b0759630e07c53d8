"""Distillation: one model that learns what an ensemble answers, beside controls that learn the labels alone.

The ensemble runs in its measured forms, once per batch for all students that are trained together.

References:
    Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv:1503.02531, 2015.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import zoo
from ensemble.judge.metrics import METRICS, Answers, get_metric
from ensemble.judge.significance import Interval, cluster_bootstrap, percentile_ends, piles, sums_by_group
from ensemble.judge.tables import provenance
from ensemble.outputs import MemberOutputs
from ensemble.rules.fitted import rule_for
from ensemble.rules.pooling import mean
from ensemble.rules.table import FittedRule, Rule
from ensemble.run.collection import predictions
from ensemble.run.combined import Ensemble
from ensemble.run.cotraining import cotrain, fold_of
from ensemble.run.members import Members, class_order, content_digest, from_checkpoints
from zoo import _files
from zoo._names import checked
from zoo.logs import Progress

Scores = Mapping[str, float]  # metric -> value on the frames that are compared on
SMOOTHING = 0.1  # of the labels of controls, where the recipe has none


@checked
def teacher_of(final: Ensemble) -> zoo.training.Teacher:
    """An ensemble as a teacher, for `zoo.train` and `ensemble.cotrain`.

    Members may differ in context: each sees the middle of the windows. A resumed run is the same to the bit where the
    members run in the same forms; a measured choice is kept for the machine.

    Raises:
        ValueError: members whose frames are prepared differently, which cannot share one augmented window.
    """
    members = final.members
    if len(ways := members.widest) > 1:
        known = ", ".join(f"{spec.normalisation!r} and {spec.padding!r}" for spec in ways)
        msg = (
            f"expected members that share a normalisation and a padding, as the student's windows have one, got {known}"
        )
        raise ValueError(f"{msg}; store their answers for training without augmentation: zoo.training.Teacher.stored")

    rule = rule_for(final.rule, members.names)

    def predict(windows: Tensor, frames: Tensor) -> Tensor:
        return rule.of_logs(members.log_probabilities(windows))

    return zoo.training.Teacher(predict, fingerprint=_digest(final), **_wanted(members))


@checked
def cross_fitted(
    checkpoints: Sequence[zoo.Checkpoint],
    train: zoo.FrameSet,
    *,
    folds: int,
    rule: Rule = mean,
    unlabelled: Sequence[zoo.FrameSet] = (),
    **options: Any,
) -> zoo.training.Teacher:
    """A teacher of whose members none judges a frame that it was trained on.

    On its own training frames a teacher is nearly always right, so that its answers there say little more than the
    labels do. Here the rule combines, for a frame of training, the members that were trained without its fold. Windows
    are mixed within a fold.

    Args:
        checkpoints: `folds` times M, as `ensemble.cotrain(..., folds=folds)` returns them: the M members that were
            trained without the first fold, then those without the second, and so on.
        train: all training frames, of the students as well.
        folds: number of folds.
        rule: (M, N, C) probabilities -> (N, C).
        unlabelled: further frames that the students learn from. No member was trained on them: their answers are the
            mean over the folds.
        options: of `Members`, such as `precision`.

    Raises:
        ValueError: a member that was not trained on exactly the training frames outside its fold, or members whose
            frames are prepared differently.
    """
    M, rest = divmod(len(checkpoints), folds)
    if rest or not M:
        msg = f"expected as many members for each of {folds} folds, got {len(checkpoints)} in all"
        raise ValueError(msg)
    fold = fold_of(train, folds)
    for k in range(folds):
        outside = train.select((fold != k).nonzero().flatten()).fingerprint
        for m, one in enumerate(checkpoints[k * M : (k + 1) * M]):
            if one.trained_on != outside:
                msg = (
                    f"expected member {m} of fold {k} to be trained on the frames outside that fold, and on no others, "
                )
                raise ValueError(msg + "got one trained on others; train them with ensemble.cotrain(..., folds=...)")
    names = [f"fold {k} member {m}" for k in range(folds) for m in range(M)]
    members = from_checkpoints(dict(zip(names, checkpoints, strict=True)), **options)
    whole = teacher_of(Ensemble(members, mean))
    own = rule_for(rule, members.names[:M])
    groups = torch.cat([fold[train.groups], fold.new_full((sum(map(len, unlabelled)),), folds)])  # (N,)
    shares = torch.cat([torch.eye(folds), torch.full((1, folds), 1 / folds)])[groups].to(members.device)  # (N, folds)

    def predict(windows: Tensor, frames: Tensor) -> Tensor:
        logs = members.log_probabilities(windows).view(folds, M, len(windows), -1)
        rows = torch.stack([own.of_logs(some) for some in logs])  # (folds, B, C)
        return torch.einsum("bk,kbc->bc", shares[frames.to(shares.device)], rows)

    of_frames = tuple(each.fingerprint for each in (train, *unlabelled))
    digest = content_digest([whole.fingerprint, own.to_json(), folds])
    return replace(whole, predict=predict, fingerprint=digest, of_frames=of_frames, groups=groups)


def _wanted(members: Members) -> dict[str, Any]:
    """What a teacher of these members wants of the windows, and says."""
    ids = [about.reference.partition("@")[2] for about in members.about]
    known: dict[str, Any] = {"classes": members.classes, "parents": tuple(id for id in ids if id)}
    for spec in members.widest:
        known |= {"context": spec.context, "normalisation": spec.normalisation, "padding": spec.padding}
    return known


def _digest(final: Ensemble) -> str:
    """64 hex digits that change with what an ensemble answers; empty where that cannot be read off it."""
    digests = final.members.digests
    return content_digest((digests, final.members.classes, final.rule)) if all(digests) else ""


@dataclass(frozen=True, eq=False)
class Distillation:
    """Students, their controls, and how much of the ensemble's gain arrived, on frames that nobody was trained on."""

    students: tuple[zoo.Checkpoint, ...]  #: one for each seed
    controls: tuple[zoo.Checkpoint, ...]  #: likewise: the same, trained on the labels alone
    member_scores: Mapping[str, Scores]  #: of the ensemble's members, by their names
    teacher_scores: Scores  #: of the ensemble
    student_scores: tuple[Scores, ...]
    control_scores: tuple[Scores, ...]
    metric: str  #: that gain and ratio are of
    gain: Interval  #: of the students' mean over the controls' mean, positive where students are better
    #: the distillation ratio, (student - control) / (teacher - control); NaN where the teacher is no better than the
    #: controls, and ends are infinite where that is so in too many resamples to tell
    ratio: Interval
    best: int  #: the position of the student that is best on its validation frames
    agreement: float  #: fraction of the frames on which that student predicts the ensemble's class
    notes: tuple[str, ...] = ()  #: what makes these figures too good, one sentence each

    @property
    def better(self) -> bool:
        """Whether the students are better than the controls: the interval of their gain lies above zero."""
        return self.gain.low > 0


@checked
def distil(
    final: Ensemble,
    spec: zoo.Spec,
    recipe: zoo.Recipe,
    train: zoo.FrameSet,
    valid: zoo.FrameSet,
    test: zoo.FrameSet,
    *,
    teacher: zoo.training.Teacher | None = None,
    unlabelled: Sequence[zoo.FrameSet] = (),
    seeds: Iterable[int] = range(3),
    metric: str = "accuracy",
    together: int | None = None,
    directory: str | Path | None = None,
    progress: Progress | None = None,
) -> Distillation:
    """Train students of an ensemble and their controls, and compare the two on other frames.

    A control has the student's spec, recipe, seeds and epochs, and learns the labels alone, smoothed; see `recipes_of`.

    Args:
        final: the ensemble.
        spec: of the students.
        recipe: how to train them; `temperature` and `hard_weight` act on the students only.
        train: frames to learn from, with labels.
        valid: frames by which the best epoch, and the best student, is chosen.
        test: frames with labels to compare on, in which nobody has a part.
        teacher: what the students learn from; None for the ensemble itself. See `cross_fitted`.
        unlabelled: further frames that the students learn from, by the teacher's answers.
        seeds: of the initialisation and dropout, one for each student and its control.
        metric: a name in `METRICS` of a mean over frames.
        together, directory, progress: as in `ensemble.cotrain`; students and controls have a folder each.

    Raises:
        ValueError: as in `ensemble.cotrain` and `teacher_of`; a metric that is no mean over frames, or no labels.
    """
    check_comparison(final, train, test, metric)
    learner, control = recipes_of(recipe)
    shared: dict[str, Any] = {"seeds": tuple(seeds), "together": together, "progress": progress}
    folder = None if directory is None else Path(directory)
    places = [None if folder is None else folder / name for name in ("students", "controls")]
    lesson: dict[str, Any] = {"teacher": teacher or teacher_of(final), "unlabelled": unlabelled}
    with _files.held(folder):
        students = cotrain(spec, learner, train, valid, directory=places[0], **lesson, **shared)
        controls = cotrain(spec, control, train, valid, directory=places[1], **shared)
    found = compared(final, students, controls, test, metric)
    seen = any(each.features.shape == test.features.shape and each.features.equal(test.features) for each in unlabelled)
    note = "students learnt from these frames, without their labels; controls and members did not"
    return replace(found, notes=(*found.notes, *([note] if seen else [])))


def check_comparison(final: Ensemble, train: zoo.FrameSet, test: zoo.FrameSet, metric: str) -> None:
    """Raise ValueError where `distil` could not compare on these frames, or by this metric; one recording is tried."""
    if get_metric(metric).of is not Answers:
        msg = f"expected a metric that is a mean over frames, such as accuracy or log_loss, got {metric!r}"
        raise ValueError(msg)
    if test.labels is None:
        msg = "expected frames with labels to compare on, got none"
        raise ValueError(msg)
    _answers(final.members, test.select(torch.tensor([0])), train.classes, rule_for(final.rule, final.members.names))


def recipes_of(recipe: zoo.Recipe) -> tuple[zoo.Recipe, zoo.Recipe]:
    """The recipe of a student and that of its control, which differ in what is learnt alone.

    Label smoothing is of labels: a student without a share of those has none, its control .1 if the recipe has none.
    """
    hard = recipe.label_smoothing or SMOOTHING
    learner = recipe if recipe.hard_weight else replace(recipe, label_smoothing=0.0)
    return learner, replace(recipe, temperature=1.0, hard_weight=0.0, label_smoothing=hard)


def compared(
    final: Ensemble,
    students: Sequence[zoo.Checkpoint],
    controls: Sequence[zoo.Checkpoint],
    test: zoo.FrameSet,
    metric: str = "accuracy",
) -> Distillation:
    """Judge students and controls, as many of each, that exist already; arguments and errors are those of `distil`."""
    own, S, classes = get_metric(metric), len(students), students[0].classes
    by = {name: one for name, one in METRICS.items() if one.of is Answers} | {metric: own}
    names = [f"{what} {m}" for what in ("student", "control") for m in range(S)]
    trained = from_checkpoints(dict(zip(names, [*students, *controls], strict=True)), device=test.features.device)
    rule = rule_for(final.rule, final.members.names)
    alone, _ = _answers(trained, test, classes)
    each, together = _answers(final.members, test, classes, rule)
    assert together is not None  # since there is a rule
    scores = [{name: one.over([answers]) for name, one in by.items()} for answers in (*alone, *each, together)]
    frames = np.stack([np.asarray(own.function(answers), dtype=np.float64) for answers in (*alone, together)])
    parts = np.stack([frames[:S].mean(axis=0), frames[S:-1].mean(axis=0), frames[-1]], axis=1)  # (N, 3)
    student, control, teacher = own.goods(parts.mean(axis=0)).tolist()
    drawn = own.goods(cluster_bootstrap(*sums_by_group(parts, piles(test.groups.numpy())[0])))  # (R, 3)
    best, about = _best(students), (*trained.about, *final.members.about)
    empty = torch.empty(len(about), 0, len(classes))
    of = MemberOutputs(empty, (*names, *final.members.names), classes, fingerprint=test.fingerprint, about=about)
    return Distillation(
        students=tuple(students),
        controls=tuple(controls),
        member_scores=dict(zip(final.members.names, scores[2 * S : -1], strict=True)),
        teacher_scores=scores[-1],
        student_scores=tuple(scores[:S]),
        control_scores=tuple(scores[S : 2 * S]),
        metric=metric,
        gain=Interval(student - control, *percentile_ends(drawn[:, 0] - drawn[:, 1]).tolist()),
        ratio=_ratio(student - control, teacher - control, drawn),
        best=best,
        agreement=float((alone[best].guesses == together.guesses).mean()),
        notes=(*provenance(of, {"the ensemble": rule}),),
    )


def _answers(
    members: Members, frames: zoo.FrameSet, classes: Sequence[str], rule: FittedRule | None = None
) -> tuple[list[Answers], Answers | None]:
    """What each member answers on frames with labels, and their rule, if there is one; classes in this order."""
    assert frames.labels is not None  # checked before the work
    own = class_order(members.classes, classes, "members of the students' classes", "the members", "the students")
    order = class_order(classes, frames.classes, "frames of the students' classes", "the students", "the frames")
    labels = (frames.labels.cpu() if order is None else order[frames.labels.cpu()]).numpy()
    columns, pieces, rows = slice(None) if own is None else own.tolist(), [], []
    for logs in predictions(members, frames):
        pieces.append(logs[..., columns].exp().cpu())
        rows += [] if rule is None else [rule.of_logs(logs)[:, columns].cpu()]
    whole = [*torch.cat(pieces, dim=1).numpy(), *([torch.cat(rows).numpy()] if rows else [])]  # (N, C) each
    found = [Answers(each, labels, each.argmax(axis=1)) for each in whole]
    return found[: len(members)], found[-1] if rows else None


def _best(students: Sequence[zoo.Checkpoint]) -> int:
    """The position of the student that is best on its validation frames, by the monitor of its recipe."""
    monitor = zoo.Recipe.from_dict(students[0].recipe or {}).monitor
    values = [float(one.metrics[monitor]["value"]) for one in students]
    return values.index(max(values) if monitor == "valid/accuracy" else min(values))


def _ratio(arrived: float, possible: float, drawn: np.ndarray[Any, Any]) -> Interval:
    """The ratio of two differences, with the interval of its resamples.

    Resamples without a positive divisor count at both ends: where they are too many, the end is infinite.
    """
    above, below = drawn[:, 0] - drawn[:, 1], drawn[:, 2] - drawn[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = above / below
    low, high = (np.where(below > 0, ratios, end) for end in (-math.inf, math.inf))
    if not possible > 0 or np.isnan(drawn).any():
        return Interval(arrived / possible if possible > 0 else math.nan, math.nan, math.nan)
    ends = np.quantile(low, 0.025, method="lower"), np.quantile(high, 0.975, method="higher")
    return Interval(arrived / possible, *map(float, ends))
