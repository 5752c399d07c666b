"""Methods, networks and data by name: what estimators, command and benchmarks choose from."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from convexrobust.deep.data import load_cifar10, load_fashion_mnist, load_mnist
from convexrobust.deep.losses import LOSS_OF_TASK
from convexrobust.deep.methods import (
    Attacked,
    Certified,
    Dale,
    FastBat,
    Free,
    GradAlign,
    Mart,
    Method,
    Pairing,
    Ssds,
    Standard,
    Trades,
    WeightPerturbed,
)
from convexrobust.deep.methods.base import innermost
from convexrobust.deep.model_loss import left_as_found
from convexrobust.deep.networks import SmallCNN, preact_resnet18, two_layer, wide_resnet


def _perturbed(of, ball, gamma=5e-3, sample_loss=None):
    return WeightPerturbed(of(ball, sample_loss=sample_loss), gamma)


METHODS = {
    "standard": Standard,
    "fgsm": Attacked.fgsm,
    "fast": Attacked.fast,
    "n-fgsm": Attacked.n_fgsm,
    "pgd": Attacked.pgd,
    "free": Free,
    "gradalign": GradAlign,
    "trades": Trades,
    "mart": Mart,
    "alp": Pairing,
    "clp": partial(Pairing, labels_at="clean"),
    "awp": partial(_perturbed, Attacked.pgd),
    "trades-awp": partial(_perturbed, Trades),
    "dale": Dale,
    "fast-bat": FastBat,
    "ssds": Ssds,
    "nolam": partial(Ssds, variant="nolam"),
    "nolag": partial(Ssds, variant="nolag"),
    "certified": Certified,
    "ibp": partial(Certified, bound="ibp"),
}
_ONLY_CLASSES = {
    "mart": Mart.only_classes,
    "certified": Certified.only_classes,
    "ibp": Certified.only_classes,
}
REGRESSION_METHODS = {name: make for name, make in METHODS.items() if name not in _ONLY_CLASSES}
OF_TASK = {"classification": METHODS, "regression": REGRESSION_METHODS}
IMAGES = {"mnist": load_mnist, "fashion-mnist": load_fashion_mnist, "cifar10": load_cifar10}
TABLES = ("breast-cancer", "digits")
NETWORKS = ("two-layer", "cnn", "resnet18", "wide-resnet")


def create_method(
    method, ball, *, n_rows, random_state=0, task="classification", **options
) -> Method:
    """Return a method of adversarial training.

    Parameters
    ----------
    method : str or callable
        A name in `METHODS` (for regression, `REGRESSION_METHODS`), or what makes a method of a
        ball: a class of `deep.methods`, with its options by `functools.partial`. One that takes a
        ``sample_loss`` is given that of the task.
    ball : LpBall
        The threat model.
    n_rows : int
        Number of samples, for methods that remember each.
    random_state : int
        Seed, for methods with a generator of their own.
    task : {"classification", "regression"}
        What is trained.
    **options
        Options of the method.

    Raises
    ------
    ValueError
        For a name that is not known, a method of another task, an option that the method does not
        have, or a ball that it cannot take.
    """
    if task not in OF_TASK:
        raise ValueError(f"task must be one of {sorted(OF_TASK)}, got {task!r}.")
    factory = OF_TASK[task].get(method, method) if isinstance(method, str) else method
    if not callable(factory):
        reason = f" ({_ONLY_CLASSES[method]})" if method in _ONLY_CLASSES else ""
        raise ValueError(
            f"method must be one of {sorted(OF_TASK[task])} for {task}, or a callable that makes a "
            f"method of a ball, e.g. functools.partial(Trades, weight=3.0); got {method!r}{reason}."
        )
    legal = inspect.signature(factory).parameters
    unknown = [name for name in options if name not in legal]
    if unknown:
        raise ValueError(f"method {method!r} has no option {unknown}; it has {list(legal)[1:]}.")
    supplied = {"n_rows": n_rows, "random_state": random_state}
    if "sample_loss" in legal and legal["sample_loss"].default is None:
        supplied["sample_loss"] = LOSS_OF_TASK[task]
    made = factory(ball, **{k: v for k, v in supplied.items() if k in legal} | options)
    check_method(made)
    of_made = getattr(innermost(made), "task", "classification")
    if of_made != task:
        raise ValueError(
            f"method {type(innermost(made)).__name__} is one of {of_made}, for {task} give one of "
            f"{sorted(OF_TASK[task])}, or sample_loss={LOSS_OF_TASK[task]} to one that takes it."
        )
    return made


def check_method(method) -> None:
    """Raise ValueError unless it is an object with a step, as `deep.methods.Method`."""
    if callable(getattr(method, "step", None)) and not isinstance(method, type):
        return
    if isinstance(method, type):
        got = f"the class {method.__name__}: give an object, {method.__name__}(ball)"
    elif isinstance(method, str):
        got = f"{method!r}: create_method makes one of a name, which are {sorted(METHODS)}"
    else:
        got = f"{method!r}"
    raise ValueError(
        "method must be an object that trains by batches, such as Trades(ball) of "
        f"convexrobust.deep.methods, got {got}."
    )


def create_network(name, shape, n_outputs, *, width=64) -> torch.nn.Module:
    """Return an untrained network for points of a shape.

    Parameters
    ----------
    name : {"two-layer", "cnn", "resnet18", "wide-resnet"}
        Which one; see `convexrobust.deep.networks`. All but the first take images.
    shape : tuple
        The shape of one point: (d,) for "two-layer", else (c, h, w) with h = w.
    n_outputs : int
        Outputs.
    width : int
        Neurons of "two-layer".

    Raises
    ------
    ValueError
        For another name, or points of another shape.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {NETWORKS}, got {name!r}.")
    if len(shape) != (1 if name == "two-layer" else 3):
        kind = "points (n, d)" if name == "two-layer" else "images (n, c, h, w)"
        raise ValueError(f"network {name!r} takes {kind}, got points of shape {tuple(shape)}.")
    if name == "two-layer":
        return torch.nn.Sequential(*two_layer(shape[0], width, n_outputs))
    if name == "cnn":
        return SmallCNN(n_outputs, shape[0], shape[1])
    return (preact_resnet18 if name == "resnet18" else wide_resnet)(
        n_outputs=n_outputs, n_channels=shape[0]
    )


def network_for(network, n_features, n_outputs, *, width=64) -> torch.nn.Module:
    """Return an untrained network for rows of features.

    Parameters
    ----------
    network : callable or None
        Called as ``network(n_features, n_outputs)``; None for a two-layer network in float64.
    n_features, n_outputs : int
        Of the data.
    width : int
        Neurons of the two-layer network.

    Raises
    ------
    ValueError
        For a network that is not made anew, or with outputs of another shape.
    """
    if network is None:
        return create_network("two-layer", (n_features,), n_outputs, width=width).double()
    if isinstance(network, torch.nn.Module) or not callable(network):
        raise ValueError(
            "network must be a function of the numbers of features and outputs that returns "
            f"a torch.nn.Module, so that every fit begins anew; got {network!r}."
        )
    model = network(n_features, n_outputs)
    with torch.no_grad(), left_as_found(model, "eval"):
        shape = model(torch.zeros(2, n_features).to(next(model.parameters()))).shape
    if shape != (2, n_outputs) and not (n_outputs == 1 and shape == (2,)):
        raise ValueError(
            f"network must return a model with outputs (n, {n_outputs}) for these data, its "
            f"outputs are {tuple(shape)} for n=2 points."
        )
    return model


class Task(NamedTuple):
    """Data to train and to test on.

    Attributes
    ----------
    X, X_test : ndarray of shape (n, ...)
        Points: images (n, c, h, w) in [0, 1], or rows (n, d) of standardised features.
    y, y_test : ndarray of shape (n,)
        -1 / +1 for two classes, else class numbers 0 .. C-1.
    bounds : tuple (lo, hi) or None
        Legal range of the features.
    n_outputs : int
        Outputs of a network for it: 1 for two classes, else C.
    """

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    bounds: tuple | None
    n_outputs: int


def load_task(name, folder=None, *, classes=None, size=None, flatten=False, random_state=0) -> Task:
    """Return data by name, split into a part to train on and one to test on.

    Parameters
    ----------
    name : str
        "mnist", "fashion-mnist" or "cifar10" (see `deep.data`; their own test part), "digits" or
        "breast-cancer" of scikit-learn, or the path of an .npz file with arrays X and y. Of the
        latter three 30 % of the rows are for testing; rows (n, d) are standardised.
    folder : path, optional
        Where the files of the first three are; they are fetched from OpenML otherwise.
    classes : sequence, optional
        Only these classes, of the first three by their names too.
    size : int, optional
        Height and width to shrink images to, of the first three.
    flatten : bool
        Return images as rows (n, c * h * w).
    random_state : int
        Seed of the split.

    Raises
    ------
    FileNotFoundError, ValueError
        For a name that is not known, or files that are missing or damaged.
    """
    if name in IMAGES:
        load = partial(IMAGES[name], folder, classes=classes, size=size)
        return _task([*load("train"), *load("test")], flatten)
    if size is not None:
        raise ValueError(f"size is for {sorted(IMAGES)}, not for {name!r}.")
    X, y = _rows(name)
    if classes is not None:
        wanted = np.isin(y.astype(str), [str(label) for label in classes])
        X, y = X[wanted], y[wanted]
    y = np.unique(y, return_inverse=True)[1]
    parts = _split(X, y, random_state)
    if X.ndim == 2:
        mean, deviation = parts[0].mean(axis=0), parts[0].std(axis=0)
        deviation[deviation == 0.0] = 1.0
        parts = [(part - mean) / deviation if part.ndim == 2 else part for part in parts]
    return _task(parts, flatten)


def _rows(name):
    """Return X and y of a table, or of a file."""
    from sklearn import datasets

    if name == "breast-cancer":
        return datasets.load_breast_cancer(return_X_y=True)
    if name == "digits":
        X, y = datasets.load_digits(return_X_y=True)
        return X.reshape(-1, 1, 8, 8) / 16.0, y
    file = Path(name)
    if file.suffix != ".npz" or not file.is_file():
        raise FileNotFoundError(
            f"data must be one of {sorted([*IMAGES, *TABLES])} or the path of an .npz file with "
            f"arrays X and y, got {str(name)!r}."
        )
    with np.load(file) as data:
        if not {"X", "y"} <= set(data):
            raise ValueError(f"{file} must hold arrays X and y, it holds {sorted(data)}.")
        X, y = data["X"].astype(np.float64), data["y"]
    if X.ndim < 2 or y.shape != X.shape[:1] or not np.isfinite(X).all():
        raise ValueError(
            f"{file} must hold finite X (n, ...) and y (n,), got {X.shape}, {y.shape}."
        )
    return X, y


def _split(X, y, random_state):
    """Return X, y, X_test, y_test."""
    from sklearn.model_selection import train_test_split

    X, X_test, y, y_test = train_test_split(
        X, y, test_size=0.3, stratify=y, random_state=random_state
    )
    return [X, y, X_test, y_test]


def _task(parts, flatten):
    X, y, X_test, y_test = parts
    images = X.ndim == 4
    n_classes = int(y.max()) + 1
    if n_classes < 2:
        raise ValueError("the data must have at least two classes.")
    if n_classes == 2:
        y, y_test = 2 * y - 1, 2 * y_test - 1
    if flatten:
        X, X_test = (part.reshape(len(part), -1) for part in (X, X_test))
    bounds = (0.0, 1.0) if images else None
    return Task(X, y, X_test, y_test, bounds, 1 if n_classes == 2 else n_classes)
