"""`ensemble distil` on small data: what is trained, printed, saved or not, and what is refused."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo import _files

FRAMES = "--corpus corpus --train dev --valid test"
DATA = f"{FRAMES} --test test --students 2"
STUDENT = "--spec basic --option depth=1 --option width=16"


@pytest.fixture
def saved(command: Any, home: Path) -> Path:
    """Two members as an ensemble called final."""
    command("ensemble fit --members cyl* --rule mean --save final --corpus corpus --valid dev", code=0)
    return home


def test_a_student_that_is_better_than_its_control_is_saved(command: Any, home: Path) -> None:
    """Features without labels help it, of which the control knows nothing; the JSON has the promised names."""
    registry, dev = zoo.Registry(), zoo.read_corpus("corpus", "dev")
    for seed in (0, 1):
        recipe = zoo.Recipe(epochs=8, batch_size=128, learning_rate=0.01, seed=seed)
        registry.register(f"good-{seed}", zoo.train(registry.get("other").spec, recipe, dev, dev))
    command("ensemble fit --members good* --rule mean --save final --corpus corpus --valid dev", code=0)
    recipe = "--epochs 8 --batch-size 128 --learning-rate 0.01 --unlabelled dev --directory runs"
    data = "--corpus corpus --train single --valid dev --test test --students 2"
    line = f"ensemble distil final --save student {STUDENT} {data} {recipe}"
    data = command(f"{line} --json", code=0).data
    assert {"teacher", "students", "controls", "ratio", "ratio_low", "ratio_high", "agreement"} <= {*data}
    assert data["gain_low"] > 0
    assert data["ratio_low"] <= data["ratio"] <= data["ratio_high"]
    assert [each["seed"] for each in data["students"]] == [each["seed"] for each in data["controls"]] == [0, 1]
    assert [member["name"] for member in data["members"]] == ["good-0", "good-1"]
    entry = registry.get("student")
    assert entry.kind == "distilled"
    assert [*entry.parents] == [registry.get(name).id for name in ("good-0", "good-1")]
    assert (entry.spec.context, entry.spec.normalisation, entry.parameters) == (1, "mean_std", data["parameters"])
    shown = command(line, code=0).out  # the same command resumes, so that nothing is trained
    single = command(line.replace("--test test", "--test single"), code=1).out  # a single recording has no interval
    assert "(no interval)" in single
    assert "not saved" in single
    for words in ("= final", "student of seed 1", "control of seed 0", "distillation ratio", "saved as student@1"):
        assert words in shown


def test_a_student_no_better_than_its_control_is_none(command: Any, home: Path) -> None:
    """At a rate of zero both stay what they were: exit code 1, nothing saved."""
    line = f"ensemble distil other --save student {STUDENT} {DATA} --epochs 1 --learning-rate 0"
    found = command(line, code=1)
    assert "+0.0000" in found.out
    assert "not saved" in found.out
    assert "student" not in zoo.Registry().list()
    assert command(f"{line} --json", code=1).data["saved"] is None


def test_folds_train_the_members_anew(command: Any, saved: Path) -> None:
    """Each without a fold, by its own recipe; the student's parents are the ensemble's members."""
    line = f"ensemble distil final --save student {STUDENT} {DATA} --epochs 1 --folds 2 --directory runs"
    command(line)
    folds = sorted(str(path.relative_to("runs/folds")) for path in Path("runs/folds").glob("*/fold-*"))
    ids = sorted(zoo.Registry().get(name).id for name in ("cylinder-a", "cylinder-b"))
    assert folds == [f"{id}/fold-0{k}" for id in ids for k in (0, 1)]


def test_a_budget_gives_the_width(command: Any, home: Path) -> None:
    """As wide as it allows; a whole spec is only compared with it. The teacher may be a single model."""
    line = f"ensemble distil other --save student {DATA} --epochs 1 --learning-rate 0 --json"
    data = command(f"{line} --spec cylinder --option depth=1 --max-parameters 9_000", code=1).data
    wider = dict(data["spec"]["options"], width=data["spec"]["options"]["width"] + 1)
    assert data["parameters"] <= 9000 < zoo.count_parameters(zoo.Spec.from_dict(data["spec"] | {"options": wider}))
    plain = command(f"{line} --spec cylinder --context 1", code=1).data["spec"]
    assert plain == zoo.Spec("cylinder", features=27, context=1, classes=40).to_dict()  # not the members' options
    spec = zoo.Spec("cylinder", features=27, context=1, classes=40, options={"width": 64})
    found = command(f"{line} --max-parameters 1_000 --spec", spec.canonical(), code=2)
    assert "student of at most 1,000 parameters, got" in found.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (f"{DATA}", "expected --spec with the student's architecture or spec, got none"),
        (f"{DATA} {STUDENT} --max-parameters 9e3", "no width beside --max-parameters"),
        (f"{DATA} --spec basic --max-parameters inf", "a finite number for --max-parameters, got inf"),
        (f"{DATA} --spec mlp --max-parameters 9e3", "an architecture with a width"),
        (f"{DATA} {STUDENT} --label-smoothing 0.1 --metric macro_f1", "a mean over frames"),
        (f"{DATA} {STUDENT} --hard-weight 1", "hard_weight below 1"),
        (f"{FRAMES} {STUDENT} --students 0", "at least one student"),
        (f"{DATA} {STUDENT} --folds 99", "as many as there are recordings"),
        (f"{DATA} {STUDENT} --folds 2 --hard-weight 1", "hard_weight below 1"),
        (f"{FRAMES} {STUDENT} --test unlabelled", "frames with labels to compare on"),
    ],
)
def test_wrong_usage_is_refused_before_the_work(flags: str, words: str, command: Any, home: Path) -> None:
    """In one line, exit code 2."""
    found = command(f"ensemble distil other --save student --epochs 1 {flags}", code=2)
    assert words in found.err
    assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        f"zoo train a --spec basic --epochs 1 {FRAMES} --directory runs",
        f"zoo study --draws 1 --max-parameters 200_000 --epochs 1 {FRAMES} --run runs",
        f"ensemble distil other --save student {STUDENT} {DATA} --epochs 1 --directory runs",
    ],
)
def test_a_folder_that_another_process_holds_is_refused(line: str, command: Any, home: Path) -> None:
    """On one line, with who it is and the way out."""
    with ThreadPoolExecutor(1) as other, _files.held(home / "runs"):
        found = other.submit(command, line, code=2).result()
    assert re.fullmatch(
        r"error: expected a folder .*runs is held by process \d+ on .*choose another folder\n", found.err
    )
    assert [path.name for path in Path("runs").iterdir()] == ["run.lock"]
