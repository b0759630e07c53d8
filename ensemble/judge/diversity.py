"""How members differ: pair by pair, as a crowd, and how much the difference helps.

Measures of pairs and of the crowd depend only on which answers are right, (M, N) bool: the pairs come from one matrix
product, the crowd from the histogram of how many members are right. A new measure is one function under `@pair_measure`
or `@crowd_measure`; reports, pages and commands then show it. The splits of uncertainty and loss use the probabilities.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special
from torch import Tensor

from ensemble.outputs import MemberOutputs, expect_outputs
from ensemble.outputs.arrays import floats, numbers, truths
from ensemble.rules.table import enter, members_first

Floats = NDArray[np.float64]

_BLOCK = 65_536  # frames converted to float32 at once
_CELLS = 2**22  # probabilities processed at once
_CACHED = 2**19  # of a split of uncertainty, which is four times as fast in the processor's cache
_ROUNDING = 2.0**-44  # of a difference of two entropies in float64; alike members differ by exactly zero
_LEAST_LOG = math.log(2.0**-126)  # of the smallest normal number in float32


@dataclass(frozen=True, eq=False)
class Joint:
    """How often members are right together, as numbers of frames."""

    both: Floats  #: (M, M) where both are right; the diagonal counts where one is
    frames: int  #: N

    @classmethod
    def of(cls, given: Joint | ArrayLike) -> Joint:
        """Count from (M, N) bool by matrix products, which are exact: no block reaches 2^24."""
        if isinstance(given, Joint):
            return given
        right = _two_dimensions(given)
        both = np.zeros((len(right), len(right)))
        for start in range(0, right.shape[1], _BLOCK):
            block = right[:, start : start + _BLOCK].astype(np.float32)
            both += block @ block.T
        return cls(both, right.shape[1])

    @property
    def right(self) -> Floats:
        """(M,) frames where each member is right."""
        return np.diagonal(self.both)

    @property
    def only_first(self) -> Floats:
        """(M, M) frames where the row's member is right and the column's is wrong."""
        return self.right[:, None] - self.both

    @property
    def only_second(self) -> Floats:
        """(M, M) frames where the column's member is right and the row's is wrong."""
        return self.only_first.T

    @property
    def neither(self) -> Floats:
        """(M, M) frames where both are wrong."""
        return self.frames - self.both - self.only_first - self.only_second


def _two_dimensions(given: ArrayLike) -> NDArray[np.bool_]:
    right = truths(given)
    if right.ndim != 2:
        msg = f"expected right and wrong of shape (M, N), got {right.shape}"
        raise ValueError(msg)
    return right


def crowd_histogram(given: ArrayLike) -> Floats:
    """(M + 1,) share of the frames where exactly 0, 1, ... M members are right, of (M, N) bool; NaN for no frames."""
    given = numbers(given, "right and wrong")
    if given.ndim == 1:  # such a histogram already
        return floats(given)
    right = _two_dimensions(given)
    return np.bincount(right.sum(axis=0), minlength=len(right) + 1) / (right.shape[1] or math.nan)


PAIR_MEASURES: dict[str, Callable[[Joint | ArrayLike], Floats]] = {}
CROWD_MEASURES: dict[str, Callable[[ArrayLike], float]] = {}


def _entering(table: dict[str, Callable[..., Any]], prepare: Callable[..., Any]) -> Callable[[Any], Any]:
    """A decorator that enters a measure into a table under its own name, and prepares its argument."""

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def measure(given: Any) -> Any:
            with np.errstate(invalid="ignore", divide="ignore"):
                return function(prepare(given))

        enter(function, measure, table, what="measure")
        return measure

    return decorator


pair_measure = _entering(PAIR_MEASURES, Joint.of)
"""For a function from `Joint` to a symmetric (M, M) table; the measure also takes (M, N) bool."""

crowd_measure = _entering(CROWD_MEASURES, crowd_histogram)
"""For a function from a `crowd_histogram` to a number; the measure also takes (M, N) bool."""


@pair_measure
def disagreement(joint: Joint) -> Floats:
    """Fraction of the frames where exactly one of the two is right (Skalak, 1996)."""
    return (joint.only_first + joint.only_second) / np.float64(joint.frames)


@pair_measure
def q_statistic(joint: Joint) -> Floats:
    """Yule's Q: 1 if members are right on the same frames, 0 if independent, negative if they complement each other.

    NaN where both products of counts are zero, for instance beside a member that is never wrong.
    """
    same, crossed = joint.both * joint.neither, joint.only_first * joint.only_second
    return (same - crossed) / (same + crossed)


@pair_measure
def correlation(joint: Joint) -> Floats:
    """Correlation of being right; NaN beside a member that is always or never right."""
    same, crossed = joint.both * joint.neither, joint.only_first * joint.only_second
    spread = joint.right * (joint.frames - joint.right)  # (M,)
    return (same - crossed) / np.sqrt(np.outer(spread, spread))


@pair_measure
def double_fault(joint: Joint) -> Floats:
    """Fraction of the frames where both are wrong (Giacinto and Roli, 2001)."""
    return joint.neither / np.float64(joint.frames)


@pair_measure
def kappa(joint: Joint) -> Floats:
    """Cohen's kappa of being right: agreement beyond chance; NaN where agreement by chance is certain."""
    same, crossed = joint.both * joint.neither, joint.only_first * joint.only_second
    right, wrong = joint.right, joint.frames - joint.right
    return 2 * (same - crossed) / (np.outer(right, wrong) + np.outer(wrong, right))


@pair_measure
def ratio_errors(joint: Joint) -> Floats:
    """Frames where exactly one is wrong, per frame where both are; NaN if both never are (Aksela, 2003)."""
    return (joint.only_first + joint.only_second) / np.where(joint.neither, joint.neither, np.nan)


@crowd_measure
def kohavi_wolpert(shares: Floats) -> float:
    """Variance over members of being right, averaged over frames: (M-1)/(2M) times the mean disagreement."""
    right = np.linspace(0, 1, len(shares))  # fraction of the members
    return float(shares @ (right * (1 - right)))


@crowd_measure
def entropy(shares: Floats) -> float:
    """0 if all members are right or wrong together, 1 if every frame splits them in halves.

    The non-logarithmic entropy E of Kuncheva and Whitaker, "Measures of diversity in classifier ensembles",
    Machine Learning 51, 2003.
    """
    right = np.arange(len(shares))
    return float(shares @ np.minimum(right, right[::-1])) / np.float64((len(shares) - 1) // 2)


@crowd_measure
def cunningham_entropy(shares: Floats) -> float:
    """Entropy over members of being right, in bits, averaged over frames (Cunningham and Carney, 2000)."""
    right = np.linspace(0, 1, len(shares))
    return float(shares @ (special.entr(right) + special.entr(1 - right)) / math.log(2))


@crowd_measure
def interrater_agreement(shares: Floats) -> float:
    """Fleiss' kappa of being right: 1 if all are right together, 0 as by chance (Fleiss, 1981)."""
    members = len(shares) - 1
    mean = shares @ np.linspace(0, 1, members + 1)
    return float(1 - kohavi_wolpert(shares) * members / (np.float64(members - 1) * mean * (1 - mean)))


@crowd_measure
def difficulty(shares: Floats) -> float:
    """Variance over frames of the fraction of members that are right (Hansen and Salamon, 1990)."""
    right = np.linspace(0, 1, len(shares))
    return float(shares @ np.square(right - shares @ right))


@crowd_measure
def generalised_diversity(shares: Floats) -> float:
    """1 if no two members ever fail together, 0 if they always do (Partridge and Krzanowski, 1997)."""
    members, wrong = len(shares) - 1, np.arange(len(shares))[::-1]
    one = shares @ wrong / members
    two = shares @ (wrong * (wrong - 1)) / np.float64(members * (members - 1))
    return float(1 - two / one)


@crowd_measure
def coincident_failure_diversity(shares: Floats) -> float:
    """1 if at most one member fails at a time, 0 if all fail together or none ever does."""
    if shares[-1] == 1:
        return 0.0
    members = len(shares) - 1
    return float(shares[:-1] @ np.arange(members) / np.float64(members - 1) / (1 - shares[-1]))


def plane(disagreement: ArrayLike) -> tuple[Floats, float]:
    """(M, 2) places whose distances are near the square roots of (M, M) disagreement, and the share of it they hold.

    Disagreement is the squared distance of two members' rows of right (1) and wrong (0) over N, so that this classical
    scaling is a principal component analysis of these rows. Rows of NaN count as zero. See Gower, "Some distance
    properties of latent root and vector methods used in multivariate analysis", Biometrika 53, 1966.
    """
    squares = np.nan_to_num(floats(disagreement, "disagreement"))
    count = len(squares)
    centring = np.eye(count) - 1 / max(count, 1)
    values, vectors = np.linalg.eigh(-centring @ squares @ centring / 2)
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    farthest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0, keepdims=True), axis=0)
    axes = vectors * np.sqrt(values) * np.where(farthest < 0, -1, 1)  # an axis may point either way
    places = np.zeros((count, 2))
    places[:, : min(count, 2)] = axes[:, :2]
    return places, float(values[:2].sum() / (values.sum() or 1.0))


def correct(outputs: MemberOutputs) -> NDArray[np.bool_]:
    """(M, N): where each member's top class is the true one; a member that abstains is not right.

    A `ValueError` without labels, or where a member gives NaN and no abstentions are declared.
    """
    expect_outputs(outputs)
    labels, (members, frames, classes) = outputs.require_labels(), outputs.shape
    right = np.empty((members, frames), dtype=bool)
    for block, probabilities in outputs.blocks(max(1, _CELLS // (members * classes)), nan="if declared"):
        top, choice = probabilities.max(dim=-1)  # (M, b); NaN where a member abstains
        right[:, block] = ((choice == labels[block]) & ~top.isnan()).numpy()
    return right


def unsolved(outputs: MemberOutputs) -> NDArray[np.int64]:
    """(C,) frames of each class that no member gets right, so that no choice among the members can."""
    missed = ~correct(outputs).any(axis=0)
    return np.bincount(outputs.require_labels().numpy()[missed], minlength=len(outputs.classes))


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """The entropy of the members' mean in nats per frame, (N,), split in two: total = aleatoric + epistemic.

    All are NaN on a frame where every member abstains.
    """

    aleatoric: Tensor  #: mean entropy of the members: the uncertainty that they agree on
    epistemic: Tensor  #: mutual information of class and member: what comes from disagreement; never negative

    @property
    def total(self) -> Tensor:
        """(N,) entropy of the mean."""
        return self.aleatoric + self.epistemic


def uncertainty(probabilities: Tensor) -> Uncertainty:
    """The uncertainty of the mean of (M, N, C) probabilities, split into what members agree and disagree on.

    A member that abstains on a frame, by a row of NaN, is left out there.
    See Depeweg et al., "Decomposition of uncertainty in Bayesian deep learning", ICML 2018.

    Example:
        >>> uncertainty(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])).epistemic  # ln 2
        tensor([0.6931], dtype=torch.float64)
    """
    rows = members_first(probabilities)
    pieces = torch.split(rows, max(1, _CACHED // (rows.shape[0] * rows.shape[-1])), dim=1)
    aleatoric, total = (torch.cat(part) for part in zip(*map(_entropies, pieces), strict=True))
    epistemic = total - aleatoric
    return Uncertainty(aleatoric, epistemic.masked_fill(epistemic < _ROUNDING, 0))


def _entropies(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) each: the mean of the entropies of those members that answer, and the entropy of their mean."""
    rows = probabilities.double()
    absent = rows.isnan().any(dim=-1, keepdim=True)  # (M, N, 1)
    if absent.any():
        rows = rows.masked_fill(absent, math.nan)
    of_mean = torch.special.entr(rows.nanmean(dim=0)).sum(dim=-1)
    return torch.special.entr(rows).sum(dim=-1).nanmean(dim=0), of_mean


@dataclass(frozen=True)
class Split:
    """A pool's loss as the members' mean loss minus their diversity, each a mean over frames."""

    members: float  #: mean of the members' losses
    diversity: float  #: how much the pool gains from their differences; never negative

    @property
    def pool(self) -> float:
        """The pool's loss."""
        return self.members - self.diversity


def log_loss_split(outputs: MemberOutputs) -> Split:
    """Split the log-loss of the log-linear pool (`log_mean`), in nats: the diversity is the mean KL(pool || member).

    The split is exact (Heskes, "Selecting weighting factors in logarithmic opinion pools", NIPS 1998). Logarithms are
    used as they are, however low, except that -inf (a probability of exactly zero), which would make both parts
    infinite, counts as ln 2^-126 = -87.3. Without frames, and where a member abstains, both parts are NaN.
    A `ValueError` without labels.
    """
    expect_outputs(outputs)

    def sums(logs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logs = logs.masked_fill(logs == -math.inf, _LEAST_LOG)
        mean = logs.mean(dim=0)
        pool = mean.log_softmax(dim=-1)
        loss = -logs.gather(-1, labels.expand(len(logs), -1)[..., None]).sum() / len(logs)
        return loss, (pool.exp() * (pool - mean)).sum()  # KL(pool || member) is linear in the member's logarithms

    return _split(outputs, sums)


def brier_split(outputs: MemberOutputs) -> Split:
    """Split the Brier score of the linear pool (`mean`): the diversity is the members' mean squared spread.

    The split is exact (Krogh and Vedelsby, "Neural network ensembles, cross validation, and active learning", NIPS
    1994). Without frames, and where a member abstains, both parts are NaN. A `ValueError` without labels.
    """
    expect_outputs(outputs)

    def sums(logs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = logs.exp()
        off = rows - torch.nn.functional.one_hot(labels, rows.shape[-1])
        return off.square().sum() / len(rows), (rows - rows.mean(dim=0)).square().sum() / len(rows)

    return _split(outputs, sums)


def _split(outputs: MemberOutputs, sums: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Split:
    """From sums over a block of (M, b, C) float64 logarithms and (b,) labels: the members' mean loss, and diversity."""
    labels, (members, frames, classes) = outputs.require_labels(), outputs.shape
    total, step = torch.zeros(2, dtype=torch.float64), max(1, _CELLS // (members * classes))
    for start in range(0, frames, step):
        block = slice(start, start + step)
        total += torch.stack(sums(outputs.log_probabilities[:, block].double(), labels[block]))
    return Split(*(total / frames).tolist())  # without frames 0 / 0, NaN
