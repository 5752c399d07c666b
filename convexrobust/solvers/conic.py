"""Conic solvers through cvxpy: the reference for small and medium data."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace

import numpy as np

from convexrobust.duality import Multipliers
from convexrobust.losses import LossKind
from convexrobust.program import ConvexProgram, Solution, Status
from convexrobust.solvers.contract import ProgramRefusedError, SolverError, check_accepted
from convexrobust.solvers.monitor import warn_early

_REMEDIES = {
    "MOSEK": "install `convexrobust[mosek]` and a licence, or use ConicSolver() for Clarabel",
    "QOCO": "install `convexrobust[qoco]`, or use ConicSolver() for Clarabel",
}


# The objective is divided by beta, or by these where beta is smaller. The first makes for fewer
# iterations and a tighter dual bound; the second is tried where the solver fails on the first.
_SMALLEST_BETAS = (1e-3, 1.0)
_NO_EXPONENTIALS = ("CVXOPT", "QOCO")  # solvers without exponential cones
_USABLE = (Status.OPTIMAL, Status.OPTIMAL_INACCURATE, Status.USER_LIMIT)  # cvxpy's strings
_PROVEN = 1e-4  # relative gap from which a point counts as optimal, whatever the solver says
_FEASIBLE = 1e-6  # cone violation up to which it does
_OPEN = 1e-3  # relative gap above which a point does not, whatever the solver says


class ConicSolver:
    """Hand a `ConvexProgram` to a conic solver by cvxpy.

    Parameters
    ----------
    name : str, optional
        A cvxpy solver that takes second-order cones (and exponential ones for the logistic loss):
        "CLARABEL" (default), "SCS", "QOCO", "MOSEK", ... MOSEK is used only when named.
    **options
        Passed on to the solver, e.g. ``max_iter=500`` for Clarabel.

    Notes
    -----
    ``beta`` and the radius ``epsilon`` are cvxpy parameters: solving the same data again with
    other values of them (and no bounds, which move the centres) does not compile again. The cache
    holds the last problem and is not copied or pickled.

    The multipliers of the solver are turned into a dual bound by `ConvexProgram.lower_bound`,
    which is valid whatever their accuracy.
    """

    def __init__(self, name: str | None = None, **options):
        self.name = name
        self.options = options
        self._compiled: _Compiled | None = None

    def __repr__(self):
        arguments = [repr(self.name)] if self.name else []
        arguments += [f"{key}={value!r}" for key, value in self.options.items()]
        return f"ConicSolver({', '.join(arguments)})"

    def __getstate__(self):
        return {**self.__dict__, "_compiled": None}

    def refusal(self, program: ConvexProgram) -> str | None:
        """Return why the program is not for this solver, None if it is; see `Solver.refusal`."""
        name = _name_of(self.name)
        if name in _NO_EXPONENTIALS and program.loss.kind == LossKind.LOGISTIC:
            return (
                f"{name} takes no exponential cones, which the logistic loss needs: use "
                "ConicSolver() for Clarabel."
            )
        return None

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> Solution:
        """Solve the program.

        Parameters
        ----------
        program : ConvexProgram
            What to minimise.
        start : Solution, optional
            Starting point, used by solvers that can (SCS).

        Returns
        -------
        Solution
            With a valid objective and lower bound, and the solver's status.

        Warns
        -----
        ConvergenceWarning
            If the solver stopped early or calls its answer inaccurate, unless the valid gap
            proves the point optimal to 1e-4 (relative). Also, with `Status.GAP_OPEN`, if it calls
            a point optimal whose valid gap is above 1e-3, unless beta = 0 leaves no bound.

        Raises
        ------
        SolverError
            If there is no such solver, it has no licence, cannot take the cones, or failed. Also
            (`ProgramRefusedError`) if cvxpy cannot express the loss.
        """
        clock = time.perf_counter()
        check_accepted(self, program)
        name = self._checked_name()
        if self._compiled is None or not self._compiled.serves(program):
            self._compiled = _compiled(program)
        best, failure = None, None
        for scale in _scales(program.regularizer.beta):
            self._compiled.set_values(program, start, scale)
            error = self._run(self._compiled.problem, name)
            if error is not None:  # cvxpy goes on showing the previous status and values
                failure = error
                continue
            best = _better(best, self._compiled.solution(name))
            if best is not None and best.status in (Status.OPTIMAL, Status.USER_LIMIT):
                break
        if best is None:
            raise SolverError(
                f"{name} failed: {failure or self._compiled.problem.status} Scale the features to "
                "comparable ranges, increase beta, or use a solver that takes the cones of this "
                "loss (the logistic loss needs exponential cones), e.g. ConicSolver() for Clarabel."
            ) from failure
        if best.status != Status.OPTIMAL:
            warn_early(best)
        return replace(best, seconds=time.perf_counter() - clock)

    def _checked_name(self) -> str:
        """Return the cvxpy name of the solver after making sure that it can run."""
        import cvxpy as cp

        name = _name_of(self.name)
        if name not in cp.installed_solvers():
            remedy = _REMEDIES.get(name, "install it, or choose one of those")
            raise SolverError(
                f"solver {name!r} is not installed (available: "
                f"{', '.join(cp.installed_solvers())}): {remedy}."
            )
        if name == "MOSEK":
            _probe_mosek()
        return name

    def _run(self, problem, name) -> Exception | None:
        """Solve the cvxpy problem; return what the solver raised, if anything."""
        # Clarabel's last point when it makes no more progress is mostly a good one, and the gap
        # tells: take it, where cvxpy by default throws it away.
        options = {"accept_unknown": True} if name == "CLARABEL" else {}
        try:
            with warnings.catch_warnings():
                # cvxpy's own "may be inaccurate" warning: ours follows and says how inaccurate.
                warnings.filterwarnings("ignore", message="Solution may be inaccurate")
                problem.solve(solver=name, warm_start=True, **options, **self.options)
        except Exception as error:  # solvers raise types of their own, mosek.Error among them
            return error
        return None


def _name_of(name) -> str:
    """Return the name by which cvxpy knows a solver."""
    return "CLARABEL" if name is None else str(name).upper()


def _compiled(program) -> _Compiled:
    """Return the program as a cvxpy problem, or say what cvxpy cannot express."""
    try:
        compiled = _Compiled(program)
    except Exception as error:  # of code that is not ours: a loss may be anybody's
        raise ProgramRefusedError(
            f"ConicSolver cannot express {type(program.loss).__name__}.value by cvxpy ({error}): "
            "write it with the atoms of convexrobust.backends.cvxpy only."
        ) from error
    if not compiled.problem.is_dcp():
        raise ProgramRefusedError(
            f"ConicSolver cannot solve with {type(program.loss).__name__}: cvxpy does not see that "
            "its value is convex and non-increasing in the margins. Write it by the rules of "
            "disciplined convex programming."
        )
    return compiled


def _scales(beta) -> list[float]:
    """Return the factors of the objective to try in turn.

    Divided by beta the dual constraint is ||g|| <= 1, so that the solver's tolerance on dual
    feasibility is the relative error of the dual bound, and fewer iterations are needed. Where a
    solver fails on that, the objective as it is may do.
    """
    return list(dict.fromkeys(1.0 / max(beta, smallest) for smallest in _SMALLEST_BETAS))


class _Compiled:
    """One program as a cvxpy problem, with beta and the radius as parameters.

    Slopes and slacks are variables with constraints of their own, rather than subexpressions, so
    that their multipliers can be read back.
    """

    def __init__(self, program: ConvexProgram):
        import cvxpy as cp

        from convexrobust.backends import cvxpy as xp

        self.program = program
        n_outputs, d, P = program.shape
        self.scale = cp.Parameter(nonneg=True)
        self.scaled_beta = cp.Parameter(nonneg=True)
        self.radius = cp.Parameter(nonneg=True)
        self.V = [cp.Variable((d, P)) for _ in range(n_outputs)]
        self.W = [cp.Variable((d, P)) for _ in range(n_outputs)]
        self.margins = cp.Variable(program.margin_map.offsets.shape)

        slopes, copies = program.slopes(xp, self.V, self.W), []
        if program.formulation == "soft" and not program.sets.unperturbed:
            # Twice as fast there; elsewhere several times slower.
            expressions, slopes = slopes, [cp.Variable(Q.shape) for Q in slopes]
            copies = [Q == expression for Q, expression in zip(slopes, expressions, strict=True)]
        self.slopes, supports = {}, dict.fromkeys(program.margin_map.slope_of, 0.0)
        if not program.sets.unperturbed:
            for e, expression in program.margin_slopes(xp, slopes).items():
                Q = cp.Variable(expression.shape)
                self.slopes[e] = expression == Q
                supports[e] = program.sets.support(xp, Q, self.radius)
        self.cones_v, slacks_v = self._cones(xp, self.V, program.rows_v)
        self.cones_w, slacks_w = self._cones(xp, self.W, program.rows_w)
        outputs = program.outputs(xp, slopes)
        worst = program.margins_from(xp, outputs, supports, slacks_v, slacks_w)
        self.worst = self.margins <= worst

        cones = [cone for cone in self.cones_v + self.cones_w if cone is not None]
        mean_loss = program.mean_loss(xp, self.margins)
        value = self.scale * mean_loss + program.penalty(xp, self.V, self.W, self.scaled_beta)
        self.problem = cp.Problem(
            cp.Minimize(value), [self.worst, *copies, *self.slopes.values(), *cones]
        )

    def _cones(self, xp, U, all_rows):
        """Return for each output its cone constraint, and its sums of slacks if they are soft."""
        import cvxpy as cp

        constraints, sums = [], []
        for u, rows in zip(U, all_rows, strict=True):
            if len(rows) == 0:
                constraints.append(None)
                sums.append(None)
                continue
            gap = self.program.cone_gap(xp, u, rows, self.radius)
            soft = self.program.formulation == "soft"
            slack = cp.Variable(gap.shape, nonneg=True) if soft else 0.0
            constraints.append(gap <= slack)
            sums.append(xp.row_sum(slack) if soft else None)
        return constraints, sums

    def serves(self, program: ConvexProgram) -> bool:
        """Tell whether the program differs at most in the values of the parameters."""
        old, new = self.program, program
        return (
            (old.loss, old.formulation, old.shape) == (new.loss, new.formulation, new.shape)
            and old.sets.p == new.sets.p
            and old.sets.unperturbed == new.sets.unperturbed
            and np.array_equal(old.D, new.D)
            and np.array_equal(old.sets.center, new.sets.center)
            and np.allclose(old.sets.weights, new.sets.weights, rtol=1e-14, atol=0.0)
            and np.array_equal(old.y, new.y)
            and np.array_equal(old.weight, new.weight)
            and np.array_equal(old.samples, new.samples)
        )

    def set_values(self, program: ConvexProgram, start: Solution | None, scale):
        """Set the parameters, and the variables to a start of the right shape."""
        self.program = program
        self.scale.value = scale
        self.scaled_beta.value = scale * program.regularizer.beta
        self.radius.value = program.sets.radius
        if start is not None and start.V.shape == program.shape:
            for c in range(program.n_outputs):
                self.V[c].value, self.W[c].value = start.V[c], start.W[c]

    def solution(self, solver_name) -> Solution | None:
        """Return what the solver found with its valid bounds, None if there is no usable point."""
        status = self.problem.status
        values = [u.value for u in self.V + self.W]
        if status not in _USABLE or any(u is None or not np.isfinite(u).all() for u in values):
            return None
        V, W = np.array(values).reshape(2, *self.program.shape)
        stats = self.problem.solver_stats
        multipliers = self.multipliers()
        found = self.program.solution(
            V,
            W,
            lower_bound=self.program.lower_bound(multipliers),
            multipliers=multipliers,
            status=Status(status),
            solver=solver_name,
            n_iter=int(stats.num_iters or 0),
            solver_seconds=float(stats.solve_time or 0.0),
        )
        if found.relative_gap <= _PROVEN and found.cone_violation <= _FEASIBLE:
            return replace(found, status=Status.OPTIMAL)
        bounded = self.program.regularizer.beta > 0.0
        if status == Status.OPTIMAL and bounded and found.relative_gap > _OPEN:
            return replace(found, status=Status.GAP_OPEN)
        return found

    def multipliers(self) -> Multipliers:
        """Return the dual point that the solver found."""
        P = self.program.D.shape[1]

        def dual(constraint):
            value = constraint.dual_value
            value = np.zeros(constraint.shape) if value is None else value
            return np.reshape(value, constraint.shape) / self.scale.value

        def of_cones(constraints, all_rows):
            return [
                np.zeros((len(rows), P)) if constraint is None else dual(constraint)
                for constraint, rows in zip(constraints, all_rows, strict=True)
            ]

        return Multipliers(
            dual(self.worst),
            {e: dual(constraint) for e, constraint in self.slopes.items()},
            of_cones(self.cones_v, self.program.rows_v),
            of_cones(self.cones_w, self.program.rows_w),
        )


def _probe_mosek():
    """Raise SolverError unless a MOSEK licence can be checked out."""
    import mosek

    try:
        with mosek.Env() as environment:
            environment.checkoutlicense(mosek.feature.pts)
    except mosek.Error as error:
        raise SolverError(
            f"MOSEK is installed but has no licence ({error}). Put the licence file where "
            "MOSEKLM_LICENSE_FILE points, or use ConicSolver() for Clarabel."
        ) from error


def _better(first: Solution | None, second: Solution | None) -> Solution | None:
    """Return the solution with the smaller gap, with the better bound and all iterations."""
    if first is None or second is None:
        return first or second
    best = min(first, second, key=lambda solution: solution.gap)
    return replace(
        best,
        lower_bound=max(first.lower_bound, second.lower_bound),
        n_iter=first.n_iter + second.n_iter,
        solver_seconds=first.solver_seconds + second.solver_seconds,
    )
