"""What is evaluated: networks, other torch modules, and classifiers known by predictions only."""

from __future__ import annotations

import numpy as np

from convexrobust import attacks
from convexrobust.backends import numpy as numpy_backend
from convexrobust.certificates import certify
from convexrobust.certificates.margins import margin_directions, smallest
from convexrobust.conversion import as_network, network_labels

_GRADIENT_FREE = ("square",)
_SEEDED = ("pgd", "apgd", "square", "autoattack")


class Network:
    """A model that is a two-layer network."""

    def __init__(self, network, labels, X):
        self.network, self.labels = network, labels
        self.X = np.asarray(X, dtype=np.float64).reshape(len(X), -1)

    def is_right(self, X, rows=slice(None)):
        """Return which points get the labels of these rows."""
        labels = self.labels[rows]
        return smallest(self.network, X, margin_directions(self.network, labels, len(X))) > 0.0

    def method(self, name):
        """Return the function of a known attack, None if it is not one for such models."""
        return getattr(attacks, name, None)

    def takes(self, attack):
        """Tell whether an attack applies to such models."""
        return callable(attack.method) or self.method(attack.method) is not None

    def stands(self, attack, ball, k, random_state):
        """Return which of the rows k an attack leaves right."""
        X, objective = self.X[k], attacks.worst_margin_objective(self.network, self.labels[k])
        if callable(attack.method):
            return self.is_right(attack.points(objective, X, ball, numpy_backend), k)
        first = (lambda X: objective(X)[0]) if attack.method in _GRADIENT_FREE else objective
        options = _options(attack, random_state)
        return self.is_right(self.method(attack.method)(first, X, ball, **options), k)

    def status(self, k, ball, method, time_limit):
        """Return the verdicts about the rows k."""
        options = {} if method == "interval" else {"time_limit": time_limit}
        return certify(self.network, self.X[k], self.labels[k], ball, method, **options).status


class Module:
    """Another torch module."""

    network = None

    def __init__(self, module, labels, X):
        import torch

        parameter = next(iter(module.parameters()), torch.zeros(0))
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        self.X = torch.as_tensor(np.ascontiguousarray(X)).to(parameter.device, dtype)
        self.module, self.labels = module, torch.as_tensor(labels, device=parameter.device)

    def is_right(self, X, rows=slice(None)):
        """Return which points get the labels of these rows."""
        import torch

        from convexrobust.deep.model_loss import ModelLoss, left_as_found

        with torch.no_grad(), left_as_found(self.module, "eval"):
            loss = ModelLoss(self.module, self.labels[rows], X.shape[1:])
            return (loss(X.flatten(1)) < 0.0).cpu().numpy()

    def method(self, name):
        """Return the function of a known attack."""
        from convexrobust.deep import attacks as deep_attacks
        from convexrobust.deep.autoattack import autoattack

        return autoattack if name == "autoattack" else getattr(deep_attacks, name)

    def takes(self, attack):
        """Tell whether an attack applies to such models."""
        return True

    def stands(self, attack, ball, k, random_state):
        """Return which of the rows k an attack leaves right."""
        x, y = self.X[k], self.labels[k]
        if callable(attack.method):
            return self.is_right(self._given(attack, x, y, ball), k)
        options = _options(attack, random_state)
        return self.is_right(self.method(attack.method)(self.module, x, y, ball, **options), k)

    def _given(self, attack, x, y, ball):
        """Return the points of an attack that is a function."""
        from convexrobust.backends import torch as torch_backend
        from convexrobust.deep.model_loss import ModelLoss, autograd_objective, left_as_found

        with left_as_found(self.module, "eval"):
            objective = autograd_objective(ModelLoss(self.module, y, x.shape[1:]))
            return attack.points(objective, x.flatten(1), ball, torch_backend).reshape(x.shape)


class BlackBox:
    """A classifier of which only predictions are known."""

    network = None

    def __init__(self, model, y, X):
        self.model, self.y = model, y
        self.X = np.asarray(X, dtype=np.float64).reshape(len(X), -1)
        self.position = np.searchsorted(model.classes_, y)
        self.is_pairwise = getattr(model, "decision_function_shape", "ovr") == "ovo"

    def is_right(self, X, rows=slice(None)):
        """Return which points get the labels of these rows."""
        return self.model.predict(X) == self.y[rows]

    def method(self, name):
        """Return the function of a known attack, None if it needs gradients."""
        return getattr(attacks, name) if name in _GRADIENT_FREE else None

    def takes(self, attack):
        """Tell whether an attack applies to such models."""
        return isinstance(attack.method, str) and self.method(attack.method) is not None

    def stands(self, attack, ball, k, random_state):
        """Return which of the rows k an attack leaves right."""
        options = _options(attack, random_state)
        method = self.method(attack.method)
        return self.is_right(method(lambda X: self._loss(X, k), self.X[k], ball, **options), k)

    def _loss(self, X, k):
        """Return the largest rival's score less the label's; above 0 is misclassified."""
        has_scores = hasattr(self.model, "decision_function")
        scores = (self.model.decision_function if has_scores else self.model.predict_proba)(X)
        if scores.ndim == 1:
            return np.where(self.position[k] == 1, -scores, scores)
        if scores.shape[1] != len(self.model.classes_) or self.is_pairwise:
            raise ValueError(
                "decision_function must return one score a class: give "
                "decision_function_shape='ovr' to the model."
            )
        rivals, rows = np.array(scores, dtype=np.float64), np.arange(len(X))
        rivals[rows, self.position[k]] = -np.inf
        return rivals.max(axis=1) - scores[rows, self.position[k]]


def subject_of(name, model, X, y):
    """Return what is evaluated, or an error that names the model."""
    try:
        return _recognised(model, X, y)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model {name!r}: {error}") from error


def _recognised(model, X, y):
    try:
        network = as_network(model)
    except ValueError:
        if hasattr(model, "named_children"):
            return Module(model, y, X)
        if hasattr(model, "model_"):  # an estimator around a module
            return Module(model.model_, network_labels(model, y), np.reshape(X, (len(X), -1)))
        if not (hasattr(model, "predict") and hasattr(model, "classes_")):
            raise
        network_labels(model, y)
        return BlackBox(model, y, X)
    return Network(network, network_labels(model, y), X)


def _options(attack, random_state):
    seed = {"random_state": random_state} if attack.method in _SEEDED else {}
    return seed | attack.options
