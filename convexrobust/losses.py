r"""Losses: convex, non-increasing functions of margins.

Every loss here is a function :math:`\varphi(m)` of one or more *margins* of a sample, convex and
non-increasing in each of them. A margin is something that the network should make large: the
signed prediction :math:`y f(x)` of a binary classifier, the differences :math:`f_y(x) - f_c(x)` of
a multi-class one, and for regression how far the prediction stays below and above the target,
:math:`(y - f(x),\, f(x) - y)`. Because :math:`\varphi` is non-increasing, the worst loss over a
set of perturbations is the loss of the lower bounds of the margins, and because those are concave
in the convex variables the worst case is convex: nothing else about a loss is ever needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
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
        Bound on the sum of a sample's multipliers, the domain of the conjugate (inf if none).
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
    threshold: float
    steepness: float

    @abstractmethod
    def value(self, xp, margins):
        """Return the loss of each sample; margins (n, E) gives shape (n,)."""

    @abstractmethod
    def conjugate(self, multipliers):
        r"""Return :math:`\varphi^*(-a) = \sup_m -a'm - \varphi(m)` of each row a >= 0 (NumPy).

        Shape (n, E) gives (n,). The caller keeps the sum of a row within `largest_multiplier`.
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
        margin = xp.multiply(xp.constant(y > 0, lo), lo) - xp.multiply(xp.constant(y < 0, hi), hi)
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
    r"""A regression loss :math:`\psi(|f(x) - y|)`; its two margins are y - f(x) and f(x) - y."""

    task = "regression"

    def worst_case(self, xp, lo, hi, y):
        """Return the largest loss while each prediction is anywhere in [lo, hi]."""
        y = xp.constant(y, lo)
        return self.value(xp, xp.columns([y - hi, lo - y]))


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
class Absolute(ResidualLoss):
    r"""The absolute residual :math:`|f(x) - y|`."""

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
        if not (np.isfinite(self.tube) and self.tube >= 0.0):
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
