"""What the engine is measured against, and with what: models, the loop, the tutorial, peers, turns, the ceiling."""

from __future__ import annotations

import copy
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

import ensemble
import zoo
from ensemble.run._engine import fast_types, forms

FEATURES, CONTEXT = 27, 20
CLASSES = tuple(f"class {index}" for index in range(40))
Shape = tuple[int, int, int]  # members, width, hidden layers
SHAPES: tuple[Shape, ...] = ((4, 2048, 4), (8, 512, 4), (32, 128, 4), (100, 64, 3))
Work = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """How much to measure, and where."""

    device: torch.device
    quick: bool
    ceilings: dict[str, float]  # floating-point operations per second of one large product, by type
    shapes: tuple[Shape, ...] = SHAPES

    @property
    def has_bfloat16(self) -> bool:
        """Whether this hardware multiplies faster in bfloat16; what needs that is left out where it does not."""
        return "bfloat16" in self.ceilings

    def repeats(self, flop: float) -> int:
        """Fewer of what takes long."""
        return 3 if self.quick or flop > 2e12 else 7


def ceilings(device: torch.device, size: int = 4096) -> dict[str, float]:
    """By type, what this hardware multiplies at best; bfloat16 only where it is faster than float32."""
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    wanted = ["float32", *fast_types(device)]
    return {name: ceiling(device, dtype, size) for name, dtype in types.items() if name in wanted}


def ceiling(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of one large product by the best library there is, the best of five."""
    size = size if device.type == "cuda" else size // 2
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    products: list[Work] = [lambda: a @ b]
    if forms.available(device):
        weight = torch.ops.mkldnn._reorder_linear_weight(b, size)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], ""))
    return 2 * size**3 / min(seconds(product) for product in products for _ in range(5))


def spec_of(width: int, depth: int) -> zoo.Spec:
    """The spec of a cylinder."""
    options = {"width": width, "depth": depth}
    return zoo.Spec("cylinder", features=FEATURES, context=CONTEXT, classes=len(CLASSES), options=options)


def models_of(shape: Shape, setting: Setting, precision: str) -> tuple[list[nn.Module], ensemble.Members]:
    """Fresh models in evaluation mode, and the same as members."""
    gc.collect()
    count, width, depth = shape
    spec = spec_of(width, depth)
    models = [zoo.build(spec, seed=seed).eval().to(setting.device) for seed in range(count)]
    named = {str(index): model for index, model in enumerate(models)}
    specs = dict.fromkeys(named, spec)
    return models, ensemble.from_modules(
        named, classes=CLASSES, specs=specs, device=setting.device, precision=precision
    )


def looped(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What everybody writes: (M, B, C) probabilities."""
    with torch.inference_mode():
        return torch.stack([model(x).softmax(-1) for model in models])


def vmapped(models: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """The tutorial's stack as a function of the inputs."""
    stack = ensemble.Stack(models)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return stack(x).softmax(-1)  # type: ignore[no-any-return]  # Module is untyped

    return run


def compiled(models: Sequence[nn.Module], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The loop as torch's compiler makes it, weights frozen, in a type; it needs a C++ compiler."""
    twins = [copy.deepcopy(model).to(dtype) for model in models]

    def loop(x: Tensor) -> Tensor:
        return torch.stack([model(x).softmax(-1) for model in twins])

    fast = torch.compile(loop, options={"freezing": True})
    return torch.no_grad()(lambda x: fast(x.to(dtype)))


def peers_of(models: list[nn.Module]) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """What a user would pick instead, over the same modules; only those that are installed."""
    try:
        from torch_uncertainty.methods import deep_ensembles

        yield "torch-uncertainty deep_ensembles", torch.inference_mode()(deep_ensembles(models).eval())
    except ImportError:
        print("torch-uncertainty is not installed: pip install zoo-ensemble[bench]", file=sys.stderr)
    try:
        from torchensemble import FusionClassifier, VotingClassifier

        for kind in (VotingClassifier, FusionClassifier):
            peer = kind(estimator=lambda: models[0], n_estimators=len(models), cuda=False)
            peer.estimators_, peer.n_outputs = nn.ModuleList(models), len(CLASSES)
            yield f"torchensemble {kind.__name__}", torch.inference_mode()(peer.eval())
    except ImportError:
        print("torchensemble is not installed: pip install zoo-ensemble[bench]", file=sys.stderr)


def random_frames(count: int) -> zoo.FrameSet:
    """Recordings of 1,300 frames, about what read speech has."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.cat([torch.arange(0, count, 1300), torch.tensor([count])])
    features = torch.randn(count, FEATURES, generator=generator)
    return zoo.FrameSet(features, torch.randint(len(CLASSES), (count,), generator=generator), starts, CLASSES)


def flop_of(models: Sequence[nn.Module]) -> float:
    """Floating-point operations of the products for one frame."""
    return 2.0 * sum(p.numel() for model in models for p in model.parameters() if p.ndim == 2)


def paired(works: Sequence[Work], *, repeats: int, least: float = 0.0, tidy: Work = lambda: None) -> list[float]:
    """Median seconds of each; they take turns, so that a busy moment affects all alike. `tidy` is not timed."""
    taken: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    tidy()
    start = time.perf_counter()
    while len(taken[0]) < repeats or time.perf_counter() - start < least:
        for work, times in zip(works, taken, strict=True):
            times.append(seconds(work))
        tidy()
    return [median(times) for times in taken]


def seconds(work: Work) -> float:
    """Seconds of one call, until the device is done."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine(setting: Setting) -> str:
    """One line: processor, threads, torch, and what it multiplies at best; another one for what it lacks."""
    capabilities: dict[str, str] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.11 on
    name = torch.cuda.get_device_name() if setting.device.type == "cuda" else capabilities.get("cpu_name", "")
    rates = ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in setting.ceilings.items())
    parts = f"{name}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    missing = "" if setting.has_bfloat16 else "\nbfloat16 is not faster on this hardware: its rows are left out"
    return f"{parts}; product: {rates}{missing}"
