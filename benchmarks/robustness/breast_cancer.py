"""The table of `convexrobust demo`, as mean and standard error over several splits.

    python benchmarks/robustness/breast_cancer.py --seeds 5

All models see the same split, threat model and beta, and are measured by the same suite. The last
lines hold the figures against the goals: certified accuracy of the soft program at least 10 points
above the PGD-trained network's, exact robust accuracy at least as high.
"""

import argparse

import numpy as np

from convexrobust import LpBall
from convexrobust.demo import COLUMNS, load, measure, trainings


def one_split(seed, ball, beta, names):
    """Return for each model its accuracies in percent, in the order of COLUMNS."""
    data = load(seed)
    train = trainings(data, ball, beta, seed)
    accuracy = {name: measure(train[name]()[0], data, ball) for name in names or train}
    return {name: [100 * row[column] for column in COLUMNS] for name, row in accuracy.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--beta", type=float, nargs="+", default=[1e-3, 1e-2])
    parser.add_argument("--smoke", action="store_true", help="one seed, one setting, two models")
    options = parser.parse_args()
    names = None
    if options.smoke:
        options.seeds, options.epsilon, options.beta = 1, [0.3], [1e-2]
        names = ["convex robust, hard", "FGSM training"]

    for epsilon in options.epsilon:
        for beta in options.beta:
            ball = LpBall(np.inf, epsilon)
            runs = [one_split(seed, ball, beta, names) for seed in range(options.seeds)]
            print(f"\nepsilon {epsilon:g}, beta {beta:g}, {options.seeds} splits, accuracy in %")
            print(f"{'model':<20}" + "".join(f"{column:>16}" for column in COLUMNS))
            for name in runs[0]:
                values = np.array([run[name] for run in runs])
                error = values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0
                cells = np.column_stack([values.mean(axis=0), np.broadcast_to(error, len(COLUMNS))])
                print(f"{name:<20}" + "".join(f"{mean:9.1f} +- {se:3.1f}" for mean, se in cells))
            if names is None:
                soft, pgd = (
                    np.mean([run[name] for run in runs], axis=0)
                    for name in ("convex robust, soft", "PGD training")
                )
                ahead = dict(zip(COLUMNS, soft - pgd, strict=True))
                print(
                    f"soft minus PGD training: certified {ahead['certified']:+.1f} (goal +10), "
                    f"exact {ahead['exact']:+.1f} (goal >= 0)"
                )


if __name__ == "__main__":
    main()
