"""`solve_gated`: the gated program to a certified gap."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from convexrobust.program import ConvexProgram, Status
from convexrobust.solvers.contract import ProgramRefusedError, refusal_of_loss
from convexrobust.solvers.gated.first_order import accelerate
from convexrobust.solvers.gated.proximal_point import MAX_STEPS, proximal_point
from convexrobust.solvers.gated.run import Run
from convexrobust.solvers.gated.weights_newton import Searched, newton

_CHOLESKY_EQUATIONS = 4000  # equations n C up to which they are solved by a Cholesky factorisation
_KEPT = 20  # directions of conjugate gradients, if they are not larger than X
_GRADIENT_STEPS = 25  # where Newton's method stalls
_SHARE_LEFT = 0.5  # of what the rounding costs the bound: solved more exactly than that, it shrinks


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
    status : Status
        Why the solver stopped; "diverged" means that a step overflowed.
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
    status: Status
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


def solve_gated(
    program: ConvexProgram,
    *,
    tol: float = 1e-6,
    max_iter: int = 1000,
    dtype: str = "float32",
    device: str = "cpu",
    time_limit: float | None = None,
    start: np.ndarray | None = None,
    chunk_size: int | None = None,
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
    chunk_size : int, optional
        Rows of X at a time, by default as many as the caches of a CPU hold outputs of, or 64 Mi
        numbers on a GPU: no temporary of the rows is larger than chunk_size x C P, but for the
        n C x n C matrices of small problems. Large problems keep up to 40 vectors of the size of U,
        if these are not larger than X.

    Returns
    -------
    GatedSolution

    Raises
    ------
    ValueError
        For a wrong tol, dtype, chunk_size or shape of start.
    ProgramRefusedError
        For copies of samples, a loss of kind "other", or beta = 0 (which leaves no bound).

    Warns
    -----
    ConvergenceWarning
        If the gap is not closed, be it that a step overflowed: the best point before it counts.

    Notes
    -----
    With n C <= 4000 it is the proximal point method, each point by semi-smooth Newton on the n C
    outputs (following Li, Sun and Toh, SIAM J. Optim. 28, 2018, but in the outputs instead of the
    multipliers, so that no conjugate is needed); above that Newton's method on the non-zero neurons
    by conjugate gradients, with accelerated gradient steps wherever that stalls. These are
    preconditioned by the Kronecker product of X'X and D'D plus the curvature of the penalty, and by
    the directions of the last Newton step. A loss with kinks is rounded by a softmax that becomes
    sharper as the rounded problem is solved; its gap closes more slowly.
    """
    _check_arguments(program, tol, dtype, chunk_size, start)
    if text := refusal_of_gated(program):
        raise ProgramRefusedError(text)
    run = Run(program, getattr(torch, dtype), device, chunk_size)
    first = _first_weights(program, start, device)
    status = _improve(run, first, tol, max_iter, np.inf if time_limit is None else time_limit)
    if run.best is None:  # the start overflowed; no weights do not
        run.certify(0.0 * torch.nan_to_num(first))
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
    if status != Status.OPTIMAL:
        warnings.warn(
            f"solve_gated stopped with status '{status}' after {found.n_iter} steps: objective "
            f"{found.objective:.6g}, lower bound {found.lower_bound:.6g}. Both are valid; for a "
            "smaller gap allow more iterations or time, increase beta, scale the features, or use "
            "dtype='float64'.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return found


def refusal_of_gated(program: ConvexProgram) -> str | None:
    """Return why the gated program of a `ConvexProgram` cannot be solved, None if it can."""
    if program.copy_of is not None:
        return "The gated program takes no copies of samples: use ConicSolver()."
    if not program.regularizer.beta > 0.0:
        return (
            "beta must be > 0 for the gated program, which has no bound without it: use "
            "ConicSolver()."
        )
    return refusal_of_loss("The gated program", program.loss)


def _check_arguments(program, tol, dtype, chunk_size, start):
    """Raise ValueError naming the argument of `solve_gated` that is wrong."""
    if not tol >= 0.0:
        raise ValueError(f"tol must be a number >= 0, got {tol!r}.")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}.")
    if chunk_size is not None and not chunk_size >= 1:
        raise ValueError(f"chunk_size must be a number of rows >= 1, got {chunk_size!r}.")
    if start is not None and np.shape(start) != program.shape:
        raise ValueError(f"start must have shape {program.shape}, got {np.shape(start)}.")


def _first_weights(program, start, device):
    """Return the start as (d, C, P)."""
    start = np.zeros(program.shape) if start is None else start
    return torch.tensor(start, dtype=torch.float64, device=device).permute(1, 0, 2)


def _improve(run: Run, first, tol, max_iter, time_limit) -> Status:
    """Improve the first weights until the gap is closed or a limit is met; return the status."""
    small = len(run.program.X) * run.program.n_outputs <= _CHOLESKY_EQUATIONS
    steps = (_proximal_steps if small else _weight_steps)(run, first)
    try:
        for _ in steps:
            if run.gap <= tol:
                return Status.OPTIMAL
            if run.n_iter >= max_iter:
                return Status.ITERATION_LIMIT
            if run.seconds > time_limit:
                return Status.TIME_LIMIT
    except (FloatingPointError, torch.linalg.LinAlgError):  # the latter for eigenvalues of NaN
        return Status.DIVERGED
    except KeyboardInterrupt:
        pass
    return Status.INTERRUPTED


def _proximal_steps(run: Run, first) -> Iterator[None]:
    """Yield at the first weights, and after every improvement by the proximal point method."""
    point = run.certify(first)
    yield
    point = accelerate(run, point, 60)
    sigma = 1e3 / run.lipschitz
    yield
    while True:
        point, n_steps = proximal_point(run, point, sigma)
        yield
        if n_steps < MAX_STEPS:  # solved, so that the next point may be farther off
            sigma *= 10.0 if n_steps < 5 else (3.0 if run.loss.exact else 1.0)
            run.loss.sharpen()
            point = point._replace(f=run.loss.carried(point.f))
        else:
            sigma /= 3.0


def _weight_steps(run: Run, first) -> Iterator[None]:
    """Yield there and after every improvement by Newton's method, or gradients where it stalls."""
    n, (C, _, P) = len(run.program.X), run.program.shape
    point, searched = run.certify(first), Searched(min(_KEPT, n // (2 * C * P)))
    yield
    while True:
        point, well = newton(run, point, searched)
        yield
        if not well:
            point = accelerate(run, point, _GRADIENT_STEPS)
            yield
        if not run.loss.exact and _solved_as_rounded(run, point):
            run.loss.sharpen()
            point = run.certify(point.U, point.F)


def _solved_as_rounded(run: Run, point) -> bool:
    """Tell whether the rounded program's own gap is small beside what the rounding costs.

    The point is the one certified last.
    """
    _, _, objective, bound = run.history[-1]
    raised, lowered = run.loss.rounding(point.F)
    # Both the objective of the rounded program and its bound are higher.
    left = (objective + raised) - (bound + lowered)
    return left <= _SHARE_LEFT * lowered
