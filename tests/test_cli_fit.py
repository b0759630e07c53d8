"""The commands that find an ensemble: fit, select; exactly what was judged is saved, in its versions."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import ensemble
import zoo
from ensemble.outputs import About
from ensemble.outputs.store import read_outputs, write_outputs

SPEC = zoo.Spec("cylinder", features=27, context=1, classes=40, options={"width": 8, "depth": 1})
CORPUS = "--corpus corpus --valid dev --test test"
STORED = "--outputs outputs --valid dev --test test"


def model(seed: int) -> torch.nn.Module:
    """Trained a little: enough that no two are worth the same."""
    frames = zoo.sample_corpus("train").select(torch.arange(8 * seed, 8 * seed + 8))
    trained = zoo.train(SPEC, zoo.Recipe(epochs=1, seed=seed), frames, frames)
    made = zoo.build(SPEC, seed=seed)
    made.load_state_dict(trained.tensors)
    return made


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> zoo.Registry:
    """Three members whose names do not stand in the order of their making, and a small corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_REGISTRY", raising=False)
    for part, name in (("valid", "dev"), ("test", "test")):
        zoo.write_corpus(zoo.sample_corpus(part).select(torch.arange(8)), tmp_path / "corpus", name)
    registry = zoo.Registry("registry.json")
    for seed, name in enumerate(("zebra", "ape", "cat")):
        registry.register(name, model(seed), spec=SPEC, classes=zoo.sample_corpus("test").classes)
    return registry


def saved(registry: zoo.Registry, name: str) -> dict[str, float]:
    """Reference -> weight of an ensemble in the registry."""
    final = ensemble.load_ensemble(registry, name)
    assert isinstance(final.rule, ensemble.WeightedMean)
    versions = [registry.get(about.reference).reference for about in final.members.about]
    return dict(zip(versions, final.rule.weights, strict=True))


def again(registry: zoo.Registry) -> None:
    """Another version of `zebra`."""
    registry.register("zebra", model(5), spec=SPEC, classes=zoo.sample_corpus("test").classes)


def test_fit_prints_weights_with_their_certificate(command, registry):
    """They sum to one, and the gap says how far they may be from the least loss."""
    fitted = command(f"ensemble fit {CORPUS} --json", code=0).data
    assert sum(fitted["weights"].values()) == pytest.approx(1)
    assert fitted["gap"] <= 1e-6
    assert "on recordings left out of the fit" in command(f"ensemble fit {CORPUS}", code=0).out


def test_stored_outputs_are_saved_with_the_members_that_gave_them(command, registry):
    """In an order other than the registry's, fewer than it has, and each in the version that was collected."""
    command(f"ensemble collect outputs --members zebra ape {CORPUS}", code=0)
    again(registry)
    weights = command(f"ensemble fit {STORED} --save final --json", code=0).data["weights"]
    assert list(weights) == ["zebra", "ape"]
    assert saved(registry, "final") == pytest.approx({"zebra@1": weights["zebra"], "ape@1": weights["ape"]})


def test_stored_outputs_whose_version_is_gone_are_not_saved(command, registry):
    """Another model of the same name does not take its place."""
    command(f"ensemble collect outputs {CORPUS}", code=0)
    registry.remove("zebra")
    again(registry)
    assert "'zebra' has no version" in command(f"ensemble fit {STORED} --save final", code=2).err
    assert registry.list_ensembles() == []


def test_outputs_of_unknown_versions_are_judged_but_not_saved(command, registry):
    """Such as an older program wrote."""
    command(f"ensemble collect outputs {CORPUS}", code=0)
    for folder in Path("outputs").iterdir():
        outputs = read_outputs(folder)
        known = tuple(About(about.parameters, about.trained_on) for about in outputs.about)
        write_outputs(folder, replace(outputs, about=known))
    command(f"ensemble fit {STORED}", code=0)
    assert "collect again" in command(f"ensemble fit {STORED} --save final", code=2).err
    assert registry.list_ensembles() == []


def test_another_order_of_classes_is_refused_before_the_work(command, registry):
    """They can be judged together; the message names the member that differs, and no frame is read."""
    backwards = tuple(reversed(zoo.sample_corpus("test").classes))
    registry.register("turned", model(5), spec=SPEC, classes=backwards)
    command(f"ensemble fit {CORPUS}", code=0)
    error = command("ensemble fit --corpus nowhere --save final", code=2).err
    assert "that of 'ape' in ['turned']" in error
    assert "rows of their output layer" in error


def test_a_member_without_weight_is_not_saved(command, registry):
    """One that predicts the rarest phoneme everywhere gets none; the others keep theirs."""
    stuck = zoo.build(SPEC, seed=9)
    *_, bias = stuck.parameters()
    bias.data[-1] = 30  # ZH
    registry.register("stuck", stuck, spec=SPEC, classes=zoo.sample_corpus("test").classes)
    weights = command(f"ensemble fit {CORPUS} --save final --json", code=0).data["weights"]
    assert weights["stuck"] == 0
    assert saved(registry, "final") == pytest.approx({f"{n}@1": weight for n, weight in weights.items() if weight > 0})


@pytest.mark.parametrize("rule", ["mean", "weighted", "calibrated", "log_pool", "bayes_vote", "auto"])
def test_every_rule_by_name_can_be_saved(command, registry, rule):
    """What comes back from the registry is as good as what was judged."""
    judged = command(f"ensemble evaluate {CORPUS} --rules {rule} --json", code=0).data["rules"][0]
    assert "saved as 'final'" in command(f"ensemble fit {CORPUS} --rule {rule} --save final", code=0).out
    final = ensemble.load_ensemble(registry, "final")
    assert final.score(zoo.read_corpus("corpus", "test")) == pytest.approx(judged["accuracy"], abs=1e-3)


@pytest.mark.parametrize("name", ["mean", "weighted", "Zebra", "first"])
def test_a_name_that_is_taken_is_refused_before_the_work(command, registry, name):
    """A rule's too: nobody could tell which is meant."""
    registry.alias("first", "ape@1")
    for line in ("fit", "select --max-parameters 9_000_000"):
        found = command(f"ensemble {line} --save {name} {CORPUS}", code=2)
        assert "that no rule, model or alias has" in found.err
    assert "partitions in nowhere: none" in command("ensemble fit --save new --outputs nowhere", code=2).err


def test_select_keeps_the_budget_and_prints_what_is_proven(command, home):
    """One member fits, two do not."""
    size = zoo.Registry("registry.json").get("cylinder-a").parameters
    found = command(f"ensemble select {CORPUS} --max-parameters {size} --front --json", code=0).data
    assert found["proven"]
    assert len(found["members"]) == 1
    assert found["parameters"] <= size
    assert found["front"][0]["members"] == found["members"]
    assert "proven" in command(f"ensemble select {CORPUS} --front", code=0).out


def test_select_keeps_limits_of_bytes_and_time(command, home):
    """Both at once; what the selection needs is printed. A limit that no member keeps is an error."""
    sizes = [entry.bytes for entry in zoo.Registry().entries()]
    limits = f"--max-bytes {min(sizes)} --max-microseconds 1e6"
    found = command(f"ensemble select {CORPUS} {limits} --json", code=0).data
    assert 0 < found["bytes"] <= min(sizes)
    assert 0 < found["microseconds"] < 1e6
    assert f"{min(sizes):,} bytes, " in command(f"ensemble select {CORPUS} {limits}", code=0).out
    assert "more microseconds" in command(f"ensemble select {CORPUS} --max-microseconds 1e-9", code=2).err


@pytest.mark.parametrize("cost", ["parameters", "bytes", "microseconds"])
def test_the_front_is_by_the_cost_that_is_named(command, home, cost):
    """Ever cheaper and ever worse; the time of stored outputs cannot be measured."""
    found = command(f"ensemble select {CORPUS} --front-by {cost} --json", code=0).data["front"]
    totals, losses = ([each[key] for each in found] for key in (cost, "loss"))
    assert all(first > second > 0 for first, second in pairwise(totals))
    assert all(first < second for first, second in pairwise(losses))
    shown = command(f"ensemble select {CORPUS} --front-by {cost}").out
    assert re.search(rf"the best ensemble of each size\n *{cost} +log_loss", shown)
    command(f"ensemble collect stored {CORPUS}", code=0)
    stored = command("ensemble select --outputs stored --valid dev --test test --front-by", cost)
    assert (stored.code, "--front-by microseconds" in stored.err) == (
        (2, True) if cost == "microseconds" else (0, False)
    )


def test_a_selection_can_be_saved(command, home):
    """Members and weights as they were printed."""
    found = command(f"ensemble select {CORPUS} --max-members 2 --save final --json", code=0).data
    final = ensemble.load_ensemble(zoo.Registry("registry.json"), "final")
    names = [about.reference.partition("@")[0] for about in final.members.about]
    assert dict(zip(names, final.rule.weights, strict=True)) == pytest.approx(found["weights"])
    assert found["saved"] == "final"


def test_a_budget_in_which_no_member_fits_is_an_error(command, home):
    """On one line."""
    assert "within" in command(f"ensemble select {CORPUS} --max-parameters 10", code=2).err


@pytest.mark.parametrize("metric", ["accuracy", "log_loss", "brier", "macro_f1"])
def test_weights_and_selection_follow_the_metric(command, registry, metric):
    """With what is known of the optimum, on recordings left out, and the gain of the selection with its interval."""
    fitted = command(f"ensemble fit {CORPUS} --metric {metric} --json", code=0).data
    assert fitted["metric"] == metric
    assert sum(fitted["weights"].values()) == pytest.approx(1)
    assert all(row["low"] <= row["high"] for row in fitted["members"])
    higher = ensemble.judge.METRICS[metric].higher
    assert fitted["value"] == pytest.approx(1 - fitted["loss"] if higher else fitted["loss"])
    title = ensemble.judge.METRICS[metric].title
    assert f"{title} {fitted['value']:.5f}" in command(f"ensemble fit {CORPUS} --metric {metric}", code=0).out
    found = command(
        f"ensemble select {CORPUS} --metric {metric} --max-members 2 --front --save final --json", code=0
    ).data
    assert found["metric"] == metric
    assert found["proven"] == (metric in ("log_loss", "brier"))
    rule = command(f"ensemble evaluate {CORPUS} --members final --rules mean --metric {metric} --json", code=0).data[
        "rules"
    ][1]
    assert found[metric] == pytest.approx(rule[metric], abs=1e-6)
    assert found["gain_low"] <= found["gain"] <= found["gain_high"]
    assert (
        f"{title} {found[metric]:.4f}, gain over"
        in command(f"ensemble select {CORPUS} --metric {metric} --max-members 2", code=0).out
    )


def test_a_metric_that_does_not_fit_is_refused_before_the_work(command, registry):
    """An unknown one, and one beside a rule that is fitted in one way."""
    for line in ("fit", "select", "evaluate"):
        assert "no metric named 'f1'" in command(f"ensemble {line} --corpus nowhere --metric f1", code=2).err
    assert "beside --rule weighted" in command("ensemble fit --corpus nowhere --rule mean --metric brier", code=2).err
