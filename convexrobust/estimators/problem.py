"""What training data are to an estimator, and how solutions become a network."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from convexrobust.exchange import ExchangeSolution
from convexrobust.network import TwoLayerReLU
from convexrobust.program import ConvexProgram, Scope, Solution, Status

_FLAT = 1e-2  # variation of the outputs on the training rows that a rough solver leaves, relative


@dataclass(frozen=True, eq=False)
class Problem:
    r"""Convex programs, and what else an estimator has to know of the data they were made of.

    Attributes
    ----------
    programs : list of ConvexProgram
        One for all outputs, or one for each: all of the same rows.
    classes : ndarray of shape (n_classes,), optional
        Labels of a classifier, in the order of the outputs.
    offset : ndarray of shape (C,), optional
        Taken from the targets before the programs were made: the output bias of the network.
    """

    programs: list[ConvexProgram]
    classes: np.ndarray | None = None
    offset: np.ndarray | None = None

    @property
    def features(self) -> np.ndarray:
        """The rows of the programs without the intercept; shape (n, n_features)."""
        program = self.programs[0]
        return program.X[:, : program.X.shape[1] - program.intercept]

    def joined(self, solutions) -> Solution:
        """Return one solution with all outputs and its patterns, from one of each program."""
        if len(solutions) > 1:
            return _side_by_side(solutions, self.programs)
        return replace(solutions[0], D=_patterns_of(solutions[0], self.programs[0]))

    def network(self, solution) -> TwoLayerReLU:
        """Return the network of a joined solution, in units of the targets."""
        intercept = self.programs[0].intercept
        return TwoLayerReLU.from_solution(solution, intercept=intercept, offset=self.offset)

    def is_constant(self, network) -> bool:
        """Tell whether features have no weight, or one that only the solver's tolerance left."""
        if not np.any(network.hidden[: self.features.shape[1]]):
            return True
        outputs = network.predict(self.features) - (0.0 if self.offset is None else self.offset)
        if self.programs[0].loss.task == "regression":
            quartiles = np.quantile(self.programs[0].y, (0.75, 0.25))  # whatever outliers do
            size = np.subtract(*quartiles)
        else:
            size = np.abs(outputs).max()
        is_flat = np.ptp(outputs, axis=0).max() <= _FLAT * size
        return bool(is_flat and np.ptp(self.features, axis=0).any())


def distinct_rows(X, y, weight):
    """Return the rows to keep and their weights: weight 0 dropped, equal (x, y) merged.

    Sorted, so that a problem given by repeated rows and the same by weights are the same array.
    """
    used = np.flatnonzero(weight > 0.0)
    _, first, group = np.unique(
        np.column_stack([X[used], y[used]]), axis=0, return_index=True, return_inverse=True
    )
    return used[first], np.bincount(group.ravel(), weights=weight[used])


def _patterns_of(solution, program):
    """Return the patterns of V and W; exchange gives each neuron a column, without a pattern."""
    if isinstance(solution, ExchangeSolution):
        return solution.network.gates(program.X[:, : solution.network.n_features])
    return program.D if solution.D is None else solution.D


def _side_by_side(solutions, programs) -> Solution:
    """Return one-output solutions as one with several outputs, their patterns side by side."""
    patterns = [_patterns_of(s, p) for s, p in zip(solutions, programs, strict=True)]
    ends = np.cumsum([0, *(D.shape[1] for D in patterns)])
    d, scopes = solutions[0].V.shape[1], {s.lower_bound_scope for s in solutions}
    V, W = np.zeros((2, len(solutions), d, ends[-1]))
    for c, s in enumerate(solutions):
        V[c, :, ends[c] : ends[c + 1]], W[c, :, ends[c] : ends[c + 1]] = s.V[0], s.W[0]
    return Solution(
        V,
        W,
        objective=sum(s.objective for s in solutions),
        lower_bound=sum(s.lower_bound for s in solutions),
        cone_violation=max(s.cone_violation for s in solutions),
        status=next((s.status for s in solutions if s.status != Status.OPTIMAL), Status.OPTIMAL),
        solver=solutions[0].solver,
        n_iter=max(s.n_iter for s in solutions),
        seconds=sum(s.seconds for s in solutions),
        solver_seconds=sum(s.solver_seconds for s in solutions),
        lower_bound_scope=scopes.pop() if len(scopes) == 1 else Scope.PATTERNS,
        D=np.hstack(patterns),
    )
