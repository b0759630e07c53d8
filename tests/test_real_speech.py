"""The whole path from frames to a report, on real speech where AN4 lies beside the project."""

from pathlib import Path

import pytest
import torch

import ensemble
import zoo

AN4 = Path(__file__).parents[2] / "shared" / "data" / "an4"


@pytest.mark.skipif(not AN4.is_dir(), reason="no AN4 beside the project")
def test_members_trained_on_real_speech_are_better_together(tmp_path: Path) -> None:
    """After two epochs on a third of the recordings, members are good and their weighted mean is better than each."""
    train, valid, test = (zoo.read_corpus(AN4, part) for part in ("train", "dev", "test"))
    train = train.select(torch.arange(0, train.recordings, 3))
    registry = zoo.Registry(tmp_path / "registry.json")
    for seed, context in enumerate((8, 12)):
        options = {"width": 128, "depth": 2, "activation": "gelu", "dropout": 0.1}
        spec = zoo.Spec("cylinder", features=27, context=context, classes=40, options=options)
        recipe = zoo.Recipe(epochs=2, batch_size=512, learning_rate=2e-3, seed=seed)
        registry.register(f"cylinder-{context}", zoo.train(spec, recipe, train, valid))
    members = ensemble.load(registry, "*")
    fit = ensemble.fit_weights(ensemble.collect(members, valid))
    rules = {"weighted": ensemble.WeightedMean(fit.weights)}
    report = ensemble.evaluate(ensemble.collect(members, test), rules, replicates=100)
    assert fit.gap <= 1e-6
    assert report.members["accuracy"].min() > 0.65
    assert report.rules["accuracy"][0] > report.members["accuracy"].max()
    assert report.rules["log_loss"][0] < report.members["log_loss"].min()
