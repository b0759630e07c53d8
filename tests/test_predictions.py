"""Files of predictions: the four kinds, rows by id, columns by class, labels and groups from a column or a file."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import ensemble
from ensemble.outputs.predictions import read_predictions

IDS = [f"r{i}" for i in range(8)]
CLASSES = ["cat", "dog", "elk"]
LABELS = ["cat", "dog", "elk", "cat", "dog", "elk", "cat", "dog"]
SPEAKERS = ["s1", "s1", "s2", "s2", "s3", "s3", "s4", "s4"]


def rows(seed: int) -> np.ndarray:
    """(8, 3) distributions that favour the true class."""
    generator = np.random.default_rng(seed)
    weights = generator.uniform(0.1, 1, (8, 3)) + 2 * np.eye(3)[[CLASSES.index(label) for label in LABELS]]
    return weights / weights.sum(axis=1, keepdims=True)


def table(seed: int, *, shuffled: bool = False) -> pd.DataFrame:
    """Ids and a column per class; rows and columns in another order where it is shuffled."""
    found = pd.DataFrame(rows(seed), columns=CLASSES)
    found.insert(0, "id", IDS)
    if not shuffled:
        return found
    order = np.random.default_rng(seed).permutation(8)
    return found.iloc[order][["elk", "id", "cat", "dog"]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a.csv, b.csv (shuffled), and truth.csv with labels and speakers of these and other rows."""
    monkeypatch.chdir(tmp_path)
    table(0).to_csv("a.csv", index=False)
    table(1, shuffled=True).to_csv("b.csv", index=False)
    truth = pd.DataFrame({"id": ["x9", *IDS[::-1]], "animal": ["elk", *LABELS[::-1]], "who": ["s9", *SPEAKERS[::-1]]})
    truth.to_csv("truth.csv", index=False)
    return tmp_path


def test_rows_are_aligned_by_id_and_columns_by_class(folder: Path) -> None:
    """Labels and groups too; further rows of the truth do not matter."""
    found = read_predictions(["a.csv", "b.csv"], labels="truth.csv:animal", groups="who")
    outputs = found.outputs
    assert (outputs.members, outputs.classes, found.ids) == (("a", "b"), tuple(CLASSES), tuple(IDS))
    assert (found.id_column, found.label_column) == ("id", "animal")
    for seed, member in enumerate(outputs.probabilities):
        np.testing.assert_allclose(member, rows(seed), rtol=0, atol=1e-6)
    assert outputs.require_labels().tolist() == [CLASSES.index(label) for label in LABELS]
    assert outputs.groups is not None
    assert outputs.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def write_parquet(path: Path, found: pd.DataFrame) -> None:
    pytest.importorskip("pyarrow")
    found.to_parquet(path)


WRITERS: dict[str, Callable[[Path, pd.DataFrame], None]] = {
    "csv": lambda path, found: found.to_csv(path.with_suffix(".csv"), index=False),
    "csv with the ids as its index": lambda path, found: found.set_index("id").to_csv(path.with_suffix(".csv")),
    "csv with a counted index": lambda path, found: found.to_csv(path.with_suffix(".csv")),
    "csv with a byte order mark": lambda path, found: found.to_csv(
        path.with_suffix(".csv"), index=False, encoding="utf-8-sig"
    ),
    "npz": lambda path, found: np.savez(
        path.with_suffix(".npz"),
        p=found[["elk", "cat", "dog"]].to_numpy(),
        id=found["id"].to_numpy().astype(str),
        classes=np.array(["elk", "cat", "dog"]),
    ),
    "parquet": lambda path, found: write_parquet(path.with_suffix(".parquet"), found),
    "parquet with the ids as its index": lambda path, found: write_parquet(
        path.with_suffix(".parquet"), found.set_index("id")
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_outputs(folder: Path, kind: str) -> None:
    """Beside a plain table; and one fingerprint, whatever the order of rows."""
    WRITERS[kind](folder / "c", table(2, shuffled=True))
    found = read_predictions([*folder.glob("c.*"), "a.csv"], labels="truth.csv:animal")
    plain = read_predictions(["a.csv"], labels="truth.csv:animal")
    assert found.outputs.fingerprint == plain.outputs.fingerprint
    order = [IDS.index(key) for key in found.ids]
    columns = [CLASSES.index(name) for name in found.outputs.classes]
    np.testing.assert_allclose(found.outputs.probabilities[0], rows(2)[order][:, columns], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.outputs.probabilities[1], rows(0)[order][:, columns], rtol=0, atol=1e-6)


def test_arrays_without_names_are_taken_by_position(folder: Path) -> None:
    """`.npy`, several members in an `.npz`, a table without a header; classes are counted, or named by `classes`."""
    np.save("p.npy", rows(0))
    np.savez("many.npz", q=rows(1), r=rows(2).astype(">f4"))
    np.savetxt("s.csv", rows(3), delimiter=",")
    np.save("y.npy", np.array([CLASSES.index(label) for label in LABELS]))
    files = ["p.npy", "s.csv"]
    outputs = read_predictions(files, labels="y.npy").outputs
    assert outputs.classes == ("0", "1", "2")
    np.testing.assert_allclose(outputs.probabilities[1], rows(3), rtol=0, atol=1e-6)
    named = read_predictions(files, labels="y.npy", classes=CLASSES).outputs
    assert named.classes == tuple(CLASSES)
    assert torch.equal(named.require_labels(), outputs.require_labels())
    assert read_predictions(["many.npz"]).outputs.members == ("q", "r")
    assert read_predictions(["many.npz", "p.npy"]).outputs.members == ("many.q", "many.r", "p")
    table(0).drop(columns="id").to_csv("t.csv", index=False)
    beside = read_predictions(["t.csv", "p.npy"], classes=CLASSES).outputs
    assert torch.equal(beside.probabilities[0], beside.probabilities[1])


def test_labels_may_stand_in_the_files_themselves(folder: Path) -> None:
    """One column for all members, which must agree; columns beside the named classes do not matter."""
    for seed, name in enumerate("cd"):
        table(seed, shuffled=bool(seed)).merge(pd.read_csv("truth.csv"), on="id").to_csv(f"{name}.csv", index=False)
    found = read_predictions(["c.csv", "d.csv"], labels="animal", groups="who").outputs
    assert found.require_labels().tolist() == [CLASSES.index(label) for label in LABELS]
    assert read_predictions(["c.csv"], labels="animal", classes=CLASSES).outputs.classes == tuple(CLASSES)
    wrong = pd.read_csv("d.csv").assign(animal="elk")
    wrong.to_csv("d.csv", index=False)
    with pytest.raises(ValueError, match="the same labels in 'c' and 'd'"):
        read_predictions(["c.csv", "d.csv"], labels="animal", groups="who")


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["0", "1", "2"], "012012", [0, 1, 2, 0, 1, 2]),
        (["2", "0", "1"], "012012", [1, 2, 0, 1, 2, 0]),
        (["3", "5", "7"], "357357", [0, 1, 2, 0, 1, 2]),
        (["3", "5", "7"], "012012", [0, 1, 2, 0, 1, 2]),
        (["a", "b", "c"], "012012", [0, 1, 2, 0, 1, 2]),
        (["a", "b", "c"], "abcabc", [0, 1, 2, 0, 1, 2]),
        (["007", "01", "1"], ["007", "01", "1", "1", "01", "007"], [0, 1, 2, 2, 1, 0]),
    ],
)
def test_labels_of_text_files_are_names_first(folder: Path, names: list[str], labels: Any, expected: list[int]) -> None:
    """Numbers are indices only where they name no class."""
    pd.DataFrame(np.eye(3)[[0, 1, 2, 0, 1, 2]] * 0.7 + 0.1, columns=names).to_csv("p.csv", index=False)
    pd.DataFrame({"y": list(labels)}).to_csv("y.csv", index=False)
    for spec in ("y.csv:y", "y.csv"):
        assert read_predictions(["p.csv"], labels=spec).outputs.require_labels().tolist() == expected


def test_rows_of_which_no_label_is_known_have_none(folder: Path) -> None:
    """As those of a test set; some without is an error."""
    table(0).assign(id=[f"t{i}" for i in range(8)]).to_csv("c.csv", index=False)
    assert read_predictions(["c.csv"], labels="truth.csv:animal", groups="who").outputs.labels is None
    table(0).assign(id=[*IDS[:7], "t7"]).to_csv("c.csv", index=False)
    with pytest.raises(ValueError, match=r"labels of every row in truth.csv, got none for the ids \['t7'\] \(1 such"):
        read_predictions(["c.csv"], labels="truth.csv:animal")


def test_halves_are_of_whole_recordings_and_of_different_frames(folder: Path) -> None:
    """Every other speaker, or every other row; each with a fingerprint of its own."""
    found = read_predictions(["b.csv"], labels="truth.csv:animal", groups="who")
    first, second = found.halves()
    assert sorted(first.ids) == ["r0", "r1", "r4", "r5"]
    assert sorted(second.ids) == ["r2", "r3", "r6", "r7"]
    assert len({each.outputs.fingerprint for each in (found, first, second)}) == 3
    single, other = read_predictions(["b.csv"], labels="truth.csv:animal").halves()
    assert (sorted(single.ids), sorted(other.ids)) == (IDS[::2], IDS[1::2])
    for half in (single, other):
        truth = [half.outputs.classes.index(LABELS[IDS.index(key)]) for key in half.ids]
        assert half.outputs.require_labels().tolist() == truth
    table(0).head(1).to_csv("c.csv", index=False)
    with pytest.raises(ValueError, match="two recordings or more"):
        read_predictions(["c.csv"], labels="truth.csv:animal").halves()


def test_a_rule_fitted_on_files_remembers_them(folder: Path) -> None:
    """Its fingerprint is that of ids and labels: judged on the same rows, whatever their order, the report says so."""
    given = read_predictions(["a.csv", "b.csv"], labels="truth.csv:animal").outputs
    turned = read_predictions(["b.csv", "a.csv"], labels="truth.csv:animal").outputs
    rule = ensemble.fit_weights(given).rule
    assert (rule.fingerprint, rule.members) == (turned.fingerprint, ("a", "b"))
    assert ensemble.evaluate(turned, {"weighted": rule}).rules.fitted_here.tolist() == [True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.assign(id=["r0", "r0", *IDS[2:]]), r"each id once in the column 'id' of c.csv, got \['r0'\]"),
        (lambda t: t.head(7), r"only in member 'c' and \['r7'\]"),
        (lambda t: t.assign(id=[*IDS[:7], "r9"]), r"\['r9'\] only in member 'c' and \['r7'\] only in member 'a'"),
        (lambda t: t.assign(id=[*IDS[:7], None]), r"an id in every row of c.csv, got none in row 8"),
        (lambda t: t.drop(columns="id"), r"in every file or in none, got none from \['c'\]"),
        (lambda t: t.rename(columns={"elk": "ELK"}), r"without \['elk'\]; with the further columns \['ELK'\]"),
        (lambda t: t.assign(fold=range(8)), r"beyond 0 to 1 in \['fold'\]; --ids, --labels and --groups"),
        (lambda t: t.assign(file="x.png"), "in the column 'file' of member 'c', got 'x.png'"),
        (lambda t: t.assign(cat=100 * t.cat, dog=100 * t.dog, elk=100 * t.elk), "per cent"),
        (lambda t: t.assign(cat=t.cat.round(2), dog=t.dog.round(2)), "were rounded"),
        (lambda t: t.assign(cat=np.nan), "part of a row is NaN"),
    ],
)
def test_tables_that_do_not_fit_are_refused_by_name(folder: Path, change: Any, words: str) -> None:
    """Ids that are there twice, missing or surplus; columns that are no classes; rows that are no distributions."""
    change(table(2)).to_csv("c.csv", index=False)
    with pytest.raises(ValueError, match=words):
        read_predictions(["a.csv", "c.csv"], labels="truth.csv:animal")


def test_renormalising_is_asked_for(folder: Path) -> None:
    """Three decimals, as they are often written."""
    table(0).round(2).to_csv("c.csv", index=False)
    with pytest.raises(ValueError, match="renormalise=True"):
        read_predictions(["c.csv"])
    found = read_predictions(["c.csv"], renormalise=True).outputs.probabilities
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 8), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.npy", b"nothing of the kind", "cannot read p.npy"),
        ("p.npy", b"", "cannot read p.npy"),
        ("p.npz", b"PK", "cannot read p.npz"),
        ("p.csv", b"", "cannot read p.csv: it is empty"),
        ("p.csv", b"a,b\n", "cannot read p.csv: it has no rows"),
        ("p.csv", b"a,b\n0.5,0.5,7\n0.5,0.5\n", "cannot read p.csv"),
        ("p.csv", b"a,b\n0.5,0.5\n0.5,0.5,7\n", "cannot read p.csv"),
        ("p.csv", b"a;b\n0.5;0.5\n", "separated by commas, got ';'"),
        ("p.csv", b"a,a\n0.5,0.5\n", r"names of columns, got \['a'\]"),
        ("p.csv", b"a,b\n0.5\n", "part of a row is NaN"),
        ("p.csv", b"0,1\n1,0\n0,1\n", "names of classes or a row"),
        ("p.csv", b"\xff\xfe\x00", "cannot read p.csv"),
        ("p.txt", b"0.5 0.5", "ends in .npy, .npz, .csv, .parquet, got 'p.txt'"),
    ],
)
def test_files_that_are_something_else_are_refused(folder: Path, name: str, content: bytes, words: str) -> None:
    """With their path."""
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_predictions([name])


def test_nothing_is_unpickled(folder: Path) -> None:
    """An array of Python objects is refused, in either kind of file."""
    objects = np.array([[0.5, "x"]], dtype=object)
    np.save("p.npy", objects, allow_pickle=True)
    np.savez("p.npz", p=objects)
    for name in ("p.npy", "p.npz"):
        with pytest.raises(ValueError, match="holds Python objects; save numbers"):
            read_predictions([name])


def test_a_missing_reader_of_parquet_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the way out."""
    for module in ("pyarrow", "fastparquet"):
        monkeypatch.setitem(sys.modules, module, None)
    Path("p.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ValueError, match=r"p.parquet needs .*: pip install zoo-ensemble\[parquet\], or save it as .csv"
    ):
        read_predictions(["p.parquet"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": "nowhere.csv:animal"}, "got 'nowhere.csv:animal': no such file"),
        ({"labels": "truth.csv"}, r"as truth.csv:COLUMN, where COLUMN is one of \['animal', 'who'\]"),
        ({"labels": "truth.csv:beast"}, r"column 'beast' of truth.csv, got the columns \['animal', 'who'\]"),
        ({"labels": "truth.csv:animal", "groups": "speaker"}, "column 'speaker'"),
        ({"labels": "truth.csv:who"}, r"labels among the classes \['cat', 'dog', 'elk'\], got \['s1'"),
        ({"labels": "bare.csv:animal"}, "a column of ids in bare.csv beside the labels"),
        ({"labels": "empty.csv:animal"}, r"a label of every row, got none for \['r0'\]"),
        ({"ids": "name"}, "a column 'name' of ids in a.csv, got the columns"),
        ({"classes": ["cat", "dog", "fox"]}, r"none named \['fox'\] among \['cat', 'dog', 'elk'\]"),
    ],
)
def test_columns_that_are_not_there_are_named(folder: Path, options: Any, words: str) -> None:
    """With those that are."""
    truth = pd.read_csv("truth.csv")
    truth.drop(columns="id").to_csv("bare.csv", index=False)
    truth.assign(animal=truth.animal.where(truth.id != "r0")).to_csv("empty.csv", index=False)
    with pytest.raises(ValueError, match=words):
        read_predictions(["a.csv", "b.csv"], **options)


def test_two_files_of_one_name_are_refused(folder: Path) -> None:
    """A member has one file."""
    np.save("a.npy", rows(0))
    with pytest.raises(ValueError, match=r"different names, one per member, got \['a'\]"):
        read_predictions(["a.csv", "a.npy"])
    with pytest.raises(ValueError, match="at least one file"):
        read_predictions([])
