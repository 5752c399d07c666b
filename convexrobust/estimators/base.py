"""What the estimators share: from clean arrays to a network."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.callback import CallbackSupportMixin
from sklearn.utils import check_random_state

from convexrobust.certificates import Verdict
from convexrobust.estimators.problem import Problem, distinct_rows
from convexrobust.exchange import Exchange
from convexrobust.losses import Loss
from convexrobust.patterns import sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram, Solution, Status
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import Solver, WorkingSet, default_solver
from convexrobust.solvers.contract import check_accepted, check_solver, checked_solution
from convexrobust.solvers.monitor import watched_by
from convexrobust.solvers.working_set.columns import joined

METHODS = ("certified", "attack", "exact")
FORMULATIONS = ("soft", "one-sided", "hard", "exchange")
_UNKNOWNS = 1000  # C * d * P of the patterns sampled by default
_DEFAULT_PATTERNS = (4, 50)  # fewest and most of them
_EXACT_ROWS = 200  # up to which exchange finds exact worst cases
# Gaps of generated patterns, relative to the objective of the zero network. Without perturbation
# the objective is far below that, and with one output a smaller gap is quickly reached.
_GAP, _GAP_NOMINAL = 1e-2, 1e-3
_FIRST_PATTERNS = 8  # sampled where the others are generated
_WIDTHS = (8, 64)  # smallest and largest network that seeds generated patterns
_ENTRIES_PER_NEURON = 40  # entries of X for each of its neurons


class ConvexRobustEstimator(CallbackSupportMixin, BaseEstimator, ABC):
    """What classifier and regressor share: from clean arrays to a network."""

    def __init__(
        self,
        epsilon=0.1,
        norm=np.inf,
        beta=1e-3,
        loss=None,
        formulation="soft",
        n_patterns=None,
        solver=None,
        bounds=None,
        fit_intercept=True,
        patterns=None,
        warm_start=False,
        random_state=None,
    ):
        self.epsilon = epsilon
        self.norm = norm
        self.beta = beta
        self.loss = loss
        self.formulation = formulation
        self.n_patterns = n_patterns
        self.solver = solver
        self.bounds = bounds
        self.fit_intercept = fit_intercept
        self.patterns = patterns
        self.warm_start = warm_start
        self.random_state = random_state

    def _ball(self, epsilon=None) -> LpBall:
        return LpBall(self.norm, self.epsilon if epsilon is None else epsilon, self.bounds)

    def _design(self, X):
        return np.hstack([X, np.ones((len(X), 1))]) if self.fit_intercept else X

    def _sampled_patterns(self, design, y, n_outputs):
        """Return the patterns that the parameters ask for."""
        if self.patterns is not None and not isinstance(self.patterns, str):
            D = np.asarray(self.patterns)
            if D.size == 0:
                raise ValueError(f"patterns must have rows and columns, got shape {D.shape}.")
            return D
        options = {
            "y": y,
            "directions": "gaussian" if self.patterns is None else self.patterns,
            "random_state": check_random_state(self.random_state),
        }
        if self.n_patterns is not None:
            return sample_patterns(design, self.n_patterns, **options)
        wanted = int(np.clip(_UNKNOWNS // (design.shape[1] * n_outputs), *_DEFAULT_PATTERNS))
        if self._generates():
            wanted = _FIRST_PATTERNS
        with warnings.catch_warnings():
            # The default asks for what is there, so that finding fewer is no news.
            warnings.filterwarnings("ignore", category=UserWarning)
            return sample_patterns(design, wanted, **options)

    def programs(self, X, y, sample_weight=None) -> list[ConvexProgram]:
        """Return the convex programs that `fit` solves, without solving them.

        Parameters
        ----------
        X, y, sample_weight
            As of `fit`, and checked as there.

        Returns
        -------
        list of ConvexProgram
            One, or with several classes and ``multi_class="ovr"`` one for each. Their patterns are
            those that the solver is given first: where patterns are generated it adds others, and
            a warm start adds those of the last network before. Under "exchange" it is the program
            of the data as they are, to which the solver adds perturbed copies.

        Raises
        ------
        ValueError
            As `fit`, for data or parameters that cannot be.

        Notes
        -----
        Nothing is learned: the attributes of the estimator and the state of its ``random_state``
        stay as they are (if that is None, every call samples other patterns). They are for whoever
        tries another solver, as in ``InteriorPoint().solve(model.programs(X, y)[0])``, or changes
        a program by ``dataclasses.replace``.
        """
        return clone(self)._problem(X, y, sample_weight).programs

    @abstractmethod
    def _problem(self, X, y, sample_weight=None) -> Problem:
        """Return what `fit` solves; of the estimator only what scikit-learn notes of X is set."""

    def _checked_parameters(self, default_loss, task) -> Loss:
        """Refuse parameters that cannot be, whatever the data; return the loss."""
        if self.formulation not in FORMULATIONS:
            raise ValueError(
                f"formulation must be one of {FORMULATIONS}, got {self.formulation!r}."
            )
        checked_solver(self.solver, self.formulation)
        return checked_loss(self.loss, default_loss, task)

    def _program(self, X, y, weight, loss, n_outputs) -> ConvexProgram:
        if self.patterns is None or isinstance(self.patterns, str):
            # A matrix of patterns belongs to the rows as they are; anything else is free to merge.
            rows, weight = distinct_rows(X, y, weight)
            X, y = X[rows], y[rows]
        ball, design = self._ball(), self._design(X)
        ball.epsilons(X.shape[1])  # raises for another number of features, as the next for bounds
        ball.check_inside(X)
        return ConvexProgram(
            design,
            y,
            self._sampled_patterns(design, y, n_outputs),
            loss,
            GroupLasso(self.beta),
            ball,
            "soft" if self.formulation == "exchange" else self.formulation,
            weight,
            self.fit_intercept,
            n_outputs,
        )

    def _chosen_solver(self, program) -> Solver:
        """Return the solver given, or the one of the program's size and formulation."""
        if self.formulation == "exchange" and not isinstance(self.solver, Exchange):
            inner = "exact" if len(program.X) <= _EXACT_ROWS else "attack"
            return Exchange(
                solver=self.solver, inner=inner, patterns="grow", random_state=self._seed()
            )
        return self._default_solver(program) if self.solver is None else self.solver

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _generates(self) -> bool:
        """Tell whether patterns are generated while solving, rather than sampled or given."""
        asked_for = self.patterns is not None or self.n_patterns is not None
        return not asked_for and self.solver is None and self.formulation == "soft"

    def _default_solver(self, program, tol=None):
        """Return the solver of the program's patterns, or one that generates patterns to a gap."""
        if not self._generates():
            return default_solver(program)
        entries = program.X.size // program.n_outputs
        width = int(np.clip(entries // _ENTRIES_PER_NEURON, *_WIDTHS))
        if tol is None:
            nominal = program.sets.unperturbed and program.n_outputs == 1
            tol = _GAP_NOMINAL if nominal else _GAP
        return WorkingSet(
            tol,
            width=width,
            n_new=max(width // 2, 8),
            max_rounds=3 if program.n_outputs == 1 else 2,
            random_state=self._seed(),
        )

    def _warmed(self, problem) -> tuple[Problem, Solution | None]:
        """Add the patterns of the previous network, and return it as a starting point."""
        network = getattr(self, "network_", None) if self.warm_start else None
        program, n_features = problem.programs[0], problem.features.shape[1]
        if network is None or (network.n_features, network.intercept) != (
            n_features,
            program.intercept,
        ):
            return problem, None
        V, W, D = network.to_convex(problem.features, program.D)
        starts = [(replace(program, D=D), Solution(V, W, np.inf))]
        last = replace(self.solution_, multipliers=None)
        if len(last.D) == len(program.X):  # the same rows, as it seems: the same patterns serve
            starts.append(joined(replace(program, D=last.D), last, D))
        if last.V.shape[0] != program.n_outputs:  # one program for each class
            return _with_patterns(problem, starts[-1][0].D), None
        solutions = [p.solution(start.V, start.W, D=p.D) for p, start in starts]
        best = min(solutions, key=lambda solution: solution.objective)
        return _with_patterns(problem, best.D), replace(best, D=None)

    def _begin_callbacks(self, X, y):
        """Tell scikit-learn's callbacks that the fit begins; nothing to do without any."""
        context = self._init_callback_context(max_subtasks=None)
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)

    def _watcher(self, problem):
        """Return a watcher of certified iterates that makes each a task of the callbacks."""
        context = self._callback_fit_ctx

        def watcher(row, solution):
            def attributes():
                if len(problem.programs) > 1:  # one output of several is no network yet
                    return None
                return {"network_": problem.network(solution), **_classes(problem)}

            task = context.subcontext(task_name="certified iterate")
            task.call_on_fit_task_begin(estimator=self)
            return task.call_on_fit_task_end(
                estimator=self, metadata=row._asdict(), reconstruction_attributes=attributes
            )

        return watcher

    def _fit(self, X, y, sample_weight):
        """Go from data to programs, to their solutions, to what is learned from them."""
        self._begin_callbacks(X, y)
        problem, start = self._warmed(self._problem(X, y, sample_weight))
        solver = self._chosen_solver(problem.programs[0])
        for program in problem.programs:
            check_accepted(solver, program)
        with watched_by(self._watcher(problem)):
            solutions = [
                checked_solution(solver, program, solver.solve(program, start))
                for program in problem.programs
            ]
        self._learn(problem, solver, solutions)
        self._callback_fit_ctx.call_on_fit_task_end(estimator=self, reconstruction_attributes={})
        return self

    def _learn(self, problem, solver, solutions):
        """Set the learned attributes: from a problem, its solver and a solution of each program."""
        vars(self).update(_classes(problem))
        self.solver_ = solver
        self.solution_ = problem.joined(solutions)
        self.patterns_ = self.solution_.D
        self.network_ = problem.network(self.solution_)
        self.objective_ = self.solution_.objective
        self.lower_bound_ = self.solution_.lower_bound
        self.gap_ = self.solution_.gap
        self.n_iter_ = self.solution_.n_iter
        if problem.is_constant(self.network_):
            self._warn_constant(problem.programs[0])

    def _warn_constant(self, program):
        cause = "beta or epsilon is so large that no neuron pays for its penalty; lower them"
        if self.formulation != "soft" and self.solution_.status == Status.OPTIMAL:
            cause = (
                f"no useful neuron is stable on the balls around all rows, for any of the "
                f"{program.D.shape[1]} patterns (the robust cones are empty or nearly so), or beta "
                "is too large; use formulation='soft', or lower epsilon or beta"
            )
        warnings.warn(
            "The fitted network is constant or nearly so "
            f"(formulation={self.formulation!r}): {cause}.",
            UserWarning,
            stacklevel=6,
        )


def checked_solver(solver, formulation):
    """Raise ValueError for what is no solver, or none of this formulation; None is legal."""
    if solver is not None:
        check_solver(solver)
    if isinstance(solver, Exchange) and formulation != "exchange":
        raise ValueError(
            f"solver is an Exchange, which does not solve the {formulation} program: set "
            "formulation='exchange', or name another solver."
        )


def checked_loss(loss, default, task) -> Loss:
    """Return the loss or its default, making sure that it is one of this task."""
    loss = default if loss is None else loss
    if not isinstance(loss, Loss) or getattr(loss, "task", None) != task:
        got = f"the class {loss.__name__}" if isinstance(loss, type) else repr(loss)
        raise ValueError(
            f"loss must be a {task} loss of convexrobust.losses, an object, e.g. {default!r}; "
            f"got {got}."
        )
    return loss


def check_method(method):
    """Raise ValueError for a method of `robust_score` that is not known."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")


def warn_undecided(result):
    """Warn if exact verification left points undecided."""
    undecided = int(np.sum(result.status == Verdict.UNKNOWN))
    if undecided:
        warnings.warn(
            f"{undecided} points could not be decided; they count as not robust.",
            UserWarning,
            stacklevel=4,
        )


def _classes(problem) -> dict:
    """Return the learned attribute that a classifier has besides those of all estimators."""
    return {} if problem.classes is None else {"classes_": problem.classes}


def _with_patterns(problem, D) -> Problem:
    """Return the problem with other patterns in all programs."""
    return replace(problem, programs=[replace(program, D=D) for program in problem.programs])
