r"""Convex adversarial training: the hard and the soft program.

    python benchmarks/theory/adversarial_programs.py

Data X (n x d, the last column 1), labels y, patterns D (n x P, 0/1), S = 2D - 1, perturbations
||delta||_p <= epsilon of the features, and 1/p + 1/q = 1. Following Bai, Gautam, Gai and Sojoudi
(2021) and Bai, Gautam and Sojoudi (2022), the *hard* program is, for the hinge,

    min_{V, W}  mean_k (1 - y_k z_k + epsilon ||q_k||_q)_+ + beta sum_i (||v_i||_2 + ||w_i||_2)
    such that   S_ki x_k'v_i >= epsilon ||v_i||_q  for all k, i, and the same for w_i,

with outputs z_k = sum_i D_ki x_k'(v_i - w_i) and slopes q_k = sum_i D_ki (v_i - w_i). Its neurons
keep their pattern whatever the perturbation, so that the network is affine around every sample and
its worst loss is known. The *one-sided* program drops the cone rows that no margin sees. The *soft*
program has no cone rows; each margin pays instead for the neurons that may leave their pattern,

    s_k(v_i) = (epsilon ||v_i||_q - S_ki x_k'v_i)_+ .

Checked are: what these programs say about the network they train (its worst case is found exactly,
by branch and bound), their order, what is left of them at epsilon = 0, PGD training (Madry et al.,
2018) as the competitor, and when the hard program has nothing to train. The last has a number: the
cone of pattern i holds a neuron v != 0 if and only if epsilon is at most its *critical radius*

    max_v  min_k S_ki x_k'v  such that  ||v||_q <= 1,

the largest margin by which a hyperplane divides the samples as the pattern does (a linear program
for p = inf).
"""

from dataclasses import dataclass, replace

import cvxpy as cp
import numpy as np
from _claims import Finding, main
from matplotlib.patches import Rectangle
from scipy.optimize import linprog
from sklearn.datasets import load_breast_cancer, load_digits

from convexrobust import (
    ConvexProgram,
    GroupLasso,
    Hinge,
    InteriorPoint,
    Logistic,
    LpBall,
    Squared,
    TwoLayerReLU,
    enumerate_patterns,
    patterns_of,
    sample_patterns,
)
from convexrobust.backends import numpy as numpy_backend
from convexrobust.certificates import exact_margins, exact_objective
from convexrobust.deep import train_two_layer
from convexrobust.program import FORMULATIONS

BETA = 0.02
LOSSES, NORMS = (Hinge(), Logistic(), Squared()), (1, 2, np.inf)
TABLE_BETA, TABLE_TOL = 1e-3, 1e-5
BOX_EPSILON, BOX_BETA = 0.18, 0.004
EXACT = 1e-6  # relative accuracy asked of the interior-point method, and of what is compared


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    cases: tuple  # (loss, norm) of the small problems
    problems: tuple  # (seed, epsilon) of the small problems
    n: int = 9  # their samples
    n_trainings: int = 5
    n_epochs: int = 300
    n_rows: int = 50  # of the tables
    n_cones: int = 100  # their patterns, and how many of them are in the programs
    n_patterns: int = 16
    radii: tuple = (0.02, 0.1, 0.2, 0.4)
    n_boxes: int = 10
    n_grid: int = 101


FULL = Sizes(tuple((loss, p) for loss in LOSSES for p in NORMS), ((0, 0.1), (1, 0.3)))
QUICK = Sizes(
    cases=tuple(zip(LOSSES, NORMS, strict=True)),
    problems=((1, 0.3),),
    n=4,
    n_trainings=1,
    n_epochs=30,
    n_rows=16,
    n_cones=20,
    n_patterns=3,
    radii=(0.5,),
    n_boxes=3,
    n_grid=31,
)


@dataclass(frozen=True)
class Trained:
    """An optimum: the program, its value, the dual bound, the network and its exact worst case."""

    program: ConvexProgram
    value: float
    lower_bound: float
    network: TwoLayerReLU
    exact: float


def solved(program):
    """Solve a program; its value is that of its own formulation, without slacks unless soft."""
    solution = InteriorPoint(tol=EXACT / 10).solve(program)
    network = TwoLayerReLU.from_solution(solution)
    value = program.objective(numpy_backend, solution.V, solution.W)
    exact = exact_objective(program, network)[1]
    return Trained(program, value, solution.lower_bound, network, exact)


def small_program(loss, p, epsilon, seed, n):
    """Return the soft program, on all patterns, of points in the plane with labels like XOR."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 2))
    y = np.where(X[:, 0] * X[:, 1] > 0, 1, -1)
    y[:2] = 1, -1
    X = np.hstack([X, np.ones((n, 1))])
    return ConvexProgram(X, y, enumerate_patterns(X), loss, GroupLasso(BETA), LpBall(p, epsilon))


def all_formulations(program):
    """Return the optima of the hard, the one-sided and the soft program of the same data."""
    return {name: solved(replace(program, formulation=name)) for name in FORMULATIONS}


def study(quick):
    """Solve the programs and check what is said about them."""
    sizes = QUICK if quick else FULL
    cases = [
        all_formulations(small_program(loss, p, epsilon, seed, sizes.n))
        for seed, epsilon in sizes.problems
        for loss, p in sizes.cases
    ]
    tables = [table_study(name, sizes) for name in TABLES]
    boxes = box_networks(sizes)
    findings = [
        hard_is_exact(cases),
        hard_as_published(cases),
        ordered(cases),
        nominal_at_zero(cases),
        perturbed_patterns(sizes),
        *against_pgd(cases, sizes),
        critical_radii(tables),
        few_robust_cones(tables),
        collapses(tables),
        no_box_crossed(boxes, sizes.n_grid),
    ]
    return findings, curves_of(boxes, tables)


# ------------------------------------------------------------------ small problems, all patterns


def described(cases):
    """Return the setting of the small problems in words."""
    losses = sorted({type(case["hard"].program.loss).__name__ for case in cases})
    n, n_patterns = case_shape(cases[0])
    radii = sorted({case["hard"].program.perturbation.radius for case in cases})
    return (
        f"{len(cases)} problems, {', '.join(losses)} with l1, l2 and l-inf, epsilon {radii}, "
        f"beta {BETA}, {n} points in the plane, {n_patterns} patterns (all)"
    )


def case_shape(case):
    """Return the number of samples and of patterns."""
    return case["hard"].program.D.shape


def hard_is_exact(cases):
    """Compare the hard program's value with the worst case of its network."""
    off = max(abs(case["hard"].value / case["hard"].exact - 1.0) for case in cases)
    return Finding(
        "The value of the hard program is the exact worst-case objective of its network "
        "(Bai et al. 2021).",
        f"{described(cases)}; worst cases by branch and bound; relative tolerance {EXACT:g}",
        f"largest relative difference {off:.1e}",
        off <= EXACT,
    )


def hard_as_published(cases):
    """Compare the package's hard optimum with that of the program as the paper writes it."""
    off = max(abs(published(case["hard"].program) / case["hard"].value - 1.0) for case in cases)
    return Finding(
        "The package's hard program is the published one (Bai et al. 2021, 2022).",
        f"{described(cases)}; the formula of the paper in cvxpy, solved by Clarabel; relative "
        "tolerance 1e-4",
        f"largest relative difference {off:.1e}",
        off <= 1e-4,
    )


def published(program, epsilon=None):
    """Return the optimum of the hard program, written down from the paper."""
    X, y, D, d = program.X, program.y, program.D, program.X.shape[1]
    epsilon = program.perturbation.radius if epsilon is None else epsilon
    q = {1: "inf", 2: 2, np.inf: 1}[program.perturbation.p]
    V, W = cp.Variable((d, D.shape[1])), cp.Variable((d, D.shape[1]))
    z = cp.sum(cp.multiply(D, X @ (V - W)), axis=1)
    spread = epsilon * cp.norm(((V - W) @ D.T)[: d - 1], q, axis=0)
    losses = {
        Hinge: lambda: cp.pos(1 - cp.multiply(y, z) + spread),
        Logistic: lambda: cp.logistic(-cp.multiply(y, z) + spread),
        Squared: lambda: cp.square(cp.abs(z - y) + spread) / 2,
    }
    cones = [
        cp.multiply(2 * D - 1, X @ U) >= epsilon * np.ones((len(X), 1)) @ norms[None, :]
        for U in (V, W)
        for norms in [cp.norm(U[: d - 1], q, axis=0)]
    ]
    penalty = cp.sum(cp.norm(V, axis=0)) + cp.sum(cp.norm(W, axis=0))
    mean_loss = cp.sum(losses[type(program.loss)]()) / len(X)
    return cp.Problem(cp.Minimize(mean_loss + BETA * penalty), cones).solve(cp.CLARABEL)


def ordered(cases):
    """Check exact <= value for all formulations, and soft <= one-sided <= hard."""
    above = [case[name].exact - case[name].value for case in cases for name in FORMULATIONS]
    pairs = (("soft", "one-sided"), ("one-sided", "hard"))
    steps = [case[low].value - case[high].value for case in cases for low, high in pairs]
    gains = [100.0 * (1.0 - case["soft"].value / case["hard"].value) for case in cases]
    return Finding(
        "Every program's value is an upper bound on the worst-case objective of its network, and "
        "soft <= one-sided <= hard.",
        f"{described(cases)}; tolerance {EXACT:g}",
        f"exact - value at most {max(above):.1e}; violation of the order at most "
        f"{max(steps):.1e}; soft is below hard by {min(gains):.2f} to {max(gains):.2f} %",
        max(above + steps) <= EXACT,
    )


def nominal_at_zero(cases):
    """Compare the three programs at epsilon = 0 with the nominal program."""
    programs = {type(case["hard"].program.loss): case["hard"].program for case in cases}.values()
    off = 0.0
    for program in programs:
        nominal = published(program, epsilon=0.0)
        still = replace(program, perturbation=LpBall(program.perturbation.p, 0.0))
        off = max(off, *(abs(t.value / nominal - 1.0) for t in all_formulations(still).values()))
    return Finding(
        "With epsilon = 0 and all patterns, hard, one-sided and soft have the optimum of nominal "
        "training, the program of Pilanci and Ergen (2020).",
        f"{len(programs)} losses, {case_shape(cases[0])[1]} patterns; the nominal program in "
        "cvxpy, solved by Clarabel; relative tolerance 1e-4",
        f"largest relative difference {off:.1e}",
        off <= 1e-4,
    )


def perturbed_patterns(sizes):
    """Add patterns of perturbed data to the hard and the soft program."""
    changes = {"hard": [], "soft": []}
    n_new = []
    for seed in range(4 if sizes is FULL else 1):
        program = small_program(Hinge(), np.inf, 0.2, seed, sizes.n)
        rng = np.random.default_rng(seed)
        moved = program.X + [0.2, 0.2, 0.0] * rng.uniform(-1, 1, program.X.shape)
        new = patterns_of(moved, rng.standard_normal((3, 400)))
        both = np.hstack([program.D, new])
        _, first = np.unique(both, axis=1, return_index=True)
        more = replace(program, D=both[:, np.sort(first)])
        n_new.append(more.D.shape[1] - program.D.shape[1])
        for name, found in changes.items():
            values = [solved(replace(p, formulation=name)).value for p in (program, more)]
            found.append(1.0 - values[1] / values[0])
    return Finding(
        "Patterns of perturbed data change nothing in the hard program: a neuron that is stable "
        "around every sample has the pattern of the data themselves.",
        f"{len(n_new)} problems, hinge, l-inf, epsilon 0.2, all patterns of the data and "
        f"{n_new} of perturbed data; relative tolerance {EXACT:g}",
        f"largest change of the hard optimum {max(map(abs, changes['hard'])):.1e}; "
        f"the soft optimum falls by up to {max(changes['soft']):.1e}",
        max(map(abs, changes["hard"])) <= EXACT,
    )


def against_pgd(cases, sizes):
    """Compare hard and soft with the best of several adversarial trainings by gradient descent."""
    last = cases[-len(sizes.cases) :]
    boxes = [case for case in last if case["hard"].program.perturbation.p == np.inf]
    percent = {"hard": [], "soft": []}
    for case in boxes:
        program = case["soft"].program
        best = min(exact_objective(program, net)[0] for net in trained_by_pgd(program, sizes))
        for name, of_loss in percent.items():
            of_loss.append(100.0 * (case[name].exact / best - 1.0))
    losses = ", ".join(type(case["hard"].program.loss).__name__ for case in boxes)
    setting = (
        f"{losses}; l-inf, epsilon {boxes[0]['hard'].program.perturbation.radius}, {sizes.n} "
        f"points, all patterns; best of {sizes.n_trainings} PGD trainings (64 neurons, "
        f"{sizes.n_epochs} epochs) by exact worst case"
    )
    return [
        Finding(
            f"The network of the {name} program has a lower worst-case objective than the best PGD "
            f"training ({source}).",
            setting,
            "exact objective against the best PGD training's: "
            + ", ".join(f"{p:+.2f} %" for p in percent[name]),
            all(p <= 0.0 for p in percent[name]),
            proven=False,
            remark="Both programs are upper bounds of a non-convex problem, so that nothing "
            "forbids a better network; gradient descent finds one only where it does not get "
            "stuck.",
        )
        for name, source in (("hard", "the comparison of Bai et al. 2022"), ("soft", "the same"))
    ]


def trained_by_pgd(program, sizes):
    """Return networks of adversarial training from several random starts."""
    X, y, options = program.X[:, :2], program.y, {"width": 64, "learning_rate": 0.05}
    return [
        train_two_layer(
            X,
            y,
            ball=program.perturbation,
            attack="pgd",
            beta=BETA,
            loss=program.loss,
            n_epochs=sizes.n_epochs,
            n_steps=5,
            random_state=seed,
            **options,
        )
        for seed in range(sizes.n_trainings)
    ]


# ------------------------------------------------------------------ tables


def breast_cancer():
    """Return the standardised features and labels of breast cancer."""
    X, y = load_breast_cancer(return_X_y=True)
    return (X - X.mean(axis=0)) / X.std(axis=0), np.where(y == 1, 1, -1)


def digits():
    """Return digits 3 and 8 as 4 x 4 pixels between 0 and 1, means of 2 x 2 pixels."""
    X, y = load_digits(return_X_y=True)
    rows = np.isin(y, (3, 8))
    pixels = X[rows].reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)) / 16.0
    return pixels.reshape(-1, 16), np.where(y[rows] == 3, 1, -1)


TABLES = {"breast cancer": breast_cancer, "digits 3, 8": digits}


@dataclass(frozen=True)
class Table:
    """A table, its patterns, their critical radii with neurons that reach them, and optima."""

    name: str
    X: np.ndarray
    D: np.ndarray
    critical: np.ndarray
    gates: np.ndarray
    n_used: int  # of the patterns, in the programs
    values: dict  # (epsilon, program): its optimum
    reach: float  # of neurons in cones beyond their critical radius, see `critical_radii`


def with_all_active(D):
    """Put the all-active pattern before the others."""
    return np.hstack([np.ones((len(D), 1), dtype=D.dtype), D])


PROGRAMS = {
    "hard, random gates": ("hard", lambda D: D),
    "hard, with all-active": ("hard", with_all_active),
    "hard, all-active alone": ("hard", lambda D: with_all_active(D)[:, :1]),
    "soft": ("soft", with_all_active),
}


def table_study(name, sizes):
    """Measure the robust cones and the optima on balanced rows of a table."""
    rng, (X, y) = np.random.default_rng(0), TABLES[name]()
    half = sizes.n_rows // 2
    rows = [rng.choice(np.flatnonzero(y == c), half, replace=False) for c in (-1, 1)]
    X, y = X[np.concatenate(rows)], y[np.concatenate(rows)]
    X = np.hstack([X, np.ones((len(X), 1))])
    D = sample_patterns(X, sizes.n_cones + 3, random_state=0)
    D = D[:, D.min(axis=0) < D.max(axis=0)][:, : sizes.n_cones]
    found = [critical_radius(X, 2.0 * d - 1.0) for d in D.T]
    critical, gates = np.array([r for r, _ in found]), np.column_stack([v for _, v in found])
    values, reach = {}, 0.0
    for epsilon in sizes.radii:
        for label, (formulation, columns) in PROGRAMS.items():
            few, ball = D[:, : sizes.n_patterns], LpBall(np.inf, epsilon)
            weight_decay = GroupLasso(TABLE_BETA)
            program = ConvexProgram(X, y, columns(few), Hinge(), weight_decay, ball, formulation)
            solution = InteriorPoint(tol=TABLE_TOL).solve(program)
            values[epsilon, label] = solution.objective
            if label == "hard, random gates":
                lengths = np.abs(np.stack([solution.V, solution.W])[:, 0, :-1]).sum(axis=1)
                beyond = (epsilon - critical[: sizes.n_patterns]) * lengths
                reach = max(reach, beyond.max())
    return Table(name, X, D, critical, gates, sizes.n_patterns, values, reach)


def critical_radius(X, signs):
    """Return the largest l-inf radius at which the cone of a pattern holds a neuron, and it."""
    n, d = X.shape[0], X.shape[1] - 1
    rows = signs[:, None] * X
    inside = np.hstack([-rows[:, :d], rows[:, :d], -rows[:, d:], np.ones((n, 1))])
    length = np.r_[np.ones(2 * d), 0.0, 0.0]
    bounds = [(0, None)] * (2 * d) + [(None, None), (0, None)]
    limits = np.r_[np.zeros(n), 1.0]
    found = linprog(-np.eye(2 * d + 2)[-1], np.vstack([inside, length]), limits, bounds=bounds)
    return found.x[-1], np.r_[found.x[:d] - found.x[d : 2 * d], found.x[2 * d]]


def describe_tables(tables):
    """Return the setting of the tables in words."""
    n, n_cones = tables[0].D.shape
    names = ", ".join(f"{t.name} ({t.X.shape[1] - 1} features)" for t in tables)
    radii = sorted({epsilon for epsilon, _ in tables[0].values})
    return f"{names}; {n} rows, half of each class; {n_cones} random patterns; l-inf, {radii}"


def critical_radii(tables):
    """Check from both sides that a cone holds a neuron up to its critical radius."""
    gaps = []
    for t in tables:
        program = ConvexProgram(
            t.X, np.ones(len(t.X)), t.D, Hinge(), GroupLasso(0.0), LpBall(np.inf, 1.0), "hard"
        )
        lengths = np.abs(t.gates[:-1]).sum(axis=0)
        at_one = program.cone_gap(numpy_backend, t.gates, np.arange(len(t.X)))
        gaps.append((at_one - (1.0 - 0.999 * t.critical) * lengths).max())
    reach = max(t.reach for t in tables)
    return Finding(
        "The cone of a pattern holds a neuron v if and only if epsilon is at most the critical "
        "radius of the pattern, the l1 margin by which a hyperplane divides the samples so.",
        f"{describe_tables(tables)}; critical radii by linear programs; below: cone rows at 0.999 "
        f"of it, tolerance 1e-9; above: hard optima on {len(tables)} tables, where "
        f"(epsilon - radius) ||v||_1 must be 0 up to the solver's tolerance, {TABLE_TOL:g}",
        f"largest cone row violation below {max(gaps):.1e}; above {reach:.1e}",
        max(gaps) <= 1e-9 and reach <= TABLE_TOL,
    )


def few_robust_cones(tables):
    """Count the patterns whose robust cone holds a neuron."""
    shares = {t.name: [np.mean(t.critical >= e) for e in (0.05, 0.1, 0.2)] for t in tables}
    return Finding(
        "Of the patterns of random gates, fewer than one in ten has a robust cone with a neuron in "
        "it at epsilon = 0.2, on ordinary tables.",
        describe_tables(tables),
        "; ".join(
            f"{name}: " + ", ".join(f"{s:.0%}" for s in found) for name, found in shares.items()
        )
        + " at epsilon 0.05, 0.1, 0.2",
        all(found[-1] < 0.1 for found in shares.values()),
        proven=False,
        remark="More samples only lower the critical radii: the margin by which a hyperplane "
        "divides them shrinks. With the few rows of a quick run more cones are left.",
    )


def collapses(tables):
    """Check what is left of the hard program where no random cone holds a neuron."""
    off, n_settings, ratios = [], 0, []
    for t in tables:
        for epsilon in sorted({epsilon for epsilon, _ in t.values}):
            random, more, alone, soft = (t.values[epsilon, label] for label in PROGRAMS)
            ratios.append(
                f"{t.name} {epsilon:g}: {random:.3f}, {more:.4f}, {alone:.4f}, {soft:.4f}"
            )
            if t.critical[: t.n_used].max() < epsilon:
                n_settings += 1
                off += [abs(random - 1.0), abs(more - alone), soft - more]
    return Finding(
        "Where epsilon exceeds all critical radii, the hard program collapses: with random gates "
        "to the zero network, with the all-active pattern among them to an affine one. The soft "
        "program does not do worse.",
        f"{describe_tables(tables)}, the first {tables[0].n_used} in the programs; hinge, "
        f"beta {TABLE_BETA:g}; zero network: 1; {n_settings} settings beyond all critical radii; "
        f"tolerance 1e-4",
        f"largest deviation {max(off, default=np.inf):.1e}; optima hard with random gates, hard "
        f"with all-active, hard with it alone, soft: {'; '.join(ratios)}",
        max(off, default=np.inf) <= 1e-4,
    )


# ------------------------------------------------------------------ boxes in the plane


def box_networks(sizes):
    """Return the soft program and the networks of three programs, for each norm.

    The points keep their boxes apart; the seed is one where nominal training is not robust.
    """
    X = np.zeros((0, 2))
    for x in np.random.default_rng(3).uniform(-1.0, 1.0, (1000, 2)):
        if len(X) < sizes.n_boxes and np.all(np.abs(X - x).max(axis=1) > 2.1 * BOX_EPSILON):
            X = np.vstack([X, x])
    y = np.where(X[:, 0] * X[:, 1] > 0, 1, -1)
    X = np.hstack([X, np.ones((len(X), 1))])
    found = {}
    for p in NORMS:
        ball = LpBall(p, BOX_EPSILON)
        program = ConvexProgram(X, y, enumerate_patterns(X), Hinge(), GroupLasso(BOX_BETA), ball)
        nominal = replace(program, perturbation=LpBall(p, 0.0))
        programs = nominal, replace(program, formulation="hard"), program
        networks = [solved(chosen).network for chosen in programs]
        found[p] = program, dict(zip(("nominal", "hard", "soft"), networks, strict=True))
    return found


def no_box_crossed(boxes, n_grid):
    """Compare certificates of the training points with a fine grid on their perturbation sets."""
    crossed, missed, off, n_sets, counts = 0, 0, -np.inf, 0, []
    for p, (program, networks) in boxes.items():
        X, y = program.X[:, :2], program.y
        for name, network in networks.items():
            found = exact_margins(network, X, y, program.perturbation)
            smallest, slack = on_grid(network, X, y, program.perturbation, n_grid)
            robust = found.status == "robust"
            crossed += np.sum(robust & (smallest <= 0.0))
            at_adversarial = y * network.predict(found.X_adv)[:, 0]
            missed += np.sum(~robust & (at_adversarial > 0.0))
            off = max(off, np.max(found.lower - smallest), np.max(smallest - found.lower - slack))
            n_sets += len(X)
            if p == np.inf:
                counts.append(f"{name} {robust.sum()} of {len(X)}")
    return Finding(
        "No decision boundary crosses a perturbation set that is certified, every other set holds "
        "a misclassified point, and the certified smallest margins are those of brute force.",
        f"{len(X)} points in the plane, epsilon {BOX_EPSILON}, beta {BOX_BETA}, hinge, all "
        f"patterns, nominal, hard and soft, l1, l2, l-inf: {n_sets} sets; {n_grid} x {n_grid} grid "
        "points on each; grid and certificate may differ by the Lipschitz constant times the "
        "distance to the next grid point",
        f"certified sets with a misclassified grid point: {crossed}; others without a "
        f"misclassified point: {missed}; margins beyond the tolerance by {max(off, 0.0):.1e}; "
        f"certified boxes (l-inf): {', '.join(counts)}",
        bool(crossed == 0 and missed == 0 and off <= 1e-9),
    )


def on_grid(network, X, y, ball, n_grid):
    """Return the smallest margins on a grid in the sets, and what a grid may miss."""
    steps = np.linspace(-ball.radius, ball.radius, n_grid)
    shifts = np.array(np.meshgrid(steps, steps)).reshape(2, -1).T
    shifts = shifts[ball.length(shifts) <= 1.0 + 1e-12]
    points = (X[:, None] + shifts).reshape(-1, 2)
    margins = y[:, None] * network.predict(points).reshape(len(X), -1)
    steepest = np.linalg.norm(network.hidden[:2], axis=0) @ np.abs(network.output[:, 0])
    # Towards 0 there is a grid point of the set in the same cell of the grid.
    return margins.min(axis=1), steepest * np.sqrt(2.0) * (steps[1] - steps[0])


# ------------------------------------------------------------------ the picture


def curves_of(boxes, tables):
    """Return the networks for l-inf, and the share of robust cones over the radius."""
    program, networks = boxes[np.inf]
    radii = np.linspace(0.0, 0.3, 61)
    return {
        "X": program.X[:, :2],
        "y": program.y,
        "epsilon": BOX_EPSILON,
        "networks": {name: [net.hidden, net.output] for name, net in networks.items()},
        "radii": radii,
        "shares": {t.name: [np.mean(t.critical >= r) for r in radii] for t in tables},
    }


def draw(figure, curves):
    """Draw decision regions with the boxes, and the share of robust cones over epsilon."""
    figure.set_size_inches(13, 3.7)
    axes = figure.subplots(1, 4)
    for ax, (name, weights) in zip(axes, curves["networks"].items(), strict=False):
        draw_regions(ax, TwoLayerReLU(*map(np.array, weights)), curves)
        ax.set(title=f"{name} training", xlabel="feature 1")
    axes[0].set(ylabel="feature 2")
    for name, shares in curves["shares"].items():
        axes[3].plot(curves["radii"], 100.0 * np.array(shares), label=name)
    axes[3].set(
        title="patterns with a robust cone", xlabel="epsilon (l-inf)", ylabel="random patterns (%)"
    )
    axes[3].legend(loc="upper right")


def draw_regions(ax, network, curves):
    """Draw the decision regions of a network, and the points with their boxes."""
    line = np.linspace(-1.45, 1.45, 240)
    points = np.array(np.meshgrid(line, line)).reshape(2, -1).T
    outputs = network.predict(points).reshape(len(line), -1)
    ax.contourf(line, line, outputs, [-np.inf, 0.0, np.inf], colors=["#f4cfc6", "#c9dcf0"])
    ax.contour(line, line, outputs, [0.0], colors="k", linewidths=1.0)
    epsilon, X, y = curves["epsilon"], np.array(curves["X"]), np.array(curves["y"])
    for label, colour in ((1, "#1f4e8c"), (-1, "#b03a1e")):
        ax.plot(*X[y == label].T, ".", color=colour)
        for x in X[y == label]:
            box = Rectangle(x - epsilon, 2 * epsilon, 2 * epsilon, fill=False, color=colour)
            ax.add_patch(box)
    ax.set_aspect("equal")


if __name__ == "__main__":
    main(study, draw)
