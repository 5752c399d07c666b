"""Where the patterns come from: random, generated, and what gradient descent finds.

    python benchmarks/solvers/patterns.py

Robust part: soft hinge program at one beta, l-inf epsilon. `train_certified` minimises the same
certified objective over networks of 128 neurons, by Adam, from 5 seeds. `WorkingSet` is started
twice: with the time of 2.9 of these trainings as its limit (it looks at the clock every 50
iterations, and must be done within 3), and until its gap is closed. Goal of
the first: a certified training objective below the best of the five on every data set, by 10 % on
average ("diff"). "times" is the ratio to one training, "to beat" that of the first iterate below
the best of the five.

Accuracy: the same two trainings on a few hundred rows, tested on the others, over several splits,
beta chosen on 30 % of the training rows for both. Goal: a proven test accuracy at least equal on
average. It is proven in two ways: by the interval with the network's own gates, which is what the
certified training minimises, whereas the convex program may choose other slopes for neurons that
change sign in a set; and by the exact worst case, which favours neither.

Nominal part: hinge, epsilon 0. `WorkingSet` against the best of 20 runs of Adam and of 20 runs of
L-BFGS at equal beta, on networks of 128 neurons, by the objective of the network. L-BFGS minimises
smoothed hinges of falling width and then the hinge itself, which it alone would get stuck on. Goal:
no worse, in less time than those runs together.

A tiny fit first takes the time of imports and of compiling. Data sets other than breast cancer are
read from the folder CONVEXROBUST_DATA and left out without.
"""

import argparse
import time
import warnings
from dataclasses import replace

import numpy as np
from _tables import FASHION, TABLES, load, split
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from convexrobust import (
    ConvexProgram,
    GroupLasso,
    Hinge,
    LpBall,
    TwoLayerReLU,
    sample_patterns,
)
from convexrobust.certificates import certify, margin_bounds
from convexrobust.deep import train_two_layer
from convexrobust.solvers import WorkingSet, train_certified

LIMIT = 2.9  # trainings
BETAS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SMOOTHINGS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.0)  # of the hinge, for L-BFGS one after the other


def program_of(X, y, epsilon, beta):
    """Return the soft program with a few random patterns."""
    design = np.hstack([X, np.ones((len(X), 1))])
    D = sample_patterns(design, 8, random_state=0)
    return ConvexProgram(design, y, D, Hinge(), GroupLasso(beta), LpBall(np.inf, epsilon))


def warm_up():
    """Import and compile what the solvers need, whose time is not theirs."""
    X = np.random.default_rng(0).normal(size=(12, 2))
    for epsilon in (0.0, 0.1):
        WorkingSet().solve(program_of(X, np.where(X[:, 0] > 0.0, 1, -1), epsilon, 1e-3))


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


def proven(network, X, y, ball):
    """Return two accuracies: proven by the interval of its own gates, and by exact worst cases."""
    interval = margin_bounds(network, X, y, ball) > 0.0
    exact, rest = interval.copy(), np.flatnonzero(~interval)
    found = certify(network, X[rest], y[rest], ball, "exact", time_limit=2.0)
    exact[rest] = found.status == "robust"
    return interval.mean(), exact.mean()


def chosen(train, betas, data, test, epsilon, seed):
    """Return the two proven test accuracies and betas, each beta chosen on a validation split."""
    ball, networks = LpBall(np.inf, epsilon), {}
    inner, held, y_inner, y_held = train_test_split(
        *data, test_size=0.3, stratify=data[1], random_state=seed
    )
    scores = [
        proven(train(program_of(inner, y_inner, epsilon, beta)), held, y_held, ball)
        for beta in betas
    ]
    best = [betas[i] for i in np.argmax(scores, axis=0)]
    for beta in set(best):
        networks[beta] = train(program_of(*data, epsilon, beta))
    return [(proven(networks[beta], *test, ball)[i], beta) for i, beta in enumerate(best)]


def accuracies(name, epsilon, options):
    """Print proven test accuracies, mean and standard error over splits of both trainings."""
    data = load(name, options.rows)
    if data is None:
        return
    tables = []
    for seed in range(options.splits):
        X, X_test, y, y_test = train_test_split(
            *data,
            train_size=min(int(0.7 * len(data[0])), options.train_rows),
            stratify=data[1],
            random_state=seed,
        )
        scaler = StandardScaler(with_std=name not in FASHION).fit(X)
        parts = (scaler.transform(X), y), (scaler.transform(X_test), y_test), epsilon, seed
        trainings = (lambda p, s=seed: descent(p, s, options.smoke)), generated
        tables.append([chosen(train, options.betas, *parts) for train in trainings])
    accuracy, betas = np.moveaxis(np.array(tables), -1, 0)  # (splits, trainings, proofs) each
    line = f"{name:<15}{len(y):6d}{len(y_test):6d}{epsilon:6.2f}"
    for proof in range(2):
        values = accuracy[:, :, proof]
        for column in (*values.T, values[:, 1] - values[:, 0]):
            line += f"{column.mean():8.1%} +-{column.std(ddof=1) / np.sqrt(len(column)):5.1%}"
        line += "".join(f"{np.median(b):8.0e}" for b in betas[:, :, proof].T)
    print(line, flush=True)


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
    X, _, y, _ = split(name, *data)
    program = program_of(X, y, epsilon, 1e-3)
    runs = [timed(descent, program, seed, options.smoke) for seed in range(options.seeds)]
    best = min(objective_of(program, network) for network, _ in runs)
    seconds = np.median([seconds for _, seconds in runs])
    line = f"{name:<15}{len(X):6d}{X.shape[1]:5d}{epsilon:6.2f}{best:12.5f}{seconds:6.1f} |"
    for limit in (LIMIT * seconds, None):
        solution, taken = timed(WorkingSet(time_limit=limit).solve, program)
        line += f"{solution.objective:9.5f}{solution.lower_bound:9.5f}{solution.D.shape[1]:5d}"
        line += f"{taken:6.1f}{solution.objective / best - 1:8.1%}{taken / seconds:6.1f} |"
    return print(f"{line}{first_below(solution, best) / seconds:8.1f}", flush=True)


def nominal(name, options):
    data = load(name, options.rows)
    if data is None:
        return print(f"{name:<15} left out: no file in CONVEXROBUST_DATA")
    X, _, y, _ = split(name, *data)
    return nominal_line(name, X, y, 1e-3, options)


def lbfgs(X, y, *, width, beta, n_iter, random_state):
    """Train a network by L-BFGS on hinges of falling smoothing."""
    rng = np.random.default_rng(random_state)
    design = np.hstack([X, np.ones((len(X), 1))])
    hidden = rng.normal(size=(design.shape[1], width)) / np.sqrt(design.shape[1])
    weights = np.append(hidden.ravel(), rng.normal(size=width) / np.sqrt(width))
    for smoothing in SMOOTHINGS:
        weights = minimize(
            weight_decay_objective,
            weights,
            args=(design, y, beta, smoothing),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": n_iter, "maxfun": 2 * n_iter},
        ).x
    return TwoLayerReLU(weights[:-width].reshape(-1, width), weights[-width:, None])


def weight_decay_objective(weights, X, y, beta, smoothing):
    """Return mean hinge + beta / 2 * |weights|^2 of a network, and the gradient.

    The hinge of margin m is (1 - m)^2 / (2 smoothing) where 1 - smoothing < m < 1.
    """
    n, d = X.shape
    hidden = weights[: -(len(weights) // (d + 1))].reshape(d, -1)
    output = weights[hidden.size :]
    active = np.maximum(X @ hidden, 0.0)
    lack = np.maximum(1.0 - y * (active @ output), 0.0)
    short = np.minimum(lack, smoothing)
    losses = lack - short + (short**2 / (2.0 * smoothing) if smoothing > 0.0 else short)
    slopes = -y * (short / smoothing if smoothing > 0.0 else lack > 0.0) / n
    in_hidden = X.T @ (slopes[:, None] * output * (active > 0.0))
    gradient = np.append(in_hidden.ravel(), active.T @ slopes) + beta * weights
    return losses.mean() + beta / 2.0 * (weights @ weights), gradient


def nominal_line(name, X, y, beta, options):
    program = program_of(X, y, 0.0, beta)
    size = {"width": 128, "beta": beta}
    n_runs, n_epochs, n_iter = (2, 20, 20) if options.smoke else (options.runs, 1000, 2000)
    line = f"{name:<15}{len(X):6d}{X.shape[1]:5d}"
    for train, length in ((train_two_layer, {"n_epochs": n_epochs}), (lbfgs, {"n_iter": n_iter})):
        runs = [timed(train, X, y, **size, **length, random_state=seed) for seed in range(n_runs)]
        values = [objective_of(program, network) for network, _ in runs]
        seconds = sum(seconds for _, seconds in runs)
        line += f"{min(values):10.5f}{np.median(values):10.5f}{seconds:7.1f}"
    solution, taken = timed(WorkingSet(1e-5, max_rounds=8).solve, program)
    line += f"{solution.objective:13.5f}{solution.lower_bound:11.5f}{solution.D.shape[1]:6d}"
    return print(f"{line}{taken:7.1f}", flush=True)


def robust_part(sets, options):
    print("robust: best of the certified trainings, WorkingSet in three times the time, and whole")
    columns = "objective    bound    P     s    diff times |"
    print(f"data               n    d   eps   descent     s |{columns}{columns} to beat")
    for name, epsilon in sets.items():
        robust(name, epsilon, options)


def accuracy_part(sets, options):
    print("\naccuracy: descent, WorkingSet, difference, mean and standard error over splits; betas")
    print(
        "data           train  test   eps   interval of its own gates                    "
        "                beta   exact worst cases                                        beta"
    )
    for name, epsilon in sets.items():
        accuracies(name, epsilon, options)


def nominal_part(sets, options):
    print("\nnominal: Adam, L-BFGS (best, median, s of all runs), WorkingSet; hinge, beta 1e-3")
    print(
        "data               n    d      Adam    median      s    L-BFGS    median      s"
        "  working set      bound     P      s"
    )
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 5))
    nominal_line("Gaussian", X, np.where(rng.normal(size=30) > 0, 1, -1), 1e-3, options)
    for name in (name for name in sets if name in ("breast cancer", "heart", "mammographic")):
        nominal(name, options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="certified trainings")
    parser.add_argument("--runs", type=int, default=20, help="runs of Adam and L-BFGS each")
    parser.add_argument("--rows", type=int, default=1500, help="most rows of a data set")
    parser.add_argument("--splits", type=int, default=5, help="of the accuracies, 2 or more")
    parser.add_argument("--train-rows", type=int, default=350, help="at most, of the accuracies")
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS, help="to choose from")
    parser.add_argument("--no-accuracy", dest="accuracy", action="store_false")
    parser.add_argument("--only", choices=("robust", "accuracy", "nominal"))
    parser.add_argument("--data", choices=(*TABLES, *FASHION), help="one data set")
    parser.add_argument("--smoke", action="store_true", help="a part of breast cancer")
    options = parser.parse_args()
    sets = {**TABLES, **FASHION}
    if options.data:
        sets = {options.data: sets[options.data]}
    if options.smoke:
        options.seeds, options.splits, options.rows, options.train_rows = 1, 2, 80, 30
        options.betas = BETAS[-2:]
        sets = {"breast cancer": 0.2}
    warm_up()
    if options.only in (None, "robust"):
        robust_part(sets, options)
    if options.only == "accuracy" or (options.only is None and options.accuracy):
        accuracy_part(sets, options)
    if options.only in (None, "nominal"):
        nominal_part(sets, options)


if __name__ == "__main__":
    main()
