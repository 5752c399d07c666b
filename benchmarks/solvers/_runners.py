"""One solver on one program, and what it took: to be run in a process of its own."""

from __future__ import annotations

import importlib
import logging
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from _programs import SMOKE_DATA, named
from scipy.optimize import nnls
from sklearn.exceptions import ConvergenceWarning

from convexrobust import ConicSolver, TwoLayerReLU, patterns_of

TOL = 1e-6  # certified gap
ENDLESS = 10**9  # iterations: only the time limit or the gap ends a run
FIRST_BUDGET = 100
PATIENCE = 10.0  # times the limit for Clarabel and pyscnn, to have something to compare with


@dataclass(frozen=True)
class Runner:
    """How to run a solver.

    ``run(program, limit)`` returns rows (seconds, certified objective, cone violation) and the
    certified lower bound, -inf without one. ``own_patterns`` tells that it trains a network, on
    whatever patterns its gates then have.
    """

    run: Callable
    objectives: tuple[str, ...] = ("soft hinge", "hard hinge", "nominal squared")
    own_patterns: bool = False


def conic(name, limit_option, patience=1.0):
    """Return the run of a conic solver, which is one point, with a multiple of the limit."""

    def run(program, limit):
        found = ConicSolver(name, **{limit_option: patience * limit}).solve(program)
        return [(found.seconds, found.objective, found.cone_violation)], found.lower_bound

    return run


def as_written(program, limit):
    """Solve the formula by cvxpy and Clarabel as it stands, without `ConicSolver`'s modelling."""
    import cvxpy as cp

    from convexrobust.backends import cvxpy as cvxpy_backend

    clock, (C, d, P) = time.perf_counter(), program.shape
    V, W = ([cp.Variable((d, P)) for _ in range(C)] for _ in range(2))
    cones = []
    if program.formulation != "soft":
        for U, rows in ((V, program.rows_v), (W, program.rows_w)):
            gaps = (program.cone_gap(cvxpy_backend, U[c], rows[c]) for c in range(C))
            cones += [gap <= 0 for gap in gaps]
    problem = cp.Problem(cp.Minimize(program.objective(cvxpy_backend, V, W)), cones)
    problem.solve(solver="CLARABEL", time_limit=PATIENCE * limit)
    found = program.solution([v.value for v in V], [w.value for w in W])
    return [(time.perf_counter() - clock, found.objective, found.cone_violation)], -np.inf


def iterative(module, name, **options):
    """Return the run of a solver with a history."""

    def run(program, limit):
        make = getattr(importlib.import_module(f"convexrobust.solvers.{module}"), name)
        found = make(tol=TOL, max_iter=ENDLESS, time_limit=limit, **options).solve(program)
        rows = [(row.seconds, row.objective, row.cone_violation) for row in found.history]
        return rows, found.lower_bound

    return run


def budgets(train, points_of, patience=1.0, growth=4.0):
    """Return the run of ``train(program, budget)``, which has no history.

    Budgets grow as far as the limit, or that many times it, allows, or until more changes nothing.
    Each is a run from the start; ``points_of(found, program)`` makes rows (objective, cone
    violation) of it, which is not counted.
    """

    def run(program, limit):
        rows, points, budget, spent, last = [], None, FIRST_BUDGET, 0.0, 0.0
        while spent + growth * last <= patience * limit:
            clock = time.perf_counter()
            found = train(program, round(budget))
            last, before = time.perf_counter() - clock, points
            points = points_of(found, program)
            if points == before:  # it had stopped by itself
                break
            rows += [(last, *point) for point in points]
            spent, budget = spent + last, growth * budget
        return rows, -np.inf

    return run


def as_network(network, program):
    """Return the one row of a network, on the patterns of its own gates."""
    return [(objective_of(network, program), 0.0)]


def objective_of(network, program) -> float:
    """Return the certified objective of a network, on the patterns of its own gates."""
    # Not on those of the program as well: an unused pattern would only cost memory.
    none = np.zeros((len(program.X), 0), dtype=np.int8)
    V, W, D = network.to_convex(program.X[:, :-1], none)
    return replace(program, D=D, formulation="soft").solution(V, W).objective


def adam(program, n_epochs):
    from convexrobust.deep import train_two_layer

    beta, loss = program.regularizer.beta, program.loss
    return train_two_layer(program.X[:, :-1], program.y, beta=beta, loss=loss, n_epochs=n_epochs)


def certified_descent(program, n_steps):
    from convexrobust.solvers.working_set.seeding import train_certified

    return train_certified(program, n_steps=n_steps)


def pyscnn(program, max_iter, return_convex=False):
    """Train by pyscnn's augmented Lagrangian on the program's patterns, in float64."""
    from scnn.metrics import Metrics
    from scnn.models import ConvexReLU
    from scnn.optimize import optimize_model
    from scnn.regularizers import NeuronGL1
    from scnn.solvers import AL

    model = ConvexReLU(gates_of(program))
    found, _ = optimize_model(
        model,
        AL(model, max_primal_iters=max_iter, tol=1e-8, constraint_tol=1e-8),
        Metrics(metric_freq=ENDLESS),
        program.X,
        program.y.astype(np.float64),
        regularizer=NeuronGL1(program.regularizer.beta),
        return_convex=return_convex,
        unitize_data=False,
        dtype="float64",
    )
    if return_convex:
        return found
    hidden, output = (np.asarray(weights, dtype=np.float64).T for weights in found.parameters)
    return TwoLayerReLU(hidden, output)


def with_cones(model, program):
    """Return the rows of pyscnn's weights as a point of the program: as they are, and projected.

    pyscnn drops patterns that it has twice, which does not change the program. The projection of u
    on {u : A u >= 0} is u + A'b with the b >= 0 that makes it shortest (Moreau).
    """
    D = patterns_of(program.X, np.asarray(model.G)).astype(np.int8)
    raw = [np.asarray(weights, dtype=np.float64)[0].T for weights in model.parameters]  # (d, P)
    projected = [U.copy() for U in raw]
    for U in projected:
        for i in range(U.shape[1]):
            A = program.X * (2.0 * D[:, [i]] - 1.0)
            U[:, i] += A.T @ nnls(A.T, -U[:, i])[0]
    points = [replace(program, D=D).solution(V[None], W[None]) for V, W in (raw, projected)]
    return [(point.objective, point.cone_violation) for point in points]


def gates_of(program):
    """Return the gates that `sample_patterns` drew: of the all-active pattern, then Gaussian."""
    d, P = program.X.shape[1], program.D.shape[1]
    drawn = np.random.default_rng(0).standard_normal((P, d)).T
    gates = np.column_stack([np.eye(d)[-1], drawn])[:, :P]
    if not np.array_equal(patterns_of(program.X, gates), program.D):
        raise RuntimeError("the patterns are not those of the first gates drawn")
    return gates


RUNNERS = {
    "cvxpy as written": Runner(as_written),
    "Clarabel": Runner(conic("CLARABEL", "time_limit", PATIENCE)),
    "SCS": Runner(conic("SCS", "time_limit_secs")),
    "InteriorPoint": Runner(iterative("interior_point", "InteriorPoint")),
    "ADMM": Runner(iterative("admm", "ADMM")),
    "ProjectedGradient": Runner(
        iterative("projected_gradient", "ProjectedGradient", dtype="float64")
    ),
    "pyscnn": Runner(
        budgets(partial(pyscnn, return_convex=True), with_cones, PATIENCE, growth=2**0.5),
        ("nominal squared",),
    ),
    "pyscnn*": Runner(budgets(pyscnn, as_network), ("nominal squared",), own_patterns=True),
    "Adam*": Runner(budgets(adam, as_network), ("nominal squared",), own_patterns=True),
    "train_certified*": Runner(
        budgets(certified_descent, as_network), ("soft hinge",), own_patterns=True
    ),
}


def measure(solver, program_name, limit):
    """Return (rows, lower bound, wall seconds, CPU seconds, MiB above the memory before)."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", ConvergenceWarning)
    runner, program = RUNNERS[solver], named(program_name)
    warm_up(runner, program_name.split(", ")[1])
    before, wall, cpu = peak_memory(), time.perf_counter(), time.process_time()
    rows, bound = runner.run(program, limit)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return rows, bound, wall, cpu, peak_memory() - before


def warm_up(runner, objective):
    """Solve a tiny program of that objective, so that no solver is charged for imports."""
    (tiny,) = SMOKE_DATA
    runner.run(named(f"{tiny}, {objective}"), 1.0)


def peak_memory() -> float:
    """Return the largest memory that this process has had so far, in MiB (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
