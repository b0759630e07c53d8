"""The commands that change a registry: register, alias, tag, note, remove."""

import json

from safetensors.torch import save_file

import zoo


def test_register_takes_a_foreign_file_with_its_spec(registry, command, tmp_path):
    """The spec as JSON or in a file, the classes as words or in a file."""
    spec = registry.get("a").spec
    save_file(zoo.build(spec, seed=5).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "spec.json").write_text(spec.canonical())
    (tmp_path / "classes.txt").write_text("no\nyes\n")
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


def test_tags_and_notes_are_added_and_taken_off(registry, command):
    """Each answer is the whole entry."""
    assert command("zoo tag a@1 x y").code == 0
    assert command("zoo tag a@1 x --drop --json").data["tags"] == ["y"]
    assert command("zoo note a@1 --json", "the first").data["note"] == "the first"
    assert command("zoo note a@1", "").code == 0
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
