"""The registry's data model: names, versions, references, aliases, ensembles, transactions."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zoo
from zoo import CheckpointError, RegistryError, _files
from zoo.checkpoint.header import read_header

SPEC = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})
CLASSES = ("no", "yes")


def model(seed: int = 0) -> torch.nn.Module:
    """A small one."""
    return zoo.build(SPEC, seed=seed)


@pytest.fixture
def registry(tmp_path: Path) -> zoo.Registry:
    """Two versions of `a`, one of `b`."""
    registry = zoo.Registry(tmp_path / "registry.json")
    for name, seed in (("a", 0), ("a", 1), ("b", 2)):
        registry.register(name, model(seed), spec=SPEC, classes=CLASSES, metrics={"valid/accuracy": 0.5 + seed / 10})
    return registry


def test_a_missing_registry_says_how_to_make_one(tmp_path, monkeypatch):
    """Reading makes nothing; the environment and the working folder are the places looked at."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RegistryError, match="zoo register"):
        zoo.Registry().list()
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "other.json"))
    assert zoo.Registry().path == tmp_path / "other.json"
    assert list(tmp_path.iterdir()) == []


def test_what_was_registered_is_loaded_bit_by_bit(registry):
    """The model answers as the one that was registered, in eval mode."""
    x = torch.randn(3, 6)
    loaded = registry.load("a@2")
    assert not loaded.training
    assert torch.equal(loaded(x), model(1).eval()(x))
    entry = registry.get("a@2")
    assert (entry.spec, entry.classes, entry.parameters) == (SPEC, CLASSES, zoo.count_parameters(SPEC))


@pytest.mark.parametrize("most", [None, 100])
def test_versions_of_one_spec_are_read_into_one_stack(registry, monkeypatch, most):
    """Every tensor as it was registered, in the order asked for, also where the system reads in small bites."""

    class Bites(_files.System):
        def read_into(self, file: int, *targets: memoryview) -> int:
            return super().read_into(file, targets[0][:most])

    if most:
        monkeypatch.setattr(zoo._files, "system", Bites())
    stacked = registry.stacked(["b", "a@1", "a@2"])
    states = [model(seed).state_dict() for seed in (2, 0, 1)]
    assert stacked.keys() == states[0].keys()
    assert all(torch.equal(stacked[name], torch.stack([state[name] for state in states])) for name in stacked)


def test_only_sound_versions_of_one_spec_are_stacked(registry):
    """Another spec is a misfit; NaN under a right hash is refused by the name of its version."""
    wider = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 5, "depth": 1})
    registry.register("wider", zoo.build(wider, seed=0), spec=wider, classes=CLASSES)
    with pytest.raises(CheckpointError, match="MISFIT"):
        registry.stacked(["a", "wider"])
    entry = registry.get("b")
    data = bytearray(registry.blobs.path(entry.sha256).read_bytes())
    weight = read_header(data).pieces["1.weight"]
    data[weight.start : weight.start + 4] = b"\xff\xff\xff\x7f"
    sha256 = registry.blobs.put(bytes(data))
    registry.path.write_text(registry.path.read_text().replace(entry.sha256, sha256))
    with pytest.raises(CheckpointError, match=r"b@1.*NOT_FINITE"):
        registry.stacked(["a", "b"])


class Counting(_files.System):
    """Counts how often each file is opened."""

    def __init__(self) -> None:
        self.opened: Counter[str] = Counter()

    def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        """As ever."""
        self.opened[path.name] += 1
        return super().open(path, flags, mode)


def test_a_snapshot_reads_the_file_once_and_stays_as_it_is(registry, monkeypatch):
    """However much is asked of it, and whatever is changed meanwhile; an entry of it needs no second reading."""
    registry.register_ensemble("both", {"members": ["a", "b"], "rule": "mean"})
    registry.alias("best", "a@1")
    counting = Counting()
    monkeypatch.setattr(_files, "system", counting)
    found = registry.snapshot()
    entries = [found.get(reference) for reference in ("a", "a@1", "best", "b")]
    assert [entry.reference for entry in entries] == ["a@2", "a@1", "a@1", "b@1"]
    assert (found.list(), found.list_ensembles(), found.aliases()) == (["a", "b"], ["both"], {"best": "a@1"})
    assert [found.get(member) for member in found.get_ensemble("both").members] == [entries[0], entries[3]]
    assert len(found.entries()) == len(found.table()) == 3
    assert torch.equal(registry.stacked(entries)["1.bias"][1], registry.load(entries[1]).state_dict()["1.bias"])
    assert counting.opened["registry.json"] == 1
    zoo.Registry(registry.path).remove("a@2", force=True)
    assert found.get("a").number == 2
    assert registry.get("a").number == 1


def test_references_are_stacked_by_one_reading(registry, monkeypatch):
    """All of them are understood by one snapshot."""
    counting = Counting()
    monkeypatch.setattr(_files, "system", counting)
    registry.stacked(["a@1", "a@2", "b"])
    assert counting.opened["registry.json"] == 1


def test_references_point_to_versions(registry):
    """A name is its newest version; numbers, ids and name@id are exact."""
    second = registry.get("a@2")
    assert registry.get("a") == registry.get(f"a@{second.id}") == registry.get(second.id) == second
    for reference, message in (("a@9", "it has 1, 2"), ("aa", "did you mean 'a'|expected one of"), ("a@x", "NAME@ID")):
        with pytest.raises(RegistryError, match=message):
            registry.get(reference)


def test_the_same_content_again_is_the_same_version(registry):
    """Nothing is written, whatever else the second registration says about it."""
    before = registry.path.read_bytes()
    again = registry.register("a", model(0), spec=SPEC, classes=CLASSES, note="again")
    assert again.reference == "a@1"
    assert registry.path.read_bytes() == before
    with pytest.raises(RegistryError, match="has these weights already, with the classes"):
        registry.register("a", model(0), spec=SPEC, classes=("yes", "no"))


def test_numbers_are_never_used_again(registry):
    """Also when all versions of a model were removed."""
    registry.remove("a@2")
    assert registry.register("a", model(3), spec=SPEC, classes=CLASSES).number == 3
    registry.remove("a@*")
    assert registry.list() == ["b"]
    assert registry.register("a", model(4), spec=SPEC, classes=CLASSES).number == 4


def test_names_differ_by_more_than_capitals_and_are_shared(registry):
    """Models, ensembles and aliases have one name space."""
    registry.alias("best", "a@1")
    registry.register_ensemble("both", {"members": ["a", "b"], "rule": {"rule": "mean"}})
    for taken in ("A", "Best", "both"):
        with pytest.raises(RegistryError, match="is taken by"):
            registry.register(taken, model(9), spec=SPEC, classes=CLASSES)
    with pytest.raises(RegistryError, match="is taken by 'a'"):
        registry.alias("a", "b")


def test_an_alias_remembers_and_can_demand(registry):
    """It goes back step by step, and moves only from where it is expected."""
    registry.alias("best", "a@1", expect="")
    registry.alias("best", "a@2", expect="a@1")
    with pytest.raises(RegistryError, match="expected the alias 'best' to point to 'a@1', it points to 'a@2'"):
        registry.alias("best", "b", expect="a@1")
    registry.alias("best", "b")
    registry.alias_back("best")
    assert registry.get("best").reference == "a@2"
    registry.alias_back("best")
    assert registry.aliases() == {"best": "a@1"}
    with pytest.raises(RegistryError, match="nothing to go back to"):
        registry.alias_back("best")


def test_an_alias_needs_a_target(registry):
    """An empty one would make nothing, or a text that is refused."""
    registry.alias("best", "a@1")
    for name in ("best", "new"):
        with pytest.raises(RegistryError, match=f"expected a target for the alias '{name}', got nothing"):
            registry.alias(name, "")
    registry.alias("best", "b", expect="a@1")
    with pytest.raises(RegistryError, match="CONFLICT"):
        registry.alias_back("best", expect="a@1")
    registry.alias_back("best", expect="b@1")
    assert registry.aliases() == {"best": "a@1"}


def test_a_name_never_stands_in_the_way_of_an_id(registry):
    """Members of ensembles are named by id: new names of that form are refused, and an old one does not count."""
    registry.register_ensemble("both", {"members": ["a@1", "a@2"], "rule": "mean"})
    first = registry.get("a@1").id
    for name in (first, "0123456789ab"):
        with pytest.raises(RegistryError, match="which has the form of a version's id"):
            registry.alias(name, "b@1")
        with pytest.raises(RegistryError, match="which has the form of a version's id"):
            registry.register(name, model(7), spec=SPEC, classes=CLASSES)
        with pytest.raises(RegistryError, match="which has the form of a version's id"):
            registry.register_ensemble(name, {"members": ["b"], "rule": "mean"})
    registry.alias("best", "b@1")
    registry.path.write_text(registry.path.read_text().replace('"best"', f'"{first}"'))
    assert registry.get(first).reference == "a@1"
    members = registry.get_ensemble("both").members
    assert [entry.reference for entry in map(registry.get, members)] == ["a@1", "a@2"]
    registry.path.write_text(registry.path.read_text().replace(f'"{first}":{{"before"', '"abcdefabcdef":{"before"'))
    assert registry.get("abcdefabcdef").reference == "b@1"


def test_what_is_held_is_removed_by_force_only(registry):
    """The refusal and the forced removal both name what held it."""
    registry.register_ensemble("both", {"members": ["a@1", "b"], "rule": {"rule": "mean"}})
    registry.alias("best", "a@1")
    with pytest.raises(RegistryError, match="held by the ensemble 'both', the alias 'best'"):
        registry.remove("a@1")
    assert registry.remove("a@1", force=True) == ["the ensemble 'both'", "the alias 'best'"]
    assert (registry.list_ensembles(), registry.aliases(), registry.get("a").number) == ([], {}, 2)


def test_an_ensemble_names_its_members_by_id(registry):
    """References are resolved when it is registered: a newer version does not change it."""
    data = {"members": ["a", "b@1"], "rule": {"rule": "WeightedMean", "weights": [0.25, 0.75]}, "fitted_on": "f" * 64}
    made = registry.register_ensemble("both", {**data, "weights": [0.25, 0.75], "temperatures": [1, 2]})
    registry.register("a", model(8), spec=SPEC, classes=CLASSES)
    again = registry.get_ensemble("both")
    assert again == made
    assert [registry.get(member).reference for member in again.members] == ["a@2", "b@1"]
    assert (again.weights, again.temperatures, again.classes) == ((0.25, 0.75), (1.0, 2.0), CLASSES)
    with pytest.raises(RegistryError, match="another ensemble"):
        registry.register_ensemble("both", {**data, "members": ["b"]})


def test_members_of_an_ensemble_have_the_same_classes(registry):
    """In the same order, since columns are combined."""
    registry.register("c", model(5), spec=SPEC, classes=("yes", "no"))
    with pytest.raises(RegistryError, match="expected members of 'odd' with the classes"):
        registry.register_ensemble("odd", {"members": ["a", "c"], "rule": {"rule": "mean"}})


def test_a_transaction_commits_once_or_not_at_all(registry):
    """Inside it the new names are seen; after an error they are gone."""
    before = registry.path.read_bytes()

    def interrupted() -> None:
        with registry.transaction():
            registry.register("c", model(5), spec=SPEC, classes=CLASSES)
            assert registry.list() == ["a", "b", "c"]
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert registry.path.read_bytes() == before
    with registry.transaction():
        registry.register("c", model(5), spec=SPEC, classes=CLASSES)
        registry.alias("best", "c")
        assert registry.path.read_bytes() == before
    assert registry.get("best").name == "c"


def test_a_foreign_file_is_checked_and_written_anew(registry, tmp_path):
    """Its bytes never enter the store; its weights do."""
    path = tmp_path / "foreign.safetensors"
    save_file(model(6).state_dict(), path, {"a": "1", "b": "2"})
    entry = registry.register("c", path, spec=SPEC, classes=CLASSES)
    assert entry.kind == "imported"
    assert registry.blobs.path(entry.sha256).read_bytes() != path.read_bytes()
    x = torch.randn(2, 6)
    assert torch.equal(registry.load("c")(x), model(6).eval()(x))
    with pytest.raises(RegistryError, match="expected a spec and class names"):
        registry.register("d", path)
    path.write_bytes(b"\x80\x02}q\x00." + bytes(40))
    with pytest.raises(CheckpointError, match="looks like a pickle"):
        registry.register("d", path, spec=SPEC, classes=CLASSES)


def test_weights_that_are_not_finite_are_not_registered(registry):
    """Nothing is written, not even a blob."""
    bad = model()
    bad.state_dict()["1.bias"].fill_(float("nan"))
    before = sorted(registry.path.parent.rglob("*"))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        registry.register("c", bad, spec=SPEC, classes=CLASSES)
    assert sorted(registry.path.parent.rglob("*")) == before


def test_keys_of_other_programs_outlive_every_change(registry):
    """Keys that begin with `x-`, of the whole file, a model, a version, an ensemble, an alias and its memory."""
    registry.alias("best", "a@1")
    registry.register_ensemble("both", {"members": ["a", "b"], "rule": "mean"})
    table = json.loads(registry.path.read_text())
    holders = (table, table["models"]["a"], *table["models"]["a"]["versions"].values())
    table["aliases"]["best"]["before"] = [{"ensemble": "both"}]
    remembered = table["aliases"]["best"]["before"][0]
    for holder in (*holders, table["ensembles"]["both"], table["aliases"]["best"], remembered):
        holder["x-theirs"] = {"kept": [1]}
        holder["x-empty"] = []
    registry.path.write_text(json.dumps(table))
    registry.register("a", model(5), spec=SPEC, classes=CLASSES)
    registry.annotate("a@1", note="seen")
    registry.alias("best", "a@2")
    registry.alias_back("best")
    registry.remove("a@3")
    assert registry.path.read_text().count('"x-theirs":{"kept":[1]}') == 6
    assert registry.path.read_text().count('"x-theirs":{"kept": [1]}') == 1  # at the top as it stands
    assert registry.path.read_text().count('"x-empty":[]') == 7
    assert registry.aliases()["best"] == "a@1"
    with pytest.raises(RegistryError, match="the alias 'best'"):
        registry.remove("a@1")


UNPRINTABLE = ("half a pair \ud800", "a bell \x07", "another line's end \r", "reversed \u202e")
UNFIT = [
    *({"note": text} for text in UNPRINTABLE),
    *({"tags": [text]} for text in UNPRINTABLE),
    *({"classes": (text, "yes")} for text in UNPRINTABLE),
    *({"recipe": {"a": value}} for value in (float("nan"), float("inf"), 2**63, (1, 2), {1: 2}, b"", "\udfff")),
    *(
        {"metrics": {"a": value}}
        for value in (float("nan"), "x", {"unit": "s"}, {"value": 1, "n": "ten"}, {"value": 1, "x": 2})
    ),
    *({"note": 5}, {"trained_on": 5}, {"kind": "found"}),
    *({"tags": "best"}, {"tags": None}, {"tags": [5]}, {"metrics": ["accuracy"]}, {"spec": SPEC.to_dict()}),
    *({"classes": 5}, {"classes": "no"}, {"parents": "a"}, {"parents": 5}, {"recipe": [1]}),
]


@pytest.mark.parametrize("about", UNFIT, ids=ascii)
def test_what_cannot_be_kept_is_refused_without_a_trace(registry, about):
    """One error of the project; neither the file nor the store has changed."""

    def state() -> list[bytes | str]:
        return [registry.path.read_bytes(), *sorted(path.name for path in registry.blobs.folder.iterdir())]

    before = state()
    with pytest.raises((RegistryError, CheckpointError)):
        registry.register("new", model(9), **{"spec": SPEC, "classes": CLASSES, **about})
    assert state() == before


@pytest.mark.parametrize(
    "about",
    [
        *({"note": text} for text in UNPRINTABLE),
        *({"weights": value} for value in ([float("nan")], ["x"], 5, [1.0, 2.0])),
        *({"rule": value} for value in ({"a": float("inf")}, {"a": (1,)}, {1: 2})),
        *({"members": value} for value in ([], 5, "a")),
        *({"classes": value} for value in (5, "no")),
        *({"tags": value} for value in ("best", 5)),
        {"colour": "red"},
    ],
    ids=ascii,
)
def test_an_ensemble_that_cannot_be_kept_is_refused_without_a_trace(registry, about):
    """Likewise."""
    before = registry.path.read_bytes()
    with pytest.raises(RegistryError):
        registry.register_ensemble("new", {"members": ["a"], "rule": "mean", **about})
    assert registry.path.read_bytes() == before


@pytest.mark.parametrize("given", ["best", None, 5, [5]], ids=repr)
def test_tags_are_a_list_of_texts(registry, given):
    """A single word would become its letters: one error, for models, for ensembles, and for what is said later."""
    before = registry.path.read_bytes()
    with pytest.raises(RegistryError, match="expected tags as a list of strings"):
        registry.register("new", model(9), spec=SPEC, classes=CLASSES, tags=given)
    with pytest.raises(RegistryError, match="expected tags as a list of strings"):
        registry.register_ensemble("new", {"members": ["a"], "rule": "mean"}, tags=given)
    with pytest.raises(RegistryError, match="expected tags as a list of strings"):
        registry.annotate("a", add_tags=given)
    assert registry.path.read_bytes() == before


def test_what_is_no_ensemble_is_refused_as_such(registry):
    """Neither plain data nor an object that has a to_json()."""
    with pytest.raises(RegistryError, match=r"expected plain data or an object with to_json\(\), got '5'"):
        registry.register_ensemble("new", 5)


def test_an_unknown_architecture_in_the_file_is_looked_up_and_nothing_else(registry):
    """Listing works; loading fails, since the table of architectures does not have it."""
    text = registry.path.read_text().replace('"architecture":"cylinder"', '"architecture":"os.system"')
    registry.path.write_text(text)
    assert registry.list() == ["a", "b"]
    with pytest.raises(RegistryError, match="unknown architecture"):
        _ = registry.get("a").spec
    with pytest.raises(RegistryError, match="unknown architecture"):
        registry.load("a")


def test_the_table_has_a_column_per_metric(registry):
    """Name, number, id, architecture, parameters, metrics, created."""
    registry.annotate("b", metrics={"valid/loss": {"value": 1.5, "unit": "nats"}}, note="n", tags=["t", "s"])
    table = registry.table("*", exclude="none*")
    head = ["name", "number", "id", "architecture", "parameters"]
    assert list(table.columns) == [*head, "valid/accuracy", "valid/loss", "created"]
    assert table["valid/loss"].isna().tolist() == [True, True, False]
    assert registry.get("b").tags == ("s", "t")


def test_two_versions_are_compared(registry):
    """Spec, metrics and each tensor that moved; a version is equal to itself."""
    found = registry.diff("a@1", "a@2")
    assert found["metrics"] == {"valid/accuracy": [0.5, 0.6, pytest.approx(0.1)]}
    assert {"1.weight", "1.bias"} <= {row["name"] for row in found["tensors"]}
    assert all(row["largest"] > 0 for row in found["tensors"])
    same = registry.diff("a@1", "a@1")
    assert not any(same[part] for part in ("about", "spec", "recipe", "classes", "metrics", "tensors"))


def test_metrics_are_measured_again_on_their_own_frames(registry, frames):
    """A recorded number that is not reproduced is found; other frames' numbers are left alone."""
    spec = zoo.Spec("cylinder", features=6, context=1, classes=4, options={"width": 4, "depth": 1})
    net = zoo.build(spec, seed=0).eval()
    x = zoo.windows(frames, torch.arange(len(frames)), 1)
    accuracy = float((net(x).argmax(1) == frames.labels).float().mean())
    metrics = {"valid/accuracy": {"value": accuracy, "frames": frames.fingerprint}, "test/accuracy": 0.9}
    registry.register("c", net, spec=spec, classes=frames.classes, metrics=metrics)
    (row,) = registry.measure("c", frames)
    assert row["agrees"] is True
    registry.annotate("c", metrics={"valid/accuracy": {"value": accuracy - 0.1, "frames": frames.fingerprint}})
    assert registry.measure("c", frames)[0]["agrees"] is False


def test_verify_finds_code_that_computes_otherwise(registry):
    """The bytes are right; what was recorded at registration is not reproduced."""
    text = registry.path.read_text()
    start = text.index('"values":[') + len('"values":[')
    end = text.index(",", start)
    text = text[:start] + "99.5" + text[end:]
    at = text.rindex('"digest":"', 0, start) + len('"digest":"')
    registry.path.write_text(text[:at] + "0" * 16 + text[at + 16 :])
    assert registry.verify() == []
    assert [problem.reason for problem in registry.verify(probe=True)] == ["PROBE"]


def test_listing_does_not_import_torch(registry):
    """Names, entries and resolving need neither torch nor the blobs."""
    code = (
        "import sys, zoo; r = zoo.Registry(sys.argv[1]); print(r.list(), r.get('a').parameters, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(registry.path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['a', 'b'] 42 False"


def test_no_code_is_taken_from_data():
    """Nothing unpickles, evaluates or imports by name, and the file holds no path."""
    for package in ("zoo", "ensemble"):
        for path in Path(zoo.__path__[0]).parent.joinpath(package).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            modules -= {"importlib"} if path.name == "_console.py" else set()  # `--import`, which a person types
            loads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.load"]
            assert not names & {"eval", "exec", "__import__"}, path
            assert not modules & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "importlib"}, path
            allowed = path.name == "adoption.py"  # tensors alone, held by test_house
            assert len(loads) == allowed, path


def test_the_file_holds_no_path(registry):
    """Blobs are found by their hash beside the file: the folder may be moved."""
    assert str(registry.path.parent) not in registry.path.read_text()
    moved = registry.path.parent.rename(registry.path.parent.with_name("moved"))
    assert zoo.Registry(moved / "registry.json").verify() == []


def test_a_transaction_keeps_what_others_commit_meanwhile(registry):
    """No lock is held while it is open: its changes are made again on what is there then."""
    with registry.transaction():
        early = registry.register("a", model(5), spec=SPEC, classes=CLASSES)
        zoo.Registry(registry.path).register("a", model(6), spec=SPEC, classes=CLASSES)
    assert early.number == 3
    assert registry.get(early.id).number == 4
    assert [entry.number for entry in registry.entries("a")] == [1, 2, 3, 4]


def test_a_name_is_taken_from_its_registration_on_also_within_the_first_transaction(tmp_path):
    """Before the registry has a file."""
    registry = zoo.Registry(tmp_path / "registry.json")
    with registry.transaction():
        registry.check_nameable("A")
        registry.register("a", model(), spec=SPEC, classes=CLASSES)
        with pytest.raises(zoo.RegistryError, match="taken by 'a'"):
            registry.check_nameable("A")
    assert registry.list() == ["a"]


def test_find_gives_what_a_reference_stands_for(registry):
    """A version or an ensemble, by its name or by an alias."""
    registry.register_ensemble("both", {"members": ["a@1", "b"], "rule": "mean"})
    registry.alias("best", "a@1")
    registry.alias("final", "both")
    now = registry.snapshot()
    found = [now.find(reference).reference for reference in ("a", "a@1", now.get("b").id, "best", "both", "final")]
    assert found == ["a@2", "a@1", "b@1", "a@1", "both", "both"]
    with pytest.raises(zoo.RegistryError, match="unknown name 'c'"):
        now.find("c")
