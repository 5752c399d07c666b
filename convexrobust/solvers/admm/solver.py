"""`ADMM`: the loop around the splitting, with its certificates and changes of the weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from convexrobust.losses import LossKind
from convexrobust.program import ConvexProgram, Solution
from convexrobust.solvers.admm.splitting import Splitting
from convexrobust.solvers.contract import check_accepted, refusal_of_loss
from convexrobust.solvers.monitor import Monitor
from convexrobust.solvers.tensors import memory_of, scalar_like

_CHECK = 50  # iterations between two certificates
_BALANCE = 20  # iterations between two changes of the weights
_LAST_BALANCE = 400  # the iteration converges for weights that no longer change


class ADMM:
    r"""Solve a `ConvexProgram` by splitting, on tensors of any dtype and device.

    Parameters
    ----------
    tol : float
        Relative gap between the certified objective and the lower bound to stop at.
    max_iter : int
        Iterations at most.
    dtype : {"float64", "float32"}
        Precision of the iterations. Both bounds are computed in float64 in any case.
    device : str
        Any torch device, for example "cpu" or "cuda".
    time_limit : float, optional
        Seconds.

    Notes
    -----
    The iteration is that of Douglas and Rachford on the copies, with over-relaxation. The weights
    of the blocks are balanced, each on its own, by the relative primal and dual changes. Memory is
    dominated by the copies, a few arrays of n x 2CP numbers and of n x Ed.

    On a CPU with few threads the element-wise part is compiled, where numba is installed, for
    l-inf perturbations or none: with one output up to 10 times as fast, with several up to 3, the
    more the smaller the program. Compiling takes some seconds, once for each kind of loss and
    perturbations and each precision; it is kept on disk where that can be written.
    """

    def __init__(self, tol=1e-3, max_iter=3000, *, dtype="float64", device="cpu", time_limit=None):
        self.tol = tol
        self.max_iter = max_iter
        self.dtype = dtype
        self.device = device
        self.time_limit = time_limit

    def __repr__(self):
        return (
            f"ADMM(tol={self.tol!r}, max_iter={self.max_iter!r}, dtype={self.dtype!r}, "
            f"device={self.device!r})"
        )

    def refusal(self, program: ConvexProgram) -> str | None:
        """Return why the program is not for this solver, None if it is; see `Solver.refusal`."""
        logistic = program.loss.kind == LossKind.LOGISTIC
        if program.copy_of is not None and (program.n_outputs > 1 or logistic):
            return (
                "ADMM takes no copies of samples with several outputs, or with the logistic loss: "
                "use ConicSolver()."
            )
        if program.n_outputs > 2 and np.ptp(program.loss.margin_scales) > 0.0:
            return (
                "ADMM takes no margins of several outputs at different scales, which share slacks: "
                "use InteriorPoint() or ConicSolver()."
            )
        return refusal_of_loss("ADMM", program.loss)

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> Solution:
        """Solve the program, from a start of the same shape if one is given.

        Raises
        ------
        ValueError
            If the device is missing.
        ProgramRefusedError
            For a program that it refuses, with the text of `refusal`.
        MemoryError
            If it is too small.

        Warns
        -----
        ConvergenceWarning
            If the gap did not reach ``tol``.
        """
        check_accepted(self, program)
        monitor = Monitor(program, "ADMM", self.tol, self.time_limit)
        like, splitting = scalar_like(self.dtype, self.device), None
        with monitor.running(), torch.no_grad(), memory_of(like, "the number of patterns"):
            splitting = Splitting(program, like, start)
            n_iter = 0
            while n_iter < self.max_iter:
                stop = _next_stop(n_iter, self.max_iter)
                splitting.advance(stop - n_iter)
                n_iter = stop
                if n_iter % _BALANCE == 0 and n_iter <= _LAST_BALANCE:
                    splitting.balance()
                if n_iter % _CHECK == 0 or n_iter == self.max_iter:
                    V, W = splitting.point()
                    if monitor.record(n_iter, V, W, splitting.multipliers()):
                        break
        state = None if splitting is None else splitting.weights()  # Ctrl-C while it was built
        return replace(monitor.solution(), state=state)


def _next_stop(n_iter, max_iter):
    """Return the iteration after which the weights are balanced or the iterate certified next."""
    stop = min(n_iter - n_iter % _CHECK + _CHECK, max_iter)
    if n_iter < _LAST_BALANCE:
        stop = min(n_iter - n_iter % _BALANCE + _BALANCE, stop)
    return stop
