"""The copies of the samples, and the patterns on them, that a restricted program is made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import linprog

from convexrobust.exchange.inner_maximum import losses_at, neuron_columns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram

_TOUCHING = 1e-6  # distance from a neuron's hyperplane below which a point is put on both sides
_SAME = 0.99  # cosine from which neurons of one sign and output are merged


class Copies:
    """The copies (rows X of ``samples``) and patterns D of a restricted program.

    A pattern has a gate, which extends it to new rows, an age, the rounds since it had a neuron,
    and the weights V, W that the next solve may start from.

    Parameters
    ----------
    program : ConvexProgram
        The samples, the first copies, and the first patterns.
    memory : int
        Rounds that a pattern without a neuron is kept.
    shortest : float
        Neurons up to this share of the longest do not count; if positive, nearly parallel ones of
        inexact solutions are merged.
    """

    def __init__(self, program: ConvexProgram, memory=10, shortest=0.0):
        self.memory, self.shortest = memory, shortest
        self.X, self.samples = program.X, np.arange(len(program.X))
        self.D = np.asarray(program.D, dtype=np.int8)
        self.gates = gates_of(program.X, self.D)
        self.age = np.zeros(self.D.shape[1], dtype=int)
        self.V, self.W = np.zeros((2, *program.shape))

    def program(self, program, formulation) -> ConvexProgram:
        """Return the nominal program on the copies."""
        nominal = LpBall(program.perturbation.p, 0.0, program.perturbation.bounds)
        return replace(
            program,
            X=self.X,
            y=np.asarray(program.y)[self.samples],
            D=self.D,
            perturbation=nominal,
            formulation=formulation,
            copy_of=self.samples,
        )

    def refresh(self, solved, *, grow):
        """Keep the weights; if patterns grow, give neurons patterns of their own and drop old ones.

        A neuron has its pattern at the old rows and chooses for itself at new ones.
        """
        if not grow:
            self.V, self.W = solved.V, solved.W
            return
        lengths = np.linalg.norm(np.stack([solved.V, solved.W]), axis=2)
        lengths[lengths <= self.shortest * lengths.max(initial=0.0)] = 0.0
        self.age = np.where(lengths.max(axis=(0, 1)) > 0.0, 0, self.age + 1)
        D, keep = self.D, self.age <= max(self.memory, self.age.min())
        self.D, self.gates, self.age = D[:, keep], self.gates[:, keep], self.age[keep]
        self.V = self.W = np.zeros((*solved.V.shape[:2], len(self.age)))
        which, c, i = np.nonzero(lengths)
        neurons = np.stack([solved.V, solved.W])[which, c, :, i].T
        if self.shortest > 0.0:
            neurons, kept = _merged(neurons, 2 * c + which)
            which, c, i = which[kept], c[kept], i[kept]
        self.add_patterns(D[:, i], neurons / np.linalg.norm(neurons, axis=0))
        own = len(self.age) - len(i) + np.arange(len(i))
        for sign, U in enumerate((self.V, self.W)):
            chosen = which == sign
            U[c[chosen], :, own[chosen]] = neurons[:, chosen].T

    def add_patterns(self, D, gates):
        """Append patterns at the present rows."""
        none = np.zeros((*self.V.shape[:2], D.shape[1]))
        self.D, self.gates = np.hstack([self.D, D]), np.hstack([self.gates, gates])
        self.age = np.append(self.age, np.zeros(D.shape[1], dtype=int))
        self.V, self.W = (np.concatenate([U, none], axis=2) for U in (self.V, self.W))

    def worst_losses(self, program, network) -> np.ndarray:
        """Return the largest loss of a network over the copies of each sample."""
        worst = np.full(len(program.X), -np.inf)
        np.maximum.at(worst, self.samples, losses_at(program, network, self.X, self.samples))
        return worst

    def add_network(self, network):
        """Append a pattern for each neuron of a network, and start from its weights."""
        gates = network.hidden / np.maximum(np.linalg.norm(network.hidden, axis=0), 1e-300)
        self.add_patterns((self.X @ gates >= 0.0).astype(np.int8), gates)
        for U, own in zip((self.V, self.W), neuron_columns(network), strict=True):
            U[:, :, -network.n_neurons :] = own

    def add_points(self, X, samples, *, both_sides):
        """Append rows, which gates take to be on one side or, where they touch, on both.

        Worst points often lie where a neuron is 0; its pattern is then needed on both sides.
        """
        values, old = X @ self.gates, self.D
        if both_sides:
            touching = np.abs(values) <= _TOUCHING * np.linalg.norm(X, axis=1)[:, None]
            twins = np.flatnonzero(touching.any(axis=0))
            self.add_patterns(old[:, twins], self.gates[:, twins])
            old = self.D
            values = np.hstack([np.where(touching, 1.0, values), values[:, twins]])
            values[:, len(touching.T) :][touching[:, twins]] = -1.0
        self.D = np.vstack([old, values >= 0.0]).astype(np.int8)
        self.X, self.samples = np.vstack([self.X, X]), np.append(self.samples, samples)

    def trim(self, program, network, n_copies):
        """Keep the copies of each sample with the largest losses, and each pattern once."""
        losses = losses_at(program, network, self.X, self.samples)
        order = np.lexsort((-losses, self.samples))
        first = np.searchsorted(self.samples[order], self.samples[order])
        keep = np.sort(order[np.arange(len(order)) - first < n_copies])
        self.X, self.samples = self.X[keep], self.samples[keep]
        self.D, first, group = np.unique(
            self.D[keep], axis=1, return_index=True, return_inverse=True
        )
        V, W, age = self.V, self.W, np.full(len(first), self.memory + 1)
        self.V, self.W = np.zeros((2, *V.shape[:2], len(first)))
        for merged, U in ((self.V, V), (self.W, W)):
            np.add.at(merged, (slice(None), slice(None), group.ravel()), U)
        np.minimum.at(age, group.ravel(), self.age)
        self.gates, self.age = self.gates[:, first], age


def gates_of(X, D) -> np.ndarray:
    """Return a gate for each pattern, (d, P): S Xu >= 1 wherever that is possible for all rows."""
    n, d = X.shape
    prices = np.repeat([0.0, 1.0], [d, n])
    free = [(None, None)] * d + [(0.0, None)] * n
    gates = []
    for signs in 2.0 * D.T - 1.0:
        rows = np.hstack([-signs[:, None] * X, -np.eye(n)])
        gates.append(linprog(prices, A_ub=rows, b_ub=-np.ones(n), bounds=free).x[:d])
    return np.array(gates).T / np.maximum(np.linalg.norm(gates, axis=1), 1e-300)


def _merged(neurons, kinds):
    """Add up nearly parallel neurons (d, m) of one kind; return the sums and the places kept.

    The sum is no longer than they are together.
    """
    lengths, left = np.linalg.norm(neurons, axis=0), np.ones(len(kinds), dtype=bool)
    sums, kept = [], []
    for i in np.argsort(-lengths):
        if left[i]:
            cosines = neurons[:, i] @ neurons / (lengths[i] * lengths)
            same = left & (kinds == kinds[i]) & (cosines >= _SAME)
            left &= ~same
            sums.append(neurons[:, same].sum(axis=1))
            kept.append(i)
    return np.array(sums).reshape(len(kept), -1).T, np.array(kept, dtype=int)
