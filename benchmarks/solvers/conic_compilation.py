"""What building and compiling a program costs against solving it by Clarabel.

    python benchmarks/solvers/conic_compilation.py

Synthetic Gaussian data, hinge loss, l-inf epsilon 0.1, beta 1e-3. The goal is that building the
cvxpy problem and compiling it stay under 25 % of Clarabel's own solve time at N=200, d=20, P=30.
The path solves the same data for a second (epsilon, beta): nothing is compiled again.
"""

import argparse

import numpy as np

from convexrobust import ConicSolver, ConvexProgram, GroupLasso, Hinge, LpBall, sample_patterns


def program(n, d, P, formulation, epsilon=0.1, beta=1e-3):
    """Return a program on data whose label is the sign of a product of two features."""
    rng = np.random.default_rng(0)
    X = np.hstack([rng.normal(size=(n, d)), np.ones((n, 1))])
    y = np.where(X[:, 0] * X[:, 1] + 0.5 * X[:, 2] > 0, 1, -1)
    D = sample_patterns(X, P, random_state=0)
    return ConvexProgram(X, y, D, Hinge(), GroupLasso(beta), LpBall(np.inf, epsilon), formulation)


def timed(solver, problem):
    """Return the wall time of a solve and Clarabel's own share of it."""
    solution = solver.solve(problem)
    return solution.seconds, solution.solver_seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny size")
    sizes = [(30, 4, 4)] if parser.parse_args().smoke else [(100, 10, 10), (200, 20, 30)]

    print("    N    d    P  formulation   total s  Clarabel s  overhead  again s  again overhead")
    for n, d, P in sizes:
        for formulation in ("hard", "one-sided", "soft"):
            solver = ConicSolver()
            total, inside = timed(solver, program(n, d, P, formulation))
            again, inside_again = timed(solver, program(n, d, P, formulation, 0.05, 2e-3))
            print(
                f"{n:5d}{d:5d}{P:5d}  {formulation:<11} {total:9.2f}{inside:12.2f}"
                f"{(total - inside) / inside:9.1%}{again:10.2f}"
                f"{(again - inside_again) / inside_again:15.1%}"
            )


if __name__ == "__main__":
    main()
