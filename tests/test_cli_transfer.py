"""The commands that move models: export, import, push, pull, merge."""

import zoo


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
