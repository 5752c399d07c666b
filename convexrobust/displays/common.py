"""What the displays share: axes and colours, and what they ask a model for."""

from __future__ import annotations

import numpy as np

from convexrobust.perturbations import LpBall

# The colours of Okabe and Ito, which people with any colour vision can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
_NORMS = {1: r"$\ell_1$", 2: r"$\ell_2$", np.inf: r"$\ell_\infty$"}


def axes_or_new(ax):
    """Return the axes, or those of a new figure, whose lines have colours for all eyes.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("displays need matplotlib: pip install 'convexrobust[plot]'.") from error
    ax = plt.subplots(layout="constrained")[1]
    ax.set_prop_cycle(color=COLORS)
    return ax


def ball_of(estimator, ball) -> LpBall:
    """Return the ball, by default the one that the estimator was trained for."""
    if ball is not None:
        return ball
    if not (hasattr(estimator, "epsilon") and hasattr(estimator, "norm")):
        raise ValueError(
            f"ball must be given, as {type(estimator).__name__} was not trained for one; "
            "e.g. ball=LpBall(np.inf, 0.1), in units of X."
        )
    return LpBall(estimator.norm, estimator.epsilon, getattr(estimator, "bounds", None))


def classes_of(model, network) -> np.ndarray:
    """Return the classes of a model, in the order in which its network counts them."""
    if hasattr(model, "classes_"):
        return np.asarray(model.classes_)
    return np.array([-1, 1]) if network.n_outputs == 1 else np.arange(network.n_outputs)


def scores(network, X) -> np.ndarray:
    """Return a score for each class (n, n_classes); with one output the classes' are -f and f."""
    outputs = network.predict(X)
    return np.hstack([-outputs, outputs]) if network.n_outputs == 1 else outputs


def check_lengths(**arrays):
    """Raise ValueError unless all the arrays have a row for each sample."""
    lengths = {name: len(array) for name, array in arrays.items() if array is not None}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"all arguments must have one entry a sample, got lengths {listed}.")


def checked_radii(name, radii) -> np.ndarray:
    """Return radii, one a sample, as an array, or say that they are none."""
    radii = np.asarray(radii, dtype=np.float64)
    if radii.ndim != 1 or not np.all(radii >= 0.0):
        raise ValueError(f"{name} must be one number >= 0 (or inf) for each sample, got {radii!r}.")
    return radii


def radius_label(norm) -> str:
    """Return the label of an axis of radii."""
    return rf"{_NORMS.get(norm, '')} radius $\epsilon$ (units of X)".strip()
