"""Convex robust training against every other way to train a two-layer network, on real data.

    CONVEXROBUST_DATA=FOLDER python benchmarks/robustness/comparison.py --out RESULTS
    python benchmarks/robustness/comparison.py --data "breast cancer" --methods "convex soft" PGD

All methods see the same splits and the same threat model, and each has one thing tuned, its beta,
in the same way: by the accuracy under PGD in two-fold cross-validation on the training part
(for convex programs by `RegularizationPathCV`, whose fits in the folds end at a wider gap).
Everything else is as the package has it by default, except that exchange stops after the round in
which ten seconds are over. Gradient descent has networks of 64 neurons.

Columns: test accuracy in %, as it is; under the worst of FGSM, PGD (50 steps, 10 restarts) and
APGD for each point; exact (decided by branch and bound, five seconds a point; what stays open
counts as broken, and is shown in brackets where there is any); proven by the linear relaxation of
the network (LP), and by the interval bound (certified); neurons; CPU seconds of one training, and
of all of them with the tuning. For the regression: the root of the mean squared worst-case error in
units of the target's standard deviation, where "attacked" is a lower bound of "exact", and "LP" and
"certified" are upper ones. Means and standard errors over the seeds.

Every run becomes a line of RESULTS/<data>.jsonl at once; what is there is not run again, so that
an interrupted suite goes on. A run that fails is recorded, and `--retry` tries it again. Data whose
files are missing are named and left out.
"""

import argparse
import json
import os
import tempfile
import time
import traceback
import warnings
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from _data import PROBLEMS, split
from _report import records, report
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, StratifiedKFold

import convexrobust
from convexrobust import (
    ConvexRobustClassifier,
    ConvexRobustRegressor,
    Exchange,
    RegularizationPathCV,
    attacks,
    certify,
)
from convexrobust.certificates import output_interval
from convexrobust.deep import AdversarialClassifier, AdversarialRegressor
from convexrobust.demo import Data, robust_linear_svm
from convexrobust.evaluation import evaluate_robustness

CONVEX = (ConvexRobustClassifier, ConvexRobustRegressor)
SUITE = {"fgsm": {}, "pgd": {"n_steps": 50, "n_restarts": 10}, "apgd": {}}
VALIDATION = {"n_steps": 20, "n_restarts": 2, "random_state": 0}  # the attack that chooses beta
TIME_LIMIT = 5.0  # seconds for an exact decision
SECONDS = 10.0  # of exchange, after which the round it is in is the last


# ------------------------------------------------------------------ the methods


def convex(problem, beta, seed, **parameters):
    """Return an estimator that trains by convex optimisation."""
    kind = ConvexRobustRegressor if problem.regression else ConvexRobustClassifier
    options = {
        "epsilon": problem.epsilon,
        "beta": beta,
        "bounds": problem.ball.bounds,
        "n_patterns": problem.n_patterns,
        "random_state": seed,
    }
    return kind(**options | parameters)


def exchange(problem, beta, seed):
    """Return an estimator trained by exchange, which stops after some seconds of rounds."""
    solver = Exchange(inner="attack", patterns="grow", time_limit=SECONDS, random_state=seed)
    return convex(problem, beta, seed, formulation="exchange", solver=solver)


def descent(problem, beta, seed, method):
    """Return an estimator that trains by gradient descent."""
    kind = AdversarialRegressor if problem.regression else AdversarialClassifier
    return kind(
        problem.epsilon, beta=beta, method=method, bounds=problem.ball.bounds, random_state=seed
    )


class RobustLinearSVM(BaseEstimator):
    """The linear classifier of least exact worst-case hinge loss, as a network."""

    def __init__(self, problem, beta, seed):
        self.problem, self.beta = problem, beta

    def fit(self, X, y):
        data = Data(X, np.where(y == y.max(), 1, -1), None, None)
        self.network_ = robust_linear_svm(data, self.problem.ball, self.beta)
        return self


METHODS = {
    "convex standard": partial(convex, epsilon=0.0),
    "convex hard": partial(convex, formulation="hard"),
    "convex soft": convex,
    "convex exchange": exchange,
    "robust linear SVM": RobustLinearSVM,
    "gradient descent": partial(descent, method="standard"),
    "FGSM": partial(descent, method="fgsm"),
    "PGD": partial(descent, method="pgd"),
    "TRADES": partial(descent, method="trades"),
    "DALE": partial(descent, method="dale"),
    "Fast-BAT": partial(descent, method="fast-bat"),
    "SSDS": partial(descent, method="ssds"),
    "certified training": partial(descent, method="certified"),
}


# ------------------------------------------------------------------ one run


def run_one(name, method, seed, options):
    """Tune, train and measure; return the figures of one run."""
    problem = PROBLEMS[name]
    data = split(problem, options.folder, seed)
    make = partial(METHODS[method], problem, seed=seed)
    start = time.process_time()
    scores = validated(problem, make, data, seed)
    beta = problem.betas[int(np.argmax(scores))]  # the smallest of those that are equally good
    tuning = time.process_time() - start
    start = time.process_time()
    network = make(beta=beta).fit(data.X, data.y).network_
    seconds = time.process_time() - start
    measure = residuals if problem.regression else accuracies
    return measure(network, data, problem.ball) | {
        "beta": beta,
        "validated": list(scores),
        "neurons": network.n_neurons,
        "seconds": seconds,
        "seconds_tuned": seconds + tuning,
    }


def validated(problem, make, data, seed):
    """Return for each beta the mean score under attack in cross-validation."""
    if len(problem.betas) == 1:
        return [0.0]  # nothing is to choose
    folds = (KFold if problem.regression else StratifiedKFold)(2, shuffle=True, random_state=seed)

    def score(model, X, y):
        worst = attacked(model.network_, X, y, problem, VALIDATION)
        return float(-root_mean_square(worst) if problem.regression else np.mean(worst < 0))

    model = make(beta=problem.betas[0])
    if isinstance(model, CONVEX) and model.formulation != "exchange":
        options = {"betas": problem.betas, "cv": folds, "scoring": score, "refit": False}
        scores = RegularizationPathCV(model, **options).fit(data.X, data.y).scores_
    else:
        scores = [
            [
                score(make(beta=beta).fit(data.X[train], data.y[train]), data.X[test], data.y[test])
                for beta in problem.betas
            ]
            for train, test in folds.split(data.X, data.y)
        ]
    return np.mean(scores, axis=0).tolist()


def attacked(network, X, y, problem, options):
    """Return, for each row, the largest loss that PGD found: of the margin or the residual."""
    task = "regression" if problem.regression else "classification"
    objective = attacks.worst_margin_objective(network, labels(network, y, task), task=task)
    return objective(attacks.pgd(objective, X, problem.ball, **options))[0]


def labels(network, y, task="classification"):
    """Return class numbers as the labels of a network: -1 and 1 for one output."""
    return 2 * y - 1 if task == "classification" and network.n_outputs == 1 else y


def accuracies(network, data, ball):
    """Return the test accuracies of a network, in %."""
    table = evaluate_robustness(
        {"network": network},
        data.X_test,
        labels(network, data.y_test),
        ball.epsilon,
        norm=ball.p,
        bounds=ball.bounds,
        suite=SUITE,
        time_limit=TIME_LIMIT,
    )
    found = {row.measure: 100.0 * row.accuracy for row in table.rows}
    undecided = sum(row.undecided for row in table.rows if row.measure == "exact")
    lp = certify(network, data.X_test, labels(network, data.y_test), ball, "lp")
    return {
        "clean": found["clean"],
        "attacked": found["worst attack"],
        "exact": found["exact"],
        "lp": 100.0 * np.mean(lp.status == "robust"),
        "certified": found["certified"],
        "undecided": 100.0 * undecided / len(data.y_test),
    }


def residuals(network, data, ball):
    """Return the root mean squares of the test residuals: as they are, and at their worst."""
    X, y = data.X_test, data.y_test
    interval = partial(output_interval, network, X, ball, time_limit=TIME_LIMIT)
    worst = {how: largest_residuals(*interval(how), y) for how in ("exact", "lp", "interval")}
    objective = attacks.worst_margin_objective(network, y, task="regression")
    found = objective(attacks.pgd(objective, X, ball, **SUITE["pgd"], random_state=0))[0]
    return {
        "clean": root_mean_square(objective(X)[0]),
        "attacked": root_mean_square(found),
        "exact": root_mean_square(worst["exact"]),
        "lp": root_mean_square(worst["lp"]),
        "certified": root_mean_square(worst["interval"]),
        "undecided": 0.0,  # what is not decided in time is counted at its bound
    }


def largest_residuals(low, high, y):
    """Return the largest residuals over intervals of the output."""
    return np.maximum(high[:, 0] - y, y - low[:, 0])


def root_mean_square(values):
    """Return the root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


# ------------------------------------------------------------------ the suite


def completed(name, method, seed, options):
    """Return the record of a run: from the file of its data, or by running it."""
    problem = PROBLEMS[name]
    setting = {
        "data": name,
        "method": method,
        "seed": seed,
        "epsilon": problem.epsilon,
        "n_train": problem.n_train,
        "betas": list(problem.betas),
        "n_patterns": problem.n_patterns,
    }
    file = options.out / f"{slug(name)}.jsonl"
    for record in records(file):
        if record["setting"] == setting and not (options.retry and "error" in record):
            return record
    try:
        with warnings.catch_warnings():
            # Training that stops early is measured as it is; constant networks show in the table.
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", message="The fitted network is constant")
            result = run_one(name, method, seed, options)
    except Exception as error:  # recorded, so that one failure does not end the suite
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    record = {"setting": setting, **result, "versions": convexrobust.versions()}
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")
    return record


def slug(name):
    """Return a name as a file name."""
    return name.replace(" ", "-").replace("/", "-")


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", default=os.environ.get("CONVEXROBUST_DATA"))
    parser.add_argument("--out", type=Path, default=Path("build/comparison"))
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--smoke", action="store_true", help="small data, few methods, one seed")
    return parser.parse_args()


def available(options):
    """Return the data whose files are there, and say which are left out and why."""
    names = []
    for name in options.data:
        try:
            PROBLEMS[name].load(options.folder)
        except (FileNotFoundError, ValueError) as error:
            print(f"left out: {name} ({error})", flush=True)
        else:
            names.append(name)
    return names


def smoke(options):
    """Shrink the suite to what shows that it runs."""
    for name in ("breast cancer", "diabetes"):
        PROBLEMS[name] = replace(PROBLEMS[name], n_train=40, n_test=20, betas=(1e-3, 1e-2))
    options.data, options.methods = ["breast cancer", "diabetes"], ["convex soft", "FGSM"]
    options.seeds = 1


def main():
    options = parsed()
    with tempfile.TemporaryDirectory() as temporary:
        if options.smoke:
            smoke(options)
            options.out = Path(temporary)
        options.out.mkdir(parents=True, exist_ok=True)
        # Seed by seed, so that an interrupted suite has all data.
        runs = [] if options.report else product(range(options.seeds), available(options))
        for seed, name in runs:
            for method in applicable(name, options.methods):
                record = completed(name, method, seed, options)
                state = record.get("error") or f"{record['seconds_tuned']:.0f} s"
                print(f"{name}, {method}, seed {seed}: {state}", flush=True)
        found = [r for name in PROBLEMS for r in records(options.out / f"{slug(name)}.jsonl")]
        print("\n" + report(found, [name for name, p in PROBLEMS.items() if p.regression]))


def applicable(name, methods):
    """Return the methods that there are for some data."""
    problem = PROBLEMS[name]
    without = set()
    if problem.regression:
        without = {"robust linear SVM", "certified training"}
    elif name == "fashion 10 classes":
        without = {"robust linear SVM", "convex exchange"}
    return [method for method in methods if method not in without]


if __name__ == "__main__":
    main()
