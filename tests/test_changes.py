"""Several users of one registry: a change never undoes or hits what another user did in the meantime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zoo
from zoo import Registry, RegistryError, cli

SPEC = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})


def added(registry: Registry, name: str, seed: int) -> zoo.Entry:
    """Register a small model."""
    return registry.register(name, model(seed), spec=SPEC, classes=["no", "yes"])


def model(seed: int) -> torch.nn.Module:
    """A small one."""
    return zoo.build(SPEC, seed=seed)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Two versions of `a`, one of `b`."""
    registry = Registry(tmp_path / "registry.json")
    for name, seed in (("a", 0), ("a", 1), ("b", 2)):
        added(registry, name, seed)
    return registry


@pytest.fixture
def other(registry: Registry) -> Registry:
    """The same registry, opened by another user."""
    return Registry(registry.path)


def test_what_two_say_of_one_version_is_all_kept(registry, other):
    """Metrics and tags are merged with what is there when the change is made, not when it was asked for."""
    with registry.transaction():
        registry.annotate("b", metrics={"from/one": 1.0}, add_tags=["one"])
        other.annotate("b", metrics={"from/two": 2.0}, add_tags=["two", "three"])
    assert sorted(registry.get("b").metrics) == ["from/one", "from/two"]
    assert registry.get("b").tags == ("one", "three", "two")
    with registry.transaction():
        registry.annotate("b", drop_tags=["one"])
        other.annotate("b", drop_tags=["two"])
    assert registry.get("b").tags == ("three",)
    assert registry.annotate("b", tags=[]).tags == ()


def test_a_tag_by_command_keeps_the_tags_of_others(registry, monkeypatch):
    """`zoo tag` asks for a change of tags, not for the tags that it saw."""
    annotate = Registry.annotate

    def late(self: Registry, *given: object, **said: object) -> zoo.Entry:
        annotate(Registry(self.path), "b", add_tags=["theirs"])
        return annotate(self, *given, **said)

    monkeypatch.setattr(Registry, "annotate", late)
    assert cli.run(["tag", "b", "mine", "--registry", str(registry.path)]) == 0
    assert registry.get("b").tags == ("mine", "theirs")


def test_an_alias_made_in_a_transaction_follows_its_version(registry, other):
    """Somebody else's model may take the number that ours had meanwhile."""
    with registry.transaction():
        mine = added(registry, "same", 30)
        registry.alias("best", mine.reference)
        registry.alias("best", "a@1", expect=mine.reference)
        registry.alias_back("best")
        theirs = added(other, "same", 31)
    assert (theirs.reference, registry.get(mine.id).reference) == ("same@1", "same@2")
    assert registry.get("best").id == mine.id


def test_a_transaction_removes_what_it_saw(registry, other):
    """Neither the version that has taken its number nor a newer one that another user added."""
    with registry.transaction():
        mine = added(registry, "same", 30)
        registry.remove(mine.reference)
        theirs = added(other, "same", 31)
    assert [entry.id for entry in registry.entries("same")] == [theirs.id]
    with registry.transaction():
        registry.remove("a")
        newer = added(other, "a", 40)
    assert [entry.reference for entry in registry.entries("a")] == ["a@1", newer.reference]
    with registry.transaction():
        registry.remove("a@*")
        newest = added(other, "a", 41)
    assert [entry.id for entry in registry.entries("a")] == [newest.id]


def test_what_is_removed_may_be_gone_in_part(registry, other):
    """Somebody else was faster with one of the versions."""
    with registry.transaction():
        registry.remove("a@*")
        other.remove("a@1")
    assert registry.entries("a") == []


def test_the_blob_of_a_version_that_the_transaction_removed_may_be_gone(registry):
    """Nothing points to it."""
    with registry.transaction():
        made = added(registry, "short", 30)
        registry.remove("short")
        registry.blobs.path(made.sha256).unlink()
        registry.annotate("b", note="kept")
    assert registry.get("b").note == "kept"


def test_a_name_of_an_ids_form_is_kept_where_it_is_there_already(registry):
    """New ones are refused; those that an older program made are read, added to, and recovered."""
    text = registry.path.read_text().replace('"b":{"versions"', '"0123456789ab":{"versions"')
    registry.path.write_text(text)
    assert added(registry, "0123456789ab", 30).number == 2
    with pytest.raises(RegistryError, match="form of a version's id"):
        added(registry, "ba9876543210", 30)
    registry.path.unlink()
    registry.recover()
    assert registry.get("0123456789ab").name == "0123456789ab"


def test_what_another_user_removed_or_holds_meanwhile_is_reported(registry, other):
    """The whole transaction is refused."""

    def removed() -> None:
        with registry.transaction():
            registry.alias("best", "b")
            other.remove("b")

    def held() -> None:
        with registry.transaction():
            registry.remove("a@1")
            other.alias("first", "a@1")

    with pytest.raises(RegistryError, match="UNKNOWN"):
        removed()
    with pytest.raises(RegistryError, match="a@1 is held by the alias 'first'"):
        held()
    assert registry.aliases() == {"first": "a@1"}


def test_a_blob_that_was_collected_during_a_transaction_is_missed_before_anything_is_written(registry, other):
    """A long transaction cannot hold all blobs in memory; whatever is committed can be loaded."""
    for seed, meanwhile in ((50, lambda: None), (51, lambda: added(other, "c", 60))):
        raw = None

        def collected(seed: int = seed, meanwhile: Callable[[], object] = meanwhile) -> None:
            nonlocal raw
            with registry.transaction():
                made = added(registry, f"t-{seed}", seed)
                assert other.collect_garbage(older_than=-60) == [registry.blobs.path(made.sha256)]
                meanwhile()
                raw = registry.path.read_bytes()

        with pytest.raises(RegistryError, match=r"collected as garbage .* register its model again"):
            collected()
        assert registry.path.read_bytes() == raw
        assert registry.verify() == []


def test_a_blob_that_is_collected_before_its_line_is_written_is_put_back(registry, other, monkeypatch):
    """Outside a transaction its bytes are at hand."""
    put = registry.blobs.put

    def put_and_lose(data: bytes) -> str:
        monkeypatch.setattr(registry.blobs, "put", put)
        sha256 = put(data)
        other.collect_garbage(older_than=-60)
        return sha256

    monkeypatch.setattr(registry.blobs, "put", put_and_lose)
    added(registry, "t", 50)
    assert registry.verify() == []


def test_names_are_taken_and_free_within_a_transaction_as_outside(registry):
    """What was made in it is taken, whatever its kind; what was removed in it is free."""
    registry.alias("old", "a@1")
    with registry.transaction():
        added(registry, "c", 30)
        registry.alias("best", "c")
        registry.register_ensemble("both", {"members": ["a", "b"], "rule": "mean"})
        for taken in ("Best", "BOTH", "C"):
            with pytest.raises(RegistryError, match="is taken by"):
                added(registry, taken, 31)
        registry.remove("old")
        added(registry, "Old", 32)
    assert registry.list() == ["Old", "a", "b", "c"]
