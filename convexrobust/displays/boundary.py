"""Decision regions in the plane, and the perturbation set around each point."""

from __future__ import annotations

import numpy as np

from convexrobust import certificates
from convexrobust.conversion import as_network, network_labels
from convexrobust.displays.common import (
    COLORS,
    axes_or_new,
    ball_of,
    check_lengths,
    classes_of,
    scores,
)

_MARKERS = "osD^vP*X"
_N_CORNERS = 128  # of the polygon drawn for an ellipse
_ROOM = 0.05  # around the sets, as a share of the picture


class RobustBoundaryDisplay:
    r"""Decision regions of a classifier of two features, with the balls around the points.

    A ball that lies inside the region of its point's class is robust. Its outline is solid then,
    and dashed otherwise: diamonds for l1, ellipses for l2, boxes for l-inf, cut by the bounds.

    Parameters
    ----------
    x0, x1 : ndarray of shape (g0,) and (g1,)
        Grid of the first and of the second feature.
    scores : ndarray of shape (g1, g0, n_classes)
        Score of each class on the grid; the largest wins.
    X : ndarray of shape (n, 2)
        Points.
    y : ndarray of shape (n,)
        Their class numbers 0 .. n_classes - 1.
    ball : LpBall, optional
        What is drawn around the points.
    robust : array-like of shape (n,), of bool, optional
        Which points are robust; without, all outlines are solid.
    classes : array-like of shape (n_classes,), optional
        Names of the classes, for the legend.
    feature_names : pair of str, optional
        Labels of the axes.

    Attributes
    ----------
    ax_, figure_ : Axes, Figure
        What was drawn on.
    regions_ : list of ContourSet
        The region of each class that has one.
    balls_ : PolyCollection or None
        The sets around the points, in the order of X.
    points_ : list of PathCollection
        The points of each class.

    Raises
    ------
    ValueError
        For arrays of other shapes, or points outside the bounds of the ball.
    """

    def __init__(
        self,
        x0,
        x1,
        scores,
        X,
        y,
        *,
        ball=None,
        robust=None,
        classes=None,
        feature_names=("feature 0", "feature 1"),
    ):
        self.x0, self.x1 = np.asarray(x0, dtype=np.float64), np.asarray(x1, dtype=np.float64)
        self.scores = np.asarray(scores, dtype=np.float64)
        self.X, self.y = _plane(X), np.asarray(y)
        self.ball = ball
        self.robust = None if robust is None else np.asarray(robust, dtype=bool)
        self.classes = np.arange(self.scores.shape[-1]) if classes is None else np.asarray(classes)
        self.feature_names = feature_names
        check_lengths(X=self.X, y=self.y, robust=self.robust)
        grid = (len(self.x1), len(self.x0), len(self.classes))
        if self.scores.shape != grid:
            raise ValueError(f"scores must have shape {grid}, got {self.scores.shape}.")

    @classmethod
    def from_estimator(
        cls, estimator, X, y, *, ball=None, method="exact", resolution=300, ax=None, **style
    ):
        """Evaluate a model on a grid, certify it at the points, and draw both.

        Parameters
        ----------
        estimator : model
            A `convexrobust.TwoLayerReLU` of two features, or what `convexrobust.as_network` makes
            one of.
        X : array-like of shape (n, 2)
            Points.
        y : array-like of shape (n,)
            Labels.
        ball : LpBall, optional
            The perturbations. By default that of a fitted estimator of this package.
        method : {"exact", "lp", "interval"}
            How `convexrobust.certify` decides which outlines are solid. Dashed are the others: with
            "exact" those that the boundary crosses, otherwise those for which there is no proof.
        resolution : int
            Points of the grid along each feature.
        ax : Axes, optional
            Where to draw; by default a new figure.
        **style
            For the outlines, e.g. ``linewidth``.

        Returns
        -------
        RobustBoundaryDisplay

        Raises
        ------
        ValueError
            For a model that is no two-layer network, or data that are not of two features.
        ImportError
            Without matplotlib.
        """
        names = tuple(map(str, getattr(X, "columns", ("feature 0", "feature 1"))))
        ball, network, X = ball_of(estimator, ball), as_network(estimator), _plane(X)
        labels = network_labels(estimator, y)
        verdicts = certificates.certify(network, X, labels, ball, method).status
        robust = verdicts == certificates.Verdict.ROBUST
        classes = classes_of(estimator, network)
        x0, x1 = _grids(np.concatenate([X, *ball_outlines(ball, X)]), resolution)
        grid = np.stack(np.meshgrid(x0, x1), axis=-1)
        values = scores(network, grid.reshape(-1, 2)).reshape(*grid.shape[:2], len(classes))
        numbers = np.searchsorted(classes, np.asarray(y))
        options = {"robust": robust, "classes": classes, "feature_names": names}
        return cls(x0, x1, values, X, numbers, ball=ball, **options).plot(ax=ax, **style)

    def plot(self, ax=None, **style):
        """Draw regions, points and balls.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw; by default a new figure.
        **style
            For the outlines, e.g. ``linewidth``.

        Returns
        -------
        self

        Raises
        ------
        ImportError
            Without matplotlib.
        """
        self.ax_ = axes_or_new(ax)
        self.figure_ = self.ax_.figure
        self._draw_regions()
        self._draw_points()
        self.balls_ = None if self.ball is None else self._draw_balls(style)
        shared_unit = self.ball is None or np.ndim(self.ball.epsilon) == 0
        self.ax_.set(
            xlabel=self.feature_names[0],
            ylabel=self.feature_names[1],
            xlim=(self.x0[0], self.x0[-1]),
            ylim=(self.x1[0], self.x1[-1]),
            aspect="equal" if shared_unit else "auto",  # circles are round where that means a thing
        )
        self.ax_.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        return self

    def _draw_regions(self):
        self.regions_ = []
        for c in range(len(self.classes)):
            lead = self.scores[..., c] - np.delete(self.scores, c, axis=-1).max(axis=-1)
            if lead.max() <= 0.0:
                continue
            levels, color = [0.0, lead.max()], _of(COLORS, c)
            region = self.ax_.contourf(self.x0, self.x1, lead, levels, colors=[color], alpha=0.18)
            self.regions_.append(region)
            if lead.min() < 0.0 and c + 1 < len(self.classes):  # others draw those of the last
                line = {"colors": "black", "linewidths": 1.2}
                self.ax_.contour(self.x0, self.x1, lead, [0.0], **line)

    def _draw_points(self):
        self.points_ = []
        for c, name in enumerate(self.classes):
            x0, x1 = self.X[self.y == c].T
            look = {"color": _of(COLORS, c), "marker": _of(_MARKERS, c), "s": 14, "zorder": 3}
            self.points_.append(self.ax_.scatter(x0, x1, label=str(name), **look))

    def _draw_balls(self, style):
        from matplotlib.collections import PolyCollection

        robust = np.ones(len(self.X), dtype=bool) if self.robust is None else self.robust
        look = {
            "facecolors": "none",
            "edgecolors": [_of(COLORS, c) for c in self.y],
            "linestyles": ["-" if proven else "--" for proven in robust],
            "linewidths": 1.0,
            **style,
        }
        outlines = ball_outlines(self.ball, self.X)
        if self.robust is not None:
            for line, proven, label in (("-", True, "proven robust"), ("--", False, "not proven")):
                if np.any(robust == proven):
                    self.ax_.plot([], [], line, color="0.3", linewidth=1.0, label=label)
        return self.ax_.add_collection(PolyCollection(outlines, **look))


def ball_outlines(ball, X) -> list[np.ndarray]:
    """Return the corners (m, 2) of the set around each point X (n, 2) of the plane.

    An ellipse has 128. With bounds the sets are what is left of the ball within them.

    Raises
    ------
    ValueError
        For points outside the bounds.
    """
    ball.check_inside(X)
    if ball.p == np.inf:
        corners = np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    else:
        n_corners = 4 if ball.p == 1 else _N_CORNERS
        angles = 2.0 * np.pi * np.arange(n_corners) / n_corners
        corners = np.column_stack([np.cos(angles), np.sin(angles)])
    polygons = X[:, None, :] + ball.epsilons(2) * corners
    lo, hi = ball.feature_range(2)
    return [_within(polygon, lo, hi) for polygon in polygons]


def _within(polygon, lo, hi):
    """Return the corners of a convex polygon (m, 2) cut by a box: one side of the box at a time."""
    for j in range(2):
        for sign, limit in ((1.0, hi[j]), (-1.0, -lo[j])):
            excess = sign * polygon[:, j] - limit
            if not np.any(excess > 0.0):
                continue
            corners = []
            for k, (corner, here) in enumerate(zip(polygon, excess, strict=True)):
                previous, there = polygon[k - 1], excess[k - 1]
                if (here > 0.0) != (there > 0.0):  # the edge that leads here crosses the side
                    crossing = previous + (there / (there - here)) * (corner - previous)
                    crossing[j] = sign * limit
                    corners.append(crossing)
                if here <= 0.0:
                    corners.append(corner)
            polygon = np.array(corners)
    return polygon


def _plane(X) -> np.ndarray:
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 2 or X.shape[1] != 2:
        raise ValueError(
            f"X must have shape (n, 2), as the picture is one of two features; got {X.shape}. "
            "Train on two features or two principal components."
        )
    return X


def _grids(corners, resolution):
    """Return a grid along each feature that holds all corners (m, 2), and some room."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    room = _ROOM * np.where(high > low, high - low, 1.0)
    return np.linspace(low - room, high + room, resolution).T


def _of(looks, c):
    return looks[c % len(looks)]
