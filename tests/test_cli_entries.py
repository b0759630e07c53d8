"""The commands on the entries of a registry: seen, changed, moved in and out; and the merge of two registries."""

import json
import subprocess
import sys

from safetensors.torch import save_file

import zoo


def test_register_takes_a_foreign_file_with_its_spec(registry, command, tmp_path):
    """The spec as JSON or in a file, the classes as words or in a file."""
    spec = registry.get("a").spec
    save_file(zoo.build(spec, seed=5).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "spec.json").write_text(spec.canonical())
    (tmp_path / "classes.txt").write_text("no\nyes")
    line = (
        f"zoo register b {tmp_path}/w.safetensors --spec {tmp_path}/spec.json --classes {tmp_path}/classes.txt --json"
    )
    code, out, _ = command(line)
    assert (code, json.loads(out)["classes"]) == (0, ["no", "yes"])
    line = f"zoo register c {tmp_path}/w.safetensors --classes no yes --tags x --spec"
    assert command(line, spec.canonical()).code == 0
    assert registry.get("c").tags == ("x",)
    code, _, err = command(f"zoo register d {tmp_path}/w.safetensors")
    assert (code, "expected a spec" in err) == (2, True)


def test_a_wrapper_s_prefix_is_stripped_by_flag(registry, command, tmp_path):
    """Without the flag, the one line of the error names it."""
    spec = registry.get("a").spec
    state = {f"module.net.{name}": tensor for name, tensor in zoo.build(spec, seed=5).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    line = f"zoo register b {tmp_path}/w.safetensors --classes no yes --spec"
    code, _, err = command(line, spec.canonical())
    assert (code, "begin with 'module.net.'" in err, "--strip-prefix" in err) == (2, True, True)
    assert command(line, spec.canonical(), "--strip-prefix").code == 0
    assert registry.checkpoint("b").tensors.keys() == zoo.build(spec).state_dict().keys()


def test_the_40_classes_of_the_course_have_a_short_name(tmp_path):
    """In a process of its own, in which nothing has imported the corpora."""
    spec = zoo.Spec("mlp", features=2, context=1, classes=40, options={"widths": [4]})
    save_file(zoo.build(spec, seed=5).state_dict(), tmp_path / "w.safetensors")
    line = ["register", "p", "w.safetensors", "--classes", "phonemes", "--spec", spec.canonical()]
    done = subprocess.run([sys.executable, "-m", "zoo", *line], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("saved as p@1\n", "")


def test_tags_and_notes_are_added_and_taken_off(registry, command):
    """Each answer is one line, and the whole entry for programs."""
    assert command("zoo tag a@1 y x").out == "a@1: tags x, y\n"
    assert command("zoo tag a@1 x --drop --json").data["tags"] == ["y"]
    assert command("zoo note a@1 --json", "the first").data["note"] == "the first"
    assert command("zoo note a@1 --json --licence MIT").data["licence"] == "MIT"
    assert command("zoo note a@1 --licence", "").out == "a@1: note 'the first'\n"
    assert "expected a note or --licence" in command("zoo note a@1", code=2).err
    assert command("zoo note a@1", "again").out == "a@1: note 'again'\n"
    assert command("zoo note a@1", "").out == "a@1: no note\n"
    assert registry.get("a@1").note == ""


def test_an_alias_is_moved_and_moved_back(registry, command):
    """With and without an expected target."""
    assert command("zoo alias best a@1").out == "best -> a@1\n"
    assert command("zoo alias best a@2 --expect a@2").code == 2
    assert command("zoo alias best a@2 --expect a@1").out == "best -> a@2\n"
    assert command("zoo alias best --back").out == "best -> a@1\n"
    assert command("zoo alias best --json").data == {"alias": "best", "target": "a@1"}
    assert command("zoo alias other").code == 2


def test_an_expectation_is_never_ignored(registry, command):
    """Also on the way back; where nothing is moved, it means nothing and is refused."""
    command("zoo alias best a@1")
    command("zoo alias best a@2")
    code, _, err = command("zoo alias best --back --expect a@1")
    assert (code, "it points to 'a@2'" in err) == (2, True)
    assert command("zoo alias best --back --expect a@2").out == "best -> a@1\n"
    code, _, err = command("zoo alias best --expect a@1")
    assert (code, "expected a target or --back" in err) == (2, True)


def test_what_others_use_is_removed_only_by_force(registry, command):
    """And what goes with it is named."""
    command("zoo alias best a@1")
    assert command("zoo remove a@1").code == 2
    assert "the alias 'best'" in command("zoo remove a@1 --force").out
    assert command("zoo remove a --json").data == {"removed": "a", "held_by": []}


def test_list_is_a_table_for_people_and_json_for_programs(registry, command):
    """Both hold every version."""
    code, table, _ = command("zoo list")
    assert (code, table.count("cylinder")) == (0, 2)
    assert "0.5000" in table
    data = command("zoo list a --json").data
    assert [(model["name"], model["number"]) for model in data["models"]] == [("a", 1), ("a", 2)]
    assert "nothing matches" in command("zoo list nowhere*").out


def test_a_missing_registry_is_one_line_on_stderr(tmp_path, monkeypatch, command):
    """Exit code 2, and how to make one."""
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "none.json"))
    code, out, err = command("zoo list")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "zoo register" in err


def test_show_prints_everything_recorded_of_one_version_or_ensemble(registry, command):
    """Nested fields by dotted names; an ensemble by its name or an alias."""
    assert command("zoo show a@1 --json").data == registry.get("a@1").to_json()
    assert "spec.architecture" in command("zoo show a@1").out
    registry.register_ensemble("both", {"members": ["a@1", "a@2"], "rule": {"rule": "mean"}})
    registry.alias("final", "both")
    assert command("zoo show both --json").data == command("zoo show final --json").data
    assert "both" in command("zoo list").out


def test_diff_answers_whether_two_versions_are_the_same(registry, command):
    """0 for the same, 1 for others, with each tensor that moved."""
    assert command("zoo diff a@1 a@1").code == 0
    found = command("zoo diff a@1 a@2 --json")
    assert (found.code, found.data["metrics"]) == (1, {"accuracy": [0.0, 0.5, 0.5]})
    assert "1.bias" in command("zoo diff a@1 a@2").out


def test_export_import_and_merge(registry, command, tmp_path):
    """A model goes out and comes in under another name; two files become one."""
    assert command(f"zoo export a {tmp_path}/out").code == 0
    found = command(f"zoo export a@1 {tmp_path}/first --json").data
    assert found == {"exported": "a@1", "folder": f"{tmp_path}/first"}
    assert command(f"zoo import {tmp_path}/out --save b --json").data["name"] == "b"
    for side in ("base", "ours", "theirs"):
        (tmp_path / side).write_bytes(registry.path.read_bytes())
    zoo.Registry(tmp_path / "theirs").alias("best", "b")
    assert command(f"zoo merge {tmp_path}/base {tmp_path}/ours {tmp_path}/theirs").code == 0
    assert zoo.Registry(tmp_path / "ours").aliases() == {"best": "b@1"}
    zoo.Registry(tmp_path / "theirs").alias("best", "a@1")
    zoo.Registry(tmp_path / "ours").alias("best", "a@2")
    found = command(f"zoo merge {tmp_path}/base {tmp_path}/ours {tmp_path}/theirs --json")
    assert (found.code, "both sides changed the alias 'best'" in found.err) == (1, True)
    assert (found.data["merged"], "the alias 'best'" in found.data["conflict"]) == (None, True)
    found = command(f"zoo merge {tmp_path}/ours {tmp_path}/ours {tmp_path}/theirs --json").data
    assert found == {"merged": f"{tmp_path}/ours", "conflict": None}


def test_push_prints_the_address(registry, command, monkeypatch):
    """As text or as JSON."""
    monkeypatch.setattr("zoo.push", lambda *given, **how: "hub/me/a")
    assert command("zoo push a me/a").out == "hub/me/a\n"
    assert command("zoo push a me/a --json").data == {"pushed": "a", "address": "hub/me/a"}
