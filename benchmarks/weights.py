"""Fitted weights and selection compared with other methods: `python -m benchmarks.weights [--quick]`.

Everything runs in one process on one BLAS thread, our method and the peer in turn; medians of CPU seconds. Peers get P
in float64, since float32 gradients stall above the target gap; our method gets the float32 that members write.
The members are synthetic: frames of shared difficulty, members of different sharpness that are good at different
classes, an exact duplicate, a useless member, one that is perfect on rare frames only, and exact zeros.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it ships no types

import ensemble

Array = NDArray[np.float64]
Matrix = NDArray[np.float32]
T = TypeVar("T")

SHAPES = [(8, 20_000), (32, 200_000), (32, 2_000_000), (256, 200_000)]
TARGET = 1e-6


def members(M: int, N: int, *, seed: int = 0, classes: int = 40) -> Matrix:
    """(M, N) probabilities of the true class."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, N)
    hard = generator.normal(0, 2, N).astype(np.float32)
    P = np.empty((M, N), np.float32)
    for p in P:
        skill = generator.normal(0, 1, classes).astype(np.float32)[labels]
        own = generator.standard_normal(N, dtype=np.float32) * generator.uniform(1, 2)
        p[:] = 1 / (1 + np.exp(-generator.uniform(0.8, 2.5) * (generator.normal(1.6, 0.2) + hard + skill + own)))
    P[1] = P[0]
    P[2] = generator.uniform(0, 2 / classes, N)
    P[3] = np.where(generator.random(N) < 0.003, 1, 0.02)
    P[4, generator.random(N) < 0.02] = 0
    return P


def certificate(P: Array, w: Array) -> float:
    """The gap of any weights, in float64."""
    w = np.maximum(w, 0) / np.maximum(w, 0).sum()
    u = w @ P
    return float(np.log((P @ (1 / u)).max() / P.shape[1])) if u.min() > 0 else np.inf


def slsqp(P: Array) -> tuple[Array, int]:
    """SciPy's SLSQP with the analytic gradient, at the loosest power of ten whose certified gap is the target's."""
    M, N = P.shape
    calls = 0

    def loss(w: Array) -> tuple[float, Array]:
        nonlocal calls
        calls += 1
        u = np.maximum(w @ P, 1e-300)
        return -float(np.log(u).mean()), -(P @ (1 / u)) / N

    settings: dict[str, Any] = {
        "bounds": [(0, 1)] * M,
        "constraints": {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        "options": {"ftol": 1e-11, "maxiter": 500},
    }
    found = minimize(loss, np.full(M, 1 / M), jac=True, method="SLSQP", **settings)
    return np.asarray(found.x), calls


def em(P: Array, passes: int) -> tuple[Array, int]:
    """Expectation maximisation, w_m <- w_m d_m."""
    w = np.full(len(P), 1 / len(P))
    for k in range(passes):
        d = P @ (1 / (w @ P)) / P.shape[1]
        if np.log(d.max()) <= TARGET:
            return w, k + 1
        w *= d
    return w, passes


def exponentiated_gradient(P: Array, passes: int) -> tuple[Array, int]:
    """w_m <- w_m exp(rate d_m), the rate halved whenever the loss rises."""
    w, rate, best = np.full(len(P), 1 / len(P)), 1.0, np.inf
    last, d = w, np.ones(len(P))
    for k in range(passes):
        u = w @ P
        loss = -float(np.log(u).mean())
        if loss > best:
            rate /= 2
        else:
            best, last, d, rate = loss, w, P @ (1 / u) / P.shape[1], rate * 1.5
            if np.log(d.max()) <= TARGET:
                return w, k + 1
        w = last * np.exp(rate * (d - d.max()))
        w /= w.sum()
    return last, passes


def seconds(work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of the work, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def beyond(work: Callable[[], object]) -> float:
    """Peak memory in MB that the work allocates."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def mark(holds: bool) -> str:
    """Yes or no, to print beside a bar."""
    return "yes" if holds else "NO"


def compare_fits(table: Table, M: int, N: int, *, repeats: int) -> None:
    """One shape: our method and the peers in turn."""
    P = members(M, N)
    exact = P.astype(np.float64)
    ensemble.fit_simplex_weights(P)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: ensemble.fit_simplex_weights(P)))
        theirs.append(seconds(lambda: slsqp(exact)))
    own, fit = float(np.median([s for s, _ in ours])), ours[0][1]
    slow, (w, calls) = float(np.median([s for s, _ in theirs])), theirs[0][1]
    memory = beyond(lambda: ensemble.fit_simplex_weights(P))
    limit = 4 if M == 32 else 5
    shape = f"({N:.0e}, {M})".replace("e+0", "e")
    bars = f"gap {mark(fit.gap <= TARGET)}, passes <= {limit} {mark(fit.passes <= limit)}"
    bars += f", <= 64 MB {mark(memory <= 64)}" if N > 1e6 else ""
    table.add_row(shape, "ours", f"{own:.4f}", "1", f"{fit.passes:.1f}", f"{fit.gap:.1e}", f"{memory:.0f}", bars)
    ratio = slow / own
    reached = certificate(exact, w)
    bar = f"gap {mark(reached <= TARGET)}, "
    bar += f">= 6 {mark(ratio >= 6)}" if N >= 2e5 else f">= 0.67 {mark(ratio >= 1 / 1.5)}"
    table.add_row(shape, "SLSQP", f"{slow:.4f}", f"{ratio:.1f}", f"{calls}", f"{reached:.1e}", "", bar)
    most = 2000 if N < 1e5 else 100
    for name, peer in (("EM", em), ("exp. gradient", exponentiated_gradient)):
        taken, (w, passes) = seconds(lambda peer=peer: peer(exact, most))  # type: ignore[misc]  # bound at once
        gap = certificate(exact, w)
        more = "" if gap <= TARGET else "> "
        table.add_row(shape, name, f"{taken:.3f}", f"{more}{taken / own:.0f}", f"{passes}", f"{gap:.1e}", "", "")


def outputs_of(M: int, N: int, C: int, *, seed: int = 0) -> ensemble.MemberOutputs:
    """Members with all their classes, in recordings of 100 frames."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (N,), generator=generator)
    hard = 3 + 3 * torch.randn(N, generator=generator)
    logs = torch.randn(M, N, C, generator=generator) * 1.5
    logs[:, torch.arange(N), labels] += hard + 0.3 * torch.randn(M, 1, generator=generator)
    names = tuple(f"m{m}" for m in range(M))
    classes = tuple(map(str, range(C)))
    return ensemble.MemberOutputs(logs.log_softmax(-1), names, classes, labels, torch.arange(N) // 100)


def plain_greedy(outputs: ensemble.MemberOutputs, rounds: int) -> tuple[str, ...]:
    """Greedy selection as a plain loop over members and frames."""
    p, y = outputs.probabilities.double().numpy(), outputs.require_labels().numpy()
    rows, total, picks = np.arange(len(y)), np.zeros(p.shape[1:]), []
    for k in range(rounds):
        hits = [int(((total + q).argmax(axis=1) == y).sum()) for q in p]
        level = [m for m, hit in enumerate(hits) if hit == max(hits)]
        losses = [-np.log((total + p[m])[rows, y] / (k + 1)).mean() for m in level]
        best = level[int(np.argmin(losses))]
        total += p[best]
        picks.append(outputs.members[best])
    return tuple(picks)


def autogluon_greedy(outputs: ensemble.MemberOutputs, rounds: int) -> float | None:
    """CPU seconds of AutoGluon's EnsembleSelection, or None where it is not installed.

    Its pins exclude ours, so no extra can name it: `pip install --no-deps autogluon.core autogluon.common
    autogluon.features` is enough for this class.
    """
    try:
        from autogluon.core.metrics import accuracy
        from autogluon.core.models.greedy_ensemble.ensemble_selection import EnsembleSelection
    except ImportError:
        return None
    p, y = list(outputs.probabilities.numpy()), outputs.require_labels().numpy()
    peer = EnsembleSelection(ensemble_size=rounds, problem_type="multiclass", metric=accuracy)
    return seconds(lambda: peer.fit(p, y))[0]


def compare_selection(table: Table, *, quick: bool) -> None:
    """Greedy, budget, resampling."""
    outputs = outputs_of(32, 4000 if quick else 20_000, 40)
    turns = [
        (seconds(lambda: ensemble.greedy(outputs, 50)), seconds(lambda: plain_greedy(outputs, 50))) for _ in range(5)
    ]
    own, plain = (float(np.median([turn[k][0] for turn in turns])) for k in (0, 1))
    bar = f"same picks {mark(all(a.picks == b for (_, a), (_, b) in turns))}, >= 8x {mark(plain >= 8 * own)}"
    table.add_row("greedy, 50 rounds", f"{own:.3f}", f"plain loop {plain:.3f}", f"{plain / own:.1f}", bar)
    peer = autogluon_greedy(outputs, 50)
    if peer is not None:
        table.add_row("", "", f"AutoGluon {version('autogluon.core')} {peer:.2f}", f"{peer / own:.1f}", "")
    generator = np.random.default_rng(0)
    costs = {name: float(generator.uniform(3e5, 8e6)) for name in outputs.members}
    taken, chosen = seconds(lambda: ensemble.select(outputs, 20_000_000, costs))
    bar = f"proven {mark(chosen.proven)}, < 1 s {mark(taken < 1)}"
    table.add_row("budget of 20 M, 32 members", f"{taken:.3f}", f"{chosen.nodes} nodes", "", bar)
    taken, _ = seconds(lambda: ensemble.fit.bootstrap_weights(outputs))
    table.add_row("200 refits by recording", f"{taken:.3f}", "", "", f"< 1.5 s {mark(taken < 1.5)}")


def main(quick: bool) -> None:
    """Print both tables."""
    console = Console(width=130)
    fits = Table(
        title="log-loss weights: CPU seconds to a certified gap of 1e-6, also the target of SLSQP (ftol 1e-11)"
    )
    for column in ("(N, M)", "method", "CPU s", "times ours", "passes", "gap", "MB beyond P", "bar: holds"):
        fits.add_column(column, no_wrap=True)
    rest = Table(title="selection and resampling, (N, M) = (2e4, 32), 40 classes")
    for column in ("task", "CPU s", "compared with", "times ours", "bar: holds"):
        rest.add_column(column, no_wrap=True)
    with threadpool_limits(1):
        torch.set_num_threads(1)
        for M, N in SHAPES[:2] if quick else SHAPES:
            compare_fits(fits, M, N, repeats=3 if quick else 11 if N < 1e5 else 7)
        compare_selection(rest, quick=quick)
    console.print(fits)
    console.print(rest)


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
