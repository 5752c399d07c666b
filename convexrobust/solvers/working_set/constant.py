r"""The best constant network: what a program has to beat, and what proves that none can.

A neuron whose only weight is that of the intercept is active on every point, perturbed or not.
Networks of such neurons are constant: C numbers :math:`o`, one an output, with the objective

.. math:: \sum_y w_y\, \ell(y, o) + \beta \|o\|_1, \qquad w_y\ \text{the weight of the target}\ y.

That is the same program with no other feature and one row for each target, which takes no time. Its
multipliers, spread over the samples, are a dual point of the whole program, which proves the
constant network optimal where perturbations are so large that nothing else is. General solvers are
slow to find either: far from the optimum they follow features that the perturbations wipe out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram, Status
from convexrobust.solvers.conic import ConicSolver
from convexrobust.solvers.contract import Solver
from convexrobust.solvers.interior_point import InteriorPoint
from convexrobust.solvers.monitor import watched_by
from convexrobust.solvers.residuals import margins_at_zero

_TOL = 1e-9


@dataclass(frozen=True, eq=False)
class ConstantNetwork:
    """The best constant network of a program.

    Attributes
    ----------
    objective : float
        Its objective.
    outputs : ndarray of shape (C,)
        What it answers; zeros without an intercept.
    margins : ndarray of shape (n, E)
        Multipliers of the margins of the program's rows: those of `multipliers_from_margins` prove
        it best, whatever the patterns, where perturbations can move every point to 0.
    """

    objective: float
    outputs: np.ndarray
    margins: np.ndarray

    def weights(self, program: ConvexProgram) -> np.ndarray:
        """Return V and W (2, C, d, P) in a program that has the pattern active on all rows."""
        weights = np.zeros((2, *program.shape))
        if self.outputs.any():
            (everywhere,) = np.flatnonzero(np.all(program.D, axis=0))[:1]
            weights[:, :, -1, everywhere] = np.maximum([self.outputs, -self.outputs], 0.0)
        return weights


def best_constant(program: ConvexProgram) -> ConstantNetwork:
    """Return the best constant network of a program; the zero network if none is better.

    Raises
    ------
    KeyboardInterrupt
        After Ctrl-C: there is nothing to return then.
    """
    zero = program.solution(*np.zeros((2, *program.shape))).objective
    nothing = ConstantNetwork(zero, np.zeros(program.n_outputs), margins_at_zero(program))
    if not program.intercept:
        return nothing
    small, kind = _without_features(program)
    with warnings.catch_warnings(), watched_by(lambda *_: False):  # no iterates of the program
        warnings.simplefilter("ignore", ConvergenceWarning)  # of a gap of 1e-8, say
        found = _solver_of(small).solve(small)
    if found.status == Status.INTERRUPTED:
        raise KeyboardInterrupt
    if found.multipliers is None:  # the numbers were too large
        return nothing
    # The rows of a target share its multiplier, the copies of a sample that of the sample.
    samples = program.samples
    share = program.weight[samples] / np.bincount(samples)[samples]
    share /= np.maximum(small.weight[kind], np.finfo(float).tiny)
    margins = found.multipliers.margins[kind] * share[:, None]
    return ConstantNetwork(found.objective, (found.V - found.W)[:, 0, 0], margins)


def _solver_of(program) -> Solver:
    """Return the most accurate solver that does not refuse the program."""
    accurate = InteriorPoint(_TOL)
    return accurate if accurate.refusal(program) is None else ConicSolver()


def simple_constant(program: ConvexProgram) -> float:
    """Return the objective of a constant network that answers one of the targets, in no time.

    It is at most that of the zero network; of regression targets, a few quantiles are tried.
    """
    if not program.intercept:
        return program.solution(*np.zeros((2, *program.shape))).objective
    small, _ = _without_features(program)
    if program.loss.task == "regression":
        answers = np.quantile(small.y, np.linspace(0.0, 1.0, 9))[:, None]
    else:
        answers = np.eye(program.n_outputs) if program.n_outputs > 1 else small.y[:, None]
    answers = np.vstack([np.zeros(program.n_outputs), answers])
    pairs = np.maximum(np.stack([answers, -answers], axis=1), 0.0)[..., None, None]
    return min(small.solution(V, W).objective for V, W in pairs)


def _without_features(program):
    """Return the program of constant networks, and the row there of each row (n,)."""
    of_sample = np.asarray(program.y)[program.copies[:, 0]]
    targets, kind = np.unique(of_sample, return_inverse=True)
    one = np.ones((len(targets), 1))
    small = ConvexProgram(
        one,
        targets,
        one.astype(np.int8),
        program.loss,
        program.regularizer,
        LpBall(np.inf, 0.0),
        formulation="hard",
        sample_weight=np.bincount(kind, program.weight),
        n_outputs=program.n_outputs,
    )
    return small, kind[program.samples]
