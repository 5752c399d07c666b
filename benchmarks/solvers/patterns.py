"""Where the patterns come from: random, generated, and what gradient descent finds.

    python benchmarks/solvers/patterns.py

Robust part: soft hinge program at one beta, l-inf epsilon. `train_certified` minimises the same
certified objective over networks of 128 neurons, by Adam, from 5 seeds; `WorkingSet` is started
once. Goals: a certified training objective below the best of the five on every data set, by 10 %
on average, in at most three times the time of one of them ("times" is the ratio for the whole run,
"to beat" for the first iterate below the best of the five); certified test accuracy, beta chosen on
a validation split for both, at least equal on average.

Nominal part: hinge, epsilon 0. `WorkingSet` against the best of 20 runs of Adam at equal beta, by
the objective of the network. Goal: no worse, in less time than those runs together.

Data sets other than breast cancer are read from the folder CONVEXROBUST_DATA and left out without.
"""

import argparse
import time
import warnings
from dataclasses import replace

import numpy as np
from _tables import FASHION, TABLES, load, split
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from convexrobust import (
    ConvexProgram,
    GroupLasso,
    Hinge,
    LpBall,
    TwoLayerReLU,
    sample_patterns,
)
from convexrobust.certificates import margin_bounds
from convexrobust.deep import train_two_layer
from convexrobust.solvers import WorkingSet, train_certified

BETAS = (1e-3, 3e-3, 1e-2, 3e-2)


def program_of(X, y, epsilon, beta):
    """Return the soft program with a few random patterns."""
    design = np.hstack([X, np.ones((len(X), 1))])
    D = sample_patterns(design, 8, random_state=0)
    return ConvexProgram(design, y, D, Hinge(), GroupLasso(beta), LpBall(np.inf, epsilon))


def objective_of(program, network):
    """Return the certified objective of a network at its own gates."""
    features = program.X[:, :-1]
    V, W, D = network.to_convex(features, np.zeros((len(features), 0), dtype=np.int8))
    return replace(program, D=D).solution(V, W).objective


def timed(function, *arguments, **options):
    """Return what a function returns and its wall time; an open gap is no news here."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = function(*arguments, **options)
    return result, time.perf_counter() - start


def descent(program, seed, smoke=False):
    """Train 128 neurons on the certified objective."""
    n_steps = 20 if smoke else 600
    return train_certified(program, width=128, n_steps=n_steps, random_state=seed)


def certified_accuracy(train, X, y, X_test, y_test, epsilon):
    """Return the certified test accuracy with beta chosen on a validation split."""
    ball = LpBall(np.inf, epsilon)
    inner, held, y_inner, y_held = train_test_split(X, y, test_size=0.3, stratify=y, random_state=1)

    def accuracy(beta, fit, test):
        network = train(program_of(*fit, epsilon, beta))
        return np.mean(margin_bounds(network, *test, ball) > 0)

    scores = [accuracy(beta, (inner, y_inner), (held, y_held)) for beta in BETAS]
    return accuracy(BETAS[int(np.argmax(scores))], (X, y), (X_test, y_test))


def generated(program):
    """Return the network of the working set."""
    solution, _ = timed(WorkingSet().solve, program)
    return TwoLayerReLU.from_solution(solution)


def first_below(solution, value):
    """Return the seconds after which an iterate's certified objective was below a value."""
    return min((r.seconds for r in solution.history if r.objective < value), default=np.inf)


def robust(name, epsilon, options):
    data = load(name, options.rows)
    if data is None:
        return print(f"{name:<15} left out: no file in CONVEXROBUST_DATA")
    X, X_test, y, y_test = split(name, *data)
    program = program_of(X, y, epsilon, 1e-3)
    runs = [timed(descent, program, seed, options.smoke) for seed in range(options.seeds)]
    best = min(objective_of(program, network) for network, _ in runs)
    seconds = np.mean([seconds for _, seconds in runs])
    solution, taken = timed(WorkingSet().solve, program)
    line = (
        f"{name:<15}{len(X):6d}{X.shape[1]:5d}{epsilon:6.2f}{best:12.5f}{seconds:7.1f}"
        f"{solution.objective:13.5f}{solution.lower_bound:11.5f}{solution.D.shape[1]:6d}"
        f"{taken:7.1f}{solution.objective / best - 1:9.1%}{taken / seconds:7.1f}"
        f"{first_below(solution, best) / seconds:10.1f}"
    )
    if options.accuracy:
        parts = (X, y, X_test, y_test, epsilon)
        ours = certified_accuracy(generated, *parts)
        theirs = certified_accuracy(lambda p: descent(p, 0, options.smoke), *parts)
        line += f"{theirs:9.1%}{ours:8.1%}"
    return print(line, flush=True)


def nominal(name, options):
    data = load(name, options.rows)
    if data is None:
        return print(f"{name:<15} left out: no file in CONVEXROBUST_DATA")
    X, _, y, _ = split(name, *data)
    return nominal_line(name, X, y, 1e-3, options)


def nominal_line(name, X, y, beta, options):
    program = program_of(X, y, 0.0, beta)
    epochs, n_runs = (20, 2) if options.smoke else (1000, options.runs)
    values, seconds = [], 0.0
    for seed in range(n_runs):
        settings = {"width": 128, "beta": beta, "n_epochs": epochs, "random_state": seed}
        network, taken = timed(train_two_layer, X, y, **settings)
        values.append(objective_of(program, network))
        seconds += taken
    solution, taken = timed(WorkingSet(1e-3, max_rounds=8).solve, program)
    return print(
        f"{name:<15}{len(X):6d}{X.shape[1]:5d}{min(values):12.5f}{np.median(values):12.5f}"
        f"{seconds:8.1f}{solution.objective:13.5f}{solution.lower_bound:11.5f}"
        f"{solution.D.shape[1]:6d}{taken:7.1f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="certified trainings")
    parser.add_argument("--runs", type=int, default=20, help="Adam runs of the nominal part")
    parser.add_argument("--rows", type=int, default=1500, help="most rows of a data set")
    parser.add_argument("--no-accuracy", dest="accuracy", action="store_false")
    parser.add_argument("--only", choices=("robust", "nominal"))
    parser.add_argument("--smoke", action="store_true", help="a part of breast cancer")
    options = parser.parse_args()
    sets = {**TABLES, **FASHION}
    if options.smoke:
        options.seeds, options.rows, options.accuracy = 1, 80, False
        sets = {"breast cancer": 0.2}

    if options.only != "nominal":
        print("robust: best of the certified trainings, WorkingSet; beta 1e-3")
        print(
            "data               n    d   eps   descent      s   working set      bound     P      s"
            "     diff  times  to beat   cert%: descent, ours"
        )
        for name, epsilon in sets.items():
            robust(name, epsilon, options)
    if options.only != "robust":
        print("\nnominal: Adam best and median, WorkingSet; hinge, beta 1e-3")
        print(
            "data               n    d        best      median   all s  working set      bound"
            "     P      s"
        )
        rng = np.random.default_rng(0)
        X = rng.normal(size=(30, 5))
        nominal_line("Gaussian", X, np.where(rng.normal(size=30) > 0, 1, -1), 1e-3, options)
        for name in (name for name in sets if name in ("breast cancer", "heart", "mammographic")):
            nominal(name, options)


if __name__ == "__main__":
    main()
