"""Whether tensors fit a model, decided before one of them is touched.

torch's own strict loading raises after it has changed some tensors, and lets pass other element types,
NaN, and negative variances. Here all differences are found first and told at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from zoo.checkpoint.header import CheckpointError
from zoo.models.spec import Spec, build

Tensors = Mapping[str, Tensor]
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_MOST_TOLD = 20


def restore(module: nn.Module, tensors: Tensors) -> nn.Module:
    """Copy `tensors` into the parameters and buffers of `module`, all of them or none.

    Returns:
        `module`.

    Raises:
        CheckpointError: MISFIT, NOT_FINITE or VARIANCE; `module` is then as it was.
    """
    check_fit(module.state_dict(), tensors)
    check_values(tensors)
    return fill(module, tensors)


def fill(module: nn.Module, tensors: Tensors) -> nn.Module:
    """Copy tensors that are known to fit; `restore` for all others."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(tensors[name])
    return module


@lru_cache(maxsize=64)
def template(spec: Spec) -> Tensors:
    """Names, shapes and element types of a spec's tensors, on the meta device: nothing is allocated.

    Raises:
        CheckpointError: SPEC, where no model can be built from it.
    """
    try:
        return build(spec, device="meta").state_dict()
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError("SPEC", f"cannot build {spec.architecture!r}: {error}") from error


def check_fit(expected: Tensors, found: Tensors) -> None:
    """Refuse tensors whose names, shapes or element types are not the expected ones.

    Raises:
        CheckpointError: MISFIT, with all differences and a hint where only a prefix is wrong.
    """
    differences = _differences(expected, found)
    if not differences:
        return
    told = "; ".join(differences[:_MOST_TOLD])
    if len(differences) > _MOST_TOLD:
        told += f"; and {len(differences) - _MOST_TOLD} more"
    raise CheckpointError("MISFIT", f"the tensors do not fit the model: {told}{_prefix_hint(expected, found)}")


def check_values(tensors: Tensors) -> None:
    """Refuse NaN, infinity, and a running variance below zero.

    Raises:
        CheckpointError: NOT_FINITE or VARIANCE, with the names of all such tensors.
    """
    wild = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if wild:
        raise CheckpointError("NOT_FINITE", f"expected finite weights, got NaN or infinity in {', '.join(wild)}")
    variances = [name for name in tensors if name.rpartition(".")[2] == "running_var"]
    negative = [name for name in variances if tensors[name].numel() and float(tensors[name].min()) < 0]
    if negative:
        raise CheckpointError("VARIANCE", f"expected variances of at least 0, got less in {', '.join(negative)}")


def _finite(tensor: Tensor) -> bool:
    """One pass that reads only: a sum is finite unless a term is not, or, rarely, it overflows."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    return bool(torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))) or bool(
        torch.isfinite(tensor).all()
    )


def _differences(expected: Tensors, found: Tensors) -> list[str]:
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    told = [f"missing {', '.join(missing)}"] if missing else []
    told += [f"not in the model {', '.join(extra)}"] if extra else []
    for name in sorted(set(expected) & set(found)):
        a, b = expected[name], found[name]
        if a.shape != b.shape:
            told.append(f"{name}: expected shape {tuple(a.shape)}, got {tuple(b.shape)}")
        if a.dtype != b.dtype:
            told.append(f"{name}: expected {a.dtype}, got {b.dtype}")
    return told


def _prefix_hint(expected: Tensors, found: Tensors) -> str:
    for prefix in _WRAPPERS:
        if any(name.startswith(prefix) and name.removeprefix(prefix) in expected for name in found):
            return (
                f"; the names begin with {prefix!r}, which a wrapper (DataParallel, torch.compile) puts there: "
                f"save the state_dict of the module inside it"
            )
    return ""
