"""A solver: proximal subgradient steps on the soft program, with Polyak's step lengths.

A subgradient of the mean loss comes from automatic differentiation of the program's own formula on
the torch backend. The proximal step of the penalty follows, which leaves neurons at exactly 0. A
step is as long as the distance to the best lower bound so far allows (following Polyak, 1969), so
that the certificate steers the method, too.
"""

import numpy as np
import torch

from convexrobust.backends import numpy as numpy_backend
from convexrobust.backends import torch as torch_backend
from convexrobust.duality import Multipliers
from convexrobust.solvers.contract import check_accepted
from convexrobust.solvers.monitor import Monitor
from convexrobust.solvers.residuals import best_cone_multipliers

_CHECK = 100  # steps between two certificates


class Subgradient:
    """Solve soft programs to a rough gap.

    Parameters
    ----------
    tol : float
        Relative gap between the certified objective and the lower bound to stop at.
    max_iter : int
        Steps at most.
    """

    def __init__(self, tol=1e-2, max_iter=2000):
        self.tol = tol
        self.max_iter = max_iter

    def refusal(self, program):
        """Return what this solver cannot treat of a program, and which can; else None."""
        if program.formulation != "soft":
            return "Subgradient takes no cones as constraints: use InteriorPoint() or ADMM()."
        if program.copy_of is not None:
            return "Subgradient takes no copies of samples: use ConicSolver()."
        return None

    def solve(self, program, start=None):
        """Return the best certified iterate; warn if its gap is not closed."""
        check_accepted(self, program)
        monitor = Monitor(program, "Subgradient", self.tol)
        U = torch.zeros(2, *program.shape, dtype=torch.float64)
        if start is not None and start.V.shape == program.shape:
            U = torch.tensor(np.stack([start.V, start.W]))
        average = 0.0
        with monitor.running():
            for n_iter in range(1, self.max_iter + 1):
                U, multipliers = stepped(program, U, max(monitor.lower_bound, 0.0))
                average = average + (multipliers - average) / n_iter
                if n_iter % _CHECK == 0 or n_iter == self.max_iter:
                    V, W = U.numpy()
                    if monitor.record(n_iter, V, W, dual_point(program, V, W, average)):
                        break
        return monitor.solution()


def stepped(program, U, lower_bound):
    """Return the next weights (2, C, d, P), and the multipliers (n, E) of the margins at U."""
    U = U.detach().requires_grad_()
    margins = program.margins(torch_backend, *U)
    mean_loss = program.mean_loss(torch_backend, margins)
    (gradient,) = torch.autograd.grad(mean_loss, U)
    value = float(mean_loss) + float(program.penalty(torch_backend, *U.detach()))
    step = (value - lower_bound) / max(float(gradient.square().sum()), 1e-30)
    moved, prox = U.detach() - step * gradient, program.regularizer.prox
    U = torch.stack([torch.stack([prox(torch_backend, u, step) for u in side]) for side in moved])
    multipliers = program.loss.multipliers(margins.detach().numpy())
    return U, program.weight[:, None] * multipliers


def dual_point(program, V, W, a):
    """Return multipliers with these of the margins, and the worst perturbations of the slopes.

    Any will do: the bound that they give is valid whatever they are.
    """
    slopes = program.margin_slopes(numpy_backend, program.slopes(numpy_backend, V, W))
    P = {}
    for e, Q in slopes.items():
        shares = a[:, np.equal(program.margin_map.slope_of, e)].sum(axis=1)
        P[e] = -shares[:, None] * program.sets.lowest(Q)
    n_patterns = program.D.shape[1]
    rows = program.rows_v, program.rows_w
    zeros = [[np.zeros((len(r), n_patterns)) for r in of_side] for of_side in rows]
    return best_cone_multipliers(program, Multipliers(a, P, *zeros), n_iter=200, tol=1e-2)
