"""Shards: however the work is shared out, interrupted and continued, the same comes out to the bit."""

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sent import CLASSES, mortal, some_frames

import ensemble
import zoo
from ensemble.judge import tables
from ensemble.judge.tables import Tally
from ensemble.outputs.store import Store, read_outputs, remove_outputs
from ensemble.run import Processes, Ray, shards
from ensemble.run._engine import Form, Plan

RULES = {"mean": ensemble.mean, "log": ensemble.log_mean, "two": ensemble.WeightedMean([3, 1], members=("b", "a"))}
pytestmark = pytest.mark.usefixtures("processes")
KINDS = (("mean_std", "recording", 3), ("z_score", "recording", 1), ("min_max", "corpus", 4), ("none", "corpus", 0))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 400 frames."""
    monkeypatch.setattr(shards, "_MOST", 400)


def some_members(kinds: tuple[tuple[str, str, int], ...] = KINDS, *, plan: str = "auto") -> ensemble.Members:
    """A small model of each kind of preparation; the second has its classes in another order."""
    specs = [
        zoo.Spec("cylinder", 5, context, 3, normalisation, padding, options={"width": 8, "depth": 2})
        for normalisation, padding, context in kinds
    ]
    modules = {"abcd"[n]: zoo.build(spec, seed=n) for n, spec in enumerate(specs)}
    classes = {name: CLASSES if name != "b" else CLASSES[::-1] for name in modules}
    members = ensemble.run.from_modules(
        modules, classes=classes, specs=dict(zip(modules, specs, strict=True)), plan=plan
    )
    members.step = 256  # several batches in every shard, none of which begins where a shard does
    return members


def bits(sums: Tally) -> dict[str, bytes]:
    """All of a tally but its duration."""
    found = {name: getattr(sums, name).tobytes() for name in tables._ARRAYS}
    return found | {name: rows.tobytes() for name, rows in sums.sums.items()}


def report(given: Tally | ensemble.MemberOutputs, **more: str) -> dict[str, object]:
    """A report without its durations."""
    found = ensemble.evaluate(given, RULES, **more).to_json()
    return {name: value for name, value in found.items() if name not in ("seconds", "frames_per_second")}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_shards_are_whole_recordings_as_many_as_fit(lengths: list[int], most: int) -> None:
    """They cover all frames in order; the next recording would not have fitted in."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    found = shards.shards(starts, most)
    assert [shard.number for shard in found] == [*range(len(found))]
    assert [shard.first for shard in found] == [0, *(shard.last for shard in found[:-1])]
    assert found[-1].last == len(lengths)
    for shard in found:
        assert (shard.start, shard.stop) == (int(starts[shard.first]), int(starts[shard.last]))
        assert shard.stop - shard.start <= most or shard.last == shard.first + 1
        assert shard is found[-1] or int(starts[shard.last + 1]) - shard.start > most


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_the_tally_of_shards_is_that_of_all_outputs(metric: str, tmp_path: Path) -> None:
    """Here, and by one and two processes, which take over every way of preparing frames; so is the report.

    For macro F1 the frames have their classes in another order than the members.
    """
    members, frames = some_members(), some_frames()
    frames = frames if metric == "accuracy" else replace(frames, classes=CLASSES[::-1])
    outputs = ensemble.collect(members, frames)
    whole = tables.tally(outputs, RULES, metric)
    assert len(shards.shards(frames.starts, 400)) > 5
    crews = [{}, {"folder": tmp_path / "one"}, *({"workers": Processes(count)} for count in (1, 2))]
    for how in crews if metric == "accuracy" else crews[:1]:
        found = shards.tally(members, frames, RULES, metric=metric, **how)
        assert bits(found) == bits(whole)
        assert report(found, metric=metric) == report(outputs, metric=metric)


def test_a_shard_sees_beyond_its_edges() -> None:
    """Where windows run on into the neighbouring recording, also from a batch that begins with its shard."""
    members, frames = some_members(KINDS[2:3]), some_frames(1024)
    frames = replace(frames, starts=torch.arange(0, 1025, 256), names=())
    whole = tables.tally(ensemble.collect(members, frames), {})
    assert bits(shards.tally(members, frames, {})) == bits(whole)


@pytest.mark.parametrize("kind", ["overlap", "loop", "folded"])
def test_every_form_gives_its_bits_in_shards(kind: str) -> None:
    """That of neighbouring frames, whose bits depend on where a batch begins, too."""
    members, frames = some_members(KINDS[:1]), some_frames(60_000)
    members.step = 4096
    for group, _ in members.groups:
        group.plans |= {(size, True): Plan(Form(kind, 1024), "") for size in (256, 4096)}
    whole = tables.tally(ensemble.collect(members, frames), {})
    assert bits(shards.tally(members, frames, {})) == bits(whole)


def test_workers_that_load_members_themselves_run_them_in_the_same_batches_and_forms(tmp_path: Path) -> None:
    """Those of a registry: what was chosen here is sent with its name."""
    registry = zoo.Registry(tmp_path / "registry.json")
    spec = zoo.Spec("cylinder", 5, 3, 3, options={"width": 8, "depth": 2})
    registry.register("a", zoo.build(spec, seed=0), spec=spec, classes=CLASSES)
    members, frames = ensemble.load(registry, "a"), some_frames()
    members.step = 256
    for group, _ in members.groups:
        group.plans |= {(256, True): Plan(Form("overlap", 64), "")}
    whole = tables.tally(ensemble.collect(members, frames), {})
    assert bits(shards.tally(members, frames, {}, workers=Processes(1))) == bits(whole)


@pytest.mark.parametrize("workers", [None, 2])
def test_a_sample_to_fit_on_is_always_the_same(workers: int | None, tmp_path: Path) -> None:
    """All frames where they are few enough; otherwise the same share of every recording, by whomever."""
    members, frames = some_members(), some_frames()
    crew = None if workers is None else Processes(workers)
    whole = ensemble.collect(members, frames)
    every = shards.sample(members, frames, most=3000, workers=crew, folder=tmp_path / "every")
    some = shards.sample(members, frames, most=1000, workers=crew, folder=tmp_path / "some")
    for name in ("log_probabilities", "labels", "groups"):
        assert torch.equal(getattr(every, name), getattr(whole, name))
    assert every.fingerprint == some.fingerprint == whole.fingerprint == frames.fingerprint
    keys = ensemble.judge.excerpt.sampling_keys(frames.groups.numpy())
    at = torch.from_numpy(np.flatnonzero(keys < 1 / 3))
    assert 900 < len(at) < 1100
    for name in ("labels", "groups"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[at])
    assert torch.equal(some.log_probabilities, whole.log_probabilities[:, at])


def test_outputs_that_would_fill_the_memory_are_mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a file that is gone from its temporary folder; the bits are the same."""
    monkeypatch.setattr(shards, "_HELD", 0)
    monkeypatch.setattr(shards.tempfile, "tempdir", str(tmp_path))
    members, frames = some_members(), some_frames()
    found = shards.sample(members, frames)
    assert not [*tmp_path.iterdir()]
    assert f"{tmp_path}/" in Path("/proc/self/maps").read_text()
    assert torch.equal(found.log_probabilities, ensemble.collect(members, frames).log_probabilities)


def test_processes_fill_a_store(tmp_path: Path) -> None:
    """As one does; and a further member costs its own row only."""
    frames, both = some_frames(), some_members()
    one = ensemble.collect(both.subset(["a"]), frames, tmp_path)
    written = (tmp_path / "outputs.bin").stat().st_size
    found = ensemble.collect(both, frames, tmp_path, fill=shards.filling(frames, workers=Processes(2)))
    whole = ensemble.collect(both, frames)
    assert torch.equal(found.log_probabilities, whole.log_probabilities)
    assert torch.equal(one.log_probabilities[0], whole.log_probabilities[0])
    assert torch.equal(read_outputs(tmp_path).log_probabilities, whole.log_probabilities)
    assert (tmp_path / "outputs.bin").stat().st_size == 4 * written
    assert not (tmp_path / "shards").exists()


def test_a_store_that_is_removed_is_not_believed_to_be_filled(tmp_path: Path) -> None:
    """What a run left beside it is forgotten with it: rows that nobody wrote are never presented."""
    members, frames = some_members(), some_frames()
    whole = ensemble.collect(members, frames).log_probabilities
    fill = shards.filling(frames)

    def broken(some: ensemble.Members, store: Store, keys: Mapping[str, str]) -> None:
        shutil.copytree(tmp_path / "run" / "shards", store.folder / "shards")
        remove_outputs(store.folder)
        store = Store(store.folder, store.contents)
        store.add([*keys.values()])
        fill(some, store, keys)

    shards.sample(members, frames, folder=tmp_path / "run")
    assert torch.equal(ensemble.collect(members, frames, tmp_path / "store", fill=broken).log_probabilities, whole)
    shutil.rmtree(tmp_path / "run" / "outputs")
    assert torch.equal(shards.sample(members, frames, folder=tmp_path / "run").log_probabilities, whole)


def test_a_run_goes_on_from_its_results(tmp_path: Path) -> None:
    """What is there is not made again; the whole is the same."""
    members, frames = some_members(), some_frames()
    whole = bits(shards.tally(members, frames, RULES, folder=tmp_path))
    files = sorted(tmp_path.glob("*.shard"))
    files[2].unlink()
    times = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    assert bits(shards.tally(members, frames, RULES, folder=tmp_path, workers=Processes(2))) == whole
    assert times == {file: file.stat().st_mtime_ns for file in times}
    files[1].write_bytes(files[1].read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"000001\.shard is damaged: .*; remove it, and start the run again"):
        shards.tally(members, frames, RULES, folder=tmp_path)


@pytest.mark.parametrize("what", ["members", "frames", "rules", "metric"])
def test_a_folder_of_another_run_is_refused(what: str, tmp_path: Path) -> None:
    """The message tells what is other."""
    members, frames = some_members(KINDS[:2]), some_frames()
    shards.tally(members, frames, RULES, folder=tmp_path)
    now = {"members": members, "frames": frames, "rules": RULES, "metric": "accuracy"}
    now[what] = {
        "members": some_members(KINDS[1::-1]),
        "frames": some_frames(seed=1),
        "rules": RULES | {"two": ensemble.WeightedMean([1, 2])},
        "metric": "brier",
    }[what]
    with pytest.raises(ValueError, match=f"holds a run with other {what}: .*use another folder, or remove it"):
        shards.tally(*[*now.values()][:3], metric=now["metric"], folder=tmp_path)


def test_a_folder_with_other_files_is_no_run(tmp_path: Path) -> None:
    """Neither somebody's files nor a description that is none."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected an empty folder for a run"):
        shards.tally(some_members(), some_frames(), {}, folder=tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a run of this program in .*run\.json, got something else"):
        shards.tally(some_members(), some_frames(), {}, folder=tmp_path)


def test_a_killed_process_costs_one_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The result is that of a run without accident, and a line tells which shard was done again."""
    members, frames = mortal(tmp_path / "due")
    whole = bits(shards.tally(members, frames, {}))
    (tmp_path / "due").touch()
    assert bits(shards.tally(members, frames, {}, workers=Processes(2))) == whole
    assert not (tmp_path / "due").exists()
    (line,) = [message for message in caplog.messages if "done again" in message]
    assert "(signal 9) at shard" in line
    assert "recordings rec-" in line


def until(holds: Callable[[], Any]) -> Any:
    """What it gives, once that is something; for a minute."""
    for _ in range(1200):
        if found := holds():
            return found
        time.sleep(0.05)
    raise TimeoutError(holds)


def waited_for(path: Path) -> str:
    """The content of a file, once somebody has written it."""
    return str(until(lambda: path.exists() and path.read_text()))


DRIVER = """
import sys
from pathlib import Path
import ray
import sent
from ensemble.run import Processes, Ray, shards
shards._MOST = 400
members, frames = sent.mortal(Path(sys.argv[1]) / "due", hangs=True)
workers = Ray(2) if sys.argv[2] else Processes(2)
shards.tally(members, frames, {}, folder=Path(sys.argv[1]) / "run", workers=workers)
"""


def interrupted(folder: Path, address: str) -> list[Path]:
    """The results of a run whose driver was killed while a worker hung, and all other shards were done."""
    (folder / "due").touch()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"RAY_ADDRESS": address} if address else {})
    command = [sys.executable, "-c", DRIVER, str(folder), address]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        waited_for(folder / "due.pid")
        until(lambda: len([*(folder / "run").glob("*.shard")]) >= 8)
        driver.kill()
    return [*(folder / "run").glob("*.shard")]


def test_a_killed_run_that_is_started_again_redoes_what_was_under_way(tmp_path: Path) -> None:
    """One shard of two workers hung; the others' results are kept, and the whole is that of no accident."""
    members, frames = mortal(tmp_path / "due", hangs=True)
    whole = bits(shards.tally(members, frames, {}))
    kept = {file: file.stat().st_mtime_ns for file in interrupted(tmp_path, "")}
    hung = int(waited_for(tmp_path / "due.pid").split()[0])
    until(lambda: not Path(f"/proc/{hung}").exists())  # a worker does not outlive its driver
    assert len(kept) == len(shards.shards(frames.starts, 400)) - 1
    assert bits(shards.tally(members, frames, {}, folder=tmp_path / "run", workers=Processes(1))) == whole
    assert kept == {file: file.stat().st_mtime_ns for file in kept}


def trained(workers: Ray | None) -> list[str]:
    """The digests of two members, each of which can be trained by another worker."""
    spec = zoo.Spec("cylinder", 5, 1, 3, options={"width": 8, "depth": 1})
    frames, seeds = some_frames(300), range(2)
    found = ensemble.cotrain(spec, zoo.Recipe(epochs=1), frames, frames, seeds=seeds, together=1, workers=workers)
    return [one.digest for one in found]


COMMANDS = [  # that work on a cluster
    "ensemble evaluate --corpus corpus --valid dev --rules mean weighted",
    "ensemble fit --corpus corpus --valid dev",
    "ensemble select --corpus corpus --valid dev --max-members 1",
    "ensemble collect {} --corpus corpus --valid dev",
    "zoo study --corpus corpus --train dev --valid test --max-parameters 60_000 --contexts 2 --epochs 1 --draws 2",
]


def answer(command: Callable[..., Any], line: str) -> dict[str, Any]:
    """The JSON of a command, but for durations and the folder that it was given."""
    data = command(f"{line} --json", code=0).data
    return {key: value for key, value in data.items() if not re.search("seconds|per_second|folder", key)}


def test_a_ray_cluster_gives_the_bits_of_one_machine(
    home: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By 4, 2 and 1 actors on two nodes; and though a worker, the driver and a node are killed, one after another.

    So does every command that takes --ray, with the members sent to those who see no registry, and so does co-training.
    """
    tmp_path = home
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'zoo-ensemble[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where workers find this module
    members, frames = some_members(), some_frames()
    dying, theirs = mortal(tmp_path / "due")
    whole, alone = bits(shards.tally(members, frames, RULES)), bits(shards.tally(dying, theirs, {}))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        workers = Ray()
        assert workers.count == 4
        assert bits(shards.tally(members, frames, RULES, workers=workers)) == whole
        assert trained(workers) == trained(None)

        (tmp_path / "due").touch()  # a worker is killed; another one that the first run left takes its place
        workers.count = 2
        assert bits(shards.tally(dying, theirs, {}, workers=workers)) == alone
        assert "(ActorDiedError) at shard" in caplog.messages[-1]
        assert caplog.messages[-1].count(" at shard") == 1
        workers = Ray(1)  # room for the actors of another driver

        folder = tmp_path / "driver"  # a driver is killed, and started again
        folder.mkdir()
        hanging, _ = mortal(folder / "due", hangs=True)
        kept = {file: file.stat().st_mtime_ns for file in interrupted(folder, cluster.address)}
        assert bits(shards.tally(hanging, theirs, {}, folder=folder / "run", workers=workers)) == alone
        assert kept == {file: file.stat().st_mtime_ns for file in kept}
        assert len(kept) == len(shards.shards(theirs.starts, 400)) - 1

        hanging, _ = mortal(tmp_path / "due", hangs=True)  # a node is killed, with the one worker that it has
        (tmp_path / "due").touch()

        def kill_node() -> None:
            parent = int(waited_for(tmp_path / "due.pid").split()[1])
            (lost,) = [node for node in nodes if parent in [each.process.pid for each in node.all_processes["raylet"]]]
            cluster.remove_node(lost, allow_graceful=False)

        with ThreadPoolExecutor(1) as other:
            killing = other.submit(kill_node)
            assert bits(shards.tally(hanging, theirs, {}, workers=Ray(2, cpus=2))) == alone
            killing.result()
        assert caplog.messages[-1].count(" at shard") == 1

        workers = Ray(1)  # the commands make none of their own, so that its actor serves all of them
        monkeypatch.setattr(Ray, "__new__", staticmethod(lambda *_, **__: workers))
        monkeypatch.setattr(Ray, "__init__", lambda *_, **__: None)
        for line in COMMANDS:
            assert answer(command, f"{line.format('theirs')} --ray") == answer(command, line.format("ours"))
        for path in (home / "ours").rglob("*.bin"):
            assert path.read_bytes() == (home / "theirs" / path.relative_to(home / "ours")).read_bytes()
        assert [*(home / "ours").rglob("*.bin")]
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_folder_that_workers_do_not_share_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the shard whose result is not there; the workers, which are processes, know nothing of the other place."""
    monkeypatch.setattr(shards, "_result", lambda folder, shard: folder / "elsewhere" / str(shard))
    with pytest.raises(ValueError, match=r"the result of shard 0 .* got none: all machines must see that folder"):
        shards.tally(some_members(KINDS[:1]), some_frames(300), {}, folder=tmp_path, workers=Processes(1))


def test_damaged_features_name_the_recording() -> None:
    """Of mapped frames, which are looked at only when their turn comes."""
    frames = some_frames()
    features = frames.features.clone()
    features[1234, 2] = torch.nan
    parts = {name: getattr(frames, name) for name in ("labels", "starts", "classes", "names")}
    mapped = zoo.FrameSet.known(frames.fingerprint, features=features, **parts)
    number = int(torch.searchsorted(frames.starts, 1234, right=True)) - 1
    for workers in (None, Processes(1)):
        with pytest.raises(ValueError, match=f"finite features in the recording 'rec-{number}', got NaN"):
            shards.tally(some_members(), mapped, {}, workers=workers)


def test_what_cannot_be_judged_is_refused_before_the_work() -> None:
    """Frames without labels or of other features, rules of other members, foreign models, samples of nothing."""
    members, frames = some_members(), some_frames()
    bare = zoo.FrameSet(frames.features, None, frames.starts, CLASSES)
    with pytest.raises(ValueError, match="expected frames with labels"):
        shards.tally(members, bare, {})
    with pytest.raises(ValueError, match="rule 'odd': "):
        shards.tally(members, frames, {"odd": ensemble.WeightedMean([1], members=("elsewhere",))})
    with pytest.raises(ValueError, match="frames of 5 features for member 'a', got 4"):
        shards.tally(
            members, zoo.FrameSet(frames.features[:, :4].contiguous(), frames.labels, frames.starts, CLASSES), {}
        )
    foreign = ensemble.run.from_modules({"a": torch.nn.Linear(5, 3)}, classes=CLASSES)
    with pytest.raises(ValueError, match="expected a spec for member 'a'"):
        shards.tally(foreign, frames, {})
    with pytest.raises(ValueError, match="one frame or more in a sample, got 0"):
        shards.sample(members, frames, most=0)
