r"""The threat model: which inputs count as perturbed versions of x.

One object, `LpBall`, is shared by everything that trains, certifies or attacks. Convex programs
need its support function only (`LpBall.around` and `Neighbourhoods`); attacks need its geometry
(`project`, `steepest`, `sample`). All of it is written on backend atoms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real

import numpy as np

from convexrobust.backends import numpy as numpy_backend
from convexrobust.projection import project_rows

DUAL_NORM = {1: np.inf, 2: 2, np.inf: 1}
_NAMES = {"1": 1, "2": 2, "inf": np.inf, "l1": 1, "l2": 2, "linf": np.inf}


@dataclass(frozen=True, eq=False)
class LpBall:
    r"""The perturbations :math:`\{\delta : \|\delta / \epsilon\|_p \le 1\}`, optionally in a range.

    Parameters
    ----------
    p : {1, 2, inf} or {"l1", "l2", "linf", "1", "2", "inf"}
        The norm. The attribute is the number.
    epsilon : float or array of shape (d,)
        Radius in input units, one for all features or one per feature (an axis-aligned ellipsoid,
        box or cross-polytope). A feature of radius 0 is immutable.
    bounds : tuple (lo, hi), optional
        Smallest and largest legal value, numbers or arrays of shape (d,). The set around x is then
        also cut to ``lo <= x + delta <= hi``. For l-inf that is a box and treated exactly; for l1
        and l2 the support function is the uncut ball's, an upper bound, so certificates stay valid.

    Raises
    ------
    ValueError
        For another norm, a negative or non-finite epsilon, or bounds that are not (lo, hi).
    """

    p: float
    epsilon: float | np.ndarray
    bounds: tuple | None = None

    def __post_init__(self):
        object.__setattr__(self, "p", exponent_of(self.p))
        epsilon = np.asarray(self.epsilon, dtype=np.float64)
        if epsilon.ndim > 1 or not np.all(np.isfinite(epsilon)) or np.any(epsilon < 0.0):
            raise ValueError(
                "epsilon must be a finite number >= 0, or one such number per feature, "
                f"got {self.epsilon!r}."
            )
        object.__setattr__(self, "epsilon", float(epsilon) if epsilon.ndim == 0 else epsilon)
        if self.bounds is not None:
            object.__setattr__(self, "bounds", _checked_bounds(self.bounds))

    @property
    def radius(self) -> float:
        """The largest radius of any feature."""
        return float(np.max(self.epsilon))

    @property
    def unperturbed(self) -> bool:
        """Whether no feature has a radius above 0."""
        return self.radius == 0.0

    def scaled_to(self, radius) -> LpBall:
        """Return the ball of the same shape with this largest radius."""
        if np.ndim(self.epsilon) == 0 or self.unperturbed:
            return LpBall(self.p, radius, self.bounds)
        return LpBall(self.p, self.epsilon * (radius / self.radius), self.bounds)

    def epsilons(self, n_features) -> np.ndarray:
        """Return the radius of each feature, shape (n_features,)."""
        _check_length("epsilon has", self.epsilon, n_features)
        return np.broadcast_to(self.epsilon, (n_features,)).astype(np.float64)

    def feature_range(self, n_features) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower and upper bound of each feature (-inf and inf without bounds)."""
        lo, hi = (-np.inf, np.inf) if self.bounds is None else self.bounds
        for end in (lo, hi):
            _check_length("bounds have", end, n_features)
        return np.broadcast_to(lo, (n_features,)), np.broadcast_to(hi, (n_features,))

    def check_inside(self, X):
        """Raise ValueError if a row of X (n, d) lies outside the bounds."""
        lo, hi = self.feature_range(X.shape[1])
        outside = (X < lo - 1e-9) | (X > hi + 1e-9)
        if outside.any():
            k, j = np.argwhere(outside)[0]
            raise ValueError(
                f"bounds exclude the data: X[{k}, {j}] = {X[k, j]:.6g} is outside "
                f"[{lo[j]:.6g}, {hi[j]:.6g}]. Give bounds in the units of X (after any scaling), "
                "or bounds=None."
            )

    def around(self, X, *, intercept=False, radius=None) -> Neighbourhoods:
        """Return the support functions of the perturbation sets around the rows of X.

        Parameters
        ----------
        X : ndarray of shape (n, d)
            Data.
        intercept : bool
            The last column of X is the constant 1 and is never perturbed.
        radius : ndarray of shape (n,), optional
            A factor of epsilon for every row.
        """
        n_features = X.shape[1] - intercept
        features = X[:, :n_features]
        self.check_inside(features)
        epsilon = self.epsilons(n_features)
        if radius is not None:
            epsilon = np.multiply.outer(radius, epsilon)
        if self.p == np.inf and self.bounds is not None and not self.unperturbed:
            lo, hi = self.feature_range(n_features)
            low, high = np.maximum(features - epsilon, lo), np.minimum(features + epsilon, hi)
            center, weights, radius = (low + high) / 2.0, np.maximum(high - low, 0.0) / 2.0, 1.0
        elif radius is not None:
            center, weights, radius = features, epsilon, 1.0
        else:
            radius = self.radius
            center, weights = features, (epsilon / radius if radius else epsilon)[None, :]
        if intercept:
            center = np.hstack([center, X[:, n_features:]])
            weights = np.hstack([weights, np.zeros((len(weights), 1))])
        return Neighbourhoods(center, weights, radius, self.p)

    def length(self, delta) -> np.ndarray:
        r"""Return :math:`\|\delta / \epsilon\|_p` of the rows of delta (n, d), with 0 / 0 = 0."""
        epsilon = self.epsilons(delta.shape[1])
        scaled = np.where(epsilon > 0.0, delta / np.where(epsilon > 0.0, epsilon, 1.0), 0.0)
        scaled[(epsilon == 0.0) & (delta != 0.0)] = np.inf
        return np.linalg.norm(scaled, self.p, axis=1)

    def support(self, xp, U):
        r"""Return :math:`\max_\delta \delta' u` over the uncut ball for the columns of U (d, P)."""
        epsilon = xp.constant(self.epsilons(U.shape[0])[:, None], U)
        return xp.norm(epsilon * U, DUAL_NORM[self.p], axis=0)

    def project(self, xp, delta, X=None):
        """Return the nearest perturbation in the ball for each row of delta (n, d).

        With bounds the result is also moved into the bounds around the rows of X, coordinate by
        coordinate towards 0: the exact projection for l-inf, a point of the set for l1 and l2.
        """
        epsilon = xp.constant(self.epsilons(delta.shape[1])[None, :], delta)
        delta = project_rows(xp, delta, epsilon, self.p)
        if self.bounds is None or X is None:
            return delta
        lo, hi = (xp.constant(end[None, :], delta) for end in self.feature_range(delta.shape[1]))
        return xp.minimum(xp.maximum(X + delta, lo), hi) - X

    def steepest(self, xp, G):
        r"""Return :math:`\arg\max_\delta \delta' g` over the uncut ball, rows of G (n, d)."""
        epsilon = xp.constant(self.epsilons(G.shape[1])[None, :], G)
        if self.p == np.inf:
            return epsilon * xp.sign(G)
        scaled = epsilon * G
        if self.p == 2:
            length = xp.norm(scaled, 2, axis=1)[:, None]
            return epsilon * scaled / xp.where(length > 0.0, length, 1.0)
        peak = xp.abs(scaled) >= xp.norm(scaled, np.inf, axis=1)[:, None]
        vertex = xp.where(peak, xp.sign(G), 0.0 * G)
        return epsilon * vertex / xp.maximum(xp.row_sum(xp.abs(vertex)), 1.0)[:, None]

    def sample(self, X, rng) -> np.ndarray:
        """Return one random perturbation for each row of X (n, d), uniform in the uncut ball.

        With bounds the perturbed point is then moved into them. X and the result are NumPy.
        """
        n, d = X.shape
        if self.p == np.inf:
            unit = rng.uniform(-1.0, 1.0, (n, d))
        else:
            signs = rng.choice([-1.0, 1.0], (n, d))
            unit = rng.normal(size=(n, d)) if self.p == 2 else signs * rng.exponential(size=(n, d))
            unit /= np.linalg.norm(unit, self.p, axis=1, keepdims=True)
            unit *= rng.uniform(size=(n, 1)) ** (1.0 / d)
        return self.project(numpy_backend, unit * self.epsilons(d), X)


@dataclass(frozen=True, eq=False)
class Neighbourhoods:
    r"""The sets :math:`c_k + \text{radius} \cdot r_k \circ \{\delta : \|\delta\|_p \le 1\}`.

    Attributes
    ----------
    center : ndarray of shape (n, d)
        The centres c_k: the data, or the middle of the box where bounds cut it.
    weights : ndarray of shape (1, d) or (n, d)
        The shapes r_k: shared by all rows, or one a row (boxes cut by bounds). 0 = not perturbed.
    radius : float
        The common scale.
    p : {1, 2, inf}
        The norm, given as that of an `LpBall` may be.

    Notes
    -----
    The sets of a program have one shape or are boxes, and solvers rely on it. Shapes of rows in
    the other norms, as `LpBall.around` makes of a radius for every row, are for the supports of
    certificates: these need NumPy for pairs, and sums of such sets are refused.
    """

    center: np.ndarray
    weights: np.ndarray
    radius: float
    p: float

    def __post_init__(self):
        object.__setattr__(self, "p", exponent_of(self.p))

    @property
    def unperturbed(self) -> bool:
        """Whether the sets are the centres alone because the radius is 0."""
        return self.radius == 0.0

    @property
    def one_shape(self) -> bool:
        """Whether one shape is shared by all rows; otherwise each has its own."""
        return len(self.weights) == 1

    @cached_property
    def reach(self) -> np.ndarray:
        """The radius of each feature, shape (1, d) or (n, d)."""
        return self.radius * self.weights

    def support(self, xp, Q, radius=None):
        r"""Return :math:`\max \delta' q_k` over the k-th set, for rows q_k of Q (n, d); (n,)."""
        weights = xp.constant(np.broadcast_to(self.weights, self.center.shape), Q)
        norms = xp.norm(xp.multiply(weights, Q), DUAL_NORM[self.p], axis=1)
        return (self.radius if radius is None else radius) * norms

    def rows(self, index) -> Neighbourhoods:
        """Return the sets of some rows, in the order of the rows."""
        weights = self.weights if self.one_shape else self.weights[index]
        return replace(self, center=self.center[index], weights=weights)

    def lowest(self, Q) -> np.ndarray:
        r"""Return :math:`\arg\min \delta' q_k` over the k-th set about 0, rows q_k of Q (n, d)."""
        return -LpBall(self.p, self.radius).steepest(numpy_backend, self.weights * Q) * self.weights

    def support_pairs(self, xp, U, rows, radius=None):
        """Return the support of the sets ``rows`` in the directions of the columns of U (d, P).

        Shape (len(rows), P).
        """
        radius = self.radius if radius is None else radius
        if not self.one_shape:
            return radius * self._pairs_of_shapes(xp, U, self.weights[rows])
        weights = xp.constant(np.repeat(self.weights.T, U.shape[1], axis=1), U)
        norms = xp.norm(xp.multiply(weights, U), DUAL_NORM[self.p], axis=0)
        return radius * xp.outer(xp.constant(np.ones(len(rows)), U), norms)

    def _pairs_of_shapes(self, xp, U, weights):
        if self.p == np.inf:
            return xp.constant(weights, U) @ xp.abs(U)
        q = DUAL_NORM[self.p]  # in these norms shapes of rows are for NumPy only
        return np.array([np.linalg.norm(w[:, None] * U, q, axis=0) for w in weights])

    def remainder(self, G, B) -> np.ndarray:
        r"""Return the shortest :math:`g_i - \sum_k b_{ki} \rho_k` over points of the sets about 0.

        G is (d, P), B >= 0 is (n, P); shape (d, P). The weighted sums of the sets are sets of the
        same kind, as all are of one shape, or boxes; what is left is outside the projection on one.

        Raises
        ------
        ValueError
            For shapes of rows in another norm than l-inf, whose sums are no such sets.
        """
        if self.unperturbed:
            return G
        if self.one_shape:
            amount = B.sum(axis=0)[:, None]
            return G - project_rows(numpy_backend, G.T, self.reach, self.p, amount).T
        if self.p != np.inf:
            raise ValueError(f"sets of many shapes add up for norm inf only, not {self.p}.")
        return G - project_rows(numpy_backend, G.T, (self.reach.T @ B).T, self.p).T

    def distance(self, G, B, rows) -> np.ndarray:
        r"""Return :math:`\min_{\rho_k} \|g_i + \sum_k b_{ki} \rho_k\|_2` over points of the sets.

        G is (d, P), B >= 0 is (len(rows), P); shape (P,). It is what is left of a dual residual
        when the multipliers B of cone rows may choose the worst perturbation: the sets have -rho
        with rho, so that it is the length of `remainder`.
        """
        return np.linalg.norm(self.rows(rows).remainder(G, B), axis=0)


def exponent_of(p):
    """Return the exponent of a norm, 1, 2 or inf, given as a number or as a name such as "l2".

    Raises
    ------
    ValueError
        For anything else, with the legal values.
    """
    if isinstance(p, str):
        number = _NAMES.get(p.strip().lower())
    elif isinstance(p, Real) and not isinstance(p, bool):
        number = next((known for known in DUAL_NORM if p == known), None)
    else:
        number = None
    if number is None:
        raise ValueError(
            f'norm must be 1, 2 or numpy.inf, or a name: "l1", "l2", "linf", "1", "2", "inf"; '
            f"got {p!r}."
        )
    return number


def _check_length(subject, value, n_features):
    """Raise ValueError if a value per feature is not that."""
    if np.ndim(value) == 1 and np.size(value) != n_features:
        raise ValueError(
            f"{subject} {np.size(value)} entries but the data has {n_features} features; "
            "give one number, or one per feature."
        )


def _checked_bounds(bounds):
    """Return bounds as two float arrays or numbers, or say what is wrong with them."""
    try:
        lo, hi = (np.asarray(end, dtype=np.float64) for end in bounds)
    except (TypeError, ValueError):
        raise ValueError(f"bounds must be a pair (lo, hi), got {bounds!r}.") from None
    if max(lo.ndim, hi.ndim) > 1 or np.isnan(lo).any() or np.isnan(hi).any() or np.any(lo > hi):
        raise ValueError(f"bounds must be a pair (lo, hi) with lo <= hi, got {bounds!r}.")
    return lo, hi
