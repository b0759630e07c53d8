"""The commands that look for architectures: search, picture, study."""

from pathlib import Path

import pytest
import torch

import zoo


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A few recordings of the bundled corpus as folders."""
    for partition in ("train", "valid"):
        few = zoo.sample_corpus(partition).select(torch.arange(4))
        zoo.write_corpus(few, tmp_path / "corpus", partition)
    return tmp_path / "corpus"


def test_search_draws_an_ensemble_within_its_budget(command):
    """As built, all members together."""
    found = command("zoo search --max-parameters 2_000_000 --members 3 --json").data
    specs = [zoo.Spec.from_dict(one["spec"]) for one in found["specs"]]
    assert len(specs) == 3
    assert sum(map(zoo.count_parameters, specs)) == found["parameters"] <= 2_000_000
    assert "total" in command("zoo search --draws 2").out


def test_a_seed_repeats_the_draw(command):
    """Another seed, another draw."""
    first, again, other = (command("zoo search --draws 2 --json --seed", seed).out for seed in (0, 0, 1))
    assert first == again != other


def test_a_study_saves_the_best(tmp_path, corpus, command):
    """Under a name with a number; all of it is in one JSON document."""
    where = ["--corpus", corpus, "--registry", tmp_path / "registry.json"]
    line = "zoo study --max-parameters 60_000 --contexts 2 --epochs 2 --draws 3 --save found"
    assert "saved as found-1@1" in command(line, *where).out
    found = command(line, "--json", "--best", 2, *where).data
    assert len(found["trials"]) == 3
    assert found["saved"] == ["found-1@1", "found-2@1"]
    assert zoo.Registry(tmp_path / "registry.json").list() == ["found-1", "found-2"]


def test_the_draw_of_a_study_has_a_seed_of_its_own(command, monkeypatch):
    """Without it, that of the recipe."""
    drawn: list[list[zoo.Spec]] = []
    monkeypatch.setattr("zoo.search.study.halving", lambda specs, *_, **__: drawn.append(list(specs)) or [])
    for words in ([], ["--seed", 1], ["--draw-seed", 1], ["--seed", 1, "--draw-seed", 0]):
        assert command("zoo study --draws 2 --json", *words).code == 0
    assert drawn[0] == drawn[3] != drawn[1] == drawn[2]


def test_a_picture_is_of_the_draw_that_the_flags_describe(tmp_path, command, monkeypatch):
    """Inputs by context, no norms where there are none; the counts are the built models'."""
    pictured: list[zoo.search.Samples] = []
    picture = zoo.search.plot_samples

    def plot(samples: zoo.search.Samples) -> object:
        pictured.append(samples)
        return picture(samples)

    monkeypatch.setattr("zoo.search.pictures.plot_samples", plot)
    words = "--max-parameters 60_000 --context 3 --option batchnorm=false --samples 20 --seed 1"
    assert "20 samples" in command(f"zoo picture {tmp_path}/draws.png {words}").out
    assert (tmp_path / "draws.png").stat().st_size > 1000
    for widths, depth, count in zip(pictured[0].widths, pictured[0].depths, pictured[0].parameters, strict=True):
        options = {"widths": [int(width) for width in widths[:depth]], "batchnorm": False}
        assert zoo.count_parameters(zoo.Spec("mlp", 27, 3, 40, options=options)) == count


def test_a_study_refuses_an_impossible_name_before_training(command, registry):
    """Not after hours of it."""
    registry.alias("found-1", "a@1")
    found = command("zoo study --save found --corpus nowhere")
    assert (found.code, "found-1" in found.err) == (2, True)
