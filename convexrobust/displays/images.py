"""Images, the adversarial ones next to them, and what was changed."""

from __future__ import annotations

from functools import partial

import numpy as np

from convexrobust import attacks
from convexrobust.conversion import as_network, network_labels
from convexrobust.displays.common import (
    COLORS,
    axes_or_new,
    ball_of,
    check_lengths,
    classes_of,
    scores,
)

_ROW_NAMES = ("clean", "adversarial", "difference")
_SPACE = 0.12  # between images, in widths of one
_N_RESTARTS = 5


class AdversarialExamplesDisplay:
    """Rows of images: clean, adversarial and their difference, with what a model says of them.

    Parameters
    ----------
    X, X_adv : array-like of shape (n, d)
        Images as rows of pixels, and the attacked ones.
    y_pred, y_pred_adv : array-like of shape (n,)
        Predictions for both.
    y_true : array-like of shape (n,), optional
        True labels: predictions that differ are printed in another colour, and bold. By default
        the clean predictions.
    shape : tuple
        Height and width of an image, perhaps with 3 for colours as the last axis: d numbers.
    limits : pair of float, optional
        Values that are drawn black and white; by default the smallest and largest in X.

    Attributes
    ----------
    ax_, figure_ : Axes, Figure
        What was drawn on.
    images_ : ndarray of shape (3, n), of AxesImage
        Clean images, adversarial images and differences.
    labels_ : ndarray of shape (2, n), of Text
        The predictions.

    Raises
    ------
    ValueError
        For arrays of different lengths, or a shape that is not that of the images.
    """

    def __init__(self, X, X_adv, y_pred, y_pred_adv, *, shape, y_true=None, limits=None):
        self.X, self.X_adv = (np.asarray(A, dtype=np.float64) for A in (X, X_adv))
        self.y_pred, self.y_pred_adv = np.asarray(y_pred), np.asarray(y_pred_adv)
        self.y_true = self.y_pred if y_true is None else np.asarray(y_true)
        self.shape = _checked_shape(shape, self.X)
        if self.X_adv.shape != self.X.shape:
            raise ValueError(
                f"X_adv must have the shape of X, {self.X.shape}, got {self.X_adv.shape}."
            )
        check_lengths(X=self.X, y_pred=self.y_pred, y_pred_adv=self.y_pred_adv, y_true=self.y_true)
        self.limits = (self.X.min(), self.X.max()) if limits is None else limits

    @classmethod
    def from_estimator(
        cls, estimator, X, y, *, shape, ball=None, attack=None, n_examples=6, ax=None
    ):
        """Attack a model and draw samples, first those that it gets right and then wrong.

        Parameters
        ----------
        estimator : model
            A `convexrobust.TwoLayerReLU`, or what `convexrobust.as_network` makes one of.
        X : array-like of shape (n, d)
            Images as rows of pixels.
        y : array-like of shape (n,)
            Labels.
        shape : tuple
            Height and width of an image, perhaps with 3 for colours as the last axis.
        ball : LpBall, optional
            The perturbations. By default that of a fitted estimator of this package.
        attack : callable, optional
            Called as ``attack(loss_and_gradient, X, ball)``, a function of
            `convexrobust.attacks`, perhaps with options. By default ``pgd`` with 5 restarts.
        n_examples : int
            How many samples to draw: first those where the attack succeeds, then others that are
            right, then those that are wrong anyway; each in the order of X.
        ax : Axes, optional
            Where to draw; by default a new figure.

        Returns
        -------
        AdversarialExamplesDisplay

        Raises
        ------
        ValueError
            For a model that is no two-layer network, or data or a shape that do not fit it.
        ImportError
            Without matplotlib.
        """
        ball, network, X = ball_of(estimator, ball), as_network(estimator), np.asarray(X, float)
        shape, y = _checked_shape(shape, X), np.asarray(y)
        objective = attacks.worst_margin_objective(network, network_labels(estimator, y))
        attack = attack or partial(attacks.pgd, n_restarts=_N_RESTARTS, random_state=0)
        X_adv = attack(objective, X, ball)
        right, still_right = objective(X)[0] < 0.0, objective(X_adv)[0] < 0.0
        rank = np.where(right, np.where(still_right, 1, 0), 2)
        k = np.argsort(rank, kind="stable")[:n_examples]
        classes = classes_of(estimator, network)
        y_pred, y_pred_adv = (classes[scores(network, A[k]).argmax(axis=1)] for A in (X, X_adv))
        return cls.from_predictions(
            X[k], X_adv[k], y_pred, y_pred_adv, shape=shape, y_true=y[k], ax=ax
        )

    @classmethod
    def from_predictions(
        cls, X, X_adv, y_pred, y_pred_adv, *, shape, y_true=None, limits=None, ax=None
    ):
        """Draw images of any classifier, whoever attacked it.

        Parameters
        ----------
        X, X_adv, y_pred, y_pred_adv, shape, y_true, limits
            As of `AdversarialExamplesDisplay`.
        ax : Axes, optional
            Where to draw; by default a new figure.

        Returns
        -------
        AdversarialExamplesDisplay
        """
        display = cls(X, X_adv, y_pred, y_pred_adv, shape=shape, y_true=y_true, limits=limits)
        return display.plot(ax=ax)

    def plot(self, ax=None, *, cmap="gray", difference_cmap="RdBu_r"):
        """Draw the images, in three rows on one axes.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw; by default a new figure.
        cmap : str or Colormap
            For images without colours of their own.
        difference_cmap : str or Colormap
            For the differences, of which 0 is in the middle. Those of colour images are averaged
            over the colours.

        Returns
        -------
        self

        Raises
        ------
        ImportError
            Without matplotlib.
        """
        new = ax is None
        self.ax_ = axes_or_new(ax)
        self.figure_ = self.ax_.figure
        if new:
            self.figure_.set_size_inches(1.1 * len(self.X) + 1.2, 4.4)
        difference, reach = self._differences()
        low, high = self.limits
        look = {"cmap": cmap, "vmin": low, "vmax": high}
        self.images_ = np.array(
            [
                self._draw_row(0, self._images(self.X), **look),
                self._draw_row(1, self._images(self.X_adv), **look),
                self._draw_row(2, difference, cmap=difference_cmap, vmin=-reach, vmax=reach),
            ]
        )
        self.labels_ = np.array(
            [self._draw_labels(row, y) for row, y in enumerate((self.y_pred, self.y_pred_adv))]
        )
        self._draw_frame(reach)
        return self

    def _images(self, X):
        images = X.reshape(-1, *self.shape)
        if len(self.shape) == 2:
            return images
        low, high = self.limits
        return np.clip((images - low) / (high - low or 1.0), 0.0, 1.0)

    def _differences(self):
        """Return the differences as images without colours, and their largest entry."""
        difference = (self.X_adv - self.X).reshape(-1, *self.shape)
        if len(self.shape) == 3:
            difference = difference.mean(axis=3)
        return difference, np.abs(difference).max() or 1.0

    @property
    def _steps(self):
        """Distance of an image's left and lower edge from those of the next, in widths."""
        return 1.0 + _SPACE, self.shape[0] / self.shape[1] + 3.0 * _SPACE

    def _draw_row(self, row, images, **look):
        (across, down), height = self._steps, self.shape[0] / self.shape[1]
        drawn = []
        for k, image in enumerate(images):
            left, top = k * across, -row * down
            extent = (left, left + 1.0, top - height, top)
            drawn.append(self.ax_.imshow(image, extent=extent, interpolation="nearest", **look))
        return drawn

    def _draw_labels(self, row, predictions):
        (across, down), height = self._steps, self.shape[0] / self.shape[1]
        drawn = []
        for k, (predicted, true) in enumerate(zip(predictions, self.y_true, strict=True)):
            right = predicted == true
            drawn.append(
                self.ax_.text(
                    k * across + 0.5,
                    -row * down - height - 0.4 * _SPACE,
                    str(predicted),
                    color="black" if right else COLORS[1],
                    fontweight="normal" if right else "bold",
                    horizontalalignment="center",
                    verticalalignment="top",
                )
            )
        return drawn

    def _draw_frame(self, reach):
        (across, down), height = self._steps, self.shape[0] / self.shape[1]
        names = [*_ROW_NAMES[:2], f"{_ROW_NAMES[2]}\n(up to {reach:.2g})"]
        ticks = [-row * down - height / 2.0 for row in range(len(_ROW_NAMES))]
        self.ax_.set_yticks(ticks, names)
        self.ax_.set_xticks([])
        self.ax_.tick_params(length=0)
        self.ax_.spines[:].set_visible(False)
        right, bottom = (len(self.X) - 1) * across + 1.0, -2.0 * down - height
        self.ax_.set(xlim=(-_SPACE, right + _SPACE), ylim=(bottom - _SPACE, _SPACE), aspect="equal")


def _checked_shape(shape, X) -> tuple:
    shape = tuple(shape)
    legal = len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)
    if X.ndim != 2 or not legal or np.prod(shape) != X.shape[1]:
        raise ValueError(
            "shape must be (height, width) or (height, width, 3), as many numbers as X has "
            f"columns; got {shape} for X of shape {X.shape}."
        )
    return shape
