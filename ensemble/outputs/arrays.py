"""The one door for arrays: what holds numbers, labels, groups or tables outside becomes a tensor here, or is refused.

Numbers come as tensors of any device, arrays of any byte order and layout, lists, Series and tables. Columns are found
by the names of the classes, rows by their index, labels by membership among the classes: nothing is guessed, and what
can be read in two ways is refused with the way out.
"""

from __future__ import annotations

import math
from collections.abc import KeysView, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TOLERANCE = 1e-3  # rows whose sum is further from one than this are refused
_ROUNDING = 1e-3  # a probability below zero by no more than this is a rounding error
_NEAR = 0.1  # rows of probabilities that were rounded to a few decimals have a sum this near to one
_SHOWN = 5  # names listed in an error


def numbers(values: Any, what: str = "numbers") -> Tensor:
    """Numbers of any origin as a dense tensor of a type that torch computes in; not to be written to.

    Args:
        values: a tensor, which keeps its type, device and gradient; an array of any byte order, strides or layout,
            read-only or not; numbers as objects, such as `Decimal`, where None and missing values count as NaN; lists
            of all these; a Series or a table.
        what: what they are, for errors.

    Raises:
        TypeError: text, dates, complex numbers, or something that holds no numbers.
        ValueError: rows of unequal length, masked entries, or integers beyond 64 bits.

    Example:
        >>> numbers(np.array([[1, 2, 3]], dtype=">i2")[:, ::-1])
        tensor([[3, 2, 1]], dtype=torch.int16)
    """
    if isinstance(values, Tensor):
        return _dense(values, what)
    if isinstance(values, list | tuple) and any(isinstance(item, Tensor) for item in values):
        values = [_to_numpy(item, what) if isinstance(item, Tensor) else item for item in values]
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        msg = f"expected {what}, got a masked array with masked entries; fill them first"
        raise ValueError(msg)
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of unequal length, what lives on another device
        msg = f"expected {what} as an array, got {type(values).__name__}: {error}"
        raise (TypeError if isinstance(error, TypeError) else ValueError)(msg) from error
    if array.dtype == object:
        array = _from_objects(array, values, what)
    kind = array.dtype.kind
    if kind == "V" and array.dtype.names is None:  # types beyond NumPy's own, such as bfloat16 of other libraries
        array = array.astype(np.float32)
    elif kind not in "biuf":
        raise TypeError(f"expected {what}, got {_KINDS.get(kind, 'values')} ({array.dtype})")
    elif kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    elif kind == "u" and array.dtype.itemsize > 1:  # torch can hardly compute in these
        if array.dtype.itemsize == 8 and array.size and array.max() > np.iinfo(np.int64).max:
            raise ValueError(f"expected {what} of at most 64 bits, got {array.max()}")
        array = array.astype(np.int64)
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, native, requirements=["C", "A", "W"]))


def singles(values: Tensor) -> Tensor:
    """A float32 copy of a CPU tensor, in one piece and in memory of NumPy's, for loops over blocks of some MB.

    torch's own is aligned, and glibc gives such memory out again only where nothing was put behind it meanwhile
    (sourceware.org, bug 14581): a loop over blocks then takes new memory for each of them.
    """
    return torch.from_numpy(np.empty(values.shape, dtype=np.float32)).copy_(values)


def floats(values: Any, what: str = "numbers") -> NDArray[np.float64]:
    """`numbers` as a float64 array on the CPU."""
    array: NDArray[np.float64] = numbers(values, what).detach().cpu().double().numpy()
    return array


def truths(values: Any, what: str = "right and wrong") -> NDArray[np.bool_]:
    """Booleans, or numbers that are 0 or 1, of any origin as an array on the CPU.

    Raises:
        TypeError: as for `numbers`.
        ValueError: as for `numbers`, or another number.
    """
    given = numbers(values, what).detach().cpu()
    array: NDArray[np.bool_] = given.bool().numpy()
    if given.dtype != torch.bool and (off := given[given != given.bool()]).numel():
        msg = f"expected {what} as booleans, or as 0 and 1, got {off[0].item()}"
        raise ValueError(msg)
    return array


_KINDS = {
    "U": "text",
    "S": "bytes",
    "T": "text",
    "M": "dates",
    "m": "durations",
    "c": "complex numbers",
    "V": "records",
}


def _dense(tensor: Tensor, what: str) -> Tensor:
    """An ordinary tensor: no complex, sparse, quantised or lazily negated one, none without data."""
    if tensor.is_complex() or tensor.is_meta:
        raise TypeError(f"expected {what}, got a tensor {'without data' if tensor.is_meta else 'of complex numbers'}")
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    tensor = tensor.float() if tensor.is_floating_point() and tensor.element_size() < 2 else tensor  # float8
    return tensor.resolve_neg()


def _to_numpy(tensor: Tensor, what: str) -> NDArray[Any]:
    dense = _dense(tensor, what).detach().cpu()
    array: NDArray[Any] = (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
    return array


def _from_objects(array: NDArray[Any], values: Any, what: str) -> NDArray[Any]:
    """Numbers out of an array of objects: int64 if all are integers, otherwise float64 with NaN for what is missing."""
    came = f"expected {what}, got {type(values).__name__}"
    if array.ndim == 0:
        raise TypeError(f"{came}; give an array, a tensor or a list of numbers")
    items = array.ravel().tolist()
    if text := next((item for item in items if isinstance(item, str | bytes)), None):
        raise TypeError(f"{came} with text, {text!r}")
    if all(isinstance(item, int | np.integer) for item in items):
        try:
            return np.array(items, dtype=np.int64).reshape(array.shape)
        except OverflowError as error:
            raise ValueError(f"{came} with integers beyond 64 bits") from error
    try:
        return np.array([math.nan if missing(item) else float(item) for item in items]).reshape(array.shape)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{came} with something that is no number: {error}") from error


def missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, and the NA and NaT of tables."""
    try:
        return value is None or type(value).__name__ == "NAType" or bool(value != value)
    except (TypeError, ValueError, RuntimeError):  # it is compared item by item
        return False


# Probabilities


def distributions(
    values: Any, whose: str = "", *, dtype: torch.dtype | None = torch.float32, abstain: bool = False,
    renormalise: bool = False,
) -> Tensor:  # fmt: skip
    """(N, C) rows on the CPU, checked; not to be written to. An error names `whose` they are: "from member 'a'".

    Args:
        values: as for `numbers`. The sums of float16 and bfloat16 rows may be off by the machine epsilon of their type;
            these rows are divided by their sum.
        dtype: of the rows returned; None keeps float64, and makes float32 of all other types.
        abstain: accept rows that are all NaN.
        renormalise: divide each row by its sum, for probabilities that were rounded, per cent, counts; a number below
            zero by at most 1e-3 counts as zero.

    Raises:
        TypeError: as for `numbers`.
        ValueError: another shape, or a row that is no distribution: its sum is further from one than 1e-3, or it holds
            a negative number, NaN or infinity. The message tells the likely cause, a frame, and the way out.
    """
    whose = f" {whose}" if whose else ""
    given = numbers(values, f"probabilities{whose}").detach().cpu()
    rows = given.to(dtype or (torch.float64 if given.dtype == torch.float64 else torch.float32))
    if rows.ndim != 2 or not rows.shape[1]:
        hint = {
            2: "; there must be a class",
            1: "; one column is not enough: for two classes stack 1 - p and p, for predicted classes ask the model for "
            "its probabilities",
            3: "; give one array per member",
        }.get(rows.ndim, "")
        msg = f"expected probabilities of shape (N, C){whose}, got {tuple(rows.shape)}{hint}"
        raise ValueError(msg)
    half = given.dtype in (torch.float16, torch.bfloat16)
    if renormalise:
        rows = rows.where(~((rows < 0) & (rows >= -_ROUNDING)), 0.0)
    sums = rows.sum(dim=1)
    within = max(_TOLERANCE, torch.finfo(given.dtype).eps) if half else _TOLERANCE
    off = ~((sums > 0) & sums.isfinite()) if renormalise else ~((sums - 1).abs() <= within)
    bad = off | (rows < 0).any(dim=1)
    if abstain:
        bad &= ~rows.isnan().all(dim=1)
    if bad.any():
        frames = bad.nonzero().flatten()
        cause, which = _cause(rows[frames].double(), abstain=abstain)
        row, frame = rows[frames[which]], int(frames[which])
        came = f"a row with sum {float(row.sum()):.6g} and minimum {float(row.min()):.6g} at frame {frame}"
        msg = f"expected rows of probabilities that sum to one{whose}, got {came} ({len(frames)} such rows); {cause}"
        raise ValueError(msg)
    return rows / sums[:, None] if half or renormalise else rows


def _cause(rows: Tensor, *, abstain: bool) -> tuple[str, int]:
    """Why rows are no distributions, with the way out, and the first row that shows it."""
    nan, sums, least, most = rows.isnan(), rows.sum(dim=1), rows.amin(dim=1), rows.amax(dim=1)
    single, negative = rows.shape[1] == 1, least < -_ROUNDING
    rounded = ~negative & ((sums - 1).abs() <= _NEAR)
    logs = (most <= 0) & ((rows.exp().sum(dim=1) - 1).abs() <= _NEAR)
    away = "if it abstains there, declare abstain=True to MemberOutputs, or leave those frames out"
    part = "part of a row is NaN, which is no abstention (a row of NaN throughout): look for a join that lost columns"
    way_out = "renormalise=True (--renormalise) divides each row by its sum"
    below = f"rounding left numbers below zero: {way_out}, and makes them zero"
    few = f"the numbers were rounded, to few decimals or half precision: {way_out}"
    one = "one probability per frame is not enough: for two classes give two columns, 1 - p and p"
    scores = f"these are scores of classes that are judged one by one: {way_out}"
    other = f"for logits, apply softmax to logits first; for counts or votes, {way_out}"
    causes: tuple[tuple[Tensor, bool, str], ...] = (  # which rows show it, whether all must, and the words
        (nan.all(dim=1) & (not abstain), False, away),
        (nan.any(dim=1), False, part),
        (rows.isinf().any(dim=1), False, "a number is infinite: look for a division by zero or an overflow"),
        (logs, True, "these are logarithms of probabilities: exponentiate them first, as with numpy.exp"),
        (negative, False, "apply softmax to logits first"),
        ((most == 0), False, "a row is all zero: leave those frames out, or give them equal probabilities"),
        ((least < 0) & rounded, False, below),
        ((sums - 1).abs() <= _TOLERANCE, True, "a number is below zero"),
        (rounded, True, few),
        ((sums - 100).abs() <= 100 * _NEAR, True, f"these are per cent: divide them by 100; or {way_out}"),
        (torch.full_like(negative, single), True, one),
        (most <= 1, True, scores),
    )
    for shown, all_rows, words in causes:
        if shown.all() if all_rows else shown.any():
            return words, int(shown.nonzero()[0])
    return other, 0


def rows_and_labels(values: Any, labels: Any, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(N, C) checked rows and (N,) class indices; columns of a table name the classes, and its index the rows."""
    table = Aligned({"": values})
    rows = distributions(table.arrays[""], dtype=dtype)
    truth = table.by_row(labels, "the labels")
    return rows, class_indices(truth, table.classes, rows.shape[1], frames=len(rows))


# Labels, groups, names


def class_names(given: Any, *, what: str = "classes") -> tuple[str, ...]:
    """Names of classes as text, from any sequence of text, bytes, integers or booleans; a `TypeError` otherwise.

    Example:
        >>> class_names(np.array([3, 5, 7]))
        ('3', '5', '7')
    """
    return tuple(_text(item, what) for item in _ordered(given, what))


def _ordered(given: Any, what: str = "classes") -> list[Any]:
    """Names as they came, in their order; sets have none."""
    unordered = isinstance(given, bytes | Mapping | Set) and not isinstance(given, KeysView)
    if unordered or not hasattr(given, "__iter__"):
        raise TypeError(f"expected {what} as a sequence of names, got {given!r}")
    return _items(given)


def _items(given: Any) -> list[Any]:
    """The values of a sequence, array or Series as Python's own."""
    return [item.item() if isinstance(item, np.generic | Tensor) else item for item in given]


def _text(item: Any, what: str) -> str:
    """A name as text; a whole float is written as an integer."""
    if isinstance(item, bytes):
        return item.decode()
    if isinstance(item, float) and item.is_integer():
        return str(int(item))
    if isinstance(item, str | bool | int | float) and not missing(item):
        return str(item)
    raise TypeError(f"expected {what} as text or whole numbers, got {item!r}")


def _distinct(values: Any, what: str, count: int) -> tuple[list[Any], NDArray[np.intp]]:
    """The distinct ones of (N,) hashable values, sorted where that is possible, and (N,) places among them.

    A `ValueError` for another shape, or for what is missing.
    """
    values = values.tolist() if isinstance(values, np.ma.MaskedArray) else values  # None where it is masked
    if isinstance(values, Tensor):
        array = _to_numpy(values, what)
    elif isinstance(values, list | tuple):
        items = _items(values)
        if len(set(map(type, items))) == 1 and isinstance(items[0], str | int | float):
            array = np.asarray(items)
        else:  # NumPy would make text of numbers beside text, and columns of tuples
            array = np.empty(len(items), dtype=object)
            for place, item in enumerate(items):
                array[place] = item
    else:
        array = np.asarray(values)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if array.shape != (count,):
        hint = {2: "; for one-hot rows take their argmax, for one column its ravel()"}.get(array.ndim, "")
        came = f"{tuple(array.shape)} {array.dtype}" if array.ndim else type(values).__name__
        raise ValueError(f"expected {what} of shape ({count},) as there are frames, got {came}{hint}")
    if array.dtype.kind in "biufSUMm":
        native = array.astype(array.dtype.newbyteorder("="))
        found, places = np.unique(native, return_inverse=True, equal_nan=False)
        distinct = found.tolist() if array.dtype.kind not in "Mm" else list(found)
    else:
        try:
            table: dict[Any, int] = {}
            places = np.array([table.setdefault(item, len(table)) for item in _items(array)], dtype=np.intp)
        except TypeError as error:
            raise ValueError(f"expected {what} of which each is one value per frame, got: {error}") from error
        distinct, order = list(table), list(range(len(table)))
        with suppress(TypeError):
            order.sort(key=distinct.__getitem__)
        distinct, places = [distinct[place] for place in order], np.argsort(order)[places]
    for place, item in enumerate(distinct):
        if missing(item):
            frame = int((places == place).argmax())
            raise ValueError(f"expected {what} of every frame, got {item} at frame {frame}; leave those frames out")
    return distinct, places.reshape(count)


def class_indices(labels: Any, classes: Any | None, count: int, *, frames: int) -> Tensor:
    """(N,) int64 class indices of labels that are names of classes, or indices already: membership decides.

    Args:
        labels: (N,) text, bytes, whole numbers or booleans, in a tensor, array, list or (categorical) Series.
        classes: the names, in order; None where they are unknown, and labels can only be indices.
        count: number of classes, C.
        frames: number of labels expected, N.

    Raises:
        ValueError: another shape, a missing label, one that is no class, or labels that can be read in two ways.

    Example:
        >>> class_indices(["7", "3"], ["3", "5", "7"], 3, frames=2)
        tensor([2, 0])
    """
    found, places = _distinct(labels, "labels", frames)
    names = class_names(classes) if classes is not None else tuple(map(str, range(count)))
    table = {name: index for index, name in enumerate(names)}
    text = any(isinstance(item, str | bytes) for item in found)
    if text and classes is None:
        wanted = "class indices, or classes= (--classes) that names the columns in order"
        msg = f"expected {wanted}, got labels {listed(found)} as text"
        raise ValueError(msg)
    if text:
        return _placed(_by_name(found, table), places)
    if strange := [item for item in found if not isinstance(item, bool | int | float)]:
        raise ValueError(f"expected labels as names or indices of classes, got {listed(strange)}")
    raw = [] if classes is None else _items(classes)
    numeric = bool(raw) and not any(isinstance(name, str | bytes) for name in raw)
    if numeric:
        equal = {name: index for index, name in enumerate(raw)}
        by_name = [equal.get(item) for item in found]
    else:
        by_name = [table.get(str(item), table.get(_text(item, "labels"))) for item in found]
    named = None if classes is None or None in by_name else by_name
    counted = not numeric and (names == tuple(map(str, range(count))) or not any(isinstance(i, bool) for i in found))
    whole = counted and all(float(item).is_integer() and 0 <= item < count for item in found)
    indexed = [int(item) for item in found] if whole else None
    if named is not None and indexed is not None and named != indexed:
        msg = f"expected labels that are either names or indices of the classes {listed(names)}, got {listed(found)}"
        raise ValueError(f"{msg}, which can be both; give names as text, [str(y) for y in labels]")
    chosen = named if named is not None else indexed
    if chosen is not None:
        return _placed(chosen, places)
    if numeric:
        unknown = [item for item, index in zip(found, by_name, strict=True) if index is None]
        msg = f"expected labels among the classes {listed(raw)}, got {listed(unknown)}; indices need classes as text"
    elif any(isinstance(item, bool) for item in found):
        msg = f"expected labels among the classes {listed(names)}, got True and False; give names, or 0 and 1"
    elif not all(float(item).is_integer() for item in found):
        msg = f"expected labels as whole numbers, got {listed([i for i in found if not float(i).is_integer()])}"
    else:
        msg = f"expected labels from 0 to {count - 1}, got {int(found[0])} to {int(found[-1])}"
        msg += "" if classes is None else f", or names among the classes {listed(names)}"
    raise ValueError(msg)


def _by_name(found: Sequence[Any], table: Mapping[str, int]) -> list[int]:
    """Positions of names, some of them as bytes."""
    if other := [item for item in found if not isinstance(item, str | bytes)]:
        msg = f"expected labels of one type, got {listed(other)} beside text"
        raise ValueError(msg)
    keys = [item.decode(errors="replace") if isinstance(item, bytes) else item for item in found]
    if unknown := [key for key in keys if key not in table]:
        digits = all(key.lstrip("-").isdigit() for key in keys)
        hint = "; if they are indices, convert them to integers" if digits else ""
        raise ValueError(f"expected labels among the classes {listed([*table])}, got {listed(unknown)}{hint}")
    return [table[key] for key in keys]


def _placed(indices: Sequence[Any], places: NDArray[np.intp]) -> Tensor:
    return torch.from_numpy(np.asarray(indices, dtype=np.int64)[places])


def listed(values: Sequence[Any]) -> str:
    """A list of names for an error, cut after five."""
    shown = [*map(repr, values[:_SHOWN])] + ["..."] * (len(values) > _SHOWN)
    return f"[{', '.join(shown)}]"


def group_indices(groups: Any, frames: int) -> Tensor:
    """(N,) int64, one number per group: integers as they are, anything else hashable counted from 0 in sorted order.

    A `ValueError` for another shape, or where the group of a frame is missing.
    """
    found, places = _distinct(groups, "groups", frames)
    whole = all(isinstance(item, int) and not isinstance(item, bool) and -(2**63) <= item < 2**63 for item in found)
    return _placed(found if whole else range(len(found)), places)


def indices(values: Any, what: str, frames: int, *, below: int | None = None) -> Tensor:
    """(N,) int64 on the CPU, from an array or tensor of N = `frames` integers of any type, from 0 to `below` - 1.

    Raises:
        ValueError: another shape or type, or a value out of range.
    """
    tensor = numbers(values, what).detach().cpu()
    if tensor.shape != (frames,) or (frames and tensor.is_floating_point()):
        came = f"{tuple(tensor.shape)} {tensor.dtype}"
        msg = f"expected {what} of shape ({frames},) and an integer type, got {came}"
        raise ValueError(msg)
    tensor = tensor.long().contiguous()  # first, because torch has no minimum of small unsigned types
    if below is not None and frames and not 0 <= int(tensor.min()) <= int(tensor.max()) < below:
        msg = f"expected {what} from 0 to {below - 1}, got {int(tensor.min())} to {int(tensor.max())}"
        raise ValueError(msg)
    return tensor


# Tables: columns with names, rows with an index


@dataclass(frozen=True)
class _Names:
    """The names of a table's columns or rows; `counted` ones are the default 0, 1, ..., which may mean nothing."""

    names: list[Any]
    counted: bool


class Aligned:
    """Arrays and tables of several members, with columns in one order of classes and rows in one order.

    Args:
        given: member -> (N, C) numbers. The columns of a table that have names are put in the order of `classes`; its
            rows, where they have an index, in that of the first table.
        classes: names in order; None takes those of the first table that has names.

    Raises:
        ValueError: columns that are not the classes, indices of other rows, or an order that cannot be known: of an
            array beside tables in different orders, of columns or rows that are only counted beside others.

    Attributes:
        arrays: member -> (N, C) numbers as they came, in that order.
        classes: as given, or the names of columns; None where there are none.
    """

    def __init__(self, given: Mapping[str, Any], classes: Any | None = None) -> None:
        tables = {name: _parts(values) for name, values in given.items()}
        classes = None if classes is None else _ordered(classes)
        whose = next((name for name, (_, _, index) in tables.items() if index is not None), None)
        self._index = None if whose is None else tables[whose][2]
        self._whose, self._reordered = f"member {whose!r}", False
        named = [columns.names for _, columns, _ in tables.values() if columns and not columns.counted]
        self.classes = named[0] if classes is None and named else classes
        bare = [name for name, (_, columns, _) in tables.items() if columns is None or columns.counted]
        if classes is None and named and bare and (any(names != named[0] for names in named) or _permuted(named[0])):
            msg = f"expected columns with names, as in {listed(named[0])}, also from {listed(bare)}, got none"
            raise ValueError(f"{msg}; give classes= in the order of their columns")
        self.arrays = {}
        for name, (values, columns, index) in tables.items():
            order = None if columns is None else self._columns(columns, name)
            rows = None if index is None else self._rows(index, f"member {name!r}")
            array = values if order is None else np.asarray(values)[:, order]
            self.arrays[name] = array if rows is None else np.asarray(array)[rows]
            self._reordered |= rows is not None
        if self._reordered and (bare := [name for name, (_, _, index) in tables.items() if index is None]):
            msg = f"expected tables with their rows in one order beside arrays without an index, {listed(bare)}"
            raise ValueError(f"{msg}; give these as tables too")

    def _columns(self, found: _Names, name: str) -> list[int] | None:
        """Positions of the classes among the columns of a table; None where they are in order."""
        if self.classes is None:
            return None
        wanted, names = class_names(self.classes), class_names(found.names, what="columns")
        if found.counted:
            if names != wanted and set(names) == set(wanted):
                msg = f"expected columns named as the classes {listed(wanted)} from member {name!r}, got them counted"
                raise ValueError(f"{msg} from 0, which can be names or not; name the columns")
            return None
        if names == wanted:
            return None
        extra, lost = [c for c in names if c not in wanted], [c for c in wanted if c not in names]
        if extra or lost or len(set(names)) < len(names):
            twice = [c for c in dict.fromkeys(names) if names.count(c) > 1]
            kinds = (("without", lost), ("with the further columns", extra), ("twice", twice))
            came = "; ".join(f"{words} {listed(some)}" for words, some in kinds if some)
            msg = f"expected columns named as the classes {listed(wanted)} from member {name!r}, got them {came}"
            raise ValueError(f"{msg}; select and rename the columns of classes")
        return [names.index(c) for c in wanted]

    def _rows(self, index: _Names, whose: str) -> list[int] | None:
        """Positions of the rows of the first table in another's; None where they are in order."""
        first = self._index
        if first is None or index.names == first.names:
            return None
        places = {row: place for place, row in enumerate(index.names)}
        known = set(first.names)
        if known != set(places) or not len(places) == len(index.names) == len(first.names):
            extra, lost = [row for row in places if row not in known], [row for row in known if row not in places]
            came = f"{listed(extra)} only in {whose} and {listed(lost)} only in {self._whose}"
            came = came if extra or lost else "some more than once, in another order"
            msg = f"expected the rows of {whose} to have the index of {self._whose}, got {came}"
            raise ValueError(f"{msg}; where the rows are in one order, reset_index(drop=True) on both")
        if index.counted or first.counted:
            msg = f"expected the index of {self._whose} in {whose}, got one that counts rows and one in another order"
            way_out = "reset_index(drop=True) on both where their rows are in one order, otherwise set_index"
            raise ValueError(f"{msg}; {way_out}")
        return [places[row] for row in first.names]

    def by_row(self, values: Any, what: str) -> Any:
        """Labels or groups in the order of the rows: by their own index where both have one."""
        index = _index_of(values)
        if index is None and self._reordered:
            msg = f"expected {what} with an index beside tables whose rows are in different orders, got none"
            raise ValueError(f"{msg}; give a Series with the index of the tables")
        rows = None if index is None else self._rows(index, what)
        return values if rows is None else np.asarray(values)[rows]


def _permuted(names: Sequence[Any]) -> bool:
    """Whether names are numbers counted from 0 in another order, so that counted columns might be meant."""
    counted = [*map(str, range(len(names)))]
    found = [*map(str, names)]
    return found != counted and sorted(found) == sorted(counted)


def _parts(values: Any) -> tuple[Any, _Names | None, _Names | None]:
    """A table's numbers, the names of its columns and its index; the last two are None for an array."""
    if isinstance(values, np.ndarray) and values.dtype.names:  # a structured array
        names = values.dtype.names
        return np.stack([values[name] for name in names], axis=-1), _Names([*names], counted=False), None
    columns = None if isinstance(values, Tensor | np.ndarray) else getattr(values, "columns", None)
    if columns is None:
        return values, None, _index_of(values)
    return values, _names(getattr(values, "column_names", columns)), _index_of(values)


def _index_of(values: Any) -> _Names | None:
    """The index of a table or Series; None where it has none."""
    index = None if isinstance(values, Tensor | np.ndarray) else getattr(values, "index", None)
    return None if index is None or callable(index) else _names(index)


def _names(axis: Any) -> _Names:
    names = list(axis)
    return _Names(names, type(axis).__name__ == "RangeIndex" and names == list(range(len(names))))
