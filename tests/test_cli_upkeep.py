"""The commands that check and mend a registry: verify, load, gc, recover."""

from torch import nn

import zoo
from zoo.models.architectures import ARCHITECTURES


def test_verify_answers_no_with_exit_code_one(registry, command):
    """Damage is printed with its reason; a name that matches nothing is an error."""
    assert command("zoo verify --fast").code == command("zoo verify --probe").code == 0
    registry.blobs.path(registry.get("a@1").sha256).unlink()
    code, _, err = command("zoo verify aa b*")
    assert (code, "nothing matches aa b*" in err) == (2, True)
    found = command("zoo verify --json")
    assert (found.code, [problem["reason"] for problem in found.data["problems"]]) == (1, ["MISSING"])
    assert "metrics" not in command("zoo verify").out


def test_an_unknown_architecture_is_no_damage(registry, command, tmp_path, monkeypatch):
    """Bytes, header and values are checked, and what was not built is named; export and diff need no model."""

    @zoo.architecture
    def theirs(inputs: int, classes: int, *, bias: bool = True) -> nn.Module:
        return nn.Linear(inputs, classes, bias=bias)

    spec = zoo.Spec("theirs", features=2, context=1, classes=2)
    entries = [registry.register("t", zoo.build(spec, seed=s), spec=spec, classes=["no", "yes"]) for s in (0, 1)]
    monkeypatch.delitem(ARCHITECTURES, "theirs")
    code, out, _ = command("zoo verify --probe")
    assert (code, "4 versions checked, 0 damaged" in out) == (0, True)
    assert "2 not built, only their bytes are checked: unknown architecture theirs" in out
    assert command("zoo verify --metrics --json").data["not_built"] == ["t@1", "t@2"]
    assert "not built" not in command("zoo verify --fast").out
    assert command(f"zoo export t {tmp_path / 'folder'}").code == 0
    found = command("zoo diff t@1 t@2 --json")
    assert (found.code, [row["name"] for row in found.data["tensors"]]) == (1, ["bias", "weight"])
    path = registry.blobs.path(entries[0].sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    found = command("zoo verify --json")
    assert (found.code, [problem["reason"] for problem in found.data["problems"]]) == (1, ["BLOB_DIGEST"])


def test_load_checks_that_a_model_loads(registry, command):
    """Its tensors and hash for people and for programs."""
    assert "a@2 loads: " in command("zoo load a").out
    found = command("zoo load a@1 --json").data
    assert (found["version"], found["sha256"]) == ("a@1", registry.get("a@1").sha256)


def test_a_lost_registry_is_recovered(registry, command):
    """And what is left out is a warning on stderr."""
    assert command("zoo gc --dry-run --json").data == {"would_remove": []}
    registry.path.unlink()
    (registry.blobs.folder / f"{'0' * 64}.safetensors").touch()
    found = command("zoo recover")
    assert (found.code, "2 versions recovered" in found.out) == (0, True)
    assert found.err.startswith("warning: these blobs could not be recovered")
    assert len(registry.entries()) == 2
    assert "0 versions recovered, 2 were there already" in command("zoo recover").out


def test_nothing_is_recovered_where_there_are_no_checkpoints(command, tmp_path, monkeypatch):
    """An error that names the folder; no registry is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_REGISTRY", raising=False)
    found = command("zoo recover", code=2)
    assert "expected checkpoints to recover in" in found.err
    assert [*tmp_path.iterdir()] == []
