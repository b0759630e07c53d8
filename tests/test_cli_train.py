"""The commands that make models: train, average, runs, search, picture, study; the zoo that the project brings."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zoo
from zoo import Recipe, Registry
from zoo.cli.options import read_partition

ROOT = Path(__file__).parents[1]
SMALL = ["--spec", "cylinder", "--context", "2", "--option", "width=16", "--option", "depth=1", "--batch-size", "64"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A few recordings of the bundled corpus as folders."""
    for partition in ("train", "valid"):
        few = zoo.sample_corpus(partition).select(torch.arange(4))
        zoo.write_corpus(few, tmp_path / "corpus", partition)
    return tmp_path / "corpus"


def test_train_registers_and_repeats(tmp_path, corpus, command):
    """A file's fields, a flag over them; --from repeats to the bit, so the weights are the same."""
    registry = tmp_path / "registry.json"
    Recipe(epochs=5, learning_rate=0.01).write(tmp_path / "recipe.toml")
    common = ["--corpus", corpus, "--registry", registry, "--json"]
    trained = command("zoo train a", *SMALL, "--recipe", tmp_path / "recipe.toml", "--epochs", 2, *common)
    assert trained.code == 0
    recipe = trained.data["recipe"]
    assert (recipe["epochs"], recipe["learning_rate"], recipe["batch_size"]) == (2, 0.01, 64)
    assert command("zoo train b --from a", *common).code == 0
    entries = Registry(registry)
    assert entries.checkpoint("b").digest == entries.checkpoint("a@1").digest
    assert command("zoo train a --from a --seed 5", *common).code == 0
    assert entries.get("a").number == 2


def test_a_mapped_corpus_trains_the_same_model(tmp_path, corpus, command):
    """To the bit; its files are in the folder that is named, and the bundled speech has none."""
    common = [*SMALL, "--epochs", 1, "--registry", tmp_path / "registry.json"]
    command("zoo train a", *common, "--corpus", corpus, code=0)
    command("zoo train b", *common, "--corpus", corpus, "--mapped", tmp_path / "frames", code=0)
    entries = Registry(tmp_path / "registry.json")
    assert entries.checkpoint("b").digest == entries.checkpoint("a").digest
    assert len([*(tmp_path / "frames").iterdir()]) == 2
    wrong = command("zoo train c", *common, "--mapped", tmp_path, code=2)
    assert "expected --mapped beside --corpus" in wrong.err
    (tmp_path / "file").touch()
    wrong = command("zoo train c", *common, "--corpus", corpus, "--mapped", tmp_path / "file", code=2)
    assert "name a folder for it that can be written to" in wrong.err


def test_a_training_without_a_result_registers_nothing(tmp_path, corpus, command):
    """The validation loss is never finite: exit code 1, one line, and no registry."""
    frames = zoo.sample_corpus("valid").select(torch.arange(2))
    huge = zoo.FrameSet(frames.features.sign() * 3e38, frames.labels, frames.starts, frames.classes)
    zoo.write_corpus(huge, corpus, "huge")
    spec = zoo.Spec("cylinder", 27, 2, 40, normalisation="none", options={"width": 8, "batchnorm": False}).canonical()
    common = ["--corpus", corpus, "--registry", tmp_path / "registry.json", "--batch-size", 64, "--epochs", 1]
    code, out, error = command("zoo train a --valid huge --spec", spec, *common)
    assert (code, out) == (1, "")
    assert error.startswith("error: the loss on the validation frames was NaN or infinite")
    assert not (tmp_path / "registry.json").exists()


def test_another_schedule_takes_no_fields_of_the_recorded_one(tmp_path, corpus, command):
    """They would be refused beside it; a flag that can never act is."""
    common = ["--corpus", corpus, "--registry", tmp_path / "registry.json", "--json"]
    command("zoo train a", *SMALL, "--epochs", 3, "--schedule", "multi_step", "--milestones", 1, *common)
    recipe = command("zoo train b --from a --schedule cosine --epochs 1", *common).data["recipe"]
    assert (recipe["schedule"], recipe["milestones"]) == ("cosine", [])
    code, _, error = command("zoo train c --from a --momentum 0.5", *common)
    assert (code, "adamw takes no momentum" in error) == (2, True)


@pytest.mark.parametrize(
    ("name", "words"), [("Best", "is taken by 'best'"), ("0123456789ab", "form of a version's id")]
)
def test_an_impossible_name_is_refused_before_training(tmp_path, corpus, command, name, words):
    """Not after hours of it."""
    registry, common = tmp_path / "registry.json", ["--corpus", corpus, "--registry", tmp_path / "registry.json"]
    command("zoo train a", *SMALL, "--epochs", 1, *common)
    Registry(registry).alias("best", "a@1")
    code, _, error = command("zoo train", name, *SMALL, "--directory", tmp_path / "run", *common)
    assert (code, words in error, (tmp_path / "run").exists()) == (2, True, False)


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--context", "1", "--option", "width=8"], {"context": 1, "width": 8, "depth": 1}),
        (["--spec", "cylinder"], {"context": 2, "width": 16, "depth": 1}),
        (["--spec", "mlp", "--option", "widths=[9]"], {"architecture": "mlp", "context": 2, "widths": (9,)}),
    ],
)
def test_flags_change_single_fields_of_a_recorded_spec(words, fields, tmp_path, corpus, command):
    """Context and options in place of the recorded; another architecture keeps features, context and classes."""
    common = ["--corpus", corpus, "--registry", tmp_path / "registry.json", "--epochs", 1]
    assert command("zoo train a", *SMALL, *common).code == 0
    assert command("zoo train b", "--from", "a", *words, *common).code == 0
    spec = Registry(tmp_path / "registry.json").get("b").spec
    found = {"architecture": spec.architecture, "context": spec.context, **spec.options}
    assert {name: found[name] for name in fields} == fields


def test_flags_change_single_fields_of_a_written_spec(tmp_path, corpus, command):
    """Each flag replaces one of its fields."""
    registry, written = tmp_path / "registry.json", zoo.Spec("cylinder", 27, 3, 40, options={"width": 4}).canonical()
    words = ["--spec", written, "--context", 1, "--option", "depth=2", "--epochs", 1]
    assert command("zoo train a", *words, "--corpus", corpus, "--registry", registry).code == 0
    spec = Registry(registry).get("a").spec
    assert (spec.context, spec.options["width"], spec.options["depth"]) == (1, 4, 2)


def test_average_takes_a_runs_epochs_and_runs_compares(tmp_path, corpus, command):
    """A folder of epochs becomes one averaged model; the log of the run is a row."""
    registry, run = tmp_path / "registry.json", tmp_path / "runs" / "first"
    trained = command("zoo train --epochs 2 --keep 0 --json --directory", run, *SMALL, "--corpus", corpus)
    assert trained.code == 0
    assert set(trained.data) == {"valid/accuracy", "valid/loss"}
    where = ["--corpus", corpus, "--registry", registry]
    averaged = command("zoo average mean", run, *where, "--json", "--picture", tmp_path / "line.png")
    assert (averaged.code, averaged.data["kind"]) == (0, "averaged")
    assert (tmp_path / "line.png").stat().st_size > 1000
    assert command("zoo runs --json", tmp_path / "runs").data[0]["done"] == 2
    assert "first" in command("zoo runs", tmp_path / "runs").out


def test_a_single_epoch_is_no_average(tmp_path, corpus, command):
    """A run keeps one epoch by default; the error names the flag that keeps more."""
    run, registry = tmp_path / "run", tmp_path / "registry.json"
    assert command("zoo train", *SMALL, "--epochs", 2, "--directory", run, "--corpus", corpus).code == 0
    code, _, error = command("zoo average mean", run, "--corpus", corpus, "--registry", registry)
    assert code == 2
    assert f"expected at least 2 checkpoints to average, got 1 from {run}; a run keeps" in error
    assert "--keep 0" in error
    assert not registry.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train a", "expected --spec"),
        ("train --spec cylinder", "expected a name to save"),
        ("train a@2 --spec cylinder", "a@2"),
        ("train a --spec cylindr", "did you mean 'cylinder'"),
        ("train a --spec cylinder --optimiser adm", "did you mean 'adam'"),
        ("train a --spec cylinder --option width", "NAME=VALUE"),
        ("train a --spec cylinder --device moon", "expected a device such as 'cpu'"),
        ("train a --spec cylinder --precision float3", "float3"),
        ("average mean", "got 0 from no source"),
        ("runs nowhere", "expected logs"),
    ],
)
def test_an_error_is_one_line_with_the_way_out(line, message, command):
    """Exit code 2."""
    found = command(f"zoo {line}")
    assert found.code == 2
    assert message in found.err
    assert found.err.count("\n") == 1


def test_automatic_precision_is_recorded_as_what_it_was(command, corpus, tmp_path, monkeypatch):
    """Float32 where there is no GPU: a recipe names no choice that depends on the machine."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    where = ["--corpus", corpus, "--registry", tmp_path / "registry.json"]
    trained = command("zoo train a --epochs 1 --device auto --precision auto --json", *SMALL, *where)
    assert trained.data["recipe"]["precision"] == "float32"


def test_ctrl_c_names_the_way_to_resume(tmp_path, corpus, command, monkeypatch):
    """One line, exit code 130."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zoo.training.loop.train_group", interrupted)
    code, _, error = command("zoo train a", *SMALL, "--directory", tmp_path / "run", "--corpus", corpus)
    assert (code, error) == (130, f"error: interrupted; the same command resumes in {tmp_path / 'run'}\n")


@pytest.mark.skipif(not (ROOT / "registry.json").exists(), reason="the wheel's tests stand beside no registry")
def test_the_projects_own_zoo_is_what_the_script_trains():
    """Eight members at least, five architectures, two contexts, 12 MB; trained on the bundled corpus as it is now."""
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


def test_every_tracker_that_is_named_is_logged_to(tmp_path, command, monkeypatch):
    """Two at once, or none."""
    ended: list[str] = []

    def train(*_: object, log: zoo.logs.Log, **__: object) -> object:
        log.finish()
        return SimpleNamespace(metrics={})

    monkeypatch.setattr("zoo.train", train)
    for name in ("Wandb", "TensorBoard"):
        tracker = SimpleNamespace(finish=lambda name=name: ended.append(name))
        monkeypatch.setattr(f"zoo.logs.{name}", lambda _, tracker=tracker: tracker)
    command("zoo train --spec cylinder --directory run --wandb project --tensorboard", tmp_path, code=0)
    assert ended == ["Wandb", "TensorBoard"]
    command("zoo train --spec cylinder --directory run", code=0)
    assert len(ended) == 2


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


def test_a_corpus_with_classes_of_its_own(tmp_path, command):
    """Named by flag, as words or in a file; what is made from a model takes that model's classes."""
    few = zoo.sample_corpus("train").select(torch.arange(4))
    words = tuple(f"sound {index}" for index in range(40))
    for partition in ("train", "valid"):
        frames = zoo.FrameSet(few.features, few.labels, few.starts, words, few.names)
        zoo.write_corpus(frames, tmp_path / "corpus", partition)
    (tmp_path / "classes.txt").write_bytes(("\ufeff" + "\r\n".join(words) + "\r\n").encode())
    common = ["--corpus", tmp_path / "corpus", "--registry", tmp_path / "registry.json", "--json"]
    small, flag = [*SMALL, "--epochs", 1], ["--classes", tmp_path / "classes.txt"]
    assert "--classes" in command("zoo train a", *small, *common, code=2).err
    assert command("zoo train a", *small, *flag, *common, code=0).data["classes"] == [*words]
    assert command("zoo train b", *small, "--classes", *words, *common, code=0).data["classes"] == [*words]
    assert command("zoo train c --from a --seed 5", *common, code=0).data["classes"] == [*words]
    assert command("zoo average d a b", *common, code=0).data["classes"] == [*words]
    verified = command("zoo verify a --metrics", *common, code=0).data["metrics"]
    assert [row["agrees"] for row in verified] == [True, True]
    line = "zoo study --max-parameters 60_000 --contexts 2 --epochs 1 --draws 1"
    for partition in ("train", "valid"):
        shutil.rmtree(tmp_path / "corpus" / partition)
        frames = zoo.FrameSet(few.features[:, :13].contiguous(), few.labels, few.starts, (*words, "x"), few.names)
        zoo.write_corpus(frames, tmp_path / "corpus", partition)
    spec = command(line, "--classes", *words, "x", *common, code=0).data["trials"][0]
    assert spec["parameters"] < 60_000
    assert "blanks between them, or a file" in command("zoo train e --classes classes.tx", *small, *common, code=2).err
    assert "expected --corpus" in command("zoo train e", *small, *flag, code=2).err


def test_the_bundled_speech_in_another_order_of_its_classes() -> None:
    """The labels follow the names."""
    ours, theirs = read_partition(None, "valid"), read_partition(None, "valid", zoo.PHONEMES[::-1])
    assert theirs.classes == zoo.PHONEMES[::-1]
    assert torch.equal(theirs.labels, 39 - ours.labels)
    assert read_partition(None, "valid", own=["no", "yes"]).classes == zoo.PHONEMES


@pytest.mark.parametrize("wrong", ["--draws -1", "--draws 0", "--members -1"])
def test_a_number_of_specs_is_positive(command, wrong: str) -> None:
    """One line, before anything is read."""
    found = command(f"zoo search {wrong}", code=2)
    assert found.err.startswith("error: expected --draws of 1 or more and --members of 0 or more, got ")
