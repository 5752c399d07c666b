"""What stays the same while the method runs: the numbers of a program for some of its neurons."""

from __future__ import annotations

from copy import copy
from functools import cached_property
from typing import NamedTuple

import numpy as np

from convexrobust.solvers.interior_point.epigraphs import SUPPORT_EPIGRAPHS, LargestEpigraph

_MANY = 4_000_000  # products of two features that are kept


class Neurons(NamedTuple):
    """Neurons: output, sign (+1 of V, -1 of W) and pattern of each."""

    outputs: np.ndarray
    signs: np.ndarray
    patterns: np.ndarray

    @classmethod
    def all_of(cls, program) -> Neurons:
        """Return all neurons of a program."""
        n_outputs, _, P = program.shape
        grid = np.meshgrid((1.0, -1.0), np.arange(n_outputs), np.arange(P), indexing="ij")
        return cls(grid[1].ravel(), grid[0].ravel(), grid[2].ravel())

    def kinds(self) -> np.ndarray:
        """Return a number for each, the same for those that differ in nothing but their sign."""
        return self.outputs * (self.patterns.max() + 1) + self.patterns

    def at(self, index) -> Neurons:
        """Return some of them."""
        return Neurons(*(part[index] for part in self))

    def joined_by(self, others) -> Neurons:
        """Return these and others."""
        return Neurons(*(np.concatenate(pair) for pair in zip(self, others, strict=True)))


class Data:
    """The numbers of a program for J of its neurons, and the linear functions of their weights.

    Rows without weight have no margin, and soft cones matter to the margins only.

    Attributes
    ----------
    rows, cone_rows : ndarray of shape (n,) and (N,)
        The samples that have a margin, and those that have a cone.
    X, X_cone : ndarray of shape (n, d) and (N, d)
        The centres of their sets.
    F : ndarray of shape (n, E, J)
        The derivative of each margin in each neuron's product with the sample.
    hurts : ndarray of shape (n, E, J)
        How far a neuron lowers the margin, so that its slack does too; 0 where it raises it.
    S, mask : ndarray of shape (N, J)
        The signs of the cone rows, and which of them exist.
    slope_margins : list of int
        The margins whose slopes are distinct, s of them.
    slope_of : ndarray of shape (E,)
        For each margin where in that list its slope is.
    shares : ndarray of shape (s, E)
        The same as a matrix of zeros and ones.
    F_slope : ndarray of shape (n, s, J)
        The rows of F of the distinct slopes.
    features : ndarray of int
        The features that are perturbed.
    slope_weights : ndarray of shape (n or 1, 1, len(features))
        The half-axes of the sets.
    members : ndarray of shape (R, m)
        The features in each of the R epigraphs that a neuron's cones share.
    cone_weights : ndarray of shape (m,)
        The weights inside these norms.
    reach : ndarray of shape (N, R)
        How much of each of them a cone row takes.
    size : int
        Unknowns a neuron: its weights and its R epigraph variables.
    fold : ndarray of shape (E, E') and nominal_rows : ndarray of shape (n, E', J, size)
        Their product is the matrix of the margins without any perturbation.
    """

    def __init__(self, program, neurons):
        self.program, self.neurons = program, neurons
        self.rows = np.flatnonzero(program.weight > 0.0)
        self.soft = program.formulation == "soft"
        self.cone_rows = self.rows if self.soft else np.arange(len(program.X))
        self.X, self.X_cone = program.sets.center[self.rows], program.sets.center[self.cone_rows]
        self._set_rows()
        self._set_reach()
        self.fold = np.eye(self.F.shape[1])
        if self.nothing_but_centers and program.loss.task == "regression":
            # Both margins of a sample are opposite, up to their scales, as long as nothing else
            # belongs to them: one row is kept for the two.
            directions = program.margin_map.directions[0]
            self.fold = directions / directions[0]

    def at(self, index) -> Data:
        """Return the same for some of the neurons."""
        fewer = copy(self)
        fewer.neurons = self.neurons.at(index)
        for name in ("F", "F_slope", "hurts", "S", "mask"):
            setattr(fewer, name, getattr(self, name)[..., index])
        fewer.__dict__.pop("nominal_rows", None)
        return fewer

    def _set_rows(self):
        program, neurons = self.program, self.neurons
        T = neurons.signs * program.margin_map.directions[:, :, neurons.outputs]
        D = np.asarray(program.D, dtype=np.float64)[:, None, neurons.patterns]
        self.F = T[self.rows] * D[self.rows]
        self.hurts = np.maximum(-T[self.rows], 0.0)
        self.S = program.signs[np.ix_(self.cone_rows, neurons.patterns)]
        self.mask = np.ones(self.S.shape, dtype=bool)
        if program.formulation != "hard":
            self.mask = (T[self.cone_rows] < 0.0).any(axis=1)
        slope_of = program.margin_map.slope_of
        self.slope_margins = sorted(set(slope_of))
        self.slope_of = np.array([self.slope_margins.index(e) for e in slope_of])
        places = np.arange(len(self.slope_margins))
        self.shares = np.equal.outer(places, self.slope_of).astype(np.float64)
        self.F_slope = self.F[:, self.slope_margins]

    def _set_reach(self):
        sets = self.program.sets
        self.features = np.flatnonzero((sets.reach > 0.0).any(axis=0))
        weights, boxes = sets.reach[:, self.features], not sets.one_shape
        self.slope_weights = (weights[self.rows] if boxes else weights)[:, None, :]
        self.cone_epigraph = LargestEpigraph if boxes else SUPPORT_EPIGRAPHS[sets.p]
        if not self.perturbed:
            self.reach = np.zeros((len(self.X_cone), 0))
        elif boxes:  # an epigraph for each |u_f|
            self.reach = weights[self.cone_rows]
            self.members, self.cone_weights = self.features[:, None], np.ones(1)
        else:
            self.reach = np.ones((len(self.X_cone), 1))
            self.members, self.cone_weights = self.features[None, :], weights[0]
        self.size = self.X.shape[1] + self.reach.shape[1]

    @cached_property
    def nominal_rows(self):
        """The matrix of the margins without any perturbation, but for ``fold``."""
        F = self.F[:, : self.fold.shape[1]]
        rows = np.zeros((*F.shape, self.size))
        rows[..., : self.X.shape[1]] = F[..., None] * self.X[:, None, None, :]
        return rows

    @cached_property
    def squares(self):
        """The products x_f x_g of every cone row, f <= g, and the column of each pair (d, d).

        None where these are many.
        """
        N, d = self.X_cone.shape
        f, g = np.triu_indices(d)
        if N * len(f) > _MANY:
            return None
        place = np.empty((d, d), dtype=np.intp)
        place[f, g] = place[g, f] = np.arange(len(f))
        return self.X_cone[:, f] * self.X_cone[:, g], place

    @property
    def nothing_but_centers(self) -> bool:
        """Whether the margins are made of the centres alone, without slacks and perturbations."""
        return not self.soft and not self.perturbed

    @property
    def perturbed(self) -> bool:
        """Whether any feature is perturbed, so that there are slopes and robust cones."""
        return len(self.features) > 0

    def margins(self, U):
        """Return what the neurons U (J, d) add to the margins of the centres, (n, E)."""
        return np.einsum("kej,kj->ke", self.F, self.X @ U.T)

    def slopes(self, U):
        """Return the slopes in the perturbed features, (n, s, len(features))."""
        return np.einsum("kej,jf->kef", self.F_slope, U[:, self.features])

    def gaps(self, U, tau):
        """Return how far each neuron is inside its cone at each row, (N, J), for tau (J, R)."""
        return self.S * (self.X_cone @ U.T) - self.reach @ tau.T

    def pulled_gaps(self, b):
        """Return the transpose of `gaps` at b (N, J)."""
        return np.hstack([(self.S * b).T @ self.X_cone, -b.T @ self.reach])
