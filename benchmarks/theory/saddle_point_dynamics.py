r"""Saddle-point dynamics of robust training.

    python benchmarks/theory/saddle_point_dynamics.py

Robust training is a game, min over theta and max over perturbations ||u_i||_p <= epsilon of
f(theta, u). Esfandiari, Balu, Ebrahimi, Vaidya, Elia and Sarkar (2021, "A fast saddle-point
dynamical system approach to robust deep learning") let both players move at once, along the
Lagrangian in epigraph form

    L = t + lambda [ f(theta, u) - t - sum_i v_i (||u_i||_p - epsilon) ],

down in theta, t and v, up in u and lambda, and prove that with falling steps this ends in the
robust optimum, if f is convex in theta and concave in u, strictly in one of them. Three variants:
"ssds" is the full system, "nolam" has no t and lambda, "nolag" no v either: u is projected on the
ball. "Literal" steps are those of the paper; the package damps them, with the same rest points.

The theorem is tested with X (n, d), y and theta (d), where cvxpy knows the optimum:

1. strictly concave, one u for all rows: |X theta - y|^2 / 2n + u'theta - |u|^2 / 2. The maximum
   over u is an infimal convolution, min over w of epsilon ||w||_q + |theta - w|^2 / 2, with q dual
   to p, and the price of the budget is v = ||w||_q.
2. affine: |X theta - y|^2 / 2n + u'theta. The optimum is that of the penalty epsilon ||theta||_q:
   the Lasso for p = inf, the infinity norm for p = 1.
3. not strict at all: u'theta. Here simultaneous steps provably do not get closer.
4. convex in u: robust logistic regression, sum_i log(1 + exp(-y_i (x_i + u_i)'theta)), with the
   optimum of log(1 + exp(-y_i x_i'theta + epsilon ||theta||_q)). The assumption is violated.
5. its convex-concave lift. From log(1 + e^-m) = max of -q m + H(q) over 0 <= q <= 1, H the entropy,
   with w_i = q_i u_i the same maximum is that of the jointly concave

       -q_i y_i x_i'theta - y_i w_i'theta + H(q_i)   over the cone   ||w_i||_p <= epsilon q_i.

   Its set is no ball, so projected steps are taken here, with the exact projection on the cone.
"""

import warnings
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
from _claims import Finding, main
from sklearn.linear_model import Lasso

from convexrobust.backends import numpy as numpy_backend
from convexrobust.dynamics import VARIANTS, saddle_point_dynamics
from convexrobust.perturbations import DUAL_NORM, LpBall
from convexrobust.projection import project_rows

NORMS = {"l1": 1, "l2": 2, "linf": np.inf}
RADII = {"l1": 0.6, "l2": 0.3, "linf": 0.1}
WAYS = [("nolag", True), *((v, damped) for damped in (True, False) for v in ("nolam", "ssds"))]
STEPS = {"step": 0.4, "decay": 0.55}  # the theorem wants a decay above 0.5
LIFT = {"step": 0.3, "decay": 0.55, "pace": 0.3}  # pace: steps of theta against those of q and w
SHORT = {"step": 0.1, "decay": 0.55}  # for the sum over rows, which lambda multiplies once more
EDGE = 1e-6  # q stays this far from 0 and 1, where the entropy is infinitely steep


@dataclass(frozen=True)
class Game:
    """f with its gradients, where it starts, the set of u, and the optimum by cvxpy."""

    f: callable
    start: tuple
    ball: LpBall
    theta: np.ndarray
    price: float = 0.0

    def distance(self, theta):
        """Return the distance of points (..., d) to the optimum, relative to its length."""
        return np.linalg.norm(theta - self.theta, axis=-1) / np.linalg.norm(self.theta)


# ------------------------------------------------------------------ the games


def regression_data():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 6))
    return X, X @ rng.normal(size=6) + rng.normal(size=40)


def regression(name, *, strict):
    """Return the game of least squares, strictly concave or affine in u."""
    (X, y), p, bend = regression_data(), NORMS[name], float(strict)
    n, d = X.shape

    def f(theta, u):
        r = X @ theta - y
        value = r @ r / (2 * n) + u[0] @ theta - bend * u[0] @ u[0] / 2
        return value, X.T @ r / n + u[0], (theta - bend * u[0])[None]

    ball = LpBall(p, RADII[name] if strict else 0.4)
    theta, w = cp.Variable(d), cp.Variable(d)
    reach = ball.radius * cp.norm(w, DUAL_NORM[p])
    reach += cp.sum_squares(theta - w) / 2 if strict else 0.0
    cost = cp.sum_squares(X @ theta - y) / (2 * n) + reach
    minimise(cost, [] if strict else [theta == w])
    price = np.linalg.norm(w.value, DUAL_NORM[p])
    return Game(f, (np.zeros(d), np.zeros((1, d))), ball, theta.value, price)


def logistic_data():
    rng = np.random.default_rng(5)
    X = rng.normal(size=(30, 3))
    return X, np.where(X @ [2.0, -1.5, 1.0] + rng.normal(size=30) > 0.0, 1.0, -1.0)


def logistic(name):
    """Return the game of robust logistic regression, which is convex in u."""
    (X, y), p = logistic_data(), NORMS[name]
    n, d = X.shape

    def f(theta, u):
        margin = y * ((X + u) @ theta)
        slope = -y * sigmoid(-margin)
        value = np.logaddexp(0.0, -margin).sum()
        return value, (X + u).T @ slope, slope[:, None] * theta

    ball, theta = LpBall(p, 0.3), cp.Variable(d)
    reach = ball.radius * cp.norm(theta, DUAL_NORM[p])
    minimise(cp.sum(cp.logistic(reach - cp.multiply(y, X @ theta))) / n)
    return Game(f, (np.zeros(d), np.zeros((n, d))), ball, theta.value)


def robust_loss(theta, ball):
    """Return the worst-case mean logistic loss in closed form."""
    X, y = logistic_data()
    margin = y * (X @ theta) - ball.radius * np.linalg.norm(theta, DUAL_NORM[ball.p])
    return np.logaddexp(0.0, -margin).mean()


def sigmoid(t):
    return 0.5 + 0.5 * np.tanh(t / 2.0)


def minimise(cost, constraints=()):
    """Solve by Clarabel, to gaps at the end of what double precision gives."""
    tight = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12}
    with warnings.catch_warnings():
        # A solve that stalls above 1e-12 is returned with this warning, good to 1e-8.
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")
        cp.Problem(cp.Minimize(cost), list(constraints)).solve(solver=cp.CLARABEL, **tight)


# ------------------------------------------------------------------ following them


@dataclass(frozen=True)
class Path:
    """What is told of one run: records of the distance to the optimum, and how it ended."""

    iterations: np.ndarray
    distances: np.ndarray
    theta: np.ndarray
    reach: float  # longest perturbation at the end, in radii
    price: float
    weight: float

    @property
    def error(self):
        return self.distances[-1]


def followed(game, variant, n_steps, *, damped=True, **steps):
    """Return the path of the package's dynamics, or None if they leave the finite numbers."""
    options = {"n_steps": n_steps, "record_every": max(n_steps // 200, 1)} | (steps or STEPS)
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        # Expected where f is not concave in u: that is what is measured.
        warnings.filterwarnings("ignore", message="perturbations ended more than")
        try:
            trace = saddle_point_dynamics(
                game.f, *game.start, game.ball, variant=variant, damped=damped, **options
            )
        except FloatingPointError:
            return None
    return Path(
        trace.iterations,
        game.distance(trace.theta),
        trace.theta[-1],
        np.linalg.norm(trace.u[-1], game.ball.p, axis=1).max() / game.ball.radius,
        trace.v[-1].max(),
        trace.weight[-1],
    )


def on_cone(q, w, ball):
    r"""Project pairs q (n,), w (n, d) on ||w_i||_p <= epsilon q_i, EDGE <= q_i <= 1 - EDGE.

    For fixed q the nearest w is the projection on a ball, at a distance that is convex in q. So the
    best q in the cone alone may be clipped, and only then w is projected. That best q solves
    q - q_0 = epsilon ||w_0 - w(q)||_*, whose right side is a maximum of linear functions for l1 (of
    the shrinkage) and l-inf (of q): one for each number k of entries that are cut, so that the
    solution is the largest of their roots.
    """
    epsilon = ball.radius
    if ball.p == 2:
        q = np.maximum(q, (q + epsilon * np.linalg.norm(w, axis=1)) / (1.0 + epsilon**2))
    else:
        k, sums = np.arange(1, w.shape[1] + 1), np.cumsum(-np.sort(-np.abs(w), axis=1), axis=1)
        if ball.p == np.inf:
            roots = (q[:, None] + epsilon * sums) / (1.0 + k * epsilon**2)
            q = np.maximum(q, roots.max(axis=1))
        else:
            shrinkage = (sums - epsilon * q[:, None]) / (k + epsilon**2)
            q = q + epsilon * np.maximum(shrinkage.max(axis=1), 0.0)
    q = np.clip(q, EDGE, 1.0 - EDGE)
    return q, project_rows(numpy_backend, w, epsilon * q[:, None] + 0.0 * w, ball.p)


def lifted(game, n_steps):
    """Return the path of projected descent-ascent on the lift of the logistic loss."""
    X, y = logistic_data()
    theta, w = game.start
    q, records = np.full(len(y), 0.5), [(0, theta)]
    for k in range(n_steps):
        length = LIFT["step"] / (1.0 + k) ** LIFT["decay"]
        ahead = theta + LIFT["pace"] * length * ((q * y) @ X + y @ w)
        uphill = np.log((1.0 - q) / q) - y * (X @ theta)
        q, w = on_cone(q + length * uphill, w - length * y[:, None] * theta, game.ball)
        theta = ahead
        if (k + 1) % max(n_steps // 200, 1) == 0 or k + 1 == n_steps:
            records.append((k + 1, theta))
    iterations, thetas = (np.array(column) for column in zip(*records, strict=True))
    reach = np.linalg.norm(w / q[:, None], game.ball.p, axis=1).max() / game.ball.radius
    return Path(iterations, game.distance(thetas), theta, reach, 0.0, 1.0)


# ------------------------------------------------------------------ the claims


def concave_findings(paths, games, quick):
    """Return the findings on the game that is strictly concave in u."""
    tolerances = (1e-2, 0.15, 0.15) if quick else (1e-6, 1e-2, 2e-2)
    claims = "projected", "damped multiplier", "literal multiplier"
    findings = [
        reached(f"Strictly concave in u: {claim} steps reach the robust optimum.", ways, *rest)
        for claim, ways, *rest in zip(
            claims, (WAYS[:1], WAYS[1:3], WAYS[3:]), [paths] * 3, tolerances, strict=True
        )
    ]
    gap = max(abs(paths[n, *way].price / games[n].price - 1.0) for n in NORMS for way in WAYS[1:3])
    weights = [paths[n, "ssds", True].weight for n in NORMS]
    constant = followed(games["l1"], "ssds", 300, step=0.3, decay=0.0)
    tolerance = 0.3 if quick else 2e-2
    return [
        *findings,
        Finding(
            "The multiplier v ends at the price of the budget, ||w||_q of the infimal convolution.",
            f"damped steps, both variants, all norms; relative tolerance {tolerance:g}",
            f"largest relative error {gap:.1e}",
            bool(gap <= tolerance),
        ),
        Finding(
            "The multiplier lambda ends at 1 when theta has converged.",
            "damped ssds, all norms; tolerance 0.1",
            "lambda "
            + ", ".join(f"{n} {weight:.2f}" for n, weight in zip(NORMS, weights, strict=True))
            + f"; after 300 constant steps of 0.3 for l1: {constant.weight:.4f}",
            bool(np.max(np.abs(np.array(weights) - 1.0)) <= 0.1),
            proven=False,
            remark="t and lambda circle around their rest point. A damped step shrinks the circle "
            "by a factor of order 1 - step^2, and the theorem wants squared steps with a finite "
            "sum, so that a circle stays; constant steps end it. Theta and v do not suffer: lambda "
            "only sets the pace of theta.",
        ),
    ]


def reached(claim, ways, paths, tolerance, proven=True, remark=""):
    """Return the finding that all paths of some ways ended within a tolerance of the optimum."""
    errors = {
        f"{variant} {name}": paths[name, variant, damped].error
        for variant, damped in ways
        for name in NORMS
    }
    n_steps = paths["l1", *ways[0]].iterations[-1]
    return Finding(
        claim,
        f"X of shape (40, 6), {n_steps} steps of {STEPS['step']} / (1 + k)^{STEPS['decay']}, "
        f"error of theta relative to cvxpy at most {tolerance:g}",
        ", ".join(f"{key} {error:.1e}" for key, error in errors.items()),
        bool(max(errors.values()) <= tolerance),
        proven,
        remark,
    )


def long_steps(game):
    """Return the finding on the first steps being too long for literal multipliers."""
    options = {"step": 1.0, "decay": 0.55}
    errors = [followed(game, "nolam", 300, damped=damped, **options).error for damped in (0, 1)]
    return Finding(
        "With longer first steps literal multipliers are thrown off for l1, damped ones are not.",
        "strictly concave game, nolam, 300 steps of 1 / (1 + k)^0.55; off means a relative error "
        "above 1, reached below 0.01",
        f"literal {errors[0]:.1e}, damped {errors[1]:.1e}",
        bool(errors[0] > 1.0 and errors[1] < 1e-2),
        proven=False,
        remark="No contradiction: the theorem is about iterates that stay bounded. Subgradients of "
        "the l1 norm have length sqrt(d) even at 0, so that one long step with a price overshoots, "
        "which raises the price.",
    )


def affine_findings(paths, games, quick):
    """Return the findings on the game that is affine in u, but strictly convex in theta."""
    tolerances = (1e-2, 0.1, 0.2) if quick else (1e-6, 1e-2, 2e-2)
    X, y = regression_data()
    lasso = Lasso(alpha=games["linf"].ball.radius, fit_intercept=False, tol=1e-12).fit(X, y).coef_
    error = np.linalg.norm(paths["linf", "nolag", True].theta - lasso) / np.linalg.norm(lasso)
    return [
        reached("Affine in u: projected steps reach the optimum.", WAYS[:1], paths, tolerances[0]),
        Finding(
            "Affine in u with an l-inf budget: the optimum is the Lasso.",
            f"against coordinate descent of scikit-learn, tolerance {tolerances[0]:g}",
            f"relative error {error:.1e}, {np.sum(lasso == 0.0)} of 6 coefficients are 0",
            bool(error <= tolerances[0]),
        ),
        reached(
            "Affine in u: damped multiplier steps reach the optimum.",
            WAYS[1:3],
            paths,
            tolerances[1],
        ),
        reached(
            "Affine in u: literal multiplier steps reach the optimum, for l1 too.",
            WAYS[3:],
            paths,
            tolerances[2],
            remark="f is strictly convex in theta, which is enough. The subgradients chatter: "
            "errors for l1 and l-inf fall as slowly as the steps.",
        ),
    ]


def circle(quick):
    """Return the finding on the bilinear game u'theta, for which nothing is strict."""

    def f(theta, u):
        return theta @ u[0], u[0], theta[None]

    start = np.array([0.1, 0.0]), np.array([[0.0, 0.1]])
    n_steps = 300 if quick else 3000
    trace = saddle_point_dynamics(
        f, *start, LpBall(2, 1.0), n_steps=n_steps, record_every=1, **STEPS
    )
    radii = np.hypot(
        *(np.linalg.norm(z.reshape(len(z), -1), axis=1) for z in (trace.theta, trace.u))
    )
    lengths = STEPS["step"] / (1.0 + np.arange(n_steps)) ** STEPS["decay"]
    mean = np.linalg.norm(lengths @ trace.theta[:-1]) / lengths.sum()
    return Finding(
        "Strict nowhere: on u'theta the iterates never come closer to the saddle point 0, while "
        "their average weighted by the steps does.",
        f"nolag, l2 ball of radius 1, start at distance {radii[0]:.2f}, {n_steps} steps; a step "
        "multiplies the squared distance by 1 + step^2; the average has to be below half the start",
        f"smallest distance {radii.min():.3f}, last {radii[-1]:.3f}, average {mean:.3f}",
        bool(np.all(np.diff(radii) > 0.0) and mean < radii[0] / 2.0),
    )


def logistic_findings(paths, games, quick):
    """Return the findings on robust logistic regression, convex in u."""
    gaps = {key: excess(path, games[key[0]]) for key, path in paths.items() if key[1] != "lift"}
    tolerance = 1e-3
    lags = [gaps[n, "nolag"] for n in NORMS]
    free = {key: gap for key, gap in gaps.items() if key[1] != "nolag"}
    reaches = {key: paths[key].reach if paths[key] else np.inf for key in free}
    setting = f"30 rows in 3 features, radius 0.3; gap of the robust mean loss below {tolerance:g}"
    return [
        Finding(
            "Convex in u, outside the theorem: projected steps reach the optimum of robust "
            "logistic regression all the same.",
            setting,
            "gaps " + ", ".join(f"{n} {gap:.1e}" for n, gap in zip(NORMS, lags, strict=True)),
            bool(max(lags) <= tolerance),
            proven=False,
            remark="The loss of a linear model is monotone in u'theta: over the ball it has no "
            "local maximum but the global one.",
        ),
        Finding(
            "Convex in u, outside the theorem: multiplier steps reach that optimum too.",
            setting + f"; damped steps, ssds with first step {SHORT['step']}",
            ", ".join(
                f"{v} {n} gap {gap:.1e} (longest u {reaches[n, v]:.1f} radii)"
                for (n, v), gap in free.items()
            ),
            bool(max(free.values()) <= tolerance),
            proven=False,
            remark="Along every ray f(theta, u) - v ||u|| is convex in the length of u: its "
            "stationary point is a minimum, from which steps lead back to 0 or out of the ball, "
            "whatever the price. The price then swings u across the sphere. Projection holds it. "
            f"With the first step {STEPS['step']} of the others ssds leaves the finite numbers.",
        ),
    ]


def excess(path, game):
    """Return how far the robust loss of the end of a path is above the optimum."""
    if path is None:
        return np.inf
    return robust_loss(path.theta, game.ball) - robust_loss(game.theta, game.ball)


def lift_findings(paths, games):
    """Return the findings on the convex-concave lift."""
    errors = {name: projection_error(games[name].ball) for name in NORMS}
    gaps = [excess(paths[name, "lift"], games[name]) for name in NORMS]
    values = [lift_error(game) for game in games.values()]
    return [
        Finding(
            "The lift has the value of the robust loss: its maximum over the cone is at q = "
            "sigmoid(-worst margin), w = q u.",
            "at the optimal theta, all norms; equality to 1e-12, and 2000 random points of the "
            "cone are not above",
            f"largest difference {max(error for error, _ in values):.1e}, random points at best "
            f"{max(best for _, best in values):.1e} above",
            bool(max(max(pair) for pair in values) <= 1e-12),
        ),
        Finding(
            "The projection on the cone ||w||_p <= epsilon q, 0 <= q <= 1 is exact.",
            "against cvxpy, 5 points a norm, tolerance 1e-5",
            ", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
            bool(max(errors.values()) <= 1e-5),
        ),
        Finding(
            "Projected descent-ascent on the lift reaches the optimum of robust logistic "
            "regression.",
            f"{paths['l1', 'lift'].iterations[-1]} steps, gap of the robust mean loss below 2e-3",
            "gaps " + ", ".join(f"{n} {gap:.1e}" for n, gap in zip(NORMS, gaps, strict=True)),
            bool(max(gaps) <= 2e-3),
            proven=False,
            remark="Strictly concave in q, but linear in w and theta: convergence of the averages "
            "is proven, that of the last iterates is seen here. Steps were chosen among a few: "
            "others are slower, with gaps for l1 up to 5e-2 after 3000 steps. The loss is "
            "flat there: theta itself is less close.",
        ),
    ]


def projection_error(ball):
    """Return the largest difference between the projection on the cone and that of cvxpy."""
    rng, errors = np.random.default_rng(0), []
    for _ in range(5):
        q_0, w_0 = 2.0 * rng.normal(size=1), 2.0 * rng.normal(size=(1, 3))
        q, w = cp.Variable(1), cp.Variable((1, 3))
        cone = [cp.norm(w[0], ball.p) <= ball.radius * q[0], q <= 1.0]
        minimise(cp.sum_squares(q - q_0) + cp.sum_squares(w - w_0), cone)
        mine = on_cone(q_0, w_0, ball)
        errors += [np.abs(mine[0] - q.value).max(), np.abs(mine[1] - w.value).max()]
    return max(errors)


def lift_error(game):
    """Return how far the lift at its maximum is from the robust loss, and random points above."""
    (X, y), ball, theta = logistic_data(), game.ball, game.theta
    away = -y[:, None] * ball.steepest(numpy_backend, theta[None])
    q = sigmoid(-y * ((X + away) @ theta))
    rng = np.random.default_rng(1)

    def lift(q, w):
        entropy = -q * np.log(q) - (1.0 - q) * np.log(1.0 - q)
        return (entropy - q * y * (X @ theta) - y * (w @ theta)).mean()

    maximum = robust_loss(theta, ball)
    points = (on_cone(q + 0.1 * rng.normal(size=30), q[:, None] * away, ball) for _ in range(2000))
    return abs(lift(q, q[:, None] * away) - maximum), max(lift(*z) for z in points) - maximum


# ------------------------------------------------------------------ the study and its picture


def study(quick):
    n_steps = 300 if quick else 6000
    findings, paths = [], {}
    for kind, told in (("concave", concave_findings), ("affine", affine_findings)):
        games = {name: regression(name, strict=kind == "concave") for name in NORMS}
        paths[kind] = {
            (name, *way): followed(game, way[0], n_steps, damped=way[1])
            for name, game in games.items()
            for way in WAYS
        }
        findings += told(paths[kind], games, quick)
        findings += [long_steps(games["l1"])] if kind == "concave" else [circle(quick)]
    games = {name: logistic(name) for name in NORMS}
    paths["logistic"] = {
        (name, v): followed(game, v, n_steps, **(SHORT if v == "ssds" else STEPS))
        for name, game in games.items()
        for v in VARIANTS
    } | {(name, "lift"): lifted(game, 2 * n_steps) for name, game in games.items()}
    findings += logistic_findings(paths["logistic"], games, quick)
    findings += lift_findings(paths["logistic"], games)
    return findings, {kind: thinned(runs) for kind, runs in paths.items()}


def thinned(paths):
    """Return iterations and distances of the paths, at points that are even on a log axis."""
    curves = {}
    for (name, variant, *damped), path in paths.items():
        if path is None or (variant == "ssds" and damped == [False]):
            continue
        rows = np.unique(np.geomspace(1, len(path.iterations) - 1, 40).astype(int))
        errors = [float(f"{error:.2e}") for error in path.distances[rows]]
        label = "literal" if damped == [False] else variant
        curves[f"{label} {name}"] = [path.iterations[rows].tolist(), errors]
    return curves


def draw(figure, curves):
    figure.set_size_inches(12, 4.4)
    axes = figure.subplots(1, 3)
    titles = {"concave": "strictly concave in u", "affine": "affine in u"}
    titles["logistic"] = "logistic: convex in u, and its lift"
    colours = {"nolag": "C0", "nolam": "C1", "ssds": "C3", "lift": "C2", "literal": "0.6"}
    names = {"nolag": "nolag, projected", "literal": "nolam, literal"}
    names |= {"nolam": "nolam, damped", "ssds": "ssds, damped", "lift": "lift, projected"}
    dashes = {"l1": "-", "l2": "--", "linf": ":"}
    for ax, (kind, runs) in zip(axes, curves.items(), strict=True):
        for label, (iterations, errors) in runs.items():
            variant, name = label.split()
            ax.loglog(iterations, errors, dashes[name], color=colours[variant], lw=1.4)
        ax.set(title=titles[kind], xlabel="step k", ylim=(1e-7, 2.0))
    axes[0].set_ylabel("distance of theta to the optimum, relative")
    for variant, colour in colours.items():
        axes[2].plot([], [], color=colour, label=names[variant])
    for name, dash in dashes.items():
        axes[2].plot([], [], dash, color="black", label=name)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=8)


if __name__ == "__main__":
    main(study, draw)
