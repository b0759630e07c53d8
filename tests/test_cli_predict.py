"""The commands that run members: predict, collect, plan."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ensemble
import zoo
from ensemble.cli.options import prediction_files
from ensemble.outputs.predictions import read_predictions
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


def test_a_cascade_asks_fewer_members(command, home):
    """The exact one changes no class; another says what it loses; what is none is refused on one line."""
    line = f"ensemble predict mean {CORPUS} --output found.csv --form submission"
    command(line, code=0)
    expected = (home / "found.csv").read_text()
    exact = command(f"{line} --cascade exact --json", code=0).data
    assert (home / "found.csv").read_text() == expected
    assert 1 / 3 < exact["asked"] <= 1
    assert "loss" not in exact
    bought = command(f"{line} --cascade 0.9 --json", code=0).data
    assert bought["asked"] < exact["asked"]
    assert bought["loss_low"] <= bought["loss"] <= bought["loss_high"] <= 0.9
    assert "loss of accuracy against asking all, on 'dev'" in command(f"{line} --cascade 0.9", code=0).out
    command(f"ensemble fit {CORPUS} --rule cascade --save quick", code=0)
    assert "asked" in command("ensemble predict quick --corpus corpus --output quick.csv --json", code=0).data
    for cascade in ("0", "1", "nan", "fast"):
        wrong = command(f"{line} --cascade {cascade}", code=2)
        assert f"--cascade exact, or an accepted loss of accuracy such as 0.001, got '{cascade}'" in wrong.err
    command(f"ensemble collect outputs {CORPUS}", code=0)
    wrong = command(f"ensemble predict mean {STORED} --output found.csv --cascade exact", code=2)
    assert "--cascade where members run that need not, got it beside stored outputs" in wrong.err
    wrong = command(line.replace("submission", "frames"), "--cascade", "exact", "--uncertainty", code=2)
    assert "got it beside --uncertainty, which needs all members" in wrong.err
    command("ensemble predict quick --corpus corpus --valid dev --output quick.csv --uncertainty --sets 0.8", code=0)
    wrong = command(f"ensemble predict maximum {CORPUS} --output found.csv --cascade exact", code=2)
    assert "got maximum: any member can change its class to the last" in wrong.err


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
        ("predict other --output x.csv --sets 90", "coverage between 0 and 1 for --sets, for instance 0.9, got 90"),
        ("predict other --output x.csv --uncertainty --form submission", "--form frames or probabilities beside"),
        (
            f"predict mean {CORPUS} --output x.csv --sets 0.99",
            "99 recordings or more to fit sets that cover 0.99, got 12",
        ),
    ],
)
def test_a_wrong_argument_is_answered_on_one_line(command, home, line, words):
    """Exit code 2, before the work."""
    found = command(f"ensemble {line}", code=2)
    assert (words in found.err, found.err.count("\n"), found.out) == (True, 1, "")


def test_uncertainty_is_split_in_columns(command, home):
    """Of the members' mean, in nats: from models and from stored outputs; total is the sum of the parts."""
    command(f"ensemble predict mean {CORPUS} --output live.csv --uncertainty", code=0)
    command(f"ensemble collect outputs {CORPUS}", code=0)
    data = command(f"ensemble predict mean {STORED} --output stored.csv --uncertainty --json", code=0).data
    live, stored = pd.read_csv("live.csv"), pd.read_csv("stored.csv")
    assert [*live.columns] == ["recording", "frame", "label", "probability", "total", "aleatoric", "epistemic"]
    split = ensemble.judge.uncertainty(read_outputs("outputs/test").probabilities)
    for part in ("total", "aleatoric", "epistemic"):
        np.testing.assert_allclose(stored[part], getattr(split, part), rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(live[part], stored[part], rtol=1e-3, atol=1e-5)
        assert data["uncertainty"][part] == pytest.approx(stored[part].mean(), rel=1e-6)
    np.testing.assert_allclose(stored["aleatoric"] + stored["epistemic"], stored["total"], rtol=0, atol=1e-8)


def test_uncertainty_is_of_the_members_that_matter(command, home):
    """A saved ensemble of one member of two has nothing to disagree about."""
    alone = ensemble.WeightedMean([1.0, 0.0])
    members = ensemble.load(zoo.Registry("registry.json"), ["cylinder-a", "other"])
    zoo.Registry("registry.json").register_ensemble("alone", ensemble.Ensemble(members, alone))
    command("ensemble predict alone --corpus corpus --output a.csv --uncertainty --form probabilities", code=0)
    table = pd.read_csv("a.csv")
    rows = table[list(zoo.PHONEMES)].to_numpy()
    np.testing.assert_allclose(table["total"], -(rows * np.log(rows.clip(1e-300))).sum(axis=1), rtol=1e-5)
    assert not table["epistemic"].any()


def test_sets_are_fitted_on_the_validation_partition(command, home):
    """As in Python; by the models of a rule's name, of a saved ensemble, and from stored outputs."""
    command(f"ensemble fit {CORPUS} --save final", code=0)
    command(f"ensemble collect outputs {CORPUS}", code=0)
    valid, test = read_outputs("outputs/dev"), read_outputs("outputs/test")
    fitted = ensemble.fit.fit_prediction_sets(valid, ensemble.mean, 0.6)
    expected = [set(np.array(test.classes)[row]) for row in fitted.sets(ensemble.mean(test.probabilities))]
    for where in (CORPUS, STORED):
        found = command(f"ensemble predict mean {where} --output sets.csv --sets 0.6 --json", code=0).data
        table = pd.read_csv("sets.csv", keep_default_na=False)
        same = [set(row.split()) == truth for row, truth in zip(table["set"], expected, strict=True)]
        assert np.mean(same) > (0.99 if where == CORPUS else 1 - 1e-9)  # live and stored logarithms differ in rounding
        assert found["sets"]["recordings"] == 12
        assert found["sets"]["threshold"] == pytest.approx(fitted.threshold, rel=1e-4)
        assert found["sets"]["size"] == pytest.approx(np.mean([*map(len, expected)]), rel=1e-2)
        assert found["sets"]["notes"] == []
    saved = command(f"ensemble predict final {CORPUS} --output s.csv --sets 0.6", code=0).out
    assert "sets to cover 0.6, fitted on 12 recordings" in saved
    assert "note: the rule was fitted on these frames" in saved


def test_parquet_holds_what_csv_holds(command, home):
    """By the ending of the file's name."""
    line = "ensemble predict other --corpus corpus --valid dev --uncertainty --sets 0.6 --output"
    for name in ("a.csv", "a.parquet"):
        command(f"{line} {name}", code=0)
    table, text = pd.read_parquet("a.parquet"), pd.read_csv("a.csv", keep_default_na=False)
    assert [*table.columns] == [*text.columns]
    pd.testing.assert_frame_equal(table, text, check_dtype=False, rtol=1e-6)


# Files of predictions in place of models: no registry, no corpus

NAMES = ["cat", "dog", "elk"]
FILES = "--predictions preds --valid oof --test test --labels train.csv:animal --groups who"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three members' tables of 60 labelled and 20 other rows, shuffled, in preds/{oof,test}; train.csv."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_REGISTRY", raising=False)
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, 80)
    ids = np.array([f"r{row:03d}" for row in range(80)])
    who = [f"s{row // 5}" for row in range(60)]
    labels = pd.DataFrame({"id": ids[:60], "animal": np.array(NAMES)[truth[:60]], "who": who})
    labels.to_csv("train.csv", index=False)
    for part, rows in (("oof", np.arange(60)), ("test", np.arange(60, 80))):
        (tmp_path / "preds" / part).mkdir(parents=True)
        for name in ("forest", "net", "bayes"):
            scores = np.exp(generator.normal(size=(len(rows), 3)) + 2 * np.eye(3)[truth[rows]])
            table = pd.DataFrame(scores / scores.sum(axis=1, keepdims=True), columns=NAMES)
            table.insert(0, "id", ids[rows])
            order = ["id", *generator.permutation(NAMES)]
            table.iloc[generator.permutation(len(rows))][order].to_csv(f"preds/{part}/{name}.csv", index=False)
    return tmp_path


def test_every_judging_command_takes_files_of_predictions(command, files):
    """Where only one set has labels, rules are fitted on one half of its recordings and judged on the other."""
    found = command(f"ensemble evaluate {FILES} --rules mean weighted --json", code=0).data
    assert [row["name"] for row in found["members"]] == ["bayes", "forest", "net"]
    assert (found["frames"], found["recordings"]) == (30, 6)
    assert not any(row["fitted_here"] for row in found["rules"])
    assert "judged on the other half of the recordings of 'oof'" in command(f"ensemble evaluate {FILES}", code=0).out
    weights = command(f"ensemble fit {FILES} --json", code=0).data["weights"]
    assert sum(weights.values()) == pytest.approx(1)
    chosen = command(f"ensemble select {FILES} --max-members 2 --json", code=0).data
    assert 1 <= len(chosen["members"]) <= 2
    assert command(f"ensemble compare mean net {FILES} --json").data["second"] == "net"
    assert len(command(f"ensemble diversity {FILES} --json", code=0).data["pairs"]) == 3
    only = command(f"ensemble evaluate {FILES} --members net bayes --json", code=0).data
    assert [row["name"] for row in only["members"]] == ["net", "bayes"]
    assert not Path("registry.json").exists()


def test_a_labelled_test_set_is_judged_as_it_is(command, files):
    """Both partitions in one file of labels: nothing is halved, and the fingerprints tell the sets apart."""
    labels = pd.read_csv("train.csv")
    more = pd.DataFrame({"id": [f"r{row:03d}" for row in range(60, 80)], "animal": "cat", "who": "s"})
    pd.concat([more, labels]).to_csv("train.csv", index=False)
    assert command(f"ensemble evaluate {FILES} --rules mean --json", code=0).data["frames"] == 20
    halved = command(f"ensemble evaluate {FILES.replace('--test test', '--test oof')} --rules mean --json", code=0)
    assert halved.data["frames"] == 30


def test_a_submission_is_fitted_on_one_set_and_written_for_the_other(command, files):
    """Rows by id, the names of both columns kept; the same as in Python."""
    found = command(f"ensemble predict weighted {FILES} --output s.csv --json", code=0).data
    fitted = read_predictions(sorted(Path("preds/oof").iterdir()), labels="train.csv:animal", groups="who").outputs
    rule = ensemble.fit_weights(fitted).rule
    assert found["fitted_on"] == rule.fingerprint
    assert found["weights"] == pytest.approx(dict(zip(rule.members, rule.weights, strict=True)))
    test = read_predictions(sorted(Path("preds/test").iterdir()))
    truth = rule(test.outputs.probabilities)
    written = pd.read_csv("s.csv")
    assert list(written.columns) == ["id", "animal"]
    assert written["id"].tolist() == list(test.ids)
    assert written["animal"].tolist() == [test.outputs.classes[index] for index in truth.argmax(dim=1)]
    command(f"ensemble predict weighted {FILES} --output p.csv --form probabilities", code=0)
    probabilities = pd.read_csv("p.csv", index_col="id")
    assert list(probabilities.columns) == list(test.outputs.classes)
    np.testing.assert_allclose(probabilities, truth, rtol=0, atol=1e-6)
    again = read_predictions(["p.csv"])
    np.testing.assert_allclose(again.outputs.probabilities[0], truth, rtol=0, atol=1e-6)
    command(f"ensemble predict net {FILES} --output f.csv --form frames", code=0)
    assert list(pd.read_csv("f.csv").columns) == ["id", "animal", "probability"]


def test_predictions_get_uncertainty_and_sets_beside_their_ids(command, files):
    """In the form of frames, unless probabilities are asked for; the sets are fitted on the labelled files."""
    line = f"ensemble predict mean {FILES} --output s.csv --uncertainty --sets 0.8"
    command(line, code=0)
    columns = ["total", "aleatoric", "epistemic", "set"]
    assert list(pd.read_csv("s.csv").columns) == ["id", "animal", "probability", *columns]
    command(f"{line} --form probabilities", code=0)
    table = pd.read_csv("s.csv", index_col="id", keep_default_na=False)
    fitted = read_predictions(sorted(Path("preds/oof").iterdir()), labels="train.csv:animal", groups="who").outputs
    sets = ensemble.fit.fit_prediction_sets(fitted, ensemble.mean, 0.8)
    held = pd.DataFrame(sets.sets(table[NAMES]), index=table.index, columns=NAMES)
    assert [set(row.split()) for row in table["set"]] == [set(held.columns[row]) for row in held.to_numpy()]


def test_predictions_are_stored_as_outputs(command, files):
    """And judged from there as from the files."""
    both = FILES.replace("--test test", "--test oof")
    command(f"ensemble collect outputs {both}", code=0)
    stored = command("ensemble fit --outputs outputs --valid oof --test oof --json", code=0).data
    assert stored["weights"] == command(f"ensemble fit {both} --json", code=0).data["weights"]


def test_rules_without_numbers_need_no_labels(command, files):
    """The mean of the files of a test set."""
    paths = " ".join(map(str, Path("preds/test").iterdir()))
    for where in (f"--predictions {paths}", "--predictions preds/test"):
        command(f"ensemble predict mean {where} --output s.csv", code=0)
        assert len(pd.read_csv("s.csv")) == 20


def test_labels_by_position_are_those_of_the_rows_that_are_fitted_on(command, files):
    """Without ids nothing tells that they are of the test rows, although there are as many."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, 40)
    np.save("y.npy", truth)
    for name in ("a", "b"):
        for part in ("oof", "test"):
            rows = np.full((40, 3), 0.2) + 0.4 * np.eye(3)[generator.permutation(truth) if part == "test" else truth]
            np.save(f"{part}_{name}.npy", rows)
    paths = "oof_a.npy oof_b.npy test_a.npy test_b.npy"
    where = f"--predictions {paths} --valid oof --labels y.npy --classes cat dog elk"
    found = command(f"ensemble evaluate {where} --rules mean --json", code=0).data
    assert (found["frames"], found["rules"][0]["accuracy"]) == (20, 1.0)
    command(f"ensemble predict weighted {where} --output s.csv", code=0)
    assert pd.read_csv("s.csv").shape == (40, 2)


def test_files_are_sorted_into_partitions_by_their_names(files):
    """A folder of the partition's name, or a name that begins or ends with it."""
    names = ["oof_net.csv", "test_net.csv", "forest-oof.csv", "forest.test.csv", "bayes/oof.csv", "bayes/test.csv"]
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    found = prediction_files(map(Path, names), ("oof", "test"))
    assert list(found) == ["oof", "test"]
    assert all(sorted(members) == ["bayes", "forest", "net"] for members in found.values())
    for name in ("oof_net.npy", "labels.csv", "labels.npy"):  # no partition is named in the last two
        (Path("all") / name).parent.mkdir(exist_ok=True)
        (Path("all") / name).touch()
    assert list(prediction_files([Path("all")], ("oof", "test"))["oof"]) == ["net"]
    assert list(prediction_files([Path("all/labels.csv")], ("oof", "test"))["oof"]) == ["labels"]
    with pytest.raises(ValueError, match=r"one file per member, got 'all/labels\.csv' and 'all/labels\.npy'"):
        prediction_files([Path("all")], ("valid", "test"))
    Path("all/labels.npy").unlink()
    unnamed = prediction_files([Path("all")], ("valid", "test"), without=Path("all/labels.csv"))
    assert list(unnamed["test"]) == ["oof_net"]
    bare = prediction_files([Path("oof_net.csv")], ("valid", "test"))
    assert bare["valid"] == bare["test"] == {"oof_net": Path("oof_net.csv")}


def test_rules_by_name_predict_from_models_and_stored_outputs_too(command, home):
    """Fitted on the validation partition; both ways agree."""
    for name in ("weighted", "mean"):
        command(f"ensemble predict {name} {CORPUS} --output live.csv", code=0)
        command(f"ensemble collect outputs {CORPUS}", code=0)
        command(f"ensemble predict {name} {STORED} --output stored.csv", code=0)
        live, stored = pd.read_csv("live.csv"), pd.read_csv("stored.csv")
        assert live["label"].tolist() == stored["label"].tolist()
        assert live["frame"].tolist() == stored["frame"].tolist()


def test_a_corpus_may_have_another_table_of_classes(command, home):
    """Names that the members do not know are refused; their own, in any order, are not."""
    names = list(zoo.PHONEMES)
    Path("names.txt").write_text("\n".join(names[::-1]))
    plain = command(f"ensemble evaluate {CORPUS} --rules mean --json", code=0).data
    turned = command(f"ensemble evaluate {CORPUS} --rules mean --classes names.txt --json", code=0).data
    assert turned["rules"] == plain["rules"]
    Path("names.txt").write_text("\n".join([*names, "XX"]))
    assert "XX" in command(f"ensemble evaluate {CORPUS} --classes names.txt", code=2).err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"fit {FILES} --save final", "files of predictions; `ensemble predict RULE --predictions ...`"),
        (f"fit {FILES} --outputs outputs", "either --outputs or --predictions"),
        ("fit --labels train.csv:animal", "--labels beside --predictions"),
        ("fit --outputs outputs --classes a b", "--outputs, which know their classes"),
        ("fit --predictions preds --valid oof", "--labels FILE:COLUMN tells them"),
        (
            "fit --predictions preds --labels train.csv:animal",
            "in ['preds'], got none; --valid and --test name those that there are; folders there: oof, test",
        ),
        ("fit --predictions nowhere --labels train.csv:animal", "in 'nowhere', got none"),
        (f"predict wieghted {FILES} --output s.csv", "did you mean 'weighted'"),
        (f"predict weighted {FILES.replace('--test test', '--test oof')} --output s.csv", "got one set of files"),
        (
            f"predict mean {FILES.replace('--test test', '--test oof')} --output s.csv --sets 0.5",
            "got one set of files",
        ),
        (f"predict mean {FILES} --output s.csv --form probabilities --uncertainty --sets 1", "for --sets"),
        (f"evaluate {FILES.replace('train.csv:animal', 'train.csv:beast')}", "column 'beast' of train.csv"),
        (f"evaluate {FILES.replace('--groups who', '--groups whom')}", "'whom'"),
        (f"evaluate {FILES} --members cnn*", "the predictions has ['bayes', 'forest', 'net']"),
        ("evaluate --predictions preds/oof --labels test.csv:animal", "no such file"),
    ],
)
def test_wrong_flags_beside_predictions_are_answered_on_one_line(command, files, line, words):
    """Exit code 2, with what was expected."""
    found = command(f"ensemble {line}", code=2)
    assert (words in found.err, found.err.count("\n"), found.out) == (True, 1, ""), found.err


def test_columns_of_one_name_and_names_with_blanks_are_refused(command, files):
    """Nothing is overwritten, and a set can be read back."""
    for part in ("oof", "test"):
        for path in Path("preds", part).iterdir():
            pd.read_csv(path).rename(columns={"cat": "total", "dog": "big dog"}).to_csv(path, index=False)
    labels = pd.read_csv("train.csv").replace({"animal": {"cat": "total", "dog": "big dog"}})
    labels.to_csv("train.csv", index=False)
    line = f"ensemble predict mean {FILES} --output s.csv --form probabilities"
    assert "distinct names, got ['total'] more than once" in command(f"{line} --uncertainty", code=2).err
    assert "names of classes without blanks" in command(f"{line} --sets 0.5", code=2).err
    assert not Path("s.csv").exists()
    command(line, code=0)
