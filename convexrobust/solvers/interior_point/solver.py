"""`InteriorPoint`: Newton steps on the neurons in play until the gap is closed."""

from __future__ import annotations

import numpy as np

from convexrobust.program import ConvexProgram, Solution, Status
from convexrobust.solvers.contract import check_accepted, refusal_of_loss
from convexrobust.solvers.interior_point.data import Data, Neurons
from convexrobust.solvers.interior_point.iterate import Iterate
from convexrobust.solvers.interior_point.left_out import LeftOut
from convexrobust.solvers.interior_point.newton import newton_step
from convexrobust.solvers.memory import keep_freed
from convexrobust.solvers.monitor import Monitor

_FEWEST = 8  # neurons in play
_ARRAYS = 50  # of the size of rows times neurons in a step, and of the systems
# Unknowns up to which all neurons are in play: robust cones leave few neurons at the optimum, soft
# ones many, and nominal ones have a Newton system whose size is that of the rows.
_ROBUST_UNKNOWNS, _SOFT_UNKNOWNS, _NOMINAL_UNKNOWNS = 1000, 6000, 40_000
_IDLE = 0.15  # times the relative gap: shorter than that by the longest, and a neuron is dropped
_FIRST_LEVEL = 0.1  # relative gap at which the iterate is certified first
_CLOSER = 0.3  # the next time, by that much
_LAST_DROP = 1e-3  # relative gap down to which dropping neurons saves enough steps
_VIOLATED = 0.01  # share of the relative gap that a dual residual may exceed beta by


class InteriorPoint:
    """Interior-point method on the neurons in play, for gaps of 1e-6 and less.

    Parameters
    ----------
    tol : float, default=1e-6
        Certified relative duality gap to reach; cone rows may be violated by as much.
    max_iter : int, default=300
        Newton steps at most, for all choices of the neurons in play together.
    time_limit : float, optional
        Seconds after which to stop.
    """

    def __init__(self, tol: float = 1e-6, max_iter: int = 300, time_limit: float | None = None):
        self.tol = tol
        self.max_iter = max_iter
        self.time_limit = time_limit

    def __repr__(self):
        return (
            f"InteriorPoint(tol={self.tol!r}, max_iter={self.max_iter!r}, "
            f"time_limit={self.time_limit!r})"
        )

    def refusal(self, program: ConvexProgram) -> str | None:
        """Return why the program is not for this solver, None if it is; see `Solver.refusal`."""
        if program.copy_of is not None:
            return (
                "InteriorPoint takes no program with copy_of; use ConicSolver() for samples with "
                "several copies."
            )
        return refusal_of_loss("InteriorPoint", program.loss)

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
            For an option out of range.
        ProgramRefusedError
            For a program that it refuses, with the text of `refusal`.
        """
        self._check_options()
        check_accepted(self, program)
        monitor = Monitor(program, "InteriorPoint", self.tol, self.time_limit)
        with monitor.running(), np.errstate(all="ignore"):
            _Run(program, monitor, self.max_iter).solve()
        return monitor.solution()

    def _check_options(self):
        if not (np.isfinite(self.tol) and self.tol > 0.0):
            raise ValueError(f"tol must be a positive number, got {self.tol!r}.")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter!r}.")


class _Run:
    """One run: the iterate of the neurons in play, and those left out unless that is all."""

    def __init__(self, program, monitor, max_iter):
        self.program, self.monitor, self.max_iter = program, monitor, max_iter
        self.scale = program.solution(*np.zeros((2, *program.shape))).objective
        neurons, self.left_out = _first_in_play(program)
        self.may_drop = True
        self._begin(neurons)

    def _begin(self, neurons):
        """Start anew, with these neurons in play."""
        keep_freed(_ARRAYS * len(self.program.X) * len(neurons.signs))
        self.iterate = Iterate(Data(self.program, neurons))
        self.level = _FIRST_LEVEL  # the relative gap at which the iterate is certified next

    def solve(self):
        """Step until the gap is closed, certifying the iterate at certain gaps."""
        for n_iter in range(1, self.max_iter + 1):
            moved = newton_step(self.iterate)
            if (self._reached() or self._late(n_iter) or not moved) and self._look(n_iter, moved):
                return

    def _reached(self) -> bool:
        gap = self.iterate.product() * self.iterate.beta
        return not gap > self.level * self.scale  # true of a gap that is no number

    def _late(self, n_iter) -> bool:
        return n_iter == self.max_iter or self.monitor.seconds > self.monitor.time_limit

    def _look(self, n_iter, moved) -> bool:
        """Certify the iterate, then change the neurons in play; return whether to stop."""
        multipliers, distances = self.iterate.multipliers(), np.zeros(1)
        if self.left_out is not None:
            distances = self.left_out.solve(multipliers)
            self.left_out.fill(multipliers)
        if self.monitor.record(n_iter, *self.iterate.weights(), multipliers):
            return True
        if not moved:
            self.monitor.status = Status.NO_MORE_PROGRESS
            return True
        self.scale = self.monitor.best.objective
        if distances.max() > 1.0 + _VIOLATED * self.level:
            self._take_in(distances)
        else:
            self._drop_idle()
            self.level = max(self.monitor.tol, _CLOSER * self.level)
        return False

    def _take_in(self, distances):
        """Take the worst of the neurons left out into play; from now on none is dropped."""
        in_play, order = self.iterate.data.neurons, np.argsort(-distances)
        count = min(int(np.sum(distances > 1.0)), len(in_play.signs))
        more, self.left_out = _split(self.left_out, order, count)
        self.may_drop = False
        self._begin(in_play.joined_by(more))

    def _drop_idle(self):
        """Take the neurons that seem to be 0 out of play: their residuals will be checked."""
        if not self.may_drop or self.level < _LAST_DROP:
            return
        idle = self.iterate.idle(_IDLE * self.level)
        if not idle.any() or idle.all():
            return
        data, b = self.iterate.data, self.iterate.beta * self.iterate.cone.z[:, idle]
        neurons = data.neurons.at(idle)
        if self.left_out is None:
            self.left_out = LeftOut(self.program, neurons, data.cone_rows, b)
        else:
            self.left_out = self.left_out.joined_by(neurons, b)
        self.iterate = self.iterate.kept(~idle)


def _first_in_play(program):
    """Return the neurons to begin with, and those left out unless it is all of them."""
    everything = Neurons.all_of(program)
    few = max(_FEWEST, _unknowns(program) // program.shape[1])
    if len(everything.signs) <= few:
        return everything, None
    # Any neuron will do: the multipliers of the margins at the start know nothing of neurons.
    start = Iterate(Data(program, everything.at(slice(0, 1))))
    left_out = LeftOut(program, everything, start.data.cone_rows)
    distances = left_out.solve(start.multipliers(), n_iter=30)
    return _split(left_out, np.argsort(-distances), few // 2)


def _unknowns(program) -> int:
    """Return how many unknowns are in play to begin with, at most."""
    if program.formulation == "soft":
        return _SOFT_UNKNOWNS
    return _NOMINAL_UNKNOWNS if program.sets.unperturbed else _ROBUST_UNKNOWNS


def _split(left_out, order, count):
    """Return the first ``count`` of an order of the neurons left out, and the rest or None."""
    chosen = left_out.neurons.at(order[:count])
    if count == len(order):
        return chosen, None
    left_out.keep(np.sort(order[count:]))
    return chosen, left_out
