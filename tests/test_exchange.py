"""Folders and the hub: what leaves a registry comes back the same."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo import RegistryError

SPEC = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4, "depth": 1})


@pytest.fixture
def registry(tmp_path: Path) -> zoo.Registry:
    """Two models and an ensemble of them."""
    registry = zoo.Registry(tmp_path / "zoo" / "registry.json")
    for seed, name in enumerate(("a", "b")):
        registry.register(name, zoo.build(SPEC, seed=seed), spec=SPEC, classes=["no", "yes"], metrics={"accuracy": 0.5})
    registry.register_ensemble("both", {"members": ["b", "a"], "rule": {"rule": "mean"}, "weights": [0.5, 0.5]})
    return registry


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two models answer alike."""
    x = torch.randn(3, SPEC.inputs)
    return torch.equal(first(x), second(x))


def test_an_exported_model_is_used_without_a_registry(registry, tmp_path):
    """config.json, model.safetensors and a card; from_pretrained needs nothing else."""
    folder = zoo.export(registry, "a", tmp_path / "out" / "a")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["id2label"], config["spec"]) == ({"0": "no", "1": "yes"}, SPEC.to_dict())
    assert "| accuracy | 0.5 |" in (folder / "README.md").read_text()
    assert same(zoo.from_pretrained(folder), registry.load("a"))


def test_a_folder_is_imported_with_all_that_was_known(registry, tmp_path):
    """The same content is the same version, also in another registry."""
    folder = zoo.export(registry, "a@1", tmp_path / "a")
    other = zoo.Registry(tmp_path / "other" / "registry.json")
    entry = zoo.import_folder(other, folder)
    assert (entry.id, entry.metrics) == (registry.get("a").id, registry.get("a").metrics)
    assert zoo.import_folder(other, folder, name="c").name == "c"
    assert other.list() == ["a", "c"]


def test_an_ensemble_leaves_and_returns_with_its_members(registry, tmp_path):
    """In their order, with the rule's numbers."""
    folder = zoo.export(registry, "both", tmp_path / "both")
    other = zoo.Registry(tmp_path / "other" / "registry.json")
    entry = zoo.import_folder(other, folder)
    assert entry.members == registry.get_ensemble("both").members
    assert (entry.rule, entry.weights) == ({"rule": "mean"}, (0.5, 0.5))
    with pytest.raises(RegistryError, match="holds an ensemble"):
        zoo.from_pretrained(folder)


def test_weights_that_lost_our_metadata_are_checked_against_the_config(registry, tmp_path):
    """Another program may have written the file anew."""
    folder = zoo.export(registry, "a", tmp_path / "a")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
    assert same(zoo.from_pretrained(folder), registry.load("a"))
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"width": 4', '"width": 5'))
    with pytest.raises(zoo.CheckpointError, match="expected shape"):
        zoo.from_pretrained(folder)


def test_a_used_folder_is_not_written_over(registry, tmp_path):
    """And an export that fails leaves nothing behind."""
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").touch()
    with pytest.raises(RegistryError, match="expected a new or empty folder"):
        zoo.export(registry, "a", tmp_path / "used")
    registry.blobs.path(registry.get("a").sha256).unlink()
    with pytest.raises(RegistryError, match="'a' version 1"):
        zoo.export(registry, "both", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used", "zoo"]


def test_nobody_is_left_in_a_folder_that_is_gone(registry, tmp_path, monkeypatch):
    """An empty folder is replaced, so the one we are in is refused; a link to one is followed."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert zoo.export(registry, "a", tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "empty" / "config.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RegistryError, match="other than the working folder"):
        zoo.export(registry, "a", ".")
    assert zoo.export(registry, "a", "below") == Path("below")


def test_an_ensemble_returns_with_what_others_keep_of_it(registry, tmp_path):
    """Keys that begin with `x-`; fields of another type are refused as such."""
    registry.path.write_text(
        registry.path.read_text().replace('"rule":{"rule":"mean"}', '"rule":{"rule":"mean"},"x-a":[1]')
    )
    folder = zoo.export(registry, "both", tmp_path / "both")
    other = zoo.Registry(tmp_path / "other" / "registry.json")
    assert zoo.import_folder(other, folder).to_json()["x-a"] == [1]
    config = json.loads((folder / "config.json").read_text())
    config["ensemble"]["classes"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RegistryError, match="expected classes as a list of strings, got '5'"):
        zoo.import_folder(zoo.Registry(tmp_path / "third.json"), folder)


def test_members_outside_the_folder_are_refused(registry, tmp_path):
    """A config may not lead the reader elsewhere."""
    folder = zoo.export(registry, "both", tmp_path / "both")
    config = json.loads((folder / "config.json").read_text())
    config["members"][0] = "../../zoo"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RegistryError, match="expected folders inside"):
        zoo.import_folder(zoo.Registry(tmp_path / "other.json"), folder)
    with pytest.raises(RegistryError, match=r"expected a folder with config\.json"):
        zoo.import_folder(registry, tmp_path / "nowhere")


class FakeHub(ModuleType):
    """A hub that is a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder = folder
        self.HfApi = lambda: self

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        """Note whether others may see it."""
        self.private = private

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        """Copy it in."""
        shutil.copytree(folder_path, self.folder / repo_id)
        return f"hub/{repo_id}"

    def snapshot_download(
        self, repository: str, *, revision: str | None, local_dir: str, allow_patterns: list[str]
    ) -> str:
        """Copy it out."""
        return str(shutil.copytree(self.folder / repository, local_dir, dirs_exist_ok=True))


def test_the_hub_takes_and_gives_the_same_folders(registry, tmp_path, monkeypatch):
    """Private unless asked otherwise; pulled as imported."""
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert zoo.push(registry, "both", "me/both") == "hub/me/both"
    assert hub.private
    other = zoo.Registry(tmp_path / "other" / "registry.json")
    assert zoo.pull(other, "me/both", name="theirs").members == registry.get_ensemble("both").members
    zoo.push(registry, "a", "me/a")
    assert same(zoo.from_pretrained("me/a"), registry.load("a"))


def test_without_the_extra_the_hub_says_what_to_install(registry, monkeypatch):
    """A name that is no folder would have to be fetched."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"zoo-ensemble\[hub\]"):
        zoo.from_pretrained("somebody/something")


def test_what_is_neither_a_folder_nor_on_the_hub_is_an_error(monkeypatch):
    """A path is never asked of the hub; what the hub's client raises becomes our error, on one line."""

    class Away(FakeHub):
        def snapshot_download(self, repository: str, **_: object) -> str:
            raise FileNotFoundError("no connection\nand nothing kept")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Away(Path()))
    for source in ("/no/folder", "no/such/folder", "../nowhere", "~"):
        with pytest.raises(RegistryError, match="expected an existing folder, or OWNER/NAME"):
            zoo.from_pretrained(source)
    with pytest.raises(
        RegistryError, match=r"was not downloaded from the hub: no connection and nothing kept \[UNKNOWN\]"
    ):
        zoo.from_pretrained("somebody/something")


def test_a_licence_goes_from_the_registry_into_the_card(registry, tmp_path):
    """Of models and ensembles, given at registration or later; other annotations stay."""
    registry.register("c", zoo.build(SPEC, seed=2), spec=SPEC, classes=["no", "yes"], licence="MIT", tags=["x"])
    assert registry.annotate("c", licence="Apache-2.0").tags == ("x",)
    assert registry.annotate("both", licence="CC-BY-4.0", note="n").note == "n"
    for name, head, licence in (("c", "apache-2.0", "Apache-2.0"), ("both", "cc-by-4.0", "CC-BY-4.0")):
        card = (zoo.export(registry, name, tmp_path / name) / "README.md").read_text()
        assert f'\nlicense: "{head}"\n' in card.partition("---\n#")[0]
        assert f"**Licence.** {licence}\n" in card
    assert "**Licence.** Not stated.\n" in (zoo.export(registry, "a", tmp_path / "a") / "README.md").read_text()
    assert registry.annotate("c", licence="").licence == ""
    with pytest.raises(RegistryError, match="expected no metrics for 'both', an ensemble"):
        registry.annotate("both", metrics={"accuracy": 0.5})
