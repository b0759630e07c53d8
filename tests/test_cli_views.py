"""The commands that show a registry: list, show, diff."""


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
