"""Accuracy under attack for each beta, in training and test: why a method wins or loses.

    CONVEXROBUST_DATA=FOLDER python benchmarks/robustness/regularization.py [--data ...] [--smoke]

The splits, methods and betas of `comparison.py`, but every beta is trained on the whole training
part. Accuracies in % under PGD (20 steps, 2 restarts), means over the splits, on the training and
on the test part; then that of the best beta of each split in hindsight, which the choice of beta
by cross-validation can only miss.
"""

import argparse
import os
import warnings

import numpy as np
import torch
from _data import PROBLEMS, split
from comparison import METHODS, VALIDATION, attacked
from sklearn.exceptions import ConvergenceWarning


def accuracies(problem, method, data, seed):
    """Return the accuracies under attack (betas, 2), of the training and of the test part."""
    rows = []
    for beta in problem.betas:
        network = METHODS[method](problem, beta, seed).fit(data.X, data.y).network_
        parts = (data.X, data.y), (data.X_test, data.y_test)
        worst = [attacked(network, *part, problem, VALIDATION) for part in parts]
        rows.append([100.0 * np.mean(losses < 0) for losses in worst])
    return np.array(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["heart", "phoneme", "shoes 196"])
    parser.add_argument("--methods", nargs="+", default=["convex soft", "PGD"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="one set and split, in seconds")
    options = parser.parse_args()
    if options.smoke:
        options.data, options.methods, options.seeds = ["breast cancer"], ["convex soft"], 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    folder = os.environ.get("CONVEXROBUST_DATA")
    for name in options.data:
        problem = PROBLEMS[name]
        betas = "".join(f"{beta:16g}" for beta in problem.betas)
        print(f"{name}: training / test\n{'beta':<14}{betas}   best in hindsight")
        try:
            splits = [split(problem, folder, seed) for seed in range(options.seeds)]
        except FileNotFoundError as error:
            print(f"  left out, missing: {error}")
            continue
        for method in options.methods:
            found = [accuracies(problem, method, s, seed) for seed, s in enumerate(splits)]
            cells = "".join(f"{train:9.1f} /{test:5.1f}" for train, test in np.mean(found, axis=0))
            best = np.mean([rows[:, 1].max() for rows in found])
            print(f"{method:<14}{cells}{best:20.1f}", flush=True)


if __name__ == "__main__":
    main()
