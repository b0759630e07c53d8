"""The commands train, average, runs and search, and the script that breeds the zoo."""

import json
from pathlib import Path

import pytest
import torch

import zoo
from zoo import Recipe, Registry
from zoo._console import run_app
from zoo.cli import app

ROOT = Path(__file__).parents[1]
SMALL = ["--spec", "cylinder", "--context", "2", "--option", "width=16", "--option", "depth=1", "--batch-size", "64"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A few recordings of the bundled corpus as folders."""
    for partition in ("train", "valid"):
        few = zoo.sample_corpus(partition).select(torch.arange(4))
        zoo.write_corpus(few, tmp_path / "corpus", partition)
    return tmp_path / "corpus"


def zoo_says(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = run_app(app, [str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_train_registers_and_repeats(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file's fields, a flag over them; --from repeats to the bit, so the weights are the same."""
    registry = tmp_path / "registry.json"
    Recipe(epochs=5, learning_rate=0.01).write(tmp_path / "recipe.toml")
    common = ["--corpus", corpus, "--registry", registry, "--json"]
    code, out, _ = zoo_says(capsys, "train", "a", *SMALL, "--recipe", tmp_path / "recipe.toml", "--epochs", 2, *common)
    assert code == 0
    recipe = json.loads(out)["recipe"]
    assert (recipe["epochs"], recipe["learning_rate"], recipe["batch_size"]) == (2, 0.01, 64)
    code, out, _ = zoo_says(capsys, "train", "b", "--from", "a", *common)
    entries = Registry(registry)
    assert entries.checkpoint("b").digest == entries.checkpoint("a@1").digest
    code, _, _ = zoo_says(capsys, "train", "a", "--from", "a", "--seed", 5, *common)
    assert entries.get("a").number == 2


@pytest.mark.parametrize(
    ("name", "words"), [("Best", "is taken by 'best'"), ("0123456789ab", "form of a version's id")]
)
def test_a_name_that_cannot_be_is_refused_before_the_training(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    """Not after hours of it."""
    registry, common = tmp_path / "registry.json", ["--corpus", corpus, "--registry", tmp_path / "registry.json"]
    zoo_says(capsys, "train", "a", *SMALL, "--epochs", 1, *common)
    Registry(registry).alias("best", "a@1")
    code, _, error = zoo_says(capsys, "train", name, *SMALL, "--directory", tmp_path / "run", *common)
    assert (code, words in error, (tmp_path / "run").exists()) == (2, True, False)


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--context", "1", "--option", "width=8"], {"context": 1, "width": 8, "depth": 1}),
        (["--spec", "cylinder"], {"context": 2, "width": 16, "depth": 1}),
        (["--spec", "mlp", "--option", "widths=[9]"], {"architecture": "mlp", "context": 2, "widths": (9,)}),
    ],
)
def test_flags_change_single_fields_of_a_recorded_spec(
    words: list[str],
    fields: dict[str, object],
    tmp_path: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Context and options in place of the recorded; another architecture keeps features, context and classes."""
    common = ["--corpus", corpus, "--registry", tmp_path / "registry.json", "--epochs", 1]
    assert zoo_says(capsys, "train", "a", *SMALL, *common)[0] == 0
    assert zoo_says(capsys, "train", "b", "--from", "a", *words, *common)[0] == 0
    spec = Registry(tmp_path / "registry.json").get("b").spec
    found = {"architecture": spec.architecture, "context": spec.context, **spec.options}
    assert {name: found[name] for name in fields} == fields


def test_flags_change_single_fields_of_a_written_spec(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that was said is left out."""
    registry, written = tmp_path / "registry.json", zoo.Spec("cylinder", 27, 3, 40, options={"width": 4}).canonical()
    words = ["--spec", written, "--context", 1, "--option", "depth=2", "--epochs", 1]
    assert zoo_says(capsys, "train", "a", *words, "--corpus", corpus, "--registry", registry)[0] == 0
    spec = Registry(registry).get("a").spec
    assert (spec.context, spec.options["width"], spec.options["depth"]) == (1, 4, 2)


def test_average_takes_a_runs_epochs_and_runs_compares(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of epochs becomes one averaged model; the log of the run is a row."""
    registry, run = tmp_path / "registry.json", tmp_path / "runs" / "first"
    code, out, _ = zoo_says(
        capsys, "train", *SMALL, "--epochs", 2, "--keep", 0, "--directory", run, "--corpus", corpus, "--json"
    )
    assert code == 0
    assert set(json.loads(out)) == {"valid/accuracy", "valid/loss"}
    words = ["average", "mean", run, "--corpus", corpus, "--registry", registry, "--json"]
    code, out, _ = zoo_says(capsys, *words, "--picture", tmp_path / "line.png")
    assert (code, json.loads(out)["kind"]) == (0, "averaged")
    assert (tmp_path / "line.png").stat().st_size > 1000
    code, out, _ = zoo_says(capsys, "runs", tmp_path / "runs", "--json")
    assert (code, json.loads(out)[0]["done"]) == (0, 2)


def test_a_single_epoch_is_no_average(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run keeps one epoch unless it is told otherwise; the error says how."""
    run, registry = tmp_path / "run", tmp_path / "registry.json"
    assert zoo_says(capsys, "train", *SMALL, "--epochs", 2, "--directory", run, "--corpus", corpus)[0] == 0
    code, _, said = zoo_says(capsys, "average", "mean", run, "--corpus", corpus, "--registry", registry)
    assert code == 2
    assert f"expected at least 2 checkpoints to average, got 1 from {run}; a run keeps" in said
    assert "--keep 0" in said
    assert not registry.exists()


def test_search_draws_an_ensemble_within_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """As built, all members together."""
    code, out, _ = zoo_says(capsys, "search", "--budget", 2_000_000, "--members", 3, "--json")
    specs = [zoo.Spec.from_dict(one["spec"]) for one in json.loads(out)["specs"]]
    assert code == 0
    assert len(specs) == 3
    assert sum(map(zoo.count_parameters, specs)) == json.loads(out)["parameters"] <= 2_000_000


def test_search_registers_the_best_of_a_study(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One flag; a picture of the draw is one file, and the study goes on."""
    words = ["--budget", 60_000, "--contexts", 2, "--epochs", 2, "--corpus", corpus]
    registry = tmp_path / "registry.json"
    words += ["--draws", 3, "--study", "--register", "found", "--registry", registry]
    code, out, said = zoo_says(capsys, "search", *words, "--picture", tmp_path / "draws.png", "--samples", 1000)
    assert code == 0
    assert "accuracy" in out
    assert f"wrote {tmp_path / 'draws.png'}" in said
    assert Registry(registry).list() == ["found-1"]


def test_a_picture_is_of_the_draw_that_the_flags_describe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs by features and context, no norms where there are none; the counts are the built models'."""
    pictured: list[zoo.search.Samples] = []
    picture = zoo.search.plot_samples

    def plot(samples: zoo.search.Samples) -> object:
        pictured.append(samples)
        return picture(samples)

    monkeypatch.setattr("zoo.search.pictures.plot_samples", plot)
    words = ["--budget", 60_000, "--contexts", 3, "--option", "batchnorm=false", "--samples", 20, "--draw-seed", 1]
    assert zoo_says(capsys, "search", *words, "--picture", tmp_path / "draws.png")[0] == 0
    for widths, depth, count in zip(pictured[0].widths, pictured[0].depths, pictured[0].parameters, strict=True):
        options = {"widths": [int(width) for width in widths[:depth]], "batchnorm": False}
        assert zoo.count_parameters(zoo.Spec("mlp", 27, 3, 40, options=options)) == count


def test_the_draw_has_a_seed_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Without it, that of the recipe."""
    said = [
        zoo_says(capsys, "search", "--draws", 2, "--json", *words)[1]
        for words in ([], ["--seed", 1], ["--draw-seed", 1], ["--seed", 1, "--draw-seed", 0])
    ]
    assert said[0] == said[3] != said[1] == said[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "a"], "expected --spec"),
        (["train", *SMALL], "expected a name to register"),
        (["train", "a@2", *SMALL], "a@2"),
        (["train", "a", "--spec", "cylindr"], "did you mean 'cylinder'"),
        (["train", "a", "--spec", "cylinder", "--optimiser", "adm"], "did you mean 'adam'"),
        (["train", "a", "--spec", "cylinder", "--option", "width"], "NAME=VALUE"),
        (["train", "a", *SMALL, "--device", "moon"], "expected a device such as 'cpu'"),
        (["search", "--register", "x", "--draws", "2"], "expected --study or --optuna with --register x"),
        (["search", "--picture", "x.png", "--members", "3"], "--picture is of single models"),
        (["search", "--picture", "x.png", "--architectures", "cyl*"], "--picture is of single models"),
        (["search", "--picture", "x.png", "--contexts", "5", "--contexts", "9"], "--picture is of single models"),
        (["runs", "nowhere"], "expected logs"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the way out in them."""
    code, _, said = zoo_says(capsys, *words)
    assert code == 2
    assert message in said
    assert said.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, exit code 130."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zoo.training.run.train_group", interrupted)
    code, _, said = zoo_says(capsys, "train", "a", *SMALL, "--directory", tmp_path / "run", "--corpus", corpus)
    assert (code, said) == (130, f"error: interrupted; the same command goes on in {tmp_path / 'run'}\n")


@pytest.mark.skipif(not (ROOT / "registry.json").exists(), reason="the wheel's tests stand beside no registry")
def test_the_projects_own_zoo_is_what_the_script_breeds() -> None:
    """Eight members at least, five architectures, two contexts, 12 MB; bred on the bundled corpus as it is now."""
    entries = [entry for entry in Registry(ROOT / "registry.json").entries() if entry.kind == "trained"]
    assert len(entries) >= 8
    assert len({entry.spec.architecture for entry in entries}) >= 5
    assert len({entry.spec.context for entry in entries}) >= 2
    assert sum(entry.bytes for entry in entries) <= 12_000_000
    frames = {part: zoo.sample_corpus(part).fingerprint for part in ("train", "valid")}
    for entry in entries:
        assert entry.trained_on == frames["train"]
        assert entry.metrics["valid/accuracy"]["frames"] == frames["valid"]
        Recipe.from_dict(entry.recipe or {})
