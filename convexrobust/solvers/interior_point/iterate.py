"""What changes while the method runs: variables, slacks and multipliers, and their start."""

from __future__ import annotations

import numpy as np

from convexrobust.duality import Multipliers
from convexrobust.solvers.interior_point.cones import Orthant
from convexrobust.solvers.interior_point.data import Data
from convexrobust.solvers.interior_point.epigraphs import SUPPORT_EPIGRAPHS, EuclideanEpigraph
from convexrobust.solvers.interior_point.losses import loss_term

_SMALLEST_BETA = 1e-9  # the objective is divided by beta


class Iterate:
    """A point of the method for some neurons of a program; the objective is divided by beta.

    Attributes
    ----------
    U : ndarray of shape (J, d)
        The weights of the neurons.
    loss : PiecewiseLoss
        The rises of the samples.
    margin : Orthant
        How far the rises are above what the margins ask for (n, E); its multipliers are the a of
        the certificate.
    group : EuclideanEpigraph
        The norms of the neurons.
    cone : Orthant
        How far the neurons are inside their cones (N, J); its multipliers are the b.
    y, spare
        The slacks of soft cones, and that they are at least 0.
    slope, robust : Epigraph or None
        The support functions of the slopes, whose multipliers are the P, and those of the neurons;
        None without perturbation.
    dU, dy : ndarray
        The steps of U and y, which a Newton step sets.
    """

    spare: Orthant
    y: np.ndarray

    def __init__(self, data: Data):
        self.data, program = data, data.program
        self.beta = max(program.regularizer.beta, _SMALLEST_BETA)
        weight, offsets = program.weight[data.rows], program.margin_map.offsets[data.rows]
        self.loss = loss_term(program.loss, weight / self.beta, offsets)
        self._start()
        self._list_parts()

    def _start(self):
        """Start at the zero network, with multipliers of their natural size and central slacks."""
        data, a = self.data, self.loss.start
        mu = self.loss.scale * (1.0 if data.soft else 0.1)
        self.margin = Orthant(a, mu)
        self.slope = None
        if data.perturbed:
            kind = SUPPORT_EPIGRAPHS[data.program.sets.p]
            self.slope = kind(data.slope_weights, a @ data.shares.T, mu)
        self._start_neurons(mu)

    def _start_neurons(self, mu):
        data, a = self.data, self.margin.z
        n_neurons, d = len(data.neurons.signs), data.X.shape[1]
        self.U = np.zeros((n_neurons, d))
        b = np.full(data.S.shape, np.mean(a))
        if data.soft:
            b = np.einsum("kej,ke->kj", data.hurts, a) / 2.0  # half the most that it may be
            self.spare = Orthant(b, mu, data.mask)
            self.y = np.where(data.mask, self.spare.s, 0.0)
        self.cone = Orthant(b, mu, data.mask)
        self.group = EuclideanEpigraph(np.ones((1, d)), np.ones(n_neurons), mu)
        self.robust = None
        if data.perturbed:
            share = (data.mask * b).T @ data.reach
            share = np.maximum(share, 1e-3 * np.mean(share) + 1e-6 * np.mean(a))
            self.robust = data.cone_epigraph(data.cone_weights, share, mu)

    def _list_parts(self):
        parts = (self.group, self.slope, self.robust)
        self.epigraphs = [part for part in parts if part is not None]
        self.cones = [self.margin, self.cone, *self.loss.cones]
        self.cones += [self.spare] if self.data.soft else []
        self.cones += [cone for epigraph in self.epigraphs for cone in epigraph.cones]
        self.degree = sum(cone.degree for cone in self.cones)

    def kept(self, index) -> Iterate:
        """Return the same iterate with only some of its neurons."""
        fewer = Iterate(self.data.at(index))
        fewer.loss, fewer.margin, fewer.slope = self.loss, self.margin, self.slope
        fewer.U = self.U[index]
        pairs = [(fewer.cone, self.cone)]
        if self.data.soft:
            fewer.y = self.y[:, index]
            pairs.append((fewer.spare, self.spare))
        for new, old in pairs:
            new.s, new.z = old.s[:, index], old.z[:, index]
        fewer.group.take(self.group, index)
        if self.robust is not None:
            fewer.robust.take(self.robust, index)
        fewer._list_parts()
        return fewer

    def idle(self, limit):
        """Tell which neurons are shorter than ``limit`` times the longest."""
        return self.group.sigma < limit * self.group.sigma.max()

    def product(self) -> float:
        """Return the sum of all s'z, the duality gap of a feasible iterate over beta."""
        return sum(cone.product() for cone in self.cones)

    def measure(self):
        """Tell every term the value of its linear functions."""
        data, loss = self.data, self.loss
        margins = loss.zeta @ loss.spread.T - loss.rises + data.margins(self.U)
        tau = np.zeros((len(self.U), 0)) if self.robust is None else self.robust.sigma
        gaps = data.gaps(self.U, tau)
        if data.perturbed:
            margins = margins - self.slope.sigma[:, data.slope_of]
            self.slope.measure(data.slopes(self.U))
            self.robust.measure(self.U[:, data.members])
        if data.soft:
            margins = margins - np.einsum("kej,kj->ke", data.hurts, self.y)
            gaps = gaps + self.y
            self.spare.measure(self.y)
        self.margin.measure(margins)
        self.cone.measure(gaps)
        self.group.measure(self.U)
        loss.measure()

    def move(self, step):
        """Take a step in the direction that was set."""
        for part in (*self.cones, *self.epigraphs, self.loss):
            part.move(step)
        self.U = self.U + step * self.dU
        if self.data.soft:
            self.y = self.y + step * self.dy

    def weights(self):
        """Return V and W over all neurons of the program."""
        program, neurons = self.data.program, self.data.neurons
        weights = np.zeros((2, *program.shape))
        of_w = (neurons.signs < 0).astype(int)
        weights[of_w, neurons.outputs, :, neurons.patterns] = self.U
        return weights

    def multipliers(self) -> Multipliers:
        """Return the dual point, 0 for the cones of neurons that are not here."""
        data, program = self.data, self.data.program
        a = np.zeros(program.margin_map.offsets.shape)
        a[data.rows] = self.beta * self.margin.z
        slopes = {e: np.zeros(program.X.shape) for e in data.slope_margins}
        if self.slope is not None:
            dual = -self.beta * self.slope.dual()
            for at, e in enumerate(data.slope_margins):
                slopes[e][np.ix_(data.rows, data.features)] = dual[:, at]
        cones_v = self._cone_multipliers(1.0, program.rows_v)
        return Multipliers(a, slopes, cones_v, self._cone_multipliers(-1.0, program.rows_w))

    def _cone_multipliers(self, sign, all_rows):
        """Return b for the neurons of one sign, by output."""
        data, program = self.data, self.data.program
        full = np.zeros((program.n_outputs, len(program.X), program.D.shape[1]))
        chosen = data.neurons.signs == sign
        outputs, patterns = data.neurons.outputs[chosen], data.neurons.patterns[chosen]
        b = self.beta * self.cone.z[:, chosen].T
        full[outputs[:, None], data.cone_rows, patterns[:, None]] = b
        return [full[c, rows] for c, rows in enumerate(all_rows)]
