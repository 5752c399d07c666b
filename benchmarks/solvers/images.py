"""The classifier on images: Fashion-MNIST T-shirt against shirt, all 12 000 at 784 pixels.

    python benchmarks/solvers/images.py [--smoke] [--epsilon E] [--beta B]

`ConvexRobustClassifier` with its defaults against PGD training of 64
neurons: seconds, peak memory of the process so far, certified objective and gap, and accuracy on
the 2000 test images, clean, under attack and certified. Pixels in [0, 1] are centred and not
scaled, so that epsilon is in units of the full range. Goal: it finishes on two cores within 8 GB.

The images are read from the folder CONVEXROBUST_DATA; with --smoke random ones will do.
"""

import argparse
import os
import resource
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from convexrobust import ConvexRobustClassifier, LpBall
from convexrobust.attacks import pgd, worst_margin_objective
from convexrobust.certificates import margin_bounds
from convexrobust.deep import train_two_layer


def images(part):
    """Return the images (n, 784) of two classes in [0, 1] and their labels -1 / +1."""
    file = Path(os.environ.get("CONVEXROBUST_DATA", ".")) / f"fashion_mnist_{part}.npz"
    with np.load(file) as data:
        pixels, labels = (data[key] for key in list(data)[:2])
    two = np.isin(labels, (0, 6))
    return pixels[two].reshape(-1, 784) / 255.0, np.where(labels[two] == 6, 1, -1)


def random_images(n):
    """Return small random images with labels that depend on two pixels."""
    X = np.random.default_rng(n).uniform(size=(n, 16))
    return X, np.where(X[:, 0] > X[:, 1], 1, -1)


def print_row(name, network, seconds, X, y, ball, more=""):
    """Print the accuracies of a network on the test images."""
    objective = worst_margin_objective(network, y)
    attacked = objective(pgd(objective, X, ball, random_state=0))[0] < 0.0
    clean = y * network.predict(X)[:, 0] > 0.0
    certified = margin_bounds(network, X, y, ball) > 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{name:<14}{network.n_neurons:8d}{seconds:9.1f}{peak:7.2f}{clean.mean():9.1%}"
        f"{attacked.mean():9.1%}{certified.mean():11.1%}  {more}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small random images")
    parser.add_argument("--epsilon", type=float, default=0.02)
    parser.add_argument("--beta", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=30, help="of PGD training, in batches of 200")
    options = parser.parse_args()
    if options.smoke:
        (X, y), (X_test, y_test), options.epochs = random_images(60), random_images(40), 2
    else:
        (X, y), (X_test, y_test) = images("train"), images("test")
    mean = X.mean(axis=0)
    X, X_test, ball = X - mean, X_test - mean, LpBall(np.inf, options.epsilon)
    print(f"{X.shape[0]} images, {X.shape[1]} pixels, epsilon {ball.epsilon}, beta {options.beta}")
    print("              neurons  seconds    GiB    clean      PGD  certified")
    warnings.simplefilter("ignore", ConvergenceWarning)  # the row has the gap
    clock = time.perf_counter()
    model = ConvexRobustClassifier(options.epsilon, beta=options.beta, random_state=0).fit(X, y)
    seconds = time.perf_counter() - clock
    more = f"objective {model.objective_:.4f}, lower bound {model.lower_bound_:.4f}"
    print_row("convex, soft", model.network_, seconds, X_test, y_test, ball, more)
    clock = time.perf_counter()
    settings = {"beta": options.beta, "n_epochs": options.epochs, "batch_size": 200}
    network = train_two_layer(X, y, ball=ball, attack="pgd", **settings)
    print_row("PGD training", network, time.perf_counter() - clock, X_test, y_test, ball)


if __name__ == "__main__":
    main()
