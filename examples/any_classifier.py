"""Your classifiers come from two libraries: two scikit-learn models and a torch module vote on handwritten digits.

    python examples/any_classifier.py --epochs 60

Neither a registry nor a spec is needed. The digits come with scikit-learn; the weights are fitted on some that no model
was trained on, and judged on others.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import ensemble


def train(x: torch.Tensor, y: torch.Tensor, epochs: int) -> nn.Module:
    """A small convolutional network on images of 8 x 8 points; rows of 64 numbers go in, as for the others."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 16, 3, padding=1)
    net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), convolution, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10))
    optimiser = torch.optim.AdamW(net.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x)), 64):
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            optimiser.step()
    return net


def main() -> None:
    """Train, combine, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="of the network")
    parser.add_argument("--trees", type=int, default=200, help="of the forest")
    arguments = parser.parse_args()

    x, y = load_digits(return_X_y=True)
    fit, valid, test = slice(0, 900), slice(900, 1300), slice(1300, None)
    forest = RandomForestClassifier(arguments.trees, random_state=0).fit(x[fit], y[fit])
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(x[fit], y[fit])
    net = train(torch.tensor(x[fit]).float(), torch.tensor(y[fit]), arguments.epochs)

    members = ensemble.from_estimators({"forest": forest, "linear": linear})
    members += ensemble.from_modules({"net": net}, classes=members.classes)
    on_valid = ensemble.collect(members, [(x[valid], y[valid])])  # one batch of inputs and labels
    on_test = ensemble.collect(members, [(x[test], y[test])])

    weighted = ensemble.fit_weights(on_valid)
    rules: dict[str, ensemble.Rule] = {"mean": ensemble.mean, "majority": ensemble.majority, "weighted": weighted.rule}
    report = ensemble.evaluate(on_test, rules, baseline=ensemble.judge.best_member(on_valid))
    print(report.members[["name", "accuracy", "log_loss"]].round(4).to_string(index=False))
    print(f"gains are over {report.baseline}, the best single member on the validation digits")
    columns = ["name", "accuracy", "log_loss", "gain", "gain_low", "gain_high"]
    print(report.rules[columns].round(4).to_string(index=False))

    final = ensemble.Ensemble(members, weighted.rule)
    print("weights:", dict(zip(members.names, weighted.weights.round(3).tolist(), strict=True)))
    print("first digits:", *final.predict(x[test])[:10], "accuracy", round(final.score(x[test], y[test]), 4))


if __name__ == "__main__":
    main()
