r"""Losses: convex, non-increasing functions of margins.

Every loss here is a function :math:`\varphi(m)` of one or more *margins* of a sample, convex and
non-increasing in each of them. A margin is something that the network should make large: the
signed prediction :math:`y f(x)` of a binary classifier, the differences :math:`f_y(x) - f_c(x)` of
a multi-class one, and for regression how far the prediction stays below and above the target,
:math:`(y - f(x),\, f(x) - y)`. A loss may ask for each of them to be scaled by a positive number.
Because :math:`\varphi` is non-increasing, the worst loss over a set of perturbations is the loss of
the lower bounds of the margins, and because those are concave in the convex variables the worst
case is convex: nothing else about a loss is ever needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real
from typing import ClassVar

import numpy as np

from convexrobust.backends import numpy as numpy_backend


class LossKind(StrEnum):
    """What solvers know of a loss beyond its value, conjugate and derivative."""

    #: Of the smallest margin alone, and piecewise quadratic in it: see `Loss.threshold`.
    SMALLEST_MARGIN = "smallest margin"
    #: :math:`\log(1 + \sum_e e^{-m_e})`.
    LOGISTIC = "logistic"
    #: Anything else. Solvers that need more than that refuse it; `ConicSolver` does not.
    OTHER = "other"


class Loss(ABC):
    r"""A convex loss :math:`\varphi(m)` of margins; see the module's text.

    Attributes
    ----------
    task : {"classification", "regression"}
        Which margins the loss is a function of.
    kind : LossKind
        What solvers may rely on; "other" promises nothing.
    smoothness : float
        Lipschitz constant of the derivative with respect to a scalar prediction (inf if none).
    largest_multiplier : float
        Bound on the sum of a sample's multipliers in the domain of the conjugate (inf if none).
    margin_limits : float or tuple of float
        Bounds on the multiplier of each margin in that domain, one number for all or one a margin
        (inf if none); for the kind "other" only.
    margin_scales : float or tuple of float
        Positive factors of the margins, one number for all or one a margin: ``value``,
        ``conjugate`` and ``multipliers`` are functions of the margins so scaled.
    threshold, steepness : float
        Of the kind "smallest margin" only. The loss is
        :math:`\max_A\ A (\tau - \min_e m_e) - \sigma A^2 / 2` over 0 <= A <= largest_multiplier
        with the threshold :math:`\tau` and the steepness :math:`\sigma \ge 0`: where the sum of the
        multipliers is A, strictly between these ends, the smallest margin is
        :math:`\tau - \sigma A`.
    """

    task: ClassVar[str]
    kind: ClassVar[LossKind] = LossKind.OTHER
    smoothness: ClassVar[float]
    largest_multiplier: float
    margin_limits: float | tuple[float, ...] = np.inf
    margin_scales: float | tuple[float, ...] = 1.0
    threshold: float
    steepness: float

    @abstractmethod
    def value(self, xp, margins):
        """Return the loss of each sample; margins (n, E) gives shape (n,)."""

    @abstractmethod
    def conjugate(self, multipliers):
        r"""Return :math:`\varphi^*(-a) = \sup_m -a'm - \varphi(m)` of each row a >= 0 (NumPy).

        Shape (n, E) gives (n,). The caller keeps the rows within `largest_multiplier` and
        `margin_limits`.
        """

    @abstractmethod
    def multipliers(self, margins):
        r"""Return :math:`a \ge 0` with -a a (sub)gradient at the margins (NumPy); shape (n, E)."""

    @abstractmethod
    def worst_case(self, xp, lo, hi, y):
        """Return the largest loss while each prediction is anywhere in [lo, hi].

        Parameters
        ----------
        xp : module
            A backend of `convexrobust.backends`.
        lo, hi : array of shape (n,)
            Ends of the prediction interval; equal ends give the plain loss.
        y : ndarray of shape (n,)
            Labels -1 / +1, or targets.
        """

    def largest_scale(self, multipliers) -> float:
        """Return the largest t for which t times the multipliers (n, E) is in the dual domain."""
        heaviest = float(multipliers.sum(axis=1).max(initial=0.0))
        limits = np.broadcast_to(self.margin_limits, multipliers.shape[1])
        share = float((multipliers / limits).max(initial=0.0))
        scale = self.largest_multiplier / heaviest if heaviest > 0.0 else np.inf
        return min(scale, 1.0 / share) if share > 0.0 else scale

    def location(self, y, weight) -> float:
        """Return the constant prediction that estimators start from: the weighted mean of y (n,).

        It becomes the output bias. For `Pinball` and `Huber` it is the best constant.
        """
        return float(np.average(y, weights=weight))


def _at_smallest(margins, sizes):
    """Put the multipliers ``sizes`` (n,) at the smallest margin of each row."""
    a = np.zeros_like(margins)
    rows = np.arange(len(margins))
    a[rows, margins.argmin(axis=1)] = sizes
    return a


class MarginLoss(Loss):
    """A classification loss; with several margins the smallest ones count."""

    task = "classification"

    def worst_case(self, xp, lo, hi, y):
        """Return the largest loss while each prediction is anywhere in [lo, hi]."""
        up, down = (np.ravel(self.margin_scales)[0] * (s * y > 0) for s in (1, -1))
        margin = xp.multiply(xp.constant(up, lo), lo) - xp.multiply(xp.constant(down, hi), hi)
        return self.value(xp, xp.columns([margin]))


@dataclass(frozen=True)
class Hinge(MarginLoss):
    r"""The hinge :math:`\max(0, 1 - \min_c m_c)` (Crammer and Singer's for several classes)."""

    kind = LossKind.SMALLEST_MARGIN
    smoothness = np.inf
    largest_multiplier = 1.0
    threshold = 1.0
    steepness = 0.0

    def value(self, xp, margins):
        """Return the loss of each sample; margins (n, E) gives shape (n,)."""
        return xp.pos(1.0 + xp.row_max(-margins))

    def conjugate(self, multipliers):
        r"""Return :math:`-\sum_c a_c`."""
        return -multipliers.sum(axis=1)

    def multipliers(self, margins):
        """Return 1 at the smallest margin of a row where it is below 1."""
        return _at_smallest(margins, np.where(margins.min(axis=1) < 1.0, 1.0, 0.0))


@dataclass(frozen=True)
class SquaredHinge(MarginLoss):
    r"""The squared hinge :math:`\max(0, 1 - \min_c m_c)^2`."""

    kind = LossKind.SMALLEST_MARGIN
    smoothness = 2.0
    largest_multiplier = np.inf
    threshold = 1.0
    steepness = 0.5

    def value(self, xp, margins):
        """Return the loss of each sample; margins (n, E) gives shape (n,)."""
        return xp.square(xp.pos(1.0 + xp.row_max(-margins)))

    def conjugate(self, multipliers):
        r"""Return :math:`-A + A^2 / 4` with :math:`A = \sum_c a_c`."""
        total = multipliers.sum(axis=1)
        return total**2 / 4.0 - total

    def multipliers(self, margins):
        """Return twice what the smallest margin of a row lacks to 1."""
        return _at_smallest(margins, 2.0 * np.maximum(1.0 - margins.min(axis=1), 0.0))


@dataclass(frozen=True)
class Logistic(MarginLoss):
    r"""The logistic loss :math:`\log(1 + \sum_c e^{-m_c})` (cross-entropy for several classes)."""

    kind = LossKind.LOGISTIC
    smoothness = 0.25
    largest_multiplier = 1.0

    def value(self, xp, margins):
        """Return the loss of each sample; margins (n, E) gives shape (n,)."""
        return xp.softplus(-margins)

    def conjugate(self, multipliers):
        r"""Return :math:`\sum_c a_c \log a_c + (1 - A) \log(1 - A)`, :math:`A = \sum_c a_c`."""
        rest = np.maximum(1.0 - multipliers.sum(axis=1, keepdims=True), 0.0)
        a = np.hstack([multipliers, rest])
        return np.sum(a * np.log(np.where(a > 0.0, a, 1.0)), axis=1)

    def multipliers(self, margins):
        """Return the probabilities of the other classes."""
        return np.exp(-margins - self.value(numpy_backend, margins)[:, None])


class ResidualLoss(Loss):
    r"""A loss of the residual; its two margins are y - f(x) and f(x) - y, scaled if it says so."""

    task = "regression"

    def worst_case(self, xp, lo, hi, y):
        """Return the largest loss while each prediction is anywhere in [lo, hi]."""
        y = xp.constant(y, lo)
        over, under = (float(scale) for scale in np.broadcast_to(self.margin_scales, 2))
        return self.value(xp, xp.columns([over * (y - hi), under * (lo - y)]))


@dataclass(frozen=True)
class Squared(ResidualLoss):
    r"""Half the square of the residual, :math:`\tfrac12 (f(x) - y)^2`."""

    kind = LossKind.SMALLEST_MARGIN
    smoothness = 1.0
    largest_multiplier = np.inf
    threshold = 0.0
    steepness = 1.0

    def value(self, xp, margins):
        """Return the loss of each sample; margins (n, 2) gives shape (n,)."""
        return 0.5 * xp.square(xp.pos(xp.row_max(-margins)))

    def conjugate(self, multipliers):
        r"""Return :math:`A^2 / 2` with :math:`A = a_1 + a_2`."""
        return 0.5 * multipliers.sum(axis=1) ** 2

    def multipliers(self, margins):
        """Return the size of the residual, at the smaller margin."""
        return _at_smallest(margins, np.maximum(-margins.min(axis=1), 0.0))


@dataclass(frozen=True)
class Huber(ResidualLoss):
    r"""Half the square of the residual r up to delta, :math:`\delta (|r| - \delta / 2)` beyond.

    Outliers pull with a force of delta at most (Huber, Annals of Mathematical Statistics, 1964);
    1.35 times the standard deviation of the noise costs 5 % of efficiency if it is Gaussian.

    Parameters
    ----------
    delta : float
        The residual from which on the loss is linear, in units of y; positive.
    """

    delta: float = 1.35

    kind = LossKind.SMALLEST_MARGIN
    smoothness = 1.0
    threshold = 0.0
    steepness = 1.0

    def __post_init__(self):
        if not (isinstance(self.delta, Real) and 0.0 < self.delta < np.inf):
            raise ValueError(
                f"delta must be a finite number > 0, got {self.delta!r}; without limit: Squared()."
            )

    @property
    def largest_multiplier(self) -> float:  # type: ignore[override]
        """The slope of the linear part."""
        return self.delta

    def value(self, xp, margins):
        """Return the loss of each sample; margins (n, 2) gives shape (n,)."""
        return xp.huber(xp.pos(xp.row_max(-margins)), self.delta)

    def conjugate(self, multipliers):
        r"""Return :math:`A^2 / 2` with :math:`A = a_1 + a_2`."""
        return 0.5 * multipliers.sum(axis=1) ** 2

    def multipliers(self, margins):
        """Return the size of the residual, delta at most, at the smaller margin."""
        return _at_smallest(margins, np.clip(-margins.min(axis=1), 0.0, self.delta))

    def location(self, y, weight) -> float:
        """Return the best constant: the root of a piecewise linear function, between two bends."""
        bends = np.sort(np.concatenate([y - self.delta, y + self.delta]))

        def slope(constant):
            return float(weight @ np.clip(constant - y, -self.delta, self.delta))

        low, high = 0, len(bends) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if slope(bends[middle]) < 0.0 else (low, middle)
        below, above = slope(bends[low]), slope(bends[high])
        return float(bends[low] - below / (above - below) * (bends[high] - bends[low]))


class _LargestResidual(ResidualLoss):
    """The larger residual itself, max(0, -m_1, -m_2) of margins that may be scaled."""

    kind = LossKind.SMALLEST_MARGIN
    smoothness = np.inf
    largest_multiplier = 1.0
    threshold = 0.0
    steepness = 0.0

    def value(self, xp, margins):
        """Return the loss of each sample; margins (n, 2) gives shape (n,)."""
        return xp.pos(xp.row_max(-margins))

    def conjugate(self, multipliers):
        """Return 0."""
        return np.zeros(len(multipliers))

    def multipliers(self, margins):
        """Return 1 at the smaller margin where there is a residual."""
        return _at_smallest(margins, np.where(margins.min(axis=1) < 0.0, 1.0, 0.0))


@dataclass(frozen=True)
class Absolute(_LargestResidual):
    r"""The absolute residual :math:`|f(x) - y|`."""


@dataclass(frozen=True)
class Pinball(_LargestResidual):
    r"""The loss whose minimiser is a quantile, :math:`\max(q r, (q - 1) r)` for r = y - f(x).

    A prediction that is too low costs q a unit, one that is too high 1 - q: the network estimates
    the q-quantile of y given x (Koenker and Bassett, Econometrica, 1978).

    Parameters
    ----------
    quantile : float
        q, strictly between 0 and 1; at 0.5 the loss is half of `Absolute`.
    """

    quantile: float = 0.5

    def __post_init__(self):
        if not (isinstance(self.quantile, Real) and 0.0 < self.quantile < 1.0):
            raise ValueError(
                f"quantile must be a number strictly between 0 and 1, got {self.quantile!r}; 0.9 "
                "for what nine in ten targets stay below."
            )

    @property
    def margin_scales(self) -> tuple[float, float]:  # type: ignore[override]
        """What a unit of the margins y - f(x) and f(x) - y is worth: 1 - q and q."""
        return 1.0 - self.quantile, self.quantile

    def location(self, y, weight) -> float:
        """Return the weighted quantile of y."""
        order = np.argsort(y, kind="stable")
        below = np.cumsum(weight[order])
        return float(y[order[np.searchsorted(below, self.quantile * below[-1])]])


@dataclass(frozen=True)
class EpsilonInsensitive(ResidualLoss):
    r"""The residual beyond a tube, :math:`\max(0, |f(x) - y| - \text{tube})`.

    Parameters
    ----------
    tube : float
        Half the width of the tube in units of y, at least 0. Named so that it is not mistaken for
        the radius of the perturbations.
    """

    tube: float = 0.1

    kind = LossKind.SMALLEST_MARGIN
    smoothness = np.inf
    largest_multiplier = 1.0
    steepness = 0.0

    def __post_init__(self):
        if not (isinstance(self.tube, Real) and 0.0 <= self.tube < np.inf):
            raise ValueError(f"tube must be a finite number >= 0, got {self.tube!r}.")

    @property
    def threshold(self) -> float:  # type: ignore[override]
        """The margin from which on the loss is 0."""
        return -self.tube

    def value(self, xp, margins):
        """Return the loss of each sample; margins (n, 2) gives shape (n,)."""
        return xp.pos(xp.row_max(-margins) - self.tube)

    def conjugate(self, multipliers):
        r"""Return :math:`\text{tube} \cdot (a_1 + a_2)`."""
        return self.tube * multipliers.sum(axis=1)

    def multipliers(self, margins):
        """Return 1 at the smaller margin where the residual leaves the tube."""
        return _at_smallest(margins, np.where(margins.min(axis=1) < -self.tube, 1.0, 0.0))
