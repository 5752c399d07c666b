"""How far each sample may move: the distribution of certified radii."""

from __future__ import annotations

import numpy as np

from convexrobust import certificates
from convexrobust.conversion import as_network, network_labels
from convexrobust.displays.common import (
    COLORS,
    axes_or_new,
    ball_of,
    check_lengths,
    checked_radii,
    classes_of,
    radius_label,
    scores,
)

_METHODS = ("interval", "exact")
_KINDS = ("histogram", "survival")


class CertifiedRadiusDisplay:
    r"""A histogram of the radii at which predictions are proven, right and wrong ones apart.

    Parameters
    ----------
    radii : array-like of shape (n,)
        Radii within which each prediction provably stays, inf allowed.
    right : array-like of shape (n,), of bool
        Which predictions are right.
    norm : {1, 2, inf}, optional
        Of the perturbations, for the label of the axis.
    estimator_name : str, optional
        For the legend.

    Attributes
    ----------
    ax_, figure_ : Axes, Figure
        What was drawn on.
    right_, wrong_ : BarContainer
        Histogram of the right predictions, and of the wrong ones (downwards); None otherwise.
    line_ : Line2D
        Survival curve; None otherwise.

    Raises
    ------
    ValueError
        For radii that are negative, or not one a sample.
    """

    def __init__(self, radii, right, *, norm=None, estimator_name=None):
        self.radii = checked_radii("radii", radii)
        self.right = np.asarray(right, dtype=bool)
        check_lengths(radii=self.radii, right=self.right)
        self.norm = norm
        self.estimator_name = estimator_name

    @classmethod
    def from_estimator(
        cls, estimator, X, y, *, ball=None, method="interval", name=None, ax=None, **style
    ):
        """Certify the predictions of a model and draw their radii.

        Parameters
        ----------
        estimator : model
            A `convexrobust.TwoLayerReLU`, or what `convexrobust.as_network` makes one of.
        X : array-like of shape (n, d)
            Data.
        y : array-like of shape (n,)
            Labels.
        ball : LpBall, optional
            Norm, bounds and shape of the perturbations; the sets are ``ball.scaled_to(radius)``.
            By default that of a fitted estimator of this package.
        method : {"interval", "exact"}
            Radii of the interval bound, or of exact verification (slow for large networks).
        name : str, optional
            For the legend, by default the name of the estimator's class.
        ax : Axes, optional
            Where to draw; by default a new figure.
        **style
            As in `plot`.

        Returns
        -------
        CertifiedRadiusDisplay

        Raises
        ------
        ValueError
            For a model that is no two-layer network, data that do not fit it, or arguments that
            are missing.
        ImportError
            Without matplotlib.
        """
        if method not in _METHODS:
            raise ValueError(f"method must be one of {_METHODS}, got {method!r}.")
        ball, network = ball_of(estimator, ball), as_network(estimator)
        classes = classes_of(estimator, network)
        y_pred = classes[scores(network, X).argmax(axis=1)]
        labels = network_labels(estimator, y_pred)
        if method == "interval":
            radii = certificates.certified_radius(network, X, labels, ball)
        else:
            radii = certificates.exact_radius(network, X, labels, ball).lower
        name = type(estimator).__name__ if name is None else name
        return cls.from_predictions(y, y_pred, radii, norm=ball.p, name=name, ax=ax, **style)

    @classmethod
    def from_predictions(cls, y_true, y_pred, radii, *, norm=None, name=None, ax=None, **style):
        """Draw radii of any classifier, whoever certified it.

        Parameters
        ----------
        y_true, y_pred : array-like of shape (n,)
            Labels and predictions.
        radii : array-like of shape (n,)
            Radii within which each prediction provably stays.
        norm, name, ax, **style
            As in `from_estimator`, without defaults for ``norm`` and ``name``.

        Returns
        -------
        CertifiedRadiusDisplay
        """
        check_lengths(y_true=y_true, y_pred=y_pred, radii=radii)
        right = np.asarray(y_true) == np.asarray(y_pred)
        return cls(radii, right, norm=norm, estimator_name=name).plot(ax=ax, **style)

    def plot(self, ax=None, *, kind="histogram", bins=25, name=None, **style):
        """Draw the radii.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw; by default a new figure.
        kind : {"histogram", "survival"}
            "histogram": numbers of right predictions upwards, of wrong ones downwards. "survival":
            the share of samples that are right and proven at each radius, a step for each sample:
            the certified accuracy.
        bins : int or array-like
            Bins of the histogram: how many up to the largest radius, or their edges.
        name : str, optional
            Another name for the legend.
        **style
            For the bars or the line.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For another kind.
        ImportError
            Without matplotlib.
        """
        if kind not in _KINDS:
            raise ValueError(f"kind must be one of {_KINDS}, got {kind!r}.")
        self.ax_ = axes_or_new(ax)
        self.figure_ = self.ax_.figure
        self.right_ = self.wrong_ = self.line_ = None
        name = self.estimator_name if name is None else name
        if kind == "survival":
            self._draw_survival(name, style)
        else:
            self._draw_histogram(bins, style)
            if name is not None:
                self.ax_.set_title(name)
        self.ax_.set_xlabel(f"certified {radius_label(self.norm)}")
        return self

    def _draw_histogram(self, bins, style):
        finite = self.radii[np.isfinite(self.radii)]
        edges = np.histogram_bin_edges(finite, bins, (0.0, finite.max(initial=0.0) or 1.0))
        self.right_ = self._bars(self.right, edges, 1, {"color": COLORS[0], **style})
        if not self.right.all():
            hatched = {"color": COLORS[1], "hatch": "////", "fill": False}
            self.wrong_ = self._bars(~self.right, edges, -1, {**hatched, **style})
            self.ax_.axhline(0.0, color="black", linewidth=0.8)
        self.ax_.yaxis.set_major_formatter(lambda count, _: f"{abs(count):g}")
        self.ax_.yaxis.get_major_locator().set_params(integer=True)
        self.ax_.set(ylabel="samples", xlim=(edges[0], edges[-1]))
        self.ax_.legend(frameon=False)

    def _bars(self, rows, edges, sign, style):
        counts, _ = np.histogram(self.radii[rows], edges)
        unlimited = np.sum(np.isinf(self.radii[rows]))
        label = f"{'right' if sign > 0 else 'wrong'} ({np.sum(rows)})"
        if unlimited:
            label = f"{label[:-1]}, of which {unlimited} without limit)"
        return self.ax_.bar(
            edges[:-1], sign * counts, np.diff(edges), align="edge", **{"label": label, **style}
        )

    def _draw_survival(self, name, style):
        radii = np.sort(self.radii[self.right & np.isfinite(self.radii)])
        # After the k-th smallest radius k samples are lost, of those that are right.
        share = (self.right.sum() - np.arange(len(radii) + 1)) / len(self.right)
        x = np.append(0.0, radii)
        label = {} if name is None else {"label": name}
        (self.line_,) = self.ax_.step(x, share, where="post", **{**label, **style})
        self.ax_.set(ylabel="certified accuracy", ylim=(0.0, 1.02))
        self.ax_.set_xlim(left=0.0)
        if name is not None:
            self.ax_.legend(frameon=False)
