"""Our PGD and APGD against foolbox's PGD, at equal numbers of steps and restarts.

    python benchmarks/certification/attacks.py [--smoke] [--steps 40] [--restarts 1 5]

Each table: a PGD-trained two-layer network in single precision and its test data, robust accuracy
(lower is the stronger attack) and seconds of processor time, least of several runs, single thread.
foolbox climbs the cross-entropy, with its own step and with the step 2.5 / steps of Madry et al.,
and sees a network of one output as one of two. Goal: robust accuracy no higher than foolbox's
within 0.5 points, and no slower.

The images are read from the folder CONVEXROBUST_DATA; a data set that is not there is left out.
"""

import argparse
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from convexrobust import Logistic, LpBall
from convexrobust.deep import as_two_logit, attacks, train_two_layer

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports names that SciPy is about to drop
        import foolbox
except ImportError:
    foolbox = None


def breast_cancer():
    X, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(X), 2 * y - 1, 1, None


def digits():
    X, y = load_digits(return_X_y=True)
    return X / 16.0, y, 10, (0.0, 1.0)


def fashion(classes=None, n_most=6000):
    """Return pixels of Fashion-MNIST in [0, 1], of all or of two classes."""
    with np.load(Path(os.environ.get("CONVEXROBUST_DATA", ".")) / "fashion_mnist_test.npz") as data:
        pixels, labels = (data[key] for key in list(data)[:2])
    keep = np.flatnonzero(np.isin(labels, classes or range(10)))[:n_most]
    X, y = pixels[keep].reshape(-1, 784) / 255.0, labels[keep].astype(np.int64)
    if classes:
        return X, np.where(y == classes[1], 1, -1), 1, (0.0, 1.0)
    return X, y, 10, (0.0, 1.0)


PROBLEMS = {
    "breast cancer": (breast_cancer, {np.inf: 0.2, 2: 0.6}),
    "digits, 10 classes": (digits, {np.inf: 0.1, 2: 0.6}),
    "fashion 0/6": (lambda: fashion((0, 6)), {np.inf: 0.04, 2: 0.8}),
    "fashion, 10 classes": (fashion, {np.inf: 0.04, 2: 0.8}),
}


def problem(load, p, epsilon, n_epochs):
    """Return a PGD-trained model in single precision, test data and the ball."""
    X, y, n_outputs, bounds = load()
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, random_state=0, stratify=y)
    ball = LpBall(p, epsilon, bounds)
    options = {"n_outputs": n_outputs, "loss": Logistic(), "n_epochs": n_epochs, "batch_size": 256}
    network = train_two_layer(X, y, ball=ball, attack="pgd", **options)
    model = network.to_torch().float().eval()
    return model, torch.as_tensor(X_test, dtype=torch.float32), torch.as_tensor(y_test), ball


def foolbox_attack(model, x, y, ball, step, n_steps, n_restarts):
    """Return a function that runs foolbox's PGD and returns its points."""
    if model[-1].out_features == 1:
        model, y = as_two_logit(model).eval(), (y > 0).long()
    bounds = (-1e6, 1e6) if ball.bounds is None else tuple(float(end) for end in ball.bounds)
    wrapped = foolbox.PyTorchModel(model, bounds=bounds, device="cpu")
    kind = foolbox.attacks.LinfPGD if ball.p == np.inf else foolbox.attacks.L2PGD
    options = {"steps": n_steps} | ({} if step is None else {"rel_stepsize": step})
    attack = kind(**options)
    attack = attack.repeat(n_restarts) if n_restarts > 1 else attack
    return lambda: attack(wrapped, x, y, epsilons=ball.epsilon)[1]


def runs(model, x, y, ball, n_steps, n_restarts):
    """Return the attacks to compare, by name."""
    options = {"n_steps": n_steps, "n_restarts": n_restarts, "random_state": 0}
    table = {}
    if foolbox is not None:
        for name, step in (("foolbox PGD", None), ("foolbox PGD, 2.5/steps", 2.5 / n_steps)):
            table[name] = foolbox_attack(model, x, y, ball, step, n_steps, n_restarts)
    for name in ("pgd", "apgd"):
        for loss in ("margin", "cross-entropy"):
            attack = getattr(attacks, name)
            table[f"{name}, {loss}"] = lambda attack=attack, loss=loss: attack(
                model, x, y, ball, loss=loss, **options
            )
    return table


def robust_accuracy(model, x, y):
    with torch.no_grad():
        outputs = model(x)
    right = outputs[:, 0] * y > 0 if outputs.shape[1] == 1 else outputs.argmax(dim=1) == y
    return 100.0 * right.double().mean().item()


def timed(table, n_repeats):
    """Return the points of each attack and its least seconds; attacks take turns."""
    points, seconds = {}, dict.fromkeys(table, np.inf)
    for _ in range(n_repeats):
        for name, run in table.items():
            start = time.process_time()
            points[name] = run()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return points, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one small problem, few steps")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--restarts", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="the first letters of the problems to run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    problems, n_epochs = dict(PROBLEMS), 30
    if options.smoke:
        problems, n_epochs = {"breast cancer": (breast_cancer, {np.inf: 0.2})}, 3
        options.steps, options.restarts, options.repeats = 5, [1], 1
    if foolbox is None:
        print("foolbox is not installed (pip install foolbox): ours alone.")

    for name, (load, radii) in problems.items():
        if options.only and not name.startswith(options.only):
            continue
        for p, epsilon in radii.items():
            try:
                model, x, y, ball = problem(load, p, epsilon, n_epochs)
            except FileNotFoundError:
                print(f"\n{name}: not in the folder CONVEXROBUST_DATA")
                break
            clean = robust_accuracy(model, x, y)
            for n_restarts in options.restarts:
                print(
                    f"\n{name}, l{p} {epsilon:g}, {len(x)} points, {options.steps} steps, "
                    f"{n_restarts} start(s); clean {clean:.1f} %"
                )
                table = runs(model, x, y, ball, options.steps, n_restarts)
                points, seconds = timed(table, options.repeats)
                for attack, found in points.items():
                    accuracy = robust_accuracy(model, found, y)
                    print(f"  {attack:<26}{accuracy:8.1f} %{seconds[attack]:10.3f} s", flush=True)


if __name__ == "__main__":
    main()
