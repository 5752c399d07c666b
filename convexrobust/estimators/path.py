r"""Regularisation paths: one model for each weight decay and radius, each started from the last.

The patterns are sampled once, and so are the data checked. The programs of a path differ only in
beta and epsilon, so that solvers can keep what they have compiled or factorised.
"""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
from sklearn.base import clone

from convexrobust.duality import largest_residual
from convexrobust.estimators.base import ConvexRobustEstimator
from convexrobust.program import ConvexProgram, Solution
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import Solver
from convexrobust.solvers.contract import check_accepted, checked_solution
from convexrobust.solvers.residuals import best_cone_multipliers, multipliers_at_zero

_N_BETAS = 8
_SMALLEST_SHARE = 1e-3  # of the largest beta, in the default grid


@dataclass(frozen=True, eq=False)
class RegularizationPath:
    """What `regularization_path` returns; every array has shape (n_epsilons, n_betas).

    Attributes
    ----------
    betas : ndarray of shape (n_betas,)
        Weight decays, from large to small.
    epsilons : ndarray of shape (n_epsilons,)
        Largest radii of any feature, from small to large.
    objectives, lower_bounds : ndarray
        Worst-case objectives, and lower bounds on their optima over the patterns used.
    penalties : ndarray
        The sums of the neurons' lengths, which beta multiplies in the objectives.
    n_neurons : ndarray of int
        Hidden neurons.
    seconds : ndarray
        Wall time of each fit; the first of an epsilon may include compiling the problem.
    estimators : list of list of estimator
        The fitted estimators, ``estimators[i][j]`` for ``epsilons[i]`` and ``betas[j]``.
    """

    betas: np.ndarray
    epsilons: np.ndarray
    objectives: np.ndarray
    lower_bounds: np.ndarray
    penalties: np.ndarray
    n_neurons: np.ndarray
    seconds: np.ndarray
    estimators: list[list[ConvexRobustEstimator]]

    def plot(self, ax=None):
        """Draw the objectives with the bands down to their lower bounds, and the neurons (dashed).

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        matplotlib Axes
            With the objectives. The numbers of neurons are on a second axis at the right.

        Raises
        ------
        ImportError
            Without matplotlib.
        """
        if ax is None:
            ax = _new_axes()
        neurons = ax.twinx()
        for i, epsilon in enumerate(self.epsilons):
            (line,) = ax.plot(self.betas, self.objectives[i], label=f"epsilon = {epsilon:g}")
            color = line.get_color()
            ax.fill_between(
                self.betas, self.lower_bounds[i], self.objectives[i], color=color, alpha=0.3
            )
            neurons.plot(self.betas, self.n_neurons[i], "--", color=color)
        ax.set(xscale="log", xlabel="beta", ylabel="worst-case objective")
        neurons.set_ylabel("neurons (dashed)")
        ax.legend()
        return ax


def regularization_path(
    estimator, X, y, *, betas=None, epsilons=None, sample_weight=None, tol=None
) -> RegularizationPath:
    """Fit an estimator for every beta and epsilon, each from the solution of the last.

    Parameters
    ----------
    estimator : ConvexRobustClassifier or ConvexRobustRegressor
        Its other parameters hold for the whole path. It is not changed.
    X, y : array-like
        Data, as for its ``fit``.
    betas : array-like, optional
        Weight decays. Default: 8 in geometric progression, from `largest_beta` of the smallest
        epsilon to 1e-3 of it.
    epsilons : array-like, optional
        Radii; of an estimator with one epsilon per feature, the largest one, the others in
        proportion. Default: that of the estimator.
    sample_weight : array-like of shape (n,), optional
        Weights.
    tol : float, optional
        Gap to stop at where patterns are generated, relative to the objective of the zero network;
        by default that of the estimator for the largest epsilon. Without effect where it has
        patterns or a solver.

    Returns
    -------
    RegularizationPath
        Sorted, and without repeated values.

    Raises
    ------
    ValueError, TypeError
        For arguments that cannot be, naming them.
    SolverError
        If the solver fails.

    Notes
    -----
    All fits use the same patterns, sampled for the smallest epsilon and largest beta, and those
    that the solver has added before. That a network is constant is expected at the start of a path
    and not warned of.
    """
    _check_estimator(estimator)
    if tol is not None and not (isinstance(tol, Real) and float(tol) > 0.0):
        raise ValueError(f"tol must be a positive number, got {tol!r}.")
    ball = estimator._ball()
    epsilons = np.array([ball.radius]) if epsilons is None else _grid("epsilons", epsilons)
    smallest = ball.scaled_to(epsilons[0]).epsilon
    template, problem = _prepared(estimator, X, y, smallest, sample_weight)
    betas = _default_betas(problem) if betas is None else _grid("betas", betas)[::-1]
    balls = [ball.scaled_to(epsilon) for epsilon in epsilons]
    chains = [_Chain.of(program, estimator, balls, tol) for program in problem.programs]
    fits = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The fitted network is constant")
        for ball in balls:
            for chain in chains:
                chain.rewind()
            fits.append([_fitted(template, problem, chains, ball.epsilon, beta) for beta in betas])
    return _collected(betas, epsilons, fits)


def beta_grid(estimator, X, y, betas=None, sample_weight=None) -> np.ndarray:
    """Return the betas of a path in the order given, or by default those of the whole data."""
    _check_estimator(estimator)
    if betas is None:
        return _default_betas(_prepared(estimator, X, y, estimator.epsilon, sample_weight)[1])
    _grid("betas", betas)
    return np.asarray(betas, dtype=np.float64)


def largest_beta(program: ConvexProgram) -> float:
    r"""Return a beta from which on the zero network is optimal.

    At the zero network the gradient of the loss gives the multipliers of the margins. The best
    multipliers of the cone rows to go with them leave residuals, see
    `convexrobust.solvers.residuals`: the zero network is optimal once beta is the largest of them.

    Parameters
    ----------
    program : ConvexProgram
        The program; its own beta does not matter.

    Returns
    -------
    float
        The smallest such beta, to a relative accuracy of 1e-6, if epsilon = 0 and the loss is
        differentiable at the zero network. Else an upper bound of it: one subgradient is tried
        where there are several (the hinge with three classes), and two choices of the slopes'
        perturbations, none and those towards 0.
    """
    shrunk = multipliers_at_zero(program)
    candidates = [shrunk]
    if not program.sets.unperturbed:
        candidates.append(best_cone_multipliers(program, shrunk._replace(slopes={})))
    return min(largest_residual(program, point) for point in candidates)


class _Chain:
    """The programs of one output along the path, and the solver that keeps what they share.

    Every output of one-versus-rest has a chain, because solvers keep one problem only.
    """

    def __init__(self, program: ConvexProgram, solver: Solver):
        self.program = program
        self.solver = solver
        self.first: Solution | None = None  # of the present epsilon
        self.last: Solution | None = None

    @classmethod
    def of(cls, program: ConvexProgram, estimator, balls, tol) -> _Chain:
        """Return the chain of a program, whose solver takes it with every ball of the path."""
        largest = replace(program, perturbation=balls[-1])  # its fits decide on a gap for all
        solver = _solver_of(estimator, largest, tol)
        for ball in balls:
            check_accepted(solver, replace(program, perturbation=ball))
        return cls(program, solver)

    def rewind(self):
        """Go back to the first solution, whose beta is that of the next one."""
        self.last, self.first = self.first, None

    def next(self, ball, beta) -> ConvexProgram:
        """Return the program of another point of the path."""
        return replace(self.program, perturbation=ball, regularizer=GroupLasso(beta))

    def solve(self, program: ConvexProgram) -> Solution:
        """Solve a program of the chain from the last solution; keep it and its patterns."""
        found = checked_solution(self.solver, program, self.solver.solve(program, self.last))
        self.first, self.last = self.first or found, found
        if found.D is not None:
            self.program = replace(program, D=np.unique(np.hstack([program.D, found.D]), axis=1))
        return found


def _check_estimator(estimator):
    if not isinstance(estimator, ConvexRobustEstimator):
        raise TypeError(
            "estimator must be a ConvexRobustClassifier or ConvexRobustRegressor, got "
            f"{type(estimator).__name__}."
        )
    if estimator.formulation == "exchange":
        raise ValueError(
            "estimator must have one program for the whole path, but formulation='exchange' makes "
            "its own rows for every epsilon and beta; use formulation='soft'."
        )


def _prepared(estimator, X, y, epsilon, sample_weight):
    """Return a copy of the estimator that knows the features, and the problem of the data."""
    template = clone(estimator).set_params(epsilon=epsilon)
    if estimator.patterns is None:
        # All that are sampled by default, not the few to which a single fit adds others: they
        # serve the whole path.
        template.set_params(patterns="gaussian")
    problem = template._problem(X, y, sample_weight)
    return template.set_params(patterns=estimator.patterns, solver=estimator.solver), problem


def _solver_of(estimator, program, tol) -> Solver:
    """Return a solver of the program that keeps nothing for others."""
    if estimator.solver is None:
        return estimator._default_solver(program, tol)
    return copy.deepcopy(estimator.solver)


def _fitted(template, problem, chains, epsilon, beta):
    """Return a copy of the template, fitted for one epsilon and beta, and the seconds it took."""
    clock = time.perf_counter()
    model = copy.copy(template).set_params(epsilon=epsilon, beta=float(beta))
    programs = [chain.next(model._ball(), model.beta) for chain in chains]
    solutions = [chain.solve(program) for chain, program in zip(chains, programs, strict=True)]
    model._learn(replace(problem, programs=programs), chains[0].solver, solutions)
    return model, time.perf_counter() - clock


def _default_betas(problem) -> np.ndarray:
    largest = max(largest_beta(program) for program in problem.programs)
    if largest == 0.0:
        raise ValueError(
            "betas has no default for these data: the zero network is optimal for every beta."
        )
    return np.geomspace(largest, _SMALLEST_SHARE * largest, _N_BETAS)


def _grid(name, values) -> np.ndarray:
    """Return distinct values in ascending order, or say which argument is wrong."""
    try:
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a list of numbers, got {values!r}.") from error
    if values.ndim != 1 or values.size == 0 or not np.all(np.isfinite(values) & (values >= 0.0)):
        raise ValueError(f"{name} must be a list of finite numbers >= 0, got {values!r}.")
    return np.unique(values)


def _collected(betas, epsilons, fits) -> RegularizationPath:
    def table(value):
        return np.array([[value(model) for model, _ in row] for row in fits])

    def length(model):
        return sum(np.linalg.norm(U, axis=1).sum() for U in (model.solution_.V, model.solution_.W))

    return RegularizationPath(
        betas=betas,
        epsilons=epsilons,
        objectives=table(lambda model: model.objective_),
        lower_bounds=table(lambda model: model.lower_bound_),
        penalties=table(length),
        n_neurons=table(lambda model: model.network_.n_neurons),
        seconds=np.array([[seconds for _, seconds in row] for row in fits]),
        estimators=[[model for model, _ in row] for row in fits],
    )


def _new_axes():
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'convexrobust[plot]'.") from error
    return plt.subplots()[1]
