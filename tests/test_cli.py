"""The command `ensemble` from the outside: tables, JSON, files, exit codes, one line per error."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import ensemble
import zoo
from ensemble.cli import app
from ensemble.cli.printing import print_json
from ensemble.fit import FITTERS
from zoo import _console


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of three small trained members, and a corpus in the HW1P2 layout."""
    home = tmp_path_factory.mktemp("home")
    registry = zoo.Registry(home / "registry.json")
    train, valid, test = (zoo.sample_corpus(part) for part in ("train", "valid", "test"))
    train, valid, test = (f.select(zoo.data.frames.torch.arange(n)) for f, n in ((train, 40), (valid, 12), (test, 12)))
    for seed, (name, context) in enumerate([("cylinder-a", 2), ("cylinder-b", 2), ("other", 1)]):
        spec = zoo.Spec("cylinder", features=27, context=context, classes=40, options={"width": 32, "depth": 1})
        registry.register(name, zoo.train(spec, zoo.Recipe(epochs=1, seed=seed), train, valid))
    for name, frames in (("dev", valid), ("test", test)):
        zoo.write_corpus(frames, home / "corpus", name)
    silent = zoo.FrameSet(test.features, None, test.starts, test.classes, test.names)
    zoo.write_corpus(silent, home / "corpus", "unlabelled")
    return home


@pytest.fixture(autouse=True)
def _inside(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in that folder, as a user would."""
    monkeypatch.chdir(home)
    monkeypatch.delenv("ZOO_REGISTRY", raising=False)


CORPUS = ["--corpus", "corpus", "--valid", "dev", "--test", "test"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What the command prints on stdout; its exit code must be `code`."""
    assert _console.run_app(app, arguments) == code, capsys.readouterr().err
    return capsys.readouterr().out


def test_evaluate_prints_members_and_rules_with_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    """One table; weights, frames, tie rate below."""
    out = said(capsys, "evaluate", *CORPUS)
    for word in ("cylinder-a", "other", "= majority", "= maximum", "= mean", "= weighted", "(best on valid)"):
        assert word in out
    assert "12 recordings" in out
    assert "votes tie on" in out


def test_evaluate_as_json_is_what_the_report_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers again on a second run, and as through Python."""
    first, second = (json.loads(said(capsys, "evaluate", *CORPUS, "--json")) for _ in range(2))
    rules = {row["name"]: row for row in first["rules"]}
    assert list(rules) == ["majority", "maximum", "mean", "weighted"]
    assert {"accuracy", "log_loss", "gain", "gain_low", "gain_high"} <= set(rules["mean"])
    assert first["rules"] == second["rules"]
    assert first["members"] == second["members"]
    members = ensemble.load(zoo.Registry("registry.json"), "*")
    outputs = ensemble.collect(members, zoo.read_corpus("corpus", "test"))
    report = ensemble.evaluate(outputs, {"mean": ensemble.mean}, baseline=first["baseline"])
    assert report.rules["accuracy"][0] == pytest.approx(rules["mean"]["accuracy"])


def test_members_and_rules_are_chosen_by_name_and_wildcard(capsys: pytest.CaptureFixture[str]) -> None:
    """Several wildcards, several rules."""
    found = json.loads(said(capsys, "evaluate", *CORPUS, "--members", "cyl*", "other", "--rules", "median", "--json"))
    assert [row["name"] for row in found["members"]] == ["cylinder-a", "cylinder-b", "other"]
    assert [row["name"] for row in found["rules"]] == ["median"]
    assert found["weights"] == {}


def test_a_fitted_ensemble_predicts_in_both_forms(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    """`fit --save`, then `predict` on a partition without transcripts."""
    fitted = json.loads(said(capsys, "fit", *CORPUS, "--save", "final", "--json"))
    assert sum(fitted["weights"].values()) == pytest.approx(1)
    assert fitted["gap"] <= 1e-6
    common = ["predict", "final", "--corpus", "corpus", "--partition", "unlabelled", "--output"]
    said(capsys, *common, "frames.csv")
    said(capsys, *common, "submission.csv", "--form", "submission")
    frames = list(csv.reader((home / "frames.csv").open()))
    submission = list(csv.reader((home / "submission.csv").open()))
    truth = ensemble.load_ensemble(zoo.Registry("registry.json"), "final").predict(zoo.read_corpus("corpus", "test"))
    assert submission[0] == ["id", "label"]
    assert submission[1:] == [[str(index), label] for index, label in enumerate(truth)]
    assert frames[0] == ["recording", "frame", "label", "probability"]
    assert [row[2] for row in frames[1:]] == truth.tolist()
    assert frames[1][1] == "0"


def test_stored_outputs_are_judged_as_the_models_are(capsys: pytest.CaptureFixture[str]) -> None:
    """`collect`, then the same figures from the folder alone."""
    said(capsys, "collect", "said", *CORPUS)
    stored = ["--outputs", "said", "--valid", "dev", "--test", "test", "--registry", "nothing.json"]
    live, kept = (json.loads(said(capsys, "evaluate", *where, "--json")) for where in (CORPUS, stored))
    assert live["rules"] == kept["rules"]
    assert live["members"] == kept["members"]
    chosen = json.loads(said(capsys, "evaluate", *stored, "--members", "cyl*", "--json"))
    assert [row["name"] for row in chosen["members"]] == ["cylinder-a", "cylinder-b"]
    assert _console.run_app(app, ["evaluate", "--outputs", "said", "--valid", "nope", "--test", "test"]) == 2
    assert "said/nope; partitions in said: dev, test" in capsys.readouterr().err
    for text in ("", "[]", "{}"):
        Path("said/test/outputs.json").write_text(text)
        assert _console.run_app(app, ["evaluate", *stored]) == 2
        assert "is damaged" in capsys.readouterr().err


def test_every_rule_that_can_be_fitted_is_judged_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of fitted rules, and a temperature that does not harm the log-loss it was fitted for."""
    names = sorted(FITTERS)
    found = json.loads(said(capsys, "evaluate", *CORPUS, "--rules", *names, "--json"))
    assert [row["name"] for row in found["rules"]] == names
    loss = {row["name"]: row["log_loss"] for row in found["rules"]}
    on_valid = ["--corpus", "corpus", "--valid", "dev", "--test", "dev"]
    fitted = json.loads(said(capsys, "evaluate", *on_valid, "--rules", "weighted", "calibrated", "--json"))["rules"]
    assert fitted[1]["log_loss"] <= fitted[0]["log_loss"]
    assert fitted[0]["fitted_here"]
    assert all(value > 0 for value in loss.values())


def test_plan_shows_what_was_chosen_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    """One row per way to run each group."""
    out = said(capsys, "plan", *CORPUS, "--frames", "500")
    assert "x loop" in out
    assert "cylinder-a" in out


def test_select_keeps_the_budget_and_says_what_is_proven(capsys: pytest.CaptureFixture[str]) -> None:
    """One member fits, two do not."""
    size = zoo.Registry("registry.json").get("cylinder-a").parameters
    found = json.loads(said(capsys, "select", *CORPUS, "--max-parameters", str(size), "--front", "--json"))
    assert found["proven"]
    assert len(found["members"]) == 1
    assert found["parameters"] <= size
    assert found["front"][0]["members"] == found["members"]
    assert "proven" in said(capsys, "select", *CORPUS, "--front")


def test_compare_answers_no_with_exit_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    """A member is not better than itself; a difference and its opposite agree."""
    said(capsys, "compare", "other", "other", *CORPUS, code=1)
    arguments = ("compare", "mean", "other", *CORPUS, "--json")
    code = _console.run_app(app, arguments)
    ahead = json.loads(capsys.readouterr().out)
    assert code == (0 if ahead["gain_low"] > 0 else 1)
    assert ahead["gain"] == pytest.approx(ahead["first_accuracy"] - ahead["second_accuracy"])


def test_one_recording_is_never_enough_to_say_yes(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    """Exit code one in both orders, null for the ends, and words for people."""
    one = zoo.read_corpus("corpus", "test").select(zoo.data.frames.torch.arange(1))
    zoo.write_corpus(one, home / "corpus", "single")
    where = ["--corpus", "corpus", "--valid", "dev", "--test", "single"]
    for order in (("mean", "other"), ("other", "mean")):
        answer = json.loads(said(capsys, "compare", *order, *where, "--json", code=1))
        assert answer["gain_low"] is answer["gain_high"] is None
    assert "no interval" in said(capsys, "compare", "mean", "other", *where, code=1)
    assert "nan" not in said(capsys, "evaluate", *where)
    assert json.loads(said(capsys, "select", *where, "--json"))["gain_low"] is None
    backwards = ["--corpus", "corpus", "--valid", "single", "--test", "dev"]
    assert _console.run_app(app, ["evaluate", *backwards, "--rules", "auto"]) == 2
    assert "two recordings or more for 'auto', got 1" in capsys.readouterr().err


def test_diversity_shows_pairs_the_whole_and_contributions(capsys: pytest.CaptureFixture[str]) -> None:
    """Three members, three pairs; one member, no pair and still valid JSON."""
    found = json.loads(said(capsys, "diversity", *CORPUS, "--json"))
    assert len(found["pairs"]) == len(found["members"]) == 3
    assert sum(found["unsolved"].values()) > 0
    assert "disagreement" in said(capsys, "diversity", *CORPUS)
    assert json.loads(said(capsys, "diversity", *CORPUS, "--members", "other", "--json"))["pairs"] == []


def test_what_is_not_finite_is_null_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has no NaN and no infinity, at whatever depth."""
    print_json({"a": [{"b": math.nan}, {"b": -math.inf}], "c": 1.5})
    assert json.loads(capsys.readouterr().out) == {"a": [{"b": None}, {"b": None}], "c": 1.5}


def test_the_report_is_one_page(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    """Written whole, beside the table."""
    said(capsys, "evaluate", *CORPUS, "--report", "report.html")
    assert (home / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "--outputs", "empty"], "partitions in empty: none; `ensemble collect` writes them"),
        (["compare", "mean", "nobody", *CORPUS], "calibrated, cylinder-a, cylinder-b"),
        (["compare", "cylinder-aa", "mean", *CORPUS], "did you mean 'cylinder-a'"),
        (["evaluate", "--rules", "weigthed", *CORPUS], "no rule named 'weigthed'; did you mean 'weighted'"),
        (["evaluate", "--rules", "nothing", *CORPUS], "bayes_vote, borda, calibrated"),
        (["select", *CORPUS, "--max-parameters", "10"], "within"),
        (["evaluate", "--members", "cylindre-a"], "did you mean"),
        (["evaluate", "--members", "x*"], "expected models that match 'x*'"),
        (["evaluate", "--rules", "meen", *CORPUS], "did you mean"),
        (["evaluate", "--corpus", "corpus", "--valid", "dve"], "partitions under corpus: dev"),
        (["evaluate", "--corpus", "corpus", "--valid", "dev", "--test", "unlabelled"], "with labels"),
        (["evaluate", "--registry", "nothing.json"], "nothing.json"),
        (["evaluate", "--corpus", "nowhere", "--report", "no/such/r.html"], "got 'no/such/r.html': no such folder"),
        (["predict", "final", "--corpus", "nowhere", "--output", "."], "got '.': a folder itself"),
        (["evaluate", "--device", "cuda:77"], "cuda"),
        (["evaluate", "--precision", "float3"], "precision"),
        (["evalute"], "evaluate"),
        (["predict", "final"], "output"),
        (["predict", "nothing", "--output", "x.csv"], "nothing"),
        (["predict", "cylinder-a", "--corpus", "corpus", "--output", "no/such/folder/x.csv"], "no/such/folder"),
    ],
)
def test_a_wrong_argument_is_answered_with_one_line_and_two(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """Exit code 2, no traceback, the way out named."""
    assert _console.run_app(app, arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not captured.out


@pytest.mark.parametrize("command", ["", *sorted(name for name in app if not name.startswith("-"))])
def test_help_shows_what_it_does_and_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Of every command and of the whole."""
    out = said(capsys, *([command] if command else []), "--help")
    assert "Usage: ensemble" in out
    assert not command or f"ensemble {command}" in out.split("Usage:", 1)[1].split("\n", 1)[1]


@pytest.mark.parametrize("package", ["zoo", "ensemble"])
def test_packages_run_as_modules_and_help_does_not_import_torch(package: str) -> None:
    """`python -m zoo --help` names its commands without waiting for torch."""
    code = f"""
import runpy, sys
sys.argv = [{package!r}, "--help"]
try:
    runpy.run_module({package!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
