"""Teachers: what student and teacher see, what is learnt from the answers, and what is refused."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

import ensemble
import zoo
from zoo import FrameSet, Recipe, Spec
from zoo.training import Teacher
from zoo.training.step import Batch, Batches, losses, objective

SPEC = Spec("cylinder", features=6, context=1, classes=4, options={"width": 8, "depth": 2, "dropout": 0.2})
QUICK = Recipe(epochs=3, batch_size=32, learning_rate=0.01)
WIDER = replace(SPEC, context=3, options={"width": 8})


def model_of(spec: Spec = SPEC, **fields: Any) -> Teacher:
    """A network that was not trained, as a teacher with what its spec says."""
    model = zoo.build(spec, seed=9).eval()
    known = {"context": spec.context, "classes": (*"abcd",), "fingerprint": "nine"} | fields
    return Teacher(lambda windows, frames: model(windows).softmax(-1), **known)


def labelling(frames: FrameSet) -> Teacher:
    """One that knows the labels, and gives them as sure answers."""
    known = frames.labels
    assert known is not None
    return Teacher(lambda windows, at: one_hot(known[at], 4).float(), of_frames=(frames.fingerprint,), fingerprint="y")


def bare(frames: FrameSet) -> FrameSet:
    """Three of the recordings, without labels."""
    return replace(frames.select(torch.tensor([0, 2, 4])), labels=None)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_gradient_of_the_soft_loss_is_the_one_worked_by_hand(temperature: float) -> None:
    """T (q - p), with q the student's softmax at T and p the teacher's answers; for each member."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    p = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    p /= p.sum(-1, keepdim=True)
    batch = Batch(torch.zeros(3, 1), torch.tensor([0, 1, -1]), soft=p)
    found = objective(logits, batch, Recipe(temperature=temperature))
    found.sum().backward()
    q = (logits.detach() / temperature).softmax(-1)
    assert found.shape == (2, 3)
    torch.testing.assert_close(logits.grad, temperature * (q - p), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.detach(), -(temperature**2) * (p * q.log()).sum(-1), rtol=1e-10, atol=1e-12)


def test_hard_labels_have_their_weight_and_smoothing() -> None:
    """.3 of the labels' smoothed loss; a frame without a label has the teacher's part alone."""
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    p = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    batch = Batch(torch.zeros(2, 1), torch.tensor([1, -1]), soft=p)
    found = objective(logits, batch, Recipe(hard_weight=0.3, label_smoothing=0.1))[0]
    logs = logits[0].log_softmax(-1)
    soft = -(p * logs).sum(-1)
    hard = -(0.05 * logs[0, 0] + 0.95 * logs[0, 1])
    torch.testing.assert_close(found, torch.stack([0.3 * hard + 0.7 * soft[0], 0.7 * soft[1]]))


@given(temperature=st.floats(0.2, 50), seed=st.integers(0, 99))
def test_targets_are_powers_that_sum_to_one(temperature: float, seed: int) -> None:
    """Each to the power of 1 / T, over their sum; a class without probability stays without."""
    p = torch.rand(5, 4, generator=torch.Generator().manual_seed(seed))
    p[:, 2] = 0
    p /= p.sum(-1, keepdim=True)
    found = Teacher(lambda windows, frames: p).targets(torch.zeros(5, 1), torch.arange(5), None, temperature)
    powers = p.double() ** (1 / temperature)
    torch.testing.assert_close(found.double(), powers / powers.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mask_time": 1, "mask_features": 2, "precision": "bfloat16"},
        {"optimiser": "sam", "clip_norm": 0.1, "accumulate": 2},
    ],
    ids=str,
)
def test_sure_answers_at_temperature_one_are_plain_training(fields: dict[str, Any], frames: FrameSet) -> None:
    """To the bit, figures included; for members that are trained together, too."""
    recipe = Recipe.from_dict(QUICK.to_dict() | fields)
    plain = zoo.train(SPEC, recipe, frames, frames)
    taught = zoo.train(SPEC, recipe, frames, frames, teacher=labelling(frames))
    assert taught.digest == plain.digest
    assert taught.metrics == plain.metrics
    assert (taught.kind, plain.kind) == ("distilled", "trained")
    group: dict[str, Any] = {"seeds": (3, 5), "together": 2}
    several = ensemble.cotrain(SPEC, recipe, frames, frames, **group)
    learners = ensemble.cotrain(SPEC, recipe, frames, frames, teacher=labelling(frames), **group)
    assert [one.digest for one in learners] == [one.digest for one in several]


def test_a_teacher_is_asked_once_for_all_students(frames: FrameSet) -> None:
    """With the frames' windows at once where members have orders of their own."""
    asked: list[int] = []

    def predict(windows: Tensor, at: Tensor) -> Tensor:
        asked.append(len(windows))
        return torch.full((len(windows), 4), 0.25)

    for own, expected in ((False, 32), (True, 64)):
        recipes = [replace(QUICK, seed=seed, order_seed=None if own else 0) for seed in (0, 1)]
        batches = [batch for step in Batches(frames, SPEC, recipes, Teacher(predict)).epoch(1) for batch in step]
        assert asked[0] == expected
        assert len(asked) == len(batches)
        assert batches[0].soft is not None
        assert batches[0].soft.shape == (*batches[0].labels.shape, 4)
        asked.clear()


@pytest.mark.parametrize("context", [0, 1, 3])
@pytest.mark.parametrize("padding", ["recording", "corpus"])
@pytest.mark.parametrize("fields", [{}, {"mask_time": 2, "mask_features": 2}, {"mix_up": 0.5, "mask_time": 2}], ids=str)
def test_student_and_teacher_see_the_same_windows(
    context: int, padding: str, fields: dict[str, Any], frames: FrameSet
) -> None:
    """The smaller window is the middle of the larger; what the student sees does not depend on the teacher."""
    seen: list[Tensor] = []

    def predict(windows: Tensor, at: Tensor) -> Tensor:
        seen.extend([windows, at])
        return torch.full((len(windows), 4), 0.25)

    spec, recipe = replace(SPEC, padding=padding), Recipe(batch_size=138, **fields)
    [[plain]] = Batches(frames, spec, [recipe]).epoch(1)
    [[batch]] = Batches(frames, spec, [recipe], Teacher(predict, context=context)).epoch(1)
    assert torch.equal(batch.windows, plain.windows)
    larger, smaller = sorted((seen[0], batch.windows), key=lambda x: -x.shape[1])
    edge = (larger.shape[1] - smaller.shape[1]) // 2
    assert torch.equal(larger[:, edge : larger.shape[1] - edge], smaller)
    if not fields:
        torch.testing.assert_close(seen[0], zoo.windows(frames, seen[1], context, padding=padding))


def test_features_are_blanked_around_the_students_window_too(frames: FrameSet) -> None:
    """A run of features is blank in all frames that the teacher sees; runs of frames are in the student's window."""
    masked = zoo.data.audio.mask(
        torch.ones(50, 7, 6), max_time=2, max_features=3, generator=torch.Generator().manual_seed(0), around=2
    )
    features = (masked[:, 0] == 0)[:, None].expand_as(masked)
    assert (masked[features] == 0).all()
    assert ((masked == 0) & ~features)[:, [0, 1, 5, 6]].sum() == 0
    assert ((masked == 0) & ~features)[:, 2:5].any()


def test_mix_up_mixes_windows_and_their_losses(frames: FrameSet) -> None:
    """A share of each window and label, of at least a half its own; without a teacher, too."""
    recipe = Recipe(batch_size=138, mix_up=0.4)
    numbered = replace(frames, features=torch.arange(138.0)[:, None].repeat(1, 6))
    spec = replace(SPEC, context=0, normalisation="none")
    [[plain]] = Batches(numbered, spec, [replace(recipe, mix_up=0.0)]).epoch(1)
    [[batch]] = Batches(numbered, spec, [recipe]).epoch(1)
    assert batch.share is not None
    assert batch.others is not None
    assert float(batch.share.min()) >= 0.5
    own = plain.windows[:, 0]
    partner = (batch.windows[:, 0] - batch.share * own) / (1 - batch.share)
    clear = batch.share < 0.9
    assert torch.equal(frames.labels[partner[clear].round().long()], batch.others[clear])
    logits = torch.randn(1, 138, 4, generator=torch.Generator().manual_seed(0))
    mixed = batch.share * losses(logits, batch.labels) + (1 - batch.share) * losses(logits, batch.others)
    torch.testing.assert_close(objective(logits, batch, recipe), mixed)
    first, again = (zoo.train(SPEC, replace(QUICK, mix_up=0.4), frames, frames).digest for _ in range(2))
    assert first == again != zoo.train(SPEC, QUICK, frames, frames).digest


@pytest.mark.parametrize("teacher", [model_of(), model_of(WIDER), model_of(replace(SPEC, context=0))])
def test_a_student_learns_what_the_teacher_says(teacher: Teacher, frames: FrameSet) -> None:
    """The labels are unused: they may be any, and the loss on the teacher's answers falls."""
    wrong = replace(frames, labels=(frames.labels + 1) % 4)
    records: list[Any] = []
    one = zoo.train(SPEC, replace(QUICK, epochs=5), frames, frames, teacher=teacher, on_epoch=records.append)
    other = zoo.train(SPEC, replace(QUICK, epochs=5, monitor="valid/loss"), wrong, frames, teacher=teacher)
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    assert other.kind == "distilled"
    assert one.tensors.keys() == other.tensors.keys()
    labels_free = [
        zoo.train(SPEC, replace(QUICK, epochs=1), each, frames, teacher=teacher).digest for each in (frames, wrong)
    ]
    assert labels_free[0] == labels_free[1]


def test_classes_in_another_order_are_put_in_that_of_the_frames(frames: FrameSet) -> None:
    """Permuted columns and names teach the same."""
    plain, order = model_of(), [2, 0, 3, 1]
    moved = Teacher(lambda windows, at: plain.predict(windows, at)[:, order], 1, classes=(*"cadb",))
    found = [zoo.train(SPEC, QUICK, frames, frames, teacher=teacher).digest for teacher in (plain, moved)]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match=r"\['x'\] only in the teacher and \['d'\] only in the frames"):
        zoo.train(SPEC, QUICK, frames, frames, teacher=replace(plain, classes=(*"abcx",)))


def test_frames_without_labels_join_training(frames: FrameSet) -> None:
    """Every frame comes once; they have no label, and no part in the training accuracy."""
    more = bare(frames)
    teacher, recipe = labelling(frames), Recipe(epochs=1, batch_size=77)

    def predict(windows: Tensor, at: Tensor) -> Tensor:
        return one_hot(torch.cat([frames.labels, torch.zeros(len(more), dtype=torch.long)])[at], 4).float()

    of_both = replace(teacher, predict=predict, of_frames=(frames.fingerprint, more.fingerprint))
    batches = [b for [b] in Batches(frames, SPEC, [recipe], of_both, [more]).epoch(1)]
    labels = torch.cat([batch.labels for batch in batches])
    assert (labels == -1).sum() == len(more)
    assert torch.equal(labels[labels >= 0].bincount(), frames.labels.bincount())
    windows = torch.cat([batch.windows for batch in batches])
    expected = torch.cat([zoo.windows(each, torch.arange(len(each)), 1) for each in (frames, more)])
    torch.testing.assert_close(windows.sort(dim=0).values, expected.sort(dim=0).values)
    records: list[Any] = []
    still = replace(recipe, learning_rate=0.0, hard_weight=0.5)
    spec = replace(SPEC, options={"width": 8, "batchnorm": False})
    work = {"teacher": of_both, "unlabelled": [more], "on_epoch": records.append}
    zoo.train(spec, replace(still, batch_size=len(labels)), frames, frames, **work)
    assert records[0]["train/accuracy"] == pytest.approx(records[0]["valid/accuracy"])


def test_stored_answers_teach_as_the_teacher_does(frames: FrameSet) -> None:
    """Half the precision and the most probable classes, the rest spread evenly; 4 bytes a class."""
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).repeat(138, 1)
    teacher = Teacher.stored(p, [frames], top=2)
    found = teacher.predict(torch.zeros(1, 18), torch.tensor([7]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.25, 0.125, 0.125]]))
    whole = model_of().predict(zoo.windows(frames, torch.arange(138), 1), torch.arange(138)).detach()
    teacher = Teacher.stored(whole, [frames], top=4)
    torch.testing.assert_close(teacher.predict(p, torch.arange(138)), whole, rtol=1e-3, atol=1e-4)
    assert zoo.train(SPEC, QUICK, frames, frames, teacher=teacher).kind == "distilled"
    with pytest.raises(ValueError, match=r"same windows .* stored answers with mask_time=1"):
        zoo.train(SPEC, replace(QUICK, mask_time=1), frames, frames, teacher=teacher)
    with pytest.raises(ValueError, match=r"\(138, 4\), a row per frame, got \(137, 4\)"):
        Teacher.stored(whole[1:], [frames])
    with pytest.raises(ValueError, match="1 to 4 classes of each frame, got 5"):
        Teacher.stored(whole, [frames], top=5)


@pytest.mark.parametrize(
    ("fields", "teacher", "message"),
    [
        ({"temperature": 2.0}, None, "teacher with temperature=2, got none; pass teacher="),
        ({"hard_weight": 0.5}, None, r"teacher with hard_weight=0\.5, got none"),
        ({"hard_weight": 1.0}, model_of(), "hard_weight below 1"),
        ({"label_smoothing": 0.1}, model_of(), r"label_smoothing=0\.1, which acts on hard labels only"),
        ({}, model_of(normalisation="mean"), "normalisation 'mean' instead of 'mean_std'; .* store"),
        ({}, model_of(padding="corpus"), "padding 'corpus' instead of 'recording'"),
        ({}, model_of(of_frames=("another",)), "got one of others"),
        ({"mix_up": 0.2}, model_of(of_frames=("another",)), "answers are of single frames"),
        ({}, lambda windows: windows, r"probabilities \(32, 4\) from the teacher, got \(32, 18\)"),
        ({}, lambda windows: windows[:, :4], "sum to one .* give the softmax"),
        ({}, lambda windows: torch.full((len(windows), 4), torch.nan), "sum to one"),
        ({}, lambda windows: torch.rand(len(windows), 4).softmax(-1), "twice alike"),
        ({}, lambda windows: None, "got NoneType"),
    ],
)
def test_what_cannot_teach_is_refused(fields: dict[str, Any], teacher: Any, message: str, frames: FrameSet) -> None:
    """In one line that says what is wrong; co-trained, too."""
    recipe = Recipe.from_dict(QUICK.to_dict() | fields)
    with pytest.raises(ValueError, match=message):
        zoo.train(SPEC, recipe, frames, frames, teacher=teacher)
    with pytest.raises(ValueError, match=message):
        ensemble.cotrain(SPEC, recipe, frames, frames, seeds=range(2), teacher=teacher)


def test_frames_without_labels_are_checked(frames: FrameSet) -> None:
    """They need a teacher, and the features and classes of the others."""
    more = bare(frames)
    with pytest.raises(ValueError, match="teacher with frames without labels, got none; pass teacher="):
        zoo.train(SPEC, QUICK, frames, frames, unlabelled=[more])
    for other in (replace(more, classes=(*"abcx",)), replace(more, features=more.features[:, :5].contiguous())):
        with pytest.raises(ValueError, match="frames without labels of the features and classes"):
            zoo.train(SPEC, QUICK, frames, frames, teacher=model_of(), unlabelled=[other])
    with pytest.raises(TypeError, match=r"expected Sequence\[FrameSet\] as the unlabelled of train\(\), got FrameSet"):
        zoo.train(SPEC, QUICK, frames, frames, teacher=model_of(), unlabelled=more)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got int"):
        zoo.train(SPEC, QUICK, frames, frames, teacher=5)  # type: ignore[arg-type]


def test_a_directory_belongs_to_its_teacher(frames: FrameSet, tmp_path: Path) -> None:
    """The same teacher resumes, another, none or other frames without labels do not."""
    teacher, more = model_of(), bare(frames)
    first = zoo.train(SPEC, QUICK, frames, frames, teacher=teacher, unlabelled=[more], directory=tmp_path)
    again = zoo.train(SPEC, QUICK, frames, frames, teacher=teacher, unlabelled=[more], directory=tmp_path)
    assert again.digest == first.digest
    for other in (None, replace(teacher, fingerprint="ten")):
        with pytest.raises(ValueError, match=r"another run \(another teacher\)"):
            zoo.train(SPEC, QUICK, frames, frames, teacher=other, directory=tmp_path)
    with pytest.raises(ValueError, match=r"another run \(other frames"):
        zoo.train(SPEC, QUICK, frames, frames, teacher=teacher, directory=tmp_path)
    with pytest.raises(ValueError, match="a teacher with a fingerprint where a directory is given"):
        zoo.train(SPEC, QUICK, frames, frames, teacher=lambda windows: windows, directory=tmp_path)


SCRIPT = """
import sys
sys.path[:0] = {path!r}
import torch, zoo
torch.set_num_threads(1)
frames = zoo.sample_corpus("valid").select(torch.arange(4))
more = zoo.sample_corpus("test").select(torch.arange(3))
spec = zoo.Spec("cylinder", features=27, context=1, classes=40, options=dict(width=16, depth=1, dropout=0.2))
recipe = zoo.Recipe(epochs={epochs}, batch_size=64, schedule="cosine", mask_time=1, mix_up=0.3, temperature=2.0,
                    hard_weight=0.3, label_smoothing=0.1)
model = zoo.build(zoo.Spec("cylinder", features=27, context=2, classes=40, options=dict(width=8)), seed=1).eval()
teacher = zoo.training.Teacher(lambda x, at: model(x).softmax(-1), context=2, fingerprint="one")
found = zoo.train(spec, recipe, frames, frames, teacher=teacher, unlabelled=[more], directory={directory!r})
"""


def test_a_killed_distillation_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """SIGKILL some time after the third epoch; then the same run again, with everything that a teacher brings."""
    script = SCRIPT.format(path=sys.path, epochs=8, directory=str(tmp_path / "killed"))
    running = subprocess.Popen([sys.executable, "-c", script])
    while running.poll() is None and not list(tmp_path.glob("killed/epoch-0003*")):
        os.sched_yield()
    running.kill()
    assert running.wait() == -signal.SIGKILL
    digests = []
    for directory in (str(tmp_path / "killed"), None):
        names: dict[str, Any] = {}
        exec(SCRIPT.format(path=[], epochs=8, directory=directory), names)
        digests.append(names["found"].digest)
    assert digests[0] == digests[1]


def test_runs_of_before_are_resumed(frames: FrameSet, tmp_path: Path) -> None:
    """The state of a run whose recipe did not have the fields of today."""
    path = tmp_path / "state.safetensors"
    first = zoo.train(SPEC, QUICK, frames, frames, directory=tmp_path)
    data = path.read_bytes()
    header = zoo.checkpoint.verify_bytes(data)
    text = header.metadata["run"]
    for name in ("temperature", "hard_weight", "mix_up"):
        text = text.replace(f'"{name}": {getattr(QUICK, name)}, ', "")
    assert "mix_up" not in text
    path.write_bytes(zoo.checkpoint.pack(zoo.checkpoint.tensors_of(data, header), {"run": text}))
    assert zoo.train(SPEC, QUICK, frames, frames, directory=tmp_path).digest == first.digest
