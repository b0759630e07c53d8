"""Members' outputs out of files of predictions, one per member: `.npy`, `.npz`, `.csv` or `.parquet`.

Rows are aligned by their ids and columns by the names of the classes; labels and groups come from a column of these
files or of another. A file becomes a table here, and `MemberOutputs.from_probabilities` aligns tables. Nothing is ever
unpickled.
"""

from __future__ import annotations

import csv
import hashlib
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ensemble.outputs import MemberOutputs
from ensemble.outputs.arrays import listed, missing

_IDS = ("id", "ids", "index", "")  # a column of such a name tells the rows apart, unless another one is named
_CLASSES = ("classes", "class_names")  # an array of such a name in an .npz names the columns
_MISSING = ["", "nan", "NaN", "NA", "N/A", "null", "None", "<NA>"]


@dataclass(frozen=True)
class Predictions:
    """Members' outputs out of files, with what the files call their rows."""

    outputs: MemberOutputs
    ids: tuple[str, ...]  #: N, in the order of the outputs' frames; "0", "1", ... where the files have none
    id_column: str = "id"  #: name of the column of ids
    label_column: str = "label"  #: name of the column of labels

    def halves(self) -> tuple[Self, Self]:
        """Every other recording, and the others, so that what is fitted on one half can be judged on the other.

        Where no groups were given, every other row in the order of the ids. A `ValueError` for fewer than two.
        """
        groups = self.outputs.groups
        assert groups is not None  # MemberOutputs fills them in
        rows = len(set(groups.tolist())) == len(self.ids)  # each is a recording of its own
        _, rank = np.unique(np.array(self.ids) if rows else groups.numpy(), return_inverse=True)
        if len(set(rank.tolist())) < 2:
            msg = (
                f"expected two recordings or more, to fit on some and judge on others, got {len(self.ids)} rows of one"
            )
            raise ValueError(msg)
        first, second = (np.flatnonzero(rank % 2 == odd) for odd in (0, 1))
        return self._at(first), self._at(second)

    def _at(self, rows: NDArray[np.intp]) -> Self:
        ids = tuple(self.ids[row] for row in rows)
        return replace(self, outputs=_identified(self.outputs.at(torch.from_numpy(rows)), ids), ids=ids)


def read_predictions(
    files: Mapping[str, Path | str] | Iterable[Path | str],
    *,
    labels: str | None = None,
    ids: str | None = None,
    groups: str | None = None,
    classes: Sequence[str] | None = None,
    renormalise: bool = False,
    by_id: bool = False,
) -> Predictions:
    """The outputs of members whose predictions are in files.

    Args:
        files: member -> its file; paths alone name members by their stems. A table has a column for each class, and may
            have columns of ids, labels and groups. An array has a column for each class in the order of `classes`. In
            an `.npz`, arrays (N, C) are members, named by their keys where there are several; arrays (N,) are columns,
            and one called "classes" names the classes.
        labels: `FILE:COLUMN`; a file with one column beside its ids; or a column of the files of predictions. Where
            none of the rows is known there, as those of a test set, the outputs have no labels.
        ids: the column that names the rows in every file; if None, one called "id", "ids", "index", or nothing, in
            either case. Rows are aligned by it; where no file has ids, by their position.
        groups: the column of each row's recording, in these files or that of the labels; or `FILE:COLUMN`.
        classes: names of the classes, beside which columns are ignored. If None, all columns that are nothing else.
        renormalise: divide each row by its sum; see `MemberOutputs.from_probabilities`.
        by_id: take labels and groups from another file by ids alone, and none where these rows have no ids: the file
            is about other rows.

    Returns:
        The outputs, with a fingerprint of the ids, labels and groups that does not depend on the order of rows.

    Raises:
        ValueError: a file that cannot be read as said; ids that are missing, surplus, or there twice; columns that are
            not the classes; labels that are no classes; rows that are no distributions.
    """
    named = {str(name): Path(path) for name, path in files.items()} if isinstance(files, Mapping) else _stems(files)
    target, cluster = _split(labels, "labels"), _split(groups, "groups")
    text = [column for column in (ids, target[1], cluster[1]) if column is not None]
    tables: dict[str, pd.DataFrame] = {}
    for name, path in named.items():
        found = read_tables(path, text)
        for key, table in found.items():
            alone = name if len(found) == 1 else key if len(named) == 1 else f"{name}.{key}"
            tables[alone] = _indexed(table, ids, classes or (), path)
    if not tables:
        msg = "expected at least one file of predictions, got none"
        raise ValueError(msg)
    first = next(iter(tables.values()))
    with_ids = [name for name, table in tables.items() if _has_ids(table)]
    if with_ids and len(with_ids) < len(tables):
        bare = [name for name in tables if name not in with_ids]
        msg = f"expected ids of the rows in every file or in none, got none from {bare}; --ids names their column"
        raise ValueError(msg)
    beside = {path: next(iter(read_tables(path, None).values())) for path, _ in (target, cluster) if path}
    files_beside = {path: _indexed(table, ids, (), path) for path, table in beside.items()}
    nameless = by_id and not with_ids  # nothing tells which rows of the other file these are
    truth = None if nameless and target[0] else _column("labels", target, tables, files_beside, text, required=False)
    elsewhere = cluster[0] is None and not any(cluster[1] in table for table in tables.values())
    from_labels = (target[0], cluster[1]) if elsewhere and cluster[1] else cluster
    needed = truth is not None
    unknown = nameless and from_labels[0] is not None
    recordings = None if unknown else _column("groups", from_labels, tables, files_beside, text, required=needed)
    rows = {name: _of_classes(name, table, classes, text) for name, table in tables.items()}
    outputs = MemberOutputs.from_probabilities(
        rows,
        labels=None if truth is None else _typed(truth, classes or _names(rows)),
        groups=recordings,
        classes=classes,
        renormalise=renormalise,
    )
    keys = tuple(first.index.map(str))
    label = target[1] if truth is None else truth.name
    known = [name if isinstance(name, str) and name else None for name in (first.index.name, label)]
    return Predictions(_identified(outputs, keys), keys, known[0] or "id", known[1] or "label")


def _identified(outputs: MemberOutputs, ids: Sequence[str]) -> MemberOutputs:
    """The same outputs with the fingerprint of their ids, labels and groups, in the order of the ids."""
    order = np.argsort(np.array(ids), kind="stable")
    assert outputs.groups is not None
    _, first, groups = np.unique(outputs.groups.numpy()[order], return_index=True, return_inverse=True)
    digest = hashlib.sha256(repr([ids[row] for row in order]).encode())
    digest.update(first[groups].tobytes())  # whatever numbers the groups have
    if outputs.labels is not None:
        names = np.array(outputs.classes)
        digest.update(repr(names[outputs.labels.numpy()[order]].tolist()).encode())
    return replace(outputs, fingerprint=digest.hexdigest())


def _stems(paths: Iterable[Path | str]) -> dict[str, Path]:
    found = [Path(path) for path in paths]
    if twice := [stem for stem, count in Counter(path.stem for path in found).items() if count > 1]:
        msg = f"expected files of different names, one per member, got {twice} more than once"
        raise ValueError(msg)
    return {path.stem: path for path in found}


def _split(spec: str | None, what: str) -> tuple[Path | None, str | None]:
    """The file and the column that FILE:COLUMN, FILE or COLUMN stands for."""
    if spec is None:
        return None, None
    file, colon, column = spec.rpartition(":")
    if Path(spec).is_file():
        return Path(spec), None
    if colon and Path(file).is_file():
        return Path(file), column
    if Path(file if colon else spec).suffix in READERS:
        msg = f"expected a file of {what}, or the name of a column, got {spec!r}: no such file"
        raise ValueError(msg)
    return None, spec


# From a file to a table, whose columns are counted where they have no names


def read_tables(path: Path, text: Sequence[str] | None = ()) -> dict[str, pd.DataFrame]:
    """Member -> table of one file; "" stands for the file's own name.

    The columns in `text`, or all where it is None, are read as text where the file does not know their types.

    A `ValueError` that names the file where it is of another kind, damaged, or would need unpickling.
    """
    if path.suffix not in READERS:
        msg = f"expected a file that ends in {', '.join(READERS)}, got {str(path)!r}"
        raise ValueError(msg)
    try:
        tables = READERS[path.suffix](path, text)
        if not all(len(table) for table in tables.values()):
            msg = "it has no rows"
            raise ValueError(msg)
        return tables
    except ImportError as error:
        msg = f"{path} needs a reader of Parquet files: pip install zoo-ensemble[parquet], or save it as .csv"
        raise ValueError(msg) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, pd.errors.ParserWarning) as error:
        unpickled = "allow_pickle" in str(error)
        why = "it holds Python objects; save numbers, and text with dtype=str" if unpickled else error
        msg = f"cannot read {path}: {why}"
        raise ValueError(msg) from error


def _npy(path: Path, text: Sequence[str] | None) -> dict[str, pd.DataFrame]:
    return {"": _framed(np.load(path, allow_pickle=False))}


def _npz(path: Path, text: Sequence[str] | None) -> dict[str, pd.DataFrame]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    names = next((arrays.pop(key).tolist() for key in _CLASSES if key in arrays), None)
    columns = {key: array for key, array in arrays.items() if array.ndim == 1}
    members = {key: _framed(array, names) for key, array in arrays.items() if array.ndim != 1}
    tables = members or {"": pd.DataFrame(index=pd.RangeIndex(len(next(iter(columns.values()), ()))))}
    for table in tables.values():
        for key, values in columns.items():
            if len(values) == len(table):
                table[key] = values
    return tables


def _framed(array: NDArray[Any], names: Sequence[Any] | None = None) -> pd.DataFrame:
    if array.dtype.names or array.ndim == 1:
        return pd.DataFrame(array)
    if array.ndim != 2:
        msg = f"expected an array of shape (N, C), got {array.shape}; save one file per member"
        raise ValueError(msg)
    if names is not None and len(names) != array.shape[1]:
        msg = f"expected {array.shape[1]} names of classes, one per column, got {len(names)}"
        raise ValueError(msg)
    return pd.DataFrame(array, columns=None if names is None else pd.Index([*map(str, names)]))


def _csv(path: Path, text: Sequence[str] | None) -> dict[str, pd.DataFrame]:
    """A table with a header or without one; `text` None reads all columns as text."""
    with path.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines)
        header: list[str] = next(reader, [])
        below: list[str] = next(reader, [])
    if not header:
        msg = "it is empty"
        raise ValueError(msg)
    if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), None)):
        msg = f"expected columns separated by commas, got {mark!r} between them"
        raise ValueError(msg)
    bare = _is_row(header, names_may_be_numbers=text is not None)
    if not bare and {*header, *below} == {"0", "1"}:
        msg = f"its first line, {','.join(header)}, can be names of classes or a row; give it a header, or decimals"
        raise ValueError(msg)
    if not bare and (twice := [name for name, count in Counter(header).items() if count > 1]):
        msg = f"expected distinct names of columns, got {twice} more than once"
        raise ValueError(msg)
    names: list[Any] = [*range(len(header))] if bare else header
    words = [name for name in names if text is None or name in text or str(name).strip().lower() in _IDS]
    numeric = {name: _MISSING for name in names if name not in words}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # a line with more cells than the first
        table = pd.read_csv(
            path,
            names=names,
            header=None,
            skiprows=0 if bare else 1,
            dtype=dict.fromkeys(words, str),
            keep_default_na=False,
            na_values=numeric,
            encoding="utf-8-sig",
            index_col=False,
        )
    table.columns = pd.RangeIndex(len(names)) if bare else pd.Index(names)
    return {"": table}


def _is_row(header: Sequence[str], *, names_may_be_numbers: bool) -> bool:
    """Whether the first line holds numbers and no names; distinct whole numbers may be names of classes."""
    try:
        numbers = [float(cell) for cell in header]
    except ValueError:
        return False
    whole = all(number.is_integer() for number in numbers) and len(set(header)) == len(header)
    return not (whole and names_may_be_numbers)


def _parquet(path: Path, text: Sequence[str] | None) -> dict[str, pd.DataFrame]:
    table = pd.read_parquet(path)
    counted = isinstance(table.index, pd.RangeIndex)
    table = table if counted else table.reset_index(names=table.index.name or "")
    table.columns = pd.Index([*map(str, table.columns)])
    return {"": table}


READERS: dict[str, Callable[[Path, Sequence[str] | None], dict[str, pd.DataFrame]]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".csv": _csv,
    ".parquet": _parquet,
}


# Rows by their ids


def _indexed(table: pd.DataFrame, ids: str | None, classes: Sequence[str], path: Path) -> pd.DataFrame:
    """The table with its ids as the index, as text; as it is where it has none."""
    named = [str(name) for name in table.columns] if not isinstance(table.columns, pd.RangeIndex) else []
    found = [name for name in named if name.strip().lower() in _IDS and name not in classes]
    found = [name for name in found if name.strip()] or found  # a table saved with a counted index beside its ids
    if ids is not None and path.suffix != ".npy":
        if ids not in named:
            msg = f"expected a column {ids!r} of ids in {path}, got the columns {listed(named)}"
            raise ValueError(msg)
        found = [ids]
    if len(found) > 1:
        msg = f"expected one column of ids in {path}, got {found}; --ids names it"
        raise ValueError(msg)
    if not found:
        return table
    keys = table[found[0]]
    if empty := [row for row, key in enumerate(keys.tolist()) if missing(key) or key == ""]:
        msg = f"expected an id in every row of {path}, got none in row {empty[0] + 1} ({len(empty)} such rows)"
        raise ValueError(msg)
    values = [str(int(key)) if isinstance(key, float) and key.is_integer() else str(key) for key in keys.tolist()]
    if twice := [key for key, count in Counter(values).items() if count > 1]:
        msg = f"expected each id once in the column {found[0]!r} of {path}, got {listed(twice)} more than once"
        raise ValueError(msg)
    surplus = [name for name in named if not name.strip() and name != found[0]]
    return table.drop(columns=[found[0], *surplus]).set_index(pd.Index(values, name=found[0] or "id", dtype=object))


def _has_ids(table: pd.DataFrame) -> bool:
    return not isinstance(table.index, pd.RangeIndex)


def _column(
    what: str,
    source: tuple[Path | None, str | None],
    tables: Mapping[str, pd.DataFrame],
    beside: Mapping[Path, pd.DataFrame],
    text: Sequence[str],
    *,
    required: bool,
) -> pd.Series[Any] | None:
    """The labels or groups of the first table's rows; None where they are not asked for, or unknown and need not be."""
    (path, column), first = source, next(iter(tables.values()))
    if path is None and column is None:
        return None
    if path is None:
        given = [(name, table[column]) for name, table in tables.items() if column in table]
        if not given:
            if not required:
                return None
            msg = f"expected {what} in a column {column!r} of the predictions, got {listed([*map(str, first.columns)])}"
            raise ValueError(f"{msg}; --{what} FILE:COLUMN takes them from another file")
        (name, series), *others = given
        for other, values in others:
            if not values.reindex(series.index).equals(series):
                msg = f"expected the same {what} in {name!r} and {other!r}, got others in the column {column!r}"
                raise ValueError(msg)
        return series
    table = beside[path]
    if column is None:
        left = [name for name in table.columns if name not in text or len(table.columns) == 1]
        if len(left) != 1:
            msg = f"expected the column of {what} as {path}:COLUMN, where COLUMN is one of {listed([*table.columns])}"
            raise ValueError(msg)
        column = left[0]
    if column not in table:
        msg = f"expected {what} in a column {column!r} of {path}, got the columns {listed([*map(str, table.columns)])}"
        raise ValueError(msg)
    series = table[column]
    if not _has_ids(first):
        return series.reset_index(drop=True)
    if not _has_ids(table):
        msg = f"expected a column of ids in {path} beside the {what}, as in the predictions, got {[*map(str, table)]}"
        raise ValueError(f"{msg}; --ids names it in all files")
    known = set(series.index)
    unknown = [key for key in first.index if key not in known]
    if unknown and len(unknown) == len(first) and not required:
        return None
    if unknown:
        msg = (
            f"expected {what} of every row in {path}, got none for the ids {listed(unknown)} ({len(unknown)} such rows)"
        )
        raise ValueError(f"{msg}; it has ids such as {listed([*series.index])}")
    return series.loc[first.index]


def _of_classes(
    name: str, table: pd.DataFrame, classes: Sequence[str] | None, text: Sequence[str]
) -> pd.DataFrame | NDArray[Any]:
    """The columns of the classes, which must hold numbers; a table without names and ids as an array."""
    if isinstance(table.columns, pd.RangeIndex):
        if not _has_ids(table):
            return table.to_numpy()
        return table if classes is None or len(classes) != table.shape[1] else table.set_axis([*classes], axis=1)
    own = [column for column in table.columns if column not in text] if classes is None else [*map(str, classes)]
    if lost := [column for column in own if column not in table.columns]:
        msg = f"expected a column for each class from member {name!r}, got none named {listed(lost)} among"
        raise ValueError(f"{msg} {listed([*table.columns])}")
    rows = table[own]
    if words := [column for column in own if rows[column].dtype.kind not in "biuf"]:
        msg = f"expected probabilities in the column {words[0]!r} of member {name!r}, got {rows[words[0]].iloc[0]!r}"
        raise ValueError(f"{msg}; --ids, --labels and --groups name other columns, --classes those of the classes")
    if classes is None and ((outside := (rows < -0.01).any() | (rows > 1.01).any()).any()) and not outside.all():
        found = [column for column in own if outside[column]]
        msg = f"expected probabilities in every column of member {name!r}, got numbers beyond 0 to 1 in {listed(found)}"
        raise ValueError(f"{msg}; --ids, --labels and --groups name other columns, --classes those of the classes")
    return rows


def _names(rows: Mapping[str, Any]) -> Sequence[str]:
    """Those of the first table that has names of its own."""
    named = (table.columns for table in rows.values() if isinstance(table, pd.DataFrame))
    return next(([*map(str, columns)] for columns in named if not isinstance(columns, pd.RangeIndex)), ())


def _typed(series: pd.Series[Any], classes: Sequence[str]) -> pd.Series[Any]:
    """Labels out of text: names where all of them are, otherwise integers where all of them are."""
    values = series.tolist()
    if not all(isinstance(value, str) for value in values):
        return series
    lacking = {*_MISSING} - {*classes}
    if empty := [key for key, value in zip(series.index, values, strict=True) if value.strip() in lacking]:
        msg = f"expected a label of every row, got none for {listed(empty)} ({len(empty)} such rows)"
        raise ValueError(msg)
    if set(values) <= set(classes) or not all(value.lstrip("-").isdigit() for value in values):
        return series
    return pd.Series([int(value) for value in values], series.index, name=series.name)
