r"""Adversarial training to proven global optimality.

    python benchmarks/theory/global_adversarial_training.py

Adversarial training of a two-layer ReLU network,

    min_{u, alpha}  mean_k max_{delta in Delta_k} loss(f(x_k + delta), y_k)
                    + beta sum_j ||u_j|| |alpha_j|,

is not convex, and has infinitely many perturbations inside. The exchange method keeps finitely
many of them, perturbed *copies* of the samples, and lets the loss of a sample be the largest over
its copies. On the copies that is nominal training, and by the theorem of Pilanci and Ergen (2020)
its optimum over all networks is that of the convex program

    min_{V, W}  mean_k max_{copies c of k} loss(z_c, y_k) + beta sum_i (||v_i|| + ||w_i||),
    z_c = sum_i D_ci x_c'(v_i - w_i),      (2 D_ci - 1) x_c'v_i >= 0,  the same for w_i,

over all patterns D of the copies. Fewer perturbations give a smaller maximum: this optimum is a
*lower bound* on adversarial training, for every network of any width. The worst case of the
network just trained, found exactly by branch and bound, is an *upper bound*. The worst points
become copies, and so on. Where the bounds meet, adversarial training is solved, and every other
method can be measured by its distance from the optimum:

- "hard" is the program of Bai, Gautam, Gai and Sojoudi (2021), whose neurons keep their pattern on
  all of Delta_k,
- "soft" charges neurons for leaving their pattern instead, and
- PGD training (Madry et al., 2018) is gradient descent on attacked points, from 100 random starts.

Distances are those of exact worst-case objectives, in % of the proven lower bound.
"""

from dataclasses import dataclass, replace

import cvxpy as cp
import numpy as np
import torch
from _claims import Finding, main

from convexrobust import (
    ConvexProgram,
    Exchange,
    ExchangeSolution,
    GroupLasso,
    Hinge,
    InteriorPoint,
    Logistic,
    LpBall,
    Squared,
    TwoLayerReLU,
    enumerate_patterns,
)
from convexrobust.attacks import pgd
from convexrobust.backends import torch as torch_backend
from convexrobust.certificates import exact_objective

EPSILON, BETA, TOL = 0.3, 0.0125, 1e-4
WIDTH, LEARNING_RATE, N_STEPS = 32, 0.03, 5
METHODS = ("hard", "soft", "PGD, best", "PGD, median")
GRID_TOL = 0.01


@dataclass(frozen=True)
class Sizes:
    """How much is run: problems as (loss, seed), PGD trainings of each, and their lengths."""

    problems: tuple
    n: int = 8
    n_runs: int = 100
    n_epochs: int = 600
    n_grid: int = 121


FULL = Sizes((*((Hinge(), seed) for seed in range(5)), (Logistic(), 0), (Squared(), 0)))
QUICK = Sizes(((Hinge(), 0), (Logistic(), 1)), 6, 10, 100, 21)


@dataclass(frozen=True)
class Case:
    """One problem, its optimum, and the exact worst-case objectives that the others reach."""

    name: str
    program: ConvexProgram
    exchange: ExchangeSolution
    hard: float
    soft: float
    trainings: np.ndarray  # of all PGD networks

    @property
    def distances(self):
        """Return how far each method is above the proven lower bound, in %."""
        reached = self.hard, self.soft, self.trainings.min(), np.median(self.trainings)
        bound = self.exchange.lower_bound
        return {
            name: 100.0 * (value / bound - 1.0)
            for name, value in zip(METHODS, reached, strict=True)
        }


def study(quick):
    """Solve the problems by all methods and compare."""
    sizes = QUICK if quick else FULL
    cases = [solved(loss, seed, sizes) for loss, seed in sizes.problems]
    setting = (
        f"{len(cases)} problems ({', '.join(case.name for case in cases)}), {sizes.n} points in "
        f"the plane, l-inf, epsilon {EPSILON}, beta {BETA}"
    )
    findings = [
        bracket_closes(cases, setting),
        upper_bound_by_grid(cases, sizes.n_grid),
        lower_bound_by_cvxpy(cases),
        nobody_below(cases, f"{setting}; {sizes.n_runs} PGD trainings each"),
        *pgd_reaches(cases, f"{setting}; {sizes.n_runs} PGD trainings each"),
        soft_is_near(cases, setting),
    ]
    return findings, curves_of(cases)


def problem(loss, seed, n):
    """Return the soft program, on all patterns, of points in the plane with labels like XOR."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 2))
    y = np.where(X[:, 0] * X[:, 1] > 0, 1, -1)
    y[:2] = 1, -1
    X = np.hstack([X, np.ones((n, 1))])
    ball = LpBall(np.inf, EPSILON)
    return ConvexProgram(X, y, enumerate_patterns(X), loss, GroupLasso(BETA), ball)


def solved(loss, seed, sizes):
    """Return one problem with the exact worst-case objective that every method reaches."""
    program = problem(loss, seed, sizes.n)
    exchange = Exchange(patterns="all", inner="exact", tol=TOL).solve(program)
    solver = InteriorPoint(tol=1e-6)
    hard, soft = (
        exact_value(program, TwoLayerReLU.from_solution(solver.solve(of_kind)))
        for of_kind in (replace(program, formulation="hard"), program)
    )
    weights = zip(*trained_by_pgd(program, sizes), strict=True)
    trainings = np.array([exact_value(program, TwoLayerReLU(*pair)) for pair in weights])
    return Case(f"{type(loss).__name__} {seed}", program, exchange, hard, soft, trainings)


def exact_value(program, network):
    """Return the exact worst-case objective of a network, the lower end of its bracket."""
    return exact_objective(program, network)[0]


def trained_by_pgd(program, sizes):
    """Return hidden (R, 3, m) and output weights (R, m, 1) of R adversarial trainings at once.

    Adam on the mean loss at points of `pgd` plus beta/2 sum_j (|u_j|^2 + alpha_j^2). The starts
    differ in their seeds and in their scales, from small to large first weights.
    """
    rng = np.random.default_rng(0)
    scale = np.geomspace(0.1, 1.5, sizes.n_runs)[:, None, None]
    hidden = scale * rng.standard_normal((sizes.n_runs, 3, WIDTH)) / np.sqrt(3)
    output = scale * rng.standard_normal((sizes.n_runs, WIDTH, 1)) / np.sqrt(WIDTH)
    weights = [torch.tensor(w, requires_grad=True) for w in (hidden, output)]
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sizes.n_epochs)
    for epoch in range(sizes.n_epochs):
        radius = EPSILON * min(1.0, 3.0 * epoch / sizes.n_epochs)  # grows in the first third
        loss = objectives(program, weights, attacked(program, weights, radius)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return weights[0].detach().numpy(), weights[1].detach().numpy()


def attacked(program, weights, radius):
    """Return points (R, n, 3) at which each network has small margins, or large residuals."""
    hidden, output = (w.detach() for w in weights)
    X = torch.as_tensor(program.X).expand(len(hidden), -1, -1)
    y = torch.as_tensor(program.y.astype(float))[:, None]

    def loss_and_gradient(points):
        inputs = torch.cat([points.reshape(*X.shape[:2], 2), X[:, :, 2:]], dim=2)
        before = inputs @ hidden
        outputs = torch.relu(before) @ output
        is_regression = program.loss.task == "regression"
        side = torch.sign(outputs - y) if is_regression else -y.expand_as(outputs)
        gradient = side * (((before > 0) * output.mT) @ hidden[:, :2].mT)
        loss = side * (outputs - y) if is_regression else side * outputs
        return loss.reshape(-1), gradient.reshape(-1, 2)

    ball = LpBall(np.inf, radius)
    points = pgd(
        loss_and_gradient, X[:, :, :2].reshape(-1, 2), ball, n_steps=N_STEPS, xp=torch_backend
    )
    return torch.cat([points.reshape(*X.shape[:2], 2), X[:, :, 2:]], dim=2)


def objectives(program, weights, points):
    """Return the objectives (R,) of all networks at points (R, n, 3)."""
    hidden, output = weights
    outputs = (torch.relu(points @ hidden) @ output)[:, :, 0]
    losses = losses_of(program, outputs.reshape(-1), len(hidden)).reshape(outputs.shape)
    decay = hidden.square().sum(dim=(1, 2)) + output.square().sum(dim=(1, 2))
    return losses.mean(dim=1) + BETA / 2.0 * decay


def losses_of(program, outputs, n_networks):
    """Return the losses of outputs (R n,) of all samples, network by network."""
    y = torch.as_tensor(np.tile(program.y.astype(float), n_networks))
    if program.loss.task == "regression":
        margins = torch.stack([y - outputs, outputs - y], dim=1)
    else:
        margins = (y * outputs)[:, None]
    return program.loss.value(torch_backend, margins)


def bracket_closes(cases, setting):
    """Check that the bounds meet, for all networks of any width."""
    gaps = [case.exchange.relative_gap for case in cases]
    rounds = [len(case.exchange.rounds) for case in cases]
    scopes = {case.exchange.lower_bound_scope for case in cases}
    neurons = [case.exchange.network.n_neurons for case in cases]
    return Finding(
        "The exchange method solves adversarial training of two-layer networks of any width to a "
        "proven global optimum.",
        f"{setting}; relative width of the bracket at most {TOL:g}",
        f"widths up to {max(gaps):.1e} after {min(rounds)} to {max(rounds)} rounds, networks of "
        f"{min(neurons)} to {max(neurons)} neurons",
        max(gaps) <= TOL and scopes == {"all patterns"},
    )


def upper_bound_by_grid(cases, n_grid):
    """Compare the worst cases of the optimal networks with brute force on a grid."""
    below, above = -np.inf, -np.inf
    for case in cases:
        network, program = case.exchange.network, case.program
        steps = np.linspace(-EPSILON, EPSILON, n_grid)
        worst = np.full(len(program.X), -np.inf)
        for shift in np.array(np.meshgrid(steps, steps)).reshape(2, -1).T:
            outputs = torch.as_tensor(network.predict(program.X[:, :2] + shift)[:, 0])
            worst = np.maximum(worst, losses_of(program, outputs, 1).numpy())
        lengths = np.linalg.norm(network.hidden, axis=0) * np.abs(network.output[:, 0])
        found = worst.mean() + BETA * lengths.sum()
        below = max(below, case.exchange.objective / found - 1.0)
        above = max(above, found / case.exchange.objective - 1.0)
    return Finding(
        "The upper bound is the worst case of the network: brute force finds no worse point, and "
        "one nearly as bad.",
        f"{n_grid} x {n_grid} grid points on each box; tolerance 1e-6 above, {GRID_TOL:g} below",
        f"the grid's objective exceeds the upper bound by at most {above:.1e} (relative), and "
        f"stays below it by at most {below:.1e}",
        above <= 1e-6 and below <= GRID_TOL,
    )


def lower_bound_by_cvxpy(cases):
    """Compare a lower bound with the convex program on the copies and all their patterns."""
    hinge = [case for case in cases if isinstance(case.program.loss, Hinge)]
    case = min(hinge, key=lambda case: len(case.exchange.restricted.X))
    copies = case.exchange.restricted
    value, n_patterns = optimum_on_copies(copies)
    off = value / case.exchange.lower_bound - 1.0
    return Finding(
        "The lower bound is the optimum of nominal training on the copies over all their patterns "
        "(Pilanci and Ergen 2020).",
        f"{case.name}: {len(copies.X)} copies, {n_patterns} patterns enumerated; the program in "
        f"cvxpy, solved by Clarabel; relative tolerance {TOL:g}",
        f"optimum {value:.6f}, lower bound {case.exchange.lower_bound:.6f}, relative difference "
        f"{off:.1e}",
        abs(off) <= TOL,
    )


def optimum_on_copies(copies):
    """Return the optimum of the hinge program on copies and all patterns, and their number."""
    X, D, samples = copies.X, enumerate_patterns(copies.X), copies.copy_of
    V, W = cp.Variable((3, D.shape[1])), cp.Variable((3, D.shape[1]))
    z = cp.sum(cp.multiply(D, X @ (V - W)), axis=1)
    losses = cp.Variable(samples.max() + 1, nonneg=True)
    rows = [losses[samples] >= 1 - cp.multiply(copies.y, z)]
    cones = [cp.multiply(2 * D - 1, X @ U) >= 0 for U in (V, W)]
    penalty = cp.sum(cp.norm(V, axis=0)) + cp.sum(cp.norm(W, axis=0))
    scaled = cp.Minimize(cp.sum(losses) / losses.size / BETA + penalty)  # easier for the solver
    return BETA * cp.Problem(scaled, rows + cones).solve(cp.CLARABEL), D.shape[1]


def nobody_below(cases, setting):
    """Check that no network of any method is better than the lower bound says."""
    closest = [
        min(case.hard, case.soft, case.trainings.min()) / case.exchange.lower_bound - 1.0
        for case in cases
    ]
    n_networks = sum(2 + len(case.trainings) for case in cases)
    return Finding(
        "No network, however it was trained, has a worst-case objective below the lower bound.",
        f"{setting}; exact worst cases; relative tolerance 1e-6, that of the branch and bound",
        f"{n_networks} networks; the closest is {100.0 * min(closest):.4f} % above the bound",
        min(closest) >= -1e-6,
    )


def pgd_reaches(cases, setting):
    """Say how near the best and the typical PGD training come."""
    found = []
    for claim, name in (
        ("The best of many PGD trainings is within 1 % of the global optimum.", "PGD, best"),
        ("The typical PGD training is within 1 % of the global optimum.", "PGD, median"),
    ):
        distances = [case.distances[name] for case in cases]
        near = sum(d <= 1.0 for d in distances)
        found.append(
            Finding(
                claim,
                f"{setting}, {WIDTH} neurons, Adam, first weights of scales 0.1 to 1.5",
                f"within 1 % on {near} of {len(cases)} problems; distances in %: "
                + listed(cases, distances),
                near == len(cases),
                proven=False,
                remark="Gradient descent gets stuck with every loss, mostly with the hinge. More "
                "epochs, more or fewer steps of the attack, and other learning rates and widths "
                "were tried on two of the hinge problems, and did not bring the best training "
                "within 1 %. The width is enough: optimal networks have fewer neurons.",
            )
        )
    return found


def soft_is_near(cases, setting):
    """Compare the convex programs' networks with the optimum and with PGD training."""
    soft, hard, typical = (
        [case.distances[name] for case in cases] for name in ("soft", "hard", "PGD, median")
    )
    return Finding(
        "The soft program's network is nearer to the global optimum than the typical PGD training.",
        setting,
        f"distances in %, soft: {listed(cases, soft)}; hard: {listed(cases, hard)}",
        all(s <= t for s, t in zip(soft, typical, strict=True)),
        proven=False,
        remark="Soft and hard minimise upper bounds: their distance is the price of a certificate "
        "that holds by construction.",
    )


def listed(cases, distances):
    """Return distances with the names of the problems."""
    return ", ".join(f"{c.name} {d:.2f}" for c, d in zip(cases, distances, strict=True))


def curves_of(cases):
    """Return the brackets over the rounds, relative to the optimum, and all distances."""
    brackets = {}
    for case in cases:
        rounds, bound = case.exchange.rounds, case.exchange.lower_bound
        upper = np.minimum.accumulate([r.objective for r in rounds]) / bound
        lower = np.maximum.accumulate([r.lower_bound for r in rounds]) / bound
        brackets[case.name] = {"upper": upper, "lower": lower}
    return {"brackets": brackets, "distances": {case.name: case.distances for case in cases}}


def draw(figure, curves):
    """Draw the brackets over the rounds, and the distances of the methods."""
    left, right = figure.subplots(1, 2)
    for i, (name, ends) in enumerate(curves["brackets"].items()):
        rounds = np.arange(1, len(ends["upper"]) + 1)
        left.plot(rounds, ends["upper"], f"C{i}", marker=".", label=name)
        left.plot(rounds, ends["lower"], f"C{i}", marker=".")
    left.axhline(1.0, color="k", linewidth=0.8)
    left.set(
        title="bracket of the worst-case objective",
        xlabel="rounds",
        ylabel="upper and lower bound / optimum",
        ylim=(0.0, 2.2),
    )
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize="small")
    places = np.arange(len(curves["distances"]))
    for shift, (method, marker) in zip((-0.24, -0.08, 0.08, 0.24), MARKERS.items(), strict=True):
        values = [distances[method] for distances in curves["distances"].values()]
        right.plot(places + shift, np.maximum(values, 1e-3), marker, label=method)
    right.set_yscale("log")
    right.set_xticks(places, curves["distances"], rotation=30)
    right.set(title="exact worst case of the networks")
    right.set_ylabel("above the proven optimum (%), cut at 0.001")
    right.legend(fontsize="small")


MARKERS = {"hard": "s", "soft": "o", "PGD, best": "^", "PGD, median": "v"}


if __name__ == "__main__":
    main(study, draw)
