"""Models as ONNX files, which any ONNX runtime runs without this package and without torch.

A file takes windows (N, inputs), or the raw features (T, F) of one recording, and answers with the probabilities and
the most probable class of every frame. What a consumer has to know stands in the file's metadata and, the same, in a
JSON file beside it. Writing needs the extra `ship`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from zoo import _files
from zoo._json import canonical
from zoo._names import own_version
from zoo.data.frames import FrameSet, windows
from zoo.data.normalisation import NORMALISATIONS
from zoo.models.spec import Spec
from zoo.registry import Registry

PRECISIONS = ("float32", "float16", "int8")
FORMAT = "zoo-onnx 1"
_MOST_BYTES = 2**31 - 1  # of one protocol buffer


class Model(Protocol):
    """What can be written: parts that share one input."""

    def __call__(self, x: Tensor, /) -> tuple[Tensor, ...]:
        """Inputs (N, ...) -> probabilities (N, C), class indices (N,), and possibly the members' probabilities."""


@dataclass(frozen=True)
class Agreement:
    """How a written file, run by onnxruntime, agrees with the model it was written from.

    Args:
        frames: number of frames compared, N.
        moved: largest change of a probability.
        changed: fraction of frames whose most probable class is another.
        accuracy: of the file on these frames, a fraction; None where they have no labels.
        accuracy_before: of the model.
    """

    frames: int
    moved: float
    changed: float
    accuracy: float | None = None
    accuracy_before: float | None = None


@dataclass(frozen=True)
class Exported:
    """A written file, its size in bytes, and how it agrees with the model; None where no frames were given."""

    path: Path
    size: int
    agreement: Agreement | None


class Recording(nn.Module):
    """The windows of one whole recording: raw features (T, F) -> (T, (2K + 1) * F), normalised and padded.

    The same as `zoo.windows` over a frame set of that recording alone.
    """

    def __init__(self, context: int, normalisation: str) -> None:
        super().__init__()
        self.context, self.normalise = context, NORMALISATIONS[normalisation]

    def forward(self, features: Tensor) -> Tensor:
        """(T, F) -> (T, (2K + 1) * F)."""
        frames = features.shape[0]
        affine = self.normalise(features, torch.tensor([0, frames]))
        rows = features if affine is None else features * affine[0] + affine[1]
        span = torch.arange(2 * self.context + 1)
        around = torch.arange(frames)[:, None] + span  # (T, 2K + 1)
        return pad(rows, (0, 0, self.context, self.context))[around].flatten(1)


class Single(nn.Module):
    """One model's answer: windows, or the features of a recording, to probabilities and classes."""

    def __init__(self, model: nn.Module, prepare: nn.Module) -> None:
        super().__init__()
        self.model, self.prepare = model, prepare

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs -> probabilities (N, C) and class indices (N,)."""
        probabilities = self.model(self.prepare(x)).softmax(-1)
        return probabilities, probabilities.argmax(-1)


def export_onnx(
    registry: Registry,
    reference: str,
    path: str | Path,
    *,
    with_windows: bool = False,
    precision: str = "float32",
    frames: FrameSet | None = None,
    most_changed: float = 0.01,
) -> Exported:
    """Write one registered model as an ONNX file, with a JSON file beside it, `PATH.json`.

    Args:
        registry: where the model is.
        reference: a version of a model.
        path: the file, whole or not there; its name ends in `.onnx`.
        with_windows: the file takes the raw features (T, F) of one recording instead of windows (N, inputs).
        precision: "float32"; "float16", half the bytes; "int8", weights as 8-bit integers, a quarter.
        frames: frames on which the file is compared with the model; required for float16 and int8.
        most_changed: refuse a file that gives more than this fraction of the frames another class.

    Raises:
        ValueError: the model cannot be written, or the file does not agree with it.
        ImportError: the extra `ship` is not installed.
    """
    entry = registry.get(reference)
    spec, model = entry.spec, registry.load(reference)
    prepare = Recording(spec.context, spec.normalisation) if with_windows else nn.Identity()
    columns = spec.features if with_windows else spec.inputs
    contract = {
        "classes": list(entry.classes),
        "input": input_contract(spec, columns, with_windows=with_windows),
        "members": [{"name": entry.name, "reference": f"{entry.name}@{entry.id}", "sha256": entry.sha256}],
    }
    return write(
        Single(model, prepare),
        path,
        contract=contract,
        columns=columns,
        precision=precision,
        probe=None if frames is None else probe(frames, spec, entry.classes, with_windows=with_windows),
        most_changed=most_changed,
    )


def input_contract(spec: Spec | None, columns: int, *, with_windows: bool) -> dict[str, Any]:
    """What a consumer has to feed: raw features, windows prepared as a spec says, or inputs of the user's own."""
    if spec is None or with_windows:
        return {"kind": "inputs" if spec is None else "features", "columns": columns}
    known = {"features": spec.features, "context": spec.context, "normalisation": spec.normalisation}
    return {"kind": "windows", "columns": columns, **known, "padding": spec.padding}


Probe = Sequence[tuple[Tensor, Tensor | None]]  # inputs of a file, and labels, piece by piece


def probe(frames: FrameSet, spec: Spec, classes: Sequence[str], *, with_windows: bool) -> Probe:
    """Frames as a file takes them, on the CPU: windows as `spec` says, or recording by recording.

    Labels are indices into `classes`, and left out where the frames know other classes. Raises ValueError for frames
    of another number of features.
    """
    if frames.features.shape[1] != spec.features:
        msg = f"expected frames of {spec.features} features to compare on, got {frames.features.shape[1]}"
        raise ValueError(msg)
    labels = None if frames.labels is None else frames.labels.cpu()
    if labels is not None:
        known = set(classes) == set(frames.classes)
        labels = torch.tensor([classes.index(name) for name in frames.classes])[labels] if known else None
    pieces: list[Tensor] = [torch.arange(*bounds) for bounds in pairwise(frames.starts.tolist())]
    if with_windows:
        return [(frames.features[some].cpu(), None if labels is None else labels[some]) for some in pieces]
    found = []
    for some in pieces:
        x = windows(frames, some, spec.context, spec.normalisation, spec.padding).cpu()
        found.append((x, None if labels is None else labels[some]))
    return found


def write(
    model: nn.Module,
    path: str | Path,
    *,
    contract: Mapping[str, Any],
    columns: int,
    precision: str = "float32",
    probe: Probe | None = None,
    most_changed: float = 0.01,
    members: bool = False,
) -> Exported:
    """Write a `Model` over inputs (N, columns) as an ONNX file; the arguments are those of `export_onnx`.

    Args:
        contract: what a consumer has to know, as plain data; each entry becomes one metadata property.
        columns: length of one row of the input.
        members: the model's third output has the members' probabilities (M, N, C).

    Raises:
        ValueError: as `export_onnx`.
        ImportError: the extra `ship` is not installed.
    """
    path = Path(path)
    if precision not in PRECISIONS:
        msg = f"expected a precision of {', '.join(PRECISIONS)}, got {precision!r}"
        raise ValueError(msg)
    if path.suffix != ".onnx":
        msg = f"expected a file name that ends in .onnx, got {str(path)!r}"
        raise ValueError(msg)
    if probe is None and precision != "float32":
        msg = f"expected frames on which {precision} is compared with float32, got none; give validation frames"
        raise ValueError(msg)
    outputs = ["probabilities", "class", "members"][: 3 if members else 2]
    proto = _reduced(_traced(model, columns, contract["input"]["kind"], outputs), precision)
    about = {**contract, "format": FORMAT, "precision": precision, "version": own_version(), "outputs": outputs}
    for key in sorted(about):
        value = about[key]
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else canonical(value))
    if proto.ByteSize() > _MOST_BYTES:
        msg = f"expected a model of at most 2 GiB, the limit of one ONNX file, got {proto.ByteSize():,} bytes"
        raise ValueError(msg)
    data = proto.SerializeToString()
    found = None if probe is None else _agreement(model, data, probe)
    if found is not None and found.changed > most_changed:
        msg = f"expected a file that changes the class of at most {most_changed:.2%} of the frames"
        raise ValueError(f"{msg}, but {precision} changes {found.changed:.2%}; choose another precision")
    text = json.dumps(about | ({"agreement": asdict(found)} if found else {}), indent=1, ensure_ascii=False) + "\n"
    contract_path = path.with_name(f"{path.name}.json")  # `registry.onnx` must not take the place of `registry.json`
    with _files.staged(path, data) as whole, _files.staged(contract_path, text.encode()) as beside:
        _files.system.rename(beside, contract_path)
        _files.system.rename(whole, path)
    _files.sync_folder(path.parent)
    return Exported(path, len(data), found)


def _traced(model: nn.Module, columns: int, name: str, outputs: Sequence[str]) -> Any:
    """The protocol buffer of a model with any number of rows."""
    _tools()
    rows = {0: torch.export.Dim("frames")}
    try:
        with _quiet("torch.onnx"):
            _files.name_compiler_cache()
            traced = torch.export.export(model.eval(), (torch.zeros(7, columns),), dynamic_shapes=(rows,))
            program = torch.onnx.export(  # given the module itself, torch 2.8 would guess where it cannot trace
                traced,
                dynamo=True,
                input_names=[name],
                output_names=list(outputs),
                verbose=False,
            )
    except Exception as error:  # whatever the exporter's passes raise on a model or a rule of the user's own
        first = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        msg = f"expected a model and a rule that torch can export to ONNX, got: {first[:200]}"
        raise ValueError(msg) from error
    assert program is not None  # as torch promises where dynamo=True
    return program.model_proto


def _reduced(proto: Any, precision: str) -> Any:
    """The same model with smaller weights."""
    if precision == "float32":
        return proto
    onnx, _, (quantization, float16) = _tools()
    if precision == "float16":
        return float16.convert_float_to_float16(proto, keep_io_types=True, op_block_list=["Softmax", "ArgMax"])
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        place = Path(folder) / "int8.onnx"
        with _quiet(""):
            quantization.quantize_dynamic(proto, place, op_types_to_quantize=["MatMul", "Gemm"])
        return onnx.load(place)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Without warnings on what a user cannot change, from Python and from a logger ("" is the root)."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _agreement(model: nn.Module, data: bytes, probe: Probe) -> Agreement:
    """The file's bytes, run by onnxruntime, against the model, piece by piece."""
    session = _tools()[1].InferenceSession(data, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    frames = changed = right = right_before = labelled = 0
    moved = 0.0
    for x, labels in probe:
        with torch.inference_mode():
            wanted = model(x)[0].numpy()
        came = session.run(["probabilities"], {name: x.numpy()})[0]
        if came.shape != wanted.shape or not np.isfinite(came).all():
            msg = f"expected finite probabilities {wanted.shape} from the file, got {came.shape}"
            raise ValueError(msg)
        moved = max(moved, float(np.abs(came - wanted).max(initial=0)))
        choice, before = came.argmax(-1), wanted.argmax(-1)
        frames, changed = frames + len(came), changed + int((choice != before).sum())
        if labels is not None:
            truth = labels.numpy()
            right, right_before = right + int((choice == truth).sum()), right_before + int((before == truth).sum())
            labelled += len(truth)
    accuracies = (right / labelled, right_before / labelled) if labelled else (None, None)
    return Agreement(frames, moved, changed / max(frames, 1), *accuracies)


def _tools() -> tuple[Any, Any, Any]:
    """The packages onnx and onnxruntime and the runtime's converter to float16, which are optional."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
        from onnxruntime import quantization
        from onnxruntime.transformers import float16
    except ImportError as error:
        msg = f"expected the package {error.name} to write ONNX; install zoo-ensemble[ship]"
        raise ImportError(msg) from error
    return onnx, onnxruntime, (quantization, float16)
