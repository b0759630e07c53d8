"""The engine: every form of running a group agrees with the loop, and the plan decides on numbers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from ensemble import Stack
from ensemble.run import _engine
from ensemble.run._engine import Batch, Form, Group, Plan, forms, plan
from ensemble.run._engine.batch import Overlap
from ensemble.run._engine.dense import Affine, NotDenseError, dense
from ensemble.run._engine.plan import Agreement, Trial, agreement, choose
from zoo.models import blocks

pytestmark = pytest.mark.usefixtures("own_cache")

ARCHITECTURES = zoo.list_architectures(["basic", "bottleneck", "*cylinder", "diamond", "mlp", "*pyramid"])


def models(architecture: str = "cylinder", count: int = 3, **options: object) -> list[nn.Module]:
    """Models over 5 frames of 6 features whose BatchNorm has seen some data."""
    if architecture == "mlp":
        options["widths"] = (options.pop("width"), 12)
    spec = zoo.Spec(architecture, features=6, context=2, classes=4, options=options)
    built = [zoo.build(spec, seed=seed) for seed in range(count)]
    for model in built:
        model(torch.randn(32, spec.inputs) * 2 + 1)
        model.eval()
    return built


def grouped(several: list[nn.Module], **wishes: str) -> Group:
    """A group of models over 6 features."""
    return Group(
        lambda: several,
        Stack(several).eval(),
        torch.device("cpu"),
        [*map(str, range(len(several)))],
        classes=4,
        features=6,
        **wishes,  # type: ignore[arg-type]
    )


def alone(several: list[nn.Module], x: Tensor) -> Tensor:
    """The slow obvious way: (M, B, C) log-probabilities."""
    with torch.inference_mode():
        return torch.stack([model(x).log_softmax(-1) for model in several])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [{}, {"batchnorm": False}, {"activation": "gelu", "dropout": 0.2}], ids=str)
@pytest.mark.parametrize(
    "form", [Form("folded", 4), Form("prepacked", 4), Form("prepacked", 50), Form("overlap", 40), Form("stack", 9)]
)
def test_every_form_agrees_with_the_loop(
    architecture: str, options: dict[str, object], form: Form, frames: zoo.FrameSet
) -> None:
    """Folded, in the frequency domain or by vmap, in any tiles: probabilities move by less than 1e-5."""
    several = models(architecture, width=16, **options)
    piece = zoo.data.stretch(frames, 2, "mean_std")
    with torch.inference_mode():
        found = grouped(several).log_probabilities(form, Batch.of(piece))
    expected = alone(several, piece.windows())
    torch.testing.assert_close(found.exp(), expected.exp(), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(1, 5), st.integers(1, 90), st.integers(1, 9))
def test_the_overlap_form_is_the_product_of_windows(context: int, features: int, count: int, outputs: int) -> None:
    """Over any rows, for any window: the same numbers as building all windows."""
    span = 2 * context + 1
    rows = torch.randn(count + span - 1, features)
    weight = torch.randn(1, outputs, span * features) / (span * features) ** 0.5
    form = Overlap(Affine(weight, torch.zeros(1, outputs)), features)
    expected = rows.unfold(0, span, 1).transpose(1, 2).reshape(count, -1) @ weight[0].T
    torch.testing.assert_close(form(rows)[0, :count], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["prepacked", "folded", "stack", "loop"])
def test_a_row_with_nan_gives_nan(kind: str) -> None:
    """In every form, and in no other row: a number there would be an answer to nothing."""
    x = torch.randn(9, 30)
    x[3, 5] = torch.nan
    with torch.inference_mode():
        found = grouped(models(width=16)).log_probabilities(Form(kind, 4), Batch.of(x))
    assert found.isnan().any(dim=2).any(dim=0).nonzero().tolist() == [[3]]


def test_the_overlap_form_wants_whole_frames() -> None:
    """Ten inputs are no windows of three features."""
    with pytest.raises(ValueError, match="whole frames of 3 features, got 10 inputs"):
        Overlap(Affine(torch.zeros(1, 2, 10), torch.zeros(1, 2)), 3)


@pytest.mark.skipif(not forms.available(torch.device("cpu")), reason="needs oneDNN")
@pytest.mark.parametrize(
    ("activation", "fused"),
    [
        (nn.ReLU(), True),
        (nn.GELU(), True),
        (nn.GELU("tanh"), True),
        (nn.SiLU(), True),
        (nn.Tanh(), True),
        (nn.Sigmoid(), True),
        (nn.Mish(), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 33, 128, 300])
def test_prepacked_layers_are_the_layers(activation: nn.Module, fused: bool, count: int) -> None:
    """Odd widths, with the activation inside the product or behind it, in batches below and above the tile."""
    several = [
        nn.Sequential(nn.Linear(30, 19), activation, nn.Linear(19, 7, bias=False), activation, nn.Linear(7, 5))
        for _ in range(3)
    ]
    one, x = grouped(several), torch.randn(count, 30)
    with torch.inference_mode():
        found = one.log_probabilities(Form("prepacked", 128), Batch.of(x))
    torch.testing.assert_close(found.exp(), alone(several, x).exp(), rtol=0, atol=1e-5)
    assert one.dense is not None
    assert len(forms.prepack(one.dense, count).steps) == (3 if fused else 5)


@pytest.mark.parametrize("kind", ["folded", "prepacked", "overlap"])
def test_an_activation_of_the_users_own_folds(kind: str, frames: zoo.FrameSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """One decorated function: every form takes it for one step, although oneDNN has no name for it."""
    monkeypatch.setattr(blocks, "ACTIVATIONS", dict(blocks.ACTIVATIONS))

    @blocks.activation
    def squared_relu(x: Tensor) -> Tensor:
        """The square of ReLU."""
        return x.relu().square()

    several = models(width=16, activation="squared_relu")
    one, piece = grouped(several), zoo.data.stretch(frames, 2)
    assert one.dense is not None
    assert any(type(step.operation).__name__ == "squared_relu" for step in one.dense.steps)
    with torch.inference_mode():
        found = one.log_probabilities(Form(kind, 40), Batch.of(piece))
    torch.testing.assert_close(found.exp(), alone(several, piece.windows()).exp(), rtol=0, atol=1e-5)


@pytest.mark.skipif(not forms.available(torch.device("cpu")), reason="needs oneDNN")
def test_few_layouts_are_kept() -> None:
    """Each is a copy of all weights: batches of ever new sizes must not fill the memory."""
    one = grouped(models(width=8)).dense
    assert one is not None
    layouts = forms.layouts(one)
    made = [layouts(frames) for frames in range(1, 20)]
    assert layouts(19) is made[-1]
    assert layouts.cache_info().currsize == forms.LAYOUTS


def test_without_onednn_ordinary_products_run(monkeypatch: pytest.MonkeyPatch, frames: zoo.FrameSet) -> None:
    """The frequency form too; and nothing prepacked is tried."""
    monkeypatch.setattr(forms, "available", lambda device: False)
    one, batch = grouped(several := models(width=16)), Batch.of(zoo.data.stretch(frames, 2))
    assert {form.kind for form in one.candidates(batch)} == {"overlap", "folded", "loop"}
    with torch.inference_mode():
        for form in (Form("overlap", 48), Form("folded", 50)):
            found = one.log_probabilities(form, batch)
            torch.testing.assert_close(found.exp(), alone(several, batch.windows).exp(), rtol=0, atol=1e-5)


class Twice(nn.Module):
    """Uses its input twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3) -> (B, 3)."""
        return self.a(x) + self.b(x)  # type: ignore[no-any-return]


class Branching(nn.Module):
    """Asks its input what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3) -> (B, 3)."""
        return self.linear(x) if x.sum() > 0 else self.linear(-x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(3, 3), "begin and end with a Linear|is Linear|is no"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)), "'1' is LayerNorm"),
        (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 2)), "directly after a Linear"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)), "directly after a Linear"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)), "statistics"),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double(), "weights are torch.float64"),
        (Twice(), "begin and end with a Linear"),
        (nn.Sequential(Twice(), nn.Linear(3, 2)), "more than one layer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_does_not_fold_says_why(model: nn.Module, words: str) -> None:
    """Such a model still runs, by vmap or in a loop."""
    with pytest.raises(NotDenseError, match=words):
        dense(Stack([model.eval()]))


def test_a_forward_that_cannot_be_traced_says_why() -> None:
    """Control flow on the input has no graph."""
    stack = Stack.from_state(
        Branching(), {"linear.weight": torch.zeros(1, 3, 3), "linear.bias": torch.zeros(1, 3)}, ["a"]
    )
    with pytest.raises(NotDenseError, match="cannot be traced"):
        dense(stack)


def test_bfloat16_stays_within_its_rule(frames: zoo.FrameSet) -> None:
    """Close enough for `auto`, and not exact."""
    several = models(width=32)
    x = zoo.windows(frames, torch.arange(100), 2)
    with torch.inference_mode():
        found = grouped(several).log_probabilities(Form("folded", 64, "bfloat16"), Batch.of(x))
    near = agreement(alone(several, x), found, exact=False)
    assert near.near
    assert 0 < near.moved < 0.01


@pytest.mark.parametrize("wish", ["auto", "loop", "stack"])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_a_group_runs_as_the_caller_wishes(wish: str, count: int) -> None:
    """Whatever is forced, the numbers are the loop's, and the plan says what ran."""
    several, x = models(width=8), torch.randn(count, 30)
    out = torch.empty(3, count, 4)
    several_as_one = grouped(several, forced=wish)

    def write(members: slice, where: slice, logits: Tensor) -> None:
        out[members, where] = logits.log_softmax(-1)

    with torch.inference_mode():
        several_as_one.run(Batch.of(x), write)
    torch.testing.assert_close(out.exp(), alone(several, x).exp(), rtol=0, atol=1e-5)
    (chosen,) = several_as_one.plans.values()
    best = "prepacked" if forms.available(torch.device("cpu")) else "folded"
    assert chosen.form.kind == {"auto": best, "loop": "loop", "stack": best}[wish]
    assert chosen.why


def test_a_measured_plan_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second group of that structure asks the cache, and compares with the loop all the same."""
    monkeypatch.setattr(_engine, "_WORTH", 0)
    several, x = models(width=8), torch.randn(40, 30)
    plans = []
    for _ in range(2):
        one = grouped(several)
        with torch.inference_mode():
            one.run(Batch.of(x), lambda members, where, logits: None)
        plans.extend(one.plans.values())
    assert plans[0].why.startswith("fastest of")
    assert plans[1].why == "measured earlier on this machine"
    assert plans[1].form == plans[0].form
    assert plans[1].trials[0].agreement.near


def test_a_damaged_cache_is_no_answer(tmp_path: Path) -> None:
    """What is not a form is measured again."""
    file = plan.file_of(torch.device("cpu"), frames=64)
    plan.remember(file, Form("folded", 64))
    assert plan.recall(file) == Form("folded", 64)
    assert [*tmp_path.rglob("*.json")] == [file]
    file.write_text('{"kind": "folded"')
    assert plan.recall(file) is None
    assert plan.recall(plan.file_of(torch.device("cpu"), frames=128)) is None


def test_a_choice_is_forgotten_where_there_is_no_place_for_it(monkeypatch, tmp_path):
    """A user without a home folder, as in a container, or one whose cache cannot be written."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    file = plan.file_of(torch.device("cpu"), frames=64)
    plan.remember(file, Form("folded", 64))
    assert plan.recall(file) is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert plan.file_of(torch.device("cpu"), frames=64) is None
    plan.remember(None, Form("folded", 64))
    assert plan.recall(None) is None


def test_out_of_memory_halves_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is begun again with smaller steps, down to what fits."""
    several, x = models(width=8), torch.randn(64, 30)
    one, true = grouped(several), Group.pieces

    def small(group: Group, form: Form, batch: Batch) -> Iterator[forms.Piece]:
        if form.tile > 16 and batch.count == 64 and group.plans:
            raise torch.OutOfMemoryError
        return true(group, form, batch)

    out = torch.empty(3, 64, 4)
    monkeypatch.setattr(Group, "pieces", small)
    with torch.inference_mode():
        one.run(Batch.of(x), lambda members, where, logits: out[members, where].copy_(logits.log_softmax(-1)))
    (chosen,) = one.plans.values()
    assert chosen.form.tile == 16
    assert "tile halved" in chosen.why
    torch.testing.assert_close(out.exp(), alone(several, x).exp(), rtol=0, atol=1e-5)


def test_a_form_that_errs_behind_the_frames_it_was_tried_on_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of the whole batch are compared too, and the loop then answers all of it."""
    several, x = models(width=8), torch.randn(2048, 30)
    one, true = grouped(several), Group.pieces

    def late(group: Group, form: Form, batch: Batch) -> Iterator[forms.Piece]:
        for members, frames, logits in true(group, form, batch):
            behind = torch.arange(frames.start, frames.stop) >= 1024
            yield members, frames, logits + 9.0 * torch.eye(4)[0] * behind[:, None] * (form.kind != "loop")

    out = torch.empty(3, 2048, 4)
    monkeypatch.setattr(Group, "pieces", late)
    with torch.inference_mode():
        one.run(Batch.of(x), lambda members, where, logits: out[members, where].copy_(logits.log_softmax(-1)))
    (chosen,) = one.plans.values()
    assert chosen.form.kind == "loop"
    torch.testing.assert_close(out.exp(), alone(several, x).exp(), rtol=0, atol=1e-5)


def test_a_form_that_fails_is_passed_over() -> None:
    """An error while trying is a note in the table, not the end."""
    trial = plan.attempt(Form("stack", 4), _raising, 4, lambda form, values: Agreement(0, 0, near=True))
    assert not trial.agreement.near
    assert trial.note == "no batching rule"


def _raising(form: Form, count: int) -> Tensor:
    msg = "no batching rule\nand much more"
    raise RuntimeError(msg)


def test_the_fastest_that_agrees_is_chosen() -> None:
    """A faster form that moves probabilities is no candidate."""
    near, far = Agreement(0, 0, near=True), Agreement(0.5, 0.2, near=False)
    loop, stack, wrong = Form("loop", 8), Form("folded", 8), Form("folded", 8, "bfloat16")
    chosen = choose([Trial(loop, 2.0, near), Trial(stack, 1.0, near), Trial(wrong, 0.1, far, "does not agree")])
    assert chosen.form == stack
    assert [row["chosen"] for row in chosen.rows()] == ["", "yes", ""]
    assert chosen.rows()[1]["x loop"] == 2.0
    with pytest.raises(ValueError, match=r"agrees with the loop, got none: folded bfloat16 moved 0\.5"):
        choose([Trial(wrong, 0.1, far)])


def test_a_plan_without_trials_has_a_row() -> None:
    """What was forced, or followed from a lack of memory, was chosen although it was not tried."""
    (row,) = Plan(Form("loop", 8), "plan='loop'").rows()
    assert (row["form"], row["chosen"], row["why"], row["moved"]) == ("loop", "yes", "plan='loop'", None)


@pytest.mark.parametrize(
    ("lead", "near"), [(0.018, True), (0.022, False)], ids=["a near tie may change sides", "a clear lead may not"]
)
def test_the_agreement_rule(lead: float, near: bool) -> None:
    """Both move probabilities by a little more than half the lead."""
    p = torch.tensor([[[0.5 + lead / 2, 0.5 - lead / 2]]])
    q = torch.tensor([[[0.4995, 0.5005]]])
    found = agreement(p.log(), q.log(), exact=False)
    assert (found.near, found.changed) == (near, 1.0)
    assert not agreement(p.log(), q.log(), exact=True).near


def test_candidates_end_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest come first, faster types before exact ones, no tile above the batch, nothing twice."""
    monkeypatch.setattr(_engine, "fast_types", lambda device: ["bfloat16"])
    monkeypatch.setattr(forms, "available", lambda device: False)
    found = grouped(models(width=8), precision="auto").candidates(Batch.of(torch.randn(512, 30)))
    assert found == [
        Form("folded", 512, "bfloat16"),
        Form("folded", 256, "bfloat16"),
        Form("folded", 512),
        Form("loop", 512),
    ]


def test_a_batch_is_cut_without_changing_it(frames: zoo.FrameSet) -> None:
    """The head of a batch, and the middle of its windows, are slices of it, rows included."""
    batch = Batch.of(zoo.data.stretch(frames, 3, "none"))
    inner = batch.middle(2, 6)
    torch.testing.assert_close(inner.windows, zoo.windows(frames, torch.arange(138), 1, "none"), rtol=0, atol=0)
    head = inner.head(50)
    assert head.stretch is not None
    from_rows = head.stretch.rows.unfold(0, 3, 1).transpose(1, 2).flatten(1)[head.stretch.firsts]
    torch.testing.assert_close(from_rows, inner.windows[:50], rtol=0, atol=0)
    assert len(from_rows) == head.count == 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_forms_agree_on_a_gpu(frames: zoo.FrameSet) -> None:
    """Folded, replayed and in the frequency domain."""
    several = [model.cuda() for model in models(width=64)]
    one = grouped(several)
    one.device = torch.device("cuda")
    batch = Batch.of(zoo.data.stretch(frames.to("cuda"), 2))
    expected = alone(several, batch.windows)
    for form in (Form("folded", 64), Form("replay", 64), Form("overlap", 64)):
        for _ in range(2):
            with torch.inference_mode():
                found = one.log_probabilities(form, batch)
            torch.testing.assert_close(found.exp(), expected.exp(), rtol=0, atol=1e-5)
