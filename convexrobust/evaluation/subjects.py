"""What is evaluated: networks, other torch modules, and classifiers known by predictions only."""

from __future__ import annotations

import numpy as np

from convexrobust import attacks
from convexrobust.certificates import certify
from convexrobust.certificates.margins import margin_directions, smallest
from convexrobust.conversion import as_network, network_labels

SUITE = {
    "fgsm": {},
    "pgd": {"n_steps": 50, "n_restarts": 5},
    "apgd": {"n_steps": 100, "n_restarts": 2},
    "square": {"n_queries": 1000},
}
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

    def takes(self, attack):
        """Tell whether an attack applies to such models."""
        return attack in SUITE

    def stands(self, attack, options, ball, k, random_state):
        """Return which of the rows k an attack leaves right."""
        objective = attacks.worst_margin_objective(self.network, self.labels[k])
        first = (lambda X: objective(X)[0]) if attack in _GRADIENT_FREE else objective
        options = _options(attack, options, random_state)
        return self.is_right(getattr(attacks, attack)(first, self.X[k], ball, **options), k)

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

    def takes(self, attack):
        """Tell whether an attack applies to such models."""
        return True

    def stands(self, attack, options, ball, k, random_state):
        """Return which of the rows k an attack leaves right."""
        from convexrobust.deep import attacks as deep_attacks
        from convexrobust.deep.autoattack import autoattack

        method = autoattack if attack == "autoattack" else getattr(deep_attacks, attack)
        options = _options(attack, options, random_state)
        return self.is_right(method(self.module, self.X[k], self.labels[k], ball, **options), k)


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

    def takes(self, attack):
        """Tell whether an attack applies to such models."""
        return attack in _GRADIENT_FREE

    def stands(self, attack, options, ball, k, random_state):
        """Return which of the rows k an attack leaves right."""
        options = _options(attack, options, random_state)
        method = getattr(attacks, attack)
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


def _options(attack, options, random_state):
    return {"random_state": random_state, **options} if attack in _SEEDED else options
