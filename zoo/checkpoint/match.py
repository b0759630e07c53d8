"""Whether tensors fit a model.

torch's own strict loading raises after it has changed some tensors, and lets pass other element types, NaN, and
negative variances. Here all differences are found first and reported at once, before one tensor is touched.
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
_MOST_LISTED = 20


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
    """Copy tensors that are known to fit into a module; use `restore` for all others."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(tensors[name])
    return module


@lru_cache(maxsize=64)
def template(spec: Spec) -> Tensors:
    """Names, shapes and types of a spec's tensors, on the meta device; CheckpointError SPEC if none can be built."""
    try:
        return build(spec, device="meta").state_dict()
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError("SPEC", f"cannot build {spec.architecture!r}: {error}") from error


def check_fit(expected: Tensors, found: Tensors) -> None:
    """Refuse (MISFIT) tensors of other names, shapes or types, with all differences, and a hint at a wrong prefix."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    differences = [f"missing {', '.join(missing)}"] if missing else []
    differences += [f"not in the model {', '.join(extra)}"] if extra else []
    for name in sorted(expected.keys() & found.keys()):
        a, b = expected[name], found[name]
        if a.shape != b.shape:
            differences.append(f"{name}: expected shape {tuple(a.shape)}, got {tuple(b.shape)}")
        if a.dtype != b.dtype:
            differences.append(f"{name}: expected {a.dtype}, got {b.dtype}")
    if not differences:
        return
    listed = "; ".join(differences[:_MOST_LISTED])
    if len(differences) > _MOST_LISTED:
        listed += f"; and {len(differences) - _MOST_LISTED} more"
    for prefix in _WRAPPERS:
        if any(name.startswith(prefix) and name.removeprefix(prefix) in expected for name in found):
            listed += f"; the names begin with {prefix!r}, which a wrapper (DataParallel, torch.compile) puts there: "
            listed += "save the state_dict of the module inside it"
            break
    raise CheckpointError("MISFIT", f"the tensors do not fit the model: {listed}")


def check_values(tensors: Tensors) -> None:
    """Refuse NaN, infinity (NOT_FINITE) and running variances below zero (VARIANCE), naming all such tensors."""
    wild = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if wild:
        raise CheckpointError("NOT_FINITE", f"expected finite weights, got NaN or infinity in {', '.join(wild)}")
    variances = [name for name in tensors if name.rpartition(".")[2] == "running_var"]
    negative = [name for name in variances if tensors[name].numel() and float(tensors[name].min()) < 0]
    if negative:
        raise CheckpointError("VARIANCE", f"expected variances of at least 0, got less in {', '.join(negative)}")


def _finite(tensor: Tensor) -> bool:
    """Whether all elements are finite: a sum is, unless an element is not or, rarely, it overflows. Reads once."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())
