"""Ten fits of this checkout beside those of another revision: objectives and CPU seconds.

    python benchmarks/solvers/revisions.py REVISION [--repeats K]
    python benchmarks/solvers/revisions.py --smoke

For a change that should change nothing. Both revisions fit in processes of their own, by turns and
on one thread, and the smallest time of each counts; the first turn, in which kernels compile, does
not. The other revision is checked out beside this one by git. ``--smoke`` compares this one with
itself, on a few rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.preprocessing import scale

HERE = Path(__file__).resolve().parents[2]
_N_SMALL = 3  # fits where only a few rows are taken
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def fits():
    """Yield the names of the fits, unfitted estimators, and their data."""
    from convexrobust import ConvexRobustClassifier, ConvexRobustRegressor, InteriorPoint
    from convexrobust.losses import Absolute, Logistic
    from convexrobust.solvers import ADMM

    def classifier(**options):
        return ConvexRobustClassifier(**{"random_state": 0, **options})

    X, y = load_breast_cancer(return_X_y=True)
    X = scale(X)
    bounds = {"bounds": (X.min(axis=0) - 1.0, X.max(axis=0) + 1.0)}
    yield "default", classifier(), X, y
    yield "nominal", classifier(epsilon=0.0), X, y
    yield "bounds", classifier(epsilon=0.2, beta=1e-2, **bounds), X, y
    yield "l2", classifier(norm=2, epsilon=0.3, beta=1e-2), X[:150], y[:150]
    hard = {"formulation": "hard", "epsilon": 0.05, "n_patterns": 20}
    yield "hard", classifier(**hard), X[:200, :10], y[:200]
    exact = {"n_patterns": 20, "solver": InteriorPoint()}
    yield "logistic", classifier(loss=Logistic(), beta=1e-2, **exact), X[:200, :10], y[:200]
    X, y = load_digits(return_X_y=True)
    X, y = X[y < 4][:300] / 16.0, y[y < 4][:300]
    yield "classes", classifier(epsilon=0.05, beta=1e-2), X, y
    X, y = load_wine(return_X_y=True)
    yield "splitting", classifier(n_patterns=30, solver=ADMM(1e-4)), scale(X), y
    X, y = load_diabetes(return_X_y=True)
    X, y = scale(X), scale(y)
    yield "regression", ConvexRobustRegressor(beta=1e-2, random_state=0), X, y
    yield "absolute", ConvexRobustRegressor(loss=Absolute(), beta=1e-2, random_state=0), X, y


def run(n_rows):
    """Fit all in this process, or some on a few rows; print a line of JSON for each."""
    for name, model, X, y in islice(fits(), None if n_rows is None else _N_SMALL):
        some = np.linspace(0, len(X) - 1, n_rows or len(X)).astype(int)
        X, y = X[some], y[some]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clock = time.process_time()
            model.fit(X, y)
        seconds = time.process_time() - clock
        row = {"name": name, "objective": model.objective_, "bound": model.lower_bound_}
        print(json.dumps({**row, "seconds": seconds}), flush=True)


def measured(checkout, n_rows) -> list[dict]:
    """Return the lines of a process that imports the package from a checkout."""
    command = [sys.executable, __file__, "--fits"]
    command += [] if n_rows is None else ["--rows", str(n_rows)]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        command, env=environment, cwd=checkout, check=True, stdout=subprocess.PIPE
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def checked_out(revision):
    """Check a revision out into a folder of its own, for as long as it is needed."""
    if revision is None:
        yield HERE
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkout"
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(place), revision], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


def compare(revision, repeats, n_rows):
    """Print objectives and times of a revision beside those of this checkout."""
    before, after = [], []
    with checked_out(revision) as place:
        for _ in range(repeats + (revision is not None)):
            before.append(measured(place, n_rows))
            after.append(measured(HERE, n_rows))
    print(f"{'':12}{'objective':>13}{'change':>10}{'bound':>13}{'change':>10}", end="")
    print(f"{'CPU s before':>14}{'after':>8}{'ratio':>7}")
    for k, row in enumerate(after[-1]):
        old = before[-1][k]
        seconds = [
            min(turn[k]["seconds"] for turn in turns[-repeats:]) for turns in (before, after)
        ]
        print(f"{row['name']:12}", end="")
        for value in ("objective", "bound"):
            change = (row[value] - old[value]) / max(abs(old["objective"]), 1e-300)
            print(f"{row[value]:13.6g}{change:10.1e}", end="")
        print(f"{seconds[0]:14.2f}{seconds[1]:8.2f}{seconds[1] / seconds[0]:7.2f}")
    totals = [
        min(sum(row["seconds"] for row in turn) for turn in turns[-repeats:])
        for turns in (before, after)
    ]
    print(f"{'together':58}{totals[0]:14.2f}{totals[1]:8.2f}{totals[1] / totals[0]:7.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", nargs="?", help="what to compare with, as git names it")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count")
    parser.add_argument("--smoke", action="store_true", help="this checkout with itself, small")
    parser.add_argument("--fits", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    np.seterr(all="ignore")
    if options.fits:
        run(options.rows)
    elif options.smoke:
        compare(None, 1, 24)
    elif options.revision is None:
        parser.error("name the revision to compare with, e.g. HEAD~1")
    else:
        compare(options.revision, options.repeats, None)


if __name__ == "__main__":
    main()
