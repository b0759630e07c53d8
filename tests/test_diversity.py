"""Diversity: the table's laws, hand-worked counts, slow loops and scikit-learn as oracles, exact splits."""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score
from torch import Tensor

import ensemble
from ensemble.judge import diversity
from ensemble.judge.diversity import CROWD_MEASURES, PAIR_MEASURES, Joint
from ensemble.judge.page import page

BY_HAND = np.array([[1] * 7 + [0] * 3, [1] * 4 + [0] * 3 + [1] * 2 + [0]], dtype=bool)  # 4 both, 3, 2, 1 neither


def right_and_wrong(members: int, frames: int, *, seed: int = 0) -> np.ndarray:
    """(M, N) bool of about 70 % right."""
    return np.random.default_rng(seed).random((members, frames)) < 0.7


def outputs(members: int = 4, frames: int = 300, classes: int = 5, *, seed: int = 0) -> ensemble.MemberOutputs:
    """Members that are better than chance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (frames,), generator=generator)
    hint = torch.nn.functional.one_hot(labels, classes) * 1.5
    rows = (torch.randn(members, frames, classes, generator=generator) + hint).softmax(-1)
    return ensemble.MemberOutputs.from_probabilities({f"m{i}": row for i, row in enumerate(rows)}, labels=labels)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("disagreement", 5 / 10),
        ("q_statistic", (4 * 1 - 3 * 2) / (4 * 1 + 3 * 2)),
        ("correlation", (4 * 1 - 3 * 2) / math.sqrt(7 * 3 * 6 * 4)),
        ("double_fault", 1 / 10),
        ("kappa", 2 * (4 * 1 - 3 * 2) / (7 * 4 + 6 * 3)),
        ("ratio_errors", 5 / 1),
    ],
)
def test_pair_measures_by_hand(name: str, expected: float) -> None:
    """Kuncheva and Whitaker's formulas on counts of 4, 3, 2 and 1 frames."""
    np.testing.assert_allclose(PAIR_MEASURES[name](BY_HAND)[0, 1], expected, rtol=1e-12)


def test_every_pair_measure_has_a_case_by_hand() -> None:
    """A new measure needs its line above."""
    marks = test_pair_measures_by_hand.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {name for name, _ in marks} == set(PAIR_MEASURES)


def pair_is_symmetric_and_follows_the_members(name: str) -> None:
    """The table is symmetric, and permuting members permutes it."""
    right = right_and_wrong(6, 500)
    table = PAIR_MEASURES[name](right)
    order = [4, 0, 5, 2, 1, 3]
    np.testing.assert_allclose(table, table.T, rtol=1e-12)
    np.testing.assert_allclose(PAIR_MEASURES[name](right[order]), table[np.ix_(order, order)], rtol=1e-12)


def pair_equals_the_loop(name: str) -> None:
    """Two members at a time, counted frame by frame, give the same figure as the matrix product."""
    right = right_and_wrong(5, 300)
    table = PAIR_MEASURES[name](right)
    for i in range(5):
        for j in range(5):
            np.testing.assert_allclose(PAIR_MEASURES[name](right[[i, j]])[0, 1], table[i, j], rtol=1e-12)


def pair_without_frames_is_nan(name: str) -> None:
    """Nothing is known, and nothing fails."""
    assert np.isnan(PAIR_MEASURES[name](right_and_wrong(3, 0))).all()


def crowd_ignores_the_order_of_members(name: str) -> None:
    """It does not matter who is right, only how many."""
    right = right_and_wrong(5, 200)
    assert CROWD_MEASURES[name](right) == CROWD_MEASURES[name](right[::-1])


PAIR_LAWS = [pair_is_symmetric_and_follows_the_members, pair_equals_the_loop, pair_without_frames_is_nan]
CROWD_LAWS = [crowd_ignores_the_order_of_members]


@pytest.mark.parametrize("law", PAIR_LAWS)
@pytest.mark.parametrize("name", PAIR_MEASURES)
def test_pair_measures_obey(law: Callable[[str], None], name: str) -> None:
    """Every law, for every measure of the table."""
    law(name)


@pytest.mark.parametrize("law", CROWD_LAWS)
@pytest.mark.parametrize("name", CROWD_MEASURES)
def test_crowd_measures_obey(law: Callable[[str], None], name: str) -> None:
    """Every law, for every measure of the table."""
    law(name)


MINE = """
from ensemble.judge import crowd_measure, pair_measure

@pair_measure
def both_right(joint):
    return joint.both / (joint.frames or float("nan"))

@crowd_measure
def unanimous(shares):
    return shares[0] + shares[-1]
"""


def test_a_new_measure_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file of one's own: it obeys the laws, and the report and its page show it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_measures.py").write_text(MINE)
    try:
        importlib.import_module("my_measures")
        for law in PAIR_LAWS:
            law("both_right")
        for law in CROWD_LAWS:
            law("unanimous")
        report = ensemble.evaluate(outputs(), {"mean": ensemble.mean})
        right = diversity.correct(outputs())
        assert report.pairs["both_right"][0] == (right[0] & right[1]).mean()
        assert "both right" in page(report)
        assert CROWD_MEASURES["unanimous"](BY_HAND) == 5 / 10
    finally:
        PAIR_MEASURES.pop("both_right", None)
        CROWD_MEASURES.pop("unanimous", None)
        sys.modules.pop("my_measures", None)


def test_a_taken_name_is_refused() -> None:
    """A measure of another module is not replaced."""

    def kappa(joint: Joint) -> np.ndarray:
        return joint.both

    with pytest.raises(ValueError, match=r"name for a measure, got 'kappa', which ensemble\.judge\.diversity has"):
        diversity.pair_measure(kappa)


def test_kappa_and_correlation_agree_with_libraries() -> None:
    """scikit-learn's kappa and NumPy's correlation of being right."""
    right = right_and_wrong(4, 300)
    np.testing.assert_allclose(diversity.correlation(right), np.corrcoef(right), rtol=1e-9)
    for i, j in [(0, 1), (1, 3), (2, 0)]:
        np.testing.assert_allclose(diversity.kappa(right)[i, j], cohen_kappa_score(right[i], right[j]), rtol=1e-9)


def test_counts_stay_whole_over_many_blocks() -> None:
    """More frames than one block holds, counted exactly."""
    right = right_and_wrong(3, 200_001)
    joint = Joint.of(right)
    np.testing.assert_array_equal(joint.both, [[(a & b).sum() for b in right] for a in right])
    np.testing.assert_array_equal(joint.both + joint.only_first + joint.only_second + joint.neither, 200_001)


def test_undefined_pair_figures_are_nan_not_errors() -> None:
    """Beside a member that is never wrong nothing correlates."""
    right = np.array([[1, 1, 1], [1, 0, 1]], dtype=bool)
    assert np.isnan(diversity.q_statistic(right)[0, 1])
    assert np.isnan(diversity.correlation(right)[0, 1])


def crowd_by_loop(right: np.ndarray) -> dict[str, float]:
    """Every crowd measure from its published formula, frame by frame."""
    L, N = right.shape
    counts = [int(column.sum()) for column in right.T]
    p = sum(counts) / (L * N)
    a = [count / L for count in counts]

    def bits(share: float) -> float:
        return 0.0 if share in (0, 1) else -share * math.log2(share) - (1 - share) * math.log2(1 - share)

    fail = [sum(L - count == i for count in counts) / N for i in range(L + 1)]
    one = sum(i / L * fail[i] for i in range(1, L + 1))
    two = sum(i * (i - 1) / (L * (L - 1)) * fail[i] for i in range(1, L + 1))
    return {
        "kohavi_wolpert": sum(count * (L - count) for count in counts) / (N * L * L),
        "entropy": sum(min(count, L - count) / (L - math.ceil(L / 2)) for count in counts) / N,
        "cunningham_entropy": sum(map(bits, a)) / N,
        "interrater_agreement": 1 - sum(count * (L - count) for count in counts) / L / (N * (L - 1) * p * (1 - p)),
        "difficulty": float(np.var(a)),
        "generalised_diversity": 1 - two / one,
        "coincident_failure_diversity": sum((L - i) / (L - 1) * fail[i] for i in range(1, L + 1)) / (1 - fail[0]),
    }


@pytest.mark.parametrize("members", [2, 3, 6, 7])
def test_crowd_measures_equal_their_published_formulas(members: int) -> None:
    """The histogram loses nothing; every measure of the table has its formula here."""
    right = right_and_wrong(members, 400)
    expected = crowd_by_loop(right)
    assert set(expected) == set(CROWD_MEASURES)
    for name, value in expected.items():
        np.testing.assert_allclose(CROWD_MEASURES[name](right), value, rtol=1e-10, err_msg=name)


@settings(max_examples=50, deadline=None)
@given(members=st.integers(2, 7), frames=st.integers(1, 60), seed=st.integers(0, 1000))
def test_crowd_and_pairs_agree(members: int, frames: int, seed: int) -> None:
    """Kohavi-Wolpert variance is (M - 1) / (2M) of the mean pairwise disagreement, always."""
    right = right_and_wrong(members, frames, seed=seed)
    pairs = diversity.disagreement(right)[np.triu_indices(members, k=1)]
    expected = (members - 1) / (2 * members) * pairs.mean()
    np.testing.assert_allclose(diversity.kohavi_wolpert(right), expected, rtol=1e-9, atol=1e-12)


def test_extremes_of_the_crowd() -> None:
    """Copies have no diversity; members that never fail together have all of it."""
    copies = np.repeat(right_and_wrong(1, 100), 4, axis=0)
    apart = ~np.eye(4, dtype=bool)
    assert diversity.entropy(copies) == diversity.kohavi_wolpert(copies) == 0
    assert diversity.interrater_agreement(copies) == pytest.approx(1)
    assert diversity.generalised_diversity(copies) == pytest.approx(0)
    assert diversity.coincident_failure_diversity(copies) == pytest.approx(0)
    assert diversity.generalised_diversity(apart) == diversity.coincident_failure_diversity(apart) == 1
    assert diversity.coincident_failure_diversity(np.ones((3, 5), dtype=bool)) == 0


def test_correct_and_unsolved_equal_the_loop() -> None:
    """Where top classes are right, and which classes have frames that no member gets right."""
    o = outputs(2, 200, 3)
    labels = o.require_labels()
    right = o.probabilities.argmax(-1) == labels
    np.testing.assert_array_equal(diversity.correct(o), right.numpy())
    missed = [int(((labels == c) & ~right.any(0)).sum()) for c in range(3)]
    assert diversity.unsolved(o).tolist() == missed
    assert sum(missed) > 0


def test_opposed_certain_members_differ_by_ln_two() -> None:
    """All of the entropy of the mean is disagreement."""
    split = diversity.uncertainty(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    assert split.aleatoric.item() == 0
    assert split.epistemic.item() == pytest.approx(math.log(2), rel=1e-12)


def test_uncertainty_adds_up_and_is_never_negative() -> None:
    """Total = aleatoric + epistemic = entropy of the mean; alike members leave no epistemic part."""
    p: Tensor = outputs().probabilities
    split = diversity.uncertainty(p)
    mean = p.double().mean(0)
    torch.testing.assert_close(split.total, -(mean * mean.log()).sum(-1), rtol=1e-9, atol=0)
    assert (split.epistemic > 0).all()
    alike = diversity.uncertainty(p[:1].expand(3, -1, -1)).epistemic
    assert (alike >= 0).all()
    assert (alike < 1e-12).all()


def test_uncertainty_leaves_out_members_that_abstain() -> None:
    """Where one answers it is all of the mean; where none does, nothing is known. Equal rows differ by exactly zero."""
    p = outputs().probabilities[:, :2].clone()
    p[1:, 0] = math.nan
    p[:, 1, 0] = math.nan
    split = diversity.uncertainty(p)
    assert split.total[0].item() == pytest.approx(torch.special.entr(p[0, 0].double()).sum().item(), rel=1e-12)
    assert split.epistemic[0] == 0
    assert split.total[1].isnan()
    assert split.epistemic[1].isnan()
    assert not diversity.uncertainty(outputs().probabilities[:1].expand(3, -1, -1)).epistemic.any()


def test_log_loss_splits_exactly() -> None:
    """Mean loss of the members minus mean KL(pool || member) is the log-linear pool's loss."""
    o = outputs()
    labels, p = o.require_labels(), o.log_probabilities.double().exp()
    pool = ensemble.log_mean(p)
    kl = (pool * (pool.log() - p.log())).sum(-1).mean()
    split = diversity.log_loss_split(o)
    assert split.diversity == pytest.approx(kl.item(), rel=1e-9)
    assert split.pool == pytest.approx(-pool[torch.arange(300), labels].log().mean().item(), rel=1e-6)


def test_finite_logarithms_count_as_they_are() -> None:
    """Beyond what float32 holds as a probability: the truth, 200 and 150 nats off on the first frame."""
    logits = torch.tensor([[[0.0, -200.0], [1.0, 0.0]], [[0.0, -150.0], [0.0, 1.0]]], dtype=torch.float64)
    o = ensemble.MemberOutputs(logits.log_softmax(-1), ("a", "b"), ("0", "1"), labels=torch.tensor([1, 0]))
    split = diversity.log_loss_split(o)
    easy = (math.log1p(math.exp(-1)) + math.log1p(math.e)) / 2  # the second frame, each member's loss
    assert split.members == pytest.approx((175 + easy) / 2, rel=1e-12)
    assert split.pool == pytest.approx((175 + math.log(2)) / 2, rel=1e-12)


def test_brier_score_splits_exactly() -> None:
    """Mean score of the members minus their squared spread is the linear pool's score."""
    o = outputs()
    truth = torch.nn.functional.one_hot(o.require_labels(), 5)
    score = (o.probabilities.double().mean(0) - truth).square().sum(-1).mean()
    assert diversity.brier_split(o).pool == pytest.approx(score.item(), rel=1e-9)


def test_certain_members_keep_the_split_finite() -> None:
    """Exact zeros do not make it infinite or NaN."""
    p = torch.eye(2)[torch.tensor([[0, 1], [1, 1]])]
    o = ensemble.MemberOutputs.from_probabilities({"a": p[0], "b": p[1]}, labels=[0, 1])
    split = diversity.log_loss_split(o)
    assert math.isfinite(split.members)
    assert math.isfinite(split.diversity)
