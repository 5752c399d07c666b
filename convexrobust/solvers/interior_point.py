r"""A primal-dual interior-point method that factors in the neurons only.

Every term of the program is an epigraph: slacks :math:`s \in K` of linear functions of the
variables, with multipliers :math:`z \in K` of which the certificate's :math:`a, P, b` are parts.
A step of Mehrotra's predictor-corrector method with Nesterov and Todd's scaling solves
:math:`\sum G' H G\,\Delta = \dots` with H the scaling of each cone. All variables that belong to
one sample, one cone row or one neuron's norm are eliminated by formula. What stays is

.. math::

    \begin{pmatrix} K & -A' \\ A & C \end{pmatrix}
    \begin{pmatrix} \Delta u \\ a \end{pmatrix} = \begin{pmatrix} r_u \\ r_a \end{pmatrix}

in the neurons u (each with the epigraph variable of its robust cone) and the multipliers a of the
margins. Row (k, e) of A is the effective worst-case sample, C is block-diagonal by sample, and K is
block-diagonal by neuron but for the curvature of the slopes' norms. So :math:`K + A' C^{-1} A` is
factored, or, without perturbation and with many neurons, the n x n :math:`C + A K^{-1} A'`.

Following Nesterov and Todd (1997), Mehrotra (1992), and the notation of Vandenberghe's "The
CVXOPT linear and quadratic cone program solvers" (2010).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from convexrobust.backends import numpy as numpy_backend
from convexrobust.duality import Multipliers, repaired
from convexrobust.losses import Logistic
from convexrobust.perturbations import project_rows
from convexrobust.program import ConvexProgram, Solution
from convexrobust.solvers.monitor import Monitor

_REFINEMENTS, _EXACT = 3, 1e-11  # of the linear solves, at most, and residuals that are good
_SMALL = 600  # unknowns up to which the more accurate factor is taken
_FEWEST = 8  # neurons in play
_UNKNOWNS, _NOMINAL_UNKNOWNS = 6000, 40_000  # up to which all neurons are in play
# Neurons are dropped that are shorter than the longest by this times the relative gap.
_IDLE = 0.15
_FIRST_LEVEL = 0.1  # relative gap at which the neurons left out are looked at first
_SHORTEST_STEP = 1e-8
_TO_BOUNDARY = 0.99  # share of the longest step inside the cones that is taken


class Orthant:
    """Slacks and multipliers that are at least 0, of any shape; those outside ``mask`` are idle."""

    def __init__(self, z, mu, mask=True):
        self.mask = np.broadcast_to(mask, np.shape(z))
        self.z = np.where(self.mask, z, 0.0)
        self.s = np.where(self.mask, mu / np.where(self.mask, z, 1.0), 1.0)
        self.degree = int(self.mask.sum())

    def measure(self, value):
        """Take in the value of the linear functions that the slacks stand for."""
        self.residual = np.where(self.mask, value - self.s, 0.0)
        self.weight = self.z / self.s

    def aim(self, mu, correct):
        """Set the multipliers ``target`` at which Newton's equation is met without any step."""
        correction = self.ds * self.dz if correct else 0.0
        self.goal = np.where(self.mask, (mu - correction) / self.s, 0.0)
        self.target = self.goal - self.weight * self.residual

    def direct(self, change, z=None):
        """Set the step from the change of the linear functions, and from the new z if known."""
        self.ds = np.where(self.mask, change, 0.0) + self.residual
        self.dz = (self.goal - self.weight * self.ds if z is None else z) - self.z

    def longest(self) -> float:
        """Return the longest step that stays inside."""
        shrinking = max(
            np.max(-self.ds / self.s), np.max(-self.dz / np.where(self.mask, self.z, 1.0))
        )
        return 1.0 / max(shrinking, 1e-300)

    def move(self, step):
        """Take the step."""
        self.s = self.s + step * self.ds
        self.z = self.z + step * self.dz

    def product(self, step=0.0) -> float:
        """Return s'z, or what it would be after a step."""
        if step == 0.0:
            return float(np.sum(self.s * self.z))
        s, z = self.s + step * self.ds, self.z + step * self.dz
        return float(np.sum(s * z))


class SecondOrder:
    """Slacks and multipliers (..., 1 + m) in second-order cones along the last axis."""

    def __init__(self, z, mu):
        self.z = z
        self.s = mu * _reflected(z) / _square(z)[..., None]
        self.degree = int(np.prod(z.shape[:-1]))

    def measure(self, value):
        """Take in the value of the linear functions; find Nesterov and Todd's scaling point w."""
        self.residual = value - self.s
        square_s, square_z = _square(self.s), _square(self.z)
        s, z = self.s / np.sqrt(square_s)[..., None], self.z / np.sqrt(square_z)[..., None]
        half = np.sqrt((1.0 + np.sum(s * z, axis=-1)) / 2.0)
        self.w = (s + _reflected(z)) / (2.0 * half[..., None])
        self.scale = (square_s / square_z) ** 0.25
        self.scaled = self._forward(self.z)

    def _forward(self, x):
        """Return W x."""
        w0, w1 = self.w[..., :1], self.w[..., 1:]
        along = np.sum(w1 * x[..., 1:], axis=-1, keepdims=True)
        tail = x[..., 1:] + (x[..., :1] + along / (1.0 + w0)) * w1
        return self.scale[..., None] * np.concatenate([w0 * x[..., :1] + along, tail], axis=-1)

    def _backward(self, x):
        """Return the inverse of W times x."""
        w0, w1 = self.w[..., :1], self.w[..., 1:]
        along = np.sum(w1 * x[..., 1:], axis=-1, keepdims=True)
        tail = x[..., 1:] + (-x[..., :1] + along / (1.0 + w0)) * w1
        return np.concatenate([w0 * x[..., :1] - along, tail], axis=-1) / self.scale[..., None]

    def hessian(self, x):
        """Return the inverse of W'W times x."""
        return self._backward(self._backward(x))

    def aim(self, mu, correct):
        """Set the multipliers ``target`` at which Newton's equation is met without any step."""
        wanted = np.zeros_like(self.z)
        wanted[..., 0] = mu
        if correct:
            wanted -= _jordan(self._backward(self.ds), self._forward(self.dz))
        self.goal = self._backward(_quotient(wanted, self.scaled))
        self.target = self.goal - self.hessian(self.residual)

    def direct(self, change):
        """Set the step from the change of the linear functions."""
        self.ds = change + self.residual
        self.dz = self.goal - self.z - self.hessian(self.ds)

    def longest(self) -> float:
        """Return the longest step that stays inside."""
        return min(_longest(self.s, self.ds), _longest(self.z, self.dz))

    move, product = Orthant.move, Orthant.product


def _square(x):
    """Return x0^2 - ||x1||^2, its two factors apart for accuracy."""
    length = np.linalg.norm(x[..., 1:], axis=-1)
    return (x[..., 0] - length) * (x[..., 0] + length)


def _reflected(x):
    return np.concatenate([x[..., :1], -x[..., 1:]], axis=-1)


def _jordan(x, y):
    """Return the product of the second-order cone's algebra."""
    tail = x[..., :1] * y[..., 1:] + y[..., :1] * x[..., 1:]
    return np.concatenate([np.sum(x * y, axis=-1, keepdims=True), tail], axis=-1)


def _quotient(x, y):
    """Return the q with _jordan(y, q) = x."""
    along = np.sum(y[..., 1:] * x[..., 1:], axis=-1)
    head = (y[..., 0] * x[..., 0] - along) / _square(y)
    tail = (x[..., 1:] - head[..., None] * y[..., 1:]) / y[..., :1]
    return np.concatenate([head[..., None], tail], axis=-1)


def _longest(x, dx) -> float:
    """Return the longest step from inside a second-order cone: a root of a quadratic."""
    a, c = _square(dx), _square(x)
    b = x[..., 0] * dx[..., 0] - np.sum(x[..., 1:] * dx[..., 1:], axis=-1)
    root = np.sqrt(np.maximum(b * b - a * c, 0.0))
    inverse = (root - b) / c  # the largest of 1 / step over both roots
    return float(1.0 / max(np.max(inverse), 1e-300))


class Epigraph:
    r"""The cones of :math:`\sigma \ge \|r \circ q\|` for a batch of q (..., m).

    After elimination of its inner variables its Hessian is, with v = r q,

    .. math:: \alpha (\sigma - \delta'v)^2 + v' \text{diag}(h) v - \gamma (\delta'v)^2 .

    Attributes
    ----------
    sigma : ndarray of shape (...)
        The epigraph variable.
    alpha, gamma : ndarray of shape (...)
    tilt, curvature : ndarray of shape (..., m)
        delta times r, and h times r squared: in units of q.
    """

    def __init__(self, weights):
        self.weights = weights

    def measure(self, q):
        """Take in the value of q, and set the coefficients of the Hessian."""
        self._measure(self.weights * q)
        self.tilt, self.curvature = self.tilt * self.weights, self.curvature * self.weights**2

    def pull(self):
        """Return the right-hand sides of sigma and of q."""
        of_sigma, of_v = self._pull()
        return of_sigma, self.weights * of_v

    def push(self, change, dq):
        """Set the steps from those of sigma and q."""
        self.change = change
        self._push(change, self.weights * dq)

    def move(self, step):
        """Take the step of the variables; the cones take their own."""
        self.sigma = self.sigma + step * self.change

    def take(self, other, index):
        """Take over the state of some entries of another batch."""
        self.sigma = other.sigma[index]
        for new, old in zip(self.cones, other.cones, strict=True):
            new.s, new.z = old.s[index], old.z[index]


class EuclideanEpigraph(Epigraph):
    """For the Euclidean norm: one second-order cone."""

    def __init__(self, weights, share, mu):
        super().__init__(weights)
        shape = np.broadcast_shapes(weights.shape, (*share.shape, 1))
        z = np.zeros((*shape[:-1], shape[-1] + 1))
        z[..., 0] = share
        self.cone = SecondOrder(z, mu)
        self.cones = [self.cone]
        self.sigma = self.cone.s[..., 0].copy()

    def _measure(self, v):
        self.cone.measure(np.concatenate([self.sigma[..., None], v], axis=-1))
        w0, w1 = self.cone.w[..., 0], self.cone.w[..., 1:]
        inverse = 1.0 / self.cone.scale**2
        head = w0**2 + np.sum(w1**2, axis=-1)
        self.alpha, self.tilt = inverse * head, (2.0 * w0 / head)[..., None] * w1
        self.curvature = np.broadcast_to(inverse[..., None], w1.shape)
        self.gamma = self.alpha / (2.0 * w0**2)

    def _pull(self):
        return self.cone.target[..., 0], self.cone.target[..., 1:]

    def _push(self, change, dv):
        self.cone.direct(np.concatenate([change[..., None], dv], axis=-1))

    def dual(self):
        """Return the multipliers of q."""
        return self.weights * self.cone.z[..., 1:]


class LargestEpigraph(Epigraph):
    """For the largest absolute value: two half-spaces an entry."""

    def __init__(self, weights, share, mu):
        super().__init__(weights)
        shape = np.broadcast_shapes(weights.shape, (*share.shape, 1))
        z = np.broadcast_to(share[..., None] / (2.0 * shape[-1]), shape)
        self.above, self.below = Orthant(z, mu), Orthant(z, mu)
        self.cones = [self.above, self.below]
        self.sigma = self.above.s.max(axis=-1)

    def _measure(self, v):
        self.above.measure(self.sigma[..., None] - v)
        self.below.measure(self.sigma[..., None] + v)
        both = self.above.weight + self.below.weight
        self.alpha = both.sum(axis=-1)
        self.tilt = (self.above.weight - self.below.weight) / self.alpha[..., None]
        self.curvature, self.gamma = both, self.alpha

    def _pull(self):
        above, below = self.above.target, self.below.target
        return (above + below).sum(axis=-1), below - above

    def _push(self, change, dv):
        self.above.direct(change[..., None] - dv)
        self.below.direct(change[..., None] + dv)

    def dual(self):
        """Return the multipliers of q."""
        return self.weights * (self.below.z - self.above.z)


class SumEpigraph(Epigraph):
    """For the sum of absolute values: t >= |v| entry by entry and sigma >= sum t."""

    def __init__(self, weights, share, mu):
        super().__init__(weights)
        shape = np.broadcast_shapes(weights.shape, (*share.shape, 1))
        z = np.broadcast_to(share[..., None] / 2.0, shape)
        self.above, self.below, self.total = Orthant(z, mu), Orthant(z, mu), Orthant(share, mu)
        self.cones = [self.above, self.below, self.total]
        self.t = self.above.s.copy()
        self.sigma = self.t.sum(axis=-1) + self.total.s

    def _measure(self, v):
        self.above.measure(self.t - v)
        self.below.measure(self.t + v)
        self.total.measure(self.sigma - self.t.sum(axis=-1))
        above, below = self.above.weight, self.below.weight
        self.both = above + below
        self.alpha = 1.0 / (1.0 / self.total.weight + np.sum(1.0 / self.both, axis=-1))
        self.slant = (above - below) / self.both
        self.tilt, self.curvature = self.slant, 4.0 * above * below / self.both
        self.gamma = np.zeros_like(self.alpha)

    def _inner(self, r):
        """Solve for t: the inverse of diag(both) + total.weight 11' times r (..., m)."""
        r = r / self.both
        return r - (self.alpha * r.sum(axis=-1))[..., None] / self.both

    def _pull(self):
        above, below, total = self.above.target, self.below.target, self.total.target
        self.rest = above + below - total[..., None]
        inner = self._inner(self.rest)
        of_sigma = total + self.total.weight * inner.sum(axis=-1)
        return of_sigma, below - above + self.both * self.slant * inner

    def _push(self, change, dv):
        r = self.rest + self.both * self.slant * dv + (self.total.weight * change)[..., None]
        self.dt = self._inner(r)
        self.above.direct(self.dt - dv)
        self.below.direct(self.dt + dv)
        self.total.direct(change - self.dt.sum(axis=-1))

    def move(self, step):
        """Take the step of the variables; the cones take their own."""
        super().move(step)
        self.t = self.t + step * self.dt

    def take(self, other, index):
        """Take over the state of some entries of another batch."""
        super().take(other, index)
        self.t = other.t[index]

    def dual(self):
        """Return the multipliers of q."""
        return self.weights * (self.below.z - self.above.z)


def _factored(K):
    """Return the Cholesky factor of K, with as much added to the diagonal as that takes."""
    diagonal, shift = K.diagonal().copy(), 0.0
    while True:
        try:
            return cho_factor(K, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            shift = 10.0 * shift or 1e-15
            if shift > 1e-3:
                raise
            K.flat[:: len(K) + 1] = diagonal * (1.0 + shift)


def _woodbury(B, M):
    """Return r -> (B + M'M)^-1 r for blocks B (J, size, size) and M with fewer rows than that."""
    shift = 1e-15 * np.trace(B, axis1=1, axis2=2)[:, None, None] * np.eye(B.shape[1])
    inverse = np.linalg.inv(np.linalg.cholesky(B + shift))
    N = (inverse @ M.T.reshape(*B.shape[:2], len(M))).reshape(-1, len(M))
    G = N.T @ N
    G.flat[:: len(G) + 1] += 1.0
    factor = cho_factor(G, lower=True, check_finite=False)

    def solve(r):
        y = np.matmul(inverse, r.reshape(*B.shape[:2], 1)).ravel()
        y = y - N @ cho_solve(factor, y @ N, check_finite=False)
        return np.matmul(inverse.transpose(0, 2, 1), y.reshape(*B.shape[:2], 1)).ravel()

    return solve


_EPIGRAPHS = {np.inf: SumEpigraph, 2: EuclideanEpigraph, 1: LargestEpigraph}


class _PiecewiseLoss:
    """A sample's largest rise zeta >= threshold - m_e, which costs linearly or quadratically."""

    def __init__(self, loss, weight, offsets):
        n, n_margins = offsets.shape
        self.weight, self.steepness = weight[:, None], loss.steepness
        self.rises = loss.threshold - offsets
        self.spread = np.ones((n_margins, 1))
        self.zeta = np.full((n, 1), max(np.mean(np.maximum(self.rises.max(axis=1), 0.0)), 1e-3))
        total = self.weight * (self.zeta / self.steepness if self.steepness else 0.5)
        self.start = np.repeat(total / n_margins, n_margins, axis=1)
        self.scale = float(np.mean(total * self.zeta))
        # The quadratic losses need no floor: below 0 they only cost more.
        self.cones = [] if self.steepness else [Orthant(self.weight / 2.0, self.scale)]

    def measure(self):
        """Set the Hessian (n, 1, 1), the floor's part included."""
        for floor in self.cones:
            floor.measure(self.zeta)
            self.hessian = floor.weight[..., None]
        if self.steepness:
            self.hessian = (self.weight / self.steepness)[..., None]

    def pull(self):
        """Return the right-hand side of zeta."""
        if self.steepness:
            return -self.weight * self.zeta / self.steepness
        return self.cones[0].target - self.weight

    def push(self, change):
        """Set the step."""
        self.change = change
        for floor in self.cones:
            floor.direct(change)

    def move(self, step):
        """Take the step."""
        self.zeta = self.zeta + step * self.change


class _LogisticLoss(_PiecewiseLoss):
    """The logistic loss, with one rise zeta_e >= -m_e a margin."""

    def __init__(self, loss, weight, offsets):
        self.weight, self.rises, self.cones = weight[:, None], -offsets, []
        n_margins = offsets.shape[1]
        self.spread, self.zeta = np.eye(n_margins), np.zeros_like(offsets)
        self.start = self.weight * np.full(offsets.shape, 1.0 / (1.0 + n_margins))
        self.scale = float(np.mean(self.start))
        self.steepness = 1.0

    def _shares(self):
        peak = np.maximum(self.zeta.max(axis=1, keepdims=True), 0.0)
        powers = np.exp(self.zeta - peak)
        return powers / (np.exp(-peak) + powers.sum(axis=1, keepdims=True))

    def measure(self):
        """Set the Hessian (n, E, E)."""
        shares = self._shares()
        diagonal = np.eye(shares.shape[1]) * shares[:, :, None]
        self.hessian = self.weight[..., None] * (diagonal - shares[:, :, None] * shares[:, None, :])

    def pull(self):
        """Return the right-hand side of zeta."""
        return -self.weight * self._shares()


class _Columns(NamedTuple):
    """Neurons: output, sign (+1 of V, -1 of W) and pattern of each."""

    outputs: np.ndarray
    signs: np.ndarray
    patterns: np.ndarray

    @classmethod
    def all_of(cls, program):
        """Return all neurons of a program."""
        n_outputs, _, P = program.shape
        grid = np.meshgrid((1.0, -1.0), np.arange(n_outputs), np.arange(P), indexing="ij")
        return cls(grid[1].ravel(), grid[0].ravel(), grid[2].ravel())

    def at(self, index):
        """Return some of them."""
        return _Columns(*(part[index] for part in self))


class _Newton:
    """The iterate of the interior-point method, and its steps.

    The objective is divided by beta. Shapes: J neurons, n rows that have a margin, E margins each,
    N rows that have a cone, R epigraph variables of the cones of each neuron.
    """

    def __init__(self, program, columns):
        self.program, self.columns = program, columns
        self.beta = max(program.regularizer.beta, 1e-9)
        # Rows without weight have no margin, and soft cones matter to the margins only.
        self.rows = np.flatnonzero(program.weight > 0.0)
        self.soft = program.formulation == "soft"
        self.cone_rows = self.rows if self.soft else np.arange(len(program.X))
        self._set_data()
        weight, offsets = program.weight[self.rows], program.margin_map.offsets[self.rows]
        kind = _LogisticLoss if isinstance(program.loss, Logistic) else _PiecewiseLoss
        self.loss = kind(program.loss, weight / self.beta, offsets)
        self._start()

    def _set_data(self):
        program, columns = self.program, self.columns
        self.X, self.Xc = program.sets.center[self.rows], program.sets.center[self.cone_rows]
        T = columns.signs * program.margin_map.directions[:, :, columns.outputs]
        D = np.asarray(program.D, dtype=np.float64)[:, None, columns.patterns]
        self.F = T[self.rows] * D[self.rows]
        self.hurts = (T[self.rows] < 0.0).astype(np.float64)
        self.S = program.signs[np.ix_(self.cone_rows, columns.patterns)]
        self.mask = np.ones(self.S.shape, dtype=bool)
        if program.formulation != "hard":
            self.mask = (T[self.cone_rows] < 0.0).any(axis=1)
        slope_of = program.margin_map.slope_of
        self.slopes = sorted(set(slope_of))
        self.slope_of = np.array([self.slopes.index(e) for e in slope_of])
        self.shares = np.equal.outer(np.arange(len(self.slopes)), self.slope_of).astype(np.float64)
        self.FQ = self.F[:, self.slopes]
        self._set_shapes()

    def _set_shapes(self):
        sets, d = self.program.sets, self.X.shape[1]
        self.features = np.flatnonzero((sets.radius * sets.weights > 0.0).any(axis=0))
        weights = sets.radius * sets.weights[:, self.features]
        boxes = len(weights) != 1
        self.slope_weights = (weights[self.rows] if boxes else weights)[:, None, :]
        if len(self.features) == 0:
            self.reach = np.zeros((len(self.Xc), 0))
        elif boxes:  # an epigraph for each |u_f|
            self.reach = weights[self.cone_rows]
            self.members, self.cone_weights = self.features[:, None], np.ones(1)
        else:
            self.reach = np.ones((len(self.Xc), 1))
            self.members, self.cone_weights = self.features[None, :], weights[0]
        self.cone_epigraph = LargestEpigraph if boxes else _EPIGRAPHS[sets.p]
        self.size = d + self.reach.shape[1]
        # The rows of the margins are ``fold`` times those kept: both of a regression's are opposite
        # as long as nothing else belongs to them.
        n_margins, clean = self.F.shape[1], not self.soft and len(self.features) == 0
        opposite = clean and self.program.loss.task == "regression"
        self.fold = np.array([[1.0], [-1.0]]) if opposite else np.eye(n_margins)
        F = self.F[:, : self.fold.shape[1]]
        self.nominal_rows = np.zeros((*F.shape, self.size))
        self.nominal_rows[..., :d] = F[..., None] * self.X[:, None, None, :]

    def _start(self):
        """Start at the zero network, with multipliers of their natural size and central slacks."""
        a, mu = self.loss.start, self.loss.scale * (1.0 if self.soft else 0.1)
        self.margin, self.slope = Orthant(a, mu), None
        if len(self.features):
            self.slope = _EPIGRAPHS[self.program.sets.p](self.slope_weights, a @ self.shares.T, mu)
        self._start_neurons(mu)
        self._list_parts()

    def _list_parts(self):
        self.epigraphs = [part for part in (self.group, self.slope, self.hull) if part is not None]
        self.cones = [self.margin, self.cone, *self.loss.cones]
        self.cones += [self.spare] if self.soft else []
        self.cones += [cone for epigraph in self.epigraphs for cone in epigraph.cones]
        self.degree = sum(cone.degree for cone in self.cones)

    def _start_neurons(self, mu):
        n_neurons, d = len(self.columns.signs), self.X.shape[1]
        self.U = np.zeros((n_neurons, d))
        b = np.full(self.S.shape, np.mean(self.margin.z))
        if self.soft:
            cap = np.einsum("kej,ke->kj", self.hurts, self.margin.z)
            b = cap / 2.0
            self.spare = Orthant(b, mu, self.mask)
            self.y = np.where(self.mask, self.spare.s, 0.0)
        self.cone = Orthant(b, mu, self.mask)
        self.group = EuclideanEpigraph(np.ones((1, d)), np.ones(n_neurons), mu)
        self.hull = None
        if len(self.features):
            share = (self.mask * b).T @ self.reach
            share = np.maximum(share, 1e-3 * np.mean(share) + 1e-6 * np.mean(self.margin.z))
            self.hull = self.cone_epigraph(self.cone_weights, share, mu)

    def kept(self, index):
        """Return the same iterate with only some of its neurons."""
        fewer = _Newton(self.program, self.columns.at(index))
        fewer.loss, fewer.margin, fewer.slope = self.loss, self.margin, self.slope
        fewer.U = self.U[index]
        pairs = [(fewer.cone, self.cone)]
        if self.soft:
            fewer.y = self.y[:, index]
            pairs.append((fewer.spare, self.spare))
        for new, old in pairs:
            new.s, new.z = old.s[:, index], old.z[:, index]
        for new, old in ((fewer.group, self.group), (fewer.hull, self.hull)):
            if old is not None:
                new.take(old, index)
        fewer._list_parts()
        return fewer

    def idle(self, limit):
        """Tell which neurons are shorter than ``limit`` times the longest."""
        return self.group.sigma < limit * self.group.sigma.max()

    # ---------------------------------------------------------------- linear maps

    def _outputs(self, U):
        return np.einsum("kej,kj->ke", self.F, self.X @ U.T)

    def _slopes(self, U):
        return np.einsum("kej,jf->kef", self.FQ, U[:, self.features])

    def _gaps(self, U, tau):
        """Return how far each neuron is inside its cone at each row."""
        return self.S * (self.Xc @ U.T) - self.reach @ tau.T

    def _pulled_gaps(self, b):
        """Return the transpose of `_gaps` at b (N, J)."""
        return np.hstack([(self.S * b).T @ self.Xc, -b.T @ self.reach])

    def _tau(self):
        return np.zeros((len(self.U), 0)) if self.hull is None else self.hull.sigma

    # ---------------------------------------------------------------- one step

    def step(self) -> bool:
        """Predict, correct, move; return whether that led anywhere."""
        try:
            self._measure()
            self._factor()
            self._direct(0.0, correct=False)
            length = min(1.0, min(cone.longest() for cone in self.cones))
            mu = self.product() / self.degree
            after = sum(cone.product(length) for cone in self.cones) / self.degree
            self._direct(min(1.0, max(after / mu, 0.0)) ** 3 * mu, correct=True)
        except np.linalg.LinAlgError:  # rounding left nothing to factor
            return False
        length = min(1.0, _TO_BOUNDARY * min(cone.longest() for cone in self.cones))
        if not length > _SHORTEST_STEP:  # true for a step that is no number
            return False
        self._move(length)
        return True

    def product(self) -> float:
        """Return the sum of all s'z, the duality gap of a feasible iterate over beta."""
        return sum(cone.product() for cone in self.cones)

    def _measure(self):
        margins = self.loss.zeta @ self.loss.spread.T - self.loss.rises + self._outputs(self.U)
        gaps = self._gaps(self.U, self._tau())
        if self.slope is not None:
            margins = margins - self.slope.sigma[:, self.slope_of]
            self.slope.measure(self._slopes(self.U))
            self.hull.measure(self.U[:, self.members])
        if self.soft:
            margins = margins - np.einsum("kej,kj->ke", self.hurts, self.y)
            gaps = gaps + self.y
            self.spare.measure(self.y)
        self.margin.measure(margins)
        self.cone.measure(gaps)
        self.group.measure(self.U)
        self.loss.measure()

    def _factor(self):
        """Eliminate everything but the neurons and the margins, and factor what is left."""
        row_weight = self.cone.weight
        C = np.eye(self.F.shape[1]) / self.margin.weight[:, :, None]
        A = self._clean_rows()
        if self.slope is not None:
            C += np.einsum("se,ks,sf->kef", self.shares, 1.0 / self.slope.alpha, self.shares)
        if self.soft:
            self.both = self.cone.weight + np.where(self.mask, self.spare.weight, 1.0)
            self.ratio = self.cone.weight / self.both
            row_weight = np.where(self.mask, row_weight * self.spare.weight / self.both, 0.0)
            loose = np.where(self.mask, 1.0 / self.both, 0.0)
            C += np.einsum("kej,kj,kfj->kef", self.hurts, loose, self.hurts)
            harm = self.hurts * self.ratio[:, None]
            d = self.X.shape[1]
            A[..., :d] += (harm * self.S[:, None])[..., None] * self.X[:, None, None, :]
            A[..., d:] -= harm[..., None] * self.reach[:, None, None, :]
        self.A = A.reshape(*A.shape[:2], -1)
        self._factor_margins(C)
        self._factor_neurons(self._blocks(row_weight))

    def _factor_margins(self, C):
        """Eliminate zeta after a: the Hessian of a linear loss vanishes where the loss is not 0."""
        spread, inverse = self.loss.spread, np.linalg.inv(C)
        self.C, self.C_inverse, self.raised = C, inverse, inverse @ spread
        self.rise = np.linalg.inv(self.loss.hessian + spread.T @ self.raised)
        self.given = inverse - self.raised @ self.rise @ self.raised.transpose(0, 2, 1)

    def _clean_rows(self):
        """Return the rows of the margins as if at the worst point of each set; (n, E, J, size)."""
        A = self.nominal_rows.copy() if self.soft or self.slope is not None else self.nominal_rows
        if self.slope is not None:
            worst = self.FQ[..., None] * self.slope.tilt[:, :, None, :]
            A[..., self.features] -= worst[:, self.slope_of]
        return A

    def _blocks(self, row_weight):
        """Return the Hessian (J, size, size) of what belongs to one neuron."""
        d, B = self.X.shape[1], np.zeros((len(self.U), self.size, self.size))
        B[:, :d, :d] = np.matmul(self.Xc.T * row_weight.T[:, None, :], self.Xc)
        cross = np.einsum("kj,kf,kr->jfr", self.S * row_weight, self.Xc, self.reach, optimize=True)
        B[:, :d, d:], B[:, d:, :d] = -cross, -cross.transpose(0, 2, 1)
        B[:, d:, d:] = np.einsum("kj,kr,kq->jrq", row_weight, self.reach, self.reach, optimize=True)
        at = np.arange(d)
        B[:, at, at] += self.group.curvature
        tilt = self.group.tilt
        B[:, :d, :d] -= self.group.gamma[:, None, None] * tilt[:, :, None] * tilt[:, None, :]
        if self.hull is not None:
            for r, members in enumerate(self.members):
                self._add_hull(B, r, d + r, members)
        return B

    def _add_hull(self, B, r, tau, members):
        hull, tilt = self.hull, self.hull.tilt[:, r]
        alpha, gamma = hull.alpha[:, r], hull.gamma[:, r]
        B[:, tau, tau] += alpha
        B[:, members, tau] -= alpha[:, None] * tilt
        B[:, tau, members] -= alpha[:, None] * tilt
        square = np.broadcast_to(members[:, None], (len(members),) * 2)
        B[:, square, square.T] += (alpha - gamma)[:, None, None] * tilt[:, :, None] * tilt[:, None]
        B[:, members, members] += hull.curvature[:, r]

    def _factor_neurons(self, B):
        """Set ``solve``: the inverse of K + A' given A, by the smaller of two factors."""
        self.B, half = B, self._half()
        unknowns = B.shape[0] * B.shape[1]
        if self.slope is None and len(half) < unknowns and unknowns > _SMALL:
            self.solve = _woodbury(B, half)
            return
        n_neurons, size, _ = B.shape
        K = half.T @ half
        blocks = K.reshape(n_neurons, size, n_neurons, size)
        at = np.arange(n_neurons)
        blocks[at, :, at, :] += B
        if self.slope is not None:
            self._add_slopes(blocks, K)
        factor = _factored(K)
        self.solve = lambda r: cho_solve(factor, r, check_finite=False)

    def _half(self):
        """Return a matrix M with M'M = A' given A."""
        values, vectors = np.linalg.eigh(self.given)  # no Cholesky: it may be singular
        root = np.sqrt(np.maximum(values, 0.0))[..., None] * vectors.transpose(0, 2, 1)
        root = root @ self.fold
        if root.shape[2] == 1:
            root = np.linalg.norm(root, axis=1, keepdims=True)
        return (root @ self.A).reshape(-1, self.A.shape[2])

    def _add_slopes(self, blocks, K):
        slope = self.slope
        for at, f in enumerate(self.features):
            F = self.FQ.reshape(-1, self.FQ.shape[2])
            blocks[:, f, :, f] += F.T @ (slope.curvature[:, :, at].reshape(-1, 1) * F)
        if slope.gamma.any():
            rows = np.zeros((*self.FQ.shape, self.size))
            tilt = np.sqrt(slope.gamma)[..., None] * slope.tilt
            rows[..., self.features] = self.FQ[..., None] * tilt[:, :, None, :]
            rows = rows.reshape(-1, len(K))
            K -= rows.T @ rows

    def _direct(self, mu, correct):
        """Set the step of everything towards the central path's point mu."""
        for cone in self.cones:
            cone.aim(mu, correct)
        r_loss = self.loss.pull()
        r_margin = self.margin.target / self.margin.weight
        b = self.cone.target
        r_slope = r_y = None
        if self.soft:
            r_y = self.spare.target + b
            b = b - self.ratio * r_y
            r_margin = r_margin + np.einsum("kej,kj->ke", self.hurts, r_y / self.both)
        r = self._pulled_gaps(b)
        d = self.X.shape[1]
        r_norm, r_u = self.group.pull()
        r_norm = r_norm - 1.0
        r[:, :d] += r_u + self.group.tilt * r_norm[:, None]
        if self.slope is not None:
            r_slope, r_q = self.slope.pull()
            r_margin = r_margin + (r_slope / self.slope.alpha)[:, self.slope_of]
            r_q = r_q + self.slope.tilt * r_slope[..., None]
            r[:, self.features] += np.einsum("kej,kef->jf", self.FQ, r_q, optimize=True)
            r_tau, r_members = self.hull.pull()
            r[:, d:] += r_tau
            for at, members in enumerate(self.members):
                r[:, members] += r_members[:, at]
        change, a, dzeta = self._solve(r, r_margin, r_loss)
        self._push(change, a, dzeta, r_norm, r_slope, r_y)

    def _solve(self, r, r_margin, r_loss):
        """Return the steps (J, size), the new multipliers (n, E) and the steps of the losses."""
        change, a, dzeta = self._solve_once(r, r_margin, r_loss)
        for _ in range(_REFINEMENTS):
            flat, spread = self.A.reshape(-1, r.size), self.loss.spread
            left = r - self._curved(change) + ((a @ self.fold).ravel() @ flat).reshape(r.shape)
            of_margin = r_margin - dzeta @ spread.T - np.einsum("kef,kf->ke", self.C, a)
            of_margin -= self._unfolded(flat @ change.ravel())
            if max(np.abs(left).max(), np.abs(of_margin).max()) < _EXACT:
                break
            of_loss = r_loss + a @ spread - np.einsum("kzy,ky->kz", self.loss.hessian, dzeta)
            more = self._solve_once(left, of_margin, of_loss)
            change, a, dzeta = change + more[0], a + more[1], dzeta + more[2]
        return change, a, dzeta

    def _curved(self, change):
        """Return K times a step."""
        product = np.matmul(self.B, change[..., None])[..., 0]
        if self.slope is not None:
            q = np.einsum("kej,jf->kef", self.FQ, change[:, self.features], optimize=True)
            along = np.sum(self.slope.tilt * q, axis=-1) * self.slope.gamma
            q = self.slope.curvature * q - along[..., None] * self.slope.tilt
            product[:, self.features] += np.einsum("kej,kef->jf", self.FQ, q, optimize=True)
        return product

    def _solve_once(self, r, r_margin, r_loss):
        flat = self.A.reshape(-1, r.size)
        a, _ = self._multipliers(r_margin, r_loss)
        change = self.solve(r.ravel() + (a @ self.fold).ravel() @ flat)
        left = r_margin - self._unfolded(flat @ change)
        return change.reshape(r.shape), *self._multipliers(left, r_loss)

    def _unfolded(self, products):
        return products.reshape(len(self.X), -1) @ self.fold.T

    def _multipliers(self, r_margin, r_loss):
        """Solve for the multipliers of the margins and the steps of the losses."""
        pulled = np.einsum("kez,ke->kz", self.raised, r_margin) + r_loss
        dzeta = np.einsum("kzy,ky->kz", self.rise, pulled)
        left = r_margin - dzeta @ self.loss.spread.T
        return np.einsum("kef,kf->ke", self.C_inverse, left), dzeta

    def _push(self, change, a, dzeta, r_norm, r_slope, r_y):
        """Recover the steps of everything eliminated from those of the neurons and a."""
        d = self.X.shape[1]
        self.dU, dtau = change[:, :d], change[:, d:]
        along = np.sum(self.group.tilt * self.dU, axis=1)
        self.group.push(along + r_norm / self.group.alpha, self.dU)
        self.loss.push(dzeta)
        margins, gaps = (
            dzeta @ self.loss.spread.T + self._outputs(self.dU),
            self._gaps(self.dU, dtau),
        )
        if self.slope is not None:
            dq, share = self._slopes(self.dU), a @ self.shares.T
            dsigma = np.sum(self.slope.tilt * dq, axis=-1) + (r_slope - share) / self.slope.alpha
            self.slope.push(dsigma, dq)
            self.hull.push(dtau, self.dU[:, self.members])
            margins = margins - dsigma[:, self.slope_of]
        if self.soft:
            harm = np.einsum("kej,ke->kj", self.hurts, a)
            self.dy = np.where(self.mask, (r_y - self.cone.weight * gaps - harm) / self.both, 0.0)
            self.spare.direct(self.dy)
            gaps = gaps + self.dy
            margins = margins - np.einsum("kej,kj->ke", self.hurts, self.dy)
        self.margin.direct(margins, a)
        self.cone.direct(gaps)

    def _move(self, step):
        for part in (*self.cones, *self.epigraphs, self.loss):
            part.move(step)
        self.U = self.U + step * self.dU
        if self.soft:
            self.y = self.y + step * self.dy

    # ---------------------------------------------------------------- results

    def weights(self):
        """Return V and W over all neurons of the program."""
        weights, columns = np.zeros((2, *self.program.shape)), self.columns
        weights[(columns.signs < 0).astype(int), columns.outputs, :, columns.patterns] = self.U
        return weights

    def multipliers(self) -> Multipliers:
        """Return the dual point, 0 for the cones of neurons that are not in play."""
        program, columns = self.program, self.columns
        a = np.zeros(program.margin_map.offsets.shape)
        a[self.rows] = self.beta * self.margin.z
        slopes = {e: np.zeros(program.X.shape) for e in self.slopes}
        if self.slope is not None:
            for at, e in enumerate(self.slopes):
                slopes[e][np.ix_(self.rows, self.features)] = -self.beta * self.slope.dual()[:, at]
        cones = []
        for sign, all_rows in ((1.0, program.rows_v), (-1.0, program.rows_w)):
            full = np.zeros((program.n_outputs, len(program.X), program.D.shape[1]))
            chosen = columns.signs == sign
            outputs, patterns = columns.outputs[chosen], columns.patterns[chosen]
            full[outputs[:, None], self.cone_rows, patterns[:, None]] = (
                self.beta * self.cone.z[:, chosen].T
            )
            cones.append([full[c, rows] for c, rows in enumerate(all_rows)])
        return Multipliers(a, slopes, *cones)


class _Pricing:
    """The neurons left out: how much of their dual residual some multipliers b can take away.

    Accelerated projected gradient on half the squared distance, all neurons at once.
    """

    def __init__(self, newton, left):
        program = newton.program
        self.program, self.newton, self.left = program, newton, left
        self.rows = newton.cone_rows
        self.X, sets = program.sets.center[self.rows], program.sets
        T = left.signs * program.margin_map.directions[self.rows][:, :, left.outputs]
        self.hurts = T < 0.0
        self.D = np.asarray(program.D, dtype=np.float64)[:, left.patterns]
        self.S = program.signs[np.ix_(self.rows, left.patterns)]
        self.b = np.zeros(self.S.shape)
        # In units in which every row has length 1, so that no large one sets the step of all.
        axes = np.linalg.norm(sets.radius * sets.weights, axis=1)
        axes = np.broadcast_to(axes, len(sets.center))[self.rows, None]
        self.size = np.maximum(np.linalg.norm(self.X, axis=1)[:, None] + axes, 1e-300)
        curvature = np.linalg.norm(np.hstack([self.X, axes]) / self.size, 2) ** 2
        self.step = 1.0 / (2.0 * curvature if sets.radius else curvature) / self.size**2

    def keep(self, index):
        """Forget the neurons outside ``index``."""
        self.left = self.left.at(index)
        for name in ("hurts", "D", "S", "b"):
            setattr(self, name, getattr(self, name)[..., index])

    def joined_by(self, other):
        """Return the pricing of these neurons and others."""
        left = _Columns(*(np.concatenate(pair) for pair in zip(self.left, other.left, strict=True)))
        both = _Pricing(self.newton, left)
        both.b = np.hstack([self.b, other.b])
        return both

    def solve(self, multipliers, n_iter=200):
        """Improve b for a dual point; return the distances over beta (1 or less is feasible)."""
        beta, point = self.program.regularizer.beta, repaired(self.program, multipliers)
        G, cap = self._pull(point), self._cap(point)
        b = np.clip(self.b, 0.0, cap)
        ahead, t = b.copy(), 1.0
        distances, todo = np.empty(G.shape[1]), np.arange(G.shape[1])
        for k in range(n_iter + 1):
            if k % 10 == 0:
                left = self._residual(G[:, todo], b[:, todo], todo)
                distances[todo] = np.linalg.norm(left, axis=0)
                todo = todo[distances[todo] > beta]
                if len(todo) == 0:
                    break
            v = self._residual(G[:, todo], ahead[:, todo], todo)
            support = self.program.sets.support_pairs(numpy_backend, v, self.rows)
            down = self.step * (self.S[:, todo] * (self.X @ v) + support)
            new = np.clip(ahead[:, todo] + down, 0.0, cap[:, todo])
            t, last = (1.0 + np.sqrt(1.0 + 4.0 * t * t)) / 2.0, t
            ahead[:, todo] = np.maximum(new + (last - 1.0) / t * (new - b[:, todo]), 0.0)
            b[:, todo] = new
        self.b = b
        return distances / beta

    def _pull(self, point):
        """Return the part of the dual residuals (d, J) that b has no say in."""
        program, G = self.program, np.empty((self.X.shape[1], len(self.left.signs)))
        for c in range(program.n_outputs):
            direction = program.margin_map.directions[:, :, c]
            pull = -np.sum(point.margins * direction, axis=1)[:, None] * program.sets.center
            pull += sum(direction[:, e, None] * P for e, P in point.slopes.items())
            own = self.left.outputs == c
            G[:, own] = self.left.signs[own] * (pull.T @ self.D[:, own])
        return G

    def _cap(self, point):
        """Return the largest b that is worth anything to the bound."""
        if self.program.formulation == "soft":
            return np.einsum("kej,ke->kj", self.hurts, point.margins[self.rows])
        if self.program.formulation == "one-sided":
            return np.where(self.hurts.any(axis=1), np.inf, 0.0)
        return np.full(self.S.shape, np.inf)

    def _residual(self, G, b, todo):
        H = G - self.X.T @ (self.S[:, todo] * b)
        sets = self.program.sets
        if sets.radius == 0.0:
            return H
        if len(sets.weights) != 1:
            reach = sets.radius * (sets.weights[self.rows].T @ b)
        else:
            reach = sets.radius * sets.weights.T * b.sum(axis=0)
        return H - project_rows(numpy_backend, H.T, reach.T, sets.p).T

    def fill(self, multipliers):
        """Put b into the multipliers."""
        columns = self.left
        for sign, cones, all_rows in (
            (1.0, multipliers.cones_v, self.program.rows_v),
            (-1.0, multipliers.cones_w, self.program.rows_w),
        ):
            for c, rows in enumerate(all_rows):
                chosen = np.flatnonzero((columns.signs == sign) & (columns.outputs == c))
                full = np.zeros((len(self.program.X), len(chosen)))
                full[self.rows] = self.b[:, chosen]
                cones[c][:, columns.patterns[chosen]] = full[rows]


class InteriorPoint:
    """Interior-point method on the neurons in play, for gaps of 1e-6 and less.

    Parameters
    ----------
    tol : float, default=1e-6
        Certified relative duality gap to reach; cone rows may be violated by as much.
    max_iter : int, default=100
        Newton steps at most.
    time_limit : float, optional
        Seconds after which to stop.
    """

    def __init__(self, tol: float = 1e-6, max_iter: int = 100, time_limit: float | None = None):
        self.tol = tol
        self.max_iter = max_iter
        self.time_limit = time_limit

    def __repr__(self):
        return (
            f"InteriorPoint(tol={self.tol!r}, max_iter={self.max_iter!r}, "
            f"time_limit={self.time_limit!r})"
        )

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> Solution:
        """Solve the program.

        Parameters
        ----------
        program : ConvexProgram
            What to minimise.
        start : Solution, optional
            Not used: an interior point starts from the middle.

        Returns
        -------
        Solution
            With a valid objective and lower bound, and multipliers over all patterns.

        Warns
        -----
        ConvergenceWarning
            If the method stopped before the certified gap was at most ``tol``.

        Raises
        ------
        ValueError
            For an option out of range, or a program with ``copy_of``.
        """
        self._check(program)
        monitor = Monitor(program, "InteriorPoint", self.tol, self.time_limit)
        with monitor.running(), np.errstate(all="ignore"):
            self._run(program, monitor)
        return monitor.solution()

    def _check(self, program):
        if not (np.isfinite(self.tol) and self.tol > 0.0):
            raise ValueError(f"tol must be a positive number, got {self.tol!r}.")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter!r}.")
        if program.copy_of is not None:
            raise ValueError(
                "InteriorPoint takes no program with copy_of; use ConicSolver() for samples with "
                "several copies."
            )

    def _run(self, program, monitor):
        """Step until the gap is closed, looking at the neurons out of play at certain gaps."""
        play, pricing = _first_play(program)
        newton, level, may_drop = _Newton(program, play), _FIRST_LEVEL, len(play.signs) > _FEWEST
        scale = program.solution(*np.zeros((2, *program.shape))).objective
        for n_iter in range(1, self.max_iter + 1):
            moved = newton.step()
            late = n_iter == self.max_iter or monitor.seconds > monitor.time_limit or not moved
            if newton.product() * newton.beta > level * scale and not late:
                continue
            multipliers, distances = newton.multipliers(), np.zeros(1)
            if pricing is not None:
                distances = pricing.solve(multipliers)
                pricing.fill(multipliers)
            if monitor.record(n_iter, *newton.weights(), multipliers):
                return
            if not moved:
                monitor.status = "no more progress"
                return
            scale = monitor.best.objective
            if distances.max() > 1.0 + 0.01 * level:
                play, pricing = _more_in_play(newton.columns, pricing, distances)
                newton, level, may_drop = _Newton(program, play), _FIRST_LEVEL, False
                continue
            if may_drop:
                newton, pricing = _dropped(newton, pricing, _IDLE * level)
                may_drop = level == _FIRST_LEVEL
            level = max(self.tol, 0.1 * level)


def _dropped(newton, pricing, limit):
    """Take the neurons that seem to be 0 out of play; the pricing will check them."""
    idle = newton.idle(limit)
    if not idle.any() or idle.all():
        return newton, pricing
    out = _Pricing(newton, newton.columns.at(idle))
    out.b = newton.beta * newton.cone.z[:, idle]
    return newton.kept(~idle), out if pricing is None else pricing.joined_by(out)


def _first_play(program):
    """Return the neurons to begin with, and the pricing of the others unless it is all of them."""
    everything = _Columns.all_of(program)
    nominal = program.sets.radius == 0.0 and program.formulation != "soft"
    few = max(_FEWEST, (_NOMINAL_UNKNOWNS if nominal else _UNKNOWNS) // program.shape[1])
    if len(everything.signs) <= few:
        return everything, None
    zero = _Newton(program, everything.at(slice(0, 1)))
    distances = (pricing := _Pricing(zero, everything)).solve(zero.multipliers(), n_iter=30)
    return _split(pricing, np.argsort(-distances), few // 2)


def _more_in_play(play, pricing, distances):
    """Return the neurons in play with the worst of those left out, and the pricing of the rest."""
    order = np.argsort(-distances)
    violated = int(np.sum(distances > 1.0))
    more, pricing = _split(pricing, order, min(violated, len(play.signs)))
    return _Columns(*(np.concatenate(pair) for pair in zip(play, more, strict=True))), pricing


def _split(pricing, order, count):
    """Take the first ``count`` of an order of the neurons left out out of them."""
    chosen = pricing.left.at(order[:count])
    if count == len(order):
        return chosen, None
    pricing.keep(np.sort(order[count:]))
    return chosen, pricing
