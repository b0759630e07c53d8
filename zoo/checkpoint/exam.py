"""The admission exam: what a model must show before it is believed, on a few rows, once.

A model must answer (b, ...) inputs with one tensor of floats (b, C), the same each time, and one row as it answers
that row among others. What can be made right cheaply is reported, the rest is refused, each with the model's name.

The probe finds right weights in changed code: it is a model's answer to a fixed batch. The batch comes from arithmetic
of our own, so that it is the same whatever torch's generators become. The digest of the rounded logits is equal for
equal behaviour on one machine; between machines the last bits differ and may round apart, so a few sums over all logits
are kept beside it and decide.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.checkpoint.header import CheckpointError
from zoo.models.spec import refuse_lazy

_ROWS = 4  # of the probe batch
_DIGITS = 3  # to which its logits are rounded
_CHANGED = 1e-3  # of the largest value: far above the last bits, far below another activation
_NOISE = 1e-4  # of the largest logit, between batches of different sizes
_COARSE = 5e-2  # likewise, in types and settings of lower precision
_REBUILT = 2e-5  # likewise, between a model and its copy, which run the same kernels
FAR = 30.0  # times the probe batch: where activations that are alike near zero are not
_REPEATS = 8  # of a model that draws random numbers, to see whether they matter
_PLAIN = (bool, int, float, complex, str, tuple, list, dict, np.ndarray, torch.dtype, type(None))
_OWN = frozenset(nn.Module().__dict__)


@dataclass(frozen=True, eq=False)
class Exam:
    """What a model showed."""

    logits: Tensor  # (b, C), its answer to the rows
    writes_input: bool  # it changes its input in place: give it a copy
    needs_whole_batch: bool  # a row's answer depends on the other rows: the batch must not be cut

    @property
    def record(self) -> dict[str, Any]:
        """The answer as a few plain values, a "digest" of 16 hex digits and b numbers, the "values".

        Of two models with equal weights, the digest tells whether they compute the same.
        """
        logits = self.logits.detach().cpu().double().nan_to_num(neginf=0.0)
        scale = float(logits.abs().max()) or 1.0
        rounded = (logits / scale * 10**_DIGITS).round().long()
        weights = torch.cos(torch.arange(logits.shape[1], dtype=torch.float64))
        values = [float(f"{float(value):.6g}") for value in logits @ weights]
        return {"digest": hashlib.sha256(str(rounded.tolist()).encode()).hexdigest()[:16], "values": values}


def examine(model: Callable[[Tensor], Any], rows: Tensor, classes: int, *, name: str) -> Exam:
    """Ask a model a few rows, and refuse it if its answers cannot be used.

    A module is asked in evaluation mode; its mode, the rows and the global random generators are then as before.
    An answer with a tensor `.logits` counts as that tensor. Minus infinity is a logit, for a class of probability zero.

    Args:
        model: (b, ...) inputs -> (b, classes) logits.
        rows: (b, ...) inputs of the type and on the device that it takes; at least 4 rows find most.
        classes: number of its classes, C.
        name: what messages call it.

    Raises:
        ValueError: an answer of another form, a NaN, other answers when asked again, or an error of the model's own.
            Where only a whole batch is answered consistently, `needs_whole_batch` is set instead.

    Example:
        >>> examine(nn.Linear(3, 2), torch.zeros(5, 3), 2, name="a").needs_whole_batch
        False
        >>> examine(nn.Linear(3, 1), torch.zeros(5, 3), 2, name="a")
        Traceback (most recent call last):
            ...
        ValueError: expected logits (5, 2) from 'a' for inputs (5, 3), got (5, 1)
    """
    if not len(rows):
        msg = f"expected at least one row to examine {name!r} with, got none"
        raise ValueError(msg)
    if isinstance(model, nn.Module):
        refuse_lazy(model, name)
    written = False

    def ask(some: Tensor) -> Tensor:
        nonlocal written
        own = some.clone()
        version = own._version
        answer = _answer(model, own, name)
        written |= own._version != version or not torch.equal(own, some)
        logits = logits_of(answer, some, classes, name)
        if bool(logits.double().log_softmax(dim=-1).isnan().any()):
            msg = f"expected finite logits from {name!r}, got NaN or infinity; check its weights and its inputs' scale"
            raise ValueError(msg)
        return logits.clone()

    with _undisturbed(model, rows.device):
        drawn = _generators(rows.device)
        whole = ask(rows)
        repeats = _REPEATS if _generators(rows.device) != drawn else 0
        try:
            one, failure = ask(rows[-1:]), None
        except ValueError as error:
            failure = error
        scale = _scale(whole)
        apart = failure is not None or not _agree(one, whole[-1:], scale)
        if any(not _agree(ask(rows), whole, scale) for _ in range(max(repeats, apart))):
            msg = f"expected the same answers from {name!r} to the same rows, got others the second time; "
            raise ValueError(msg + "it is random in evaluation (dropout outside train mode?) or keeps a state")
        half = rows[len(rows) // 2 :]
        if failure is not None and (len(half) == len(rows) or _agree(ask(half), whole[-len(half) :], scale)):
            raise failure
    return Exam(whole, written, apart)


def logits_of(answer: Any, rows: Tensor, classes: int, name: str) -> Tensor:
    """The (b, C) logits in a model's answer to (b, ...) rows: the answer itself, or its `.logits`.

    Raises:
        ValueError: anything else, with the model's name and what came.
    """
    logits = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
    wanted = f"expected logits {(len(rows), classes)} from {name!r} for inputs {tuple(rows.shape)}"
    if not isinstance(logits, Tensor):
        way_out = "give the tensor among them with output=, or wrap the model in one that returns it"
        msg = f"{wanted}, got {_described(answer)}; {way_out}"
        raise ValueError(msg)
    plain = logits.layout is torch.strided and not logits.is_nested and not logits.is_meta
    if not plain or not logits.is_floating_point():
        kind = "a tensor on the meta device" if logits.is_meta else f"a tensor of {logits.dtype}, {logits.layout}"
        msg = f"{wanted} as floats, got {kind}"
        raise ValueError(msg)
    if logits.shape != (len(rows), classes):
        msg = f"{wanted}, got {tuple(logits.shape)}"
        raise ValueError(msg)
    return logits


def probe_rows(inputs: int) -> Tensor:
    """The probe batch: (4, inputs) float32 between -2 and 2, the same everywhere and always."""
    index = torch.arange(_ROWS * inputs, dtype=torch.int64)
    mixed = (index * 2_654_435_761 + 12_345) % 4_294_967_291 % 65_521  # a chaotic sequence of integers
    return (mixed.double() / 65_521 * 4 - 2).float().reshape(_ROWS, inputs)


def rows_for(module: nn.Module, rows: Tensor) -> Tensor:
    """The rows in the type and on the device of the module's first floating-point parameter, if it has one."""
    like = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), rows)
    return rows.to(like.device, like.dtype)


def asked(module: nn.Module, rows: Tensor, classes: int, *, name: str) -> Tensor:
    """A module's logits for some rows, as `examine` asks for them, but they may be NaN or infinite."""
    own = rows.clone()
    with _undisturbed(module, own.device):
        return logits_of(_answer(module, own, name), own, classes, name)


def same(some: Tensor, others: Tensor) -> bool:
    """Whether these are the logits of a model and of its copy; NaN and infinity in the same places count as equal."""
    noise = _REBUILT if some.device == others.device else _CHANGED
    return _agree(some.cpu(), others.cpu(), _scale(others), noise)


def unlike(module: nn.Module, again: nn.Module) -> str:
    """The first difference between modules of equal weights that may decide what they compute; "" if none is seen."""
    others = dict(_parts(again))
    for name, mine in _parts(module):
        theirs = others.get(name, "nothing")
        if isinstance(mine, Tensor):
            if not isinstance(theirs, Tensor) or not _equal(mine, theirs):
                return f"{name!r} is a tensor in no state_dict with other values; register it as a persistent buffer"
        elif _text(mine) != _text(theirs):
            return f"{name!r} is {_text(mine)} instead of {_text(theirs)}"
    return ""


def check_probe(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse (PROBE) a model whose record is not the one of its registration, with both sets of numbers."""
    if now["digest"] == recorded.get("digest"):
        return
    before, after = recorded.get("values", []), now["values"]
    limit = _CHANGED * max([1e-6, *map(abs, before)])
    if len(before) == len(after) and all(abs(a - b) <= limit for a, b in zip(before, after, strict=True)):
        return
    msg = f"expected {before} from the probe batch, got {after}: the weights are right, the code computes otherwise"
    raise CheckpointError("PROBE", msg)


def _answer(model: Callable[[Tensor], Any], rows: Tensor, name: str) -> Any:
    try:
        return model(rows)
    except Exception as error:
        what = f"inputs {tuple(rows.shape)} of {rows.dtype}"
        msg = f"expected an answer from {name!r} to {what}, got {type(error).__name__}: {error}"
        raise ValueError(msg) from error


def _described(answer: Any) -> str:
    if isinstance(answer, dict):
        return f"a {type(answer).__name__} with {[*answer][:8]}"
    if isinstance(answer, tuple | list):
        return f"a {type(answer).__name__} of {len(answer)}"
    return f"{type(answer).__name__}"


def _agree(some: Tensor, others: Tensor, scale: float, noise: float = _NOISE) -> bool:
    """Whether logits are equal up to noise, a fraction of their scale."""
    exact = _exact_products(some.device) and some.dtype in (torch.float32, torch.float64)
    limit = (noise if exact else max(noise, _COARSE)) * scale
    return torch.allclose(some.double(), others.double(), rtol=0, atol=limit, equal_nan=True)


def _exact_products(device: torch.device) -> bool:
    """Whether the user has left float32 products exact on such a device."""
    products = torch.backends.cuda.matmul if device.type == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    setting = getattr(products, "fp32_precision", None)
    if setting is None:  # before torch 2.9; from then on the older setting raises where the newer one is used
        return torch.get_float32_matmul_precision() == "highest"
    return setting in ("none", "ieee")


def _scale(logits: Tensor) -> float:
    """The largest magnitude among those that are finite."""
    finite = logits[logits.isfinite()].double()
    return float(finite.abs().max()) if len(finite) else 0.0


def _parts(module: nn.Module) -> Iterator[tuple[str, object]]:
    """What may decide what a module computes, other than its state: descriptions of its parts, and their attributes."""
    kept = module.state_dict().keys()
    for path, part in module.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        after = f" with {', '.join(map(_text, hooks))} as hook" if hooks else ""
        yield path or "the module", f"{type(part).__name__}({part.extra_repr()}){after}"
        for name, value in {**vars(part), **part._buffers}.items():
            key = f"{path}.{name}".lstrip(".")
            if name not in _OWN and key not in kept:
                yield key, value


def _text(value: object) -> str:
    """A value for comparison and for messages: plain data as it prints, functions and objects by their own names."""
    if isinstance(value, _PLAIN):
        return shorten(str(value), 120)
    return str(getattr(value, "__qualname__", type(value).__name__))


def _equal(some: Tensor, other: Tensor) -> bool:
    return some.shape == other.shape and torch.equal(some.detach().cpu(), other.detach().cpu())


@contextmanager
def _undisturbed(model: object, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards the module's mode and all generators are as before."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # a model may draw from it
    devices = [device] if device.type == "cuda" else []
    # outside inference mode, since only there a tensor counts how often it is written
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad():
        try:
            if isinstance(model, nn.Module):
                model.eval()
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002  # likewise


def _generators(device: torch.device) -> tuple[object, ...]:
    """The states of the global generators, for comparison."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    numpy: Any = np.random.get_state()  # noqa: NPY002  # likewise
    return random.getstate(), numpy[1].tobytes(), numpy[2], *(bytes(state.numpy()) for state in states)
