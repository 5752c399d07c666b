"""`ConvexRobustClassifier(epsilon=0.1).fit` on breast cancer, against adversarial training.

    python benchmarks/solvers/default_fit.py [--smoke] [--seeds K]

All 569 rows, standardised; hinge loss and the beta of the default. Each fit has a line: seconds,
the certified objective and its lower bound (their gap is relative to the objective of the zero
network, 1), and the objective under attack by PGD-100 with 3 starts. Below it, networks of 128
neurons trained on 10-step PGD examples for more and more epochs (1.4 times as many), each from the
start, until their objective under the same attack is as low, or one took 40 times the seconds.
Goals: a gap of 1e-2 at most, and no more seconds than that training takes.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import numpy as np
from exchange import worst_case
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

from convexrobust import ConvexRobustClassifier, LpBall
from convexrobust.deep import train_two_layer

FIRST_EPOCHS, GROWTH = 25, 2**0.5
PATIENCE = 40.0  # times the seconds of the default fit


def default_fit(X, y, ball, seed):
    """Fit, print the line, and return the seconds, the objective under attack and beta."""
    clock = time.perf_counter()
    model = ConvexRobustClassifier(epsilon=ball.epsilon, random_state=seed).fit(X, y)
    seconds = time.perf_counter() - clock
    found = model.solution_
    beta = model.get_params()["beta"]
    attacked = worst_case(model.network_, X, y, ball, beta)[1]
    print(
        f"fit {seed}: {seconds:.2f} s, objective {found.objective:.5f}, bound "
        f"{found.lower_bound:.5f}, gap {found.gap:.1e}, under attack {attacked:.5f}, "
        f"{model.network_.n_neurons} neurons",
        flush=True,
    )
    return seconds, attacked, beta


def compare(X, y, ball, seed):
    """Print a fit and the trainings against it."""
    seconds, target, beta = default_fit(X, y, ball, seed)
    n_epochs, last = FIRST_EPOCHS, 0.0
    options = {"width": 128, "ball": ball, "attack": "pgd", "beta": beta, "random_state": seed}
    while last < PATIENCE * seconds:
        clock = time.perf_counter()
        network = train_two_layer(X, y, n_epochs=n_epochs, **options)
        last = time.perf_counter() - clock
        attacked = worst_case(network, X, y, ball, beta)[1]
        reached = "reached" if attacked <= target else ""
        print(
            f"  PGD training, {n_epochs:6d} epochs: {last:7.2f} s ({last / seconds:5.1f} times), "
            f"under attack {attacked:.5f} {reached}",
            flush=True,
        )
        if reached:
            return
        n_epochs = round(GROWTH * n_epochs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="60 rows")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    X, y = load_breast_cancer(return_X_y=True)
    X, y = StandardScaler().fit_transform(X), np.where(y == 1, 1, -1)
    ball = LpBall(np.inf, 0.1)
    ConvexRobustClassifier(epsilon=0.1).fit(X[:200], y[:200])  # imports and compilation
    train_two_layer(X[:20], y[:20], ball=ball, attack="pgd", n_epochs=1)
    for seed in range(1 if options.smoke else options.seeds):
        compare(*((X[:60], y[:60]) if options.smoke else (X, y)), ball, seed)


if __name__ == "__main__":
    main()
