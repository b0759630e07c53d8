"""Optimisers by name: what each takes from a recipe. Plain data; `zoo.training` makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.training.recipe import Recipe


@dataclass(frozen=True)
class Choice:
    """A class of `torch.optim`, or `AdamSGD`, and its keywords."""

    kind: str
    settings: dict[str, Any]


OPTIMISERS: dict[str, Callable[[Recipe], Choice]] = {}


def _optimiser(function: Callable[[Recipe], Choice]) -> Callable[[Recipe], Choice]:
    OPTIMISERS[function.__name__] = function
    return function


@_optimiser
def sgd(recipe: Recipe) -> Choice:
    """Plain stochastic gradient descent."""
    return Choice("SGD", _common(recipe) | {"fused": True})


@_optimiser
def momentum(recipe: Recipe) -> Choice:
    """SGD with momentum (Polyak's heavy ball)."""
    return Choice("SGD", _common(recipe) | {"momentum": recipe.momentum, "fused": True})


@_optimiser
def nesterov(recipe: Recipe) -> Choice:
    """SGD with Nesterov's momentum."""
    return Choice("SGD", momentum(recipe).settings | {"nesterov": True})


@_optimiser
def sam(recipe: Recipe) -> Choice:
    """SGD with momentum along the gradient taken `rho` uphill (Foret et al., ICLR 2021)."""
    return momentum(recipe)


@_optimiser
def adagrad(recipe: Recipe) -> Choice:
    """Duchi et al., JMLR 12, 2011."""
    return Choice("Adagrad", _common(recipe) | {"eps": recipe.epsilon})


@_optimiser
def adadelta(recipe: Recipe) -> Choice:
    """Zeiler, arXiv 1212.5701; the paper has a learning rate of 1 and epsilon 1e-6."""
    return Choice("Adadelta", _common(recipe) | {"rho": recipe.beta2, "eps": recipe.epsilon})


@_optimiser
def rmsprop(recipe: Recipe) -> Choice:
    """Tieleman and Hinton, lecture 6.5, 2012."""
    return Choice("RMSprop", _common(recipe) | {"alpha": recipe.beta2, "eps": recipe.epsilon})


@_optimiser
def adam(recipe: Recipe) -> Choice:
    """Kingma and Ba, ICLR 2015; weight decay goes into the gradient."""
    return Choice("Adam", _common(recipe) | _moments(recipe) | {"fused": True})


@_optimiser
def adamw(recipe: Recipe) -> Choice:
    """Loshchilov and Hutter, ICLR 2019; weight decay shrinks the weights themselves."""
    return Choice("AdamW", adam(recipe).settings)


@_optimiser
def adam_sgd(recipe: Recipe) -> Choice:
    """Adam, then SGD at the rate that Adam showed (Keskar and Socher, arXiv 1712.07628); no weight decay, use l2."""
    return Choice("AdamSGD", {"lr": recipe.learning_rate} | _moments(recipe))


def _common(recipe: Recipe) -> dict[str, Any]:
    return {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}


def _moments(recipe: Recipe) -> dict[str, Any]:
    return {"betas": (recipe.beta1, recipe.beta2), "eps": recipe.epsilon}
