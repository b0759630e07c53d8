"""Members outside torch: estimators and functions run, combine and are judged as models of torch are."""

import functools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.model_selection import cross_val_score
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC
from torch import Tensor, nn

import ensemble
import zoo
from ensemble.outputs.store import StoreError, read_outputs

pytestmark = pytest.mark.usefixtures("own_cache")

X, Y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])
ESTIMATORS: dict[str, Any] = {
    "forest": RandomForestClassifier(4, random_state=0),
    "boosting": GradientBoostingClassifier(n_estimators=2, random_state=0),
    "histograms": HistGradientBoostingClassifier(max_iter=2, random_state=0),
    "pipeline": make_pipeline(StandardScaler(), LogisticRegression()),
    "function": make_pipeline(FunctionTransformer(np.log1p), GaussianNB()),
    "neighbours": KNeighborsClassifier(),
    "calibrated": CalibratedClassifierCV(GaussianNB(), cv=2),
    "network": MLPClassifier((4,), max_iter=2, random_state=0),
    "descent": SGDClassifier(loss="log_loss", random_state=0),
}


@functools.cache
def fitted(name: str) -> Any:
    """An estimator that predicts the names of the three flowers."""
    return ESTIMATORS[name].fit(X, NAMES[Y])


def uniform(rows: Any) -> NDArray[np.float64]:
    """Equal probabilities of three classes."""
    return np.full((len(rows), 3), 1 / 3)


def linear() -> nn.Module:
    """A model of torch over the same four numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    "form", [np.asarray, torch.from_numpy, pd.DataFrame, lambda x: x[::-1][::-1], lambda x: x.astype(">f8")]
)
def test_an_estimator_gives_what_it_gives_alone(name: str, form: Callable[[Any], Any]) -> None:
    """From arrays, tensors and tables, in double precision as it was fitted; many rows in pieces."""
    members = ensemble.from_estimators({name: fitted(name)})
    outputs = ensemble.collect(members, form(X))
    assert (outputs.members, outputs.classes) == ((name,), tuple(NAMES))
    np.testing.assert_allclose(outputs.probabilities[0].numpy(), fitted(name).predict_proba(X), rtol=0, atol=1e-6)
    assert members.about == (ensemble.outputs.About(),)


def test_more_rows_than_a_step() -> None:
    """A function sees at most a step of rows at once, tables included; results are in order."""
    seen: list[int] = []

    def first_column(rows: pd.DataFrame) -> NDArray[np.float64]:
        seen.append(len(rows))
        p = rows["p"].to_numpy()
        return np.stack([p, 1 - p], axis=1)

    members = ensemble.from_callables({"f": first_column}, classes=["n", "y"], returns="probabilities")
    table = pd.DataFrame({"p": np.linspace(0, 1, 2 * members.step + 5), "text": "x"})
    found = ensemble.collect(members, table).probabilities[0, :, 0]
    np.testing.assert_allclose(found, table["p"], atol=1e-6)
    assert max(seen) == members.step


def test_mixed_with_torch(tmp_path: Path) -> None:
    """Joined by +; classes are aligned by name, and everything behind members works: rules, fits, judging."""
    module = linear()
    order = tuple(NAMES[[2, 0, 1]])
    torch_members = ensemble.from_modules({"net": module}, classes=order)
    members = torch_members + ensemble.from_estimators({"forest": fitted("forest"), "bayes": fitted("function")})
    assert members.names == ("net", "forest", "bayes")
    outputs = ensemble.collect(members, [(X, NAMES[Y])])
    assert outputs.classes == order
    expected = module(torch.from_numpy(X).float()).softmax(-1).detach()
    np.testing.assert_allclose(outputs.probabilities[0], expected, atol=1e-5)
    np.testing.assert_allclose(outputs.probabilities[1], fitted("forest").predict_proba(X)[:, [2, 0, 1]], atol=1e-6)
    assert [order[label] for label in outputs.require_labels()] == NAMES[Y].tolist()
    fit = ensemble.fit_weights(outputs)
    report = ensemble.evaluate(outputs, {"mean": ensemble.mean, "weighted": fit.rule})
    assert set(report.rules["name"]) >= {"mean", "weighted"}
    final = ensemble.Ensemble(members, fit.rule)
    expected_rows = fit.rule(outputs.probabilities)
    np.testing.assert_allclose(final.predict_proba(X), expected_rows, atol=1e-5)
    assert final.score(X, NAMES[Y]) == pytest.approx(float((expected_rows.argmax(1) == outputs.labels).float().mean()))
    scores = cross_val_score(final, X, NAMES[Y], cv=3)
    assert len(scores) == 3
    assert clone(final).members is members
    assert members.subset(["forest", "net"]).classes == order
    again = pickle.loads(pickle.dumps(members))  # as scikit-learn's worker processes do
    np.testing.assert_allclose(ensemble.collect(again, X).probabilities, outputs.probabilities, atol=1e-6)
    registry = zoo.Registry(tmp_path / "registry.json")
    with pytest.raises(ValueError, match=r"whose weights a registry can keep, but \['forest', 'bayes'\] are no torch"):
        registry.register_ensemble("mixed", final)


def test_a_set_keeps_its_settings_when_joined() -> None:
    """Of two sets of torch models both must have the same; a set outside torch has none of its own."""
    one = ensemble.from_modules({"a": linear()}, classes=NAMES, plan="loop")
    other = ensemble.from_estimators({"forest": fitted("forest")})
    assert (one + other).forced == (other + one).forced == "loop"
    with pytest.raises(ValueError, match=r"two sets of members with equal settings, got .*'loop'.* and .*'auto'"):
        one + ensemble.from_modules({"b": linear()}, classes=NAMES)
    with pytest.raises(ValueError, match=r"distinct names of members, got \['a'\]"):
        one + ensemble.from_modules({"a": linear()}, classes=NAMES, plan="loop")
    with pytest.raises(ValueError, match="expected members of the same classes"):
        one + ensemble.from_callables({"f": uniform}, classes=["x", "y", "z"], returns="probabilities")
    with pytest.raises(TypeError, match="unsupported operand"):
        one + linear()


def test_members_from_a_registry_stay_one_stack(tmp_path: Path) -> None:
    """Joined with others, they are not loaded or stacked again."""
    spec = zoo.Spec("mlp", features=4, context=0, classes=3, options={"widths": (5,)}, normalisation="none")
    registry = zoo.Registry(tmp_path / "registry.json")
    for seed in (0, 1):
        registry.register(f"m{seed}", zoo.build(spec, seed=seed), spec=spec, classes=[*NAMES])
    loaded = ensemble.load(registry, "*")
    members = ensemble.from_estimators({"forest": fitted("forest")}) + loaded
    assert members.groups[0][0].stack is loaded.groups[0][0].stack
    frames = zoo.FrameSet(torch.from_numpy(X).float(), torch.from_numpy(Y), torch.tensor([0, 70, 150]), (*NAMES,))
    outputs = ensemble.collect(members, {"forest": X, "m0": frames, "m1": frames})
    np.testing.assert_allclose(outputs.probabilities[1:], ensemble.collect(loaded, frames).probabilities, atol=1e-6)
    np.testing.assert_allclose(outputs.probabilities[0], fitted("forest").predict_proba(X), atol=1e-6)
    assert torch.equal(outputs.require_labels(), frames.labels)
    assert outputs.fingerprint == frames.fingerprint
    with pytest.raises(ValueError, match="a spec for member 'forest' to prepare frames by, got none"):
        ensemble.collect(members, frames)


def test_different_inputs_by_name(tmp_path: Path) -> None:
    """Tables, text, sparse matrices and tensors side by side; every member gets its own, in pieces of the same rows."""
    text = np.array([" ".join(["petal"] * int(row[2]) + ["sepal"] * int(row[0])) for row in X])
    table = pd.DataFrame({"length": X[:, 0], "kind": np.where(X[:, 2] > 2, "long", "short")})
    words = make_pipeline(CountVectorizer(), MultinomialNB()).fit(text, NAMES[Y])
    coded = make_column_transformer((OneHotEncoder(), ["kind"]), remainder="passthrough")
    columns = make_pipeline(coded, LogisticRegression()).fit(table, NAMES[Y])
    narrow = LogisticRegression().fit(X[:, :2], NAMES[Y])
    matrix = sparse.csr_matrix(X)
    thin = LogisticRegression().fit(matrix, NAMES[Y])
    estimators = {"words": words, "columns": columns, "narrow": narrow, "thin": thin}
    module = linear()
    members = ensemble.from_estimators(estimators) + ensemble.from_modules({"net": module}, classes=NAMES)
    inputs = {"words": text, "columns": table, "narrow": X[:, :2], "thin": matrix, "net": torch.from_numpy(X)}
    outputs = ensemble.collect(members, inputs)
    for place, (name, estimator) in enumerate(estimators.items()):
        expected = estimator.predict_proba(inputs[name])
        np.testing.assert_allclose(outputs.probabilities[place], expected, atol=1e-6)
    net = module(torch.from_numpy(X).float()).softmax(-1).detach()
    np.testing.assert_allclose(outputs.probabilities[4], net, atol=1e-5)
    final = ensemble.Ensemble(members, ensemble.mean)
    np.testing.assert_allclose(final.predict_proba(inputs), outputs.probabilities.mean(0), atol=1e-5)
    assert final.score(inputs, NAMES[Y]) > 0.5
    kept = ensemble.collect(members, inputs, cache=tmp_path / "store")
    assert torch.equal(kept.log_probabilities, outputs.log_probabilities)
    labelled = ensemble.collect(members, [(inputs, Y)])
    assert labelled.require_labels().tolist() == Y.tolist()
    swapped = inputs | {"thin": X, "narrow": X[:, :2] + 1}
    again = ensemble.collect(members, swapped, cache=tmp_path / "other")
    np.testing.assert_allclose(again.probabilities[2], narrow.predict_proba(X[:, :2] + 1), atol=1e-6)
    with pytest.raises(ValueError, match=r"an input for each member, got none for \['thin', 'net'\]; there are"):
        ensemble.collect(members, {name: inputs[name] for name in ("words", "columns", "narrow")})
    with pytest.raises(ValueError, match=r"inputs of one length for all members, got .*'narrow': 149"):
        ensemble.collect(members, inputs | {"narrow": X[1:, :2]})
    with pytest.raises(TypeError, match=r"inputs \(N, ...\) as a tensor, array or table, got list"):
        ensemble.collect(members, inputs | {"narrow": X.tolist()})


def test_what_is_in_a_store_follows_the_input_of_each(tmp_path: Path) -> None:
    """Two members that swap their inputs are not mistaken for what was stored."""
    members = ensemble.from_estimators({"a": fitted("forest"), "b": fitted("function")})
    inputs = {"a": X, "b": X + 1}
    ensemble.collect(members, inputs, cache=tmp_path)
    swapped = {"a": inputs["b"], "b": inputs["a"]}
    found = ensemble.collect(members, swapped, cache=tmp_path)
    assert torch.equal(found.log_probabilities, ensemble.collect(members, swapped).log_probabilities)


@pytest.mark.parametrize("returns", ["probabilities", "logits"])
@pytest.mark.parametrize("form", [np.asarray, torch.tensor, list, pd.DataFrame, np.float32, np.float16])
def test_functions_answer_in_any_form(returns: Any, form: Callable[[Any], Any]) -> None:
    """Arrays, tensors, lists, tables; what the numbers are is declared."""
    logits = np.log([[0.5, 0.25, 0.25]])

    def answer(rows: Any) -> Any:
        values = np.repeat(logits, len(rows), axis=0)
        return form(np.exp(values) if returns == "probabilities" else values + 3)

    members = ensemble.from_callables({"f": answer}, classes=NAMES, returns=returns)
    np.testing.assert_allclose(members.log_probabilities(X)[0].exp(), np.repeat(np.exp(logits), 150, axis=0), atol=1e-3)


def test_columns_of_an_answer_are_found_by_name() -> None:
    """A table whose columns are the classes in another order is put in theirs."""

    def answer(rows: Any) -> pd.DataFrame:
        return pd.DataFrame({"b": np.full(len(rows), 0.9), "a": np.full(len(rows), 0.1)})

    members = ensemble.from_callables({"f": answer}, classes=["a", "b"], returns="probabilities")
    assert members.log_probabilities(X)[0, 0].exp().tolist() == pytest.approx([0.1, 0.9])


def test_a_function_cannot_change_the_rows() -> None:
    """It is asked on rows of its own, whatever they are."""

    def greedy(rows: Any) -> NDArray[np.float64]:
        rows[:] = 0
        return uniform(rows)

    members = ensemble.from_callables({"f": greedy, "g": uniform}, classes=NAMES, returns="probabilities")
    for x in (X.copy(), torch.from_numpy(X.copy()), pd.DataFrame(X)):
        members.log_probabilities(x)
        np.testing.assert_array_equal(np.asarray(x), X)


def noise(rows: Any) -> NDArray[np.float64]:
    """Other answers every time."""
    return np.random.default_rng().dirichlet(np.ones(3), len(rows))


def ranks(rows: Any) -> NDArray[np.float64]:
    """Answers that depend on all rows."""
    x = np.asarray(rows)[:, 0]
    p = (x - x.min() + 0.1) / (x.max() - x.min() + 0.3)
    return np.stack([p, 1 - p, 0 * p], axis=1)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (noise, "the same answers from 'f' to the same rows"),
        (ranks, "an answer to each row by itself from 'f', got others for a row alone than among 8 rows"),
        (lambda rows: uniform(rows)[:, :2], r"probabilities \(8, 3\) from 'f', .* got \(8, 2\)"),
        (lambda rows: uniform(rows)[:1], r"probabilities \(8, 3\) from 'f', .* got \(1, 3\)"),
        (lambda rows: uniform(rows)[:, 0], r"probabilities \(8, 3\) from 'f', .* got \(8,\)"),
        (lambda rows: uniform(rows) * 2, "sum to one from member 'f', got a row with sum 2"),
        (lambda rows: np.log(uniform(rows)), "from member 'f'.*logarithms of probabilities"),
        (lambda rows: uniform(rows) * np.nan, "from member 'f'"),
        (lambda rows: 1 / 0, "probabilities from 'f' for 8 rows, got ZeroDivisionError: division by zero"),
    ],
    ids=["random", "all rows", "columns", "rows", "vector", "scores", "logarithms", "nan", "raises"],
)
def test_answers_that_cannot_be_used_are_refused(function: Callable[[Any], Any], words: str) -> None:
    """With the member's name and what came."""
    members = ensemble.from_callables({"f": function}, classes=NAMES, returns="probabilities")
    with pytest.raises(ValueError, match=words):
        members.log_probabilities(X)


@pytest.mark.parametrize(
    ("answer", "words"),
    [("yes", "got NoneType|got .*text|got str"), (None, "from 'f'"), ({"a": 1}, "from 'f'")],
)
def test_answers_without_numbers_are_refused(answer: Any, words: str) -> None:
    """Text, nothing, a dictionary."""
    members = ensemble.from_callables({"f": lambda rows: answer}, classes=NAMES, returns="probabilities")
    with pytest.raises((TypeError, ValueError), match=words):
        members.log_probabilities(X)


@pytest.mark.parametrize(
    ("estimator", "error", "words"),
    [
        (LogisticRegression(), ValueError, "a fitted estimator for 'e', got LogisticRegression without classes_; fit"),
        (LogisticRegression, TypeError, "with predict_proba for 'e', got the class LogisticRegression"),
        (SVC().fit(X, Y), TypeError, "with predict_proba for 'e', got SVC"),
        (nn.Linear(2, 2), TypeError, "got Linear; .*a module to from_modules"),
        (uniform, TypeError, "got function; .*a function to from_callables"),
        (
            MultiOutputClassifier(GaussianNB()).fit(X, np.stack([Y, Y], axis=1)),
            ValueError,
            "an estimator of one output for 'e', got 2",
        ),
    ],
    ids=["not fitted", "class", "no probabilities", "module", "function", "two outputs"],
)
def test_wrong_estimators_are_refused(estimator: Any, error: type[Exception], words: str) -> None:
    """Each with the way out."""
    with pytest.raises(error, match=words):
        ensemble.from_estimators({"e": estimator})


def test_wrong_arguments_are_refused() -> None:
    """What is declared must be known; what is called must be callable."""
    with pytest.raises(ValueError, match="at least one member, got none"):
        ensemble.from_estimators({})
    with pytest.raises(ValueError, match="returns= 'probabilities' or 'logits' for 'f', got 'scores'"):
        ensemble.from_callables({"f": uniform}, classes=NAMES, returns="scores")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'logits' for 'g', got None"):
        ensemble.from_callables({"f": uniform, "g": uniform}, classes=NAMES, returns={"f": "logits"})
    with pytest.raises(TypeError, match="a function for 'f', got int"):
        ensemble.from_callables({"f": 3}, classes=NAMES, returns="logits")  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"a torch.nn.Module for 'f', got RandomForestClassifier; see from_estimators"):
        ensemble.from_modules({"f": fitted("forest")}, classes=NAMES)
    with pytest.raises(ValueError, match="probabilities from 'pipeline' for 8 rows, got ValueError: X has 2 features"):
        ensemble.from_estimators({"pipeline": fitted("pipeline")}).log_probabilities(X[:, :2])


def test_numbered_classes_are_names() -> None:
    """Integers, floats and booleans of `classes_` are text, so that they agree with those of other members."""
    for labels in (Y, Y.astype(float), Y.astype(np.int8)):
        assert ensemble.from_estimators({"e": GaussianNB().fit(X, labels)}).classes == ("0", "1", "2")
    members = ensemble.from_estimators({"e": GaussianNB().fit(X, Y + 3)})
    members = members + ensemble.from_modules({"net": linear()}, classes=[5, 4, 3])  # type: ignore[list-item]
    final = ensemble.Ensemble(members, lambda p: p[0])
    assert final.score(X, Y + 3) == GaussianNB().fit(X, Y).score(X, Y)
    assert ensemble.from_estimators({"e": GaussianNB().fit(X, Y == 1)}).classes == ("False", "True")


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_identified_by_its_content(name: str, tmp_path: Path) -> None:
    """The same again is found in the store; fitted on other rows, it is another."""
    assert ensemble.from_estimators({"e": clone(ESTIMATORS[name]).fit(X, NAMES[Y])}).digests[0]
    digests = {
        ensemble.from_estimators({"e": clone(ESTIMATORS[name]).fit(X[::step], NAMES[Y[::step]])}).digests[0]
        for step in (1, 1, 2)
    }
    assert len(digests) == 2


def test_what_cannot_be_identified_is_not_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is computed each time, which is said; the others are stored and answered from there."""
    lock = Locked()
    members = ensemble.from_callables({"lock": lock}, classes=NAMES[::-1], returns="probabilities")
    members = members + ensemble.from_estimators({"forest": fitted("forest")})
    members = members + ensemble.from_callables({"f": uniform}, classes=NAMES, returns="probabilities")
    direct = ensemble.collect(members, X)
    for _ in range(2):
        lock.calls.clear()
        found = ensemble.collect(members, X, cache=tmp_path / "store")
        assert torch.equal(found.log_probabilities, direct.log_probabilities)
        assert max(lock.calls) == 150
        assert f"['lock'] are not stored in {tmp_path / 'store'}: what decides" in caplog.messages[-1]
    stored = read_outputs(tmp_path / "store")
    assert (stored.members, stored.classes) == (("forest", "f"), members.classes)
    assert torch.equal(stored.log_probabilities, direct.log_probabilities[1:])
    found = ensemble.collect(members.subset(["lock"]), X, cache=tmp_path / "none")
    assert torch.equal(found.log_probabilities[0], direct.log_probabilities[0])
    assert not (tmp_path / "none").exists()


def test_an_estimator_that_is_fitted_again_is_another(tmp_path: Path) -> None:
    """Also for members that exist already: what is stored is not taken for its answers."""
    estimator = GaussianNB().fit(X, NAMES[Y])
    members = ensemble.from_estimators({"e": estimator})
    before, first = members.digests, ensemble.collect(members, X, cache=tmp_path).log_probabilities.clone()
    estimator.fit(X[::3], NAMES[Y[::3]])
    found = ensemble.collect(members, X, cache=tmp_path).log_probabilities
    assert members.digests != before
    assert not torch.equal(found, first)
    assert torch.equal(found, ensemble.collect(members, X).log_probabilities)


def test_a_table_is_identified_by_its_columns_too() -> None:
    """Equal numbers under other names are another input for members that look for names."""
    members = ensemble.from_callables({"f": uniform}, classes=NAMES, returns="probabilities")
    prints = {
        ensemble.collect(members, pd.DataFrame({"a": [1.0], other: [text]})).fingerprint
        for other, text in (("b", 2.0), ("c", 2.0), ("b", 3.0), ("b", "x"), ("b", "y"), ("b", 2.0))
    }
    assert len(prints) == 5


def test_a_function_is_identified_by_what_it_holds() -> None:
    """Its code, its defaults and what it closes over; not by its name alone."""

    def weighted(weight: float) -> Callable[[Any], Any]:
        return lambda rows: uniform(rows) * weight

    def digest(function: Callable[[Any], Any]) -> str:
        return ensemble.from_callables({"f": function}, classes=NAMES, returns="logits").digests[0]

    assert digest(weighted(1.0)) == digest(weighted(1.0)) != digest(weighted(2.0))
    assert digest(functools.partial(uniform)) == digest(functools.partial(uniform)) != digest(uniform)
    assert not digest(Locked())


class Locked:
    """Holds something whose content no program can read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls: list[int] = []

    def __call__(self, rows: Any) -> NDArray[np.float64]:
        """Equal probabilities."""
        self.calls.append(len(rows))
        return uniform(rows)


class Tempered(nn.Module):
    """A model whose answers depend on an attribute and on a number outside it."""

    factor = 1.0

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.linear, self.temperature = nn.Linear(4, 3), temperature

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) -> (B, 3)."""
        return self.linear(x) * self.factor / self.temperature  # type: ignore[no-any-return]


def test_a_store_is_believed_only_where_the_model_still_answers_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another attribute, other code: computed anew. A checkpoint whose code has changed: refused by name."""
    torch.manual_seed(0)
    one, other = Tempered(1.0), Tempered(5.0)
    other.load_state_dict(one.state_dict())

    def collected(cache: Path | None) -> Tensor:
        members = ensemble.from_modules({"one": one, "other": other}, classes=NAMES)
        return ensemble.collect(members, torch.from_numpy(X), cache=cache).log_probabilities

    assert not torch.allclose(*collected(tmp_path), atol=0.1)
    torch.testing.assert_close(collected(tmp_path), collected(None))
    one.temperature = 9.0
    torch.testing.assert_close(collected(tmp_path), collected(None))
    monkeypatch.setattr(Tempered, "factor", 3.0)
    torch.testing.assert_close(collected(tmp_path), collected(None))

    registry, frames = zoo.Registry(tmp_path / "registry.json"), zoo.sample_corpus("test")
    spec = zoo.Spec(
        "mlp", features=frames.features.shape[1], context=0, classes=len(frames.classes), options={"widths": (5,)}
    )
    registry.register("m", zoo.build(spec, seed=0), spec=spec, classes=frames.classes)
    ensemble.collect(ensemble.load(registry, "m"), frames, cache=tmp_path / "stored")
    relu = nn.ReLU.forward
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: relu(self, x) * 3)
    with pytest.raises(StoreError, match=r"holds outputs of 'm' that it no longer gives \(a probability moved by"):
        ensemble.collect(ensemble.load(registry, "m"), frames, cache=tmp_path / "stored")
