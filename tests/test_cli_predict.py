"""The commands that run members: predict, collect, plan."""

import csv
import shutil
from pathlib import Path

import pytest

import ensemble
import zoo
from ensemble.outputs.store import read_outputs

CORPUS = "--corpus corpus --valid dev --test test"
STORED = "--outputs outputs --valid dev --test test --registry nothing.json"


def test_an_ensemble_predicts_in_both_forms(command, home):
    """`fit --save`, then `predict` on a partition without transcripts."""
    command(f"ensemble fit {CORPUS} --save final", code=0)
    line = "ensemble predict final --corpus corpus --test unlabelled"
    assert command(f"{line} --output frames.csv --json", code=0).data["recordings"] == 12
    command(f"{line} --output submission.csv --form submission", code=0)
    frames = list(csv.reader((home / "frames.csv").open()))
    submission = list(csv.reader((home / "submission.csv").open()))
    truth = ensemble.load_ensemble(zoo.Registry("registry.json"), "final").predict(zoo.read_corpus("corpus", "test"))
    assert submission[0] == ["id", "label"]
    assert submission[1:] == [[str(index), label] for index, label in enumerate(truth)]
    assert frames[0] == ["recording", "frame", "label", "probability"]
    assert [row[2] for row in frames[1:]] == truth.tolist()
    assert frames[1][1] == "0"


def test_a_single_model_predicts_too(command, home):
    """As an ensemble of one."""
    command("ensemble predict other --corpus corpus --output other.csv --form submission", code=0)
    members = ensemble.load(zoo.Registry("registry.json"), "other")
    truth = ensemble.Ensemble(members, ensemble.mean).predict(zoo.read_corpus("corpus", "test"))
    assert [row[1] for row in csv.reader((home / "other.csv").open())] == ["label", *truth]


def test_stored_outputs_are_judged_as_the_models_are(command, home):
    """`collect`, then the same figures from the folder alone."""
    assert command(f"ensemble collect outputs {CORPUS} --json", code=0).data["partitions"] == ["dev", "test"]
    live, stored = (command(f"ensemble evaluate {where} --json", code=0).data for where in (CORPUS, STORED))
    assert live["rules"] == stored["rules"]
    assert live["members"] == stored["members"]
    assert live["collect_seconds"] > 0
    assert stored["collect_seconds"] is None
    chosen = command(f"ensemble evaluate {STORED} --members cyl* --json", code=0).data
    assert [row["name"] for row in chosen["members"]] == ["cylinder-a", "cylinder-b"]
    missing = command("ensemble evaluate --outputs outputs --valid nope --test test", code=2)
    assert "outputs/nope; partitions in outputs: dev, test" in missing.err
    for text in ("", "[]", "{}"):
        Path("outputs/test/outputs.json").write_text(text)
        assert "is damaged" in command(f"ensemble evaluate {STORED}", code=2).err


def test_outputs_of_other_frames_are_replaced(command, home):
    """Also those of other members: the folder holds what was collected last."""
    command(f"ensemble collect outputs {CORPUS}", code=0)
    command("ensemble collect outputs --corpus corpus --valid dev --test single", code=0)
    shutil.rmtree("corpus/dev")
    zoo.write_corpus(zoo.read_corpus("corpus", "single"), home / "corpus", "dev")
    command(f"ensemble collect outputs {CORPUS} --members cyl*", code=0)
    assert read_outputs("outputs/dev").fingerprint == read_outputs("outputs/single").fingerprint
    assert read_outputs("outputs/test").members == ("cylinder-a", "cylinder-b")


def test_a_cache_is_copied_into_the_folder(command, home):
    """And is left as it is."""
    command(f"ensemble collect outputs {CORPUS} --cache cache", code=0)
    assert read_outputs("outputs/dev").log_probabilities.equal(read_outputs("cache/dev").log_probabilities)


def test_plan_shows_what_was_chosen_and_why(command, home):
    """One row for each way to run each group."""
    out = command(f"ensemble plan {CORPUS} --frames 500", code=0).out
    assert "x loop" in out
    assert "cylinder-a" in out
    assert {"group", "form", "why"} <= set(command(f"ensemble plan {CORPUS} --frames 500 --json", code=0).data[0])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("predict final --corpus nowhere --output .", "got '.': a folder itself"),
        ("predict final", "output"),
        ("predict nothing --output x.csv", "nothing"),
        ("predict other --corpus corpus --output no/such/folder/x.csv", "no/such/folder"),
    ],
)
def test_a_wrong_argument_is_answered_on_one_line(command, home, line, words):
    """Exit code 2, before the work."""
    found = command(f"ensemble {line}", code=2)
    assert (words in found.err, found.err.count("\n"), found.out) == (True, 1, "")
