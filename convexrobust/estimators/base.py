"""What the estimators share: from clean arrays to a network."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.callback import CallbackSupportMixin
from sklearn.utils import check_random_state

from convexrobust.certificates import Verdict
from convexrobust.exchange import Exchange, ExchangeSolution
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram, Scope, Solution, Status
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import WorkingSet, default_solver
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
_FLAT = 1e-2  # variation of the outputs on the training rows that a rough solver leaves, relative


class ConvexRobustEstimator(CallbackSupportMixin, BaseEstimator):
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

    def _program(self, X, y, weight, loss, n_outputs) -> ConvexProgram:
        if self.formulation not in FORMULATIONS:
            raise ValueError(
                f"formulation must be one of {FORMULATIONS}, got {self.formulation!r}."
            )
        if isinstance(self.solver, Exchange) and self.formulation != "exchange":
            raise ValueError(
                f"solver is an Exchange, which does not solve the {self.formulation} program: set "
                "formulation='exchange', or name another solver."
            )
        if self.patterns is None or isinstance(self.patterns, str):
            # A matrix of patterns belongs to the rows as they are; anything else is free to merge.
            rows, weight = _distinct_rows(X, y, weight)
            X, y = X[rows], y[rows]
        design = self._design(X)
        return ConvexProgram(
            design,
            y,
            self._sampled_patterns(design, y, n_outputs),
            loss,
            GroupLasso(self.beta),
            self._ball(),
            "soft" if self.formulation == "exchange" else self.formulation,
            weight,
            self.fit_intercept,
            n_outputs,
        )

    def _solve(self, programs) -> Solution:
        """Solve the programs and join their outputs into one solution."""
        warm = self.warm_start and getattr(self, "network_", None) is not None
        start = None
        if warm:
            programs, start = self._warm(programs)
        if self.formulation == "exchange" and isinstance(self.solver, Exchange):
            self.solver_ = self.solver
        elif self.formulation == "exchange":
            inner = "exact" if len(programs[0].X) <= _EXACT_ROWS else "attack"
            self.solver_ = Exchange(
                solver=self.solver, inner=inner, patterns="grow", random_state=self._seed()
            )
        elif self.solver is not None:
            self.solver_ = self.solver
        else:
            self.solver_ = self._default_solver(programs[0])
        solutions = [self.solver_.solve(program, start) for program in programs]
        if len(solutions) > 1:
            return _joined(solutions, programs)
        return replace(solutions[0], D=_patterns_of(solutions[0], programs[0]))

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
            nominal = program.sets.radius == 0.0 and program.n_outputs == 1
            tol = _GAP_NOMINAL if nominal else _GAP
        return WorkingSet(
            tol,
            width=width,
            n_new=max(width // 2, 8),
            max_rounds=3 if program.n_outputs == 1 else 2,
            random_state=self._seed(),
        )

    def _warm(self, programs):
        """Add the patterns of the previous network, and return it as a starting point."""
        program, network = programs[0], self.network_
        n_features = program.X.shape[1] - program.intercept
        if network.n_features != n_features or network.intercept != program.intercept:
            return programs, None
        V, W, D = network.to_convex(program.X[:, :n_features], program.D)
        starts = [(replace(program, D=D), Solution(V, W, np.inf))]
        last = replace(self.solution_, multipliers=None)
        if len(last.D) == len(program.X):  # the same rows, as it seems: the same patterns serve
            starts.append(joined(replace(program, D=last.D), last, D))
        if last.V.shape[0] != program.n_outputs:  # one program for each class
            return [replace(old, D=starts[-1][0].D) for old in programs], None
        solutions = [p.solution(start.V, start.W, D=p.D) for p, start in starts]
        best = min(solutions, key=lambda solution: solution.objective)
        return [replace(old, D=best.D) for old in programs], replace(best, D=None)

    def _begin_callbacks(self, X, y):
        """Tell scikit-learn's callbacks that the fit begins; nothing to do without any."""
        context = self._init_callback_context(max_subtasks=None)
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)

    def _watch(self, programs, offset):
        """Return a watcher of certified iterates that makes each a task of the callbacks."""
        context, whole = self._callback_fit_ctx, len(programs) == 1

        def watcher(row, solution):
            def attributes():
                return {"network_": self._network_of(solution, offset)} if whole else None

            task = context.subcontext(task_name="certified iterate")
            task.call_on_fit_task_begin(estimator=self)
            return task.call_on_fit_task_end(
                estimator=self, metadata=row._asdict(), reconstruction_attributes=attributes
            )

        return watcher

    def _network_of(self, solution, offset) -> TwoLayerReLU:
        return TwoLayerReLU.from_solution(solution, intercept=self.fit_intercept, offset=offset)

    def _learn(self, programs, offset=None):
        """Set the learned attributes from the solved programs."""
        watching = nullcontext()  # outside fit, on a path, there is nobody to tell
        if hasattr(self, "_callback_fit_ctx"):
            watching = watched_by(self._watch(programs, offset))
        with watching:
            self.solution_ = self._solve(programs)
        self.patterns_ = self.solution_.D
        self.network_ = self._network_of(self.solution_, offset)
        self.objective_ = self.solution_.objective
        self.lower_bound_ = self.solution_.lower_bound
        self.gap_ = self.solution_.gap
        self.n_iter_ = self.solution_.n_iter
        if self._is_constant(programs[0], offset):
            self._warn_constant(programs[0])
        if hasattr(self, "_callback_fit_ctx"):
            self._callback_fit_ctx.call_on_fit_task_end(
                estimator=self, reconstruction_attributes={}
            )
        return self

    def _is_constant(self, program, offset):
        """Tell whether features have no weight, or one that only the solver's tolerance left."""
        if not np.any(self.network_.hidden[: self.n_features_in_]):
            return True
        X = program.X[:, : self.n_features_in_]
        outputs = self.network_.predict(X) - (0.0 if offset is None else offset)
        if program.loss.task == "regression":
            size = np.subtract(*np.quantile(program.y, (0.75, 0.25)))  # whatever outliers do
        else:
            size = np.abs(outputs).max()
        return bool(np.ptp(outputs, axis=0).max() <= _FLAT * size and np.ptp(X, axis=0).any())

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
            stacklevel=4,
        )


def checked_loss(loss, default, task):
    """Return the loss or its default, making sure that it is one of this task."""
    loss = default if loss is None else loss
    if getattr(loss, "task", None) != task:
        raise ValueError(
            f"loss must be a {task} loss of convexrobust.losses, e.g. {default!r}; got {loss!r}."
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


def _distinct_rows(X, y, weight):
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


def _joined(solutions, programs) -> Solution:
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
