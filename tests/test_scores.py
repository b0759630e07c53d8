"""Scores against scikit-learn."""

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

import zoo
from zoo import FrameSet
from zoo.training.scores import Scorer, losses


def test_the_figures_are_scikit_learns(frames: FrameSet) -> None:
    """Accuracy and log loss over all frames, for two members at once."""
    spec = zoo.Spec("cylinder", features=6, context=1, classes=4, options={"width": 8})
    models = [zoo.build(spec, seed=seed).eval() for seed in (0, 1)]
    scorer = Scorer(frames, spec)
    accuracy, loss = scorer(lambda x: torch.stack([model(x) for model in models]), members=2)
    windows = zoo.windows(frames, torch.arange(len(frames)), 1)
    for m, model in enumerate(models):
        p = model(windows).softmax(1).detach().double()
        assert float(accuracy[m]) == accuracy_score(frames.labels, p.argmax(1))
        assert float(loss[m]) == pytest.approx(log_loss(frames.labels, p / p.sum(1, keepdim=True)), rel=1e-5)
    figures = scorer.metrics(accuracy[0], loss[0])
    assert figures["valid/loss"] == {
        "value": float(loss[0]),
        "unit": "nats",
        "n": 138,
        "frames": frames.fingerprint,
    }


def test_each_member_may_have_labels_of_its_own() -> None:
    """(M, B) labels, by hand: a uniform guess costs ln 2 whatever the label, a sure one nothing or 20."""
    logits = torch.tensor([[[0.0, 0.0]], [[20.0, 0.0]]])
    found = losses(logits, torch.tensor([[1], [1]]))
    torch.testing.assert_close(found, torch.tensor([[0.6931472], [20.0]]))
    assert losses(logits, torch.tensor([0]))[1].item() == pytest.approx(0, abs=1e-6)
