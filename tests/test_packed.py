"""The file that a partition is mapped from: made once, whole or not at all, and made anew when it is not right."""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo import FrameSet, _files
from zoo.data import corpus
from zoo.data.corpus import write_corpus


@pytest.fixture
def root(frames: FrameSet, tmp_path: Path) -> Path:
    """A corpus of one partition, "p"."""
    write_corpus(frames, tmp_path / "corpus", "p")
    return tmp_path / "corpus"


def opened(root: Path, **settings: object) -> FrameSet:
    """The partition, mapped."""
    return zoo.read_corpus(root, "p", **{"classes": [*"abcd"], "mapped": True, **settings})  # type: ignore[arg-type]


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The recordings that are read from now on."""
    found, real = list[Path](), corpus._read_features
    monkeypatch.setattr(corpus, "_read_features", lambda path, *rest: (found.append(path), real(path, *rest)))
    return found


@pytest.mark.parametrize("labelled", [True, False])
def test_mapped_frames_are_those_in_memory(frames: FrameSet, root: Path, labelled: bool) -> None:
    """All parts, and the fingerprint, when the file is made and when it is found; nothing else is left beside it."""
    if not labelled:
        shutil.rmtree(root / "p" / "transcript")
    expected = zoo.read_corpus(root, "p", classes=[*"abcd"])
    for found in (opened(root), opened(root)):
        assert found.mapped
        assert torch.equal(found.features, frames.features)
        assert torch.equal(found.starts, frames.starts)
        assert (found.labels is not None) == labelled
        assert found.labels is None or torch.equal(found.labels, frames.labels)
        assert (found.classes, found.names) == (expected.classes, expected.names)
        assert vars(found)["fingerprint"] == expected.fingerprint
    assert [path.name for path in sorted(root.iterdir())] == ["p", "p.frames.safetensors"]


def test_the_file_is_one_of_safetensors(frames: FrameSet, root: Path) -> None:
    """Which other programs read as well."""
    opened(root)
    parts = load_file(root / "p.frames.safetensors")
    assert sorted(parts) == ["features", "labels", "starts"]
    assert torch.equal(parts["features"], frames.features)


def test_a_file_that_is_right_is_opened_without_a_look_at_the_frames(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the recordings nor the features are read again."""
    opened(root)
    found = reads(monkeypatch)
    monkeypatch.setattr(FrameSet, "_misfit", None)
    assert len(opened(root)) == 138
    assert not found


def flip(path: Path) -> None:
    """Change a bit of the last feature."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def to_nan(path: Path) -> None:
    """The last feature is not finite."""
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\xc0\x7f")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "NaN": to_nan,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 4),
    "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(4)),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"hello" * 1000),
    "a header without data": lambda path: os.truncate(path, 4096),
    "another file": lambda path: save_file({"features": torch.zeros(138, 6)}, path),
    "its arrays alone": lambda path: save_file(load_file(path), path),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_said_and_made_anew(
    frames: FrameSet, root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever has happened to it."""
    opened(root)
    DAMAGES[name](root / "p.frames.safetensors")
    with caplog.at_level(logging.WARNING, "zoo"):
        found = opened(root)
    assert "p.frames.safetensors is made anew, since it is damaged" in caplog.text
    assert torch.equal(found.features, frames.features)
    caplog.clear()
    opened(root)
    assert not caplog.records


def test_frames_that_are_in_use_stay_as_they_are(frames: FrameSet, root: Path) -> None:
    """The file is replaced, not changed; and what a caller writes into the features stays in memory."""
    found = opened(root)
    found.features[0] = 7
    (root / "p" / "mfcc" / f"{found.names[0]}.npy").touch()
    assert torch.equal(opened(root).features, frames.features)
    assert found.features[0, 0] == 7
    assert torch.equal(found.features[1:], frames.features[1:])


def changed_size(root: Path, frames: FrameSet) -> None:
    """Another partition under the same name, with one recording fewer."""
    shutil.rmtree(root / "p")
    write_corpus(frames.select(torch.arange(4)), root, "p")


CHANGES: dict[str, Callable[[Path, FrameSet], object]] = {
    "another time of features": lambda root, frames: os.utime(root / "p" / "mfcc" / "1.npy", (1, 1)),
    "another time of a transcript": lambda root, frames: os.utime(root / "p" / "transcript" / "1.npy", (1, 1)),
    "fewer recordings": changed_size,
    "another order": lambda root, frames: (root / "p" / "test_order.csv").write_text("4\n3\n2\n1\n0\n"),
    "no labels": lambda root, frames: shutil.rmtree(root / "p" / "transcript"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_of_other_recordings_is_made_anew(
    frames: FrameSet, root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As soon as a name, a size, a time or the order differs."""
    opened(root)
    CHANGES[name](root, frames)
    found, expected = opened(root), zoo.read_corpus(root, "p", classes=[*"abcd"])
    assert "outdated" in caplog.text
    assert (found.fingerprint, found.names) == (expected.fingerprint, expected.names)


def test_a_file_of_other_classes_is_made_anew(root: Path) -> None:
    """The same names in another order are other labels."""
    first, second = opened(root), opened(root, classes=[*"dcba"])
    assert torch.equal(second.labels, 3 - first.labels)
    assert second.classes == tuple("dcba")


def test_a_file_that_was_copied_is_compared_and_gets_its_time_back(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once; its content is what was written."""
    opened(root)
    path = root / "p.frames.safetensors"
    before = path.stat().st_mtime_ns
    os.utime(path)
    found = reads(monkeypatch)
    opened(root)
    assert path.stat().st_mtime_ns == before
    assert not found
    assert not caplog.records


def test_another_folder_holds_the_file(root: Path, tmp_path: Path) -> None:
    """It is made where there is none; so a corpus may be read-only."""
    opened(root, mapped=tmp_path / "new" / "frames")
    assert [path.name for path in root.iterdir()] == ["p"]
    assert (tmp_path / "new" / "frames" / "p.frames.safetensors").exists()
    assert len(opened(root, mapped=str(tmp_path / "new" / "frames"))) == 138


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("reserve", errno.ENOSPC, "No space left on device"),
        ("sync", errno.EIO, "Input/output error"),
        ("rename", errno.EROFS, "Read-only file system"),
        ("open", errno.EACCES, "Permission denied"),
    ],
)
def test_what_cannot_be_written_leaves_nothing_and_names_the_way_out(
    root: Path, call: str, number: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, the file that was there before, and no other."""

    def fail(*arguments: object, **settings: object) -> object:
        raise OSError(number, os.strerror(number))

    opened(root)
    os.utime(root / "p" / "mfcc" / "1.npy", (1, 1))
    before = (root / "p.frames.safetensors").read_bytes()
    system = _files.System()
    setattr(system, call, fail)
    monkeypatch.setattr(_files, "system", system)
    with pytest.raises(zoo.CorpusError, match=rf"write the frames of 'p' to .*{words}; name a folder .*--mapped"):
        opened(root)
    assert (root / "p.frames.safetensors").read_bytes() == before
    assert len([*root.iterdir()]) == 2


@pytest.mark.parametrize("below", ["", "further/below"])
def test_a_file_in_place_of_the_folder_is_refused(root: Path, tmp_path: Path, below: str) -> None:
    """It is named with the way out, and stays as it is."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(zoo.CorpusError, match=r"expected a folder .*file.*, but .*file is none; name a.*--mapped"):
        opened(root, mapped=tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"


def test_space_is_reserved_where_the_system_has_no_call_for_it(
    frames: FrameSet, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By writing it; a disk that is full must not be found out through a mapping."""
    monkeypatch.delattr(os, "posix_fallocate")
    assert torch.equal(opened(root).features, frames.features)


def test_a_wrong_recording_leaves_no_file(root: Path) -> None:
    """The error is that of reading into memory."""
    (root / "p" / "mfcc" / "3.npy").write_bytes(b"no array")
    with pytest.raises(zoo.CorpusError, match=r"3\.npy: expected an array"):
        opened(root)
    assert [path.name for path in root.iterdir()] == ["p"]


def test_what_a_killed_process_leaves_is_no_hindrance(frames: FrameSet, root: Path) -> None:
    """It is overwritten, and gone in the end."""
    (root / ".p.frames.safetensors.tmp").write_bytes(bytes(100_000))
    assert torch.equal(opened(root).features, frames.features)
    assert [path.name for path in sorted(root.iterdir())] == ["p", "p.frames.safetensors"]


def test_an_expected_number_of_features_is_checked_in_a_file_too(root: Path) -> None:
    """As for recordings."""
    opened(root)
    assert len(opened(root, features=6)) == 138
    with pytest.raises(zoo.CorpusError, match=r"0\.npy: expected 7 features per frame, got 6"):
        opened(root, features=7)


def test_another_process_may_make_the_file_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has waited for it takes it, and reads nothing."""
    real = _files.locked

    def locked(path: Path, *, timeout: float) -> object:
        monkeypatch.setattr(_files, "locked", real)
        opened(root)  # the other process
        found.extend(reads(monkeypatch))
        return real(path, timeout=timeout)

    found = reads(monkeypatch)
    monkeypatch.setattr(_files, "locked", locked)
    assert len(opened(root)) == 138
    assert len(found) == 5
