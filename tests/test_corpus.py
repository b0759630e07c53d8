"""The HW1P2 layout, read and written, and every way in which a folder can be wrong."""

import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo.data.corpus import PHONEMES, write_corpus


def save(root: Path, name: str, features: np.ndarray, transcript: np.ndarray | None, partition: str = "p") -> None:
    """One recording in the layout."""
    for folder, array in (("mfcc", features), ("transcript", transcript)):
        if array is not None:
            (root / partition / folder).mkdir(parents=True, exist_ok=True)
            np.save(root / partition / folder / f"{name}.npy", array)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two recordings of 2 and 3 frames, 4 features."""
    save(tmp_path, "b", np.ones((3, 4)), np.array(["[SOS]", "B", "[SIL]", "ZH", "[EOS]"]))
    save(tmp_path, "a", np.zeros((2, 4), np.float16), np.array(["<sos>", "SIL", "AA", "<eos>"]))
    return tmp_path


def test_recordings_come_in_the_order_of_their_names_without_the_ends(root: Path) -> None:
    """Both spellings of silence and of the ends; features become float32."""
    frames = zoo.read_corpus(root, "p")
    assert frames.names == ("a", "b")
    assert frames.starts.tolist() == [0, 2, 5]
    assert [PHONEMES[i] for i in frames.labels.tolist()] == ["[SIL]", "AA", "B", "[SIL]", "ZH"]
    assert frames.features.dtype == torch.float32
    assert frames.features[:, 0].tolist() == [0, 0, 1, 1, 1]


def test_forty_phonemes_in_the_order_of_the_course() -> None:
    """Silence first, then ARPAbet in alphabetical order."""
    assert len(PHONEMES) == 40
    assert PHONEMES[0] == "[SIL]"
    assert list(PHONEMES[1:]) == sorted(PHONEMES[1:])


def test_a_partition_without_transcripts_has_no_labels(tmp_path: Path) -> None:
    """As the test partition of a competition."""
    save(tmp_path, "a", np.zeros((2, 4)), None)
    assert zoo.read_corpus(tmp_path, "p").labels is None


ORDERS = {  # text of test_order.csv for the recordings u1, u2 and u3.x -> what was wrong with it before
    "name\nu2.npy\nu1.npy\nu3.x.npy\n": "a header, then one file name per line",
    "u2.npy\nu1.npy\nu3.x.npy\n": "no header",
    "u2\nu1\nu3.x": "no header, no suffix, no last line break",
    "\ufeffu2.npy\r\nu1.npy\r\n\r\nu3.x.npy\r\n": "a byte order mark, line ends of Windows, an empty line",
    "id,file,frames\n1,mfcc/u2.npy,10\n2,mfcc/u1.npy,12\n3,mfcc/u3.x.npy,9\n": "other columns, folders",
    '"u2.npy";7\n"u1.npy";8\n"u3.x.npy";9': "semicolons and quotes",
    "test\\\\mfcc\\\\u2.npy\t0\ntest\\\\mfcc\\\\u1.npy\t1\ntest\\\\mfcc\\\\u3.x.npy\t2": "tabs, paths of Windows",
    "audio\nu2.flac\nu1.flac\nu3.x.flac": "the suffix of the audio",
}


@pytest.mark.parametrize("text", ORDERS, ids=ORDERS.get)
def test_the_order_file_of_a_partition_decides(tmp_path: Path, text: str) -> None:
    """It is looked at, not assumed: whichever column names recordings, with or without a header."""
    for name in ("u1", "u2", "u3.x"):
        save(tmp_path, name, np.zeros((2, 3)), None)
    (tmp_path / "p" / "test_order.csv").write_bytes(text.encode())
    assert zoo.read_corpus(tmp_path, "p").names == ("u2", "u1", "u3.x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name\nu2\nu9\nu1\n", "there is no u9"),
        ("u9.npy\nu2.npy\nu1.npy\n", r"there is no u9\.npy"),  # in the place of a header, but written like a file
        ("u9\nu2\nu1", "there is no u9"),
        ("u2\nu1\nu2", "there is more than one u2"),
        ("u2.npy\nu2\nu1", "there is more than one u2"),
        ("name\nu2", "it leaves out u1"),
        ("name\n", "there is no name"),
        ("", "it leaves out u1, u2"),
        ("u1,u2\nu2,u1", "one column that names recordings, got those of 'u2' and of 'u1'"),
        ("name\nü".encode("latin-1"), "expected UTF-8 text"),
    ],
)
def test_an_order_that_does_not_name_every_recording_once_is_refused(
    tmp_path: Path, text: str | bytes, words: str
) -> None:
    """Nothing is lost, read twice or guessed."""
    for name in ("u1", "u2"):
        save(tmp_path, name, np.zeros((2, 3)), None)
    (tmp_path / "p" / "test_order.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(zoo.CorpusError, match=words):
        zoo.read_corpus(tmp_path, "p")


def test_hidden_files_are_no_recordings(root: Path) -> None:
    """What macOS and Windows leave in folders, in one of the two or in both."""
    for folder in ("mfcc", "transcript"):
        (root / "p" / folder / ".DS_Store").write_bytes(b"\0")
        (root / "p" / folder / "Thumbs.db").write_bytes(b"\0")
    (root / "p" / "mfcc" / "._a.npy").write_bytes(b"\0\5\x16\7" + bytes(60))
    assert zoo.read_corpus(root, "p").names == ("a", "b")


def test_any_table_of_classes_can_be_given(tmp_path: Path) -> None:
    """In its own order, with names that are no phonemes, as text or as bytes."""
    save(tmp_path, "a", np.zeros((3, 2)), np.array(["[SOS]", "cat", "dog", "cat", "[EOS]"]))
    save(tmp_path, "b", np.zeros((2, 2)), np.array([b"<sos>", b"dog", "Ä".encode(), b"<eos>"]))
    assert zoo.read_corpus(tmp_path, "p", classes=["dog", "Ä", "cat"]).labels.tolist() == [2, 0, 2, 0, 1]
    with pytest.raises(zoo.CorpusError, match=r"unknown class 'cat'.* are given by classes= or --classes"):
        zoo.read_corpus(tmp_path, "p")
    for classes in ("dog", ["dog", "dog", "cat"], ["dog", ""], [1, 2]):
        with pytest.raises(zoo.CorpusError, match="expected a sequence of class names, each of them once"):
            zoo.read_corpus(tmp_path, "p", classes=classes)


@pytest.mark.parametrize("silence", ["[SIL]", "SIL"])
def test_both_spellings_of_a_name_are_read_whichever_is_the_class(tmp_path: Path, silence: str) -> None:
    """With 42 classes, where the two ends have numbers too; a name that is a class itself stands for itself."""
    save(tmp_path, "a", np.zeros((3, 2)), np.array(["[SOS]", "[SIL]", "SIL", "<sos>", "[EOS]"]))
    assert zoo.read_corpus(tmp_path, "p", classes=[silence, *PHONEMES[1:], "[SOS]", "[EOS]"]).labels.tolist() == [
        0,
        0,
        40,
    ]
    assert zoo.read_corpus(tmp_path, "p", classes=["SIL", "[SIL]", "<sos>"]).labels.tolist() == [1, 0, 2]


def test_reading_shows_its_progress(tmp_path: Path) -> None:
    """One step per recording."""
    for name, length in (("a", 3), ("b", 4)):
        save(tmp_path, name, np.zeros((length, 2), np.float32), None)
    shown: list[object] = []

    @contextmanager
    def progress(title: str, total: float | None = None) -> Iterator[Callable[..., None]]:
        shown.append((title, total))
        yield lambda steps=1, note="": shown.append(steps)

    zoo.read_corpus(tmp_path, "p", progress=progress)
    assert shown == [("reading p", 2), 1, 1]


def test_what_was_written_is_read_again(frames: zoo.FrameSet, tmp_path: Path) -> None:
    """Features, labels, starts and names survive the folder; an existing one is not overwritten."""
    write_corpus(frames, tmp_path, "p")
    again = zoo.read_corpus(tmp_path, "p", classes=frames.classes)
    assert torch.equal(again.features, frames.features)
    assert torch.equal(again.labels, frames.labels)
    assert again.fingerprint == frames.fingerprint
    with pytest.raises(zoo.CorpusError, match="p exists; choose another name"):
        write_corpus(frames, tmp_path, "p")
    twice = replace(frames, names=("a", "b", "c", "b", "d"))
    with pytest.raises(zoo.CorpusError, match=r"differ as file names, got .*b\.npy twice"):
        write_corpus(twice, tmp_path, "q")
    for name in ("", ".hidden", "a/b", ".."):
        with pytest.raises(zoo.CorpusError, match="names of visible files"):
            write_corpus(replace(frames, names=(name, *"bcde")), tmp_path, "q")
    assert not (tmp_path / "q").exists()


GOOD = np.zeros((3, 4))
TRANSCRIPT = np.array(["[SOS]", "B", "B", "B", "[EOS]"])


@pytest.mark.parametrize(
    ("features", "transcript", "words"),
    [
        (np.zeros((3, 5)), TRANSCRIPT, r"c\.npy: expected 4 features per frame, got 5"),
        (np.zeros(3), TRANSCRIPT, r"mfcc/c\.npy: expected features \(T, F\)"),
        (np.zeros((0, 4)), TRANSCRIPT[[0, 4]], "at least one frame"),
        (np.zeros((3, 4), np.int64), TRANSCRIPT, r"c\.npy: expected features .* got \(3, 4\) int64"),
        (
            np.array([[0, 0, 0, np.nan]] * 3),
            TRANSCRIPT,
            r"c\.npy: expected finite features, got NaN or infinity at frame 0",
        ),
        (GOOD, TRANSCRIPT[:-1], r"transcript/c\.npy: expected 5 strings \(3 frames"),
        (GOOD, np.arange(5), r"transcript/c\.npy: expected 5 strings"),
        (GOOD, TRANSCRIPT[[1, 1, 1, 1, 4]], r"expected '\[SOS\]' as its first string, got 'B'"),
        (GOOD, TRANSCRIPT[[0, 1, 1, 1, 1]], r"expected '\[EOS\]' as its last string, got 'B'"),
        (GOOD, np.array(["[SOS]", "B", "XX", "B", "[EOS]"]), r"c\.npy: frame 1: unknown class 'XX'"),
        (GOOD, np.array(["[SOS]", "B", "[SOS]", "B", "[EOS]"]), r"frame 1: unknown class '\[SOS\]'"),
        (GOOD, TRANSCRIPT.astype(object), r"transcript/c\.npy: .* never unpickled"),
        (GOOD.astype(object), TRANSCRIPT, r"mfcc/c\.npy: .* never unpickled"),
    ],
)
def test_a_wrong_recording_is_refused_by_its_file_name(
    root: Path, features: np.ndarray, transcript: np.ndarray, words: str
) -> None:
    """One message with the file, what was expected, and what was found."""
    save(root, "c", features, transcript)
    with pytest.raises(zoo.CorpusError, match=words):
        zoo.read_corpus(root, "p")


@pytest.mark.parametrize(
    ("gone", "words"), [("transcript", "partner of the same name in .*transcript"), ("mfcc", "in .*mfcc")]
)
def test_a_recording_without_its_partner_is_refused(root: Path, gone: str, words: str) -> None:
    """Either half missing is an error, never a shift of the labels."""
    (root / "p" / gone / "b.npy").unlink()
    with pytest.raises(zoo.CorpusError, match=words):
        zoo.read_corpus(root, "p")


def test_a_missing_partition_names_those_that_exist(root: Path) -> None:
    """And an empty one says that it is empty."""
    with pytest.raises(zoo.CorpusError, match=r"expected a folder .*q/mfcc; partitions under .*: p"):
        zoo.read_corpus(root, "q")
    (root / "e" / "mfcc").mkdir(parents=True)
    with pytest.raises(zoo.CorpusError, match=r"expected recordings \*\.npy"):
        zoo.read_corpus(root, "e")


def array_of(header: str) -> bytes:
    """A file in the format of numpy.save with any header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(400)


NO_ARRAYS = {
    "nothing": b"",
    "a text": b"hello",
    "an archive": b"PK\3\4" + bytes(50),
    "cut short": array_of("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }")[:140],
    "beyond the file": array_of("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000, 4), }"),
    "a negative size": array_of("{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 4), }"),
    "a call in the header": array_of("{'descr': '<f4', 'fortran_order': False, 'shape': (open('x'), 4), }"),
    "brackets": array_of("{'descr': '<f4', 'shape': " + "(" * 60),
}


@pytest.mark.parametrize("half", ["mfcc", "transcript"])
@pytest.mark.parametrize("name", NO_ARRAYS)
def test_a_file_that_is_no_array_is_refused(root: Path, name: str, half: str) -> None:
    """Truncated, or something else altogether."""
    (root / "p" / half / "a.npy").write_bytes(NO_ARRAYS[name])
    with pytest.raises(zoo.CorpusError, match=r"a\.npy: expected an array written by numpy\.save"):
        zoo.read_corpus(root, "p")


def test_an_expected_number_of_features_is_checked(root: Path) -> None:
    """All recordings agree with each other, but not with the caller."""
    with pytest.raises(zoo.CorpusError, match="expected 27 features per frame, got 4"):
        zoo.read_corpus(root, "p", features=27)


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_features_of_any_floating_type_and_order_are_read(tmp_path: Path, kind: str, order: str) -> None:
    """Straight into the result where they are float32, through a conversion otherwise; 1e300 is no float32."""
    values = np.arange(12).reshape(3, 4).astype(kind, order=order)
    save(tmp_path, "a", values, None)
    assert zoo.read_corpus(tmp_path, "p").features.tolist() == values.tolist()
    save(tmp_path, "a", np.full((3, 4), 1e300, order=order), None)
    with pytest.raises(zoo.CorpusError, match="finite features, got NaN or infinity at frame 0"):
        zoo.read_corpus(tmp_path, "p")


def test_files_whose_sizes_mislead_are_read_by_their_headers(tmp_path: Path) -> None:
    """Wherever they stand: another type, longer headers, bytes behind the data, each seen as 5 frames or fewer."""
    rows = {name: np.random.default_rng(ord(name)).normal(size=(5, 4)).astype(np.float16) for name in "abcde"}
    kinds = {"a": np.float32, "b": np.float64, "c": np.float16, "d": np.float32, "e": np.float32}
    for first in rows:
        for name in (order := [first, *sorted({*rows} - {first})]):
            save(tmp_path, f"{order.index(name)}{name}", rows[name].astype(kinds[name]), None, partition=first)
        folder = tmp_path / first / "mfcc"
        for name, more in (("d", 4 * 4 * 4), ("e", 3)):
            with (folder / f"{order.index(name)}{name}.npy").open("ab") as file:
                file.write(bytes(more))
        frames = zoo.read_corpus(tmp_path, first)
        assert torch.equal(frames.features, torch.from_numpy(np.concatenate([rows[n] for n in order])).float())
        assert frames.starts.tolist() == [0, 5, 10, 15, 20, 25]
    integers = np.zeros((5, 4), np.int32)
    save(tmp_path, "0", rows["a"].astype(np.float32), None, partition="q")
    save(tmp_path, "1", integers, None, partition="q")
    with pytest.raises(zoo.CorpusError, match=r"1\.npy: expected features \(T, F\) of a floating type"):
        zoo.read_corpus(tmp_path, "q")


def test_what_stands_behind_an_array_is_not_read(tmp_path: Path) -> None:
    """Even if it is more than any memory, with a size that misleads; the files have a hole and take no space."""
    for name, length in (("a", 5), ("b", 6), ("c", 40_000)):
        save(tmp_path, name, np.full((length, 14), length, np.float32), None)
        os.truncate(tmp_path / "p" / "mfcc" / f"{name}.npy", 2**41 if name != "a" else 1000)
    frames = zoo.read_corpus(tmp_path, "p")
    assert frames.starts.tolist() == [0, 5, 11, 40_011]
    assert frames.features[:, 0].tolist() == [5.0] * 5 + [6.0] * 6 + [40_000.0] * 40_000


def test_reading_peaks_at_little_more_than_the_result(tmp_path: Path) -> None:
    """At most 1.2 times the features and labels: NumPy's own allocations, traced."""
    for index in range(60):
        transcript = np.array(["[SOS]", *["AA"] * 2000, "[EOS]"])
        save(tmp_path, f"{index:02}", np.random.default_rng(0).random((2000, 27), np.float32), transcript)
    zoo.read_corpus(tmp_path, "p")  # what is imported, and compiled, at the first call is not counted
    tracemalloc.start()
    frames = zoo.read_corpus(tmp_path, "p")
    beyond = tracemalloc.get_traced_memory()[1]  # torch's result is not traced, NumPy's pieces are
    tracemalloc.stop()
    result = frames.features.nbytes + frames.labels.nbytes
    assert beyond < 0.2 * result
