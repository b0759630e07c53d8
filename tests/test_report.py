"""The report: scikit-learn and the slow loop as oracles, and what its notes point out."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss
from torch import Tensor

import ensemble
import zoo
from ensemble.judge import diversity, excerpt, tables
from ensemble.judge.tables import tally
from ensemble.outputs import About, Cost
from ensemble.rules import declared

RULES = {"majority": ensemble.majority, "mean": ensemble.mean, "weighted": ensemble.WeightedMean([4, 2, 1, 0])}


def some_outputs(members: int = 4, frames: int = 400, classes: int = 5, *, seed: int = 0) -> ensemble.MemberOutputs:
    """Members of falling strength over twenty or more recordings; the last class never occurs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes - 1, (frames,), generator=generator)
    hint = torch.nn.functional.one_hot(labels, classes)
    rows = [
        (torch.randn(frames, classes, generator=generator, dtype=torch.float64) + hint * (2.5 - 0.3 * i)).softmax(-1)
        for i in range(members)
    ]
    return ensemble.MemberOutputs.from_probabilities(
        {f"m{i}": row for i, row in enumerate(rows)}, labels=labels, groups=torch.arange(frames) // 11
    )


def test_scores_equal_scikit_learn() -> None:
    """Accuracy, log-loss in nats and macro F1 of every member and rule, to 1e-6."""
    o = some_outputs()
    report = ensemble.evaluate(o, RULES)
    labels, p = o.require_labels().numpy(), o.log_probabilities.double().exp()
    answers = [*p, *(rule(p) for rule in RULES.values())]
    table = [*report.members.to_dict("records"), *report.rules.to_dict("records")]
    assert [row["name"] for row in table] == [*o.members, *RULES]
    for row, answer in zip(table, answers, strict=True):
        predicted = answer.argmax(-1).numpy()
        rows = (answer / answer.sum(-1, keepdim=True)).numpy()
        assert row["accuracy"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)
        assert row["log_loss"] == pytest.approx(log_loss(labels, rows, labels=range(5)), abs=1e-6)
        assert row["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0), abs=1e-9)
        assert row["calibration_error"] == pytest.approx(
            ensemble.judge.expected_calibration_error(answer, labels), abs=1e-6
        )


def test_gains_are_differences_with_intervals_by_recording() -> None:
    """Each interval is the one of the frame-wise differences, resampled over recordings."""
    o = some_outputs()
    report = ensemble.evaluate(o, RULES, baseline="m1", replicates=500, seed=3)
    labels, p = o.require_labels(), o.probabilities
    single = p[1].argmax(-1) == labels
    uniform = p.mean(0).argmax(-1) == labels
    frame = torch.arange(len(labels))
    for name, rule in RULES.items():
        row = report.rules.set_index("name").loc[name]
        right, nats = rule(p).argmax(-1) == labels, -rule(p)[frame, labels].double().log()
        for gain, values in {
            "gain": right.double() - single.double(),
            "mean_gain": right.double() - uniform.double(),
            "loss_gain": -p[1][frame, labels].double().log() - nats,
        }.items():
            found = ensemble.judge.bootstrap_interval(values.numpy(), o.groups, replicates=500, seed=3)
            expected = [found.estimate, found.low, found.high]
            np.testing.assert_allclose([row[gain], row[f"{gain}_low"], row[f"{gain}_high"]], expected, atol=1e-6)


def test_a_rule_that_copies_the_baseline_gains_nothing() -> None:
    """Gain and both ends are exactly zero."""
    report = ensemble.evaluate(some_outputs(), {"copy": ensemble.WeightedMean([0, 1, 0, 0])}, baseline="m1")
    assert report.rules[["gain", "gain_low", "gain_high"]].to_numpy().tolist() == [[0, 0, 0]]


def test_a_member_gains_what_a_rule_that_copies_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of accuracy and of macro F1, from the same resamples, however many are resampled together."""
    monkeypatch.setattr(tables, "_TOGETHER", 3)
    o = some_outputs()
    copies = {name: ensemble.WeightedMean(row) for name, row in zip(o.members, torch.eye(4).tolist(), strict=True)}
    for metric in ("accuracy", "macro_f1"):
        report = ensemble.evaluate(o, copies, baseline="m1", metric=metric, replicates=200)
        columns = ["gain", "gain_low", "gain_high"]
        assert np.allclose(report.members[columns], report.rules[columns], rtol=0, atol=1e-12)
        assert report.members["gain"][1] == 0


def test_the_confusion_of_every_answer_is_scikit_learns() -> None:
    """Members first, then rules."""
    o = some_outputs()
    report = ensemble.evaluate(o, RULES)
    answers = [*o.probabilities, *(rule(o.probabilities) for rule in RULES.values())]
    for found, answer in zip(report.confusion, answers, strict=True):
        assert np.array_equal(found, confusion_matrix(o.labels, answer.argmax(-1), labels=range(5)))


def test_weights_of_weighted_means_are_found_by_member() -> None:
    """Whatever the order in which the rule knows them; other rules have none."""
    rules = {"mean": ensemble.mean, "two": ensemble.WeightedMean([3, 1], members=("m2", "m0"))}
    report = ensemble.evaluate(some_outputs(), rules)
    assert report.weights == {"two": {"m0": 0.25, "m1": 0.0, "m2": 0.75, "m3": 0.0}}


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of eight frames give the same sums as one block, to the bit."""
    o = some_outputs()
    whole = tally(o, RULES)
    monkeypatch.setattr(tables, "_BLOCK", 8)
    parts = tally(o, RULES)
    assert arrays_of(parts) == arrays_of(whole)


def in_parts(
    outputs: ensemble.MemberOutputs, rules: dict[str, ensemble.Rule], metric: str, cuts: list[int], blocks: int = 13
) -> list[tables.Tally]:
    """A tally for each run of recordings between two cuts, counted in blocks of so many frames."""
    whole, parts = tally(outputs, rules, metric), []
    groups, own = np.unique(outputs.groups, return_inverse=True)[1], tables.aligned(rules, outputs.members)
    for first, last in zip([0, *cuts], [*cuts, groups.max() + 1], strict=True):
        at = np.flatnonzero((groups >= first) & (groups < last))
        counting = tables.Counting(whole.of, own, groups[at])
        for some in np.array_split(at, max(1, len(at) // blocks)):
            counting.add(outputs.log_probabilities[:, some].contiguous(), outputs.labels[some])
        parts.append(counting.tally())
    return parts


def arrays_of(sums: tables.Tally) -> dict[str, bytes]:
    """Everything in a tally to the bit, but for its duration."""
    found = {name: getattr(sums, name).tobytes() for name in tables._ARRAYS}
    return found | {name: row.tobytes() for name, row in sums.sums.items()}


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 36), max_size=5, unique=True),
    order=st.randoms(use_true_random=False),
    blocks=st.integers(20, 400),
    metric=st.sampled_from(["accuracy", "macro_f1"]),
    piles=st.sampled_from([4, 100]),
)
def test_the_tallies_of_any_parts_merge_to_that_of_the_whole(cuts, order, blocks, metric, piles) -> None:
    """To the bit, in any order, in two steps, and through bytes; so the report is the same to the last digit."""
    outputs = some_outputs()
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in ((tables, "_PILES", piles), (excerpt, "_SAMPLE", 70), (excerpt, "_FEWEST", 1)):
            patch.setattr(module, name, value)
        patch.setattr(excerpt, "_WHOLE", 50)
        parts = in_parts(outputs, RULES, metric, sorted(cuts), blocks)
        order.shuffle(parts)
        parts = [tables.Tally.from_bytes(part.to_bytes()) for part in parts]
        merged = tables.Tally.merge([tables.Tally.merge(parts[:2]), *parts[2:]])
        assert arrays_of(merged) == arrays_of(tally(outputs, RULES, metric))
        one, other = (
            ensemble.evaluate(each, RULES, metric=metric, replicates=5).to_json() for each in (merged, outputs)
        )
    timed = ("seconds", "frames_per_second")
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_tallies_that_are_not_of_one_whole_are_not_merged() -> None:
    """Of other frames, with a recording twice, or none at all; and a part is not judged as if it were the whole."""
    outputs = some_outputs()
    first, second = in_parts(outputs, RULES, "accuracy", [9])
    with pytest.raises(ValueError, match="each recording in one tally, got recording 0 in two"):
        tables.Tally.merge([first, second, first])
    with pytest.raises(ValueError, match="expected tallies of one whole"):
        tables.Tally.merge([first, in_parts(some_outputs(seed=1), RULES, "accuracy", [9])[1]])
    with pytest.raises(ValueError, match="a tally or more, got none"):
        tables.Tally.merge([])
    with pytest.raises(ValueError, match=r"all 400 frames, got one of 99; merge"):
        ensemble.evaluate(first, RULES)
    with pytest.raises(ValueError, match=r"tally of the rules \['mean'\] and for the metric accuracy"):
        ensemble.evaluate(tally(outputs, RULES), {"mean": ensemble.mean})
    with pytest.raises(ValueError, match=r"metric macro_f1, got one of .* and accuracy"):
        ensemble.evaluate(tally(outputs, RULES), RULES, metric="macro_f1")


DAMAGE = {
    "numbers": lambda a: a[::-1],
    "sizes": lambda a: a * 0,
    "sums.log_loss": lambda a: a * np.nan,
    "sums.brier": lambda a: a[:, 1:],
    "counts": lambda a: -a - 1,
    "piles": lambda a: a[:0],
    "confusion": lambda a: a + 1,
    "bins": lambda a: a.astype(np.float64),
    "both": lambda a: a[0],
    "true": lambda a: a * 2,
    "ties": lambda a: a[None],
    "kept": lambda a: a + 400,
    "kept_keys": lambda a: a + 1,
    "kept_logs": lambda a: a[:, ::2],
    "kept_rows": lambda a: a * 2,
    "strange": lambda a: np.zeros(3),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_tally_from_outside_is_looked_at(name: str) -> None:
    """Shapes, types, order, sums that belong together, further arrays: a ValueError each."""
    good = safetensors.numpy.load(data := tally(some_outputs(), RULES, "macro_f1").to_bytes())
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert tables.Tally.from_bytes(safetensors.numpy.save(good, head)).frames == 400
    bad = good | {name: np.array(DAMAGE[name](good.get(name)), order="C")}
    with pytest.raises(ValueError, match="expected a tally as"):
        tables.Tally.from_bytes(safetensors.numpy.save(bad, head))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "9"}, "of format 1, got '9'; count again"),
        ({"of": "{}"}, "missing required field"),
        ({"seconds": "nan"}, "a pass of nan seconds"),
        ({"of": None}, "'of'"),
    ],
)
def test_the_head_of_a_tally_is_looked_at(change: dict[str, str | None], words: str) -> None:
    """Another version, or fields that are missing; and bytes that are no such document at all."""
    arrays = safetensors.numpy.load(data := tally(some_outputs(), {}).to_bytes())
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"] | change
    with pytest.raises(ValueError, match=words):
        tables.Tally.from_bytes(safetensors.numpy.save(arrays, {k: v for k, v in head.items() if v is not None}))
    for cut in (0, 5, 100, len(data) - 1):
        with pytest.raises(ValueError, match="expected a tally as"):
            tables.Tally.from_bytes(data[:cut])


def test_many_recordings_are_dealt_into_piles(monkeypatch: pytest.MonkeyPatch) -> None:
    """No frame is lost, and intervals stay about as wide."""
    o = some_outputs(frames=3000)
    own = ensemble.MemberOutputs(o.log_probabilities, o.members, o.classes, labels=o.labels)
    fine = ensemble.evaluate(own, RULES).rules.set_index("name").loc["mean"]
    monkeypatch.setattr(tables, "_PILES", 300)
    report = ensemble.evaluate(own, RULES)
    coarse = report.rules.set_index("name").loc["mean"]
    assert report.recordings == 3000
    assert tally(own, {}).sizes.sum() == 3000
    assert coarse["gain"] == pytest.approx(fine["gain"])
    assert coarse["gain_high"] - coarse["gain_low"] == pytest.approx(fine["gain_high"] - fine["gain_low"], rel=0.2)


def test_the_best_member_is_the_baseline_and_a_note_says_where_it_was_chosen() -> None:
    """Without a name the most accurate member on these frames; with a name, that one and no note."""
    o = some_outputs()
    report = ensemble.evaluate(o, RULES)
    best = report.members.sort_values("accuracy")["name"].iloc[-1]
    assert report.baseline == best
    assert f"the best single member, {best}, was chosen on these frames: gains are understated" in report.notes
    named = ensemble.evaluate(o, RULES, baseline="m2")
    assert named.baseline == "m2"
    assert not [note for note in named.notes if "chosen on these frames" in note]
    with pytest.raises(ValueError, match=r"baseline among the members \['m0', .*\], got 'm9'"):
        ensemble.evaluate(o, RULES, baseline="m9")


def test_the_oracle_bounds_every_member_and_every_choice_among_them() -> None:
    """Fraction of frames where some member is right, in all and by class."""
    o = some_outputs()
    report = ensemble.evaluate(o, {"maximum": ensemble.maximum})
    right = diversity.correct(o)
    assert report.oracle == pytest.approx(right.any(0).mean())
    assert report.oracle >= report.members["accuracy"].max()
    assert report.oracle >= report.rules["accuracy"].max()
    of_class = right[:, o.require_labels().numpy() == 2].any(0).mean()
    assert report.classes["oracle"][2] == pytest.approx(of_class)


def test_pairs_are_the_diversity_measures() -> None:
    """One row per pair, every measure of the table."""
    o = some_outputs()
    pairs = ensemble.evaluate(o, {}).pairs
    assert len(pairs) == 6
    assert (pairs["first"][4], pairs["second"][4]) == ("m1", "m3")
    for name, measure in diversity.PAIR_MEASURES.items():
        assert pairs[name][4] == pytest.approx(measure(diversity.correct(o))[1, 3])


def test_classes_by_hand() -> None:
    """Class b is taken for c once; class c is best left to y; class d never occurs."""
    x = [[0.9, 0.1, 0, 0], [0, 0.6, 0.4, 0], [0, 0.1, 0.9, 0], [0.5, 0.3, 0.2, 0]]
    y = [[0.9, 0.1, 0, 0], [0, 0.9, 0.1, 0], [0, 0.1, 0.9, 0], [0, 0.1, 0.9, 0]]
    labels = ["a", "b", "b", "c"]
    o = ensemble.MemberOutputs.from_probabilities({"x": x, "y": y}, labels=labels, classes="abcd")
    report = ensemble.evaluate(o, {"y": ensemble.WeightedMean([0, 1])})
    assert report.rules["macro_f1"][0] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)  # d is in no label and no prediction
    table = report.classes.set_index("name")
    assert table["frames"].tolist() == [1, 2, 1, 0]
    assert table.loc["b", ["rule_accuracy", "confused_with", "confused_share"]].tolist() == [0.5, "c", 0.5]
    assert table.loc["c", ["trust", "trust_f1", "oracle"]].tolist() == ["y", pytest.approx(2 / 3), 1.0]
    assert table.loc["a", "confused_with"] is None
    assert table.loc["d", "trust"] is None
    assert math.isnan(table.loc["d", "rule_accuracy"])


def test_confusions_are_the_largest_mistakes() -> None:
    """The largest first, three per class, as scikit-learn counts them, with the baseline's share of each."""
    o = some_outputs()
    report = ensemble.evaluate(o, {"weak": ensemble.WeightedMean([0, 0, 0, 1])}, baseline="m0")
    labels, p = o.require_labels().numpy(), o.probabilities
    rule, single = (confusion_matrix(labels, rows.argmax(-1), labels=range(5)) for rows in (p[3], p[0]))
    for name, rows in report.confusions.groupby("name"):
        true = int(name)
        wrong = sorted(
            (count for predicted, count in enumerate(rule[true]) if predicted != true and count), reverse=True
        )
        assert rows["frames"].tolist() == wrong[:3]
        for row in rows.to_dict("records"):
            assert row["share"] == row["frames"] / (labels == true).sum()
            assert row["baseline_share"] == single[true, int(row["taken_for"])] / (labels == true).sum()
    assert set(report.confusions["name"]) == set("0123")


def test_the_optimism_of_a_fit_stands_beside_its_rule() -> None:
    """As `cross_fit` found it on the fitting frames; NaN for a rule that was not fitted."""
    o = some_outputs()
    found = ensemble.fit.cross_fit(o)
    report = ensemble.evaluate(some_outputs(seed=1), RULES, cross_fits={"weighted": found})
    weighted = report.rules.set_index("name").loc["weighted"]
    assert weighted["optimism"] == found.optimism
    assert weighted["optimism_accuracy"] == found.optimism_accuracy
    assert report.rules["optimism"].isna().tolist() == [True, True, False]


def test_reliability_holds_the_bins_behind_the_error() -> None:
    """Weighted by frames, the bins' distances are the calibration error."""
    report = ensemble.evaluate(some_outputs(), RULES)
    bins = report.reliability[report.reliability["name"] == "mean"].dropna()
    error = (bins["frames"] * (bins["confidence"] - bins["accuracy"]).abs()).sum() / report.frames
    assert error == pytest.approx(report.rules.set_index("name").loc["mean", "calibration_error"])


def test_parameters_count_only_members_with_influence() -> None:
    """A member of weight 0 need not be shipped; an unknown size makes the sum unknown."""
    sizes = {"m0": 10, "m1": 20, "m2": 40, "m3": 80}
    warmed = ensemble.rules.Chain((RULES["weighted"], ensemble.rules.Temperature(2.0)))
    report = ensemble.evaluate(some_outputs(), RULES | {"warmed": warmed}, parameters=sizes)
    assert report.members["parameters"].tolist() == [10, 20, 40, 80]
    assert report.rules["parameters"].tolist() == [150, 150, 70, 70]
    unknown = ensemble.evaluate(some_outputs(), RULES, parameters={"m0": 10})
    assert unknown.rules["parameters"].isna().all()


def test_every_fitted_rule_can_be_judged() -> None:
    """Rules of other shapes of weights, and weights per class, go through the same report."""
    o = some_outputs()
    rules = {
        "votes": ensemble.fit.fit_bayes_vote(o),
        "stacked": ensemble.fit.fit_stacked(o),
        "classwise": ensemble.fit.fit_class_weights(o).rule,
        "log": ensemble.rules.LogPool(ensemble.fit.fit_log_linear(o).weights),  # type: ignore[arg-type]
    }
    report = ensemble.evaluate(o, rules, parameters=dict.fromkeys(o.members, 1))
    assert (report.rules["parameters"] > 0).all()
    assert report.rules["fitted_here"].tolist() == [True, True, True, False]  # the last has no fingerprint


def known(outputs: ensemble.MemberOutputs, **trained_on: str) -> ensemble.MemberOutputs:
    """The same outputs, of members that were trained on these frames."""
    about = tuple(About(parameters=10, trained_on=trained_on.get(name, "")) for name in outputs.members)
    return dataclasses.replace(outputs, about=about)


def test_rules_judged_on_their_fitting_frames_are_marked() -> None:
    """The fingerprint shows it, in a column and in a note; likewise training frames, without a further argument."""
    o = some_outputs()
    o = known(o, m0=o.fingerprint, m1="other")
    rules = {"here": ensemble.WeightedMean([1] * 4, fingerprint=o.fingerprint), "mean": ensemble.mean}
    report = ensemble.evaluate(o, rules)
    assert report.rules["fitted_here"].tolist() == [True, False]
    assert report.rules["fitted_on_training"].tolist() == [True, False]
    assert report.rules["optimism"].isna().all()
    assert "rule here was fitted on these frames: its figures are optimistic" in report.notes
    assert "these frames are training frames of m0: their figures and those of all rules are optimistic" in report.notes
    assert any(note.startswith("rule here was fitted on training frames of m0,") for note in report.notes)


def test_numbers_of_unknown_origin_are_pointed_out() -> None:
    """Also inside a chain; plain functions have none, and a fit knows its frames."""
    o = some_outputs()
    warm = ensemble.rules.Chain((ensemble.fit_weights(some_outputs(seed=1)).rule, ensemble.rules.Temperature(2.0)))
    rules = {"bare": ensemble.WeightedMean([1] * 4), "warm": warm, "mean": ensemble.mean}
    notes = ensemble.evaluate(o, rules | {"fit": ensemble.fit_weights(some_outputs(seed=1)).rule}).notes
    assert [note.split()[1] for note in notes if "numbers of unknown origin" in note] == ["bare", "warm"]


def test_a_fit_on_the_judged_frames_is_noticed_by_itself() -> None:
    """For every fitter of the library, with no further argument."""
    o = known(some_outputs(), m2="training")
    for name, fit in ensemble.fit.FITTERS.items():
        rule = fit(o)
        found = ensemble.evaluate(o, {name: rule})
        assert found.rules["fitted_here"].tolist() == [bool(declared(rule).fingerprints)]
        elsewhere = ensemble.evaluate(dataclasses.replace(some_outputs(seed=1), about=o.about), {name: rule})
        assert elsewhere.rules["fitted_here"].tolist() == [False]
        assert not any("optimistic" in note for note in elsewhere.notes)


def test_a_rule_is_applied_to_the_members_that_it_names() -> None:
    """Whatever their order; a missing one is refused with the rule's name."""
    o = some_outputs()
    rule = ensemble.WeightedMean([4, 3, 2, 1], members=o.members)
    straight = ensemble.evaluate(o, {"pool": rule}).rules
    turned = ensemble.evaluate(o.subset(["m3", "m1", "m0", "m2"]), {"pool": rule}).rules
    for column in ("accuracy", "log_loss"):
        assert turned[column][0] == pytest.approx(straight[column][0], rel=1e-6)
    with pytest.raises(ValueError, match=r"rule 'pool': expected the members .* got none named \['m3'\]"):
        ensemble.evaluate(o.subset(["m0", "m1", "m2"]), {"pool": rule})


def test_parameters_are_those_that_came_with_the_outputs() -> None:
    """A mapping overrides them, member by member."""
    o = known(some_outputs())
    assert ensemble.evaluate(o, {}).members["parameters"].tolist() == [10] * 4
    assert ensemble.evaluate(o, {}, parameters={"m1": 7}).members["parameters"].tolist() == [10, 7, 10, 10]


def test_what_running_costs_stands_in_the_tables() -> None:
    """Bytes come with the outputs, and add up over the members that a rule uses; the rest where it was measured."""
    about = tuple(About(size=size) for size in (10, 20, 40, 80))
    o = dataclasses.replace(some_outputs(), about=about)
    costs = {"m1": Cost(2.5, memory=100), "weighted": Cost(9.0, memory=300)}
    report = ensemble.evaluate(o, RULES, costs=costs)
    assert report.members["bytes"].tolist() == [10, 20, 40, 80]
    assert report.rules["bytes"].tolist() == [150, 150, 70]
    assert report.members["microseconds"].fillna(-1).tolist() == [-1, 2.5, -1, -1]
    assert report.rules.set_index("name").loc["weighted", ["microseconds", "memory"]].tolist() == [9.0, 300]
    data = report.to_json()
    assert [row["memory"] for row in data["members"]] == [None, 100, None, None]
    assert "confusion" not in data


def test_training_frames_are_recognised_from_end_to_end(frames: zoo.FrameSet, tmp_path: Path) -> None:
    """Train, collect on the same frames, in memory and in a store, fit there, judge there: both notes."""
    spec = zoo.Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 1})
    trained = zoo.train(spec, zoo.Recipe(epochs=1), frames, frames)
    registry = zoo.Registry(tmp_path / "registry.json")
    registry.register("small", trained)
    members = ensemble.load(registry, "small")
    for cache in (None, tmp_path / "cache"):
        outputs = ensemble.collect(members, frames, cache=cache)
        assert outputs.fingerprint == frames.fingerprint == outputs.about[0].trained_on
        notes = ensemble.evaluate(outputs, {"weighted": ensemble.fit_weights(outputs).rule}).notes
        assert "rule weighted was fitted on these frames: its figures are optimistic" in notes
        assert any(note.startswith("rule weighted was fitted on training frames of small") for note in notes)
        assert any(note.startswith("these frames are training frames of small") for note in notes)
    other = ensemble.collect(members, frames.select(torch.tensor([0, 1])))
    assert not any("optimistic" in note for note in ensemble.evaluate(other, {"mean": ensemble.mean}).notes)


def test_the_best_member_has_one_definition() -> None:
    """Most accurate; of equals the one with the lower log-loss, then the first; the report's baseline."""
    rows = {"sure": [[0.9, 0.1], [0.9, 0.1]], "wary": [[0.6, 0.4], [0.6, 0.4]], "wrong": [[0.1, 0.9], [0.1, 0.9]]}
    make = ensemble.MemberOutputs.from_probabilities
    assert tables.best_member(make(rows, labels=[0, 1])) == "wary"
    assert tables.best_member(make(rows | {"copy": rows["wary"]}, labels=[0, 1])) == "wary"
    assert tables.best_member(make(rows, labels=[0, 0])) == "sure"
    assert tables.best_member(some_outputs()) == ensemble.evaluate(some_outputs(), RULES).baseline


def test_few_recordings_and_none_are_pointed_out() -> None:
    """Under twenty recordings, or frames that are their own recordings."""
    assert any("are few to resample" in note for note in ensemble.evaluate(some_outputs(frames=60), {}).notes)
    o = some_outputs()
    alone = ensemble.MemberOutputs(o.log_probabilities, o.members, o.classes, labels=o.labels)
    assert any("every frame is its own recording" in note for note in ensemble.evaluate(alone, {}).notes)


def test_no_probability_for_the_truth_is_finite_and_noted() -> None:
    """Taken as 2^-52, as scikit-learn does in double precision."""
    p = [[1.0, 0.0], [0.0, 1.0]]
    o = ensemble.MemberOutputs.from_probabilities({"a": p}, labels=[0, 0])
    report = ensemble.evaluate(o, {})
    assert report.members["log_loss"][0] == pytest.approx(52 * math.log(2) / 2)
    assert report.members["log_loss"][0] == pytest.approx(log_loss([0, 0], np.array(p), labels=[0, 1]), rel=1e-6)
    assert "a gives the true class less than 2^-52 on 1 frames, which count as 2^-52 in log_loss" in report.notes
    almost = ensemble.MemberOutputs.from_probabilities({"a": [[1.0, 1e-20], [1.0, 0.0]]}, labels=[1, 1])
    assert any("2^-52 on 2 frames" in note for note in ensemble.evaluate(almost, {}).notes)


def test_abstaining_members_are_counted() -> None:
    """NaN rows: wrong, with the loss of equal probabilities; rules combine the members that answer."""
    p = {"a": [[0.9, 0.1], [0.2, 0.8]], "b": [[0.7, 0.3], [math.nan, math.nan]]}
    o = ensemble.MemberOutputs.from_probabilities(p, labels=[0, 1], abstain=True)
    report = ensemble.evaluate(o, {"pool": ensemble.WeightedMean([1, 1]), "mean": ensemble.mean})
    assert report.members["abstained"].tolist() == [0, 1]
    assert report.members["accuracy"].tolist() == [1.0, 0.5]
    assert report.members["log_loss"][1] == pytest.approx(-math.log(0.7 * 0.5) / 2)
    assert report.members["macro_f1"].tolist() == [1.0, 1.0]  # over frames with an answer
    assert report.rules["log_loss"].tolist() == pytest.approx([-math.log(0.8 * 0.8) / 2] * 2)
    assert report.rules["mean_gain"].tolist() == [0, 0]
    assert report.tie_rate == 0
    assert any(note.startswith("b abstains on 1 frames") for note in report.notes)
    assert diversity.correct(o).tolist() == [[True, True], [True, False]]


def test_abstentions_that_are_not_declared_are_refused() -> None:
    """The message names the member, the frame and the way out; fits refuse declared ones too."""
    logs = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [torch.nan, torch.nan]]]).log()
    o = ensemble.MemberOutputs(logs, ("a", "b"), ("x", "y"), labels=torch.tensor([0, 1]))
    for judge in (lambda: ensemble.evaluate(o, {}), lambda: diversity.correct(o)):
        with pytest.raises(ValueError, match="from member 'b', got NaN at frame 1; if it abstains there, declare"):
            judge()
    declared = dataclasses.replace(o, abstain=True)
    for fit in (ensemble.fit.fit_temperature, ensemble.fit.fit_stacked, ensemble.fit.fit_bayes_vote):
        with pytest.raises(
            ValueError, match="from member 'b', got NaN at frame 1; use frames where no member abstains"
        ):
            fit(declared)


def test_rules_that_return_no_distribution_are_refused_by_name() -> None:
    """A wrong shape and a wrong sum."""

    def double(probabilities: Tensor) -> Tensor:
        return probabilities.mean(0) * 2

    with pytest.raises(ValueError, match=r"sum to one from rule 'double', got a sum of 2"):
        ensemble.evaluate(some_outputs(), {"double": double})
    with pytest.raises(ValueError, match=r"rows of shape \(400, 5\) from rule 'all', got \(4, 400, 5\)"):
        ensemble.evaluate(some_outputs(), {"all": lambda p: p})


def test_json_is_plain_and_complete() -> None:
    """Strict JSON; NaN, infinity and missing sizes become null; the tables' rows are there."""
    report = ensemble.evaluate(some_outputs(), RULES)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [row["name"] for row in data["rules"]] == list(RULES)
    assert {"accuracy", "log_loss", "gain", "gain_low", "gain_high"} <= set(data["rules"][0])
    assert data["members"][0]["parameters"] is None
    assert data["classes"][4]["rule_accuracy"] is None  # a class that never occurs
    assert data["frames"] == 400
    assert data["baseline"] == report.baseline


@pytest.mark.parametrize("members", [1, 3])
def test_no_frames_have_no_figures(members: int) -> None:
    """An empty corpus is reported as such, in JSON too."""
    o = ensemble.MemberOutputs.from_probabilities(
        {str(i): torch.empty(0, 3) for i in range(members)}, labels=torch.empty(0, dtype=torch.long)
    )
    report = ensemble.evaluate(o, {"mean": ensemble.mean})
    assert math.isnan(report.rules["accuracy"][0])
    assert math.isnan(report.oracle)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["rules"][0]["gain_low"] is None


def test_equal_seeds_equal_reports() -> None:
    """Only the time may differ."""
    first, second = (ensemble.evaluate(some_outputs(), RULES, seed=1).to_json() for _ in range(2))
    for data in (first, second):
        del data["seconds"], data["frames_per_second"]
    assert first == second


def test_labels_are_needed() -> None:
    """Nothing is judged without true classes."""
    o = some_outputs()
    blind = ensemble.MemberOutputs(o.log_probabilities, o.members, o.classes)
    with pytest.raises(ValueError, match="expected outputs with labels"):
        ensemble.evaluate(blind, RULES)


# The choice of a rule: the simplest within one standard error of the best


def test_the_simplest_within_one_standard_error_is_chosen() -> None:
    """Candidates that differ by chance fall back to the single member; a real gain is taken."""
    o = some_outputs()
    copies = {"copy": ensemble.WeightedMean([1, 0, 0, 0]), "weak": ensemble.WeightedMean([0, 0, 0, 1])}
    single = ensemble.choose(o, copies)
    assert single.name == "m0"
    torch.testing.assert_close(single.rule(o.probabilities), o.probabilities[0])
    pooled = ensemble.choose(o, {"mean": ensemble.mean, "log_mean": ensemble.log_mean})
    assert pooled.name == "mean"
    assert pooled.rule is ensemble.mean
    assert pooled.behind["m0"] > pooled.error["m0"]


def test_the_choice_is_the_definition() -> None:
    """Best minus candidate, and the standard deviation of the resampled distance."""
    o = some_outputs()
    labels, p = o.require_labels(), o.probabilities
    choice = ensemble.choose(o, RULES, by="log_loss", replicates=200, seed=4)
    frame = torch.arange(len(labels))
    best = min([p[0], *(rule(p) for rule in RULES.values())], key=lambda rows: -rows[frame, labels].log().mean())
    distance = (best[frame, labels].double().log() - p[0][frame, labels].double().log()).numpy()
    sums, sizes = ensemble.judge.significance.sums_by_group(distance, o.groups)
    resampled = ensemble.judge.cluster_bootstrap(sums, sizes, replicates=200, seed=4)
    assert choice.behind["m0"] == pytest.approx(distance.mean(), abs=1e-6)
    assert choice.error["m0"] == pytest.approx(resampled.std(), rel=1e-4)


def test_one_recording_is_too_little_to_leave_the_single_member() -> None:
    """No spread, no standard error: the rule that is ahead by accident is not chosen."""
    o = some_outputs(frames=11)
    found = ensemble.choose(o, {"mean": ensemble.mean}, by="log_loss")
    assert found.name in o.members
    assert all(math.isnan(error) for error in found.error.values())


def test_a_choice_that_makes_no_sense_is_refused() -> None:
    """An unknown measure, and a rule with a member's name."""
    with pytest.raises(ValueError, match="no metric named 'nonsense'; there are accuracy, brier, log_loss, macro_f1"):
        ensemble.choose(some_outputs(), {"mean": ensemble.mean}, by="nonsense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"names for rules that no member has, got \['m1'\]"):
        ensemble.choose(some_outputs(), {"mean": ensemble.mean, "m1": ensemble.mean})


def test_a_choice_needs_frames() -> None:
    """Nothing is chosen on nothing."""
    o = ensemble.MemberOutputs.from_probabilities({"a": torch.empty(0, 2)}, labels=torch.empty(0).long())
    with pytest.raises(ValueError, match="expected frames to choose on, got none"):
        ensemble.choose(o, {})
