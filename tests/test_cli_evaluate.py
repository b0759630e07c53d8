"""The commands that judge: evaluate, compare, diversity."""

import re
from dataclasses import replace

import pytest
import torch

import ensemble
import zoo
from ensemble.cli.evaluate import rejection
from ensemble.fit import FITTERS
from ensemble.outputs.store import read_outputs, write_outputs

CORPUS = "--corpus corpus --valid dev --test test"
STORED = "--outputs outputs --valid dev --test test"


def test_evaluate_prints_members_and_rules_with_intervals(command, home):
    """One table; weights, frames, tie rate below."""
    out = command(f"ensemble evaluate {CORPUS}", code=0).out
    for word in ("cylinder-a", "other", "= majority", "= maximum", "= mean", "= weighted", "(best on dev)"):
        assert word in out
    assert "12 recordings" in out
    assert "votes tie on" in out


@pytest.mark.parametrize("line", ["evaluate --rules mean nope", "compare mean nope", "fit --rule nope"])
def test_an_unknown_rule_is_refused_before_any_member_runs(command, home, monkeypatch, line):
    """Nobody waits minutes for a typing error."""
    for name in ("ensemble.collect", "ensemble.run.shards.sample", "ensemble.run.shards.judge"):
        monkeypatch.setattr(name, None)
    assert "rule named 'nope'" in command(f"ensemble {line} {CORPUS}", code=2).err


def test_evaluate_as_json_is_what_the_report_holds(command, home):
    """The same numbers again on a second run, and as through Python."""
    first, second = (command(f"ensemble evaluate {CORPUS} --json", code=0).data for _ in range(2))
    rules = {row["name"]: row for row in first["rules"]}
    assert list(rules) == ["majority", "maximum", "mean", "weighted"]
    assert {"accuracy", "log_loss", "gain", "gain_low", "gain_high"} <= set(rules["mean"])
    assert first["rules"] == second["rules"]
    assert first["members"] == second["members"]
    members = ensemble.load(zoo.Registry("registry.json"), "*")
    outputs = ensemble.collect(members, zoo.read_corpus("corpus", "test"))
    report = ensemble.evaluate(outputs, {"mean": ensemble.mean}, baseline=first["baseline"])
    assert report.rules["accuracy"][0] == pytest.approx(rules["mean"]["accuracy"])


@pytest.mark.parametrize("line", ["evaluate --rules mean weighted --sets 0.6", "select --max-members 1"])
@pytest.mark.usefixtures("processes")
def test_processes_change_no_digit(command, home, monkeypatch, line):
    """Of the JSON, but for its durations; nor does a run that goes on from its folder."""

    def found(more: str) -> dict[str, object]:
        data = command(f"ensemble {line} {CORPUS} {more} --json", code=0).data
        return {key: value for key, value in data.items() if "seconds" not in key and "per_second" not in key}

    monkeypatch.setattr("ensemble.run.shards._MOST", 500)
    plain = found("")
    assert found("--jobs 2 --run run") == plain
    assert found("--run run") == plain


def test_a_saved_ensemble_is_no_rule(command, home):
    """It stands among the members; the error says so."""
    command(f"ensemble fit {CORPUS} --rule mean --save final", code=0)
    found = command(f"ensemble evaluate {CORPUS} --rules mean final", code=2)
    assert "expected saved ensembles among the members, got ['final'] as rules; give --members final" in found.err
    assert command(f"ensemble evaluate {CORPUS} --rules mean --members final", code=0).out.count("= final") == 1


@pytest.mark.usefixtures("processes")
def test_processes_fill_what_is_stored(command, home, monkeypatch):
    """`collect --jobs` writes the bytes that one process writes; --cache takes --jobs, and the JSON is the same."""
    monkeypatch.setattr("ensemble.run.shards._MOST", 500)
    for folder, more in (("one", ""), ("two", "--jobs 2")):
        command(f"ensemble collect {folder} {CORPUS} {more}", code=0)
    for path in (home / "one").rglob("*.bin"):
        assert path.read_bytes() == (home / "two" / path.relative_to(home / "one")).read_bytes()
    plain, cached = (
        command(f"ensemble fit {CORPUS} {more} --json", code=0).data for more in ("", "--cache c --jobs 2")
    )
    assert plain == cached


@pytest.mark.usefixtures("processes")
def test_of_many_frames_a_sample_is_fitted_on_and_all_are_judged(command, home, monkeypatch):
    """The same with processes; members' figures are those of all frames, and the last line tells the sample."""
    monkeypatch.setattr("ensemble.run.shards._MOST", 500)
    line = f"ensemble evaluate {CORPUS} --rules weighted --metric macro_f1"
    plain, some, two = (
        command(f"{line} {more} --json", code=0).data for more in ("", "--sample 300", "--sample 300 --jobs 2")
    )
    assert plain["members"] == some["members"]
    assert plain["weights"] != some["weights"]
    assert plain["rejection"] != some["rejection"]
    for key in ("members", "rules", "pairs", "classes", "weights", "rejection", "baseline", "notes"):
        assert some[key] == two[key]
    last = command(f"{line} --sample 300", code=0).out.splitlines()[-1]
    assert re.fullmatch(
        r"fitted on a sample of [23]\d\d of the [\d,]+ frames of 'dev', judged on 'test', "
        r"but for rejection: on a sample of [23]\d\d frames",
        last,
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evaluate --jobs 0", "--jobs and --sample of 1 or more, got 0"),
        ("evaluate --sample 0", "--jobs and --sample of 1 or more"),
        ("evaluate --jobs 2 --ray", "either --jobs or --ray, got both"),
        ("evaluate --sets nan", "expected a number, got nan, for --sets"),
        ("evaluate --sets 0.5 --rules", "expected a rule that makes the sets"),
        ("evaluate --outputs outputs --costs", "whose costs can be measured beside --costs"),
        ("select --outputs outputs --max-microseconds 3", "whose costs can be measured beside --max-microseconds"),
        ("evaluate --cache cache --sample 300", "no --sample beside --cache"),
        ("evaluate --cache cache --run run", "no --run beside --cache, which goes on by itself"),
        ("collect stored --run run", "no --run for `collect`, which goes on by itself"),
        *(
            (f"evaluate --outputs outputs {flag}", f"expected no {flag.split()[0]} beside --outputs")
            for flag in ("--jobs 2", "--ray", "--run run", "--sample 5", "--cache cache", "--mapped frames")
        ),
        ("evaluate --predictions a.csv --corpus corpus --device cpu", "no --corpus or --device beside --predictions"),
        ("compare mean other --sample 300", "no --sample for `compare`"),
        ("diversity --sample 300", "no --sample for `diversity`"),
        ("collect stored --sample 300", "no --sample for `collect`"),
        ("predict mean --output out.csv --sample 300", "no --sample for `predict`"),
        ("predict mean --output out.csv --run run --jobs 2", "no --jobs or --run for 'mean', for which nothing is"),
        ("predict other --output out.csv --members cylinder-a", "no --members for 'other'"),
        ("predict other --output out.csv --cache cache --ray", "no --cache or --ray for 'other'"),
        ("predict cascade --output out.csv --cascade exact", "got 'cascade', which is a cascade itself"),
        ("plan --outputs outputs", "no --outputs for `plan`"),
        ("plan --jobs 2", "no --jobs for `plan`"),
        ("plan --frames 0", "--frames of 1 or more, got 0"),
    ],
)
def test_options_that_cannot_act_are_refused(command, home, line, words):
    """In one line, whatever the command and where its outputs come from."""
    where = "--valid dev --test test" if {"--outputs", "--predictions"} & {*line.split()} else CORPUS
    name, _, more = line.partition(" ")
    found = command(f"ensemble {name} {more} {where}", code=2)
    assert words in found.err
    assert found.err.count("\n") == 1


def test_evaluate_says_which_frames_to_reject_and_how_good_sets_are(command, home):
    """Of the best rule, as in Python: the sets are fitted on the one partition and judged on the other."""
    command(f"ensemble collect outputs {CORPUS}", code=0)
    valid, test = read_outputs("outputs/dev"), read_outputs("outputs/test")
    found = command(f"ensemble evaluate {STORED} --rules mean --sets 0.6 --json", code=0).data
    expected = ensemble.judge.risk_coverage(test, ensemble.mean)
    assert (found["rejection"]["rule"], found["rejection"]["best"]) == ("mean", expected.best)
    assert found["rejection"]["scores"] == expected.to_json()["scores"]
    sure = ensemble.MemberOutputs.from_probabilities({"sure": [[0.6, 0.4], [0.9, 0.1]]}, labels=[1, 0], groups=[0, 1])
    told = rejection("mean", ensemble.mean, sure).shown[0]
    assert "wrong on the 50.0% of the frames (" in told
    assert told.endswith("that confidence trusts most, the best of 5 scores to reject frames by")
    sets = ensemble.fit.fit_prediction_sets(valid, ensemble.mean, 0.6)
    judged = sets.judge(test)
    assert found["sets"]["threshold"] == sets.threshold
    assert found["sets"]["recordings"] == vars(judged.recordings)
    assert [row["name"] for row in found["sets"]["classes"]] == list(test.classes)
    lines = command(f"ensemble evaluate {STORED} --rules weighted --sets 0.6", code=0).out
    assert f"weighted: none of {len(expected.scores)} scores to reject frames by leaves a risk of at most 5%" in lines
    assert "sets to cover 0.6 hold the true class on" in lines
    assert "note: sets of weighted: the rule was fitted on these frames" in lines
    assert lines.count("12 recordings are few to resample") == 1
    same = command("ensemble evaluate --outputs outputs --valid dev --test dev --rules mean --sets 0.6", code=0).out
    assert "note: sets of mean: the sets were fitted on these frames" in same
    assert "sets" not in command(f"ensemble evaluate {STORED} --rules mean --json", code=0).data
    assert "9 recordings or more" not in command(f"ensemble evaluate {STORED} --sets 0.9", code=0).err
    assert "99 recordings or more" in command(f"ensemble evaluate {STORED} --sets 0.99", code=2).err
    assert "for --sets, for instance 0.9, got 90" in command("ensemble evaluate --sets 90", code=2).err


def test_members_and_rules_are_chosen_by_name_and_wildcard(command, home):
    """Several wildcards, several rules."""
    found = command(f"ensemble evaluate {CORPUS} --members cyl* other --rules median --json", code=0).data
    assert [row["name"] for row in found["members"]] == ["cylinder-a", "cylinder-b", "other"]
    assert [row["name"] for row in found["rules"]] == ["median"]
    assert found["weights"] == {}


def test_every_rule_that_can_be_fitted_is_judged_by_its_name(command, home):
    """The table of fitted rules, and a temperature that does not harm the log-loss it was fitted for."""
    names = sorted(FITTERS)
    found = command(f"ensemble evaluate {CORPUS} --json --rules", *names, code=0).data["rules"]
    assert [row["name"] for row in found] == names
    assert all(row["log_loss"] > 0 for row in found)
    on_valid = "--corpus corpus --valid dev --test dev"
    fitted = command(f"ensemble evaluate {on_valid} --rules weighted calibrated --json", code=0).data["rules"]
    assert fitted[1]["log_loss"] <= fitted[0]["log_loss"]
    assert fitted[0]["fitted_here"]


def test_what_members_and_rules_cost_is_measured_on_request(command, home):
    """In the table and in the JSON; without the request, nothing; of stored outputs, nothing can be."""
    plain, found = (command(f"ensemble evaluate {CORPUS} {more} --json", code=0).data for more in ("", "--costs"))
    assert {row["microseconds"] for row in plain["members"] + plain["rules"]} == {None}
    assert all(row["microseconds"] >= 0 and row["memory"] > 0 for row in found["members"] + found["rules"])
    assert [row["bytes"] for row in plain["members"]] == [row["bytes"] for row in found["members"]]
    assert "microseconds" in command(f"ensemble evaluate {CORPUS} --rules mean --costs", code=0).out
    command(f"ensemble collect outputs {CORPUS}", code=0)
    where = "--outputs outputs --valid dev --test test"
    assert "expected models whose costs" in command(f"ensemble evaluate {where} --costs", code=2).err


def test_the_report_is_one_page(command, home):
    """Written whole, beside the table."""
    command(f"ensemble evaluate {CORPUS} --report report.html", code=0)
    assert (home / "report.html").read_text().startswith("<!doctype html>")


def test_a_saved_ensemble_is_judged_beside_its_members(command, home):
    """By its own rule, over the versions that it was saved with; and it can be compared."""
    registry = zoo.Registry()
    command(f"ensemble fit --members other cylinder-a {CORPUS} --save final", code=0)
    registry.register("other", registry.load("cylinder-b"), spec=registry.get("cylinder-b").spec,
                      classes=registry.get("other").classes)  # fmt: skip
    judged = command(f"ensemble evaluate --members cylinder-b final {CORPUS} --rules mean --json", code=0).data
    assert {row["name"] for row in judged["members"]} == {"cylinder-b", "other", "cylinder-a"}
    assert [row["name"] for row in judged["rules"]] == ["mean", "final"]
    score = ensemble.load_ensemble(registry, "final").score(zoo.read_corpus("corpus", "test"))
    assert judged["rules"][1]["accuracy"] == pytest.approx(score, abs=1e-3)
    compared = command(f"ensemble compare final cylinder-b --members final cylinder-b {CORPUS} --json").data
    assert compared["first_accuracy"] == pytest.approx(score, abs=1e-3)
    alone = command(f"ensemble compare final cylinder-b --members cylinder-b {CORPUS}", code=2)
    assert "name it with --members" in alone.err


def test_stored_outputs_are_judged_by_a_saved_ensemble(command, home):
    """By its name among the members, with its own parameters, also where members abstain."""
    command(f"ensemble collect outputs {CORPUS}", code=0)
    command(f"ensemble fit --save some {STORED} --members other cylinder-a", code=0)
    alone = command(f"ensemble evaluate --members some --rules mean {STORED} --json", code=0).data
    saved = [
        about.reference.partition("@")[0] for about in ensemble.load_ensemble(zoo.Registry(), "some").members.about
    ]
    assert [row["name"] for row in alone["members"]] == saved
    line = f"ensemble evaluate --members * some --rules mean {STORED} --json"
    rows = {row["name"]: row for row in command(line, code=0).data["rules"]}
    assert rows["some"]["parameters"] < rows["mean"]["parameters"]
    outputs = read_outputs("outputs/test")
    logs = outputs.log_probabilities.clone()
    logs[outputs.members.index("cylinder-b"), :9] = torch.nan  # not one of its members
    write_outputs("outputs/test", replace(outputs, log_probabilities=logs, abstain=True))
    abstaining = {row["name"]: row for row in command(line, code=0).data["rules"]}
    assert abstaining["some"]["accuracy"] == rows["some"]["accuracy"]


def test_compare_answers_no_with_exit_code_one(command, home):
    """A member is not better than itself; the exit code follows the interval."""
    command(f"ensemble compare other other {CORPUS}", code=1)
    ahead = command(f"ensemble compare mean other {CORPUS} --json")
    assert ahead.code == (0 if ahead.data["gain_low"] > 0 else 1)
    assert ahead.data["gain"] == pytest.approx(ahead.data["first_accuracy"] - ahead.data["second_accuracy"])


def test_one_recording_is_never_enough_for_yes(command, home):
    """Exit code one in both orders, null for the ends, and words for people."""
    where = "--corpus corpus --valid dev --test single"
    for order in ("mean other", "other mean"):
        answer = command(f"ensemble compare {order} {where} --json", code=1).data
        assert answer["gain_low"] is answer["gain_high"] is None
    assert "no interval" in command(f"ensemble compare mean other {where}", code=1).out
    assert "nan" not in command(f"ensemble evaluate {where}", code=0).out
    assert command(f"ensemble select {where} --json", code=0).data["gain_low"] is None
    backwards = "--corpus corpus --valid single --test dev --rules auto"
    assert "two recordings or more for 'auto', got 1" in command(f"ensemble evaluate {backwards}", code=2).err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evaluate --outputs empty", "partitions in empty: none; `ensemble collect` writes them"),
        (f"compare mean nobody {CORPUS}", "cascade, cylinder-a, cylinder-b"),
        (f"compare cylinder-aa mean {CORPUS}", "did you mean 'cylinder-a'"),
        (f"evaluate --rules weigthed {CORPUS}", "no rule named 'weigthed'; did you mean 'weighted'"),
        (f"evaluate --rules nothing {CORPUS}", "bayes_vote, borda, calibrated"),
        (f"evaluate --rules meen {CORPUS}", "did you mean"),
        ("evaluate --members cylindre-a", "did you mean"),
        ("evaluate --members x*", "expected models that match 'x*'"),
        ("evaluate --corpus corpus --valid dve", "partitions under corpus: dev"),
        ("evaluate --corpus corpus --valid dev --test unlabelled", "with labels"),
        ("evaluate --registry nothing.json", "nothing.json"),
        ("evaluate --corpus nowhere --report no/such/r.html", "got 'no/such/r.html': no such folder"),
        ("evaluate --device cuda:77", "cuda"),
        ("evaluate --precision float3", "precision"),
    ],
)
def test_a_wrong_argument_is_answered_on_one_line(command, home, line, words):
    """Exit code 2, no traceback, the way out named."""
    found = command(f"ensemble {line}", code=2)
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert words in found.err
    assert not found.out


def test_diversity_shows_pairs_the_whole_and_contributions(command, home):
    """Three members, three pairs; one member, no pair and still valid JSON."""
    found = command(f"ensemble diversity {CORPUS} --json", code=0).data
    assert len(found["pairs"]) == len(found["members"]) == 3
    assert sum(found["unsolved"].values()) > 0
    assert "disagreement" in command(f"ensemble diversity {CORPUS}", code=0).out
    assert command(f"ensemble diversity {CORPUS} --members other --json", code=0).data["pairs"] == []


def test_rules_are_judged_by_the_metric_one_is_judged_by(command, home):
    """Weights for each metric beside each other; a column and a gain of it; optimism of each set of weights."""
    rules = ["mean", "weighted", "weighted_accuracy", "weighted_brier", "weighted_macro_f1"]
    found = command(f"ensemble evaluate {CORPUS} --metric brier --json --rules", *rules, code=0).data
    single = {row["name"]: row for row in found["members"]}[found["baseline"]]
    for row in found["rules"]:
        assert row["gain"] == pytest.approx(single["brier"] - row["brier"])
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
        assert (row["optimism"] is None) == (row["name"] == "mean")
    shown = command(f"ensemble evaluate {CORPUS} --metric brier", code=0).out
    assert "gain in Brier score over best single" in " ".join(shown.split())
    assert "brier" not in command(f"ensemble evaluate {CORPUS}", code=0).out
