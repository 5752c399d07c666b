"""Accuracy against the size of the perturbations: what is proven, and what an attack leaves."""

from __future__ import annotations

from functools import partial

import numpy as np

from convexrobust import attacks, certificates
from convexrobust.conversion import as_network, network_labels
from convexrobust.displays.common import (
    axes_or_new,
    ball_of,
    check_lengths,
    checked_radii,
    radius_label,
)

_N_EPSILONS = 21
_N_RESTARTS = 5
_KINDS = ("certified", "exact", "attacked")  # of curves, in the legend after the models


class RobustAccuracyDisplay:
    r"""The band from certified to attacked accuracy, over the radius of the perturbations.

    The true robust accuracy is inside the band: no perturbation can push it below the certified
    curve, and perturbations that were found push it down to the attacked one.

    Parameters
    ----------
    epsilons : ndarray of shape (n_epsilons,)
        Radii, in units of the data.
    certified : ndarray of shape (n_epsilons,)
        Shares of samples that are right and proven to stay so.
    attacked : ndarray of shape (n_epsilons,)
        Shares of samples that are right and for which no perturbation was found.
    exact : ndarray of shape (n_epsilons,) or (2, n_epsilons), optional
        The true shares, or a lower and an upper bound of them.
    clean : float, optional
        The accuracy without perturbations.
    norm : {1, 2, inf}, optional
        Of the perturbations, for the label of the axis.
    estimator_name : str, optional
        For the legend.

    Attributes
    ----------
    ax_, figure_ : Axes, Figure
        What was drawn on.
    certified_, attacked_ : Line2D
        The curves.
    band_ : PolyCollection
        What is between them.
    exact_ : Line2D or None
        The lower bound of the exact curve.
    exact_band_ : PolyCollection or None
        Up to its upper bound.
    clean_ : Line2D or None
        The clean accuracy, a dot at radius 0.

    Raises
    ------
    ValueError
        If the curves have other lengths than ``epsilons``.
    """

    def __init__(
        self,
        epsilons,
        certified,
        attacked,
        *,
        exact=None,
        clean=None,
        norm=None,
        estimator_name=None,
    ):
        self.epsilons = np.asarray(epsilons, dtype=np.float64)
        self.certified = np.asarray(certified, dtype=np.float64)
        self.attacked = np.asarray(attacked, dtype=np.float64)
        self.exact = None if exact is None else np.asarray(exact, dtype=np.float64)
        self.clean = clean
        self.norm = norm
        self.estimator_name = estimator_name
        n = len(self.epsilons)
        for name, legal in (("certified", [(n,)]), ("attacked", [(n,)]), ("exact", [(n,), (2, n)])):
            curve = getattr(self, name)
            if curve is not None and curve.shape not in legal:
                shapes = " or ".join(map(str, legal))
                raise ValueError(f"{name} must have shape {shapes}, got {curve.shape}.")

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y,
        *,
        epsilons=None,
        ball=None,
        attack=None,
        exact=False,
        time_limit=None,
        name=None,
        ax=None,
        **style,
    ):
        r"""Certify and attack a model for every radius, and draw the accuracies.

        Parameters
        ----------
        estimator : model
            A `convexrobust.TwoLayerReLU`, or what `convexrobust.as_network` makes one of.
        X : array-like of shape (n, d)
            Data, which the model was best not trained on.
        y : array-like of shape (n,)
            Labels.
        epsilons : array-like, optional
            Radii. By default 21 from 0 to twice that of the ball.
        ball : LpBall, optional
            Norm, bounds and shape of the perturbations; the sets are ``ball.scaled_to(epsilon)``.
            By default that of a fitted estimator of this package.
        attack : callable, optional
            Called as ``attack(loss_and_gradient, X, ball)``, a function of
            `convexrobust.attacks`, perhaps with options. By default ``pgd`` with 5 restarts.
        exact : bool
            Compute exact radii too (`convexrobust.exact_radius`): slow for large networks.
        time_limit : float, optional
            Seconds for each sample with ``exact``; where it is too short there is a band.
        name : str, optional
            For the legend, by default the name of the estimator's class.
        ax : Axes, optional
            Where to draw; by default a new figure.
        **style
            For the lines, e.g. ``color``.

        Returns
        -------
        RobustAccuracyDisplay

        Raises
        ------
        ValueError
            For a model that is no two-layer network, data that do not fit it, or arguments that
            are missing.
        ImportError
            Without matplotlib.

        Notes
        -----
        A sample that is broken at one radius counts as broken at larger ones, as the sets are
        nested.
        """
        ball = ball_of(estimator, ball)
        epsilons = _grid(epsilons, ball)
        network, labels = as_network(estimator), network_labels(estimator, y)
        X = np.asarray(X, dtype=np.float64)
        certified = certificates.certified_radius(network, X, labels, ball)
        bracket = None
        if exact:
            found = certificates.exact_radius(network, X, labels, ball, time_limit=time_limit)
            bracket = (found.lower, found.upper)
        attacked = _attacked_radius(network, X, labels, ball, epsilons, attack)
        right = attacks.worst_margin_objective(network, labels)(X)[0] < 0.0
        curves = _curves(right, epsilons, certified, attacked, bracket)
        name = type(estimator).__name__ if name is None else name
        display = cls(epsilons, **curves, norm=ball.p, estimator_name=name)
        return display.plot(ax=ax, **style)

    @classmethod
    def from_predictions(
        cls,
        y_true,
        y_pred,
        *,
        certified_radius,
        attacked_radius,
        exact_radius=None,
        epsilons=None,
        norm=None,
        name=None,
        ax=None,
        **style,
    ):
        """Draw the accuracies of any classifier from radii, whoever computed them.

        Parameters
        ----------
        y_true, y_pred : array-like of shape (n,)
            Labels, and predictions without perturbation.
        certified_radius : array-like of shape (n,)
            Radii at which each prediction is proven.
        attacked_radius : array-like of shape (n,)
            Radii at which each prediction was changed, inf where no attack did.
        exact_radius : RadiusBracket or pair of array-like of shape (n,), optional
            Lower and upper bounds of the distances to the boundary.
        epsilons : array-like, optional
            Radii to draw. By default 200 up to a little more than the largest finite one.
        norm, name, ax, **style
            As in `from_estimator`, without defaults for ``norm`` and ``name``.

        Returns
        -------
        RobustAccuracyDisplay

        Raises
        ------
        ValueError
            For radii that are negative, or not one a sample.
        """
        radii = [
            checked_radii("certified_radius", certified_radius),
            checked_radii("attacked_radius", attacked_radius),
        ]
        bracket = None
        if exact_radius is not None:
            bracket = tuple(checked_radii("exact_radius", end) for end in exact_radius[:2])
        right = np.asarray(y_true) == np.asarray(y_pred)
        ends = {} if bracket is None else {"exact_radius": bracket[0], "its upper end": bracket[1]}
        check_lengths(y_true=right, certified_radius=radii[0], attacked_radius=radii[1], **ends)
        if epsilons is None:
            known = np.concatenate(radii)
            epsilons = np.linspace(0.0, 1.05 * known[np.isfinite(known)].max(initial=0.0), 200)
        epsilons = _checked_epsilons(epsilons)
        curves = _curves(right, epsilons, *radii, bracket)
        display = cls(epsilons, **curves, norm=norm, estimator_name=name)
        return display.plot(ax=ax, **style)

    def plot(self, ax=None, *, name=None, **style):
        """Draw the band.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw, perhaps on another display; by default a new figure.
        name : str, optional
            Another name for the legend.
        **style
            For the lines, e.g. ``color``.

        Returns
        -------
        self

        Raises
        ------
        ImportError
            Without matplotlib.
        """
        self.ax_ = ax = axes_or_new(ax)
        self.figure_ = ax.figure
        name = self.estimator_name if name is None else name
        label = {} if name is None else {"label": name}
        (self.certified_,) = ax.plot(
            self.epsilons, self.certified, **{"linewidth": 2, **label, **style}
        )
        color = self.certified_.get_color()
        style = {"linewidth": 1.2, **style, "color": color, "label": None}
        (self.attacked_,) = ax.plot(self.epsilons, self.attacked, **{**style, "linestyle": "--"})
        soft = {"color": color, "alpha": 0.15, "linewidth": 0}
        self.band_ = ax.fill_between(self.epsilons, self.certified, self.attacked, **soft)
        self.exact_ = self.exact_band_ = self.clean_ = None
        if self.exact is not None:
            lower, upper = np.broadcast_to(self.exact, (2, len(self.epsilons)))
            (self.exact_,) = ax.plot(
                self.epsilons, lower, **{**style, "linestyle": ":", "linewidth": 2}
            )
            self.exact_band_ = ax.fill_between(self.epsilons, lower, upper, **soft)
        if self.clean is not None:
            (self.clean_,) = ax.plot(0.0, self.clean, "o", color=color, markersize=5, clip_on=False)
        ax.set(xlabel=radius_label(self.norm), ylabel="accuracy", ylim=(0.0, 1.02))
        ax.set_xlim(left=0.0)
        self._draw_legend()
        return self

    def _draw_legend(self):
        """Name the models by colour, and the kinds of curves by line, once for all displays."""
        for kind, line in zip(_KINDS, ("-", ":", "--"), strict=True):
            _, labels = self.ax_.get_legend_handles_labels()
            if kind not in labels and (kind != "exact" or self.exact is not None):
                self.ax_.plot([], [], line, color="0.3", label=kind)
        entries = zip(*self.ax_.get_legend_handles_labels(), strict=True)
        # Models in their order, then the kinds: the sort is stable.
        ordered = sorted(entries, key=lambda e: _KINDS.index(e[1]) + 1 if e[1] in _KINDS else 0)
        self.ax_.legend(*zip(*ordered, strict=True), frameon=False)


def _attacked_radius(network, X, labels, ball, epsilons, attack):
    """Return for each sample the length of a perturbation that breaks it (n,), inf if none does."""
    attack = attack or partial(attacks.pgd, n_restarts=_N_RESTARTS, random_state=0)
    radius = np.full(len(X), np.inf)
    for epsilon in epsilons:
        k = np.flatnonzero(np.isinf(radius))
        if len(k) == 0:
            break
        objective = attacks.worst_margin_objective(network, labels[k])
        X_adv = attack(objective, X[k], ball.scaled_to(epsilon))
        length = np.minimum(ball.scaled_to(1.0).length(X_adv - X[k]), epsilon)
        radius[k] = np.where(objective(X_adv)[0] >= 0.0, length, np.inf)
    return radius


def _curves(right, epsilons, certified, attacked, bracket) -> dict:
    """Return the shares of samples that are robust at each epsilon, by radii (n,)."""

    def share(robust):
        return (right & robust).mean(axis=1)

    column = epsilons[:, None]
    curves = {
        "certified": share(certified >= column),
        "attacked": share(attacked > column),
        "clean": float(right.mean()),
    }
    if bracket is not None:
        lower, upper = share(bracket[0] >= column), share(bracket[1] > column)
        curves["exact"] = np.stack([lower, np.minimum(upper, curves["attacked"])])
    return curves


def _grid(epsilons, ball):
    if epsilons is None and ball.unperturbed:
        raise ValueError("epsilons must be given, as the ball has radius 0.")
    if epsilons is None:
        epsilons = np.linspace(0.0, 2.0 * ball.radius, _N_EPSILONS)
    return _checked_epsilons(epsilons)


def _checked_epsilons(epsilons):
    epsilons = np.asarray(epsilons, dtype=np.float64)
    if epsilons.ndim != 1 or not np.all(np.isfinite(epsilons) & (epsilons >= 0.0)):
        raise ValueError(f"epsilons must be a list of finite numbers >= 0, got {epsilons!r}.")
    return np.unique(epsilons)
