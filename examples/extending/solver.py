"""A solver: quasi-Newton steps on a program whose kinks are rounded, less and less.

A program's formulas take the backend that they compute with as an argument. Here that is torch with
kinks of width ``mu`` rounded, so that automatic differentiation and SciPy's L-BFGS do the rest. The
derivatives of the rounded loss and of the rounded supports are a dual point, whose bound is valid
whatever the rounding.
"""

from types import SimpleNamespace

import numpy as np
import torch
from scipy.optimize import minimize

from convexrobust.backends import torch as torch_backend
from convexrobust.duality import Multipliers
from convexrobust.solvers.contract import check_accepted
from convexrobust.solvers.monitor import Monitor
from convexrobust.solvers.residuals import best_cone_multipliers

_WIDTHS = 0.1 * 0.25 ** np.arange(10)  # of the kinks, one after the other


class RoundedLBFGS:
    """Solve soft programs by L-BFGS on rounded ones.

    Parameters
    ----------
    tol : float
        Relative gap between the certified objective and the lower bound to stop at.
    max_iter : int
        Steps at most for each rounding.
    """

    def __init__(self, tol=1e-2, max_iter=300):
        self.tol = tol
        self.max_iter = max_iter

    def refusal(self, program):
        """Return what this solver cannot treat of a program, and which can; else None."""
        if program.formulation != "soft":
            return "RoundedLBFGS takes no cones as constraints: use InteriorPoint() or ADMM()."
        if program.copy_of is not None:
            return "RoundedLBFGS takes no copies of samples: use ConicSolver()."
        return None

    def solve(self, program, start=None):
        """Return the best certified iterate; warn if its gap is not closed."""
        check_accepted(self, program)
        monitor = Monitor(program, "RoundedLBFGS", self.tol)
        U = np.zeros((2, *program.shape))
        if start is not None and start.V.shape == program.shape:
            U = np.stack([start.V, start.W])
        n_iter = 0
        with monitor.running():
            for mu in _WIDTHS:
                xp = rounded(mu)
                U, n_steps = improved(program, U, xp, self.max_iter)
                n_iter += n_steps
                if monitor.record(n_iter, *U, dual_point(program, U, xp)):
                    break
        return monitor.solution()


def rounded(mu):
    """Return the torch backend with kinks of width mu rounded."""

    def size(A):
        return torch.sqrt(A**2 + mu**2)

    def largest(A, axis):
        return mu * torch.logsumexp(A / mu, dim=axis)

    def norm(A, q, axis):
        if q == 2:
            return torch.sqrt((A**2).sum(dim=axis) + mu**2)
        return size(A).sum(dim=axis) if q == 1 else largest(size(A), axis)

    return SimpleNamespace(
        **{
            **vars(torch_backend),
            "abs": size,
            "norm": norm,
            "pos": lambda A: (A + size(A)) / 2.0,
            "row_max": lambda A: largest(A, 1),
        }
    )


def improved(program, U, xp, max_iter):
    """Return weights (2, C, d, P) that are better for a rounded program, and the steps taken."""

    def value_and_gradient(flat):
        weights = torch.tensor(flat.reshape(U.shape), requires_grad=True)
        value = program.objective(xp, *weights)
        value.backward()
        return value.item(), weights.grad.numpy().ravel()

    options = {"maxiter": max_iter, "maxfun": 2 * max_iter}
    found = minimize(value_and_gradient, U.ravel(), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(U.shape), found.nit


def dual_point(program, U, xp):
    """Return the multipliers that the derivatives of a rounded program are."""
    V, W = torch.tensor(U)
    margins = program.margins(xp, V, W).requires_grad_()
    (a,) = torch.autograd.grad(-program.mean_loss(xp, margins), margins)
    P = {}
    for e, slope in program.margin_slopes(xp, program.slopes(xp, V, W)).items():
        shares = a[:, np.equal(program.margin_map.slope_of, e)].sum(dim=1)
        slope.requires_grad_()
        (worst,) = torch.autograd.grad(shares @ program.sets.support(xp, slope), slope)
        P[e] = worst.numpy()
    n_patterns = program.D.shape[1]
    rows = program.rows_v, program.rows_w
    zeros = [[np.zeros((len(r), n_patterns)) for r in of_side] for of_side in rows]
    return best_cone_multipliers(program, Multipliers(a.numpy(), P, *zeros), n_iter=200, tol=1e-2)
