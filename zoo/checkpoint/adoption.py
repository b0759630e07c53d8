"""Checkpoints that were saved elsewhere: the tensors that their files hold, and the architecture that made them.

In comes a file that `torch.save` or safetensors wrote. Out come tensors by name (`read_foreign`), and, where they are a
chain of Linear and BatchNorm layers, the layers in the order of computation (`chain_of`), from which a built-in
architecture gives the same answers (`Chain.checkpoint`). Other tensors need the class that they were saved from
(`checkpoint_by_name`). No code in a file is ever run: what is no tensor, number, text or container of these is replaced
while it is read by a stand-in that does nothing.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from zoo.checkpoint import Checkpoint, tensors_of
from zoo.checkpoint.header import CheckpointError, bytes_of, read_header
from zoo.checkpoint.match import adapted, check_fit, prefix_of, prefixes, template
from zoo.models.blocks import Bottleneck
from zoo.models.spec import Spec, build

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
READ_OFF = ("mlp", "basic", "bottleneck")  # architectures that the shapes of tensors can tell
PLACES = ("before", "after")  # where BatchNorm can stand, seen from the activation

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MADE = re.compile(rb"_rebuild_\w+").findall
_DENSE = {b"_rebuild_tensor", b"_rebuild_tensor_v2", b"_rebuild_tensor_v3", b"_rebuild_parameter"}
_DENSE |= {b"_rebuild_parameter_with_state", b"_rebuild_meta_tensor_no_storage"}
_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch's files began before they were archives
_STATES = ("", "model", "net", "network", "module", "student", "classifier", "weights", "params", "parameters")
_OF_A_STATE = re.compile(r"_?(state_?dict|state|weights|params)$")
_OF_AN_AVERAGE = re.compile(r"(^|_)(ema|swa|shadow|averaged?)(_|$)")
_MOST_LEAVES, _MOST_LEVELS = 200_000, 60
_MOST_SHARED = 16  # times the size of the file that its tensors may have together: tied weights are stored once
_MOST_LAYERS = 1000
_MOST_STEPS = 20_000  # of the search for the order of the layers
_EPS = nn.BatchNorm1d(1).eps  # no file tells it
_CONTAINERS = {"dict": dict, "list": list, "deque": list}  # endings of the names of classes -> what takes their place
_STATISTICS = {"running_mean", "running_var"}
_OF_A_NORM = {*_STATISTICS, "weight", "bias", "num_batches_tracked"}
_OTHERS = {  # what the names of a layer's tensors contain -> the kind of layer
    r"parametrizations\.|_(g|v|orig|mask)\b": "of a weight that a hook makes (weight_norm, ...); remove the hook",
    r"_[ih]h_l\d": "of a recurrent layer",
    r"in_proj_weight": "of attention",
}
_BESIDE = re.compile(
    r"n_averaged|(.*\.)?total_(ops|params)|(\w*_)?(epoch|step|steps|loss|acc|accuracy|best|lr)"
)  # numbers beside the tensors
_ACCURACY = re.compile(r"(?:^|[^a-z])(?:acc|accuracy)(?:$|[^a-z])")
_HELD_OUT = re.compile(r"val|dev|best|eval|held")


# ---- what a file holds


@dataclass(frozen=True)
class Foreign:
    """The tensors of a model in a file that was written elsewhere.

    Args:
        tensors: name -> tensor as it was saved, in the order of the file.
        ordered: whether that is the order in which the layers were made; files of safetensors are sorted by name.
        key: where in the file they stand, such as "state_dict"; "" at the top.
        left: names of what stands beside them, such as "optimizer", with the type of what was not read.
        accuracy: what the file says of the model's accuracy, as a fraction, and under which name; None if nothing.
    """

    tensors: Mapping[str, Tensor]
    ordered: bool = True
    key: str = ""
    left: tuple[str, ...] = ()
    accuracy: tuple[str, float] | None = None

    @property
    def prefix(self) -> str:
        """What all names of tensors with two axes begin with, such as "module.model."; "" if nothing."""
        names = [name.split(".")[:-1] for name, tensor in self.tensors.items() if tensor.ndim > 1]
        common = _common(names if len(names) > 1 else [names[0][:-1]])  # the last part is a layer itself
        return "".join(f"{part}." for part in common)

    @property
    def converted(self) -> tuple[str, ...]:
        """Types of floating-point numbers that become float32, such as "float16"; float64 is rounded."""
        kinds = {tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point()} - {torch.float32}
        return tuple(sorted(str(kind).removeprefix("torch.") for kind in kinds))


class _StandIn:
    """Takes the place of an object whose class or function is not run; it remembers what it was made with."""

    kind = ""
    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any) -> _StandIn:
        one = super().__new__(cls)
        one.arguments = arguments
        return one

    def __setstate__(self, state: Any) -> None:
        """Nothing is restored."""


class _Plain:
    """Takes the place of a subclass of dict, list or deque: a dict or a list is made instead."""

    made: type = dict

    def __new__(cls, *_: Any) -> Any:  # on purpose no instance of this class
        return cls.made()


def read_foreign(path: Path | str, *, key: str | None = None) -> Foreign:
    """The tensors of the model in a file that torch or safetensors wrote; no code in it is run.

    Args:
        path: the file; its content decides how it is read, not its suffix.
        key: where in the file the tensors stand, with dots between the levels, such as "ema.module"; by default where
            people save them: at the top, or under a name such as "state_dict", "model_state_dict" or "model".

    Raises:
        CheckpointError: NOT_A_FILE, UNREADABLE, or a reason of `read_header`; METADATA for a checkpoint of this
            project; PICKLE where code would have to run, DAMAGED where torch cannot read it; CONTENT where it holds
            no tensors of a model, or those of several and no `key`; DTYPE, SIZE where they are not plain tensors.
    """
    path = Path(path)
    data = bytes_of(path)
    plain = data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8
    if not plain and (re.match(rb"PK|\x80[\x02-\x05]", data) or data[257:262] == b"ustar"):
        return _found(_unpacked(data, str(path)), str(path), key, len(data))
    header = read_header(data)
    if "zoo" in header.metadata:
        _refuse("METADATA", "it is a checkpoint of this project: register it with `zoo register NAME FILE`")
    return replace(_found(tensors_of(data, header), str(path), key, len(data)), ordered=False)


def _unpacked(data: bytearray, name: str) -> Any:
    """What `torch.save` wrote: the one place where a torch file is read."""
    file, sizes = io.BytesIO(data), None
    stand_ins: list[Any] = []
    try:
        if data.startswith(b"PK"):
            sizes = _sizes(file, name)
            file.seek(0)
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            stand_ins = [(_stand_in(kind), kind) for kind in unknown]
            file.seek(0)
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True)
        return _within(found, sizes)
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError("DAMAGED", f"the file is truncated or damaged ({error}); copy it again") from error
    except Exception as error:  # torch raises anything from KeyError to UnicodeDecodeError
        said = str(error)
        if data.startswith(b"\x80") and not data.startswith(_MAGIC):
            _refuse("PICKLE", f"it is a pickle, which only code can read; {_conversion(name, 'pickle')}")
        if "weights_only" in said or "Weights only" in said:
            _refuse("PICKLE", f"reading it would run code that it holds; {_conversion(name)}")
        said = next((line for line in said.splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError("DAMAGED", f"torch cannot read it, is it damaged? {said[:200]}") from error


def _sizes(file: io.BytesIO, name: str) -> Counter[int]:
    """The sizes of the records in an archive, each as often as it occurs.

    Refused are a program, an archive that holds more than the file is long (`torch.save` compresses nothing), and
    tensors of other layouts, since reading those reads their numbers before anything of them is checked.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            _refuse("PICKLE", f"it is a TorchScript program, not tensors; {_conversion(name, 'torch.jit')}")
        if (stored := sum(entry.file_size for entry in entries)) > file.getbuffer().nbytes:
            msg = f"expected at most {file.getbuffer().nbytes:,} bytes in the archive, as torch.save stores them"
            _refuse("DAMAGED", f"{msg}, got {stored:,}")
        made = {
            text for entry in entries if entry.filename.endswith("/data.pkl") for text in _MADE(archive.read(entry))
        }
    if other := sorted(text.decode() for text in made - _DENSE):
        _refuse(
            "DTYPE", f"expected dense tensors, got some made by {', '.join(other)} (sparse, quantised, nested, ...)"
        )
    return Counter(entry.file_size for entry in entries)


def _within(found: Any, sizes: Counter[int] | None) -> Any:
    """What was read, once it is sure that every number of it is in the file: torch before 2.11 does not look."""
    tensors = [leaf for _, leaf in _leaves(found) if isinstance(leaf, Tensor) and not leaf.is_meta]
    storages = {storage.data_ptr(): storage.nbytes() for tensor in tensors for storage in [tensor.untyped_storage()]}
    if sizes is not None and Counter(size for size in storages.values() if size) - sizes:
        _refuse("DAMAGED", "expected tensors of the sizes of the records in the archive, got larger ones")
    return found


def _stand_in(kind: str) -> type:
    """The class that takes the place of the class or function `kind`; of a kind of container, the plain one."""
    ends = {ending: made for ending, made in _CONTAINERS.items() if kind.lower().endswith(ending)}
    parent, made = (_Plain, *ends.values()) if ends else (_StandIn, None)
    return type(kind.rpartition(".")[2], (parent,), {"kind": kind, "made": made})


def _conversion(name: str, loader: str = "torch", key: str = "") -> str:
    """The two lines that make a file of tensors out of one that only code can read."""
    stem = name.rpartition(".")[0] or name
    file = f"open({name!r}, 'rb')" if loader == "pickle" else repr(name)
    safe = ", weights_only=False" if loader == "torch" else ""
    inside = "".join(f"[{part!r}]" for part in key.split(".") if part)
    return (
        "if you trust the file and have the code of its class, these two lines convert it:\n"
        f"    import torch; from {loader} import load\n"
        f"    torch.save(load({file}{safe}){inside}.state_dict(), {stem + '-tensors.pth'!r})"
    )


# ---- the tensors inside what people save

_Path = tuple[str, ...]
_Leaf = tuple[_Path, Any]


def _found(data: Any, file: str, key: str | None, size: int) -> Foreign:
    """The tensors of a model in nested data, which came from a file of this name and size."""
    leaves = _leaves(data)
    branches = {path[:level] for path, _ in leaves for level in range(len(path))}
    ends = branches.union(path for path, _ in leaves)
    optimisers = {at for at in branches if {(*at, "state"), (*at, "param_groups")} <= ends}
    of_model = [leaf for leaf in leaves if not any(leaf[0][:level] in optimisers for level in range(len(leaf[0])))]
    if not any(_is_weight(leaf) for _, leaf in of_model):
        _refuse_empty(leaves, file)
    at, parents = _chosen(of_model) if key is None else _under(of_model, key)
    inside = f"{at}." if at else ""
    tensors: dict[str, Tensor] = {}
    left: dict[str, None] = {}
    others = []
    for path, leaf in leaves:
        name, here = ".".join(path), path[:-1] in parents and ".".join(path).startswith(inside)
        inner = name.removeprefix(inside)
        if here and isinstance(leaf, Tensor) and not _BESIDE.fullmatch(inner):
            if inner in tensors:
                _refuse("CONTENT", f"expected one tensor of each name, got two of {name!r}")
            tensors[inner] = leaf
            continue
        if here and ("." in path[-1] or path[-1] == "_extra_state"):
            msg = f"expected tensors alone in the state of a model, got {_kind(leaf)} as {path[-1]!r}"
            _refuse("CONTENT", f"{msg}; no entry can be left out without changing the answers")
        others.append((path, leaf))
        beside = _branch(name, at)
        unread = isinstance(leaf, _StandIn) and beside == name and math.isnan(_number(leaf))
        left[beside + (f" ({leaf.kind})" if unread else "")] = None
    total = sum(_checked(name, tensor) for name, tensor in tensors.items())
    if total > _MOST_SHARED * size + 2**20:
        _refuse("CONTENT", f"expected tensors of about the file's {size:,} bytes, got {total:,} bytes")
    return Foreign(tensors, True, at, tuple(left), _claimed(others))


def _leaves(data: Any) -> list[_Leaf]:
    """All values in nested dictionaries and lists, with the names and numbers that lead there, in their order."""
    found: list[_Leaf] = []
    stack: list[_Leaf] = [((), data)]
    count = 0
    while stack:
        path, node = stack.pop()
        count += 1
        if count > _MOST_LEAVES or len(path) > _MOST_LEVELS:  # a dictionary may hold itself
            _refuse("CONTENT", f"expected at most {_MOST_LEAVES:,} values in {_MOST_LEVELS} levels, got more")
        if isinstance(node, Mapping | list | tuple) and len(node):
            pairs = [*(node.items() if isinstance(node, Mapping) else enumerate(node))]
            stack += [((*path, str(name)), child) for name, child in reversed(pairs)]
        else:
            found.append((path, node))
    return found


def _chosen(leaves: Sequence[_Leaf]) -> tuple[str, set[_Path]]:
    """The key under which the tensors of the model stand, and the dictionaries there that hold them."""
    shapes: dict[_Path, list[tuple[int, ...]]] = {}  # of the weights anywhere under each branch
    for path, leaf in leaves:
        for level in range(len(path) if _is_weight(leaf) else 0):
            shapes.setdefault(path[:level], []).append(tuple(leaf.shape))
    parents = {path[:-1] for path, leaf in leaves if _is_weight(leaf)}
    at: _Path = ()
    while True:
        children = [path for path in shapes if path[:-1] == at and path != at]
        usual = sorted((_STATES.index(_usual(path)), path) for path in children if _usual(path) in _STATES)
        copies = len({tuple(shapes[path]) for path in children}) == 1
        live = [path for path in children if not _OF_AN_AVERAGE.search(path[-1].lower())]
        if usual and copies:
            at = usual[0][1]
        elif at in parents:
            return ".".join(at), {at}
        elif len(children) == 1 or (copies and len(live) == 1):
            at = (live or children)[0]
        elif usual or (copies and len(shapes[children[0]]) > 1):
            keys = ", ".join(repr(".".join(path)) for path in children)
            _refuse(
                "CONTENT", f"expected the tensors of one model, got those of several; choose one by its key: {keys}"
            )
        else:
            parts = {path[:-1] for path, leaf in leaves if isinstance(leaf, Tensor) and path[: len(at)] == at}
            return ".".join(at), parts - {at}


def _under(leaves: Sequence[_Leaf], key: str) -> tuple[str, set[_Path]]:
    """The key, and the dictionaries that hold weights under it; a key may also be the first part of names."""
    key = key.strip(".")
    inside = f"{key}." if key else ""
    parents = {path[:-1] for path, leaf in leaves if _is_weight(leaf) and ".".join(path).startswith(inside)}
    if not parents:
        known = sorted({_branch(".".join(path), key) for path, leaf in leaves if _is_weight(leaf)})
        _refuse("CONTENT", f"expected a key under which the file has weights, got {key!r}; try one of {known[:20]}")
    return key, parents


def _usual(path: _Path) -> str:
    """The last name on a path, without what says that a state is meant."""
    return _OF_A_STATE.sub("", path[-1].lower()).strip("_")


def _branch(name: str, at: str) -> str:
    """The beginning of a name, up to the first part that differs from those of `at`."""
    parts, others = name.split("."), at.split(".") if at else []
    common = next((i for i, (a, b) in enumerate(zip(parts, others, strict=False)) if a != b), len(others))
    return ".".join(parts[: common + 1])


def _refuse_empty(leaves: Sequence[_Leaf], file: str) -> NoReturn:
    """Refuse a file without weights: it holds a whole module, or something else."""
    objects = [(path, leaf) for path, leaf in leaves if isinstance(leaf, _StandIn) and "numpy" not in leaf.kind]
    modules = [(path, leaf) for path, leaf in objects if not path or _usual(path) in _STATES] or objects
    if modules:
        path, leaf = modules[0]
        msg = f"it holds a whole module ({leaf.kind}), which only its code can read"
        _refuse("PICKLE", f"{msg}; {_conversion(file, key='.'.join(path))}")
    held = [*dict.fromkeys(path[0] if path else _kind(leaf) for path, leaf in leaves)]
    _refuse("CONTENT", f"expected the weights of a model, got none among {', '.join(held[:20]) or 'nothing'}")


def _kind(leaf: Any) -> str:
    return leaf.kind if isinstance(leaf, _StandIn) else type(leaf).__name__


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 1


def _common(names: Sequence[Sequence[str]]) -> list[str]:
    """The parts with which all of these names begin."""
    return [parts[0] for parts in takewhile(lambda parts: len({*parts}) == 1, zip(*names, strict=False))]


def _checked(name: str, tensor: Tensor) -> int:
    """The bytes of a plain tensor whose every number is in the file; any other is refused."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        what = "quantised" if tensor.is_quantized else "sparse" if tensor.layout is not torch.strided else "of its own"
        _refuse("DTYPE", f"expected plain tensors, got {name!r}, whose type is {what}; save {name!r} as dense floats")
    if tensor.is_meta or tensor.is_complex():
        what = "has no values (it was saved on the meta device)" if tensor.is_meta else f"is of {tensor.dtype}"
        _refuse("DTYPE", f"expected tensors of real numbers, got {name!r}, which {what}")
    size = tensor.numel() * tensor.element_size()
    if size > tensor.untyped_storage().nbytes():
        _refuse("SIZE", f"expected tensors whose numbers are all in the file, got {name!r}, which repeats some of them")
    return size


def _claimed(leaves: Sequence[_Leaf]) -> tuple[str, float] | None:
    """The accuracy that a file states, as a fraction, with its name: of held-out data before any other."""
    stated: list[tuple[int, int, str, float]] = []
    values = dict(leaves)
    for path, leaf in leaves:
        if path and path[-1] in ("current_score", "best_model_score"):  # of Lightning's callback ModelCheckpoint
            path = (*path[:-1], str(values.get((*path[:-1], "monitor"), "")))
        name, value = path[-1].lower() if path else "", _number(leaf)
        if _ACCURACY.search(name) and "train" not in name and 0 < value <= 100:
            rank = 0 if _HELD_OUT.search(name) else 1
            stated.append((rank, len(stated), path[-1], value / 100 if value > 1 else value))
    return min(stated)[2:] if stated else None


def _number(leaf: Any) -> float:
    """A number as it stands, in a tensor or in NumPy's type; NaN for anything else."""
    if isinstance(leaf, int | float) and not isinstance(leaf, bool):
        return float(leaf)
    if isinstance(leaf, Tensor) and leaf.numel() == 1 and leaf.dtype in _FLOATS:
        return float(leaf)
    if isinstance(leaf, _StandIn) and leaf.kind.endswith("multiarray.scalar") and len(leaf.arguments) == 2:
        kind, raw = leaf.arguments
        code = kind.arguments[0] if isinstance(kind, _StandIn) and kind.arguments else ""
        if code in ("f4", "f8") and isinstance(raw, bytes) and len(raw) == int(code[1]):
            return float(torch.frombuffer(bytearray(raw), dtype=torch.float32 if code == "f4" else torch.float64))
    return math.nan


# ---- the architecture behind the tensors


@dataclass(frozen=True, eq=False)
class Linear:
    """A Linear layer of a file: weight (outputs, inputs) float32, and bias (outputs,) or None."""

    name: str
    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs."""
        return self.weight.shape[1], self.weight.shape[0]


@dataclass(frozen=True, eq=False)
class Norm:
    """A BatchNorm of a file, its tensors (units,) float32 by their names in torch's class; weight 1, bias 0 if none."""

    name: str
    tensors: Mapping[str, Tensor]

    @property
    def units(self) -> int:
        """Number of units that it normalises."""
        return len(self.tensors["running_mean"])

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (units,) float64 of what it computes in evaluation."""
        mean, variance, weight, bias = (
            self.tensors[name].double() for name in ("running_mean", "running_var", "weight", "bias")
        )
        scale = weight / (variance + _EPS).sqrt()
        return scale, bias - mean * scale


@dataclass(frozen=True, eq=False)
class Chain:
    """A file's layers in the order of computation, and what their shapes say of the architecture.

    Args:
        linears: the Linear layers; of `bottleneck`, the projection of the first block stands after its third layer.
        norms: position of a Linear -> the BatchNorm that follows it; -1 is the one in front of the first.
        place: where BatchNorm stands, a name in `PLACES`; "" where neither shapes nor names tell.
        architectures: the built-in ones that these tensors can be of; the first is the plain one.
        asks_architecture: whether it must be told which, because neither shapes nor names tell residual blocks from a
            plain chain.
    """

    linears: tuple[Linear, ...]
    norms: Mapping[int, Norm]
    place: str
    architectures: tuple[str, ...]
    asks_architecture: bool = False

    @property
    def inputs(self) -> int:
        """Length of a window."""
        return self.linears[0].shape[0]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.linears[-1].shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs of the hidden layers."""
        return tuple(linear.shape[1] for linear in self.linears[:-1])

    @property
    def asks_place(self) -> bool:
        """Whether it must be told where BatchNorm stands."""
        return not self.place and any(0 <= position < len(self.widths) for position in self.norms)

    def checkpoint(
        self,
        classes: Sequence[str],
        *,
        activation: str,
        features: int,
        normalisation: str,
        padding: str = "recording",
        place: str = "",
        architecture: str = "",
        note: str = "",
    ) -> Checkpoint:
        """A checkpoint of a built-in architecture that answers as the file's model does in evaluation.

        The bias of a Linear in front of BatchNorm goes into the running mean. Where the built-in architecture cannot
        have BatchNorm at the same places, all of it is folded into the Linears. Both are exact up to rounding, for
        BatchNorm with torch's default `eps`.

        Args:
            classes: names of the classes, in the order of the logits.
            activation: a name in `zoo.models.ACTIVATIONS`, of all hidden layers.
            features: features per frame; the context follows from the inputs.
            normalisation: as in `Spec`.
            padding: as in `Spec`.
            place: a name in `PLACES`, where `asks_place`.
            architecture: one of `architectures`; by default the first.
            note: as in `Checkpoint`.

        Raises:
            ValueError: a name or a size that does not fit the tensors.
            CheckpointError: weights that are not finite, or class names that do not fit.
        """
        if (self.place and place not in ("", self.place)) or (self.asks_place and place not in PLACES):
            expected = self.place or " or ".join(PLACES)
            msg = f"expected {expected} as the place of BatchNorm, seen from the activation, got {place!r}"
            raise ValueError(msg)
        name = architecture or self.architectures[0]
        if name not in self.architectures or (self.asks_architecture and not architecture):
            msg = f"expected {' or '.join(self.architectures)} for tensors of these shapes, got {architecture!r}"
            raise ValueError(msg)
        after = (self.place or place) == "after"
        if after and name != "mlp":
            msg = f"expected BatchNorm before the activation in residual blocks ({name}), got {place!r}"
            raise ValueError(msg)
        context, rest = divmod(self.inputs // features - 1, 2)
        if self.inputs % features or rest:
            near = [n for n in range(1, self.inputs + 1) if self.inputs % n == 0 and self.inputs // n % 2][:12]
            msg = f"expected features that divide the {self.inputs} inputs an odd number of times"
            raise ValueError(f"{msg} (such as {', '.join(map(str, near))}), got {features}")
        weights, biases, norms = self._folded(after=after)
        options = {"activation": activation, "batchnorm": bool(norms)}
        options |= {"widths": self.widths} if name == "mlp" else {"width": self.widths[0], "depth": self._blocks(name)}
        spec = Spec(name, features, context, len(classes), normalisation, padding, options)
        if len(classes) != self.classes:
            msg = f"expected names for the {self.classes} classes of the last layer, got {len(classes)}"
            raise CheckpointError("CLASSES", msg)
        tensors: dict[str, Tensor] = {}
        position = -1
        for path, layer in build(spec, device="meta").named_modules():
            if isinstance(layer, nn.Linear):
                position += 1
                tensors[f"{path}.weight"] = weights[position].float().contiguous()
                if layer.bias is not None:
                    tensors[f"{path}.bias"] = biases[position].float()
            elif isinstance(layer, nn.BatchNorm1d):
                own = norms[position].tensors
                mean = (own["running_mean"].double() - biases[position]).float()
                tensors |= {f"{path}.{key}": tensor.clone() for key, tensor in {**own, "running_mean": mean}.items()}
        return Checkpoint(spec, tensors, tuple(classes), kind="imported", note=note)

    def _blocks(self, name: str) -> int:
        """Number of residual blocks."""
        return (len(self.linears) - 2) // 2 if name == "basic" else (len(self.linears) - 3) // 3

    def _folded(self, *, after: bool) -> tuple[list[Tensor], list[Tensor], dict[int, Norm]]:
        """Weights and biases float64, with all BatchNorm folded in that the architecture cannot have; other norms."""
        weights = [linear.weight.double() for linear in self.linears]
        biases = [
            w.new_zeros(len(w)) if x.bias is None else x.bias.double()
            for w, x in zip(weights, self.linears, strict=True)
        ]
        last = len(self.linears) - 1
        complete = not after and all(position in self.norms for position in range(last))
        kept = {at: norm for at, norm in self.norms.items() if complete and 0 <= at < last}
        for at, norm in self.norms.items():
            if at not in kept:
                scale, shift = norm.affine()
                if at == -1 or (after and at < last):  # what comes out of it goes into the next Linear
                    biases[at + 1] = biases[at + 1] + weights[at + 1] @ shift
                    weights[at + 1] = weights[at + 1] * scale
                else:
                    weights[at], biases[at] = weights[at] * scale[:, None], biases[at] * scale + shift
        return weights, biases, kept


def chain_of(foreign: Foreign) -> Chain:
    """The layers of a file whose tensors are a chain of Linear and BatchNorm, however their attributes are named.

    Layers stand in the order in which they were made; where that does not fit, or a file is sorted by name, in the
    one order that their shapes allow.

    Raises:
        CheckpointError: MISFIT: some tensors are of other layers, or the layers fit together in no way or in several.
    """
    layers = [*_layers(foreign.tensors)]
    if not foreign.ordered:
        layers.sort(
            key=lambda layer: [(p.isdigit(), int(p) if p.isdigit() else p) for p in re.split(r"(\d+)", layer.name)]
        )
    linears = [layer for layer in layers if isinstance(layer, Linear)]
    norms = [layer for layer in layers if isinstance(layer, Norm)]
    if len(linears) < 2 or len(linears) > _MOST_LAYERS:
        _misfit(f"expected 2 to {_MOST_LAYERS} Linear layers, got {len(linears)}")
    if block := _bottleneck(linears):
        after = _norms_after(linears, norms, layers)
        return Chain(block, {block.index(linear): norm for linear, norm in after.items()}, "before", ("bottleneck",))
    ordered = _in_order(linears, known=foreign.ordered)
    paired = _paired(ordered, norms, layers if foreign.ordered or _are_numbered(layers) else None)
    inner = {linear.shape for linear in ordered[1:-1]}
    square = len(ordered) >= 4 and len(ordered) % 2 == 0 and inner == {(ordered[0].shape[1],) * 2}
    architectures = ("mlp", "basic") if square else ("mlp",)
    asks = square and not _in_one_sequential(ordered)
    return Chain(tuple(ordered), paired, _place_of_norms(ordered, paired), architectures, asks)


def _in_one_sequential(linears: Sequence[Linear]) -> bool:
    """Whether the names tell that nothing goes around a layer: numbers in one container, with activations between.

    An nn.ModuleList has numbers too, but holds the layers alone as a rule.
    """
    parents, numbers = zip(*(linear.name.rpartition(".")[::2] for linear in linears), strict=True)
    if len({*parents}) > 1 or not all(map(str.isdigit, numbers)):
        return False
    return all(int(b) - int(a) > 1 for a, b in pairwise(numbers))


def checkpoint_by_name(foreign: Foreign, spec: Spec, classes: Sequence[str], *, note: str = "") -> Checkpoint:
    """A checkpoint of any architecture, as it stands, whose tensors have the names and shapes that the file has.

    A prefix that all of them have in the file, or in the model, is not compared; tensors of the file beside those with
    the prefix are left out. Floating-point numbers take the model's type; a missing `num_batches_tracked` is zero.

    Raises:
        CheckpointError: MISFIT, with all differences; SPEC where the model cannot be built.
    """
    expected, found = template(spec), foreign.tensors
    if len(added := prefixes(found, expected)) == 1 and not prefixes(expected, found):
        found = {f"{added[0]}{name}": tensor for name, tensor in found.items()}
    prefix = prefix_of(expected, found)
    found = adapted(expected, {n: t for n, t in found.items() if n.startswith(prefix)}, prefix=prefix)
    kinds = {name: like.dtype for name, like in expected.items() if like.is_floating_point()}
    cast = {name: tensor.to(kinds[name]) for name, tensor in found.items() if name in kinds and tensor.dtype in _FLOATS}
    check_fit(expected, {**found, **cast})
    copies = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in {**found, **cast}.items()}
    return Checkpoint(spec, copies, tuple(classes), kind="imported", note=note)


def _layers(tensors: Mapping[str, Tensor]) -> Iterator[Linear | Norm]:
    """The layers whose tensors these are, in their order; MISFIT where one is neither Linear nor BatchNorm."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        grouped.setdefault(layer, {})[last] = tensor
    for layer, own in grouped.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        units = shapes.get("running_mean", shapes.get("weight", (0,)))[:1]
        fits = all(shape == units for name, shape in shapes.items() if name not in ("weight", "num_batches_tracked"))
        floats = all(tensor.dtype in _FLOATS for name, tensor in own.items() if name != "num_batches_tracked")
        if {"weight"} <= own.keys() <= {"weight", "bias"} and own["weight"].ndim == 2 and fits and floats:
            yield Linear(layer, own["weight"].detach().float(), own["bias"].detach().float() if "bias" in own else None)
        elif _STATISTICS <= own.keys() <= _OF_A_NORM and shapes.get("weight", units) == units and fits and floats:
            yield Norm(layer, _complete(own))
        elif not re.search(r"loss|criterion", layer.lower()):  # weights of classes, which answers do not depend on
            name, shape = next(iter(shapes.items()))
            names, axes = " ".join(full for full in tensors if full.startswith(layer)), len(shapes.get("weight", ()))
            what = next((kind for sign, kind in _OTHERS.items() if re.search(sign, names)), "of no layer that is known")
            if not floats:
                what = f"of {next(t.dtype for n, t in own.items() if t.dtype not in _FLOATS)}, not of floats"
            elif axes == 1:
                what = "of LayerNorm, of BatchNorm without statistics, or of PReLU"
            elif axes > 2:
                what = "of a convolution"
            _misfit(f"{f'{layer}.' * bool(layer)}{name} {shape} is {what}")


def _complete(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a BatchNorm, with those that torch leaves out where they change nothing."""
    mean = own["running_mean"].detach().float()
    counted = own.get("num_batches_tracked", torch.tensor(0)).reshape(()).long()
    given = {name: tensor.detach().float() for name, tensor in own.items() if name != "num_batches_tracked"}
    plain = {"weight": torch.ones_like(mean), "bias": torch.zeros_like(mean)}
    return {**plain, **given, "num_batches_tracked": counted}


def _in_order(linears: Sequence[Linear], *, known: bool) -> list[Linear]:
    """The layers in the order of computation: as they stand if that is known and fits, else as their shapes allow.

    Layers of one shape keep their order where it is known, and else layers whose names differ in numbers alone.
    """
    if known and all(a.shape[1] == b.shape[0] for a, b in pairwise(linears)):
        return [*linears]
    queues: dict[object, list[Linear]] = {}
    for linear in linears:
        queues.setdefault(linear.shape if known else re.sub(r"\d+", "#", linear.name), []).append(linear)
    orders = _orders([*queues.values()])
    if len(orders) != 1:
        listed = ", ".join(f"{linear.name} {linear.shape[0]} to {linear.shape[1]}" for linear in linears[:20])
        many = "in more than one way" if orders else "in no way"
        _misfit(f"the Linear layers fit together {many}: {listed}")
    return orders[0]


def _orders(queues: Sequence[Sequence[Linear]]) -> list[list[Linear]]:
    """The ways to take layers from the queues so that each fits the one before; no more than two are looked for."""
    found: list[list[Linear]] = []
    stack: list[tuple[list[Linear], tuple[int, ...]]] = [([], (0,) * len(queues))]
    for _ in range(_MOST_STEPS):
        if not stack or len(found) > 1:
            break
        chain, taken = stack.pop()
        rest = [(at, queue[taken[at]]) for at, queue in enumerate(queues) if taken[at] < len(queue)]
        if not rest:
            found.append(chain)
        for at, linear in rest:
            if not chain or chain[-1].shape[1] == linear.shape[0]:
                stack.append(([*chain, linear], (*taken[:at], taken[at] + 1, *taken[at + 1 :])))
    return found if not stack else [[], []]  # more than one, or too many to look at


def _bottleneck(linears: Sequence[Linear]) -> tuple[Linear, ...]:
    """The layers in the order of the architecture `bottleneck`, where their shapes are those of it; else none."""
    width, wide = linears[0].shape[1], Bottleneck.expansion * linears[0].shape[1]
    shapes = [linear.shape for linear in linears]
    later = [(wide, width), (width, width), (width, wide)] * (len(linears) // 3 - 2)
    first = [(width, width), (width, width), (width, wide)]
    if len(linears) < 6 or shapes[5:-1] != later or shapes[-1][0] != wide:
        return ()
    if shapes[1:5] == [*first, (width, wide)]:
        return tuple(linears)
    if shapes[1:5] == [(width, wide), *first]:  # the projection was made before the others
        return (linears[0], *linears[2:5], linears[1], *linears[5:])
    return ()


def _norms_after(
    linears: Sequence[Linear], norms: Sequence[Norm], layers: Sequence[Linear | Norm]
) -> dict[Linear, Norm]:
    """Linear -> BatchNorm of residual blocks: of the one before, or in turn where they stand apart."""
    pairs = [(a, b) for a, b in pairwise(layers) if isinstance(a, Linear) and isinstance(b, Norm)]
    if len(pairs) < len(norms):
        pairs = [*zip(linears, norms, strict=False)] if len(norms) == len(linears) - 1 else []
    if len(pairs) < len(norms) or any(linear.shape[1] != norm.units for linear, norm in pairs):
        _unplaced(norms)
    return dict(pairs)


def _paired(
    linears: Sequence[Linear], norms: Sequence[Norm], layers: Sequence[Linear | Norm] | None
) -> dict[int, Norm]:
    """Position of a Linear -> the BatchNorm behind it: as they stand, else one for each hidden layer, else by sizes.

    `layers` are all in the order in which they were made, or None where that is not known.
    """
    sizes = {-1: linears[0].shape[0], **{at: linear.shape[1] for at, linear in enumerate(linears)}}

    def ways(rest: Sequence[Norm], first: int) -> list[tuple[int, ...]]:  # no more than two
        if not rest:
            return [()]
        found: list[tuple[int, ...]] = []
        for at in range(first, len(linears)):
            if sizes[at] == rest[0].units and len(found) < 2:
                found += [(at, *way) for way in ways(rest[1:], at + 1)]
        return found[:2]

    stand: tuple[int, ...] | None = None
    if layers is not None and [layer for layer in layers if isinstance(layer, Linear)] == [*linears]:
        stand = tuple(sum(isinstance(one, Linear) for one in layers[: layers.index(norm)]) - 1 for norm in norms)
    each = tuple(range(len(norms))) if len(norms) == len(linears) - 1 else None
    fitting = {
        slots
        for slots in (stand, each)
        if slots is not None
        and len(set(slots)) == len(norms)
        and all(sizes[slot] == norm.units for slot, norm in zip(slots, norms, strict=True))
    }
    if stand in fitting and _are_numbered([*linears, *norms]):
        fitting = {stand}
    if len(fitting) == 1:
        return dict(zip(fitting.pop(), norms, strict=True))
    only = [] if fitting else ways(norms, -1)
    if len(only) != 1:
        _unplaced(norms)
    return dict(zip(only[0], norms, strict=True))


def _place_of_norms(linears: Sequence[Linear], norms: Mapping[int, Norm]) -> str:
    """Where BatchNorm stands, told by the numbers of the layers in an nn.Sequential; "" where they do not tell.

    "0" Linear, "1" BatchNorm, "3" Linear leave room for an activation behind BatchNorm alone.

    Raises:
        CheckpointError: MISFIT: between some layers there is no room for an activation, or its place differs.
    """
    places, rooms = set(), set()
    for at, (linear, following) in enumerate(pairwise(linears)):
        names = [linear.name, *([norms[at].name] if at in norms else []), following.name]
        numbers = [int(name.rpartition(".")[2]) for name in names if re.search(r"(^|\.)\d+$", name)]
        together = len({name.rpartition(".")[0] for name in names}) == 1 and len(numbers) == len(names)
        gaps = [b - a - 1 for a, b in pairwise(numbers)] if together else []
        if gaps and min(gaps) >= 0:
            rooms.add(sum(gaps) > 0)
        if at in norms:
            inside = names[0].rpartition(".")[0] == names[1].rpartition(".")[0] and len(numbers) > 1
            block = inside and not together and numbers[1] == numbers[0] + 1  # the next Linear is in another block
            ahead, behind = gaps or (-1, -1)
            places.add("before" if block or (not ahead and behind > 0) else "after" if ahead > 0 == behind else "")
    if len(rooms) > 1:
        _misfit("there is no activation between some of the layers, by their numbers in nn.Sequential")
    if {"before", "after"} <= places:
        _misfit("BatchNorm stands before some activations and after others, by the numbers in nn.Sequential")
    return places.pop() if len(places) == 1 else ""


def _are_numbered(layers: Sequence[Linear | Norm]) -> bool:
    """Whether the names differ in numbers alone, as in an nn.Sequential."""
    return len({re.sub(r"\d+", "#", layer.name) for layer in layers}) == 1


def _unplaced(norms: Sequence[Norm]) -> NoReturn:
    _misfit(f"it is not told which layers the BatchNorm {', '.join(norm.name for norm in norms)} follow")


def _misfit(message: str) -> NoReturn:
    _refuse(
        "MISFIT",
        f"the architecture cannot be read off the shapes: {message}; give its class with --import FILE.py:CLASS",
    )


def _refuse(reason: str, message: str) -> NoReturn:
    raise CheckpointError(reason, message)
