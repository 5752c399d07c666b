r"""Adversarial training with a polynomial activation, as a semidefinite program.

    python benchmarks/theory/polynomial_activation.py

Take sigma(t) = a t^2 + b t + c as activation, hidden weights u_j of length 1, and the l1 norm of
the output weights alpha as penalty. Following Bartan and Pilanci (2021), two positive semidefinite
matrices Z+ and Z- of order d + 1 hold all neurons of either sign,

    Z = sum |alpha_j| (u_j, 1) (u_j, 1)' = [[Z1, Z2], [Z2', Z4]],  trace Z1 = Z4 = sum |alpha_j|,

and with A = Z1+ - Z1-, q = Z2+ - Z2-, t = Z4+ - Z4- the network is the quadratic function

    f(x) = a x'Ax + b x'q + c t,    t = trace A.

Every Z with trace Z1 = Z4 is such a sum, of as many terms as its rank: take any factors z_j of
Z = sum z_j z_j', and as long as two of them have unequal blocks, |p|^2 > r^2 in the one and < in
the other, z = (p, r), rotate the pair until one has equal blocks. Then u = p / r, |alpha| = r^2.

Against an l2 attack of radius e (Kuelbs, Lall and Pilanci 2024) the worst margin of a sample is
the minimum of a quadratic function over a ball. By the S-lemma it is at least s exactly if some
tau >= 0 makes

    [[ e^2 y a A + tau I,             e y (a A x + b q / 2) ],
     [ e y (a A x + b q / 2)',        y f(x) - s - tau      ]]   positive semidefinite,

which is linear in Z+, Z-, s, tau. So with the mean hinge of s plus beta (Z4+ + Z4-) training is a
semidefinite program whose value is that of non-convex adversarial training for enough neurons:
unlike the programs for ReLU networks, an equality for every radius.

The checks use none of this: the minimum over a ball is found from the eigenvalues of the quadratic
function and the root of the secular equation, and the non-convex problem by gradient descent.
"""

import warnings
from typing import NamedTuple

import cvxpy
import numpy as np
import torch
from _claims import Finding, main
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

RANGE = 3.0
# The parabola nearest to the ReLU in least squares on [-RANGE, RANGE].
CURVE, SLOPE, LEVEL = 15.0 / (32.0 * RANGE), 0.5, 3.0 * RANGE / 32.0
BETA = 0.01
SOLVER = 1e-9  # tolerance of the solver
TOLERANCE = 1e-6  # of values, relative
RADII = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
COMPARED = (0.1, 0.4)  # radii of the non-convex runs
TABLE_RADIUS = 0.4  # of training on the table


class Quadratic(NamedTuple):
    """The function x'Hx + h'x + k; leading axes are those of a batch."""

    H: np.ndarray
    h: np.ndarray
    k: np.ndarray

    def at(self, X):
        """Return the values at points of shape (..., n, d)."""
        values = np.einsum("...ni,...ij,...nj->...n", X, self.H, X)
        return values + np.einsum("...ni,...i->...n", X, self.h) + np.asarray(self.k)[..., None]


class Trained(NamedTuple):
    """A solution of the semidefinite program."""

    Z: tuple[np.ndarray, np.ndarray]
    value: float
    f: Quadratic


def study(quick):
    """Solve the program on small data, check it in three ways, and try it on a table."""
    radii = (0.0, 0.1, 0.4) if quick else RADII
    tasks = [crossed(d, seed) for d in (2, 3) for seed in (0, 1)][: 1 if quick else 4]
    solved = [(data, e, train(*data, e)) for data in tasks for e in radii]
    descents = [compare(*case, quick) for case in solved if case[1] in COMPARED]
    table = [on_table(seed, 24 if quick else 60) for seed in range(1 if quick else 10)]
    findings = [
        exact_value(solved),
        secular_equation(solved),
        decomposition(solved),
        never_beaten(descents),
        reached(descents),
        better_on_table(table),
    ]
    return findings, curves_of(solved[: len(radii)], table)


def crossed(d, seed, n=16):
    """Return a class along the first axis and one along the second, as in an exclusive or.

    A class around the origin inside the other would not do: at the origin f is c times the trace
    of A, of the sign of the mean curvature.
    """
    rng = np.random.default_rng(seed)
    rows = np.arange(n)
    X = 0.45 * rng.standard_normal((n, d))
    y = np.where(rows % 2 == 0, 1.0, -1.0)
    X[rows, rows % 2] += np.where(rows // 2 % 2 == 0, 1.3, -1.3)
    return X, y


# ---------------------------------------------------------------------- the semidefinite program


def train(X, y, radius):
    """Solve the semidefinite program for an l2 attack of a radius."""
    (n, d), order = X.shape, X.shape[1] + 1
    Z = [cvxpy.Variable((order, order), PSD=True) for _ in range(2)]
    difference = Z[0] - Z[1]
    H, h = CURVE * difference[:d, :d], SLOPE * difference[:d, d]
    s, tau = cvxpy.Variable(n), cvxpy.Variable(n, nonneg=True)
    equal = [cvxpy.trace(part[:d, :d]) == part[d, d] for part in Z]
    worst = []
    for k in range(n):
        margin = y[k] * (X[k] @ H @ X[k] + h @ X[k] + LEVEL * difference[d, d])
        if radius == 0.0:  # the ball has no interior, which the S-lemma asks for
            worst.append(margin >= s[k])
            continue
        side = cvxpy.reshape(radius * y[k] * (H @ X[k] + h / 2), (d, 1), order="F")
        corner = cvxpy.reshape(margin - s[k] - tau[k], (1, 1), order="F")
        block = radius**2 * y[k] * H + tau[k] * np.eye(d)
        worst.append(cvxpy.bmat([[block, side], [side.T, corner]]) >> 0)
    penalty = BETA * (Z[0][d, d] + Z[1][d, d])
    problem = cvxpy.Problem(
        cvxpy.Minimize(cvxpy.sum(cvxpy.pos(1.0 - s)) / n + penalty), equal + worst
    )
    tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), SOLVER)
    with warnings.catch_warnings():
        # Near its last digits the solver may call a solution inaccurate; the checks judge it.
        warnings.simplefilter("ignore", UserWarning)
        problem.solve(solver=cvxpy.CLARABEL, **tolerances)
    values = tuple(part.value for part in Z)
    return Trained(values, float(problem.value), quadratic(values[0] - values[1]))


def quadratic(Z):
    """Return the function of a difference Z+ - Z-."""
    d = len(Z) - 1
    return Quadratic(CURVE * Z[:d, :d], SLOPE * Z[:d, d], LEVEL * Z[d, d])


# --------------------------------------------------------------------------- the independent checks


def worst_shift(f, X, y, radius):
    """Return the shifts of length at most the radius that minimise y f(x + shift), exactly.

    With y H = Q diag(c) Q' and g the gradient of y f at x, the minimiser is
    -Q (Q'g) / (2 (c + mu)) with mu >= max(0, -c_min) such that its length is the radius, or mu = 0.
    Where c_min < 0 the part along its eigenvector follows from the others and the length; so it is
    right also in the hard case, when g has no part along it and mu = -c_min.
    """
    curvature, Q = np.linalg.eigh(f.H)
    curvature = y[:, None] * curvature[..., None, :]
    gradient = y[:, None] * (2.0 * X @ f.H + f.h[..., None, :])
    along = gradient @ Q
    low = np.maximum(-curvature.min(axis=-1, keepdims=True), 0.0)
    first = low
    high = low + np.linalg.norm(along, axis=-1, keepdims=True) / (2.0 * max(radius, 1e-300))
    for _ in range(45):
        mu = 0.5 * (low + high)
        long = np.linalg.norm(_shift(along, curvature, mu), axis=-1, keepdims=True) > radius
        low, high = np.where(long, mu, low), np.where(long, high, mu)
    shift = _shift(along, curvature, high)
    lowest = np.eye(X.shape[-1])[curvature.argmin(axis=-1)]
    others = shift * (1.0 - lowest)
    rest = np.sqrt(np.maximum(radius**2 - np.sum(others**2, axis=-1, keepdims=True), 0.0))
    on_sphere = others + np.where(shift < 0.0, -rest, rest) * lowest
    shift = np.where(first > 0.0, on_sphere, shift)
    return shift @ np.swapaxes(Q, -1, -2)


def _shift(along, curvature, mu):
    return -along / (2.0 * np.maximum(curvature + mu, 1e-300))


def worst_margins(f, X, y, radius):
    """Return the smallest y f over the ball around each sample."""
    return y * f.at(X + worst_shift(f, X, y, radius))


def worst_loss(f, X, y, radius):
    """Return the mean hinge at the worst points."""
    return np.maximum(1.0 - worst_margins(f, X, y, radius), 0.0).mean(axis=-1)


def decomposed(Z):
    """Return neurons (u_j as rows, |alpha_j|) of a matrix with trace Z1 = Z4."""
    values, vectors = np.linalg.eigh(Z)
    rest = list((vectors * np.sqrt(np.maximum(values, 0.0))).T)
    done = []
    while rest:
        excess = np.array([z[:-1] @ z[:-1] - z[-1] ** 2 for z in rest])
        i, j = int(excess.argmax()), int(excess.argmin())
        if excess[i] <= 0.0 or excess[j] >= 0.0:  # what is left is balanced up to rounding
            done += rest
            break
        x, z = rest[i], rest[j]
        # The root t of |p|^2 = r^2 for x + t z; one is real as the excesses differ in sign.
        mixed = x[:-1] @ z[:-1] - x[-1] * z[-1]
        t = (-mixed + np.sqrt(mixed**2 - excess[i] * excess[j])) / excess[j]
        length = np.hypot(1.0, t)
        done.append((x + t * z) / length)
        rest = [other for k, other in enumerate(rest) if k not in (i, j)] + [(z - t * x) / length]
    kept = np.array([z for z in done if z[-1] ** 2 > 1e-7]).reshape(-1, len(Z))
    return kept[:, :-1] / kept[:, -1:], kept[:, -1] ** 2


def network(U, alpha):
    """Return the quadratic function of neurons U (..., m, d) with output weights (..., m)."""
    H = CURVE * np.einsum("...m,...mi,...mj->...ij", alpha, U, U)
    return Quadratic(H, SLOPE * np.einsum("...m,...mi->...i", alpha, U), LEVEL * alpha.sum(axis=-1))


def descend(X, y, radius, n_starts, n_steps, n_neurons):
    """Train networks adversarially from random starts; return the best exact objective of each.

    The gradient of the worst loss is that at the worst point (Danskin).
    """
    torch.manual_seed(0)
    w = torch.randn(n_starts, n_neurons, X.shape[1], dtype=torch.float64, requires_grad=True)
    alpha = torch.randn(n_starts, n_neurons, dtype=torch.float64, requires_grad=True)
    data, labels = torch.as_tensor(X), torch.as_tensor(y)
    optimizer = torch.optim.Adam([w, alpha], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, n_steps)
    best = np.full(n_starts, np.inf)
    for _ in range(n_steps):
        U = w / w.norm(dim=-1, keepdim=True)
        f = network(U.detach().numpy(), alpha.detach().numpy())
        shift = worst_shift(f, X, y, radius)
        t = (data + torch.as_tensor(shift)) @ U.transpose(-1, -2)
        outputs = ((CURVE * t**2 + SLOPE * t + LEVEL) * alpha[:, None, :]).sum(dim=-1)
        loss = (1.0 - labels * outputs).clamp_min(0.0).mean(dim=-1)
        objective = loss + BETA * alpha.abs().sum(dim=-1)
        best = np.minimum(best, objective.detach().numpy())
        optimizer.zero_grad()
        objective.sum().backward()
        optimizer.step()
        schedule.step()
    return best


def compare(data, radius, trained, quick):
    """Return the value of the program, and what gradient descent found relative to it."""
    d = data[0].shape[1]
    n_starts, n_steps = (10, 500) if quick else (50, 1000)
    found = descend(*data, radius, n_starts, n_steps, 2 * (d + 1))
    return {"d": d, "radius": radius, "value": trained.value, "found": found / trained.value - 1.0}


# ---------------------------------------------------------------------------------------- findings


def setting(cases):
    """Describe the solved programs."""
    dimensions = sorted({data[0].shape[1] for data, *_ in cases})
    radii = sorted({e for _, e, _ in cases})
    return f"{len(cases)} programs, 16 samples, d = {dimensions}, radii {radii}, beta = {BETA}"


def exact_value(solved):
    """Compare values with the exact worst-case objective of the function found."""
    off = [objective(*data, e, t) / t.value - 1.0 for data, e, t in solved]
    return Finding(
        "The value of the semidefinite program is the exact worst-case objective of its function "
        "(Kuelbs, Lall and Pilanci 2024, by the S-lemma).",
        f"{setting(solved)}; minimum over the ball by the secular equation; tolerance "
        f"{TOLERANCE:g}, relative",
        f"largest relative difference {np.abs(off).max():.1e}",
        bool(np.abs(off).max() <= TOLERANCE),
    )


def objective(X, y, radius, trained):
    """Return the exact worst-case objective of a solution."""
    return worst_loss(trained.f, X, y, radius) + BETA * sum(Z[-1, -1] for Z in trained.Z)


def secular_equation(solved):
    """Compare the exact minimum over a disc with a fine sample of it."""
    angle, length = np.meshgrid(np.linspace(0.0, 2.0 * np.pi, 721), np.linspace(0.0, 1.0, 41))
    disc = np.stack([length * np.cos(angle), length * np.sin(angle)], axis=-1).reshape(-1, 2)
    below, above, outside = -np.inf, -np.inf, -np.inf
    for f, X, y, e in plane_cases(solved):
        exact = worst_margins(f, X, y, e)
        sampled = [(y_k * f.at(x + e * disc)).min() for x, y_k in zip(X, y, strict=True)]
        below, above = max(below, (exact - sampled).max()), max(above, (sampled - exact).max())
        lengths = np.linalg.norm(worst_shift(f, X, y, e), axis=1)
        outside = max(outside, lengths.max() - e)
    return Finding(
        "The secular equation finds the smallest margin over the ball.",
        f"d = 2, {len(disc)} points of each disc, also for a saddle, whose axes are the hard case; "
        "no point may be lower (1e-9), the lowest within 1e-3; shifts in the ball (1e-9)",
        f"points are at most {max(below, 0.0):.0e} lower; the lowest is at most {above:.1e} above; "
        f"shifts are at most {max(outside, 0.0):.0e} too long",
        bool(max(below, outside) <= 1e-9 and above <= 1e-3),
    )


def plane_cases(solved):
    """Return functions of two variables with samples, labels and radii, and a saddle."""
    saddle = Quadratic(np.diag([1.0, -1.0]), np.zeros(2), 0.0)
    X = np.array([[0.0, 0.0], [0.1, 0.0], [0.1, 1e-10], [0.0, 0.1], [-1e-10, 0.1]])
    axes = [(saddle, X, sign * np.ones(len(X)), 0.4) for sign in (1.0, -1.0)]
    return axes + [(t.f, X, y, e) for (X, y), e, t in solved if X.shape[1] == 2]


def decomposition(solved):
    """Write the matrices as sums of neurons and compare objectives."""
    off, length, spare = 0.0, 0.0, np.inf
    for (X, y), e, t in solved:
        (U, a), (V, b) = map(decomposed, t.Z)
        f = network(np.vstack([U, V]), np.concatenate([a, -b]))
        value = worst_loss(f, X, y, e) + BETA * (a.sum() + b.sum())
        off = max(off, abs(value / objective(X, y, e, t) - 1.0))
        lengths = np.linalg.norm(np.vstack([U, V]), axis=1)
        length = max(length, np.abs(lengths - 1.0).max(initial=0.0))
        spare = min(spare, 2 * (X.shape[1] + 1) - len(lengths))
    return Finding(
        "The solution is a network: Z+ and Z- decompose into neurons with hidden weights of length "
        "1, at most d + 1 of either sign, and the same objective (Bartan and Pilanci 2021).",
        f"{setting(solved)}; tolerance 1e-6; neurons of output weight below 1e-7 are not counted",
        f"objectives differ by at most {off:.1e} (relative), lengths from 1 by {length:.1e}; "
        f"neurons below 2 (d + 1): at least {spare}",
        bool(max(off, length) <= 1e-6 and spare >= 0),
    )


def never_beaten(descents):
    """No non-convex run is below the program."""
    lowest = min(d["found"].min() for d in descents)
    return Finding(
        "No non-convex adversarial training of the same network is below the semidefinite program "
        "(Kuelbs, Lall and Pilanci 2024).",
        f"{describe(descents)}; tolerance {TOLERANCE:g}, relative",
        f"lowest objective of any step, relative to the program: {lowest:+.1e}",
        bool(lowest >= -TOLERANCE),
    )


def reached(descents):
    """Non-convex runs come close: the value is attained."""
    best = [d["found"].min() for d in descents]
    worst = [d["found"].max() for d in descents]
    return Finding(
        "Gradient descent with enough neurons reaches the value of the program, from some start.",
        f"{describe(descents)}; holds if the best start is within 1% in each case",
        f"best start {min(best):+.1e} to {max(best):+.1e}, worst start up to {max(worst):+.1e}",
        bool(max(best) <= 0.01),
        proven=False,
        remark="So the comparison is no idle one, and the program an equality and not only a "
        "bound. Where a run ends above, it is too short or in a local minimum.",
    )


def describe(descents):
    """Describe the non-convex runs."""
    return (
        f"{len(descents)} problems, {len(descents[0]['found'])} starts each, 2 (d + 1) neurons, "
        "Adam with exact worst points"
    )


def on_table(seed, n_train):
    """Return exact robust test accuracies of nominal and robust training, one row each."""
    X, y = load_breast_cancer(return_X_y=True)
    A, B, a, b = train_test_split(X, 2.0 * y - 1.0, train_size=n_train, random_state=seed)
    mean, scale = A.mean(axis=0), A.std(axis=0)
    axes = PCA(3, whiten=True).fit((A - mean) / scale)
    A, B = axes.transform((A - mean) / scale), axes.transform((B - mean) / scale)
    trained = [train(A, a, e) for e in (0.0, TABLE_RADIUS)]
    return [[np.mean(worst_margins(t.f, B, b, e) > 0.0) for e in RADII] for t in trained]


def better_on_table(table):
    """Compare robust accuracies at the radius of training."""
    nominal, robust = np.mean(table, axis=0)
    at = RADII.index(TABLE_RADIUS)
    wins = sum(split[1][at] > split[0][at] for split in table)
    return Finding(
        "Robust training by the semidefinite program gives a higher robust test accuracy than "
        "nominal training (Kuelbs, Lall and Pilanci 2024).",
        f"breast cancer, 3 whitened principal components, {len(table)} splits, trained for radius "
        f"{TABLE_RADIUS}; exact test accuracy at that radius; holds if the mean is higher",
        f"{robust[at]:.3f} against {nominal[at]:.3f}, higher in {wins} of {len(table)} splits; "
        f"clean {robust[0]:.3f} against {nominal[0]:.3f}",
        bool(robust[at] > nominal[at]),
        proven=False,
        remark="Few samples and few components: this says which way, not how much.",
    )


# ----------------------------------------------------------------------------------------- picture


def curves_of(line, table):
    """Return what `draw` needs, from the solutions for one data set along the radii."""
    (X, y), _, nominal = line[0]
    shown = line[-2]
    return {
        "radii": [e for _, e, _ in line],
        "robust": [t.value for *_, t in line],
        "nominal": [float(objective(X, y, e, nominal)) for _, e, _ in line],
        "X": X,
        "y": y,
        "shown_radius": shown[1],
        "functions": [[np.asarray(part).tolist() for part in t.f] for t in (nominal, shown[2])],
        "table_radii": RADII,
        "accuracies": np.mean(table, axis=0).tolist(),
    }


def draw(figure, curves):
    """Draw worst-case objectives, decision boundaries in the plane, and robust accuracies."""
    objective, plane, accuracy = figure.subplots(1, 3)
    names, radii = ("nominal", "robust"), curves["radii"]
    for name, colour in zip(names, ("C1", "C0"), strict=True):
        objective.plot(radii, curves[name], color=colour, marker="o", label=name)
    draw_plane(plane, curves)
    for name, colour, values in zip(names, ("C1", "C0"), curves["accuracies"], strict=True):
        accuracy.plot(curves["table_radii"], values, color=colour, marker="o", label=name)
    objective.set(xlabel="radius of attack", ylabel="worst-case objective", title="Training data")
    accuracy.set(xlabel="radius of attack", ylabel="robust test accuracy", title="Breast cancer")
    for axes in (objective, accuracy):
        axes.legend(fontsize="small")


def draw_plane(axes, curves):
    """Draw the samples with their balls, and where each function is 0."""
    from matplotlib.patches import Circle

    X, y = np.array(curves["X"]), np.array(curves["y"])
    ends = np.abs(X).max() + 1.2
    line = np.linspace(-ends, ends, 200)
    grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    for function, colour in zip(curves["functions"], ("C1", "C0"), strict=True):
        f = Quadratic(*map(np.array, function))
        axes.contour(line, line, f.at(grid).reshape(200, 200), [0.0], colors=colour)
    for label, colour in ((1.0, "k"), (-1.0, "0.6")):
        for x in X[y == label]:
            axes.add_patch(Circle(x, curves["shown_radius"], color=colour, alpha=0.25, lw=0))
        axes.plot(*X[y == label].T, "o", color=colour, ms=3, label=f"label {label:+.0f}")
    axes.set(xlabel="first feature", ylabel="second feature", aspect="equal")
    axes.set_title(f"f(x) = 0, balls of radius {curves['shown_radius']:g}")
    axes.legend(fontsize="x-small", loc="upper center", ncols=2)


if __name__ == "__main__":
    main(study, draw)
