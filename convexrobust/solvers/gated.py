r"""The gated ReLU program: a group lasso below every ReLU program of the same patterns.

Drop the cones, the slacks and the perturbations from a `ConvexProgram`, and its neurons of weight
+1 and -1 merge into U = V - W:

.. math:: \min_U\ \sum_k \omega_k \varphi(m_k(f(x_k))) + \beta \sum_{c,i} \|u_{ci}\|_2,
          \qquad f_c(x_k) = \sum_i D_{ki}\, x_k'u_{ci}

(the convex gated ReLU network of Mishkin, Sahiner and Pilanci, arXiv 2202.01331). As
:math:`\|v - w\| \le \|v\| + \|w\|` and no perturbation raises a margin, its value is a lower bound
of the soft, the one-sided and the hard program for every epsilon. Its dual asks
:math:`\|X'(D_i \circ \lambda_c)\|_2 \le \beta` of all residuals, where :math:`\lambda_c` is the
derivative of the mean loss in output c; any multipliers can be scaled until that holds.

`solve_gated` runs accelerated proximal gradients with two matrix products an iteration, and
Newton's method on the neurons that are not 0. `GatedRelaxation` makes a ReLU network of the result.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.exceptions import ConvergenceWarning

from convexrobust.backends import numpy as numpy_backend
from convexrobust.backends import torch as torch_backend
from convexrobust.losses import (
    Absolute,
    EpsilonInsensitive,
    Hinge,
    Logistic,
    Squared,
    SquaredHinge,
)
from convexrobust.program import ConvexProgram, Solution

_EPS = np.finfo(float).eps
_SMALL = 4000  # equations n C up to which they are solved by a Cholesky factorisation
_INNER = 29  # Newton steps for one proximal point


class _Gates:
    """The map from U (d, C, P) to the outputs (n, C) and its adjoint, a chunk of rows at a time.

    The rows of a chunk are converted to ``dtype`` on the fly where X and D are of another one.
    """

    def __init__(self, X, D, dtype, chunk_size):
        self.X, self.D, self.dtype, self.chunk_size = X, D, dtype, chunk_size

    def _chunks(self):
        for X, D in zip(self.X.split(self.chunk_size), self.D.split(self.chunk_size), strict=True):
            yield X.to(self.dtype), D.to(self.dtype)

    def outputs(self, U):
        """Return the outputs, (n, C)."""
        d, C, P = U.shape
        flat = U.reshape(d, C * P)
        return torch.cat(
            [((X @ flat).view(len(X), C, P) * D[:, None, :]).sum(2) for X, D in self._chunks()]
        )

    def adjoint(self, R):
        """Return the gradients (d, C, P) from those with respect to the outputs, R (n, C)."""
        C, P = R.shape[1], self.D.shape[1]
        G = torch.zeros(self.X.shape[1], C * P, dtype=self.dtype, device=R.device)
        for r, (X, D) in zip(R.split(self.chunk_size), self._chunks(), strict=True):
            G.addmm_(X.T, (r[:, :, None] * D[:, None, :]).view(len(X), C * P))
        return G.view(-1, C, P)

    def sizes(self, r):
        """Return the sum of the sizes of the rows of X times r >= 0, (d,)."""
        chunks = zip(self.X.split(self.chunk_size), r.split(self.chunk_size), strict=True)
        return sum(X.abs().T @ part for X, part in chunks)

    def among(self, patterns):
        """Return the same map of some of the patterns only."""
        return _Gates(self.X, self.D[:, patterns], self.dtype, self.chunk_size)


class _Pieces(NamedTuple):
    """A loss scale * t^power of the largest t of the pieces shift - m_e, and 0 if ``zero``."""

    shift: float
    zero: bool
    power: int
    scale: float


def _pieces(loss) -> _Pieces:
    """Return how a loss is made of its margins."""
    table = {
        Hinge: _Pieces(1.0, True, 1, 1.0),
        SquaredHinge: _Pieces(1.0, True, 2, 1.0),
        Logistic: _Pieces(0.0, True, 1, 1.0),  # whose largest t is a soft one
        Squared: _Pieces(0.0, False, 2, 0.5),
        Absolute: _Pieces(0.0, False, 1, 1.0),
        EpsilonInsensitive: _Pieces(-getattr(loss, "tube", 0.0), True, 1, 1.0),
    }
    if type(loss) not in table:
        raise TypeError(
            f"the gated program cannot smooth the loss {loss!r}; use one of "
            f"{', '.join(known.__name__ for known in table)}, or the conic solver."
        )
    return table[type(loss)]


class _SmoothLoss:
    """The mean loss of the outputs (n, C) in float64, its kinks rounded by a softmax where needed.

    The largest t of the pieces becomes softness * log(sum_e exp(t_e / softness)). The shares of the
    pieces in it are multipliers that the dual allows, at every softness: all bounds stay valid.
    """

    def __init__(self, program: ConvexProgram, device):
        self.program = program
        self.pieces = _pieces(program.loss)
        self.directions = torch.tensor(program.margin_map.directions, device=device)
        self.offsets = torch.tensor(program.margin_map.offsets, device=device)
        self.weight = torch.tensor(program.weight, device=device)
        self.inverse = torch.linalg.pinv(self.directions)  # from margins to outputs
        logistic = isinstance(program.loss, Logistic)
        smooth = self.pieces.power == 2 and program.n_outputs == 1
        self.exact = logistic or smooth  # so that nothing is rounded
        self.softness = 1.0 if logistic else (0.0 if smooth else 0.3)

    def value(self, F):
        """Return the rounded mean loss."""
        top, _ = self._top(F)
        return float(self.weight @ (self.pieces.scale * top**self.pieces.power))

    def true_value(self, F):
        """Return the mean loss itself."""
        return float(self.weight @ self.program.loss.value(torch_backend, self._margins(F)))

    def derivative(self, F):
        """Return the multipliers of the margins (n, E) and the derivative in F (n, C)."""
        top, share = self._top(F)
        multipliers = (self.weight * self._slope(top))[:, None] * share[:, : self.offsets.shape[1]]
        return multipliers, -torch.einsum("ke,kec->kc", multipliers, self.directions)

    def curvature(self, F):
        """Return the second derivative in the outputs of each sample, (n, C, C)."""
        top, share = self._top(F)
        T, share = self.directions, share[:, : self.offsets.shape[1]]
        mean = torch.einsum("ke,kec->kc", share, T)
        square = mean[:, :, None] * mean[:, None, :]
        bend = 0.0 * square
        if self.pieces.power == 2:
            bend = 2.0 * self.pieces.scale * (top > 0.0)[:, None, None] * square
        if self.softness > 0.0:
            spread = torch.einsum("ke,kec,keb->kcb", share, T, T) - square
            bend = bend + (self._slope(top) / self.softness)[:, None, None] * spread
        return self.weight[:, None, None] * bend

    def sharpen(self, F, factor=2.0):
        """Make the kinks of a loss that has kinks sharper; return outputs of the same derivative.

        Where the pieces are so much closer, the sharper softmax takes the same shares of them.
        """
        if self.exact:
            return F
        self.softness /= factor
        pieces = self.pieces.shift - self._margins(F)
        if self.program.loss.task == "regression":  # one output, two pieces: the upper one counts
            pieces = 2.0 * pieces * (pieces == pieces.amax(dim=1, keepdim=True))
        return F + (1.0 - 1.0 / factor) * torch.einsum("kce,ke->kc", self.inverse, pieces)

    def moved(self, f, step):
        """Return outputs from f towards f + step, where no share grows exponentially.

        A full step across a sharp kink would: the share saturates, the curvature is lost, and
        Newton's method with it. So the largest growth g of a sample is taken down to log(1 + g).
        """
        if self.exact:
            return f + step
        _, share = self._top(f)
        climb = -torch.einsum("kec,kc->ke", self.directions, step)
        if self.pieces.zero:
            climb = torch.nn.functional.pad(climb, (0, 1))
        growth = (climb - (share * climb).sum(dim=1, keepdim=True)) / self.softness
        largest = growth.amax(dim=1, keepdim=True).clamp_min(1e-12)
        return f + step * largest.log1p() / largest

    def _margins(self, F):
        return torch.einsum("kec,kc->ke", self.directions, F) + self.offsets

    def _slope(self, top):
        return self.pieces.scale * self.pieces.power * top ** (self.pieces.power - 1)

    def _top(self, F):
        """Return the (soft) largest piece (n,) and the share of each piece in it."""
        pieces = self.pieces.shift - self._margins(F)
        if self.pieces.zero:
            pieces = torch.nn.functional.pad(pieces, (0, 1))
        if self.softness == 0.0:
            top, index = pieces.max(dim=1)
            return top, torch.nn.functional.one_hot(index, pieces.shape[1]).to(pieces.dtype)
        scaled = pieces / self.softness
        top = self.softness * torch.logsumexp(scaled, dim=1)
        return top, torch.softmax(scaled, dim=1)


@dataclass(frozen=True, eq=False)
class GatedSolution:
    """A point of the gated program with its certified gap.

    Attributes
    ----------
    U : ndarray of shape (C, d, P)
        Weights of the gated neurons.
    objective : float
        Mean loss plus penalty at U, in float64.
    lower_bound : float
        A valid lower bound of the gated program, and so of every ReLU program on its patterns.
    status : {"optimal", "iteration limit", "time limit", "interrupted"}
        Why the solver stopped.
    n_iter : int
        Proximal gradient steps plus Newton steps.
    seconds : float
        Wall time, bounds included.
    multipliers : ndarray of shape (n, E)
        Of the margins: the dual point of the lower bound.
    history : tuple of (n_iter, seconds, objective, lower bound)
        Every certified iterate.
    """

    U: np.ndarray
    objective: float
    lower_bound: float
    status: str
    n_iter: int
    seconds: float
    multipliers: np.ndarray
    history: tuple[tuple[int, float, float, float], ...]

    @property
    def gap(self) -> float:
        """The duality gap, ``objective - lower_bound``."""
        return self.objective - self.lower_bound

    @property
    def relative_gap(self) -> float:
        """The duality gap relative to the objective."""
        return self.gap / max(abs(self.objective), np.finfo(float).tiny)


class _Point(NamedTuple):
    """An iterate in float64.

    ``F`` are the outputs at U; ``R`` and ``G`` the derivatives of the rounded loss in the outputs
    and in the weights, at U or at the nearby outputs ``f`` that a dual method found.
    """

    U: torch.Tensor
    F: torch.Tensor
    f: torch.Tensor
    R: torch.Tensor
    G: torch.Tensor


class _Trial(NamedTuple):
    """What `_Run._trial` makes of outputs f: see `_Run.proximal_point`."""

    f: torch.Tensor
    U: torch.Tensor
    F: torch.Tensor
    G: torch.Tensor
    kept: torch.Tensor  # the share of its length that each neuron kept
    merit: float  # the negative dual function
    inner_gap: float
    moved: float


class _Run:
    """One run of `solve_gated`: the data, the best bounds, and the steps that improve them."""

    def __init__(self, program, dtype, device, chunk_size):
        self.clock = time.perf_counter()
        self.program, self.beta = program, program.regularizer.beta
        X = torch.as_tensor(np.require(program.sets.center, requirements="CW"), device=device)
        D = torch.as_tensor(np.array(program.D, dtype=np.int8), device=device)
        self.exact = _Gates(X, D, torch.float64, chunk_size)
        self.gates = _Gates(X.to(dtype), D.to(dtype), dtype, chunk_size)
        self.loss = _SmoothLoss(program, device)
        self.n_iter, self.history = 0, []
        self.best, self.objective = None, np.inf
        self.multipliers, self.lower_bound = None, -np.inf
        self.lipschitz = self._first_lipschitz()

    @property
    def seconds(self):
        return time.perf_counter() - self.clock

    @property
    def gap(self):
        return (self.objective - self.lower_bound) / max(self.objective, np.finfo(float).tiny)

    @cached_property
    def kernel(self):
        """The matrix X X', (n, n)."""
        return self.exact.X @ self.exact.X.T

    @cached_property
    def covariance(self):
        """Eigenvalues and eigenvectors of X'X / n, of at most 8 d rows."""
        X = self.gates.X[:: max(len(self.gates.X) // (8 * self.gates.X.shape[1]), 1)]
        return torch.linalg.eigh((X.T @ X).to(torch.float64) / len(X))

    def _first_lipschitz(self):
        """Return an estimate from below of the largest curvature of the loss at U = 0.

        A start only: every step checks its bound and raises the constant where it fails.
        """
        C, d, P = self.program.shape
        device = self.exact.X.device
        V = torch.randn(d, C, P, generator=torch.Generator().manual_seed(0)).to(device)
        bend = self.loss.curvature(torch.zeros(len(self.program.X), C, device=device).double())
        length = 0.0
        for _ in range(5):
            V = self._curved(self.gates, bend, V / V.norm())
            length = float(V.norm())
            if length == 0.0:
                break
        return 1.05 * length or 1.0

    @staticmethod
    def _curved(gates, bend, V):
        """Return the second derivative of the loss times V, in the precision of the gates."""
        F = gates.outputs(V.to(gates.dtype)).to(bend.dtype)
        R = torch.einsum("kcb,kb->kc", bend, F)
        return gates.adjoint(R.to(gates.dtype)).to(bend.dtype)

    def penalty(self, U):
        return self.beta * float(U.norm(dim=0).sum())

    def certify(self, U, F=None, f=None, G=None) -> _Point:
        """Return the point at U after recording its objective, and the bound of its derivative."""
        U = U.to(torch.float64)
        F = self.exact.outputs(U) if F is None else F
        f = F if f is None else f
        multipliers, R = self.loss.derivative(f)
        G = self.exact.adjoint(R) if G is None else G
        objective = self.loss.true_value(F) + self.penalty(U)
        size = float(self.exact.sizes(multipliers.sum(dim=1)).norm())
        a = multipliers.cpu().numpy()
        bound = _lower_bound(self.program, a, float(G.norm(dim=0).max()), size)
        if objective < self.objective:
            self.best, self.objective = U, objective
        if bound > self.lower_bound:
            self.multipliers, self.lower_bound = a, bound
        self.history.append((self.n_iter, self.seconds, objective, bound))
        return _Point(U, F, f, R, G)

    def improve(self, point: _Point, tol, max_iter, time_limit) -> str:
        """Improve the point until the gap is closed or a limit is met; return the status."""
        small = len(self.program.X) * self.program.n_outputs <= _SMALL
        steps = self._dual_steps(point) if small else self._primal_steps(point)
        try:
            for _ in steps:
                if self.gap <= tol:
                    return "optimal"
                if self.n_iter >= max_iter:
                    return "iteration limit"
                if self.seconds > time_limit:
                    return "time limit"
        except KeyboardInterrupt:
            pass
        return "interrupted"

    def _dual_steps(self, point):
        """Yield after every improvement by the proximal point method."""
        yield
        point = self.accelerate(point, 60)
        sigma = 1e3 / self.lipschitz
        yield
        while True:
            point, n_steps = self.proximal_point(point, sigma)
            yield
            if n_steps < _INNER:  # solved, so that the next point may be farther off
                sigma *= 10.0 if n_steps < 5 else (3.0 if self.loss.exact else 1.0)
                point = point._replace(f=self.loss.sharpen(point.f))
            else:
                sigma /= 3.0

    def _primal_steps(self, point):
        """Yield after every improvement by Newton's method, and by gradients where it stalls."""
        yield
        while True:
            point, well = self.newton(point)
            yield
            if not well:
                point = self.accelerate(point, 50)
                yield
            if not self.loss.exact:
                self.loss.sharpen(point.F)
                point = self.certify(point.U, point.F)

    def _shrunk(self, Z, step):
        """Return the proximal point of the penalty and the share of its length each keeps."""
        kept = torch.relu(1.0 - step * self.beta / Z.norm(dim=0).clamp_min(1e-300))
        return Z * kept, kept

    # ---------------------------------------------------------------- first order

    def accelerate(self, point: _Point, n_steps) -> _Point:
        """Run FISTA, restarted where it turns back; two matrix products a step."""
        gates, dtype = self.gates, self.gates.dtype
        U, F = point.U.to(dtype), point.F
        Y, FY, t = U, F, 1.0
        for _ in range(n_steps):
            _, R = self.loss.derivative(FY)
            new, F_new = self._gradient_step(gates, Y, FY, R, gates.adjoint(R.to(dtype)))
            turned = float(((Y - new) * (new - U)).sum()) > 0.0
            t_new = 1.0 if turned else (1.0 + np.sqrt(1.0 + 4.0 * t * t)) / 2.0
            momentum = 0.0 if turned else (t - 1.0) / t_new
            # The outputs are linear: those of the extrapolated point cost no product.
            Y, FY = new + momentum * (new - U), F_new + momentum * (F_new - F)
            U, F, t = new, F_new, t_new
            self.n_iter += 1
        return self.certify(U)

    def _gradient_step(self, gates, Y, FY, R, G):
        """Return the proximal gradient step from Y and its outputs, after checking its bound."""
        value = self.loss.value(FY)
        while True:
            new, _ = self._shrunk(Y - G / self.lipschitz, 1.0 / self.lipschitz)
            F = gates.outputs(new).to(torch.float64)
            # The linear term is taken in the outputs, where less is lost to rounding.
            above = self.loss.value(F) - value - float((R * (F - FY)).sum())
            if 2.0 * above <= self.lipschitz * float(((new - Y) ** 2).sum()) + 1e-6 * abs(value):
                return new, F
            self.lipschitz *= 1.5

    # ---------------------------------------------------------------- Newton in the weights

    def newton(self, point: _Point) -> tuple[_Point, bool]:
        """Take a Newton step on the neurons that are not 0; tell whether it was a success.

        Before it a proximal gradient step decides which neurons these are, if it changes them.
        """
        _, kept = self._shrunk(point.U - point.G / self.lipschitz, 1.0 / self.lipschitz)
        if not torch.equal(kept > 0.0, point.U.norm(dim=0) > 0.0):
            point = self.certify(
                *self._gradient_step(self.exact, point.U, point.F, point.R, point.G)
            )
        active = point.U.norm(dim=0) > 0.0
        patterns = torch.nonzero(active.any(dim=0))[:, 0]
        if len(patterns) == 0:
            return point, False
        step = torch.zeros_like(point.U)
        step[:, :, patterns] = self._newton_direction(point, patterns, active[:, patterns])
        self.n_iter += 1
        return self._searched(point, step)

    def _newton_direction(self, point, patterns, active):
        """Return the Newton step (d, C, p) by preconditioned conjugate gradients."""
        gates, U = self.gates.among(patterns), point.U[:, :, patterns]
        lengths = torch.where(active, U.norm(dim=0), 1.0)
        unit, pull = U / lengths, self.beta / lengths
        bend = self.loss.curvature(point.F)

        def hessian(V):
            H = self._curved(gates, bend, V) + pull * (V - unit * (unit * V).sum(dim=0))
            return H * active

        precondition = self._preconditioner(gates.D, bend, pull, active)
        gradient = (point.G[:, :, patterns] + self.beta * unit) * active
        tol = min(0.1, max(0.01, 0.3 * self.gap))
        return _conjugate_gradients(hessian, precondition, -gradient, tol, 60)

    def _preconditioner(self, D, bend, pull, active):
        """Return the inverse of mean curvature * X'X (x) D'D / n^2 + mean pull, by output."""
        s, Q = self.covariance
        e, B = torch.linalg.eigh((D.T @ D).to(torch.float64) / len(D))
        mean_bend = torch.diagonal(bend.sum(dim=0))
        mean_pull = (pull * active).sum(dim=1) / active.sum(dim=1).clamp_min(1)
        spectrum = mean_bend[:, None] * s[:, None, None].clamp_min(0.0) * e.clamp_min(0.0)
        spectrum = spectrum + mean_pull[:, None] + 1e-10 * spectrum.max() + 1e-300

        def apply(V):
            inner = torch.einsum("dj,dcp,pq->jcq", Q, V, B) / spectrum
            return torch.einsum("dj,jcq,pq->dcp", Q, inner, B) * active

        return apply

    def _searched(self, point, step) -> tuple[_Point, bool]:
        """Return the first point along the halved step that lowers the rounded objective."""
        along, t = self.exact.outputs(step), 1.0
        pull = (point.U * step).sum(dim=0) / point.U.norm(dim=0).clamp_min(1e-300)
        slope = float((point.G * step).sum() + self.beta * pull.sum())
        value = self.loss.value(point.F) + self.penalty(point.U)
        while t > 1e-3:
            U, F = point.U + t * step, point.F + t * along
            if self.loss.value(F) + self.penalty(U) <= value + 1e-4 * t * slope:
                return self.certify(U, F), t == 1.0
            t /= 2.0
        return point, False

    # ---------------------------------------------------------------- Newton in the outputs

    def proximal_point(self, point: _Point, sigma) -> tuple[_Point, int]:
        r"""Return nearly the minimiser of the objective plus ||U - point.U||^2 / (2 sigma).

        With f the outputs at the solution and F the linear map of the gates, it is
        :math:`U = \mathrm{shrunk}(U_0 - \sigma F'\nabla(f))`, so that :math:`f = F U` are
        n C semi-smooth equations, solved by Newton's method. The primal value at U exceeds the
        dual one at f by a Bregman distance of the loss, which says when to stop.
        """
        trial = self._trial(point, point.f, sigma)
        for n_steps in range(_INNER + 1):
            solved = trial.inner_gap <= max(0.3 * trial.moved, 1e-10 * abs(self.objective))
            if solved or n_steps == _INNER:
                break
            step, slope = self._dual_direction(trial, sigma)
            t, new = 1.0, self._trial(point, self.loss.moved(trial.f, step), sigma)
            while (
                new.merit > trial.merit + 1e-4 * t * slope + 1e-13 * abs(trial.merit) and t > 1e-4
            ):
                t /= 2.0
                new = self._trial(point, self.loss.moved(trial.f, t * step), sigma)
            trial = new
            self.n_iter += 1
        return self.certify(trial.U, trial.F, trial.f, trial.G), n_steps

    def _trial(self, point, f, sigma) -> _Trial:
        _, R = self.loss.derivative(f)
        G = self.exact.adjoint(R)
        U, kept = self._shrunk(point.U - sigma * G, sigma)
        active = torch.nonzero(kept.amax(dim=0) > 0.0)[:, 0]
        F = self.exact.among(active).outputs(U[:, :, active])
        value = self.loss.value(f)
        merit = float((R * f).sum()) - value
        merit += (float((U**2).sum()) - float((point.U**2).sum())) / (2.0 * sigma)
        inner_gap = self.loss.value(F) - value - float((R * (F - f)).sum())
        moved = float(((U - point.U) ** 2).sum()) / (2.0 * sigma)
        return _Trial(f, U, F, G, kept, merit, inner_gap, moved)

    def _dual_direction(self, trial, sigma):
        """Return the Newton step in f and the slope of the merit along it.

        With H the curvature of the loss and A = sigma F (derivative of the shrinkage) F' it is
        -(I + A H)^{-1} (f - F U), which one Cholesky factor of I + H^{1/2} A H^{1/2} gives.
        """
        n, C = trial.f.shape
        # Single precision is enough for a direction while the system is not too badly scaled.
        dtype = torch.float32 if sigma * self.lipschitz < 1e7 else torch.float64
        r = trial.f - trial.F
        values, basis = torch.linalg.eigh(self.loss.curvature(trial.f))
        root = (basis * values.clamp_min(0.0).sqrt()[:, None, :]) @ basis.transpose(1, 2)
        A = torch.stack([self._dual_block(trial, c, sigma, dtype) for c in range(C)])
        low = root.to(dtype)
        if C == 1:
            M = low[:, 0] * A[0] * low[:, 0, 0]
        else:
            M = torch.einsum("kac,ckl,lcb->kalb", low, A, low).reshape(n * C, n * C)
        M.diagonal().add_(1.0)
        rooted = torch.einsum("kab,kb->ka", root, r)
        x = torch.cholesky_solve(rooted.reshape(-1, 1).to(dtype), _cholesky(M)).view(n, C)
        pulled = torch.einsum("kab,kb->ka", low, x)
        step = torch.einsum("ckl,lc->kc", A, pulled).to(torch.float64) - r
        return step, -float((rooted * x).sum())

    def _dual_block(self, trial, c, sigma, dtype):
        """Return the block (n, n) of A for output c: X X' o D J D' with J of rank one a neuron."""
        active = torch.nonzero(trial.kept[c] > 0.0)[:, 0]
        kept, D = trial.kept[c, active].to(dtype), self.exact.D[:, active].to(dtype)
        U = trial.U[:, c, active]
        along = D * (self.exact.X @ (U / U.norm(dim=0))).to(dtype)
        block = self.kernel.to(dtype) * ((D * kept) @ D.T)
        return sigma * block.addmm_(along * (1.0 - kept), along.T)


def _cholesky(M):
    """Return the Cholesky factor of M, a little more of the identity added while it has none."""
    factor, failed = torch.linalg.cholesky_ex(M)
    extra = 1e-6 * float(M.diagonal().max())
    while failed:
        M.diagonal().add_(extra)
        extra *= 10.0
        factor, failed = torch.linalg.cholesky_ex(M)
    return factor


def _conjugate_gradients(matrix, precondition, b, tol, max_iter):
    """Solve matrix(x) = b nearly, in the norm of the preconditioner."""
    x, r = torch.zeros_like(b), b
    p = z = precondition(r)
    first = rz = float((r * z).sum())
    for _ in range(max_iter):
        Ap = matrix(p)
        curvature = float((p * Ap).sum())
        if curvature <= 0.0 or rz <= tol**2 * first:
            break
        x, r = x + (rz / curvature) * p, r - (rz / curvature) * Ap
        z = precondition(r)
        rz, previous = float((r * z).sum()), rz
        p = z + (rz / previous) * p
    return x


def _lower_bound(program: ConvexProgram, a, longest, size) -> float:
    """Return a valid lower bound from multipliers a (n, E) with residuals at most ``longest``.

    ``size`` bounds what the sizes of the terms of a residual sum up to, for the rounding in it.
    """
    used = program.weight > 0.0
    a, weight, offsets = a[used], program.weight[used], program.margin_map.offsets[used]
    residual = longest + (len(program.X) + a.shape[1] + 8) * _EPS * size
    limit = 1e6
    if not residual * limit <= program.regularizer.beta:
        limit = program.regularizer.beta / residual if np.isfinite(residual) else 0.0
    heaviest = np.max(a.sum(axis=1) / weight)
    if heaviest > 0.0:
        limit = min(limit, program.loss.largest_multiplier / heaviest)
    limit *= 1.0 - 1e-12

    def dual(t):
        conjugate = weight * program.loss.conjugate(t * a / weight[:, None])
        linear = t * np.sum(a * offsets, axis=1)
        terms = np.abs(conjugate) + t * np.sum(a * (1.0 + np.abs(offsets)), axis=1)
        return float(-np.sum(linear + conjugate) - (len(weight) + 16) * _EPS * np.sum(terms))

    if not limit > 0.0:
        return dual(0.0)
    inside = minimize_scalar(lambda t: -dual(t), bounds=(0.0, limit), method="bounded").x
    return max(dual(0.0), dual(inside), dual(limit))


def solve_gated(
    program: ConvexProgram,
    *,
    tol: float = 1e-6,
    max_iter: int = 1000,
    dtype: str = "float32",
    device: str = "cpu",
    time_limit: float | None = None,
    start: np.ndarray | None = None,
    chunk_size: int = 4096,
) -> GatedSolution:
    r"""Solve the gated program of a `ConvexProgram` with a certified gap.

    .. math:: \min_U\ \sum_k \omega_k \varphi(m_k) + \beta \sum_{c,i} \|u_{ci}\|_2,
              \qquad f_c(x_k) = \sum_i D_{ki}\, x_k'u_{ci}

    Parameters
    ----------
    program : ConvexProgram
        Its data, patterns, loss and beta are used; its perturbation and formulation are not
        (but for bounds, which move the centres of the sets).
    tol : float
        Relative duality gap that is good enough, at least 0.
    max_iter : int
        Limit on proximal gradient and Newton steps together.
    dtype : {"float32", "float64"}
        Precision of gradient steps and linear solves; Newton's residuals, the objective and the
        bound are always float64.
    device : str
        Where torch computes, e.g. "cpu" or "cuda".
    time_limit : float, optional
        Seconds.
    start : ndarray of shape (C, d, P), optional
        Where to start, by default U = 0.
    chunk_size : int
        Rows of X at a time: no temporary is larger than chunk_size x C P (but the n C x n C
        matrices of small problems).

    Returns
    -------
    GatedSolution

    Raises
    ------
    ValueError
        For a wrong tol, dtype, chunk_size or shape of start, or beta = 0 (which leaves no bound).
    TypeError
        For a loss that is not one of `convexrobust.losses`.

    Warns
    -----
    ConvergenceWarning
        If the gap is not closed.

    Notes
    -----
    With n C <= 4000 it is the proximal point method, each point by semi-smooth Newton on the n C
    outputs (following Li, Sun and Toh, SIAM J. Optim. 28, 2018, but in the outputs instead of the
    multipliers, so that no conjugate is needed); above that Newton's method on the non-zero neurons
    by conjugate gradients, preconditioned by the Kronecker product of X'X and D'D, with
    accelerated gradient steps wherever that stalls. A loss with kinks is rounded by a softmax that
    becomes sharper and sharper; its gap closes more slowly.
    """
    _check_arguments(program, tol, dtype, chunk_size, start)
    run = _Run(program, getattr(torch, dtype), device, chunk_size)
    point = run.certify(_first_weights(program, start, device))
    status = run.improve(point, tol, max_iter, np.inf if time_limit is None else time_limit)
    found = GatedSolution(
        U=run.best.permute(1, 0, 2).cpu().numpy(),
        objective=run.objective,
        lower_bound=run.lower_bound,
        status=status,
        n_iter=run.n_iter,
        seconds=run.seconds,
        multipliers=run.multipliers,
        history=tuple(run.history),
    )
    if status != "optimal":
        warnings.warn(
            f"solve_gated stopped with status {status!r} after {found.n_iter} steps: objective "
            f"{found.objective:.6g}, lower bound {found.lower_bound:.6g}. Both are valid; for a "
            "smaller gap allow more iterations or time, or increase beta.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return found


def _check_arguments(program, tol, dtype, chunk_size, start):
    """Raise ValueError naming the argument of `solve_gated` that is wrong."""
    if not tol >= 0.0:
        raise ValueError(f"tol must be a number >= 0, got {tol!r}.")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}.")
    if not chunk_size >= 1:
        raise ValueError(f"chunk_size must be a number of rows >= 1, got {chunk_size!r}.")
    if not program.regularizer.beta > 0.0:
        raise ValueError("beta must be > 0 for the gated program: without it there is no bound.")
    if start is not None and np.shape(start) != program.shape:
        raise ValueError(f"start must have shape {program.shape}, got {np.shape(start)}.")


def _first_weights(program, start, device):
    """Return the start as (d, C, P)."""
    start = np.zeros(program.shape) if start is None else start
    return torch.tensor(start, dtype=torch.float64, device=device).permute(1, 0, 2)


def to_relu(program: ConvexProgram, U, *, n_steps: int = 60, **facts) -> Solution:
    r"""Return a ReLU network near the gated one, with its certified objective.

    A gated neuron u on pattern i becomes a ReLU neuron of weight +1, v = u, or of weight -1,
    w = -u: whichever leaves its cone less (by the sum of the slacks at the rows that the margins
    see). All are scaled by the number in [0, 1] that gives the best objective, and `n_steps`
    proximal subgradient steps on the soft program follow; the best point counts.

    Parameters
    ----------
    program : ConvexProgram
        The program to give a point of. Under "hard" and "one-sided" the point may violate cones:
        its objective is valid all the same, and ``cone_violation`` says by how much.
    U : ndarray of shape (C, d, P)
        Weights of the gated neurons.
    n_steps : int
        Subgradient steps; each costs a few evaluations of the objective.
    **facts
        Passed on to the `Solution`.
    """
    if np.shape(U) != program.shape:
        raise ValueError(f"U must have shape {program.shape}, got {np.shape(U)}.")
    soft = program.certified()
    V, W = _sided(soft, np.asarray(U, dtype=np.float64))

    def scaled(t):
        return soft.objective(numpy_backend, t * V, t * W)

    t = minimize_scalar(scaled, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-3}).x
    return program.solution(*_descended(soft, t * V, t * W, n_steps), **facts)


def _sided(soft, U):
    """Return V, W: each gated neuron on the side on which the sum of its slacks is smaller."""
    V, W = np.zeros_like(U), np.zeros_like(U)
    for c in range(len(U)):
        plus, minus = (
            np.maximum(soft.cone_gap(numpy_backend, sign * U[c], rows[c]), 0.0).sum(axis=0)
            for sign, rows in ((1.0, soft.rows_v), (-1.0, soft.rows_w))
        )
        V[c], W[c] = U[c] * (plus <= minus), -U[c] * (plus > minus)
    return V, W


def _descended(soft, V, W, n_steps):
    """Return the best point of proximal subgradient steps by Polyak's rule.

    The optimum in the rule is unknown: it is taken to be a little below the best value so far, by
    a distance that is halved whenever it has not been reached for a while.
    """
    both = best = torch.tensor(np.stack([V, W]))
    lowest, distance, failures = np.inf, None, 0
    for _ in range(n_steps + 1):
        both = both.detach().requires_grad_()
        mean_loss = soft.mean_loss(torch_backend, soft.margins(torch_backend, *both))
        value = float(mean_loss.detach()) + float(soft.penalty(torch_backend, *both.detach()))
        distance = 0.1 * value if distance is None else distance
        failures = 0 if value < lowest else failures + 1
        if value < lowest:
            lowest, best = value, both.detach()
        (G,) = torch.autograd.grad(mean_loss, both)
        size = float((G**2).sum())
        if size == 0.0:
            break
        if failures >= 5:
            both, distance, failures = best, distance / 2.0, 0
            continue
        step = (value - lowest + distance) / size
        moved = both.detach() - step * G
        both = torch.stack(
            [torch.stack([soft.regularizer.prox(torch_backend, u, step) for u in A]) for A in moved]
        )
    return best.numpy()


class GatedRelaxation:
    """The cheap first answer for large problems: the gated program and a network made of it.

    Parameters
    ----------
    tol : float
        Relative gap to which the gated program is solved, and below which the network counts as
        optimal.
    n_steps : int
        Subgradient steps of `to_relu` on the network.
    **options
        Passed on to `solve_gated`.

    Notes
    -----
    Both bounds are valid, but the gap between them is that of the relaxation, which no further
    iteration closes: status "relaxation" comes without a warning.
    """

    def __init__(self, tol: float = 1e-3, *, n_steps: int = 60, **options):
        self.tol, self.n_steps, self.options = tol, n_steps, options

    def __repr__(self):
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"GatedRelaxation(tol={self.tol!r}, n_steps={self.n_steps!r}{options})"

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> Solution:
        """Return a network with a certified objective and the gated lower bound.

        The gated program starts from V - W of another solution of the same shape.
        """
        clock = time.perf_counter()
        U = None if start is None or start.V.shape != program.shape else start.V - start.W
        gated = solve_gated(program, tol=self.tol, start=U, **self.options)
        found = to_relu(program, gated.U, n_steps=self.n_steps, lower_bound=gated.lower_bound)
        closed = found.relative_gap <= self.tol and found.cone_violation <= self.tol
        return replace(
            found,
            status="optimal" if closed else "relaxation",
            solver="gated relaxation",
            n_iter=gated.n_iter,
            seconds=time.perf_counter() - clock,
            solver_seconds=gated.seconds,
        )
