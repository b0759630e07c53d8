"""`Cascade`: exact ones give the class of the rule on every frame; others lose what was accepted; who is asked."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_cuda import PretendedCuda
from torch import Tensor, nn

import ensemble
import zoo
from ensemble.fit import fit_cascade, judge_cascade
from ensemble.outputs import Cost
from ensemble.rules import BayesVote, Cascade, Chain, Stacked, Temperature, WeightedMean
from ensemble.rules.cascade import known
from ensemble.rules.table import declared, rule_from_json, rule_to_json

CLASSES = 4


def bayes(members: int, seed: int = 0) -> BayesVote:
    """Members that are more often right than not."""
    generator = torch.Generator().manual_seed(seed)
    tables = (torch.randn(members, CLASSES, CLASSES, generator=generator) + 2 * torch.eye(CLASSES)).log_softmax(1)
    return BayesVote(tables.double().numpy(), np.log([0.1, 0.2, 0.3, 0.4]))  # type: ignore[arg-type]


def weights(members: int, seed: int = 0) -> WeightedMean:
    """Some of them zero."""
    drawn = torch.rand(members, generator=torch.Generator().manual_seed(seed)) ** 3
    return WeightedMean((drawn * (drawn > 0.05) + 1e-3 * (torch.arange(members) == 0)).tolist())


#: rule of so many members -> those that an exact cascade takes
EXACT: dict[str, Callable[[int], ensemble.Rule]] = {
    "mean": lambda members: ensemble.mean,
    "majority": lambda members: ensemble.majority,
    "weighted": weights,
    "calibrated": lambda members: Chain((weights(members), Temperature(3.0))),
    "bayes_vote": bayes,
}
#: names of rules that have no exact cascade
OTHERS = sorted(set(ensemble.list_rules()) - set(EXACT))


def rows_of(kind: str, members: int, frames: int, seed: int) -> Tensor:
    """(M, N, C) probabilities, float32: of members that agree or not, or made to tie, exactly or by the last bit."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    common = draw(frames, CLASSES) * {"agree": 6, "differ": 1}.get(kind, 2)
    p = (draw(members, frames, CLASSES) * 2 + common).softmax(-1)
    if kind == "tied":  # few values, so that members and sums tie
        p = torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4, [1.0, 0, 0, 0], [0, 0.5, 0, 0.5]])[
            torch.randint(4, (members, frames), generator=generator)
        ]
        turns = torch.randint(CLASSES, (members, frames, 1), generator=generator)
        p = p.gather(-1, (torch.arange(CLASSES) + turns) % CLASSES)
    if kind == "nearly tied":  # two classes exchanged in half of the members, and moved by the last bits
        p[1::2] = p[: members // 2 * 2 : 2][..., [1, 0, 2, 3]] if members > 1 else p[1::2]
        p = p * (1 + torch.randint(-2, 3, p.shape, generator=generator) * 2.0**-23)
    return p


KINDS = ["agree", "differ", "tied", "nearly tied"]


def classes_of(rule: ensemble.Rule, p: Tensor) -> Tensor:
    """(N,)."""
    return rule(p).argmax(dim=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=6, deadline=None)
@given(members=st.integers(1, 12), seed=st.integers(0, 1000))
def test_an_exact_cascade_gives_the_class_of_the_rule(name: str, kind: str, members: int, seed: int) -> None:
    """On every frame, from probabilities and from their logarithms, in every order; rows are distributions."""
    p, rule = rows_of(kind, members, 200, seed), EXACT[name](members)
    order, used = np.random.default_rng(seed).permutation(members).tolist(), declared(rule).used
    for cascade in (Cascade(rule), Cascade(rule, tuple(place for place in order if used is None or place in used))):
        torch.testing.assert_close(classes_of(cascade, p), classes_of(rule, p))
        logs = p.log()
        torch.testing.assert_close(cascade.of_logs(logs).argmax(-1), declared(rule).of_logs(logs).argmax(-1))
        torch.testing.assert_close(cascade(p).sum(-1), torch.ones(200), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", EXACT)
def test_rounding_to_other_types_changes_no_class(name: str, dtype: torch.dtype) -> None:
    """A lead within the rounding of a type is none."""
    for kind in KINDS:
        p, rule = rows_of(kind, 7, 300, 1).to(dtype), EXACT[name](7)
        torch.testing.assert_close(classes_of(Cascade(rule), p), classes_of(rule, p))


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=8, deadline=None)
@given(members=st.integers(2, 9), seed=st.integers(0, 1000))
def test_no_answer_of_the_others_could_change_the_class(name: str, members: int, seed: int) -> None:
    """Members that were not asked about a frame may answer anything, and those asked may be off by the tolerance."""
    p, rule, tolerance = rows_of("differ", members, 60, seed), EXACT[name](members), 1e-3
    cascade, generator = Cascade(rule), torch.Generator().manual_seed(seed)
    rows, counts = cascade.ask(known(p.log()), members, tolerance=tolerance)
    place = torch.empty(members, dtype=torch.int64)  # of each member in the order
    order = cascade.asked_in(members)
    place[order + [m for m in range(members) if m not in order]] = torch.arange(members)
    silent = place[:, None] >= counts  # (M, N)
    early = counts < len(order)
    for other in range(CLASSES):  # all against the class, in favour of one other
        against = nn.functional.one_hot(torch.full((members, 60), other), CLASSES).float()
        moved = p + tolerance * (2 * torch.rand(p.shape, generator=generator) - 1).sign()
        torch.testing.assert_close(
            classes_of(rule, torch.where(silent[..., None], against, moved.clamp(min=1e-9)))[early],
            rows.argmax(-1)[early],
        )


@pytest.mark.parametrize("name", EXACT)
def test_where_nothing_can_be_skipped_all_are_asked(name: str) -> None:
    """Members that know nothing, or members in equal camps."""
    rule, camps = EXACT[name](6), torch.eye(CLASSES)[[0, 1] * 3][:, None].expand(6, 30, CLASSES)
    for p in (torch.full((6, 30, CLASSES), 1 / CLASSES), *([camps] if name in ("mean", "majority") else [])):
        cascade = Cascade(rule)
        assert cascade.ask(known(p.log()), 6)[1].tolist() == [len(cascade.asked_in(6))] * 30


def test_by_hand() -> None:
    """Five votes: three alike decide, a tie of two leads to the end. Weights .6, .3, .1: the first decides by .8."""
    votes = torch.eye(3)[torch.tensor([[0, 0], [0, 1], [0, 0], [1, 1], [2, 1]])]  # (5, 2, 3)
    cascade = Cascade(ensemble.majority)
    assert [len(places) for places, _ in cascade.stages(5)] == [3, 4, 5]
    rows, counts = cascade.ask(known(votes.log()), 5)
    assert counts.tolist() == [3, 5]
    assert rows.argmax(-1).tolist() == [0, 1]
    p = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.55, 0.45]]] * 3)
    weighted = Cascade(WeightedMean([1, 6, 3]))
    assert weighted.asked_in(3) == [1, 2, 0]
    rows, counts = weighted.ask(known(p.log()), 3)
    assert counts.tolist() == [1, 2, 3]  # leads of .48, .36, .06 against .4; .54, .09 against .1
    torch.testing.assert_close(rows, p[0])


def test_a_lead_that_is_made_up_for_exactly_does_not_decide() -> None:
    """The second of two members can make up for all that the first says, and a tie goes to the first class."""
    p = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    rows, counts = Cascade(ensemble.mean).ask(known(p.log()), 2)
    assert counts.tolist() == [2]
    assert rows.argmax(-1).tolist() == [0]


class Asked:
    """Answers that remember who was asked about which frames."""

    def __init__(self, p: Tensor) -> None:
        self.answers, self.calls = known(p.log()), list[tuple[list[int], list[int] | None]]()

    def __call__(self, positions: Sequence[int], frames: Tensor | None) -> Tensor:
        """(m, n, C)."""
        self.calls.append(([*positions], None if frames is None else frames.tolist()))
        return self.answers(positions, frames)


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_members_are_asked_in_order_about_what_is_not_settled(threshold: float | None) -> None:
    """Each once, further ones about fewer and fewer frames; the counts say the same."""
    p, order = rows_of("agree", 8, 100, 0), (3, 1, 7, 0, 2, 6, 5, 4)
    asked = Asked(p)
    counts = Cascade(ensemble.mean, order, threshold).ask(asked, 8)[1]
    assert [place for places, _ in asked.calls for place in places] == list(order)[: int(counts.max())]
    assert asked.calls[0][1] is None
    done = len(asked.calls[0][0])
    for places, frames in asked.calls[1:]:
        assert frames == (counts > done).nonzero().flatten().tolist()
        done += len(places)
    assert 1 <= counts.min() < counts.max() <= 8


@pytest.mark.parametrize("name", ["mean", "majority", "weighted"])
@settings(max_examples=8, deadline=None)
@given(members=st.integers(1, 9), seed=st.integers(0, 1000))
def test_members_may_abstain(name: str, members: int, seed: int) -> None:
    """As `abstaining` of the rule; a member that abstains may have been the one that settles, and all may."""
    p, generator = rows_of("agree", members, 200, seed), torch.Generator().manual_seed(seed)
    absent = torch.rand(members, 200, generator=generator) < 0.4
    absent[:, 0] = True
    p, rule = p.masked_fill(absent[..., None], torch.nan), EXACT[name](members)
    expected = ensemble.abstaining(rule)(p)
    cascade = ensemble.abstaining(Cascade(rule))
    torch.testing.assert_close(cascade(p).argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(Cascade(ensemble.abstaining(rule))(p), cascade(p))
    assert cascade(p).isfinite().all()


@pytest.mark.parametrize("name", OTHERS)
def test_rules_that_any_member_can_change_have_no_exact_cascade(name: str) -> None:
    """One line that says so, and the way out; with a threshold they are taken."""
    with pytest.raises(ValueError, match=f"largest sum over members.* got {name}: any member .* give a threshold"):
        Cascade(ensemble.get_rule(name))
    p = rows_of("agree", 5, 50, 0)
    torch.testing.assert_close(Cascade(ensemble.get_rule(name), threshold=1.0)(p), ensemble.get_rule(name)(p))


def test_what_makes_no_cascade_is_refused() -> None:
    """Stacking and members that abstain from Bayes votes have no sums; thresholds, orders, members, sizes."""
    stacked = Stacked(np.ones((3, 2, 3)), np.zeros(3))  # type: ignore[arg-type]
    for rule in (stacked, ensemble.abstaining(bayes(3)), Chain((Temperature((2.0, 1.0)), ensemble.mean))):
        with pytest.raises(ValueError, match="any member can change its class to the last"):
            Cascade(rule)
    with pytest.raises(ValueError, match=r"a threshold from 0 to 1, or None for an exact cascade, got 1\.5"):
        Cascade(ensemble.mean, threshold=1.5)
    outputs = ensemble.MemberOutputs.from_probabilities({"one": [[0.9, 0.1]]}, labels=[0])
    with pytest.raises(TypeError, match="expected a Cascade, as fit_cascade makes it, got function"):
        judge_cascade(outputs, ensemble.mean)  # type: ignore[arg-type]
    assert Cascade(ensemble.mean, np.array([2, 1, 0])) == Cascade(ensemble.mean, (2, 1, 0))  # type: ignore[arg-type]
    for order in ((0, 0), (-1, 0), ("a",)):
        with pytest.raises(ValueError, match="the order of the members as distinct positions, got"):
            Cascade(ensemble.mean, order)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected an order of the members at \[0, 1, 2\], got \[1, 0\]"):
        Cascade(ensemble.mean, (1, 0))(rows_of("agree", 3, 2, 0))
    with pytest.raises(ValueError, match="probabilities of 2 members, as many as the rule has, got 3"):
        Cascade(WeightedMean([1, 1]))(rows_of("agree", 3, 2, 0))
    with pytest.raises(ValueError, match=r"members of the rule in its order, \['a', 'b'\], got \['b', 'a'\]"):
        Cascade(WeightedMean([1, 1], members=("a", "b")), members=("b", "a"))


def test_a_rule_of_ones_own_declares_its_sums() -> None:
    """Here by the squares of the probabilities."""
    from ensemble.rules import RULES, Sums

    def sums(members: int) -> Sums:
        return Sums(lambda position, rows: rows.square(), torch.ones(members, 1, 1, dtype=torch.float64))

    @partial(ensemble.rule, sums=sums)
    def energy(probabilities: Tensor) -> Tensor:
        total = probabilities.square().sum(dim=0)
        return total / total.sum(dim=-1, keepdim=True)

    try:
        p = rows_of("agree", 7, 200, 0)
        rows, counts = Cascade(energy).ask(known(p.log()), 7)
        torch.testing.assert_close(rows.argmax(-1), energy(p).argmax(-1))
        assert counts.double().mean() < 6
    finally:
        del RULES["energy"]


def labelled(members: int = 5, frames: int = 600, seed: int = 0, recordings: int = 20) -> ensemble.MemberOutputs:
    """Outputs of members that agree on the easy frames."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(CLASSES, (frames,), generator=generator)
    easy = 6 * torch.rand(frames, 1, generator=generator)
    logits = torch.randn(members, frames, CLASSES, generator=generator) * 1.5
    logits += easy * nn.functional.one_hot(truth, CLASSES)
    groups = torch.arange(frames) * recordings // frames
    return ensemble.MemberOutputs(logits.log_softmax(-1), tuple("abcdefgh"[:members]), tuple("wxyz"), truth, groups)


def accuracy(rule: ensemble.Rule, outputs: ensemble.MemberOutputs) -> float:
    """Of a rule."""
    return float((classes_of(rule, outputs.probabilities) == outputs.labels).double().mean())


@pytest.mark.parametrize("name", [*EXACT, "maximum", "log_mean"])
def test_a_fitted_cascade_loses_no_more_than_was_accepted(name: str) -> None:
    """What is told is what a slow loop counts; the interval's upper end is within the accepted loss; more buys more."""
    outputs = labelled()
    rule = EXACT[name](5) if name in EXACT else ensemble.get_rule(name)
    shares = []
    for loss in (0.0, 0.005, 0.02, 0.2):
        found = fit_cascade(outputs, rule, loss=loss)
        assert found.loss.high <= loss or found.rule.threshold == 1
        assert found.loss.estimate == pytest.approx(accuracy(rule, outputs) - accuracy(found.rule, outputs))
        rows, counts = found.rule.ask(known(outputs.log_probabilities), 5)
        whole = classes_of(rule, outputs.probabilities)
        assert found.changed == pytest.approx(float((rows.argmax(-1) != whole).double().mean()))
        assert found.share == pytest.approx(float(counts.double().mean()) / len(found.rule.asked_in(5)))
        shares.append(found.share)
        assert judge_cascade(outputs, found.rule) == found
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.6


def test_an_exact_cascade_needs_no_threshold_and_loses_nothing() -> None:
    """The shares of the members are told one by one: of a member without weight none, of the first all."""
    found = fit_cascade(labelled(), WeightedMean([1, 0, 4, 2, 1]), loss=None)
    assert (found.loss.estimate, found.loss.high, found.changed, found.rule.threshold) == (0, 0, 0, None)
    assert found.asked[1] == 0
    assert found.asked[2] == 1
    assert found.rule.order[:2] == (2, 3)
    assert found.share == pytest.approx(sum(found.asked) / 4)
    assert 0.3 < found.share < 0.9


def costs_of(**alone: float) -> dict[str, Cost]:
    """Member -> its microseconds alone; those among others do not matter."""
    return {name: Cost(1.0, value) for name, value in alone.items()}


@pytest.mark.parametrize("loss", [None, 0.1])
def test_a_cascade_of_one_member_asks_it(loss: float | None) -> None:
    """There is nobody else to ask, and no threshold to look for."""
    outputs = ensemble.MemberOutputs.from_probabilities({"one": [[0.9, 0.1], [0.2, 0.8]]}, labels=[0, 1], groups=[0, 1])
    fitted = fit_cascade(outputs, ensemble.mean, loss=loss)
    assert fitted.asked == (1.0,)
    assert fitted.loss.estimate == 0
    assert torch.equal(fitted.rule(outputs.probabilities), outputs.probabilities[0])


def test_the_order_is_by_weight_per_cost_then_by_accuracy() -> None:
    """A cost that is missing, or none, is refused."""
    outputs = labelled(3)
    best = np.argsort([-accuracy(WeightedMean(row), outputs) for row in np.eye(3)])
    assert fit_cascade(outputs, ensemble.mean).rule.order == tuple(best)
    by_cost = fit_cascade(outputs, WeightedMean([3, 2, 1]), costs=costs_of(a=6, b=1, c=0.9))
    assert by_cost.rule.order == (1, 2, 0)
    for costs, bad in ((costs_of(a=1, b=1), "c"), (costs_of(a=1, b=0, c=np.nan), "b', 'c")):
        with pytest.raises(ValueError, match=rf"positive time of each member alone in costs, got none of \['{bad}'\]"):
            fit_cascade(outputs, ensemble.mean, costs=costs)


def test_no_loss_on_few_frames_is_no_certainty() -> None:
    """Members that all say the same lose nothing when one is asked; it takes 3 / loss frames to show it."""
    for frames, asked in ((1000, 5), (4000, 1)):
        one = labelled(1, frames)
        alike = one.log_probabilities.expand(5, -1, -1)
        outputs = ensemble.MemberOutputs(alike, tuple("abcde"), one.classes, one.labels, one.groups)
        found = fit_cascade(outputs, ensemble.mean, loss=0.001)
        assert found.loss.high == 0
        assert (found.share * 5 == pytest.approx(asked)) if asked == 5 else found.share < 0.5


def test_a_cascade_that_cannot_be_fitted_is_refused() -> None:
    """One recording has no interval; a loss is a fraction; labels are needed."""
    with pytest.raises(ValueError, match="two recordings or more for the interval of a loss, got one"):
        fit_cascade(labelled(recordings=1), ensemble.mean)
    assert fit_cascade(labelled(recordings=1), ensemble.mean, loss=None).share < 1
    with pytest.raises(ValueError, match=r"accepted loss of accuracy, such as 0.001, or None .* got -0.1"):
        fit_cascade(labelled(), ensemble.mean, loss=-0.1)
    with pytest.raises(ValueError, match="outputs with labels"):
        fit_cascade(ensemble.MemberOutputs(torch.zeros(2, 0, 2), ("a", "b"), ("x", "y")), ensemble.mean)


def test_a_cascade_is_a_fitted_rule() -> None:
    """It goes through JSON, finds its members by name, and a report says where it was fitted."""
    outputs = labelled()
    rule = fit_cascade(outputs, ensemble.fit_weights(outputs).rule).rule
    back = rule_from_json(json.loads(json.dumps(rule_to_json(rule))))
    assert back == rule
    assert hash(back) == hash(rule)
    assert rule.members == outputs.members
    turned = outputs.subset([*reversed(outputs.members)])
    aligned = ensemble.rules.rule_for(rule, turned.members)
    torch.testing.assert_close(aligned(turned.probabilities), rule(outputs.probabilities))
    assert aligned.sparing
    report = ensemble.evaluate(outputs, {"cascade": rule, "exact": Cascade(ensemble.mean)})
    assert any("fitted" in note and "cascade" in note for note in report.notes)
    assert declared(Cascade(ensemble.mean)).fingerprints == ()
    exact = fit_cascade(outputs, ensemble.mean, loss=None).rule
    assert rule_from_json(rule_to_json(exact)) == exact


def test_outputs_that_abstain_have_cascades() -> None:
    """Fitted and judged as `abstaining` combines."""
    outputs = labelled()
    logs = outputs.log_probabilities.masked_fill((torch.arange(600) % 7 == 0)[:, None], torch.nan)
    logs[1:, :, :] = outputs.log_probabilities[1:]
    held = ensemble.MemberOutputs(logs, outputs.members, outputs.classes, outputs.labels, outputs.groups, abstain=True)
    for loss in (None, 0.01):
        found = fit_cascade(held, ensemble.mean, loss=loss)
        assert found.loss.high <= 0.01
        assert found.share < 0.9


def similar(count: int, contexts: Sequence[int] = (1,)) -> tuple[dict[str, nn.Module], dict[str, zoo.Spec]]:
    """Models that often agree, of one spec for each context."""
    models, specs = {}, {}
    torch.manual_seed(0)
    for seed in range(count):
        options = {"width": 8, "depth": 1}
        spec = zoo.Spec("cylinder", features=6, context=contexts[seed % len(contexts)], classes=4, options=options)
        model = zoo.build(spec, seed=0).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
            [*model.parameters()][-2].mul_(8)
        models[f"m{seed}"], specs[f"m{seed}"] = model, spec
    return models, specs


def members_of(count: int = 7, **options: Any) -> ensemble.Members:
    """These as members."""
    models, specs = similar(count, options.pop("contexts", (1, 0, 1)))
    return ensemble.from_modules(models, classes="abcd", specs=specs, **options)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_an_ensemble_runs_only_the_members_that_are_asked(
    frames: zoo.FrameSet, threshold: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as the cascade of collected outputs; what is not settled is gathered from several steps."""
    members, ran = members_of(), list[tuple[int, int]]()
    rule = Cascade(ensemble.mean, threshold=threshold)
    expected, found = rule.ask(known(ensemble.collect(members, frames).log_probabilities), 7)
    write = ensemble.Members.write

    def recorded(self: ensemble.Members, batch: Any, widest: Any, out: Tensor) -> None:
        ran.append((len(self), batch.count))
        write(self, batch, widest, out)

    monkeypatch.setattr(ensemble.Members, "write", recorded)
    monkeypatch.setattr("ensemble.run.members._STEP", 16)
    members = members_of()
    rows, counts = ensemble.Ensemble(members, rule).ask(frames)
    np.testing.assert_allclose(rows, expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(counts, found.numpy())
    assert sum(asked * count for asked, count in ran) == counts.sum()
    assert counts.sum() < 7 * len(frames)
    assert sum(0 < count < 16 for _, count in ran) <= len(rule.stages(7))  # all others are full steps
    whole = ensemble.Ensemble(members, ensemble.mean)
    assert set(whole.ask(frames)[1].tolist()) == {7}
    if threshold is None:
        np.testing.assert_array_equal(ensemble.Ensemble(members, rule).predict(frames), whole.predict(frames))


def test_inputs_of_every_form_are_gathered(frames: zoo.FrameSet) -> None:
    """Windows, a mapping of inputs for each member, members outside torch; no frames at all."""
    members = members_of(contexts=(1,))
    x = zoo.windows(frames, torch.arange(len(frames)), 1)
    rule = Cascade(ensemble.majority)
    expected = ensemble.Ensemble(members, ensemble.majority).predict(x)
    quick = ensemble.Ensemble(members, rule)
    np.testing.assert_array_equal(quick.predict(x), expected)
    np.testing.assert_array_equal(quick.predict(dict.fromkeys(members.names, x)), expected)
    assert quick.predict_proba(x[:0]).shape == (0, 4)
    probabilities = {name: partial(_answer, module) for name, module in similar(7)[0].items()}
    outside = ensemble.from_callables(probabilities, classes="abcd", returns="probabilities")
    np.testing.assert_array_equal(ensemble.Ensemble(outside, rule).predict(x.numpy()), expected)


def _answer(module: nn.Module, x: Any) -> Any:
    with torch.inference_mode():
        return module(torch.as_tensor(np.asarray(x))).softmax(-1).numpy()


def test_what_a_narrower_type_may_move_does_not_settle(monkeypatch: pytest.MonkeyPatch, frames: zoo.FrameSet) -> None:
    """Members run in `auto` precision need the larger lead."""
    members = members_of()
    few = ensemble.Ensemble(members, Cascade(ensemble.mean)).ask(frames)[1].mean()
    auto = members_of(precision="auto")
    assert (members.tolerance, auto.tolerance) == (1e-5, 1e-2)
    assert ensemble.Ensemble(auto, Cascade(ensemble.mean)).ask(frames)[1].mean() > few


def test_a_cascade_is_kept_in_a_registry(tmp_path: Path, frames: zoo.FrameSet) -> None:
    """And found there as it was."""
    registry, (models, specs) = zoo.Registry(tmp_path / "registry.json"), similar(5)
    for name, model in models.items():
        registry.register(name, model, spec=specs[name], classes=frames.classes)
    final = ensemble.Ensemble(ensemble.load(registry, "*"), Cascade(ensemble.mean, threshold=0.25))
    registry.register_ensemble("final", final)
    again = ensemble.load_ensemble(registry, "final")
    np.testing.assert_array_equal(again.ask(frames)[0], final.ask(frames)[0])
    assert again.ask(frames)[1].mean() < 5


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_on_a_cuda_device(monkeypatch: pytest.MonkeyPatch, frames: zoo.FrameSet, threshold: float | None) -> None:
    """Pretended: what was gathered lies where it should, and the values are those of the CPU."""
    rules = [Cascade(of, threshold=threshold) for of in (ensemble.mean, ensemble.majority, bayes(7))]
    expected = [ensemble.Ensemble(members_of(), rule).ask(frames) for rule in rules]
    with PretendedCuda(monkeypatch):
        for rule, (rows, counts) in zip(rules, expected, strict=True):
            found = ensemble.Ensemble(members_of(device="cuda:1"), rule).ask(frames)
            np.testing.assert_allclose(found[0], rows, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(found[1], counts)
