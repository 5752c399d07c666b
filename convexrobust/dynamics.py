r"""Saddle-point dynamics: adversarial training as one system in continuous motion.

The problem :math:`\min_\theta \max_{\|u_i\|_p \le \epsilon} f(\theta, u)` is followed from its
Lagrangian in epigraph form,

.. math:: L = t + \lambda \Bigl[ f(\theta, u) - t - \sum_i v_i (\|u_i\|_p - \epsilon) \Bigr],

down in :math:`\theta, t, v` and up in :math:`u, \lambda` at once (Esfandiari et al., arXiv
1910.08623). The steps are shared with `convexrobust.deep.methods.ssds`, which takes them for a
network; here they run on any convex-concave problem, where the theorem holds and can be tested.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from convexrobust.attacks.region import check_counts, evaluated
from convexrobust.backends import numpy as numpy_backend
from convexrobust.perturbations import DUAL_NORM, LpBall
from convexrobust.projection import project_rows

VARIANTS = ("ssds", "nolam", "nolag")
_LOST = 100.0  # radii: perturbations that go this far will not come back


@dataclass(frozen=True)
class SaddleTrace:
    """Where saddle-point dynamics went, recorded every so many steps (r records) and at the end.

    Attributes
    ----------
    iterations : ndarray of shape (r,)
        Numbers of the steps recorded; 0 is the start.
    theta : ndarray of shape (r, q)
        What is minimised over.
    u : ndarray of shape (r, n, d)
        Perturbations.
    v : ndarray of shape (r, n)
        Multipliers of the budgets; 0 with ``variant="nolag"``.
    weight : ndarray of shape (r,)
        The multiplier lambda of the epigraph; 1 unless ``variant="ssds"``.
    """

    iterations: np.ndarray
    theta: np.ndarray
    u: np.ndarray
    v: np.ndarray
    weight: np.ndarray


def saddle_point_dynamics(
    value_and_gradients,
    theta,
    u,
    ball,
    *,
    variant="nolag",
    n_steps=1000,
    step=0.3,
    decay=0.5,
    damped=True,
    record_every=100,
) -> SaddleTrace:
    r"""Follow the dynamics of Esfandiari et al. on a saddle-point problem in NumPy.

    With steps :math:`\gamma_k = \text{step} / (1 + k)^{\text{decay}}`,

    .. math::
        \theta \leftarrow \theta - \gamma_k \lambda \nabla_\theta f, \qquad
        u_i \leftarrow u_i + \gamma_k (\nabla_{u_i} f - v_i g_i), \qquad
        v_i \leftarrow [v_i + \gamma_k (\|u_i\|_p - \epsilon)]_+, \\
        t \leftarrow t + \gamma_k (\lambda - 1), \qquad
        \lambda \leftarrow \Bigl[\lambda
            + \gamma_k \bigl(f - t - \sum_i v_i (\|u_i\|_p - \epsilon)\bigr)\Bigr]_+

    with :math:`g_i \in \partial \|u_i\|_p`.

    Parameters
    ----------
    value_and_gradients : callable
        From theta (q,) and u (n, d) to f (a number) and its gradients (q,) and (n, d).
    theta : array of shape (q,)
        Start.
    u : array of shape (n, d)
        Start of the perturbations, each row with a budget of its own.
    ball : LpBall
        The budget: one radius for all features, no bounds.
    variant : {"ssds", "nolam", "nolag"}
        The full system; without t, :math:`\lambda` being 1; or without v too, u being projected
        on the ball instead (projected descent-ascent).
    n_steps : int
        Number of steps.
    step, decay : float
        First step, and how fast steps fall. The theorem wants :math:`\sum \gamma_k^2 < \infty`, a
        decay above 0.5 and at most 1.
    damped : bool
        False takes the equations above literally. By default the oscillation between a multiplier
        and what it prices is damped (by the extrapolation of Chambolle and Pock, 2011), and norms
        are priced by proximal steps; the rest points are the same.
    record_every : int
        Steps between records.

    Returns
    -------
    SaddleTrace
        The last record is the end.

    Raises
    ------
    ValueError
        For another variant, a ball with bounds or radii per feature, or counts below 1.
    FloatingPointError
        If the iterates stop being finite.

    Warns
    -----
    RuntimeWarning
        If perturbations end far outside the ball.

    Notes
    -----
    The theorem needs f convex in theta and concave in u, strictly in one of them. The loss of a
    classifier at :math:`x + u` is not concave in u: there multipliers alone need not hold u back,
    and only ``"nolag"`` can be relied on.
    """
    check_variant(variant)
    check_counts(n_steps=n_steps, record_every=record_every)
    if np.ndim(ball.epsilon) != 0 or ball.bounds is not None:
        raise ValueError("ball must have one radius and no bounds; scale the problem instead.")
    theta, u = (np.array(start, dtype=np.float64) for start in (theta, u))
    v, t, weight = np.zeros(len(u)), None, 1.0
    records = [(0, theta, u, v, weight)]
    for k in range(n_steps):
        length = step / (1.0 + k) ** decay
        value, theta_gradient, u_gradient = value_and_gradients(theta, u)
        theta = theta - length * weight * theta_gradient
        if variant == "ssds":
            value = value - np.sum(v * budget_excess(numpy_backend, u, ball))
            t = value if t is None else t
            t, weight = next_epigraph(t, weight, value, length, damped=damped)
        u, v = next_perturbations(
            numpy_backend, u, v, u_gradient, ball, length, variant, damped=damped
        )
        if (k + 1) % record_every == 0 or k + 1 == n_steps:
            _check_finite(theta, u, k + 1)
            records.append((k + 1, theta, u, v, weight))
    _warn_if_far(u, ball)
    return SaddleTrace(*(np.array(column) for column in zip(*records, strict=True)))


def next_perturbations(
    xp, u, v, gradient, ball, length, variant, *, price_length=None, damped=True
):
    r"""Return perturbations (n, d) and multipliers (n,) after one step of a length.

    ``"nolag"`` projects on the ball. Otherwise the norm has the price v. The paper's step is

    .. math:: u^+ = u + \gamma (\nabla_u f - v g), \quad g \in \partial \|u\|_p, \qquad
              v^+ = [v + \gamma (\|u\|_p - \epsilon)]_+

    and the damped one, with the price :math:`p = [2 v^+ - v]_+` paid at the new point,

    .. math:: u^+ = a - \Pi_{\gamma p B^*}(a), \qquad a = u + \gamma \nabla_u f,

    where :math:`B^*` is the unit ball of the dual norm: the proximal step of the norm. Subgradients
    overshoot 0 at kinks, so that for l1 steps that do not fall to 0 can diverge; this cannot.
    ``price_length`` is the step of v if it is another one.
    """
    if variant == "nolag":
        return ball.project(xp, u + length * gradient), v
    price_length = length if price_length is None else price_length
    raised = xp.pos(v + price_length * budget_excess(xp, u, ball))
    dual = DUAL_NORM[ball.p]
    if not damped:
        subgradient = LpBall(dual, 1.0).steepest(xp, u)
        return u + length * (gradient - v[:, None] * subgradient), raised
    ahead = u + length * gradient
    reach = (length * xp.pos(2.0 * raised - v))[:, None]
    return ahead - project_rows(xp, ahead, reach, dual), raised


def budget_excess(xp, u, ball):
    r"""Return :math:`\|u_i\|_p - \epsilon` of each row of u (n, d); shape (n,)."""
    return xp.norm(u, ball.p, axis=1) - ball.radius


def next_epigraph(t, weight, value, length, *, damped=True):
    r"""Return t and its multiplier after one step; ``value`` is f less the price of the budgets.

    .. math:: \lambda^+ = [\lambda + \gamma (\text{value} - t)]_+, \qquad
              t^+ = t + \gamma (2 \lambda^+ - \lambda - 1)

    Not damped, :math:`t^+ = t + \gamma (\lambda - 1)`, as in the paper: the same rest point, but an
    oscillation that every step widens.
    """
    raised = max(weight + length * (value - t), 0.0)
    ahead = 2.0 * raised - weight if damped else weight
    return t + length * (ahead - 1.0), raised


def check_variant(variant):
    """Raise ValueError for a variant that is not known."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}.")


def _check_finite(theta, u, k):
    if not (np.isfinite(theta).all() and np.isfinite(u).all()):
        raise FloatingPointError(
            f"the dynamics left the finite numbers by step {k}: take a smaller step, or "
            "variant='nolag' if the objective is not concave in u."
        )


def _warn_if_far(u, ball):
    if np.any(budget_excess(numpy_backend, u, ball) > _LOST * ball.radius):
        warnings.warn(
            f"perturbations ended more than {_LOST:g} radii outside the ball: the objective is "
            "probably not concave in them. Take variant='nolag', which projects.",
            RuntimeWarning,
            stacklevel=3,
        )


# ------------------------------------------------------------------ the adversary alone


@dataclass(frozen=True)
class AscentTrace:
    """Projected gradient ascent with a constant step, for n points at once.

    Attributes
    ----------
    points : ndarray of shape (n, d)
        Where it ended.
    losses : ndarray of shape (r, n)
        At the start and after every step.
    residuals : ndarray of shape (r, n)
        How far the next projected step leads, relative to the first before its projection: 0
        where the first-order conditions hold.
    n_iter : ndarray of shape (n,)
        Steps until the residual fell to the tolerance; -1 where it did not.
    """

    points: np.ndarray
    losses: np.ndarray
    residuals: np.ndarray
    n_iter: np.ndarray


def projected_gradient_trace(
    loss_and_gradient, X, ball, *, step, n_steps=1000, tol=1e-6, start=None
) -> AscentTrace:
    r"""Follow the adversary of Deng et al.: :math:`\delta \leftarrow \Pi(\delta + \eta \nabla L)`.

    Unlike the attacks it takes raw gradients and a constant step, which the theory is about: from
    ever smaller inputs (at a fixed ratio of radius to input) it converges in ever fewer steps.

    Parameters
    ----------
    loss_and_gradient : callable
        From points (n, d) to losses (n,) and gradients (n, d).
    X : array of shape (n, d)
        Centres of the balls.
    ball : LpBall
        The threat model; the projection is exact without bounds, and for l-inf.
    step : float
        :math:`\eta`, in units of x squared per unit of loss; below 1 / curvature it converges.
    n_steps : int
        Steps at most.
    tol : float
        Residual at which a point counts as converged; all converged, the ascent ends.
    start : array of shape (n, d), optional
        First points, in the balls; X by default.

    Returns
    -------
    AscentTrace

    Raises
    ------
    ValueError
        If the step is not positive or n_steps below 1.

    References
    ----------
    Deng, He, Huang and Su, arXiv 2010.10650.
    """
    check_counts(n_steps=n_steps)
    if step <= 0.0:
        raise ValueError(f"step must be positive, got {step!r}.")
    X = np.asarray(X, dtype=np.float64)
    delta = np.zeros_like(X) if start is None else np.asarray(start, dtype=np.float64) - X
    losses, residuals, n_iter = [], [], np.full(len(X), -1)
    for k in range(n_steps + 1):
        loss, gradient = evaluated(loss_and_gradient, X + delta)
        ahead = ball.project(numpy_backend, delta + step * gradient, X)
        losses.append(loss)
        if k == 0:
            first = step * np.linalg.norm(gradient, axis=1)
            first[first == 0.0] = 1.0
        residuals.append(np.linalg.norm(ahead - delta, axis=1) / first)
        n_iter[(n_iter < 0) & (residuals[-1] <= tol)] = k
        if k == n_steps or np.all(n_iter >= 0):
            break
        delta = ahead
    return AscentTrace(X + delta, np.array(losses), np.array(residuals), n_iter)


def is_local_maximum(gradient, hessian, delta, epsilon, *, tol=1e-4) -> bool:
    r"""Return whether a loss has a local maximum over an l2 ball at a perturbation.

    Inside, the gradient is 0 and the Hessian has no positive eigenvalue. On the sphere, with the
    normal :math:`n = \delta / \epsilon`,

    .. math:: \nabla L = \mu \delta, \quad \mu \ge 0, \qquad
              (I - n n') (\nabla^2 L - \mu I) (I - n n') \preceq 0.

    Parameters
    ----------
    gradient : array of shape (d,)
        Of the loss, at x + delta.
    hessian : array of shape (d, d)
        Of the loss, there.
    delta : array of shape (d,)
        The perturbation.
    epsilon : float
        Radius of the ball.
    tol : float
        Slack: of the radius, of the gradient's direction, and of the largest eigenvalue (in size)
        of the Hessian.
    """
    delta, gradient, hessian = (np.asarray(A, dtype=np.float64) for A in (delta, gradient, hessian))
    curvature = np.linalg.norm(hessian, 2)
    if np.linalg.norm(delta) > (1.0 + tol) * epsilon:
        return False
    if np.linalg.norm(delta) < (1.0 - tol) * epsilon:
        flat = np.linalg.norm(gradient) <= tol * curvature * epsilon
        return bool(flat and np.linalg.eigvalsh(hessian)[-1] <= tol * curvature)
    n = delta / np.linalg.norm(delta)
    outward = gradient @ n
    if outward < 0.0 or np.linalg.norm(gradient - outward * n) > tol * np.linalg.norm(gradient):
        return False
    tangent = np.eye(len(n)) - np.outer(n, n)
    along = tangent @ (hessian - outward / epsilon * np.eye(len(n))) @ tangent
    return bool(np.linalg.eigvalsh(along)[-1] <= tol * curvature)
