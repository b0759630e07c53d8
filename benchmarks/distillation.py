"""What each part of a distillation adds: one student, one change at a time, each beside its control.

    python -m benchmarks.distillation [--quick] [--corpus ROOT --registry REGISTRY] [--epochs 10] [--only 'mix*']

The teacher is the mean of the members of a registry. A control has its student's spec, recipe, seeds and epochs, and
learns the labels, smoothed, without a teacher. Both are judged on the test partition, by which nothing is chosen; the
best epoch of each is chosen on the validation partition. The ratio is (student - control) / (teacher - control), over
all seeds, with the 95 % interval of resampled recordings, once in accuracy and once in nats.

The first table says how often the teacher is right on its own training frames, as they are and augmented; the last one
what it costs: seconds of whole epochs with and without it, in turns, and the median of their quotients.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import ensemble
import zoo
from ensemble.run import Distillation, cross_fitted, teacher_of
from ensemble.run.distillation import compared, recipes_of
from zoo import _console
from zoo.training.step import Batches

FOLDS = 4
RECIPE = zoo.Recipe(
    batch_size=512, learning_rate=3e-3, weight_decay=0.1, schedule="one_cycle", mask_time=8, mask_features=5
)
NO_MASKS = {"mask_time": 0, "mask_features": 0}
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "temperature 2": {"temperature": 2.0},
    "temperature 4": {"temperature": 4.0},
    "hard weight .3": {"hard_weight": 0.3},
    "classes of the teacher alone": {"teacher": "classes"},
    "no masks": NO_MASKS,
    "no masks, stored answers": {"teacher": "stored", **NO_MASKS},
    "mix-up": {"mix_up": 1.0},
    "cross-fitted teacher": {"teacher": "cross-fitted"},
    "frames of valid without labels": {"unlabelled": ["valid"]},
    "frames of test without labels": {"unlabelled": ["test"]},
    "four times as long": {"times": 4},
    "mix-up, four times as long": {"mix_up": 1.0, "times": 4},
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", type=Path, default=Path("registry.json"), help="of the teacher's members")
    parser.add_argument("--members", nargs="+", default=["*"], help="names, or shell wildcards")
    parser.add_argument("--corpus", type=Path, help="folder of partitions; the bundled corpus without it")
    parser.add_argument("--partitions", nargs=3, default=["train", "valid", "test"])
    parser.add_argument("--student", help="member whose spec the students have; without it, the best on valid")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the frames that an epoch sees")
    parser.add_argument("--precision", default=RECIPE.precision, help="of the students' training")
    parser.add_argument("--only", default="*", help="changes, a shell wildcard")
    parser.add_argument("--quick", action="store_true", help="two epochs of a tenth of the frames")
    given = parser.parse_args()
    if given.quick:
        given.epochs, given.fraction = 2, 0.1
    bench = prepare(given)
    print(f"{len(bench.teacher.members)} members, students of {zoo.count_parameters(bench.spec):,} parameters")
    _console.show(["\nthe teacher on its training frames", _console.Table(known(bench))])
    found: dict[str, dict[str, Distillation]] = {}
    for name, change in CHANGES.items():
        if fnmatchcase(name, given.only):
            found[name] = bench.judge(change)
            print(name, figures(found[name]["accuracy"]), figures(found[name]["log_loss"]), file=sys.stderr, flush=True)
    tables = [
        _console.Table(
            [{"change": name} | figures(each[metric]) for name, each in found.items()],
            title=f"\n{metric}",
            formats=dict.fromkeys(["teacher", "student", "control"], ".4f")
            | dict.fromkeys(["gain", "gain low", "gain high"], "+.4f")
            | dict.fromkeys(["ratio", "ratio low", "ratio high"], ".2f")
            | {"agreement": ".3f"},
        )
        for metric in ("accuracy", "log_loss")
    ]
    _console.show(tables)
    rows = [costs(bench, students, repeats=3 if given.quick else 7) for students in (1, 3)]
    formats = dict.fromkeys(["plain", "with the teacher", "quotient"], ".2f")
    _console.show(["\nseconds of an epoch, students trained together", _console.Table(rows, formats=formats)])


@dataclass(frozen=True, eq=False)
class Bench:
    """The frames, the teacher, and what all students have in common."""

    frames: dict[str, zoo.FrameSet]  # train, valid and test
    teacher: ensemble.Ensemble
    spec: zoo.Spec
    recipe: zoo.Recipe
    seeds: range
    controls: dict[zoo.Recipe, list[zoo.Checkpoint]] = field(default_factory=dict)  # trained so far

    def judge(self, change: dict[str, Any]) -> dict[str, Distillation]:
        """Students of the changed recipe beside their controls, in accuracy and in nats."""
        fields = {name: value for name, value in change.items() if name not in ("teacher", "unlabelled", "times")}
        recipe = replace(self.recipe, epochs=self.recipe.epochs * change.get("times", 1), **fields)
        student, control = recipes_of(recipe)
        if control not in self.controls:
            self.controls[control] = self.train(control)
        unlabelled = [self.frames[part] for part in change.get("unlabelled", ())]
        teacher = TEACHERS[change.get("teacher", "members")](self)
        students = self.train(student, teacher=teacher, unlabelled=unlabelled)
        return {
            metric: compared(self.teacher, students, self.controls[control], self.frames["test"], metric)
            for metric in ("accuracy", "log_loss")
        }

    def train(self, recipe: zoo.Recipe, **lesson: Any) -> list[zoo.Checkpoint]:
        """A model for each seed."""
        train, valid = self.frames["train"], self.frames["valid"]
        return ensemble.cotrain(self.spec, recipe, train, valid, seeds=self.seeds, **lesson)


def prepare(given: argparse.Namespace) -> Bench:
    """What the command line asks for."""
    parts = dict(zip(("train", "valid", "test"), given.partitions, strict=True))
    frames = {
        part: zoo.sample_corpus(part) if given.corpus is None else zoo.read_corpus(given.corpus, name)
        for part, name in parts.items()
    }
    members = ensemble.load(zoo.Registry(given.registry), given.members, precision="auto")
    best = given.student or ensemble.judge.best_member(ensemble.collect(members, frames["valid"]))
    spec = next((member.spec for member in members if member.name == best), None)
    if spec is None:
        msg = f"expected a student named as one of the members {', '.join(members.names)}, got {best!r}"
        raise ValueError(msg)
    recipe = replace(RECIPE, epochs=given.epochs, fraction=given.fraction, precision=given.precision)
    return Bench(frames, ensemble.Ensemble(members, ensemble.mean), spec, recipe, range(given.seeds))


def known(bench: Bench) -> list[dict[str, Any]]:
    """How often the teacher is right on windows of an eighth of the training recordings, and its mean entropy."""
    frames, teacher = bench.frames["train"], teacher_of(bench.teacher)
    some, rows = frames.select(torch.arange(0, frames.recordings, 8)), []
    masks = {name: getattr(RECIPE, name) for name in NO_MASKS}
    augmented = {"as they are": {}, "masks": masks, "mix-up": {"mix_up": 1.0}, "both": masks | {"mix_up": 1.0}}
    for name, fields in augmented.items():
        recipe = zoo.Recipe(**fields)
        batches = [batch for step in Batches(some, bench.spec, [recipe], teacher).epoch(1) for batch in step]
        p = torch.cat([batch.soft for batch in batches if batch.soft is not None])
        right = p.argmax(dim=1) == torch.cat([batch.labels for batch in batches])
        entropy = torch.special.entr(p).sum(dim=1).mean()
        rows.append(
            {"windows": name, "right": round(float(right.double().mean()), 4), "nats": round(float(entropy), 3)}
        )
    return rows


def of_classes(bench: Bench) -> zoo.training.Teacher:
    """The members' mean, of which only the most probable class is passed on."""
    teacher = teacher_of(bench.teacher)

    def predict(windows: Tensor, frames: Tensor) -> Tensor:
        p = teacher.predict(windows, frames)
        return torch.zeros_like(p).scatter_(1, p.argmax(dim=1, keepdim=True), 1.0)

    return replace(teacher, predict=predict)


def stored(bench: Bench) -> zoo.training.Teacher:
    """The members' mean over the training frames, computed once."""
    train = bench.frames["train"]
    return zoo.training.Teacher.stored(torch.from_numpy(bench.teacher.predict_proba(train)), [train])


def of_folds(bench: Bench) -> zoo.training.Teacher:
    """Members of the students' spec, each frame judged by two that were trained without its recording."""
    train, valid = bench.frames["train"], bench.frames["valid"]
    _, alone = recipes_of(bench.recipe)
    found = ensemble.cotrain(bench.spec, alone, train, valid, seeds=range(2), folds=FOLDS)
    return cross_fitted(found, train, folds=FOLDS, precision="auto")


TEACHERS: dict[str, Callable[[Bench], zoo.training.Teacher]] = {
    "members": lambda bench: teacher_of(bench.teacher),
    "classes": of_classes,
    "stored": stored,
    "cross-fitted": of_folds,
}


def figures(found: Distillation) -> dict[str, float]:
    """A row: means over the seeds; the ratio is that of the means."""

    def mean(scores: Sequence[Mapping[str, float]]) -> float:
        return sum(one[found.metric] for one in scores) / len(scores)

    gain, ratio = found.gain, found.ratio
    return {
        "teacher": found.teacher_scores[found.metric],
        "student": mean(found.student_scores),
        "control": mean(found.control_scores),
        "gain": gain.estimate,
        "gain low": gain.low,
        "gain high": gain.high,
        "ratio": ratio.estimate,
        "ratio low": ratio.low,
        "ratio high": ratio.high,
        "agreement": found.agreement,
    }


def costs(bench: Bench, students: int, repeats: int) -> dict[str, float]:
    """Seconds of an epoch with the teacher and without, in turns: medians, and the median of the quotients."""
    teacher, taken = teacher_of(bench.teacher), {"plain": [0.0] * repeats, "with the teacher": [0.0] * repeats}
    parts, recipe = (bench.frames["train"], bench.frames["valid"]), replace(bench.recipe, epochs=1)
    together: dict[str, Any] = {"seeds": range(students), "together": students}
    for turn in range(repeats):
        for name, asked in (("plain", None), ("with the teacher", teacher)):
            records: list[Any] = []
            ensemble.cotrain(bench.spec, recipe, *parts, teacher=asked, on_epoch=records.append, **together)
            taken[name][turn] = records[0][0]["seconds"]
    quotients = [taught / plain for plain, taught in zip(*taken.values(), strict=True)]
    medians = {name: median(values) for name, values in taken.items()}
    return {"students": students} | medians | {"quotient": median(quotients)}


if __name__ == "__main__":
    main()
