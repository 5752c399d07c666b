"""The main job on data that scikit-learn ships: train, compare, prove, draw.

``convexrobust demo`` trains convexly (standard, hard, soft) and by gradient descent (plain, on
FGSM and on PGD points), measures every network in the same way, and draws how accuracy falls as
the perturbations grow.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_breast_cancer, make_moons
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from convexrobust import attacks, certificates
from convexrobust.backends import numpy as numpy_backend
from convexrobust.displays import RobustAccuracyDisplay, RobustBoundaryDisplay
from convexrobust.estimators import ConvexRobustClassifier
from convexrobust.losses import Hinge
from convexrobust.network import TwoLayerReLU
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso

# Sizes that Clarabel takes in the time of a demo.
N_TRAIN, N_TEST, N_PATTERNS = 150, 200, 10
WIDTH = 64  # of the networks trained by gradient descent
COLUMNS = ("clean", "FGSM", "PGD", "exact", "certified")


class Data(NamedTuple):
    """Standardised features and labels -1 / +1 of a training and a test set."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


@dataclass
class Row:
    """One trained model and what was measured of it."""

    name: str
    network: TwoLayerReLU
    seconds: float
    gap: float | None = None
    objective: float | None = None
    accuracy: dict | None = None


def run(epsilon=0.3, beta=1e-3, seed=0, picture=Path("convexrobust_demo.png")):
    """Train, print the table, write the picture; return the rows of the table.

    Parameters
    ----------
    epsilon : float
        The l-inf radius, in standardised units.
    beta : float
        The weight decay of every model.
    seed : int
        Of the split, the patterns and the networks.
    picture : path
        Where the picture goes.
    """
    _import_extras()
    data, ball = load(seed), LpBall(np.inf, epsilon)
    steps = trainings(data, ball, beta, seed)
    progress = Progress(2 * len(steps) + 2)
    rows = []
    for name, train in steps.items():
        progress.step(f"training {name}")
        start = time.perf_counter()
        network, gap = train()
        rows.append(Row(name, network, time.perf_counter() - start, gap))
    for row in rows:
        progress.step(f"measuring {row.name}")
        row.accuracy = measure(row.network, data, ball)
        row.objective = certified_objective(row.network, data, ball, beta)
    draw(rows, data, epsilon, picture, seed, progress)
    progress.close()
    print(table(rows, epsilon, beta))
    print(f"\nPicture: {picture}")
    return rows


def load(seed) -> Data:
    """Return the breast cancer data, split and standardised by the training part."""
    X, y = load_breast_cancer(return_X_y=True)
    X, X_test, y, y_test = train_test_split(
        X, 2 * y - 1, train_size=N_TRAIN, test_size=N_TEST, stratify=y, random_state=seed
    )
    scaler = StandardScaler().fit(X)
    return Data(scaler.transform(X), y, scaler.transform(X_test), y_test)


def trainings(data, ball, beta, seed):
    """Return for each model a function that trains it and returns the network and its gap."""

    def convex(**parameters):
        model = ConvexRobustClassifier(beta=beta, n_patterns=N_PATTERNS, random_state=seed)
        model.set_params(**{"epsilon": ball.epsilon, "norm": ball.p, **parameters})
        with warnings.catch_warnings():
            # "hard" may come out constant at this epsilon: the table shows it.
            warnings.filterwarnings("ignore", message="The fitted network is constant")
            model.fit(data.X, data.y)
        return model.network_, model.solution_.relative_gap

    def descent(attack):
        from convexrobust.deep import train_two_layer

        options = {"width": WIDTH, "beta": beta, "random_state": seed}
        return train_two_layer(data.X, data.y, ball=ball, attack=attack, **options), None

    return {
        "convex standard": lambda: convex(epsilon=0.0),
        "convex robust, hard": lambda: convex(formulation="hard"),
        "convex robust, soft": convex,
        "robust linear SVM": lambda: (robust_linear_svm(data, ball, beta), None),
        "gradient descent": lambda: descent("none"),
        "FGSM training": lambda: descent("fgsm"),
        "PGD training": lambda: descent("pgd"),
    }


def robust_linear_svm(data, ball, beta) -> TwoLayerReLU:
    r"""Return the linear classifier of least exact worst-case hinge loss, as a network.

    Minimises :math:`\frac1n \sum_k (1 - y_k (w'x_k + b) + \rho(w))_+ + \beta \|(w, b)\|_2`, with
    the support function of the ball. One neuron that is always active computes it.
    """
    import cvxpy as cp

    w, b = cp.Variable(data.X.shape[1]), cp.Variable()
    radius = ball.epsilon * cp.norm1(w)
    hinge = cp.pos(1 - cp.multiply(data.y, data.X @ w + b) + radius)
    penalty = beta * cp.norm(cp.hstack([w, b]))
    cp.Problem(cp.Minimize(cp.mean(hinge) + penalty)).solve(solver="CLARABEL")
    weights = np.append(np.asarray(w.value), np.asarray(b.value))
    shift = 1e3 * np.abs(weights).sum()
    weights[-1] += shift
    return TwoLayerReLU(weights[:, None], np.ones((1, 1)), offset=np.array([-shift]))


def measure(network, data, ball):
    """Return the test accuracies of a network: clean, attacked, exact and certified."""
    X, y = data.X_test, data.y_test
    objective = attacks.worst_margin_objective(network, y)
    strong = attacks.pgd(objective, X, ball, n_steps=50, n_restarts=10, random_state=0)
    exact = certificates.certify(network, X, y, ball, "exact")
    return {
        "clean": np.mean(objective(X)[0] < 0),
        "FGSM": np.mean(objective(attacks.fgsm(objective, X, ball))[0] < 0),
        "PGD": np.mean(objective(strong)[0] < 0),
        "exact": np.mean(exact.status == certificates.Verdict.ROBUST),
        "certified": np.mean(certificates.margin_bounds(network, X, y, ball) > 0),
    }


def certified_objective(network, data, ball, beta):
    """Return the certified worst-case training objective of a network, whoever trained it."""
    V, W, D = network.to_convex(data.X, np.zeros((len(data.X), 0), dtype=np.int8))
    design = network.design(data.X)
    program = ConvexProgram(design, data.y, D, Hinge(), GroupLasso(beta), ball)
    if network.offset.any():  # the linear model's neuron is only a device: its bias has no price
        return None
    return float(program.objective(numpy_backend, V, W))


def table(rows, epsilon, beta) -> str:
    """Return the table as text."""
    head = (
        f"Breast cancer (scikit-learn), {N_TRAIN} training and {N_TEST} test points, standardised; "
        f"l-inf epsilon {epsilon:g}, beta {beta:g}.\n"
        "Accuracy on the test points in %: clean, under attack, exact worst case, certified by the "
        "interval bound.\nObjective: certified worst-case training objective. Gap: proven distance "
        "to the optimum over the patterns.\n\n"
    )
    names = "  ".join(f"{column:>9}" for column in (*COLUMNS, "objective", "gap", "neurons", "s"))
    lines = [f"{'model':<20}  {names}", "-" * (22 + len(names))]
    for row in rows:
        cells = [f"{100 * row.accuracy[column]:.1f}" for column in COLUMNS]
        cells.append("-" if row.objective is None else f"{row.objective:.4f}")
        cells.append("-" if row.gap is None else f"{row.gap:.0e}")
        cells += [f"{row.network.n_neurons}", f"{row.seconds:.1f}"]
        lines.append(f"{row.name:<20}  " + "  ".join(f"{cell:>9}" for cell in cells))
    return head + "\n".join(lines)


# ------------------------------------------------------------------------------ the picture

_COLORS = {
    "convex robust, soft": "#0072b2",
    "PGD training": "#d55e00",
    "convex standard": "#009e73",
    "gradient descent": "#999999",
}


def draw(rows, data, epsilon, picture, seed, progress):
    """Write the picture: accuracy against epsilon, and two decision boundaries."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    progress.step("drawing accuracy against epsilon")
    _draw_curves(left, {row.name: row.network for row in rows}, data, epsilon)
    progress.step("drawing decision boundaries")
    X, y = make_moons(36, noise=0.12, random_state=seed)
    X = StandardScaler().fit_transform(X)
    for axes, radius, title in ((middle, 0.0, "standard"), (right, 0.25, "robust")):
        model = ConvexRobustClassifier(radius, n_patterns=40, random_state=seed).fit(X, y)
        ball = LpBall(np.inf, 0.25)
        shown = RobustBoundaryDisplay.from_estimator(
            model, X, y, ball=ball, method="interval", ax=axes
        )
        axes.get_legend().remove()
        axes.set(xticks=[], yticks=[], xlabel="dashed: not proven", ylabel="")
        axes.set_title(f"convex {title}: {shown.robust.mean():.0%} of the boxes proven")
    figure.savefig(picture, dpi=110)


def _draw_curves(axes, networks, data, epsilon):
    """Draw for some models the band from certified to attacked accuracy."""
    for name, color in _COLORS.items():
        RobustAccuracyDisplay.from_estimator(
            networks[name],
            data.X_test,
            data.y_test,
            epsilons=np.linspace(0.0, 2.0 * epsilon, 17),
            ball=LpBall(np.inf, epsilon),
            attack=partial(attacks.pgd, n_restarts=2, random_state=0),
            name=name,
            ax=axes,
            color=color,
        )
    axes.axvline(epsilon, color="black", linewidth=0.8, linestyle=":")
    axes.text(epsilon, 0.02, " trained here", fontsize=9)
    axes.set(ylabel="accuracy on test points", title="from certified to attacked accuracy")


class Progress:
    """A progress bar on one line of the terminal; one line a step where there is no terminal."""

    def __init__(self, n_steps):
        self.n_steps, self.done = n_steps, 0
        self.live = sys.stderr.isatty()

    def step(self, what):
        """Announce the step that begins now."""
        bar = ("#" * self.done).ljust(self.n_steps, ".")
        end = "" if self.live else "\n"
        start = "\r\x1b[K" if self.live else ""
        print(f"{start}[{bar}] {what}", end=end, file=sys.stderr, flush=True)
        self.done += 1

    def close(self):
        """Clear the line."""
        print("\r\x1b[K" if self.live else "", end="", file=sys.stderr, flush=True)


def _import_extras():
    """Import what is loaded lazily, so that no model's seconds count it, or say what is missing."""
    for module in ("cvxpy", "matplotlib", "torch"):
        try:
            import_module(module)
        except ImportError as error:
            raise ImportError(
                f"the demo needs {module}: pip install 'convexrobust[torch,plot]'."
            ) from error
