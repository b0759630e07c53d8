"""`Teacher`: what answers the windows that a student sees with probabilities, from which the student learns.

References:
    Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv:1503.02531, 2015.
    Beyer et al., "Knowledge distillation: a good teacher is patient and consistent", CVPR 2022.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from zoo.data.frames import FrameSet, stretch
from zoo.models.spec import Spec
from zoo.training.recipe import Recipe

_SUM = 1e-3  # how far the sum of a row of probabilities may be from one


@dataclass(frozen=True, eq=False)
class Teacher:
    """A function from prepared windows to probabilities, and what it wants of the windows.

    Student and teacher see the same augmented windows: masks are drawn for the student's window, and mixed windows are
    mixed before either sees them. A teacher of more context sees the frames around as well, without runs of blanked
    frames there; one of less context sees the middle. It answers once per batch, for all students that share it.

    Args:
        predict: (windows (B, inputs), frames (B,)) -> probabilities (B, C), rows that sum to one, on the device of the
            windows and the same each time. The windows are float32, of the teacher's own context; `frames` are the
            positions of their centres in the training frames, then in the frames without labels.
        context: frames on each side that it wants; None for the student's.
        normalisation: that it wants; None for the student's. It must be the student's, unless it reads no windows.
        padding: likewise.
        classes: names of the columns; where they are the training frames' in another order, they are put in theirs.
            None for the classes of the training frames.
        fingerprint: text that changes with what it answers, by which a run in a directory is resumed with the same
            teacher only.
        parents: ids of the models in it, which the student's checkpoint keeps.
        of_windows: whether its answers depend on the windows; if not, the windows cannot be augmented.
        of_frames: where its answers depend on `frames`, fingerprints of the frame sets that these are positions in: the
            training frames, then those without labels.
        groups: (N,) int64, where its answers depend on `frames`: of frames with the same number they depend on the
            windows alone, so that windows are mixed within groups. None: they cannot be mixed then.

    Example:
        >>> import zoo
        >>> spec = zoo.Spec("cylinder", features=2, context=1, classes=2, options={"width": 4})
        >>> model = zoo.build(spec, seed=0).eval()
        >>> teacher = Teacher(lambda windows, frames: model(windows).softmax(-1), context=1, classes=("no", "yes"))
    """

    predict: Callable[[Tensor, Tensor], Tensor]
    context: int | None = None
    normalisation: str | None = None
    padding: str | None = None
    classes: tuple[str, ...] | None = None
    fingerprint: str = ""
    parents: tuple[str, ...] = ()
    of_windows: bool = True
    of_frames: tuple[str, ...] = ()
    groups: Tensor | None = None

    @classmethod
    def of(cls, teacher: Teacher | Callable[[Tensor], Tensor]) -> Teacher:
        """A teacher as it is; or made from a function of windows alone, of the student's own context and classes."""
        if isinstance(teacher, Teacher):
            return teacher
        if not callable(teacher):
            msg = f"expected a teacher, or a function from windows to probabilities, got {type(teacher).__name__}"
            raise TypeError(msg)
        return cls(lambda windows, frames: teacher(windows))

    @classmethod
    def stored(
        cls,
        probabilities: Tensor,
        frames: Sequence[FrameSet],
        *,
        classes: Sequence[str] | None = None,
        top: int = 8,
        parents: Sequence[str] = (),
    ) -> Self:
        """Answers that were computed before, for training without augmentation.

        A frame takes 4 * `top` bytes: float16 probabilities and int16 classes of its `top` most probable classes. What
        is left of the sum is spread evenly over the others.

        Args:
            probabilities: (N, C) of all frames.
            frames: the training frames, then those without labels; N in all.
            classes: names of the columns; those of `frames` if left out.
            top: number of classes that are kept, at most C.
            parents: as in the class.

        Raises:
            ValueError: not a row per frame, not a column per class, or `top` outside 1 to C.

        Example:
            >>> frames = FrameSet(torch.zeros(1, 1), None, torch.tensor([0, 1]), ("a", "b", "c"))
            >>> teacher = Teacher.stored(torch.tensor([[0.5, 0.25, 0.25]]), [frames], top=1)
            >>> teacher.predict(torch.zeros(1, 1), torch.tensor([0]))
            tensor([[0.5000, 0.2500, 0.2500]])
        """
        C = len(frames[0].classes)
        expected = (sum(map(len, frames)), C)
        if tuple(probabilities.shape) != expected:
            msg = f"expected probabilities {expected}, a row per frame, got {tuple(probabilities.shape)}"
            raise ValueError(msg)
        if not 1 <= top <= C:
            msg = f"expected to keep 1 to {C} classes of each frame, got {top}"
            raise ValueError(msg)
        largest = probabilities.topk(top, dim=-1)
        best, which = largest.values.half(), largest.indices.short()  # (N, top)
        there = {best.device: (best, which)}  # and on the devices where they were asked for

        def predict(windows: Tensor, frames: Tensor) -> Tensor:
            if frames.device not in there:
                there[frames.device] = best.to(frames.device), which.to(frames.device)
            kept, places = (table[frames] for table in there[frames.device])
            rest = (1 - kept.float().sum(dim=-1, keepdim=True)).clamp(min=0) / max(C - top, 1)
            return rest.expand(-1, C).scatter(1, places.long(), kept.float())

        digest = hashlib.sha256(repr((expected, top)).encode())
        for tensor in (best, which):
            digest.update(tensor.cpu().contiguous().numpy().data)
        of_frames = tuple(each.fingerprint for each in frames)
        return cls(
            predict,
            classes=tuple(classes or frames[0].classes),
            fingerprint=digest.hexdigest(),
            parents=tuple(parents),
            of_windows=False,
            of_frames=of_frames,
        )

    def order(self, classes: Sequence[str]) -> list[int] | None:
        """Its columns in the order of these classes, None where that is its own; a ValueError where they are others."""
        if self.classes is None or tuple(self.classes) == tuple(classes):
            return None
        if sorted(self.classes) != sorted(classes):
            more, fewer = sorted({*self.classes} - {*classes}), sorted({*classes} - {*self.classes})
            msg = (
                f"expected a teacher of the classes of the training frames, got {more} only in the teacher and {fewer} "
            )
            raise ValueError(msg + "only in the frames")
        return [self.classes.index(name) for name in classes]

    @torch.no_grad()
    def targets(self, windows: Tensor, frames: Tensor, order: Tensor | None, temperature: float) -> Tensor:
        """(B, C) float32: its columns in this order, to the power of 1 / `temperature`, each row divided by its sum."""
        p = self.predict(windows, frames).to(windows.device, torch.float32)
        p = p if order is None else p[:, order]
        return p / p.sum(dim=-1, keepdim=True) if temperature == 1 else (p.log() / temperature).softmax(dim=-1)


def frame_sets(unlabelled: Sequence[FrameSet]) -> tuple[FrameSet, ...]:
    """The sets of frames without labels; a TypeError where that is no sequence of them."""
    if isinstance(unlabelled, FrameSet) or not all(isinstance(each, FrameSet) for each in unlabelled):
        came = type(unlabelled).__name__
        msg = f"expected a sequence of frame sets without labels, such as [frames], got {came}"
        raise TypeError(msg)
    return tuple(unlabelled)


def check_teacher(
    teacher: Teacher | None, spec: Spec, recipe: Recipe, train: FrameSet, unlabelled: Sequence[FrameSet] = ()
) -> None:
    """Raise ValueError unless a student of this spec and recipe can learn from the teacher, or, if None, without one.

    The teacher is asked the first batch of the frames twice: it must answer with probabilities, and the same.
    """
    if teacher is None:
        given = {"temperature": recipe.temperature != 1, "hard_weight": recipe.hard_weight != 0}
        needing = [f"{name}={getattr(recipe, name):g}" for name, needs in given.items() if needs]
        if needing or unlabelled:
            what = " and ".join(needing + ["frames without labels"] * bool(unlabelled))
            msg = f"expected a teacher with {what}, got none; pass teacher=, or leave out what needs one"
            raise ValueError(msg)
        return
    _check_fit(teacher, spec, recipe, train, unlabelled)
    _check_answers(teacher, spec, recipe, train)


def _check_fit(teacher: Teacher, spec: Spec, recipe: Recipe, train: FrameSet, unlabelled: Sequence[FrameSet]) -> None:
    """Raise ValueError where teacher, spec, recipe and frames contradict each other."""
    teacher.order(train.classes)
    problem = ""
    if recipe.hard_weight == 1:
        problem = "a hard_weight below 1 with a teacher, which has no influence otherwise, got 1"
    elif recipe.label_smoothing and not recipe.hard_weight:
        problem = (
            f"a hard_weight with label_smoothing={recipe.label_smoothing:g}, which acts on hard labels only, got 0"
        )
    elif teacher.of_frames and teacher.groups is None and recipe.mix_up:
        problem = (
            f"a teacher of windows alone with mix_up={recipe.mix_up:g}, got one whose answers are of single frames"
        )
    elif not teacher.of_windows and (recipe.mask_time or recipe.mask_features):
        masks = f"mask_time={recipe.mask_time} and mask_features={recipe.mask_features}"
        problem = f"a teacher that sees the same windows as the student, got stored answers with {masks}"
    elif teacher.of_frames and teacher.of_frames != tuple(each.fingerprint for each in (train, *unlabelled)):
        problem = "a teacher of these training frames and frames without labels, got one of others"
    elif teacher.of_windows:
        wants = {"normalisation": teacher.normalisation, "padding": teacher.padding}
        others = [name for name, value in wants.items() if value not in (None, getattr(spec, name))]
        if others:
            differ = " and ".join(f"{name} {wants[name]!r} instead of {getattr(spec, name)!r}" for name in others)
            way_out = "give the student the teacher's, or store the teacher's answers (Teacher.stored)"
            problem = f"windows that teacher and student can share, got {differ}; {way_out}"
    for each in unlabelled:
        if (each.features.shape[1], each.classes) != (train.features.shape[1], train.classes):
            problem = "frames without labels of the features and classes of the training frames, got others"
        elif each.features.device != train.features.device:
            problem = f"frames without labels on {train.features.device}, got {each.features.device}; use .to()"
    if problem:
        msg = f"expected {problem}"
        raise ValueError(msg)


def _check_answers(teacher: Teacher, spec: Spec, recipe: Recipe, train: FrameSet) -> None:
    """Raise ValueError unless the teacher answers a batch with probabilities, and twice with the same."""
    context = spec.context if teacher.context is None else teacher.context
    count = min(recipe.batch_size, len(train))
    windows = stretch(train, context, spec.normalisation, spec.padding, stop=count).windows()
    frames = torch.arange(count, device=windows.device)
    with torch.no_grad():
        p, again = (teacher.predict(windows.clone(), frames) for _ in range(2))
    came = f"{tuple(p.shape)} {p.dtype}" if isinstance(p, Tensor) else type(p).__name__
    expected = (count, spec.classes)
    if not isinstance(p, Tensor) or tuple(p.shape) != expected or not p.is_floating_point():
        msg = f"expected probabilities {expected} from the teacher, got {came}"
        raise ValueError(msg)
    sums = p.float().sum(dim=-1)
    if not ((p >= 0).all() and ((sums - 1).abs() <= _SUM).all()):
        low, high = float(p.min()), float(sums.max())
        msg = f"expected rows of probabilities that sum to one from the teacher, got values from {low:.3g} and sums up "
        raise ValueError(f"{msg}to {high:.3g}; of logits give the softmax")
    if not torch.allclose(p.float(), again.float(), rtol=0, atol=_SUM):
        msg = (
            "expected a teacher that answers the same windows twice alike, got other probabilities; is it in eval mode?"
        )
        raise ValueError(msg)
