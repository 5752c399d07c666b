"""Exact verification: how many samples are decided, how fast, and against a plain MILP.

    python benchmarks/certification/verification.py

A convexly trained and a PGD-trained network (128 neurons) for each data set, l-inf; up to 200 test
samples of `certify(..., "exact")`, with 10 s a sample. The MILP has interval big-M rows for the
neurons that change sign, minimises the margin, and is solved by HiGHS (scipy.optimize.milp), one
sample after the other, with the same limit a sample. Misclassified samples are left out of both.
Goals: all samples of convexly trained networks decided, median under 50 ms; at least 95 % of those
of PGD-trained ones; the verdicts of the MILP, at least 10 times faster in total. The last lines are
the speed of interval certificates (goal: 1e5 samples a second at 100 features and 50 neurons).

Fashion-MNIST is read from the folder CONVEXROBUST_DATA and left out without.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from convexrobust import ConvexRobustClassifier, LpBall, TwoLayerReLU
from convexrobust.certificates import certify, margin_bounds
from convexrobust.deep import train_two_layer


def breast_cancer():
    X, y = load_breast_cancer(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=200, stratify=y, random_state=0)
    scaler = StandardScaler().fit(X)
    return scaler.transform(X), 2 * y - 1, scaler.transform(X_test), 2 * y_test - 1


def digits():
    X, y = load_digits(return_X_y=True)
    two = np.isin(y, (3, 8))
    y = np.where(y[two] == 8, 1, -1)
    X, X_test, y, y_test = train_test_split(
        X[two] / 16.0, y, test_size=157, stratify=y, random_state=0
    )
    return X, y, X_test, y_test


def fashion():
    folder, parts = Path(os.environ.get("CONVEXROBUST_DATA", ".")), []
    if not (folder / "fashion_mnist_test.npz").exists():
        return None
    for part, n in (("train", 600), ("test", 200)):
        with np.load(folder / f"fashion_mnist_{part}.npz") as data:
            two = np.isin(data["y"], (0, 6))
            images, labels = data["X"][two][:n], data["y"][two][:n]
        parts.append(images.reshape(n, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(n, 196) / 255.0)
        parts.append(np.where(labels == 6, 1, -1))
    return tuple(parts)


SETS = {
    "breast cancer": (breast_cancer, 0.3),
    "digits 3/8": (digits, 0.1),
    "fashion 0/6": (fashion, 0.04),
}


def networks(X, y, ball, smoke):
    """Return for each way of training its network."""
    convex = ConvexRobustClassifier(ball.epsilon, beta=1e-2, random_state=0)
    if smoke:
        convex.set_params(n_patterns=5)
    epochs = 20 if smoke else 150
    options = {"width": 128, "ball": ball, "attack": "pgd", "n_epochs": epochs}
    return {
        "convex": convex.fit(X, y).network_,
        "PGD-trained": train_two_layer(X, y, **options, random_state=0),
    }


def milp_verdict(network, x, label, epsilon, time_limit):
    """Return the verdict of a plain mixed-integer program: all unstable neurons have a binary."""
    d, center = network.n_features, network.design(x[None])[0]
    hidden, output = network.hidden[:d], label * network.output[:, 0]
    at_center, reach = center @ network.hidden, epsilon * np.abs(network.hidden[:d]).sum(axis=0)
    on, moving = at_center >= reach, np.abs(at_center) < reach
    low, high, m = (at_center - reach)[moving], (at_center + reach)[moving], int(moving.sum())
    constant = label * network.offset[0] + output[on] @ at_center[on]
    cost = np.concatenate([hidden[:, on] @ output[on], output[moving], np.zeros(m)])
    G, eye, zero = hidden[:, moving].T, np.eye(m), np.zeros((m, m))
    rows = np.vstack(
        [  # h >= t, h <= t - low (1 - a), h <= high a
            np.hstack([G, -eye, zero]),
            np.hstack([-G, eye, -np.diag(low)]),
            np.hstack([np.zeros_like(G), eye, -np.diag(high)]),
        ]
    )
    limits = np.concatenate([-at_center[moving], at_center[moving] - low, np.zeros(m)])
    result = milp(
        cost,
        integrality=np.repeat([0, 1], [d + m, m]),
        bounds=Bounds(
            np.repeat([-epsilon, 0.0, 0.0], [d, m, m]),
            np.concatenate([np.full(d, epsilon), np.maximum(high, 0.0), np.ones(m)]),
        ),
        constraints=LinearConstraint(rows, -np.inf, limits) if m else None,
        options={"time_limit": time_limit},
    )
    bound = result.mip_dual_bound if m else result.fun
    if bound is not None and constant + bound > 0.0:
        return "robust"
    if result.x is not None and label * network.predict((x + result.x[:d])[None])[0, 0] <= 0.0:
        return "broken"
    return "unknown"


def line(name, how, network, X, y, epsilon, options):
    right = y * network.predict(X)[:, 0] > 0.0
    X, y = X[right][: options.samples], y[right][: options.samples]
    start = time.perf_counter()
    found = certify(network, X, y, LpBall(np.inf, epsilon), "exact", time_limit=10.0)
    seconds = time.perf_counter() - start
    share = [np.mean(found.status == status) for status in ("robust", "broken", "unknown")]
    start = time.perf_counter()
    theirs = [
        milp_verdict(network, x, label, epsilon, options.limit)
        for x, label in zip(X, y, strict=True)
    ]
    milp_seconds, theirs = time.perf_counter() - start, np.array(theirs)
    both = (theirs != "unknown") & (found.status != "unknown")
    ms = 1e3 * found.seconds
    print(
        f"{name:<15}{how:<13}{network.n_neurons:5d}{epsilon:6.2f}{len(X):5d}"
        f"{share[0]:8.1%}{share[1]:8.1%}{share[2]:8.1%}{np.median(ms):9.2f}{ms.max():9.1f}"
        f"{seconds:9.2f}{np.mean(theirs == 'unknown'):9.1%}{milp_seconds:9.2f}"
        f"{np.sum(theirs[both] != found.status[both]):7d}{milp_seconds / seconds:9.0f}x",
        flush=True,
    )


def interval_speed(n):
    """Print how many samples the interval certificate takes in a second."""
    rng = np.random.default_rng(0)
    network = TwoLayerReLU(rng.normal(size=(101, 50)), rng.normal(size=(50, 1)))
    X, y = rng.normal(size=(n, 100)), rng.choice([-1, 1], n)
    for p in (np.inf, 2, 1):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            margin_bounds(network, X, y, LpBall(p, 0.01))
            times.append(time.perf_counter() - start)
        print(f"interval, l{p:g}: {n / min(times):.3g} samples a second (best of 3)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200, help="most test samples")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds a sample for the MILP")
    parser.add_argument("--smoke", action="store_true", help="a few samples, short trainings")
    options = parser.parse_args()
    if options.smoke:
        options.samples, options.limit = 5, 0.5

    print(
        "                                          ours                                       "
        "              plain MILP"
    )
    print(
        f"{'data':<15}{'trained':<13}{'m':>5}{'eps':>6}{'n':>5}{'robust':>8}{'broken':>8}"
        f"{'unknown':>8}{'med ms':>9}{'max ms':>9}{'total s':>9}{'unknown':>9}{'total s':>9}"
        f"{'differ':>7}{'ratio':>10}"
    )
    for name, (load, epsilon) in SETS.items():
        data = load()
        if data is None:
            print(f"{name:<15}left out: no file in CONVEXROBUST_DATA")
            continue
        X, y, X_test, y_test = data
        for how, network in networks(X, y, LpBall(np.inf, epsilon), options.smoke).items():
            line(name, how, network, X_test, y_test, epsilon, options)
    interval_speed(2000 if options.smoke else 100_000)


if __name__ == "__main__":
    main()
