r"""Certified training: gradient descent on the bound that the soft program minimises.

A network with neurons :math:`u_j` and output weights :math:`\alpha_j` is a point of the soft
program whose patterns are its own gates. Moving the weights *and* the gates with them is not convex
any more, but quick, and leads to good patterns: the convex program on the gates of the network can
then only improve on it. (Certified training by interval bounds is due to Gowal et al., arXiv
1810.12715, and Mirman et al. 2018; the bound here is that of `convexrobust.program`.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from convexrobust.adam import Adam
from convexrobust.backends import numpy as numpy_backend
from convexrobust.network import TwoLayerReLU
from convexrobust.perturbations import DUAL_NORM
from convexrobust.solvers.memory import keep_freed
from convexrobust.solvers.working_set.columns import joined
from convexrobust.solvers.working_set.point import Point

_LEAST_LENGTH = 1e-12
_TRAINED_ROWS = 4000  # that a first network is trained on, at most
_ARRAYS = 8  # of the size of rows times neurons in a step of training


def train_certified(
    program,
    *,
    width=64,
    n_steps=300,
    learning_rate=0.05,
    warmup=1.0 / 3.0,
    start=None,
    random_state=0,
) -> TwoLayerReLU:
    r"""Train a network by Adam on its certified objective.

    .. math:: \min_{u, \alpha}\ \sum_k \omega_k \varphi(m_k) + \frac{\beta}{2}
              \sum_j \left( \|u_j\|_2^2 + \|\alpha_j\|_1^2 \right)

    with the margins of the soft program, whose patterns are :math:`1[X u_j \ge 0]`.

    Parameters
    ----------
    program : ConvexProgram
        Data, loss, perturbations and weight decay; its patterns and formulation are not looked at.
    width : int
        Hidden neurons m.
    n_steps : int
        Steps of Adam on all rows; the learning rate falls to 0 along a cosine.
    learning_rate : float
        First learning rate, for weights scaled to the data.
    warmup : float
        Share of the steps in which the radius of the perturbations grows linearly from 0.
    start : TwoLayerReLU, optional
        Network to start from instead of random weights; ``width`` is then ignored.
    random_state : int or numpy Generator
        For the first weights.

    Returns
    -------
    TwoLayerReLU
        The last network, balanced.

    Raises
    ------
    ValueError
        For a start with other numbers of features or outputs.
    """
    rng = np.random.default_rng(random_state)
    U, A = _first_weights(program, width, rng) if start is None else _weights_of(start, program)
    bound, adam = _CertifiedBound(program), Adam([U, A])
    keep_freed(_ARRAYS * len(program.X) * U.shape[1])
    for step in range(n_steps):
        share = min(1.0, (step + 1) / (warmup * n_steps)) if warmup > 0.0 else 1.0
        gradients = bound.gradients(U, A, share)
        rate = learning_rate * (1.0 + np.cos(np.pi * step / n_steps)) / 2.0
        U, A = adam.step([U, A], gradients, rate)
    hidden, output = _balanced(U, A)
    return TwoLayerReLU(hidden, output, intercept=program.intercept)


def first_point(program, start, network, width, rng) -> Point:
    """Return the point that a run begins with: a start, a network, or one trained for a moment.

    Parameters
    ----------
    program : ConvexProgram
        Its patterns are among those of the point.
    start : Solution or None
        A point of the program, or of one with other patterns ``start.D``.
    network : TwoLayerReLU or None
        What to begin with instead.
    width : int
        Neurons of the one trained where there is neither; 0 begins with the zero network.
    rng : numpy.random.Generator
        For its first weights, and the rows that it is trained on.
    """
    if start is not None and start.D is not None:
        program, start = joined(replace(program, D=start.D), start, program.D)
    fits = start is not None and start.V.shape == program.shape
    if network is None and not fits and width > 0:
        network = train_certified(some_rows(program, rng), width=width, random_state=rng)
    if network is not None:
        features = program.sets.center[:, : network.n_features]
        V, W, D = network.to_convex(features, program.D)
        program = replace(program, D=D)
        return Point(program, program.solution(V, W))
    if not fits:
        return Point.zero(program)
    known = {"multipliers": start.multipliers, "state": start.state}
    return Point(program, program.solution(start.V, start.W, **known))


def some_rows(program, rng):
    """Return the program on some of its rows, enough to train a first network."""
    n = len(program.X)
    if n <= _TRAINED_ROWS or program.copy_of is not None:
        return program
    rows = np.sort(rng.choice(n, _TRAINED_ROWS, replace=False))
    return replace(
        program,
        X=program.X[rows],
        y=program.y[rows],
        D=program.D[rows],
        sample_weight=program.weight[rows],
    )


class _CertifiedBound:
    """The soft program's objective as a function of a network's weights, by hand-made gradients."""

    def __init__(self, program):
        self.program, self.sets = program, program.sets
        self.X = program.sets.center
        margin_map = program.margin_map
        self.T, self.offsets = margin_map.directions, margin_map.offsets
        self.beta = program.regularizer.beta
        self.one_shape = self.sets.one_shape

    def gradients(self, U, A, share):
        """Return the gradients of the objective in U (d, m) and A (m, C), radius times share."""
        radius = share * self.sets.radius
        Z = self.X @ U
        D, S = (Z >= 0.0).astype(np.float64), np.where(Z >= 0.0, 1.0, -1.0)
        slack = np.maximum(self._reach(U, radius) - np.abs(Z), 0.0)
        margins, worst = self._margins(U, A, Z, D, slack, radius)
        a = self._row_weights(margins)[:, None] * self.program.loss.multipliers(margins)
        grad_U, grad_A = np.zeros_like(U), np.zeros_like(A)
        for e in range(a.shape[1]):
            used = a[:, e] > 0.0
            if not used.any():
                continue
            X, T = self.X[used], self.T[used, e]
            W = T @ A.T
            charged = np.where((W < 0.0) & (slack[used] > 0.0), -W, 0.0)
            points = X - worst[e][used]
            active = a[used, e, None] * D[used]
            paid = a[used, e, None] * charged
            grad_U -= points.T @ (active * W) + X.T @ (paid * S[used])
            grad_U += self._reach_gradient(U, paid, radius, used)
            gain = active * (points @ U) + a[used, e, None] * (W < 0.0) * slack[used]
            grad_A -= gain.T @ T
        return grad_U + self.beta * U, grad_A + self.beta * np.abs(A).sum(1)[:, None] * np.sign(A)

    def _row_weights(self, margins):
        """Return the weights of the rows (n,): a sample's is that of its worst copy."""
        program = self.program
        if program.copy_of is None:
            return program.weight
        losses = program.loss.value(numpy_backend, margins)
        worst = losses[program.copies].argmax(axis=1)
        weights = np.zeros(len(losses))
        weights[program.copies[np.arange(len(worst)), worst]] = program.weight
        return weights

    def _margins(self, U, A, Z, D, slack, radius):
        """Return the margins (n, E), and for each the worst perturbations (n, d)."""
        margins, worst = self.offsets.copy(), []
        active = D * Z
        for e in range(self.T.shape[1]):
            W = self.T[:, e] @ A.T
            slopes = (D * W) @ U.T
            perturbation = self._steepest(slopes, radius)
            margins[:, e] += np.sum(W * active - np.maximum(-W, 0.0) * slack, axis=1)
            margins[:, e] -= np.sum(perturbation * slopes, axis=1)
            worst.append(perturbation)
        return margins, worst

    def _reach(self, U, radius):
        """Return the support of every set in the direction of every neuron, (n, m) or (1, m)."""
        if self.one_shape:
            axes = radius * self.sets.weights[0][:, None]
            return np.linalg.norm(axes * U, ord=DUAL_NORM[self.sets.p], axis=0)[None]
        return radius * (self.sets.weights @ np.abs(U))

    def _reach_gradient(self, U, paid, radius, used):
        """Return the gradient of sum_kj paid_kj * reach_kj(u_j) in U."""
        if self.one_shape:
            return paid.sum(axis=0) * self._steepest(U.T, radius).T
        return radius * (self.sets.weights[used].T @ paid) * np.sign(U)

    def _steepest(self, directions, radius):
        """Return the perturbation with the largest product with each row."""
        sets = self.sets
        axes = radius * sets.weights
        if sets.p == np.inf:
            return axes * np.sign(directions)
        scaled = axes * directions
        if sets.p == 2:
            length = np.linalg.norm(scaled, axis=1, keepdims=True)
            return axes * scaled / np.maximum(length, _LEAST_LENGTH)
        peak = np.zeros_like(scaled)
        place = (np.arange(len(scaled)), np.abs(scaled).argmax(axis=1))
        peak[place] = np.sign(scaled[place])
        return axes * peak


def _first_weights(program, width, rng):
    """Return random weights; half of the neurons of an output raise it, half lower it."""
    d, n_outputs = program.X.shape[1], program.n_outputs
    scale = max(np.sqrt(np.mean(program.sets.center**2)), _LEAST_LENGTH)
    U = rng.normal(size=(d, width)) / (np.sqrt(d) * scale)
    A = np.zeros((width, n_outputs))
    j = np.arange(width)
    A[j, j // 2 % n_outputs] = np.where(j % 2 == 0, 1.0, -1.0) / np.sqrt(width)
    return U, A


def _weights_of(network, program):
    if network.hidden.shape[0] != program.X.shape[1] or network.n_outputs != program.n_outputs:
        raise ValueError(
            f"start is a network of {network.hidden.shape[0]} inputs (intercept counted) and "
            f"{network.n_outputs} outputs, but the program has {program.X.shape[1]} and "
            f"{program.n_outputs}."
        )
    return network.hidden.copy(), network.output.copy()


def _balanced(U, A):
    """Scale each neuron so that hidden and output weights are of one size."""
    inner, outer = np.linalg.norm(U, axis=0), np.abs(A).sum(axis=1)
    used = (inner > 0.0) & (outer > 0.0)
    factor = np.sqrt(outer[used] / inner[used])
    return U[:, used] * factor, A[used] / factor[:, None]
