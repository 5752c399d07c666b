"""Where one solver becomes quicker than another: the thresholds of `default_solver`, measured.

    OMP_NUM_THREADS=1 python benchmarks/solvers/choice.py [--smoke] [--only WORD] [--limit SECONDS]

For every threshold of `convexrobust.solvers.choice.Thresholds`, both solvers on programs below, at
and above it: Gaussian features, classes by the sign of a product of two of them, 5 % of the labels
turned. CPU seconds to the gap, certified; "-" where a solver did not reach it within the limit.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from convexrobust import ConicSolver, ConvexProgram, GroupLasso, Hinge, InteriorPoint, LpBall
from convexrobust.solvers import ADMM
from convexrobust.solvers.admm import fused
from convexrobust.solvers.choice import THRESHOLDS

SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of each threshold
ENDLESS = 10**6


def program_of(n, d, P, *, epsilon=0.05, p=np.inf, formulation="soft", seed=0):
    """Return a program of n rows, d features and P patterns; beta leaves some tens of neurons."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    y = np.where(X[:, 0] * X[:, 1] > 0.0, 1, -1)
    y[rng.random(n) < 0.05] *= -1
    D = np.unique(X @ rng.normal(size=(d, P)) >= 0.0, axis=1).astype(np.int8)
    ball = LpBall(p, epsilon)
    return ConvexProgram(X, y, D, Hinge(), GroupLasso(1e-3), ball, formulation, intercept=False)


def of_unknowns(unknowns, n=300, d=20, **options):
    """Return a program of about so many unknowns."""
    return program_of(n, d, max(int(unknowns) // (2 * d), 2), **options)


def of_copies(entries):
    """Return a program of so many rows times unknowns, with two copies of each sample."""
    n, d = 100, 10
    program = program_of(n, d, max(int(entries) // (2 * n * 2 * d), 2))
    index = np.repeat(np.arange(n), 2)
    X = program.X[index] + np.where(np.arange(2 * n)[:, None] % 2, 0.05, -0.05)
    D = program.D[index]
    return replace(program, X=X, y=program.y[index], D=D, copy_of=index)


@contextmanager
def on_tensors():
    """Keep the iteration of ADMM from being compiled."""
    compiles = fused.compiles
    fused.compiles = lambda program: False
    try:
        yield
    finally:
        fused.compiles = compiles


def seconds(solver, program, tol):
    """Return the CPU seconds of a solve that closes its gap; nan if it does not."""
    clock = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = solver.solve(program)
    return time.process_time() - clock if found.relative_gap <= tol else np.nan


class Study(NamedTuple):
    """A threshold, what it is counted in, programs by that count, and the solvers by name."""

    name: str
    threshold: float
    unit: str
    program: Callable
    solvers: dict


def studies(limit) -> list[Study]:
    """Return one study a threshold, two where it is another one without compilation."""
    t = THRESHOLDS

    def newton_and_splitting(tol):
        newton, splitting = InteriorPoint(tol, time_limit=limit), ADMM(tol, ENDLESS)
        splitting.time_limit = limit
        return {"InteriorPoint": newton, "ADMM": splitting}

    def precisions(tol):
        return {d: ADMM(tol, ENDLESS, dtype=d, time_limit=limit) for d in ("float64", "float32")}

    def nominal(unknowns):
        return of_unknowns(unknowns, epsilon=0.0)

    def wide(sides):
        return program_of(200, int(sides), 10, epsilon=0.01, formulation="hard")

    def thousand_rows(entries):
        return of_unknowns(entries / 1000, n=1000)

    soft = t.soft_unknowns, "unknowns", of_unknowns, newton_and_splitting(t.soft_gap)
    unperturbed = t.nominal_unknowns, "unknowns", nominal, newton_and_splitting(t.nominal_gap)
    conic = {"ConicSolver": ConicSolver(), "ADMM": ADMM(1e-2, ENDLESS, time_limit=limit)}
    return [
        Study("dense", t.dense, "unknowns", of_unknowns, newton_and_splitting(1e-4)),
        Study("soft", *soft),
        Study("soft, on tensors", *soft),
        Study("nominal", *unperturbed),
        Study("nominal, on tensors", *unperturbed),
        Study("wide", t.wide_sides, "sides", wide, newton_and_splitting(t.wide_gap)),
        Study("copies", t.copies, "rows x unknowns", of_copies, conic),
        Study("single", t.single_entries, "rows x unknowns", thousand_rows, precisions(1e-3)),
    ]


def measure(limit, only, shares):
    """Print the seconds of both solvers at sizes around each threshold."""
    for study in studies(limit):
        if only not in study.name:
            continue
        names, (first, second) = list(study.solvers), study.solvers.values()
        tol = second.tol
        print(f"{study.name}: to a gap of {tol:g}, threshold {study.threshold:g} {study.unit}")
        print(f"{study.unit:>20}{names[0]:>16}{names[1]:>12}{'ratio':>8}")
        for share in shares:
            program = study.program(share * study.threshold)
            with on_tensors() if "tensors" in study.name else nullcontext():
                seconds(second, program, tol)  # kernels compile
                times = [seconds(solver, program, tol) for solver in (first, second)]
            cells = ["-" if np.isnan(s) else f"{s:.2f}" for s in times]
            ratio = "" if np.isnan(times).any() else f"{times[0] / times[1]:.2f}"
            size = f"{share * study.threshold:g}"
            print(f"{size:>20}{cells[0]:>16}{cells[1]:>12}{ratio:>8}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="only show that it runs")
    parser.add_argument("--only", default="", help="thresholds whose name has this word")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a solve at most")
    options = parser.parse_args()
    with threadpool_limits(1):
        if options.smoke:
            measure(2.0, "soft", (0.1,))
        else:
            measure(options.limit, options.only, SHARES)


if __name__ == "__main__":
    main()
