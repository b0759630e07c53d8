"""Ensembles saved by the commands: exactly what was judged is what is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ensemble
import zoo
from ensemble.cli import app
from ensemble.outputs import About
from ensemble.outputs.store import read_outputs, write_outputs
from zoo import _console

SPEC = zoo.Spec("cylinder", features=27, context=1, classes=40, options={"width": 8, "depth": 1})
CORPUS = ["--corpus", "corpus", "--valid", "dev", "--test", "test"]
STORED = ["--outputs", "said", "--valid", "dev", "--test", "test"]


def model(seed: int) -> torch.nn.Module:
    """One that has learnt a little: enough that no two are worth the same."""
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


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What the command prints; its exit code must be `code`."""
    assert _console.run_app(app, arguments) == code, capsys.readouterr().err
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def kept(registry: zoo.Registry, name: str) -> dict[str, float]:
    """Reference -> weight of an ensemble in the registry."""
    final = ensemble.load_ensemble(registry, name)
    assert isinstance(final.rule, ensemble.WeightedMean)
    versions = [registry.get(about.reference).reference for about in final.members.about]
    return dict(zip(versions, final.rule.weights, strict=True))


def test_stored_outputs_are_saved_with_the_members_that_spoke(
    capsys: pytest.CaptureFixture[str], registry: zoo.Registry
) -> None:
    """In an order other than the registry's, fewer than it has, and each in the version that was collected."""
    said(capsys, "collect", "said", "--members", "zebra", "ape", *CORPUS)
    registry.register("zebra", model(5), spec=SPEC, classes=zoo.sample_corpus("test").classes)
    weights = json.loads(said(capsys, "fit", *STORED, "--save", "final", "--json"))["weights"]
    assert list(weights) == ["zebra", "ape"]
    assert kept(registry, "final") == pytest.approx({"zebra@1": weights["zebra"], "ape@1": weights["ape"]})


def test_stored_outputs_whose_version_is_gone_are_not_saved(
    capsys: pytest.CaptureFixture[str], registry: zoo.Registry
) -> None:
    """Another model of the same name does not take its place."""
    said(capsys, "collect", "said", *CORPUS)
    registry.remove("zebra")
    registry.register("zebra", model(5), spec=SPEC, classes=zoo.sample_corpus("test").classes)
    assert "'zebra' has no version" in said(capsys, "fit", *STORED, "--save", "final", code=2)
    assert registry.list_ensembles() == []


def test_outputs_that_do_not_tell_who_spoke_are_judged_but_not_saved(
    capsys: pytest.CaptureFixture[str], registry: zoo.Registry
) -> None:
    """Such as an older program wrote."""
    said(capsys, "collect", "said", *CORPUS)
    for folder in Path("said").iterdir():
        outputs = read_outputs(folder)
        known = tuple(About(about.parameters, about.trained_on) for about in outputs.about)
        write_outputs(folder, replace(outputs, about=known))
    said(capsys, "fit", *STORED)
    assert "collect again" in said(capsys, "fit", *STORED, "--save", "final", code=2)
    assert registry.list_ensembles() == []


def test_another_order_of_classes_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], registry: zoo.Registry
) -> None:
    """They can be judged together; the message names who differs, and no frame is read."""
    backwards = tuple(reversed(zoo.sample_corpus("test").classes))
    registry.register("turned", model(5), spec=SPEC, classes=backwards)
    said(capsys, "fit", *CORPUS)
    error = said(capsys, "fit", "--corpus", "nowhere", "--save", "final", code=2)
    assert "that of 'ape' in ['turned']" in error
    assert "rows of their output layer" in error


def test_a_member_without_weight_is_not_shipped(capsys: pytest.CaptureFixture[str], registry: zoo.Registry) -> None:
    """One that hears the rarest phoneme everywhere gets none; the others keep theirs."""
    stuck = zoo.build(SPEC, seed=9)
    *_, bias = stuck.parameters()
    bias.data[-1] = 30  # ZH
    registry.register("stuck", stuck, spec=SPEC, classes=zoo.sample_corpus("test").classes)
    weights = json.loads(said(capsys, "fit", *CORPUS, "--save", "final", "--json"))["weights"]
    assert weights["stuck"] == 0
    assert kept(registry, "final") == pytest.approx({f"{n}@1": weight for n, weight in weights.items() if weight > 0})


def test_what_was_selected_can_be_saved(capsys: pytest.CaptureFixture[str], registry: zoo.Registry) -> None:
    """Members and weights as they were printed."""
    found = json.loads(said(capsys, "select", *CORPUS, "--max-members", "2", "--save", "final", "--json"))
    assert kept(registry, "final") == pytest.approx({f"{n}@1": weight for n, weight in found["weights"].items()})


@pytest.mark.parametrize("rule", ["mean", "weighted", "calibrated", "log_pool", "bayes_vote", "auto"])
def test_every_rule_by_name_can_be_saved(capsys: pytest.CaptureFixture[str], registry: zoo.Registry, rule: str) -> None:
    """What comes back from the registry is as good as what was judged."""
    judged = json.loads(said(capsys, "evaluate", *CORPUS, "--rules", rule, "--json"))["rules"][0]
    assert "kept as 'final'" in said(capsys, "fit", *CORPUS, "--rule", rule, "--save", "final")
    final = ensemble.load_ensemble(registry, "final")
    assert final.score(zoo.read_corpus("corpus", "test")) == pytest.approx(judged["accuracy"], abs=1e-3)


def test_a_saved_ensemble_is_judged_beside_its_members(
    capsys: pytest.CaptureFixture[str], registry: zoo.Registry
) -> None:
    """By its own rule, over the versions that it was saved with; and it can be compared."""
    said(capsys, "fit", "--members", "zebra", "cat", *CORPUS, "--save", "final")
    registry.register("zebra", model(5), spec=SPEC, classes=zoo.sample_corpus("test").classes)
    judged = json.loads(said(capsys, "evaluate", "--members", "ape", "final", *CORPUS, "--rules", "mean", "--json"))
    assert [row["name"] for row in judged["members"]] == ["ape", "zebra", "cat"]
    assert [row["name"] for row in judged["rules"]] == ["mean", "final"]
    score = ensemble.load_ensemble(registry, "final").score(zoo.read_corpus("corpus", "test"))
    assert judged["rules"][1]["accuracy"] == pytest.approx(score, abs=1e-3)
    _console.run_app(app, ["compare", "final", "ape", "--members", "final", "ape", *CORPUS, "--json"])
    assert json.loads(capsys.readouterr().out)["first_accuracy"] == pytest.approx(score, abs=1e-3)
    assert "name it with --members" in said(capsys, "compare", "final", "ape", "--members", "ape", *CORPUS, code=2)


def test_stored_outputs_are_judged_by_a_saved_ensemble(
    capsys: pytest.CaptureFixture[str], registry: zoo.Registry
) -> None:
    """By its name among the members, with its own parameters, also where members abstain."""
    said(capsys, "collect", "said", *CORPUS)
    said(capsys, "fit", "--save", "some", *STORED, "--members", "zebra", "cat")
    alone = json.loads(said(capsys, "evaluate", "--members", "some", "--rules", "mean", *STORED, "--json"))
    assert [row["name"] for row in alone["members"]] == [
        reference.partition("@")[0] for reference in kept(registry, "some")
    ]
    among = json.loads(said(capsys, "evaluate", "--members", "*", "some", "--rules", "mean", *STORED, "--json"))
    rows = {row["name"]: row for row in among["rules"]}
    assert rows["some"]["parameters"] == 2 * zoo.count_parameters(SPEC) < rows["mean"]["parameters"]
    outputs = read_outputs(Path("said") / "test")
    logs = outputs.log_probabilities.clone()
    logs[0, :9] = torch.nan  # the ape, who is not one of them
    write_outputs(Path("said") / "test", replace(outputs, log_probabilities=logs, abstain=True))
    silent = json.loads(said(capsys, "evaluate", "--members", "*", "some", "--rules", "mean", *STORED, "--json"))
    assert {row["name"]: row["accuracy"] for row in silent["rules"]}["some"] == rows["some"]["accuracy"]


@pytest.mark.parametrize("name", ["mean", "weighted", "Zebra", "first"])
def test_a_name_that_is_taken_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], registry: zoo.Registry, name: str
) -> None:
    """A rule's too: nobody could tell which is meant."""
    registry.alias("first", "ape@1")
    assert "that no rule, model or alias has" in said(capsys, "fit", "--save", name, *CORPUS, code=2)
    assert "that no rule, model or alias has" in said(
        capsys, "select", "--max-parameters", "9_000_000", "--save", name, *CORPUS, code=2
    )
    assert "partitions in nowhere: none" in said(capsys, "fit", "--save", "new", "--outputs", "nowhere", code=2)
