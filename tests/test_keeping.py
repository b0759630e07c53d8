"""The commands that keep and carry models: tables, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn

import zoo
from zoo import _console
from zoo.cli import app
from zoo.models.architectures import ARCHITECTURES

SPEC = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> zoo.Registry:
    """Two versions of `a`, in the place where commands look."""
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "registry.json"))
    registry = zoo.Registry()
    for seed in (0, 1):
        registry.register(
            "a", zoo.build(SPEC, seed=seed), spec=SPEC, classes=["no", "yes"], metrics={"accuracy": seed / 2}
        )
    return registry


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]):
    """Run a command line: its exit code, stdout and stderr."""

    def run(line: str, *more: str) -> tuple[int, str, str]:
        code = _console.run_app(app, [*line.split(), *more])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_list_is_a_table_for_people_and_json_for_programs(registry, say):
    """Both hold every version."""
    code, table, _ = say("list")
    assert (code, table.count("cylinder")) == (0, 2)
    assert "0.5000" in table
    data = json.loads(say("list a --json")[1])
    assert [(model["name"], model["number"]) for model in data["models"]] == [("a", 1), ("a", 2)]
    assert "nothing matches" in say("list nowhere*")[1]


def test_a_missing_registry_is_one_line_on_stderr(tmp_path, monkeypatch, say):
    """Exit code 2, and how to make one."""
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "none.json"))
    code, out, err = say("list")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "zoo register" in err


def test_register_takes_a_foreign_file_with_its_spec(registry, say, tmp_path):
    """The spec as JSON or in a file, the classes as words or in a file."""
    save_file(zoo.build(SPEC, seed=5).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "spec.json").write_text(SPEC.canonical())
    (tmp_path / "classes.txt").write_text("no\nyes\n")
    line = f"register b {tmp_path}/w.safetensors --spec {tmp_path}/spec.json --classes {tmp_path}/classes.txt --json"
    code, out, _ = say(line)
    assert (code, json.loads(out)["classes"]) == (0, ["no", "yes"])
    line = f"register c {tmp_path}/w.safetensors --classes no yes --tags x --spec"
    assert say(line, SPEC.canonical())[0] == 0
    assert registry.get("c").tags == ("x",)
    code, _, err = say(f"register d {tmp_path}/w.safetensors")
    assert (code, "expected a spec" in err) == (2, True)


def test_show_load_tag_and_note(registry, say):
    """Everything that is known of one version, and the words that people add."""
    assert say("tag a@1 x y")[0] == 0
    assert say("tag a@1 x --drop")[0] == 0
    assert say("note a@1", "the first")[0] == 0
    shown = json.loads(say("show a@1 --json")[1])
    assert (shown["tags"], shown["note"], shown["number"]) == (["y"], "the first", 1)
    assert "spec.architecture" in say("show a@1")[1]
    assert "is whole and fits" in say("load a")[1]


def test_verify_answers_no_with_exit_code_one(registry, say):
    """Damage is told with its reason."""
    assert say("verify --fast")[0] == say("verify --probe")[0] == 0
    registry.blobs.path(registry.get("a@1").sha256).unlink()
    code, _, err = say("verify aa b*")
    assert (code, "nothing matches aa b*" in err) == (2, True)
    code, out, _ = say("verify --json")
    assert code == 1
    assert [problem["reason"] for problem in json.loads(out)["problems"]] == ["MISSING"]


def test_an_unknown_architecture_is_no_damage(registry, say, tmp_path, monkeypatch):
    """Bytes, header and values are checked, and what was not built is said; export and diff need no model."""

    @zoo.architecture
    def theirs(inputs: int, classes: int, *, bias: bool = True) -> nn.Module:
        return nn.Linear(inputs, classes, bias=bias)

    spec = zoo.Spec("theirs", features=2, context=1, classes=2)
    entries = [registry.register("t", zoo.build(spec, seed=s), spec=spec, classes=["no", "yes"]) for s in (0, 1)]
    monkeypatch.delitem(ARCHITECTURES, "theirs")
    code, out, _ = say("verify --probe")
    assert (code, "4 versions checked, 0 damaged" in out) == (0, True)
    assert "2 not built, only their bytes are checked: this program does not know theirs" in out
    assert json.loads(say("verify --metrics --json")[1])["not_built"] == ["t@1", "t@2"]
    assert "not built" not in say("verify --fast")[1]
    assert say(f"export t {tmp_path / 'folder'}")[0] == 0
    code, out, _ = say("diff t@1 t@2 --json")
    assert (code, [row["name"] for row in json.loads(out)["tensors"]]) == (1, ["bias", "weight"])
    path = registry.blobs.path(entries[0].sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    code, out, _ = say("verify --json")
    assert (code, [problem["reason"] for problem in json.loads(out)["problems"]]) == (1, ["BLOB_DIGEST"])


def test_an_alias_is_moved_and_moved_back(registry, say):
    """With and without an expectation."""
    assert say("alias best a@1")[1] == "best -> a@1\n"
    assert say("alias best a@2 --expect a@2")[0] == 2
    assert say("alias best a@2 --expect a@1")[1] == "best -> a@2\n"
    assert say("alias best --back")[1] == "best -> a@1\n"
    assert json.loads(say("alias best --json")[1]) == {"alias": "best", "target": "a@1"}
    assert say("alias other")[0] == 2


def test_an_expectation_is_never_ignored(registry, say):
    """Also on the way back; where nothing is to be moved, it has no meaning."""
    say("alias best a@1")
    say("alias best a@2")
    code, _, err = say("alias best --back --expect a@1")
    assert (code, "it points to 'a@2'" in err) == (2, True)
    assert say("alias best --back --expect a@2")[1] == "best -> a@1\n"
    code, _, err = say("alias best --expect a@1")
    assert (code, "expected a target or --back" in err) == (2, True)


def test_remove_gc_and_recover(registry, say):
    """What is held needs force; a lost file comes back."""
    say("alias best a@1")
    assert say("remove a@1")[0] == 2
    assert "the alias 'best'" in say("remove a@1 --force")[1]
    assert json.loads(say("gc --dry-run --json")[1]) == {"would_remove": []}
    registry.path.unlink()
    (registry.blobs.folder / f"{'0' * 64}.safetensors").touch()
    code, out, err = say("recover")
    assert (code, "2 versions recovered" in out, "warning: what these blobs hold was left out" in err) == (
        0,
        True,
        True,
    )
    assert len(registry.entries()) == 2


def test_diff_answers_whether_two_versions_are_the_same(registry, say):
    """0 for the same, 1 for others, with each tensor that moved."""
    assert say("diff a@1 a@1")[0] == 0
    code, out, _ = say("diff a@1 a@2 --json")
    assert (code, json.loads(out)["metrics"]) == (1, {"accuracy": [0.0, 0.5, 0.5]})
    assert "1.bias" in say("diff a@1 a@2")[1]


def test_export_import_and_merge(registry, say, tmp_path):
    """A model goes out and comes in under another name; two files become one."""
    assert say(f"export a {tmp_path}/out")[0] == 0
    told = json.loads(say(f"export a@1 {tmp_path}/first --json")[1])
    assert told == {"exported": "a@1", "folder": f"{tmp_path}/first"}
    assert json.loads(say(f"import {tmp_path}/out --name b --json")[1])["name"] == "b"
    for side in ("base", "ours", "theirs"):
        (tmp_path / side).write_bytes(registry.path.read_bytes())
    zoo.Registry(tmp_path / "theirs").alias("best", "b")
    assert say(f"merge {tmp_path}/base {tmp_path}/ours {tmp_path}/theirs")[0] == 0
    assert zoo.Registry(tmp_path / "ours").aliases() == {"best": "b@1"}
    zoo.Registry(tmp_path / "theirs").alias("best", "a@1")
    zoo.Registry(tmp_path / "ours").alias("best", "a@2")
    code, out, err = say(f"merge {tmp_path}/base {tmp_path}/ours {tmp_path}/theirs --json")
    assert (code, "both sides changed the alias 'best'" in err) == (1, True)
    assert (json.loads(out)["merged"], "the alias 'best'" in json.loads(out)["conflict"]) == (None, True)
    told = json.loads(say(f"merge {tmp_path}/ours {tmp_path}/ours {tmp_path}/theirs --json")[1])
    assert told == {"merged": f"{tmp_path}/ours", "conflict": None}


def test_push_tells_the_address(registry, say, monkeypatch):
    """As text or as JSON."""
    monkeypatch.setattr("zoo.exchange.push", lambda *given, **how: "hub/me/a")
    assert say("push a me/a")[1] == "hub/me/a\n"
    assert json.loads(say("push a me/a --json")[1]) == {"pushed": "a", "address": "hub/me/a"}


LOOKING = ["list", "show", "load", "verify", "diff"]
CHANGING = ["register", "remove", "alias", "tag", "note", "gc", "recover"]
CARRYING = ["export", "import", "merge", "push", "pull"]


@pytest.mark.parametrize("command", [*LOOKING, *CHANGING, *CARRYING])
def test_every_command_explains_itself_by_an_example(command, say):
    """`--help` ends well and shows one."""
    code, out, _ = say(f"{command} --help")
    assert (code, "Example" in out) == (0, True)
