"""The store of members' outputs: written once, read again, continued after a crash; older forms are read too."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ensemble
import zoo
from ensemble.outputs import About
from ensemble.outputs.store import (
    PAGE,
    Contents,
    Pieces,
    Store,
    StoreError,
    read_outputs,
    remove_outputs,
    write_outputs,
    write_rows,
)
from ensemble.run._engine import Batch

CLASSES = ("a", "b", "c", "d")
SPEC = zoo.Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 1})


def members_of(*seeds: int, precision: str = "float32") -> ensemble.Members:
    """Members "m<seed>" of one spec."""
    modules: dict[str, nn.Module] = {f"m{seed}": zoo.build(SPEC, seed=seed).eval() for seed in seeds}
    specs = dict.fromkeys(modules, SPEC)
    return ensemble.from_modules(modules, classes=CLASSES, specs=specs, precision=precision)


def contents(**other: object) -> Contents:
    """Of ten frames and two classes."""
    fields = {"fingerprint": "f", "frames": 10, "classes": ("a", "b"), "precision": "float32", "dtype": "float32"}
    return Contents(**(fields | other))  # type: ignore[arg-type]


def filled(folder: Path, *digests: str) -> Store:
    """A store with whole rows: row d is full of minus its number."""
    store = Store(folder, contents(), shard=4)
    store.add(digests)
    for number, digest in enumerate(digests):
        for shard in range(store.shards):
            start, stop = store.frames(shard)
            store.put([digest], start, torch.full((1, stop - start, 2), -float(number)))
            store.finish([digest], shard)
    return store


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_outputs_from_a_store_are_those_in_memory(dtype: str, tmp_path: Path, frames: zoo.FrameSet) -> None:
    """Bit for bit in float32, rounded once in float16; mapped from the file, not read."""
    members = members_of(0, 1, 2)
    kept = ensemble.collect(members, frames, cache=tmp_path / "store", dtype=dtype)
    direct = ensemble.collect(members, frames)
    assert torch.equal(kept.log_probabilities, direct.log_probabilities.to(kept.log_probabilities.dtype))
    assert kept.fingerprint == direct.fingerprint
    assert torch.equal(kept.require_labels(), direct.require_labels())


@pytest.mark.parametrize("refusal", ["none", "not in this system", "not on this disk", "in the middle"])
@pytest.mark.parametrize("start", [0, 100], ids=["from a page on", "from elsewhere on"])
def test_rows_are_written_whole(refusal: str, start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the cache or through it, in whole pages or not: the same bytes at the same places, and no others."""
    real, pages = os.pwrite, []

    def refusing(file: int, data: memoryview, place: int) -> int:
        direct = bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)
        pages.append(direct)
        if direct and refusal in ("not on this disk", "in the middle"):
            if refusal == "not on this disk" or place > PAGE:
                raise OSError(errno.EINVAL, "refused")
            return real(file, data[:PAGE], place)
        return real(file, data, place)

    if refusal == "not in this system":
        monkeypatch.delattr(os, "O_DIRECT")
    else:
        monkeypatch.setattr(os, "pwrite", refusing)
    path, size = tmp_path / "rows", 3 * PAGE + 50
    path.write_bytes(bytes(8 * PAGE))
    rows = Pieces()((2, size), torch.uint8).random_(1, 256).numpy()
    write_rows(path, [(start, rows[0]), (4 * PAGE, rows[1])])
    expected = bytearray(8 * PAGE)
    expected[start : start + size] = rows[0].tobytes()
    expected[4 * PAGE : 4 * PAGE + size] = rows[1].tobytes()
    assert path.read_bytes() == bytes(expected)
    assert start or refusal != "none" or any(pages) or not hasattr(os, "O_DIRECT")


def test_pieces_take_turns() -> None:
    """The last two are apart and begin at pages; the one before them is used again, also for another shape."""
    pieces = Pieces()
    first, second = pieces((2, 3), torch.float32).fill_(1), pieces((2, 3), torch.float32).fill_(2)
    assert first.eq(1).all()
    assert second.data_ptr() % PAGE == 0
    assert pieces((5,), torch.float16).data_ptr() == first.data_ptr()
    assert pieces((10_000,), torch.float32).shape == (10_000,)


def test_a_failing_disk_is_reported(tmp_path: Path, frames: zoo.FrameSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the thread that writes reaches the caller, and what was finished before stays."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    members = members_of(0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            ensemble.collect(members, frames, cache=tmp_path)
    found = ensemble.collect(members_of(0), frames, cache=tmp_path)
    assert torch.equal(found.log_probabilities, ensemble.collect(members_of(0), frames).log_probabilities)


@pytest.mark.parametrize("call", ["write", "fsync", "pwrite"])
def test_outputs_on_a_full_disk_leave_nothing_and_name_the_way_out(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error with the folder and the size, and no file that is half written."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "write":
        monkeypatch.setattr(Path, "replace", full)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"No space left.*bytes of outputs; make room.*use another folder.*valid"):
        write_outputs(tmp_path / "valid", OUTPUTS)
    assert [*(tmp_path / "valid").iterdir()] == []


@pytest.mark.parametrize("below", ["", "further/below"])
def test_a_file_in_place_of_a_folder_is_refused(below: str, tmp_path: Path, frames: zoo.FrameSet) -> None:
    """It is named with the way out, and stays as it is."""
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / below
    with pytest.raises(StoreError, match=r"expected a folder .*file.*, but a file is in its place; name another"):
        ensemble.collect(members_of(0), frames, cache=folder)
    with pytest.raises(NotADirectoryError, match=r"expected a folder .*file.*name another folder"):
        ensemble.run.shards.tally(members_of(0), frames, {"mean": ensemble.mean}, folder=folder)
    with pytest.raises(NotADirectoryError, match=r"expected a folder .*file.*name another folder"):
        zoo.train(SPEC, zoo.Recipe(epochs=1), frames, frames, directory=folder)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["labels", "groups", "outputs"])
def test_what_was_cut_short_is_refused_with_its_folder(name: str, tmp_path: Path) -> None:
    """Also where the rest is a whole array of fewer frames."""
    write_outputs(tmp_path / "valid", OUTPUTS)
    if name == "outputs":
        os.truncate(tmp_path / "valid" / "outputs.bin", 1)
    else:
        np.save(tmp_path / "valid" / f"{name}.npy", np.zeros(1, dtype=np.int64))
    with pytest.raises(StoreError, match=r"valid.*(collect again|remove)"):
        read_outputs(tmp_path / "valid")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Names of the members, each time some of them run; single frames, which are compared with the store, aside."""
    ran: list[tuple[str, ...]] = []
    write = ensemble.Members.write

    def spy(members: ensemble.Members, batch: Batch, *arguments: object) -> None:
        ran.extend([members.names] * (batch.count > 1))
        write(members, batch, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ensemble.Members, "write", spy)
    return ran


def test_a_store_answers_again_without_running_anything(
    tmp_path: Path, frames: zoo.FrameSet, ran: list[tuple[str, ...]]
) -> None:
    """The second time no member runs, whole or in part, in whatever order, but for the frames that are compared."""
    first = ensemble.collect(members_of(0, 1, 2), frames, cache=tmp_path)
    assert ran.pop() == first.members
    again = ensemble.collect(members_of(2, 0), frames, cache=tmp_path)
    assert torch.equal(again.log_probabilities, first.log_probabilities[[2, 0]])
    assert not ran


def test_a_new_member_costs_only_itself(tmp_path: Path, frames: zoo.FrameSet, ran: list[tuple[str, ...]]) -> None:
    """Members that are in the store do not run again."""
    ensemble.collect(members_of(0, 1), frames, cache=tmp_path)
    ran.clear()
    found = ensemble.collect(members_of(0, 1, 2), frames, cache=tmp_path)
    assert set(ran) == {("m2",)}
    assert torch.equal(found.log_probabilities, ensemble.collect(members_of(0, 1, 2), frames).log_probabilities)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, frames: zoo.FrameSet) -> None:
    """After kill -9 in the third shard the first two are kept, and the result is whole."""
    script = textwrap.dedent(
        f"""
        import os, signal
        from test_store import *
        from ensemble.outputs import store
        store._SHARD = 40
        store.Store.__init__.__kwdefaults__["shard"] = 40
        finish = store.Store.finish
        def dying(self, digests, shard):
            if shard == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            finish(self, digests, shard)
        store.Store.finish = dying
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor([0, 100, 38])
        features = torch.randn(138, 6, generator=generator)
        frames = zoo.FrameSet(features, None, lengths.cumsum(0), CLASSES)
        ensemble.collect(members_of(0, 1), frames, cache={str(tmp_path)!r})
        """
    )
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(zoo.__file__).parents[1]}", "OMP_NUM_THREADS": "1"}
    died = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    described = json.loads((tmp_path / "outputs.json").read_text())
    assert [member["shards"] for member in described["members"]] == [2, 2]

    generator = torch.Generator().manual_seed(0)
    same = zoo.FrameSet(torch.randn(138, 6, generator=generator), None, torch.tensor([0, 100, 138]), CLASSES)
    ran: list[int] = []
    put = Store.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Store, "put", lambda store, digest, start, rows: (ran.append(start), put(store, digest, start, rows))
        )
        found = ensemble.collect(members_of(0, 1), same, cache=tmp_path)
    assert set(ran) == {80, 120}
    expected = ensemble.collect(members_of(0, 1), same).log_probabilities
    torch.testing.assert_close(found.log_probabilities, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"fingerprint": "g"}, "holds outputs with fingerprint f, and g was asked for"),
        ({"frames": 11}, "frames 10, and 11"),
        ({"classes": ("b", "a")}, r"classes \('a', 'b'\), and \('b', 'a'\)"),
        ({"precision": "auto"}, "precision float32, and auto"),
        ({"dtype": "float16"}, "dtype float32, and float16"),
    ],
)
def test_a_store_of_something_else_is_refused_by_name(other: dict[str, object], words: str, tmp_path: Path) -> None:
    """The message names the folder, what it holds and what was wanted."""
    filled(tmp_path / "mine", "x")
    with pytest.raises(StoreError, match=f"mine .*{words}.* use another folder"):
        Store(tmp_path / "mine", contents(**other))


def test_other_frames_are_refused_by_collect(tmp_path: Path, frames: zoo.FrameSet) -> None:
    """A folder is about one set of frames."""
    ensemble.collect(members_of(0), frames, cache=tmp_path / "kept")
    with pytest.raises(ValueError, match="kept holds outputs with fingerprint"):
        ensemble.collect(members_of(0), frames.select(torch.tensor([0, 1])), cache=tmp_path / "kept")


def test_damage_is_refused(tmp_path: Path) -> None:
    """Cut-off data, and a description that is not JSON, lacks a field, or has a number out of range or a row twice."""
    store = filled(tmp_path, "x", "y")
    data, description = tmp_path / "outputs.bin", tmp_path / "outputs.json"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"expected 8,192 bytes in .*outputs.bin, got 8,191; remove"):
        Store(tmp_path, contents())
    filled(tmp_path / "second", "x")
    whole = json.loads(description.read_text())
    wrong = [whole | {"shard": 0}, whole | {"members": whole["members"][:1] * 2}]
    wrong.append(whole | {"contents": whole["contents"] | {"frames": -1}})
    for text in ("{", '{"contents": {}}', "[]", *map(json.dumps, wrong)):
        description.write_text(text)
        with pytest.raises(StoreError, match=r"outputs.json is damaged .* remove"):
            Store(tmp_path, contents())
    assert store.shards == 3


def test_rows_are_mapped_or_copied_in_the_order_asked_for(tmp_path: Path) -> None:
    """Neighbours come as a view of the file; any other order as a copy; incomplete rows are refused."""
    store = filled(tmp_path, "x", "y", "z")
    assert store.read(["y", "z"])[:, 9, 1].tolist() == [-1, -2]
    assert store.read(["z", "x"])[:, 0, 0].tolist() == [-2, 0]
    store.add(["w"])
    with pytest.raises(StoreError, match=r"no complete outputs of \['w'\]"):
        store.read(["x", "w"])
    assert Store(tmp_path, contents()).read(["x", "y"])[:, 0, 0].tolist() == [0, -1]


def test_reading_does_not_change_the_file(tmp_path: Path) -> None:
    """Whatever is done to the tensor stays in memory."""
    store = filled(tmp_path, "x")
    store.read(["x"]).fill_(7)
    assert store.read(["x"]).eq(0).all()


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    """Log-probabilities are stored as floating-point numbers only."""
    with pytest.raises(ValueError, match="of type bfloat16, float16, float32, float64, got 'int8'"):
        Store(tmp_path, contents(dtype="int8"))


def test_no_frames_are_no_error(tmp_path: Path) -> None:
    """An empty tensor goes into a store and comes back."""
    assert ensemble.collect(members_of(0), torch.zeros(0, 18), cache=tmp_path).shape == (1, 0, 4)


# Whole outputs in a folder

OUTPUTS = ensemble.MemberOutputs.from_probabilities(
    {"a": [[0.9, 0.1], [0.2, 0.8]], "é": [[0.5, 0.5], [0.4, 0.6]]},
    labels=["yes", "no"],
    classes=["no", "yes"],
    groups=[3, 5],
    about={"é": About(parameters=3, trained_on="f" * 64, reference="e@0123456789ab")},
)


def same(found: ensemble.MemberOutputs, expected: ensemble.MemberOutputs) -> bool:
    """Whether every field is equal, NaN to NaN."""
    for field in dataclasses.fields(expected):
        mine, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(mine, torch.Tensor) and isinstance(other, torch.Tensor):
            if mine.dtype != other.dtype or not torch.equal(mine.nan_to_num(7), other.nan_to_num(7)):
                return False
        elif mine != other:
            return False
    return True


@pytest.mark.parametrize("change", ["none", "no labels", "abstain", "float64", "bfloat16", "no frames"])
def test_outputs_written_are_read_again(change: str, tmp_path: Path) -> None:
    """Every field, with labels and without, of any type; equal outputs give equal files."""
    logs = OUTPUTS.log_probabilities
    outputs = {
        "none": OUTPUTS,
        "no labels": dataclasses.replace(OUTPUTS, labels=None, fingerprint="g"),
        "abstain": dataclasses.replace(OUTPUTS, log_probabilities=logs * torch.nan, abstain=True),
        "float64": dataclasses.replace(OUTPUTS, log_probabilities=logs.double()),
        "bfloat16": dataclasses.replace(OUTPUTS, log_probabilities=logs.bfloat16()),
        "no frames": OUTPUTS.at(torch.empty(0, dtype=torch.long)),
    }[change]
    write_outputs(tmp_path / "valid", outputs)
    again = read_outputs(tmp_path / "valid")
    assert same(again, outputs)
    write_outputs(tmp_path / "copy", again)
    for file in (tmp_path / "valid").iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


def test_outputs_are_replaced_whole(tmp_path: Path) -> None:
    """By others, and by some of themselves while they are mapped; other files stay."""
    write_outputs(tmp_path / "valid", OUTPUTS)
    (tmp_path / "valid" / "notes.txt").write_text("mine")
    mapped = read_outputs(tmp_path / "valid")
    write_outputs(tmp_path / "valid", mapped.subset(["é"]))
    assert read_outputs(tmp_path / "valid").about == OUTPUTS.about[1:]
    for other in (
        OUTPUTS.at(torch.tensor([1])),
        dataclasses.replace(OUTPUTS, log_probabilities=torch.zeros(2, 2, 2).log_softmax(-1)),
    ):
        write_outputs(tmp_path / "valid", other)
        assert same(read_outputs(tmp_path / "valid"), other)
    assert same(mapped, OUTPUTS)
    remove_outputs(tmp_path / "valid")
    assert [file.name for file in (tmp_path / "valid").iterdir()] == ["notes.txt"]


def test_a_cache_is_a_folder_of_outputs(tmp_path: Path, frames: zoo.FrameSet) -> None:
    """What was collected last is read from it without any model, also where it holds more members."""
    ensemble.collect(members_of(0, 1), frames, cache=tmp_path)
    last = ensemble.collect(members_of(2, 1), frames, cache=tmp_path)
    assert same(read_outputs(tmp_path), last)


def test_a_folder_copied_elsewhere_is_whole(tmp_path: Path) -> None:
    """No path is in it."""
    write_outputs(tmp_path / "valid", OUTPUTS)
    (tmp_path / "valid").rename(tmp_path / "moved")
    assert same(read_outputs(tmp_path / "moved"), OUTPUTS)


def test_what_is_there_is_listed_where_something_is_missing(tmp_path: Path) -> None:
    """The message names the partitions of both forms."""
    with pytest.raises(ValueError, match=r"test; partitions in .*: none; `ensemble collect` writes them"):
        read_outputs(tmp_path / "test")
    write_outputs(tmp_path / "valid", OUTPUTS)
    packed(tmp_path / "dev.clean.safetensors")
    with pytest.raises(ValueError, match=r"partitions in .*: dev.clean, valid;"):
        read_outputs(tmp_path / "test")


def test_damaged_labels_are_refused(tmp_path: Path) -> None:
    """The message names the file."""
    write_outputs(tmp_path / "valid", OUTPUTS)
    for damage in (b"", (tmp_path / "valid" / "labels.npy").read_bytes()[:-1]):
        (tmp_path / "valid" / "labels.npy").write_bytes(damage)
        with pytest.raises(StoreError, match=r"labels.npy is damaged .* another folder"):
            read_outputs(tmp_path / "valid")


# Forms of earlier versions


def packed(path: Path, *, about: dict[str, object] | None = None) -> None:
    """The file that `ensemble collect` wrote before there was one folder per partition."""
    head = {"abstain": False, "classes": OUTPUTS.classes, "fingerprint": OUTPUTS.fingerprint}
    head |= {"format": "member-outputs", "members": OUTPUTS.members, "references": {"é": "e@0123456789ab"}}
    tensors = {"log_probabilities": OUTPUTS.log_probabilities, "groups": OUTPUTS.groups, "labels": OUTPUTS.labels}
    save_file(tensors, path, metadata={"member-outputs": json.dumps(head, sort_keys=True)})  # type: ignore[arg-type]
    if about is not None:
        path.with_name("members.json").write_text(json.dumps(about))


KNOWN: dict[str, object] = {
    "a": {"parameters": 1, "trained_on": ""},
    "é": {"parameters": 3, "trained_on": "f" * 64},
    "b": {},
}


def test_packed_files_are_read(tmp_path: Path) -> None:
    """With what the file beside them knows of the members."""
    packed(tmp_path / "valid.safetensors", about=KNOWN)
    expected = dataclasses.replace(OUTPUTS, about=(About(parameters=1), OUTPUTS.about[1]))
    assert same(read_outputs(tmp_path / "valid"), expected)


def test_packed_files_without_what_is_known_are_refused(tmp_path: Path) -> None:
    """A missing file, other JSON, and a member that is left out."""
    for about in (None, {}, {"a": KNOWN["a"]}, {"a": [], "é": []}):
        packed(tmp_path / "valid.safetensors", about=about)
        with pytest.raises(ValueError, match=r"what is known of \['a', 'é'\] in .*members.json, .*; collect again"):
            read_outputs(tmp_path / "valid")


@pytest.mark.parametrize("data", [b"", b"hello, world", bytes(64)])
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    """Only what `ensemble collect` wrote is read."""
    (tmp_path / "valid.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="expected members' outputs as `ensemble collect` writes them"):
        read_outputs(tmp_path / "valid")


def test_a_cache_without_names_is_completed_by_collecting(
    tmp_path: Path, frames: zoo.FrameSet, ran: list[tuple[str, ...]]
) -> None:
    """As an earlier version left it: refused when read alone, but none of its members runs again."""
    first = ensemble.collect(members_of(0, 1), frames, cache=tmp_path)
    description = json.loads((tmp_path / "outputs.json").read_text())
    del description["collected"]
    (tmp_path / "outputs.json").write_text(json.dumps(description))
    with pytest.raises(StoreError, match="rows without names, unfinished or of an older version; collect into it"):
        read_outputs(tmp_path)
    ran.clear()
    assert same(ensemble.collect(members_of(0, 1), frames, cache=tmp_path), first)
    assert not ran
    assert same(read_outputs(tmp_path), first)
