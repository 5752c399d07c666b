r"""Convex reformulation of two-layer training.

    python benchmarks/theory/convex_reformulation.py

With X (N x d, a column of ones included), the columns d_i of D all activation patterns 1[Xu >= 0]
and S = 2D - 1, the two problems

    non-convex   min over m neurons u_j, a_j of
                     loss(sum_j (X u_j)_+ a_j) + beta/2 sum_j (|u_j|^2 + a_j^2)
    convex       min over V, W (d x P) of
                     loss(sum_i diag(d_i) X (v_i - w_i)) + beta sum_i (|v_i| + |w_i|),
                     S_ki x_k'v_i >= 0 and S_ki x_k'w_i >= 0 for all k, i

have one optimal value p* for every convex loss (here the mean over the samples), as soon as m is
at least the number m* of nonzero columns of some optimal V, W, and m* <= N + 1 for one of them
(Pilanci and Ergen, "Neural networks are convex regularizers", 2020). Two steps make the proof.
Scaling a neuron, u -> cu, a -> a/c, turns the weight decay into |u| |a|. Neurons with equal pattern
and equal sign of a can be added up, and the norm of a sum is at most the sum of the norms.

Here N is about ten, so that all patterns can be listed and a thousand random starts of gradient
descent cost seconds. Checked are: the two steps, on random networks; the gap of the convex program,
by its dual and by a second solver; that no start gets below p*; that the recovered network attains
p*; and that N + 1 neurons do, also where the solver returned more. Then the landscape: how often
gradient descent finds p*, by width, and where it stops otherwise. The last answer is in Wang,
Lacotte and Pilanci, "The hidden convex optimization landscape of regularized two-layer ReLU
networks" (2022): a stationary point is a global optimum of the convex program in which V and W have
the patterns of its own positive and negative neurons only.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cvxpy as cp
import numpy as np
import torch
from _claims import Finding, main
from scipy.optimize import linprog, minimize

from convexrobust import InteriorPoint
from convexrobust.losses import Hinge, Logistic, Squared
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import count_patterns, enumerate_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers.working_set.pricing import global_lower_bound

WIDTHS = (4, 8, 16, 32)
CLOSE = 0.01  # relative to p*
BETAS = {"hinge": 0.01, "logistic": 0.01, "squared": 0.005}
# Each loss of a sample, for the package, for torch and for cvxpy: three formulas that must agree.
LOSSES = {
    "hinge": (
        Hinge(),
        lambda z, y: torch.relu(1 - y * z),
        lambda z, y: cp.pos(1 - cp.multiply(y, z)),
    ),
    "logistic": (
        Logistic(),
        lambda z, y: torch.nn.functional.softplus(-y * z),
        lambda z, y: cp.logistic(-cp.multiply(y, z)),
    ),
    "squared": (Squared(), lambda z, y: (z - y) ** 2 / 2, lambda z, y: cp.square(z - y) / 2),
}


@dataclass(frozen=True)
class Case:
    """A small training problem and the optimum of its convex program with all patterns."""

    loss: str
    n: int
    d: int
    seed: int
    beta: float

    @property
    def name(self):
        """Loss and sizes."""
        return f"{self.loss} N={self.n} d={self.d} seed {self.seed}"

    @cached_property
    def program(self):
        """The nominal program with all patterns."""
        rng = np.random.default_rng([self.seed, self.n, self.d])
        X = np.column_stack([rng.standard_normal((self.n, self.d - 1)), np.ones(self.n)])
        y = rng.standard_normal(self.n)
        y = y if self.loss == "squared" else np.where(y > np.median(y), 1.0, -1.0)
        loss, decay, nominal = LOSSES[self.loss][0], GroupLasso(self.beta), LpBall(np.inf, 0.0)
        return ConvexProgram(X, y, enumerate_patterns(X), loss, decay, nominal, "hard")

    @cached_property
    def solution(self):
        """Its optimum, to a certified relative gap of 1e-8."""
        return InteriorPoint(tol=1e-8).solve(self.program)

    @property
    def optimum(self):
        """The value p*."""
        return self.solution.objective

    def objectives(self, U, a):
        """Return the non-convex objectives of B networks, U (d, m, B) and a (m, B), in torch."""
        X, y = (torch.as_tensor(data, dtype=U.dtype) for data in (self.program.X, self.program.y))
        hidden = torch.relu(X @ U.flatten(1)).unflatten(1, a.shape)
        losses = LOSSES[self.loss][1]((hidden * a).sum(1), y[:, None]).mean(0)
        return losses + self.beta / 2 * (U.square().sum((0, 1)) + a.square().sum(0))

    def objective(self, network):
        """Return the non-convex objective of one network."""
        U, a = torch.as_tensor(network.hidden[:, :, None]), torch.as_tensor(network.output)
        return self.objectives(U, a).item()


class Runs(NamedTuple):
    """Gradient descent from many starts: a case, a width, the networks found and their values."""

    case: Case
    width: int
    U: np.ndarray
    a: np.ndarray
    values: np.ndarray

    @property
    def excess(self):
        """The objectives relative to p*, less 1."""
        return self.values / self.case.optimum - 1


def study(quick):
    """Return the findings, and the distributions of the random starts."""
    sizes = [(6, 2, 0)] if quick else [(8, 2, 0), (12, 3, 0), (10, 3, 0)]
    cases = [Case(loss, *size, BETAS[loss]) for size in sizes for loss in LOSSES]
    n_starts, n_steps = (50, 150) if quick else (1000, 1000)
    runs = [
        descend(case, width, n_starts, n_steps)
        for case in cases
        for width in (WIDTHS if case in cases[-3:] else [2 * (case.n + 1)])
    ]
    seen = [run for run in runs if run.case in cases[-3:]]
    findings = [two_steps(cases, 10 if quick else 200), proven_optimum(cases)]
    findings += [never_beaten(cases, runs), recovered(cases), few_neurons(cases)]
    findings += [bad_minima(seen), wide_enough(seen), stuck(seen, 2 if quick else 20)]
    return findings, distributions(seen)


# The theorem


def two_steps(cases, n_networks):
    """Check scaling and merging: no network's objective is below that of its convex point."""
    rng, changes, gains = np.random.default_rng(0), [], []
    for case in cases:
        X, D = case.program.X, case.program.D
        for _ in range(n_networks):
            m = rng.integers(1, 40)
            network = TwoLayerReLU(rng.standard_normal((case.d, m)), rng.standard_normal((m, 1)))
            outputs = network.predict(X[:, :-1])[:, 0]
            (V,), (W,), D_used = network.to_convex(X[:, :-1], D)
            changes.append(np.abs(np.sum(D_used * (X @ (V - W)), axis=1) - outputs).max())
            decay = (np.sum(network.hidden**2) + np.sum(network.output**2)) / 2
            gains.append(decay / np.linalg.norm(np.hstack([V, W]), axis=0).sum())
    return Finding(
        claim="Scaling and merging neurons keeps the outputs on the data and never raises the "
        "weight decay (the two steps of the proof).",
        setting=f"{n_networks} random networks of 1 to 39 neurons on each of {len(cases)} data "
        "sets, against V, W; tolerance 1e-12, of the outputs absolute, of the decay relative",
        measured=f"largest change of an output {max(changes):.1e}; the decay of the network is "
        f"{min(gains):.6g} to {max(gains):.3g} times the sum of norms of V, W",
        holds=bool(max(changes) < 1e-12 and min(gains) > 1 - 1e-12),
    )


def proven_optimum(cases):
    """Check the certified gap over all patterns, and the value by a second formula and solver."""
    gap = max(1 - case.solution.lower_bound / case.optimum for case in cases)
    priced = max(
        1 - global_lower_bound(case.program, case.solution.multipliers) / case.optimum
        for case in cases
    )
    other = max(abs(reference(case) / case.optimum - 1) for case in cases)
    counted = all(case.program.D.shape[1] == count_patterns(case.n, case.d) for case in cases)
    return Finding(
        claim="The convex program with all patterns is solved to a proven gap.",
        setting=f"{len(cases)} programs, N up to {max(case.n for case in cases)}; tolerance: gap "
        "1e-6, the same program in cvxpy 1e-4 (Clarabel's own gap), all relative",
        measured=f"largest gap {gap:.1e}, with the cones of every enumerated pattern priced anew "
        f"{priced:.1e}; off the cvxpy value by {other:.1e}; pattern counts "
        f"{sorted({case.program.D.shape[1] for case in cases})}" + " are Cover's" * counted,
        holds=bool(max(gap, priced) < 1e-6 and other < 1e-4 and counted),
    )


def reference(case, D_v=None, D_w=None):
    """Return the value of the convex program, written down once more in cvxpy.

    V and W may have patterns of their own; all patterns by default.
    """
    X, y, total, outputs, cones = case.program.X, case.program.y, 0, 0, []
    for sign, D in ((1, D_v), (-1, D_w)):
        D = np.asarray(case.program.D if D is None else D, dtype=float)
        if D.shape[1]:
            U = cp.Variable((case.d, D.shape[1]))
            outputs += sign * cp.sum(cp.multiply(D, X @ U), axis=1)
            total += case.beta * cp.sum(cp.norm(U, 2, axis=0))
            cones.append(cp.multiply(2 * D - 1, X @ U) >= 0)
    total += cp.sum(LOSSES[case.loss][2](outputs, y)) / case.n
    return cp.Problem(cp.Minimize(total), cones).solve(solver="CLARABEL")


def never_beaten(cases, runs):
    """Check that the best of all starts, polished, is not below p*."""
    above = {case.name: np.inf for case in cases}
    for run in runs:
        excess = polish(run, np.argmin(run.values)) / run.case.solution.lower_bound - 1
        above[run.case.name] = min(above[run.case.name], excess)
    return Finding(
        claim="No run of gradient descent gets below the convex optimum p* (Pilanci and Ergen).",
        setting=f"{len(runs[0].values)} random starts of Adam for each of {len(cases)} problems "
        f"and each width (widths {WIDTHS} on the last three, 2(N + 1) on the others), the best "
        "of each polished by L-BFGS; tolerance 1e-9 relative",
        measured="best run above the lower bound of p*, relative: "
        + "; ".join(f"{name} {value:.1e}" for name, value in above.items()),
        holds=min(above.values()) > -1e-9,
    )


def recovered(cases):
    """Check that the network made of V, W has the objective of the program."""
    errors = [
        abs(case.objective(TwoLayerReLU.from_solution(case.solution)) / case.optimum - 1)
        for case in cases
    ]
    return Finding(
        claim="The network recovered from V, W attains the value of the convex program.",
        setting=f"{len(cases)} problems, weight-decay objective of the network; 1e-6 relative",
        measured=f"largest relative difference {max(errors):.1e}",
        holds=max(errors) < 1e-6,
    )


def few_neurons(cases):
    """Check that N + 1 neurons suffice, after a reduction where the solver returned more."""
    rows, kept = [], []
    for case in cases:
        before, small = TwoLayerReLU.from_solution(case.solution).n_neurons, smallest(case)
        rows.append(f"{case.name} {before} to {small.n_neurons}")
        kept.append(small.n_neurons <= case.n + 1)
        kept.append(case.objective(small) / case.optimum - 1 < 1e-6)
    return Finding(
        claim="An optimal network with at most N + 1 neurons exists (Pilanci and Ergen).",
        setting=f"{len(cases)} problems; neurons recovered, and after the reduction, whose "
        "objective is p* to 1e-6 relative",
        measured="; ".join(rows),
        holds=all(kept),
        remark="An interior-point method returns the middle of the set of optima, where a neuron "
        "on a face between cells is split among their patterns: more than N + 1 neurons. The "
        "reduction keeps their directions and gives them the lengths c >= 0 of least sum that "
        "leave the outputs on the data. This is a linear program with N equations, and at a vertex "
        "at most N lengths are not zero: one less than the theorem has.",
    )


def smallest(case):
    """Return an optimal network with at most N of the neurons of the convex solution."""
    network = TwoLayerReLU.from_solution(case.solution)
    size = np.linalg.norm(network.hidden, axis=0)
    hidden, sign = network.hidden / size, np.sign(network.output[:, 0])
    outputs = np.maximum(case.program.X @ hidden, 0.0) * sign
    total = outputs @ size**2  # balanced: |u_j| = |a_j|
    lengths = linprog(np.ones(len(size)), A_eq=outputs, b_eq=total, method="highs-ds").x
    used = lengths > 1e-9 * lengths.max()
    root = np.sqrt(lengths[used])
    return TwoLayerReLU(hidden[:, used] * root, (sign[used] * root)[:, None])


# The landscape


def descend(case, width, n_starts, n_steps):
    """Run Adam in single precision from random starts, all at once."""
    rng = np.random.default_rng([case.seed, width])
    U = rng.standard_normal((case.d, width, n_starts)) / np.sqrt(case.d)
    a = rng.standard_normal((width, n_starts)) / np.sqrt(width)
    weights = [torch.tensor(w, dtype=torch.float32, requires_grad=True) for w in (U, a)]
    optimizer = torch.optim.Adam(weights, lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        optimizer.zero_grad()
        case.objectives(*weights).sum().backward()
        optimizer.step()
        schedule.step()
    U, a = (weight.detach().double() for weight in weights)
    return Runs(case, width, U.numpy(), a.numpy(), case.objectives(U, a).numpy())


def polish(run, i):
    """Return the objective after L-BFGS from network i; it may end at a kink, but never rises."""
    U, a = run.U[:, :, i], run.a[:, i]

    def value_and_gradient(flat):
        weights = torch.tensor(flat, requires_grad=True)
        hidden, output = weights[: U.size].reshape(*U.shape, 1), weights[U.size :, None]
        value = run.case.objectives(hidden, output)[0]
        value.backward()
        return value.item(), weights.grad.numpy()

    start = np.concatenate([U.ravel(), a])
    return minimize(
        value_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}
    ).fun


def of_each_case(runs):
    """Return for each case its runs, those of growing width."""
    return [
        [run for run in runs if run.case == case] for case in dict.fromkeys(r.case for r in runs)
    ]


def bad_minima(runs):
    """Measure where a median start ends above p*, with few neurons and with many."""
    rows, kept = [], []
    for few, *_, many in of_each_case(runs):
        ends = [np.median(run.excess) for run in (few, many)]
        rows.append(
            f"{few.case.loss} {ends[0]:.1%} and {ends[1]:.1%} (best {few.excess.min():.1%} and "
            f"{many.excess.min():.1%})"
        )
        kept.append(ends[0] - few.excess.min() > 0.01 and ends[0] > 2 * ends[1])
    return Finding(
        claim="With few neurons gradient descent ends in bad local minima, with many in better "
        "ones.",
        setting=f"median excess over p* with {WIDTHS[0]} and with {WIDTHS[-1]} neurons, "
        f"{len(few.values)} starts each; holds if with few the median is 1 % above the best start, "
        "and twice that with many",
        measured="; ".join(rows),
        holds=bool(all(kept)),
        proven=False,
        remark="Median against best start of one width is what bad minima cost; what the best "
        "start lacks to p* with few neurons is the price of the width itself.",
    )


def wide_enough(runs):
    """Measure the share of starts that reach p* at widths that the theorem allows."""
    rows, best, shares = [], [], []
    for some in of_each_case(runs):
        fewest, wide = smallest(some[0].case).n_neurons, [r for r in some if r.width > r.case.n]
        rows.append(f"{some[0].case.loss} (m* <= {fewest}) " + ", ".join(map(share, some)))
        best.append(min(run.excess.min() for run in wide))
        shares.append(min(np.mean(run.excess < CLOSE) for run in wide))
    return Finding(
        claim="The optimum of a wide enough network is there, and gradient descent may miss it "
        "from most starts.",
        setting=f"share of {len(some[0].values)} starts within {CLOSE:.0%} of p* with "
        f"{', '.join(map(str, WIDTHS))} neurons; holds if with more than N some start reaches it "
        "for every loss, and less than half of them at some such width for some loss",
        measured="; ".join(rows),
        holds=bool(max(best) < CLOSE and min(shares) < 0.5),
        proven=False,
        remark="The bound of m* is the number of neurons after the reduction. That the optimum is "
        "there is proven by the recovered network; if no start reaches it, the search is at fault.",
    )


def share(run):
    """Return the share of starts that reached p*, as text."""
    return f"{np.mean(run.excess < CLOSE):.1%}"


def stuck(runs, n_networks):
    """Compare final values with the optima over each network's own patterns."""
    rows, below, medians = [], [], []
    for few, *_ in of_each_case(runs):
        ends, own = few.values[:n_networks], own_optima(few, n_networks)
        distance = ends / own - 1
        below.append(distance.min())
        medians.append(np.median(distance))
        rows.append(
            f"{few.case.loss} {medians[-1]:.2%} above their own optima (lowest {below[-1]:.1e}, "
            f"largest {distance.max():.1%}), {np.median(ends / few.case.optimum - 1):.0%} above p*"
        )
    return Finding(
        claim="Gradient descent stops at global optima of convex programs with fewer patterns: "
        "those of its own neurons (Wang, Lacotte and Pilanci).",
        setting=f"first {n_networks} starts with {WIDTHS[0]} neurons; V has the patterns of the "
        "neurons with a > 0, W of those with a < 0; median distances; holds if none is below its "
        "own optimum by more than 1e-5 and the median is less than 1 % above, for each loss",
        measured="; ".join(rows),
        holds=min(below) > -1e-5 and max(medians) < 0.01,
        proven=False,
        remark="The theorem is about stationary points, of which gradient descent ends a little "
        "short: where a neuron should slide along a kink x_k'u = 0 it zigzags, the more so for the "
        "hinge with its own kinks. So the distances are above zero, and some are large.",
    )


def own_optima(run, n_networks):
    """Return the optima of the convex programs with the patterns of the first networks."""
    found = []
    for i in range(n_networks):
        network = TwoLayerReLU(run.U[:, :, i], run.a[:, i, None]).pruned(1e-4)
        D, positive = network.gates(run.case.program.X[:, :-1]), network.output[:, 0] > 0
        found.append(reference(run.case, D[:, positive], D[:, ~positive]))
    return np.array(found)


# The picture


def distributions(runs):
    """Return quantiles of the final values, and the shares of starts that reached p*."""
    levels = np.linspace(0, 1, 61)
    return {
        "levels": levels,
        "close": CLOSE,
        "cases": [
            {
                "name": some[0].case.loss,
                "n": some[0].case.n,
                "widths": [run.width for run in some],
                "shares": [np.mean(run.excess < CLOSE) for run in some],
                "excess": [np.quantile(run.excess, levels) for run in some],
            }
            for some in of_each_case(runs)
        ],
    }


def draw(figure, curves):
    """Draw the distributions for the squared loss, and how often the optimum is found."""
    left, right = figure.subplots(1, 2)
    case = curves["cases"][-1]
    for shade, width, excess in zip(
        np.linspace(0.85, 0.1, len(case["widths"])), case["widths"], case["excess"], strict=True
    ):
        colour = str(shade)
        left.plot(np.maximum(excess, 2e-4), curves["levels"], color=colour, label=f"m = {width}")
    left.axvline(curves["close"], color="tab:red", linestyle=":", label="1 %")
    left.set(
        xscale="log",
        xlim=(2e-4, None),
        xlabel="objective / p* - 1",
        ylabel="share of random starts",
    )
    left.set_title(f"Final objectives, {case['name']} loss, N = {case['n']}")
    left.legend()
    for case in curves["cases"]:
        right.plot(case["widths"], case["shares"], marker="o", label=case["name"])
    right.axvline(case["n"] + 1, color="tab:red", linestyle=":", label="m = N + 1")
    right.set_xscale("log", base=2)
    right.set_xticks(case["widths"], case["widths"])
    right.set(xlabel="neurons m", ylabel="share of starts within 1 % of p*", ylim=(-0.02, 1.02))
    right.set_title("How often gradient descent finds p*")
    right.legend()


if __name__ == "__main__":
    main(study, draw)
