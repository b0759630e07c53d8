"""CUDA devices pretended over real CPU tensors, for tests on machines that have none.

`PretendedCuda` sees every call of torch from above, so autograd, vmap, autocast and optimisers compute true values. It
keeps account of the device on which each tensor's memory is said to be, and behaves as CUDA does where that matters:

- refused: tensors of several devices in one call, a generator of another device, `.numpy()`, a wait during a capture;
- NaN, where CUDA leaves memory undefined: `empty`, pinned memory that a copy has not certainly reached, and the
  results of a captured graph before its replay;
- recorded: waits of the host by place, calls by name, and how graphs were captured.

The number of devices, their compute capability and the largest allocation can be chosen. Not pretended: kernels,
streams, other threads, and what happens within one composite call or within a backward pass.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
#: calls whose result the host reads, so that it waits for the device
READS = {
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__contains__", "__repr__", "__format__",
    "nonzero", "argwhere", "masked_select", "equal", "allclose", "unique", "bincount", "is_nonzero",
}  # fmt: skip
DRAWS = {
    "dropout", "bernoulli", "bernoulli_", "normal_", "uniform_", "random_", "randn", "rand", "randint", "randperm",
    "randn_like", "rand_like",
}  # fmt: skip
#: calls that look at the Python objects only, or whose own parts are seen one by one
UNCHECKED = {
    "_has_compatible_shallow_copy_type", "__set__", "__delete__", "is_same_size", "backward", "set_",
}  # fmt: skip


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def memory(tensor: Tensor) -> Any | None:
    """The storage below vmap's and grad's wrappers; None for layouts without one, such as oneDNN's own."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


class Notes(dict[int, tuple[StorageWeakRef, Any]]):
    """What is known of memory, as long as it lives."""

    def of(self, tensor: Tensor) -> Any | None:
        """What was noted of a tensor's memory; None where nothing was."""
        kept, what = self.get(getattr(memory(tensor), "_cdata", 0), (None, None))
        return None if kept is None or kept.expired() else what

    def note(self, tensor: Tensor, what: Any) -> None:
        """Keep account of a tensor's memory."""
        if len(self) > 50_000:
            for key in [key for key, (kept, _) in self.items() if kept.expired()]:
                del self[key]
        if (storage := memory(tensor)) is not None:
            self[storage._cdata] = StorageWeakRef(storage), what


class Copy(NamedTuple):
    """A copy to or from pinned memory for which the host has not waited yet."""

    device: torch.device
    target: Tensor
    values: Tensor


class Generator(torch._C.Generator):
    """A generator that is said to be of a device."""

    home: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        """On the CPU, in truth."""
        made = super().__new__(cls)
        made.home = torch.device("cuda", torch.device(device).index or 0) if "cuda" in str(device) else CPU
        return made

    @property
    def device(self) -> torch.device:
        """Where it is said to be."""
        return self.home


class Stream:
    """A stream of a device; work is done at once, so that there is nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        """Wait for the other's work."""

    synchronize = wait_stream


class Graph:
    """The calls on one device during a capture; a replay repeats these into the same memory."""

    def __init__(self) -> None:
        self.tape: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        """Repeat the calls."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for function, args, kwargs, made in self.tape:
                for old, new in zip(tensors(made), tensors(function(*args, **kwargs)), strict=True):
                    if memory(old)._cdata != memory(new)._cdata:
                        old.copy_(new)


class Capture(NamedTuple):
    """How a graph was captured."""

    device: torch.device
    own_stream: bool
    error_mode: str
    calls: int


class PretendedCuda(TorchFunctionMode):
    """Some CUDA devices of one kind; enter it to pretend them.

    Args:
        monkeypatch: puts torch.cuda's functions in place.
        devices: number of them.
        capability: compute capability of each.
        largest: bytes of the largest tensor that fits.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        devices: int = 2,
        capability: tuple[int, int] = (8, 0),
        largest: int = 1 << 62,
    ) -> None:
        super().__init__()
        self.devices, self.capability, self.largest, self.current = devices, capability, largest, 0
        self.homes, self.pinned, self.copies = Notes(), Notes(), list[Copy]()
        self.capturing: Graph | None = None
        self.captures: list[Capture] = []
        self.waits: Counter[tuple[str, int, str, torch.device]] = Counter()  # file, line, what waited, for which device
        self.calls: Counter[str] = Counter()
        self.states = [torch.Generator().get_state() for _ in range(devices)]
        self._install(monkeypatch)

    # Where things are

    def home(self, tensor: Tensor) -> torch.device:
        """The device of a tensor."""
        return self.homes.of(tensor) or tensor.device

    def device(self, given: Any = "cuda") -> torch.device:
        """With its index; an int is one."""
        found = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
        if found.type == "cuda" and (found.index or 0) >= self.devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", self.current) if found == torch.device("cuda") else found

    def common(self, name: str, args: Any, kwargs: Any) -> torch.device:
        """The one device of a call's tensors."""
        if name == "__deepcopy__":
            args = args[:1]  # the rest is what was copied before
        homes = [(tensor, self.home(tensor)) for tensor in (*tensors(args), *tensors(kwargs))]
        cuda = {home for _, home in homes if home.type == "cuda"}
        if not cuda or name in UNCHECKED:
            return next(iter(cuda), CPU)
        if name in ("numpy", "__array__"):
            raise TypeError(f"can't convert {cuda.pop()} device type tensor to numpy. Use Tensor.cpu() first.")
        if name in ("__getitem__", "__setitem__"):
            return self._indexed(name, *args)
        several = cuda | {home for tensor, home in homes if home == CPU and tensor.ndim}
        if len(several) > 1:
            found = ", ".join(sorted(map(str, several)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} ({name})")
        return cuda.pop()

    def _indexed(self, name: str, tensor: Tensor, where: Any, value: Any = None) -> torch.device:
        own, parts = self.home(tensor), {self.home(part) for part in tensors(where)}
        if parts - {own, CPU}:
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({own})")
        source = self.home(value) if isinstance(value, Tensor) else own
        if source != own and parts and value.ndim:
            raise RuntimeError(f"Expected all tensors to be on the same device, but got {own} and {source} ({name})")
        if source != own or CPU in parts - {own}:
            self.wait(own if own.type == "cuda" else source, f"{name} between devices")
        return own

    # Calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", str(function)), dict(kwargs or {})
        if name == "__get__":
            return self._attribute(function, args[0])
        if name in ("to", "cpu", "cuda"):
            return self._moved(name, *args, **kwargs)
        if name == "copy_" and self.home(args[0]) != self.home(args[1]):
            return self._copied(*args, **kwargs)
        pinned, wanted = kwargs.pop("pin_memory", False), kwargs.get("device")
        device = self.common(name, args, kwargs) if wanted is None else self.device(wanted)
        if wanted is not None:
            kwargs["device"] = CPU if device.type == "cuda" else device
        if (drawn := getattr(kwargs.get("generator"), "home", device)) != device and device.type != "meta":
            raise RuntimeError(f"Expected a '{device}' device type for generator but found '{drawn}'")
        on_cuda = device.type == "cuda"
        if on_cuda:
            self.calls[name] += 1
            masked = name in ("__getitem__", "__setitem__") and any(t.dtype == torch.bool for t in tensors(args[1]))
            if name in READS or masked or name == "tensor":
                self.wait(device, name)
        with self._drawing(device.index) if on_cuda and name in DRAWS else nullcontext():
            made = function(*args, **kwargs)
        if "empty" in name and made.is_floating_point() and made.device == CPU:
            made.detach().fill_(torch.nan)
        if pinned:
            self.pinned.note(made, True)
        return self._placed(made, device, function, args, kwargs)

    def _placed(self, made: Any, device: torch.device, function: Any = None, args: Any = (), kwargs: Any = None) -> Any:
        """What a call made is on its device, and part of the graph that is being captured there."""
        given = {getattr(memory(tensor), "_cdata", None) for tensor in (*tensors(args), *tensors(kwargs))}
        for tensor in tensors(made) if device.type == "cuda" else ():
            if (storage := memory(tensor)) is not None and storage._cdata not in given:
                if storage.nbytes() > self.largest:
                    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes.")
                self.homes.note(tensor, device)
        if function is not None and self.capturing is not None and device == self.device():
            self.capturing.tape.append((function, args, kwargs, made))
        return made

    def _attribute(self, function: Any, tensor: Tensor) -> Any:
        home, name = self.home(tensor), function.__self__.__name__
        known = {"device": home, "is_cuda": home.type == "cuda", "is_cpu": home.type == "cpu"}
        return known[name] if name in known else self._placed(function(tensor), home, None, (tensor,))

    def _moved(self, name: str, tensor: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        old, copy, non_blocking = self.home(tensor), kwargs.pop("copy", False), kwargs.pop("non_blocking", False)
        device, dtype, layout = None, None, None
        if name != "to":
            device = torch.device(*(rest or [name]))
        elif rest and isinstance(rest[0], Tensor):
            device, dtype = self.home(rest[0]), rest[0].dtype
        else:
            device, dtype, _, layout = torch._C._nn._parse_to(*rest, **kwargs)
        device, dtype = old if device is None else self.device(device), dtype or tensor.dtype
        if "meta" in (device.type, old.type):
            return tensor.to(device, dtype)
        settings = {"copy": copy or device != old, "memory_format": layout or torch.preserve_format}
        made = tensor.to(dtype, **settings)
        if device != old and not (non_blocking and old == CPU and self.pinned.of(tensor)):
            self.wait(old if old.type == "cuda" else device, f"{old.type} to {device.type}")
        return self._placed(made, device, Tensor.to, (tensor, dtype), settings)

    def _copied(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Between devices: only contiguous pinned memory of the same type is copied without a wait."""
        to, old = self.home(target), self.home(source)
        plain = target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype
        if non_blocking and plain and self.pinned.of(target if to == CPU else source):
            values = source.detach().clone() if to == CPU else source
            self.copies.append(Copy(old if to == CPU else to, target, values))
            return target.fill_(torch.nan)
        self.wait(old if old.type == "cuda" else to, f"copy_ {old.type} to {to.type}")
        return target.copy_(source)

    # Waiting, drawing, capturing

    def wait(self, device: torch.device, what: str, copies: int | None = None) -> None:
        """The host waits: copies of that device, or the first so many of them, have arrived."""
        if self.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        frame = sys._getframe(1)
        while frame.f_back and ("site-packages" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        self.waits["/".join(frame.f_code.co_filename.split("/")[-2:]), frame.f_lineno, what, device] += 1
        for copy in [copy for copy in self.copies if copy.device == device][:copies]:
            self.copies.remove(copy)
            copy.target.copy_(copy.values)

    @contextmanager
    def _drawing(self, index: int) -> Iterator[None]:
        """Random numbers of the device's own."""
        kept = torch.default_generator.get_state()
        torch.default_generator.set_state(self.states[index])
        yield
        self.states[index] = torch.default_generator.get_state()
        torch.default_generator.set_state(kept)

    @contextmanager
    def _capture(self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Any:
        self.wait(self.device(), "capture")
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None
        self.captures.append(Capture(self.device(), stream is not None, capture_error_mode, len(graph.tape)))
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for _, args, kwargs, made in graph.tape:
                given = {memory(tensor)._cdata for tensor in tensors((args, kwargs))}
                for tensor in tensors(made):
                    if tensor.is_floating_point() and memory(tensor)._cdata not in given:
                        tensor.fill_(torch.nan)

    @contextmanager
    def _at(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, self.device(device).index
        try:
            yield
        finally:
            self.current = before

    def _install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretended = self

        class Event:
            """Waited for, the copies that were begun before it was recorded have arrived."""

            def record(self) -> None:
                self.device = pretended.device()
                self.begun = [copy for copy in pretended.copies if copy.device == self.device]

            def synchronize(self) -> None:
                waiting = [copy for copy in pretended.copies if any(copy is begun for begun in self.begun)]
                pretended.wait(self.device, "event", len(waiting))

        def number(device: Any = None) -> int:
            return self.device("cuda" if device is None else device).index

        def seeded(seed: int) -> Tensor:
            return torch._C.Generator().manual_seed(seed).get_state()

        def stream(device: Any = None) -> Stream:
            return Stream(torch.device("cuda", number(device)))

        cuda = {
            "is_available": lambda: True,
            "device_count": lambda: self.devices,
            "current_device": lambda: self.current,
            "device": self._at,
            "synchronize": lambda device=None: self.wait(torch.device("cuda", number(device)), "synchronize"),
            "empty_cache": lambda: None,
            "mem_get_info": lambda device=None: (1 << 34, 1 << 34),
            "memory_allocated": lambda device=None: 1000,
            "max_memory_allocated": lambda device=None: 5000,
            "reset_peak_memory_stats": lambda device=None: None,
            "set_sync_debug_mode": lambda mode: None,
            "get_device_name": lambda device=None: f"pretended {self.capability} {number(device)}",
            "get_device_capability": lambda device=None: self.capability,
            "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
            "is_bf16_supported": lambda including_emulation=True: including_emulation or self.capability >= (8, 0),
            "manual_seed": lambda seed: self.states.__setitem__(self.current, seeded(seed)),
            "manual_seed_all": lambda seed: self.states.__setitem__(slice(None), [seeded(seed)] * self.devices),
            "get_rng_state": lambda device="cuda": self.states[number(device)],
            "set_rng_state": lambda state, device="cuda": self.states.__setitem__(number(device), state),
            "Event": Event,
            "Stream": stream,
            "current_stream": stream,
            "stream": lambda stream: nullcontext(),
            "CUDAGraph": Graph,
            "graph": self._capture,
            "is_current_stream_capturing": lambda: self.capturing is not None,
        }
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
        autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
        monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": enabled("cpu"))
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: dtype("cpu"))
        monkeypatch.setattr(torch, "Generator", Generator)
        grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype

        def by_device(*args: Any, **kwargs: Any) -> Any:
            return {(rows[0][0][0].device, key[1]): rows for key, rows in grouped(*args, **kwargs).items()}

        monkeypatch.setattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(by_device))
