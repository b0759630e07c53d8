"""The HW1P2 layout, read and written, and every way in which a folder can be wrong."""

import tracemalloc
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


def test_the_order_file_of_a_partition_decides(root: Path) -> None:
    """A header, then one file name per line."""
    (root / "p" / "test_order.csv").write_text("name\nb.npy\na.npy\n")
    assert zoo.read_corpus(root, "p").names == ("b", "a")
    (root / "p" / "test_order.csv").write_text("name\nc.npy\n")
    with pytest.raises(zoo.CorpusError, match=r"there is no c\.npy"):
        zoo.read_corpus(root, "p")


def test_what_was_written_is_read_again(frames: zoo.FrameSet, tmp_path: Path) -> None:
    """Features, labels, starts and names survive the folder; an existing one is not overwritten."""
    write_corpus(frames, tmp_path, "p")
    again = zoo.read_corpus(tmp_path, "p", classes=frames.classes)
    assert torch.equal(again.features, frames.features)
    assert torch.equal(again.labels, frames.labels)
    assert again.fingerprint == frames.fingerprint
    with pytest.raises(zoo.CorpusError, match="p exists; choose another name"):
        write_corpus(frames, tmp_path, "p")


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
        (GOOD, np.array(["[SOS]", "B", "XX", "B", "[EOS]"]), r"c\.npy: frame 1: unknown phoneme 'XX'"),
        (GOOD, np.array(["[SOS]", "B", "[SOS]", "B", "[EOS]"]), r"frame 1: unknown phoneme '\[SOS\]'"),
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


def test_reading_peaks_at_little_more_than_the_result(tmp_path: Path) -> None:
    """At most 1.2 times the features and labels: NumPy's own allocations, traced."""
    for index in range(60):
        transcript = np.array(["[SOS]", *["AA"] * 2000, "[EOS]"])
        save(tmp_path, f"{index:02}", np.random.default_rng(0).random((2000, 27), np.float32), transcript)
    tracemalloc.start()
    frames = zoo.read_corpus(tmp_path, "p")
    beyond = tracemalloc.get_traced_memory()[1]  # torch's result is not traced, NumPy's pieces are
    tracemalloc.stop()
    result = frames.features.nbytes + frames.labels.nbytes
    assert beyond < 0.2 * result
