"""Distillation: ensembles as teachers, folds that keep members from their own frames, and what arrived in students."""

import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ensemble
import zoo
from ensemble.run import cross_fitted, distil, teacher_of
from ensemble.run.cotraining import fold_of
from ensemble.run.distillation import SMOOTHING, _ratio
from zoo import FrameSet, Recipe, Spec, _files
from zoo.search.study import one_by_one
from zoo.training.step import Batches

SPEC = Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 1})
WIDER = replace(SPEC, context=3)
QUICK = Recipe(epochs=2, batch_size=32, learning_rate=0.01)


def final_of(*specs: Spec, classes: str = "abcd", **options: Any) -> ensemble.Ensemble:
    """The mean of a network, not trained, of each spec."""
    models: dict[str, nn.Module] = {f"m{k}": zoo.build(spec, seed=k).eval() for k, spec in enumerate(specs)}
    known = {f"m{k}": spec for k, spec in enumerate(specs)}
    return ensemble.Ensemble(ensemble.from_modules(models, classes=classes, specs=known, **options), ensemble.mean)


def bare(frames: FrameSet) -> FrameSet:
    """Two of the recordings, without labels."""
    return replace(frames.select(torch.tensor([0, 4])), labels=None)


@pytest.mark.parametrize("plan", ["auto", "loop", "stack"])
def test_a_teacher_says_what_its_ensemble_says(plan: str, frames: FrameSet) -> None:
    """Of windows of the largest context; each member sees the middle of them."""
    final = final_of(SPEC, WIDER, SPEC, plan=plan)
    teacher = teacher_of(final)
    assert (teacher.context, teacher.normalisation, teacher.classes) == (3, "mean_std", (*"abcd",))
    windows = zoo.windows(frames, torch.arange(len(frames)), 3)
    found = teacher.predict(windows, torch.arange(len(frames)))
    torch.testing.assert_close(found, torch.from_numpy(final.predict_proba(frames)), rtol=1e-5, atol=1e-6)
    others = [final_of(SPEC, WIDER), ensemble.Ensemble(final.members, ensemble.log_mean)]
    prints = [teacher.fingerprint, *(teacher_of(each).fingerprint for each in others)]
    assert len({*prints}) == 3
    assert teacher_of(final_of(SPEC, WIDER, SPEC)).fingerprint == teacher.fingerprint


def test_the_ensemble_teaches_in_its_own_order_of_classes(frames: FrameSet) -> None:
    """Students of the same networks with their outputs in another order end alike."""
    final, order = final_of(SPEC, WIDER), torch.tensor([2, 0, 3, 1])
    models = {member.name: member.module for member in final.members}
    for model in models.values():
        last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
        last.weight.data, last.bias.data = last.weight[order].detach(), last.bias[order].detach()
    specs = {member.name: member.spec for member in final.members}
    moved = ensemble.Ensemble(ensemble.from_modules(models, classes="cadb", specs=specs), ensemble.mean)  # type: ignore[arg-type]  # they have specs
    first, second = (
        zoo.train(SPEC, QUICK, frames, frames, teacher=teacher_of(each)) for each in (final_of(SPEC, WIDER), moved)
    )
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(tensor, second.tensors[name], rtol=1e-3, atol=1e-4)


def test_members_that_are_prepared_differently_cannot_teach(frames: FrameSet) -> None:
    """Except by answers that are stored, where windows are not augmented."""
    final = final_of(SPEC, replace(SPEC, normalisation="mean"))
    with pytest.raises(ValueError, match=r"share a normalisation .* 'mean' and 'recording'; store their answers"):
        teacher_of(final)
    answers, names = torch.from_numpy(final.predict_proba(frames)), final.members.classes
    stored = zoo.training.Teacher.stored(answers, [frames], classes=names, top=4)
    assert zoo.train(SPEC, QUICK, frames, frames, teacher=stored).kind == "distilled"


def test_students_of_a_registrys_ensemble_know_their_parents(frames: FrameSet, tmp_path: Path) -> None:
    """By the ids of the versions."""
    registry = zoo.Registry(tmp_path / "registry.json")
    entries = [registry.register(f"m{k}", zoo.build(SPEC, seed=k), spec=SPEC, classes=[*"abcd"]) for k in range(2)]
    teacher = teacher_of(ensemble.Ensemble(ensemble.load(registry, "m*"), ensemble.mean))
    entry = registry.register("student", zoo.train(SPEC, QUICK, frames, frames, teacher=teacher))
    assert (entry.kind, [*entry.parents]) == ("distilled", [one.id for one in entries])
    assert registry.verify() == []


@pytest.fixture(scope="module")
def folded() -> tuple[FrameSet, list[zoo.Checkpoint]]:
    """Six recordings, and two members for each of three folds."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (120,), generator=generator)
    features = torch.randn(120, 6, generator=generator) + nn.functional.one_hot(labels, 6) * 2
    frames = FrameSet(features, labels, torch.tensor([0, 10, 30, 60, 80, 81, 120]), (*"abcd",))
    return frames, ensemble.cotrain(SPEC, QUICK, frames, frames, seeds=range(2), folds=3)


def test_no_frame_is_judged_by_a_member_that_was_trained_on_it(
    folded: tuple[FrameSet, list[zoo.Checkpoint]],
) -> None:
    """Against a loop over frames; a frame without a label has the answers of all."""
    frames, members = folded
    fold, more = fold_of(frames, 3), bare(frames)
    assert fold.bincount().tolist() == [2, 2, 2]
    sets = {frames.select((fold != k).nonzero().flatten()).fingerprint: fold != k for k in range(3)}
    trained = [sets[one.trained_on] for one in members]  # (U,) whether a member was trained on a recording
    answers = [one.to_module()(zoo.windows(frames, torch.arange(120), 1)).softmax(-1).detach() for one in members]
    teacher = cross_fitted(members, frames, folds=3, unlabelled=[more])
    found = teacher.predict(zoo.windows(frames, torch.arange(120), 1), torch.arange(120))
    for frame, recording in enumerate(frames.groups.tolist()):
        clean = [p[frame] for p, on in zip(answers, trained, strict=True) if not on[recording]]
        assert len(clean) == 2
        torch.testing.assert_close(found[frame], torch.stack(clean).mean(0), rtol=1e-5, atol=1e-6)
    further = torch.arange(len(more))
    found = teacher.predict(zoo.windows(more, further, 1), 120 + further)
    every = torch.stack([one.to_module()(zoo.windows(more, further, 1)).softmax(-1) for one in members])
    torch.testing.assert_close(found, every.mean(0).detach(), rtol=1e-5, atol=1e-6)
    student = zoo.train(SPEC, replace(QUICK, mask_time=1), frames, frames, teacher=teacher, unlabelled=[more])
    assert student.kind == "distilled"


def test_folds_that_are_not_those_of_the_members_are_refused(folded: tuple[FrameSet, list[zoo.Checkpoint]]) -> None:
    """Members of another fold, or of other frames."""
    frames, members = folded
    with pytest.raises(ValueError, match="member 0 of fold 0 to be trained on the frames outside that fold"):
        cross_fitted(members[::-1], frames, folds=3)
    with pytest.raises(ValueError, match="expected member"):
        cross_fitted(members[:4], frames, folds=2)
    with pytest.raises(ValueError, match="for each of 4 folds, got 6"):
        cross_fitted(members, frames, folds=4)
    teacher = cross_fitted(members, frames, folds=3)
    with pytest.raises(ValueError, match="got one of others"):
        zoo.train(SPEC, QUICK, frames.select(torch.arange(5)), frames, teacher=teacher)
    for folds in (1, 7):
        with pytest.raises(ValueError, match=rf"2 folds to as many as there are recordings \(6\), got {folds}"):
            ensemble.cotrain(SPEC, QUICK, frames, frames, folds=folds)


@pytest.mark.parametrize("own", [False, True])
def test_windows_are_mixed_within_folds(own: bool, folded: tuple[FrameSet, list[zoo.Checkpoint]]) -> None:
    """So the members that answer were trained on neither part; what is the last of its fold stays itself."""
    frames, members = folded
    more = bare(frames)
    teacher = cross_fitted(members, frames, folds=3, unlabelled=[more])
    kinds = torch.cat([fold_of(frames, 3)[frames.groups], torch.full((len(more),), 3)])
    spec = replace(SPEC, context=0, normalisation="none")
    sets = [  # a frame's features are its number
        replace(each, features=torch.arange(first, first + len(each)).float()[:, None].repeat(1, 6))
        for each, first in ((frames, 0), (more, len(frames)))
    ]
    asked: list[Tensor] = []

    def predict(windows: Tensor, at: Tensor) -> Tensor:
        asked.append(at)
        return torch.full((len(windows), 4), 0.25)

    recipes = [Recipe(batch_size=50, mix_up=1.0, seed=seed, order_seed=None if own else 0) for seed in (0, 1)]
    stand_in, mixed = replace(teacher, predict=predict, context=0), 0
    for [batch] in Batches(sets[0], spec, recipes, stand_in, sets[1:]).epoch(1):
        assert batch.share is not None
        at, share = asked[-1], batch.share.flatten()
        partner = (batch.windows.flatten(0, -2)[:, 0] - share * at) / (1 - share)
        clear = share < 0.9
        assert torch.equal(kinds[partner[clear].round().long()], kinds[at[clear]])
        mixed += int((partner[clear].round().long() != at[clear]).sum())
    assert mixed > 50
    recipe = replace(QUICK, mix_up=0.5, mask_time=1)
    assert zoo.train(SPEC, recipe, frames, frames, teacher=teacher, unlabelled=[more]).kind == "distilled"


def test_the_rule_of_the_folds_may_have_weights(folded: tuple[FrameSet, list[zoo.Checkpoint]]) -> None:
    """With all weight on the second member of each fold, that one decides."""
    frames, members = folded
    teacher = cross_fitted(members, frames, folds=3, rule=ensemble.WeightedMean([0.0, 1.0]))
    windows, fold = zoo.windows(frames, torch.arange(120), 1), fold_of(frames, 3)[frames.groups]
    found = teacher.predict(windows, torch.arange(120))
    alone = torch.stack([one.to_module()(windows).softmax(-1).detach() for one in members[1::2]])
    torch.testing.assert_close(found, alone[fold, torch.arange(120)], rtol=1e-5, atol=1e-6)


def test_students_and_controls_differ_in_the_teacher_alone(frames: FrameSet, tmp_path: Path) -> None:
    """Same spec, seeds, epochs; the controls' labels are smoothed. Done again in the directory, nothing is trained."""
    recipe = replace(QUICK, temperature=2.0, mask_time=1)
    work: dict[str, Any] = {"seeds": [3, 5], "directory": tmp_path, "together": 2}
    found = distil(final_of(SPEC, WIDER), SPEC, recipe, frames, frames, frames, **work)
    assert [one.kind for one in (*found.students, *found.controls)] == ["distilled"] * 2 + ["trained"] * 2
    for student, control, seed in zip(found.students, found.controls, (3, 5), strict=True):
        own, other = Recipe.from_dict(student.recipe or {}), Recipe.from_dict(control.recipe or {})
        assert own == replace(recipe, seed=seed, order_seed=0)
        assert other == replace(own, temperature=1.0, label_smoothing=SMOOTHING)
    again = distil(final_of(SPEC, WIDER), SPEC, recipe, frames, frames, frames, **work)
    assert [one.digest for one in again.students] == [one.digest for one in found.students]
    with pytest.raises(ValueError, match="another teacher"):
        distil(final_of(SPEC, SPEC), SPEC, recipe, frames, frames, frames, **work)
    half = distil(final_of(SPEC), SPEC, replace(QUICK, hard_weight=0.5, label_smoothing=0.2), *[frames] * 3, seeds=[0])
    recipes = [Recipe.from_dict(one.recipe or {}) for one in (*half.students, *half.controls)]
    assert [(one.hard_weight, one.label_smoothing) for one in recipes] == [(0.5, 0.2), (0.0, 0.2)]


@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
def test_what_arrived_is_the_share_of_the_gain(metric: str, frames: FrameSet) -> None:
    """By hand from the scores; the interval is that of a loop over resampled recordings."""
    better = zoo.train(WIDER, replace(QUICK, epochs=20), frames, frames)
    final = ensemble.Ensemble(ensemble.run.from_checkpoints({"a": better}), ensemble.mean)
    found = distil(final, SPEC, QUICK, frames, frames, frames, seeds=range(2), metric=metric)
    sign = 1 if metric == "accuracy" else -1
    student, control = (np.mean([s[metric] for s in each]) for each in (found.student_scores, found.control_scores))
    teacher = found.teacher_scores[metric]
    assert found.teacher_scores["accuracy"] == pytest.approx(final.score(frames))
    assert found.teacher_scores == found.member_scores["a"]
    assert found.gain.estimate == pytest.approx(sign * (student - control))
    assert found.ratio.estimate == pytest.approx((student - control) / (teacher - control))
    assert found.ratio.low <= found.ratio.estimate <= found.ratio.high
    values = [one.metrics["valid/accuracy"]["value"] for one in found.students]
    assert values[found.best] == max(values)
    best = found.students[found.best].to_module()(zoo.windows(frames, torch.arange(138), 1)).argmax(1)
    same = torch.from_numpy(final.predict_proba(frames).argmax(axis=1)) == best
    assert found.agreement == pytest.approx(float(same.double().mean()))


def test_the_interval_of_a_ratio_may_have_no_ends() -> None:
    """Where the teacher is no better than the controls, or in too many resamples; columns student, control, teacher."""
    sure = np.tile([[0.6, 0.5, 0.7]], (1000, 1))
    assert _ratio(0.1, 0.2, sure) == ensemble.judge.Interval(0.5, pytest.approx(0.5), pytest.approx(0.5))
    assert math.isnan(_ratio(0.1, 0.0, sure).estimate)
    some = sure.copy()
    some[:20, 2] = 0.4  # 2 % of the resamples: the ends are finite still
    assert math.isfinite(_ratio(0.1, 0.2, some).low)
    some[:60, 2] = 0.4
    assert (_ratio(0.1, 0.2, some).low, _ratio(0.1, 0.2, some).high) == (-math.inf, math.inf)


def test_what_cannot_be_compared_is_refused_before_the_work(frames: FrameSet) -> None:
    """A metric that is no mean over frames, and frames without labels."""
    with pytest.raises(ValueError, match=r"a mean over frames, .* got 'macro_f1'"):
        distil(final_of(SPEC), SPEC, QUICK, frames, frames, frames, metric="macro_f1")
    with pytest.raises(ValueError, match="frames with labels to compare on"):
        distil(final_of(SPEC), SPEC, QUICK, frames, frames, bare(frames))
    with pytest.raises(ValueError, match=r"frames of the students' classes, got \['a'\] only in the students"):
        distil(final_of(SPEC), SPEC, QUICK, frames, frames, replace(frames, classes=(*"xbcd",)))
    members = ensemble.from_modules({"m": zoo.build(SPEC, seed=0).eval()}, classes="abcd")
    with pytest.raises(ValueError, match="a spec for member 'm'"):
        distil(ensemble.Ensemble(members, ensemble.mean), SPEC, QUICK, frames, frames, frames)


def test_the_members_run_once_for_all_students(frames: FrameSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four students that share their batches cost the teacher what one does."""
    final, counts = final_of(SPEC, SPEC), []
    run = ensemble.Members.log_probabilities

    def counted(self: ensemble.Members, x: Tensor) -> Tensor:
        calls.append(len(x))
        return run(self, x)

    monkeypatch.setattr(ensemble.Members, "log_probabilities", counted)
    for students in (1, 4):
        calls: list[int] = []
        teacher = teacher_of(final)
        ensemble.cotrain(SPEC, QUICK, frames, frames, seeds=range(students), together=students, teacher=teacher)
        counts.append(sum(calls))
    assert counts[0] == counts[1]


def test_figures_that_are_too_good_are_said_to_be(frames: FrameSet) -> None:
    """Frames that students, controls or members were trained on; frames whose features the students have seen."""
    better = zoo.train(WIDER, QUICK, frames, frames)
    final = ensemble.Ensemble(ensemble.run.from_checkpoints({"a": better}), ensemble.mean)
    [note] = distil(final, SPEC, QUICK, frames, frames, frames, seeds=[0]).notes
    assert note.startswith("these frames are training frames of student 0, control 0, a: ")
    parts = [frames.select(torch.tensor(some)) for some in ([0, 2], [4], [1, 3])]
    unlabelled = [replace(parts[2], labels=None)]
    [note] = distil(final, SPEC, QUICK, *parts, seeds=[0], unlabelled=unlabelled).notes
    assert note.startswith("students learnt from these frames, without their labels")
    assert distil(final, SPEC, QUICK, *parts, seeds=[0]).notes == ()


def trained(frames: FrameSet, folder: Path, progress: Any) -> object:
    return zoo.train(SPEC, QUICK, frames, frames, directory=folder, progress=progress)


def cotrained(frames: FrameSet, folder: Path, progress: Any) -> object:
    return ensemble.cotrain(SPEC, QUICK, frames, frames, seeds=[0, 1], together=1, directory=folder, progress=progress)


def studied(frames: FrameSet, folder: Path, progress: Any) -> object:
    return one_by_one([SPEC, WIDER], QUICK, frames, frames, folder=folder, progress=progress)


def studied_together(frames: FrameSet, folder: Path, progress: Any) -> object:
    return ensemble.run.train_alike([SPEC, WIDER], QUICK, frames, frames, folder=folder, progress=progress)


def distilled(frames: FrameSet, folder: Path, progress: Any) -> object:
    work: dict[str, Any] = {"seeds": [0], "directory": folder, "progress": progress}
    return distil(final_of(SPEC), SPEC, QUICK, frames, frames, frames, **work)


@pytest.mark.parametrize(
    ("work", "begun"), [(trained, 1), (trained, 2), (cotrained, 3), (studied, 1), (studied_together, 3), (distilled, 3)]
)
def test_a_run_folder_belongs_to_one_process(work: Any, begun: int, frames: FrameSet, tmp_path: Path) -> None:
    """Another one is refused at once and changes nothing; once the first is killed, the folder is free."""
    ready, done = os.pipe()

    @contextmanager
    def stopped(title: str, total: float | None = None) -> Iterator[Any]:
        """Stop when so many epochs, or a round of trials, have begun."""
        nonlocal begun
        begun -= 1
        if not begun:
            os.write(done, b"x")
            signal.pause()
        yield lambda steps=1, note="": None

    if (child := os.fork()) == 0:
        with suppress(BaseException):
            work(frames, tmp_path / "run", stopped)
        os._exit(0)
    os.close(done)
    assert os.read(ready, 1) == b"x"
    before = all_of(tmp_path)
    with pytest.raises(ValueError, match=f"held by process {child} on .*wait until .*or choose another folder"):
        work(frames, tmp_path / "run", None)
    assert all_of(tmp_path) == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert work(frames, tmp_path / "run", None)


def all_of(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Time and content of every file in it."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_read_whoever_holds_its_folder(frames: FrameSet, tmp_path: Path) -> None:
    """The result is there; nothing is written, the log included."""
    first = zoo.train(SPEC, QUICK, frames, frames, directory=tmp_path)
    with ThreadPoolExecutor(1) as other, _files.held(tmp_path):
        before = all_of(tmp_path)
        again = other.submit(zoo.train, SPEC, QUICK, frames, frames, directory=tmp_path).result()
        assert (again.digest, all_of(tmp_path)) == (first.digest, before)
        further = other.submit(zoo.train, SPEC, replace(QUICK, epochs=3), frames, frames, directory=tmp_path)
        with pytest.raises(ValueError, match="holds another run"):
            further.result()


def test_workers_wait_for_what_is_left_of_their_predecessors(frames: FrameSet, tmp_path: Path) -> None:
    """As when a machine is lost, and the file server frees its locks some time later."""
    work: dict[str, Any] = {"seeds": [0, 1], "together": 1, "directory": tmp_path}
    taken, free = Event(), Event()

    def predecessor() -> None:
        with _files.held(tmp_path / "members-001"):
            taken.set()
            free.wait(600)

    with ThreadPoolExecutor(1) as other:
        other.submit(predecessor)
        taken.wait()
        with pytest.raises(ValueError, match="members-001 is held by"):
            ensemble.cotrain(SPEC, QUICK, frames, frames, **work)
        Timer(0.5, free.set).start()
        found = ensemble.cotrain(SPEC, QUICK, frames, frames, workers=ensemble.run.Processes(1), **work)
    assert [one.recipe["seed"] for one in found if one.recipe] == [0, 1]
