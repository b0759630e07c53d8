"""Two registries that grew from one: merged by git's own lines, or by what they mean."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import Raw

from zoo.registry import RegistryError, Snapshot, changes
from zoo.registry.merge import merge, merge_files
from zoo.registry.text import new_record, parse, write
from zoo.registry.types import EnsembleRecord, VersionRecord

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

FIELDS = {
    "spec": {"architecture": "mlp"},
    "classes": ["a", "b"],
    "blob": "sha256:" + "0" * 64,
    "bytes": 10,
    "parameters": 3,
    "created": "2026-01-31T12:00:00Z",
    "n": 1,
}
ENSEMBLE = {"rule": {"rule": "mean"}, "classes": ["a", "b"], "created": "2026-01-31T12:00:00Z"}


def add(document: Snapshot, name: str, identity: int, **fields: object) -> Snapshot:
    """With one more version."""
    return changed(document, changes.add_version, name, f"{identity:012x}", line(**fields))


def line(**fields: object) -> VersionRecord:
    """The record of some version."""
    return new_record(VersionRecord, "a version", {**FIELDS, **fields})


def changed(document: Snapshot, change: Callable[..., object], *given: object, **more: object) -> Snapshot:
    """Another snapshot, on which a change was made."""
    draft = document.copy()
    change(draft, *given, **more)
    return draft


def remove(document: Snapshot, *removed: str) -> Snapshot:
    """Without some versions."""
    return changed(document, changes.remove, removed, force=False)


def set_alias(document: Snapshot, name: str, target: str) -> Snapshot:
    """With an alias."""
    return changed(document, changes.move_alias(document, name, target, None))


def annotate(document: Snapshot, name: str, **said: object) -> Snapshot:
    """With more said of a model's newest version."""
    entry = document.get(name)
    kept = {"note": None, "licence": None, "tags": None, "add": (), "drop": (), "metrics": {}}
    return changed(document, changes.annotate, entry.name, entry.id, **{**kept, **said})


def ensemble(**fields: object) -> EnsembleRecord:
    """The record of some ensemble."""
    return new_record(EnsembleRecord, "an ensemble", {**ENSEMBLE, **fields})


@pytest.fixture
def base() -> Snapshot:
    """Two models of one version each."""
    return add(add(Snapshot(), "a", 1), "b", 2)


def numbers(document: Snapshot, name: str) -> dict[str, int]:
    """Id -> number."""
    return {key: version.n for key, version in document.models[name].versions.items()}


def test_both_sides_models_are_there(base):
    """What each side added, in whichever order they are merged."""
    ours, theirs = add(base, "c", 3), add(base, "d", 4)
    assert merge(base, ours, theirs) == merge(base, theirs, ours) == add(ours, "d", 4)
    assert merge(base, ours, base) == merge(base, base, ours) == merge(base, ours, ours) == ours


def test_one_number_for_two_versions_is_given_anew(base):
    """Our versions keep their numbers; ids do not change; their alias follows its version."""
    ours, theirs = add(base, "a", 3), add(add(base, "a", 4), "a", 5)
    theirs = set_alias(theirs, "best", "a@2")
    merged = merge(base, ours, theirs)
    assert numbers(merged, "a") == {"000000000001": 1, "000000000003": 2, "000000000004": 3, "000000000005": 4}
    assert merged.get("best").id == "000000000004"


def test_a_removed_number_stays_used(base):
    """Also where only the other side knew it."""
    theirs = remove(add(base, "a", 3), "a@2")
    merged = merge(base, base, theirs)
    assert add(merged, "a", 4).models["a"].versions["000000000004"].n == 3


def test_different_fields_of_one_version_are_both_taken(base):
    """A note from here, a tag from there; the same field twice is a conflict."""
    noted, tagged = annotate(base, "a", note="n"), annotate(base, "a", tags=["t"])
    entry = merge(base, noted, tagged).get("a")
    assert (entry.note, entry.tags) == ("n", ("t",))
    with pytest.raises(RegistryError, match="both sides changed the version of 'a' '000000000001'"):
        merge(base, noted, annotate(base, "a", note="other"))


def test_keys_of_other_programs_are_merged_by_their_meaning(base):
    """White space is no change; it stays as it stands on the side that it comes from."""
    sides = [replace(base, extensions={"x-a": Raw(text)}) for text in ("[1,2]", "[1, 2]", "[ 1,2]", "[3]", "[4]")]
    assert merge(*sides[:3]).extensions == {"x-a": Raw("[1, 2]")}
    assert merge(sides[0], sides[1], sides[3]).extensions == {"x-a": Raw("[3]")}
    with pytest.raises(RegistryError, match="CONFLICT"):
        merge(sides[0], sides[4], sides[3])


def test_an_alias_moved_twice_is_a_conflict(base):
    """Nobody can know which is best."""
    base = set_alias(base, "best", "a@1")
    ours, theirs = add(base, "c", 3), add(base, "d", 4)
    moved = [set_alias(side, "best", m) for side, m in ((ours, "c"), (theirs, "d"))]
    with pytest.raises(RegistryError, match="both sides changed the alias 'best'"):
        merge(base, *moved)


def test_a_member_that_the_other_side_removed_is_named(base):
    """The merge is refused rather than left pointing to nothing."""
    ours = changed(base, changes.add_ensemble, "both", ensemble(members=["000000000001", "000000000002"]))
    with pytest.raises(RegistryError, match="the ensemble 'both' holds"):
        merge(base, ours, remove(base, "a"))


def fitted(document: Snapshot, identities: list[int], weights: list[float], **more: object) -> Snapshot:
    """With an ensemble that was fitted, in place of the one before."""
    members = [f"{identity:012x}" for identity in identities]
    return replace(document, ensembles={"both": ensemble(members=members, weights=weights, **more)})


def test_members_and_their_weights_come_from_one_side(base):
    """Weights fitted for other members would be wrong in silence; a note may come from the other side."""
    base = fitted(base, [1, 2], [0.5, 0.5], fitted_on="0" * 64)
    ours = fitted(base, [1, 2], [0.9, 0.1], fitted_on="1" * 64)
    for other in (fitted(base, [2, 1], [0.5, 0.5], fitted_on="0" * 64), fitted(base, [1], [1.0])):
        with pytest.raises(RegistryError, match="both sides changed the ensemble 'both'") as caught:
            merge(base, ours, other)
        assert caught.value.reason == "CONFLICT"
    noted = fitted(base, [1, 2], [0.5, 0.5], fitted_on="0" * 64, note="n", **{"x-theirs": 1})
    merged = merge(base, ours, noted)
    assert merged.get_ensemble("both").to_json() == {**ours.get_ensemble("both").to_json(), "note": "n", "x-theirs": 1}
    assert merge(base, noted, ours) == merged


def test_a_number_that_theirs_gave_a_version_we_have_stays_used(base):
    """They removed b@1 and registered the same again as b@2: whoever knows b@2 must not meet other content."""
    theirs = add(remove(base, "b"), "b", 2)
    merged = merge(base, add(base, "c", 3), theirs)
    assert numbers(merged, "b") == {"000000000002": 1}
    assert numbers(add(merged, "b", 4), "b")["000000000004"] == 3


def test_a_conflict_writes_nothing(base, tmp_path):
    """Files are merged into ours; an empty base stands for none."""
    paths = [tmp_path / name for name in ("base", "ours", "theirs")]
    for path, document in zip(paths, (base, add(base, "c", 3), add(base, "C", 4)), strict=True):
        path.write_bytes(write(document))
    before = paths[1].read_bytes()
    with pytest.raises(RegistryError, match="differ in more than capitals"):
        merge_files(*paths)
    assert paths[1].read_bytes() == before
    paths[0].write_bytes(b"")
    paths[2].write_bytes(write(add(base, "d", 4)))
    merge_files(*paths)
    assert sorted(parse(paths[1].read_bytes()).models) == ["a", "b", "c", "d"]


def merged_by_lines(folder: Path, sides: list[Snapshot]) -> Snapshot | None:
    """What git's own line merge makes of three files; None for a conflict."""
    for name, document in zip(("ours", "base", "theirs"), sides, strict=True):
        (folder / name).write_bytes(write(document))
    done = subprocess.run(["git", "merge-file", "-p", "ours", "base", "theirs"], cwd=folder, capture_output=True)
    return parse(done.stdout) if done.returncode == 0 else None


@needs_git
def test_two_branches_that_add_a_model_each_merge_by_lines(tmp_path):
    """In a registry of two hundred models, of 40 such merges at most 2 are conflicts, and none goes wrong."""
    base = Snapshot()
    for index in range(200):
        base = add(base, f"model-{index}", index + 1)
    clean = 0
    for trial in range(40):
        ours, theirs = add(base, f"new-{trial}-a", 1000 + trial), add(base, f"new-{trial}-b", 2000 + trial)
        found = merged_by_lines(tmp_path, [ours, base, theirs])
        clean += found is not None
        assert found in (None, merge(base, ours, theirs))
    assert clean >= 38


@needs_git
def test_a_conflict_of_lines_is_named_as_such(base, tmp_path):
    """The error for a registry with git's conflict markers names the way out."""
    (tmp_path / "base").write_bytes(write(base))
    (tmp_path / "ours").write_bytes(write(add(base, "a", 3)))
    (tmp_path / "theirs").write_bytes(write(add(base, "a", 4)))
    done = subprocess.run(["git", "merge-file", "-p", "ours", "base", "theirs"], cwd=tmp_path, capture_output=True)
    assert done.returncode > 0
    with pytest.raises(RegistryError, match="zoo merge"):
        parse(done.stdout)


@needs_git
def test_git_merges_two_branches_through_our_command(base, tmp_path):
    """With `zoo merge` as git's driver, also where both branches add a line at the same place."""
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}

    def git(*arguments: str) -> None:
        person = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *person, *arguments], cwd=tmp_path, check=True, capture_output=True, env=env)

    def save(document: Snapshot) -> None:
        (tmp_path / "registry.json").write_bytes(write(document))
        git("add", ".")
        git("commit", "-m", "one more")

    git("init", "-b", "ours")
    git("config", "merge.zoo.driver", f"'{sys.executable}' -m zoo merge %O %A %B")
    (tmp_path / ".gitattributes").write_text("registry.json merge=zoo\n")
    save(base)
    git("checkout", "-b", "theirs")
    save(add(base, "a", 4))
    git("checkout", "ours")
    save(add(base, "a", 3))
    git("merge", "theirs")
    merged = parse((tmp_path / "registry.json").read_bytes())
    assert set(numbers(merged, "a")) == {f"{index:012x}" for index in (1, 3, 4)}
