"""The inner maximum: the worst perturbations of a network, found exactly or by an attack."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from convexrobust.attacks import pgd, worst_margin_objective
from convexrobust.backends import numpy as numpy_backend
from convexrobust.certificates import exact_margins


class Attack(NamedTuple):
    """Worst points found, with bounds on the worst-case objective from above and below."""

    points: np.ndarray
    samples: np.ndarray
    objective: float
    attacked_objective: float


def exact_attack(program, network) -> Attack:
    """Return the worst point of each margin, and the bracket of the worst-case objective."""
    X, n = program.X[:, : network.n_features], len(program.X)
    directions, offsets, _ = program.margin_map
    low, points = np.empty(offsets.shape), np.empty((offsets.shape[1], *X.shape))
    for e in range(offsets.shape[1]):
        for direction in np.unique(directions[:, e], axis=0):
            k = np.flatnonzero((directions[:, e] == direction).all(axis=1))
            net = replace(network, output=(network.output @ direction)[:, None], offset=None)
            found = exact_margins(net, X[k], np.ones(len(k)), program.perturbation)
            low[k, e], points[e, k] = found.lower, found.X_adv
    penalty = program.penalty(numpy_backend, *neuron_columns(network))
    objective = program.mean_loss(numpy_backend, low + offsets) + penalty
    return _attack(program, network, points, np.tile(np.arange(n), len(points)), objective)


def pgd_attack(program, network, rng) -> Attack:
    """Return the points of `pgd`, and the interval of the network's own gates as upper bound."""
    X = program.X[:, : network.n_features]
    task, scales = program.loss.task, program.loss.margin_scales
    loss = worst_margin_objective(network, program.y, task=task, scales=scales)
    points = pgd(loss, X, program.perturbation, n_steps=50, n_restarts=2, random_state=rng)
    V, W = neuron_columns(network)
    own = replace(program, D=program.sets.center @ network.hidden >= 0.0, formulation="soft")
    objective = own.mean_loss(numpy_backend, own.safe_margins(V, W))
    objective += own.penalty(numpy_backend, V, W)
    return _attack(program, network, points[None], np.arange(len(X)), objective)


def _attack(program, network, points, samples, objective) -> Attack:
    """Return the attack with its points (E, n, n_features) as rows, and their objective."""
    rows = np.concatenate([np.hstack([A, program.X[:, network.n_features :]]) for A in points])
    losses = losses_at(program, network, rows, samples).reshape(len(points), -1).max(axis=0)
    penalty = program.penalty(numpy_backend, *neuron_columns(network))
    return Attack(rows, samples, float(objective), float(program.weight @ losses + penalty))


def losses_at(program, network, X, samples) -> np.ndarray:
    """Return the loss of the network at each row of X, as if it were the sample named."""
    directions, offsets, _ = program.margin_map
    outputs = network.predict(X[:, : network.n_features])
    margins = np.einsum("nec,nc->ne", directions[samples], outputs) + offsets[samples]
    return program.loss.value(numpy_backend, margins)


def neuron_columns(network):
    """Return V and W (C, d, m) of a network, with a column for each neuron."""
    return tuple(np.maximum(s * network.output.T, 0.0)[:, None] * network.hidden for s in (1, -1))
