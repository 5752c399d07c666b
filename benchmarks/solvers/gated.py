"""The gated program against pyscnn's R-FISTA: seconds to a relative gap of the best value.

    OMP_NUM_THREADS=1 python benchmarks/solvers/gated.py [--smoke | --large] [--limit SECONDS]

Squared loss, standardised data, Gaussian gates, beta = 1 % of the beta that makes all weights 0.
Both run in this process on as many threads (one). pyscnn runs in float32 and, as with numpy >= 2
that is silently float64, in float64 as well: the faster counts. It reports its objective every few
iterations, and stops at its own tolerance of the gradient or its limit of iterations; its final
weights are evaluated here and the value it reported last is printed beside. Each runs for a moment
before it is timed, so that what happens only once in a process counts for neither.
"""

import argparse
import warnings

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.exceptions import ConvergenceWarning

from convexrobust import ConvexProgram, GroupLasso, LpBall, Squared
from convexrobust.solvers.gated import solve_gated

LEVELS = (5.7e-2, 1e-2, 1e-3, 1e-6)
_PILOT = 20  # iterations of pyscnn to time it by


def synthetic(n, d):
    """Return features and the noisy output of ten ReLU neurons."""
    rng = np.random.default_rng(0)
    X, hidden = rng.normal(size=(n, d)), rng.normal(size=(d, 10)) / np.sqrt(d)
    return X, np.maximum(X @ hidden, 0.0) @ rng.normal(size=10) + 0.1 * rng.normal(size=n)


def program(X, y, P):
    """Return the program on standardised data, and its gates."""
    X = X[:, X.std(axis=0) > 0]
    X, y = (X - X.mean(axis=0)) / X.std(axis=0), (y - y.mean()) / y.std()
    gates = np.random.default_rng(1).normal(size=(X.shape[1], P))
    D = (X @ gates >= 0).astype(np.int8)
    beta = 0.01 * np.linalg.norm(X.T @ (D * y[:, None]), axis=0).max() / len(y)
    ball = LpBall(2, 0.0)
    return ConvexProgram(X, y, D, Squared(), GroupLasso(beta), ball, intercept=False), gates


def ours(problem, limit, tol=1e-7):
    """Return rows (seconds, objective) and the certified bound."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = solve_gated(problem, tol=tol, time_limit=limit)
    return [(row[1], row[2]) for row in found.history], found.lower_bound, found.objective


def pyscnn(problem, gates, dtype, max_iter):
    """Return rows (seconds, reported objective) and the objective of the weights found."""
    from scnn.metrics import Metrics
    from scnn.models import ConvexGatedReLU
    from scnn.optimize import optimize_model
    from scnn.regularizers import NeuronGL1
    from scnn.solvers import RFISTA

    model = ConvexGatedReLU(gates)
    metrics = Metrics(metric_freq=5, objective=True, time=True)
    model, metrics = optimize_model(
        model,
        RFISTA(model, max_iters=max_iter, tol=1e-14),
        metrics,
        problem.X.astype(dtype),
        problem.y.astype(dtype),
        regularizer=NeuronGL1(problem.regularizer.beta),
        return_convex=True,
        unitize_data=False,
        dtype=dtype,
    )
    weights = np.asarray(model.parameters[0], dtype=np.float64)
    U = np.zeros(problem.shape[1:])
    U[:, : weights.shape[-2]] = weights.reshape(-1, weights.shape[-1]).T
    kept = np.asarray(model.G)
    D = (problem.X @ kept >= 0).astype(np.int8)
    rows = list(zip(np.asarray(metrics.time), np.asarray(metrics.objective), strict=True))
    return rows, objective_of(problem, D, U)


def objective_of(problem, D, U):
    """Return the gated objective of U on patterns in the order of D."""
    residual = np.sum(D * (problem.X @ U[:, : D.shape[1]]), axis=1) - problem.y
    return 0.5 * np.mean(residual**2) + problem.regularizer.beta * np.linalg.norm(U, axis=0).sum()


def first(rows, target):
    """Return the seconds of the first row at or below the target, inf if there is none."""
    return next((seconds for seconds, value in rows if value <= target), np.inf)


def peer(problem, gates, limit):
    """Return the rows of the faster precision, each given about ``limit`` seconds in all."""
    runs = []
    for dtype in ("float32", "float64"):
        pilot, _ = pyscnn(problem, gates, dtype, _PILOT)
        step = (pilot[-1][0] - pilot[0][0]) / _PILOT  # without what happens only once
        steps = max(_PILOT, int(limit / max(step, 1e-6)))
        rows, value = pyscnn(problem, gates, dtype, min(steps, 20_000))
        seconds, reported = rows[-1]
        print(f"  pyscnn {dtype}: {seconds:.1f} s, reports {reported:.9g}, recomputed {value:.9g}")
        runs.append(rows)
    return runs


def compare(name, problem, gates, limit):
    """Print the seconds of both to every level."""
    ours(problem, limit, tol=0.1)  # what happens only once, as in pyscnn's pilot
    rows, bound, best = ours(problem, limit)
    print(f"{name}: best certified {best:.9g}, lower bound {bound:.9g}")
    runs = []
    try:
        runs = peer(problem, gates, limit)
    except ImportError as error:
        print(f"  pyscnn cannot be imported ({error}): ours only")
    for level in LEVELS:
        target = best + level * abs(best)
        mine, theirs = first(rows, target), min((first(r, target) for r in runs), default=np.inf)
        of_peer = f"{theirs:7.2f} s  {theirs / mine:6.1f}x" if np.isfinite(theirs) else "      -"
        print(f"  gap {level:.1e}: ours {mine:7.2f} s  pyscnn {of_peer}")
    for run in runs:
        reached = min(value for _, value in run)
        theirs = first(run, reached)
        mine = first(rows, max(reached, best))
        print(
            f"  where pyscnn ends (gap {reached / best - 1:.1e}): ours {mine:.2f} s, {theirs:.2f} s"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny size, in seconds")
    parser.add_argument("--large", action="store_true", help="N=50 000, d=784, P=50 only")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each run")
    parser.add_argument("--only", help="a word of the name of the problem")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problems = {
        "breast cancer P=500": lambda: program(*load_breast_cancer(return_X_y=True), 500),
        "digits P=500": lambda: program(*load_digits(return_X_y=True), 500),
        "synthetic N=10000 d=200 P=50": lambda: program(*synthetic(10_000, 200), 50),
    }
    if arguments.large:
        problems = {"synthetic N=50000 d=784 P=50": lambda: program(*synthetic(50_000, 784), 50)}
    if arguments.smoke:
        problems = {"smoke N=200 d=5 P=10": lambda: program(*synthetic(200, 5), 10)}
    for name, make in problems.items():
        if arguments.only is None or arguments.only in name:
            limit = min(arguments.limit, 2.0) if arguments.smoke else arguments.limit
            compare(name, *make(), limit)


if __name__ == "__main__":
    main()
