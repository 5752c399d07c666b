r"""How fast ADMM converges, what an iteration costs, and how soon it classifies well.

    python benchmarks/theory/admm_convergence.py

Bai, Gautam and Sojoudi (2022) train the convex program by the alternating direction method of
multipliers and say three things of it.

1. It converges linearly, if the dual step is small enough: error_t <= c r^t with r < 1.
2. With N samples of d features and P patterns an iteration costs O((dP)^2 + NdP).
3. The first iterations already give a network of high accuracy.

Their splitting, here for the mean squared loss, has copies v of the weights u = (V, W) and
s >= 0 of the cone rows G u = (S_i X v_i, S_i X w_i), with F u = sum_i D_i X (v_i - w_i):

    u <- argmin  |F u - y|^2 / 2N + rho/2 |u - v + lam|^2 + rho/2 |G u - s + nu|^2
    v <- column by column (1 - beta / (rho |u_i + lam_i|))_+ (u_i + lam_i)
    s <- (G u + nu)_+,    lam <- lam + g (u - v),    nu <- nu + g (G u - s).

It is written out below with rho = 5 beta, and some multiples of beta more to see what a penalty
does. The package's ADMM splits otherwise, takes any loss and any perturbations, and adapts its
penalties during 400 iterations; from then on they are fixed. Its iterates are seen every 50.

Linear or not? The error is the distance to the limit. A straight line through log(error) against t
is compared with one against log(t), which a method with error t^-p would follow. As errors
oscillate, the error at t is the largest from t on. The claim is asymptotic, that is, of the last
part, once the active neurons and cone rows no longer change: the fit is over the last four decades.

An iteration of the package multiplies matrices and works entry by entry, nothing else. Its matrix
products take, without perturbations, for one output and N >= 0.6 d (with fewer rows, less),

    12 NdP + 12 d^2 P + 4 dP^2   operations,

three products of n x d by d x P for V and W each way, and two changes of basis; no matrix of
order dP is formed. Torch counts them as they run.
"""

import time
import warnings
from typing import NamedTuple

import numpy as np
from _claims import Finding, main
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from torch.utils.flop_counter import FlopCounterMode

from convexrobust import InteriorPoint
from convexrobust.losses import Hinge, Squared
from convexrobust.network import TwoLayerReLU
from convexrobust.patterns import sample_patterns
from convexrobust.perturbations import LpBall
from convexrobust.program import ConvexProgram
from convexrobust.regularizers import GroupLasso
from convexrobust.solvers import ADMM
from convexrobust.solvers.admm.splitting import Splitting
from convexrobust.solvers.monitor import watched_by
from convexrobust.solvers.tensors import scalar_like

SHAPE = (40, 5, 12)  # N, d, P of the convergence
BETA = 0.02
ADAPTED = 400  # iterations after which the package's penalties are fixed
RHO = 5.0  # penalty of the published iteration, in units of beta
OTHERS = (RHO / 10.0, RHO, 4.0 * RHO)
CLOSE = 1e-6  # a distance that many penalties reach
FLOOR, DECADES = 1e-9, 4  # the fit: how close to the limit it ends, and its length
FEW = (5, 10, 20, 50)  # iterations
AGREED = 0.02  # test accuracy that counts as the same


def study(quick):
    """Fit rates, count operations, and classify with few iterations."""
    n_iter = 6500 if quick else 30_000
    steps = (1.0,) if quick else (1.0, 0.2)
    data = range(1 if quick else 3)
    runs = [paper_run(seed, step, n_iter) for seed in data for step in steps]
    soft, hard = ([package_run(*case) for case in cases] for cases in package_cases(quick))
    counts = count_operations(quick)
    accuracies = accuracy_by_iterations(1 if quick else 5, 60 if quick else 284)
    findings = [linear_in_paper(runs), linear_when_soft(soft)]
    if not quick:  # longer runs, and timings
        needed = [needed_by_penalty(seed, n_iter) for seed in data]
        findings += [linear_when_hard(hard), penalty_matters(needed, n_iter), timing_exponents()]
    findings += [exact_count(counts), count_exponents(counts), early_accuracy(accuracies)]
    return findings, curves_of(runs, soft + hard, accuracies)


def random_program(n, d, n_patterns, loss=None, *, epsilon=0.0, formulation="hard", seed=0):
    """Return a program with Gaussian features, intercept, random labels and sampled patterns."""
    rng = np.random.default_rng(seed)
    X = np.hstack([rng.standard_normal((n, d - 1)), np.ones((n, 1))])
    y = np.sign(rng.standard_normal(n))
    D = sample_patterns(X, n_patterns, random_state=seed)
    ball = LpBall(2, epsilon)
    return ConvexProgram(X, y, D, loss or Squared(), GroupLasso(BETA), ball, formulation)


def stopped_early(program, n_iter):
    """Return the solution after a number of iterations, whatever the gap."""
    with warnings.catch_warnings():
        # It is stopped on purpose before its gap is closed.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return ADMM(tol=1e-13, max_iter=n_iter).solve(program)


# ------------------------------------------------------------------------------- linear convergence


class Run(NamedTuple):
    """Distances to the limit along a run, and the straight line through their end."""

    label: str
    iterations: np.ndarray
    errors: np.ndarray
    rate: float  # factor per iteration
    line: float  # R^2 of log(error) against t
    power: float  # R^2 of log(error) against log(t)
    change: float  # relative, of the last iterate from the one before
    off: float  # relative difference of the value from that of another solver


def fitted(label, iterations, path, off):
    """Fit the last decades of the largest distances still to come."""
    distance = np.linalg.norm(path - path[-1], axis=1) / np.linalg.norm(path[-1])
    ahead = np.maximum.accumulate(distance[::-1])[::-1]
    kept = ahead > FLOOR
    last = kept & (ahead <= ahead[kept].min(initial=1.0) * 10.0**DECADES)
    rate = line = power = np.nan
    if last.sum() > 2:
        t, log_error = iterations[last].astype(float), np.log(ahead[last])
        rate = float(np.exp(np.polyfit(t, log_error, 1)[0]))
        line, power = (np.corrcoef(x, log_error)[0, 1] ** 2 for x in (t, np.log(t)))
    return Run(label, iterations, ahead, rate, line, power, float(distance[-2]), off)


def is_linear(run):
    """Tell whether a straight line in t fits, better than a power law, down to rounding."""
    return bool(run.rate < 1.0 and run.line >= 0.95 and run.line > run.power and at_end(run))


def at_end(run):
    """Tell whether the last iterate is the limit, far below the errors that are fitted."""
    return run.change <= FLOOR / 10.0


def lines(runs):
    """Return how the fit went, in words."""
    return "; ".join(
        f"{run.label}: factor {run.rate**100:.3f} per 100 iterations, R^2 {run.line:.3f} (power "
        f"law {run.power:.3f})"
        if at_end(run)
        else f"{run.label}: still moving by {run.change:.0e} after {run.iterations[-1]} iterations"
        for run in runs
    )


def paper_run(seed, step, n_iter):
    """Run the published iteration until its iterates no longer change."""
    program = random_program(*SHAPE, seed=seed)
    path, objective = two_blocks(program, RHO * BETA, step, n_iter)
    best = InteriorPoint(tol=1e-8).solve(program).objective
    label = f"data {seed}, dual step {step:g}"
    return fitted(label, np.arange(1, n_iter + 1), path, abs(objective / best - 1.0))


def needed_by_penalty(seed, n_iter):
    """Return the iterations until the iterates stay close to the limit, inf if they do not."""
    program = random_program(*SHAPE, seed=seed)
    paths = [two_blocks(program, rho * BETA, 1.0, n_iter)[0] for rho in OTHERS]
    limit = paths[OTHERS.index(RHO)][-1]
    found = []
    for path in paths:
        far = np.linalg.norm(path - limit, axis=1) > CLOSE * np.linalg.norm(limit)
        found.append(np.inf if far[-1] else float(far.sum() and np.flatnonzero(far)[-1] + 2))
    return found


def two_blocks(program, rho, step, n_iter):
    """Return the iterates v of the published ADMM for the squared loss, and the last objective."""
    X, beta = program.X, program.regularizer.beta
    (n, d), columns = X.shape, 2 * program.D.shape[1]
    S = np.hstack([program.signs, program.signs])
    half = np.einsum("ki,kj->kij", program.D, X).reshape(n, -1)
    F = np.hstack([half, -half])
    # G'G is block diagonal with blocks X'X, as the entries of S are -1 and 1.
    normal = F.T @ F / (n * rho) + np.kron(np.eye(columns), np.eye(d) + X.T @ X)
    inverse, pull = np.linalg.inv(normal), F.T @ program.y / (n * rho)
    v = lam = np.zeros((columns, d))
    s = nu = np.zeros((n, columns))
    path = np.zeros((n_iter, columns * d))
    for t in range(n_iter):
        right = v - lam + (S * (s - nu)).T @ X
        u = (inverse @ (pull + right.ravel())).reshape(columns, d)
        v = shrunk(u + lam, beta / rho)
        rows = S * (X @ u.T)
        s = np.maximum(rows + nu, 0.0)
        lam, nu = lam + step * (u - v), nu + step * (rows - s)
        path[t] = v.ravel()
    loss = 0.5 * np.mean((F @ path[-1] - program.y) ** 2)
    return path, loss + beta * np.linalg.norm(v, axis=1).sum()


def shrunk(rows, length):
    """Return rows shortened by a length, 0 where they are shorter."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.maximum(1.0 - length / np.maximum(norms, length), 0.0)


def package_cases(quick):
    """Return losses, radii, seeds and iterations, of soft and of hard programs."""
    if quick:
        return [(Squared(), 0.0, "soft", 2, 1000, (30, 4, 8))], []
    return (
        [(Squared(), 0.1, "soft", 0, 3000), (Hinge(), 0.0, "soft", 0, 5600)],
        [(Squared(), 0.0, "hard", seed, 4000) for seed in (0, 1)],
    )


def package_run(loss, epsilon, formulation, seed, n_iter, shape=SHAPE):
    """Run the package's ADMM and return how far its iterates were, once penalties are fixed."""
    settings = {"epsilon": epsilon, "formulation": formulation, "seed": seed}
    program = random_program(*shape, loss, **settings)
    seen = []
    with watched_by(lambda row, found: seen.append((row.n_iter, found.V, found.W))):
        solution = stopped_early(program, n_iter)
    kept = [(t, np.concatenate([V.ravel(), W.ravel()])) for t, V, W in seen if t > ADAPTED]
    best = InteriorPoint(tol=1e-8).solve(program).objective
    label = f"{type(loss).__name__.lower()}, {formulation}, radius {epsilon:g}, data {seed}"
    iterations, path = map(np.array, zip(*kept, strict=True))
    return fitted(label, iterations, path, abs(solution.objective / best - 1.0))


def linear_in_paper(runs):
    """Judge the published iteration: a theorem, for a small enough dual step."""
    return Finding(
        "The published two-block ADMM converges linearly: log(distance to the limit) falls along "
        "a straight line in t (Bai, Gautam and Sojoudi 2022, after Hong and Luo 2017).",
        f"squared loss, (N, d, P) = {SHAPE}, hard, beta = {BETA}, rho = {RHO:g} beta; last "
        f"{DECADES} decades above {FLOOR:g}; holds if R^2 >= 0.95 and above that of a power law, "
        "the factor is below 1, the last iterate is the limit, and the value agrees with "
        "InteriorPoint to 1e-6",
        f"{lines(runs)}; values differ by at most {max(run.off for run in runs):.0e}",
        all(is_linear(run) and run.off <= 1e-6 for run in runs),
        remark="Before the active neurons and cone rows are found, thousands of iterations can "
        "pass with slower progress; the theorem is about what comes after.",
    )


def penalty_matters(needed, n_iter):
    """Compare penalties by the iterations that they need."""
    means = np.minimum(needed, n_iter).mean(axis=0)
    middle = means[OTHERS.index(RHO)]
    text = ", ".join(
        f"{rho:g} beta: {', '.join(f'{count:.0f}' for count in column)}"
        for rho, column in zip(OTHERS, np.transpose(needed), strict=True)
    )
    return Finding(
        "How soon depends on the penalty: a tenth or four times of it take more than twice as "
        "long in the mean.",
        f"the same {len(needed)} data, dual step 1; iterations until the distance to the limit "
        f"stays below {CLOSE:g}, at most {n_iter}",
        text,
        bool(all(mean > 2.0 * middle for mean in means if mean != middle)),
        proven=False,
        remark="With a small penalty the active neurons and cone rows change for long before the "
        "linear part begins; with a large one the linear part itself is slow. The package "
        "therefore adapts its penalties.",
    )


def linear_when_soft(runs):
    """Judge the package's ADMM without cones."""
    return Finding(
        "The package's ADMM converges linearly on soft programs once its penalties are fixed.",
        f"(N, d, P) = {SHAPE}, smaller with --quick; iterates every 50 "
        f"iterations after {ADAPTED}; as above",
        lines(runs),
        all(is_linear(run) for run in runs),
        proven=False,
        remark="Another splitting than the published one, with over-relaxation.",
    )


def linear_when_hard(runs):
    """Judge the package's ADMM with cones: its linear part can start late."""
    return Finding(
        f"The package's ADMM converges linearly within {runs[0].iterations[-1]} iterations on hard "
        "programs.",
        "as above; with cone rows",
        lines(runs),
        all(is_linear(run) for run in runs),
        proven=False,
        remark="Where it does not, the run ends before its linear part: neurons that end at zero "
        "leave one by one, each only after hundreds of iterations in which small violations of its "
        f"cone rows shrink, with the penalties of the first {ADAPTED} iterations. The data with "
        "the straight line had such a time, too: the step in its curve. Soft programs have no such "
        "rows. In the picture the distance is to the last iterate.",
    )


# ----------------------------------------------------------------------------- cost of an iteration


def per_iteration(measure, program, few=1, many=2):
    """Return what an iteration takes: the difference of two runs, free of set-up and bounds."""
    return (measure(program, many) - measure(program, few)) / (many - few)


def operations(program, n_iter):
    """Count the operations in matrix products of the iteration on tensors."""
    splitting = Splitting(program, scalar_like("float64", "cpu"), fused=False)
    with FlopCounterMode(display=False) as counter:
        splitting.advance(n_iter)
    return counter.get_total_flops()


def count_operations(quick):
    """Return sizes (N, d, P) with the operations of an iteration, nominal and robust."""
    sizes = [(100, 5, 10), (200, 5, 10), (100, 10, 10), (100, 5, 20)]
    if not quick:
        sizes += [(400, 5, 10), (100, 20, 10), (100, 40, 10), (100, 5, 40), (100, 5, 80)]
    return [
        (
            size,
            per_iteration(operations, random_program(*size)),
            per_iteration(operations, random_program(*size, epsilon=0.1, formulation="soft")),
        )
        for size in sizes
    ]


def exact_count(counts):
    """Compare the counts with the formula."""
    off = max(abs(found / model(*size) - 1.0) for size, found, _ in counts)
    n, d, n_patterns = 600, 148, 36
    dense = 2 * (2 * d * n_patterns) ** 2
    return Finding(
        "The matrix products of an iteration of the package take 12 NdP + 12 d^2 P + 4 dP^2 "
        "operations where N >= 0.6 d, and less with fewer rows: linear in N, at most quadratic in "
        "d and in P.",
        f"nominal, one output; (N, d, P) in {[size for size, _, _ in counts]}; counted by torch on "
        "the iteration as written on tensors, difference of 2 iterations and 1; equality",
        f"largest relative difference {off:.1e}; at N = {n}, d = {d}, P = {n_patterns} the formula "
        f"gives {model(n, d, n_patterns):.1e}, one dense step with a matrix of order 2dP alone "
        f"{dense:.1e}",
        bool(off < 1e-12),
        remark="Work entry by entry, about NP + Nd + dP numbers, is not counted.",
    )


def model(n, d, n_patterns):
    """Return the operations that the formula says."""
    return 12 * n * d * n_patterns + 12 * d**2 * n_patterns + 4 * d * n_patterns**2


def count_exponents(counts):
    """Fit powers to the counts with perturbations, along each of N, d and P."""
    powers = [exponent(counts, axis) for axis in range(3)]
    return Finding(
        "With perturbations, too, the operations of an iteration grow at most linearly in N and "
        "quadratically in d and P (Bai, Gautam and Sojoudi 2022: (dP)^2 + NdP).",
        "soft, l2 ball of radius 0.1, sizes as above; power fitted along each axis; tolerance 0.05",
        "powers of N, d, P: " + ", ".join(f"{power:.2f}" for power in powers),
        bool(np.all(np.array(powers) <= np.array([1.0, 2.0, 2.0]) + 0.05)),
    )


def exponent(counts, axis):
    """Fit a power along one axis of the sizes, the others at (100, 5, 10)."""
    middle = (100, 5, 10)
    others = [i for i in range(3) if i != axis]
    line = [(s[axis], c) for s, _, c in counts if all(s[i] == middle[i] for i in others)]
    x, cost = np.log(np.array(line)).T
    return float(np.polyfit(x, cost, 1)[0])


def cpu_seconds(program, n_iter):
    """Return the least CPU time of three runs."""
    found = []
    for _ in range(3):
        began = time.process_time()
        stopped_early(program, n_iter)
        found.append(time.process_time() - began)
    return min(found)


def timing_exponents():
    """Fit powers to CPU times, at sizes where the matrix products count."""
    middle, larger = (1000, 30, 30), ((2000, 4000), (60, 120), (60, 120))
    powers = []
    for axis, sizes in enumerate(larger):
        line = []
        for size in (middle[axis], *sizes):
            shape = tuple(size if i == axis else m for i, m in enumerate(middle))
            line.append((size, per_iteration(cpu_seconds, random_program(*shape), 5, 45)))
        powers.append(float(np.polyfit(*np.log(np.array(line)).T, 1)[0]))
    return Finding(
        "CPU time of an iteration grows at most linearly in N and quadratically in d and P.",
        f"from (N, d, P) = {middle}, each doubled twice; difference of 45 and 5 iterations, least "
        "of three runs each; power fitted; tolerance 0.3",
        "powers of N, d, P: " + ", ".join(f"{power:.2f}" for power in powers),
        bool(np.all(np.array(powers) <= np.array([1.3, 2.3, 2.3]))),
        proven=False,
        remark="A timing: other work on the machine and arrays that outgrow its caches raise it. "
        "The counts have neither.",
    )


# ----------------------------------------------------------------------------------- early accuracy


def accuracy_by_iterations(n_splits, n_train):
    """Return test accuracies, from the fewest iterations to convergence; one row a split."""
    X, y = load_breast_cancer(return_X_y=True)
    return [accuracies_of(X, 2.0 * y - 1.0, seed, n_train) for seed in range(n_splits)]


def accuracies_of(X, y, seed, n_train):
    """Train on one split, with few iterations and by an interior point method."""
    A, B, a, b = train_test_split(X, y, train_size=n_train, random_state=seed, stratify=y)
    mean, scale = A.mean(axis=0), A.std(axis=0)
    A, B = (A - mean) / scale, (B - mean) / scale
    A = np.hstack([A, np.ones((len(A), 1))])
    D = sample_patterns(A, 20, random_state=seed)
    program = ConvexProgram(A, a, D, Hinge(), GroupLasso(1e-3), LpBall(np.inf, 0.0), "hard")
    found = [stopped_early(program, k) for k in FEW]
    found.append(InteriorPoint(tol=1e-4).solve(program))
    return [correct(solution, B, b) for solution in found]


def correct(solution, X, y):
    """Return the accuracy of the network of a solution."""
    return float(np.mean(y * TwoLayerReLU.from_solution(solution).predict(X)[:, 0] > 0.0))


def early_accuracy(accuracies):
    """Compare few iterations with convergence."""
    mean = np.mean(accuracies, axis=0)
    text = ", ".join(f"{k}: {m:.3f}" for k, m in zip(FEW, mean, strict=False))
    return Finding(
        "The first iterations of ADMM already give a network of high accuracy "
        "(Bai, Gautam and Sojoudi 2022).",
        f"breast cancer, standardised, {len(accuracies)} splits, hinge, beta = 0.001, P = 20, "
        f"hard; holds if the mean test accuracy after {FEW[2]} iterations is at most {AGREED} "
        "below that of an interior point solution",
        f"mean test accuracy after {text}, converged: {mean[-1]:.3f}",
        bool(mean[2] >= mean[-1] - AGREED),
        proven=False,
        remark="Stopping early regularises: fewer iterations can even classify better than the "
        "optimum. With a larger beta the first iterates can be the zero network, until the "
        "multipliers have grown beyond beta.",
    )


# ----------------------------------------------------------------------------------------- picture


def curves_of(runs, package, accuracies):
    """Return what `draw` needs, at most 100 points a line."""

    def thin(run):
        shown = np.flatnonzero(run.errors > FLOOR / 10.0)
        shown = shown[:: max(len(shown) // 100, 1)]
        return {
            "label": run.label,
            "t": run.iterations[shown].tolist(),
            "error": [float(f"{e:.4g}") for e in run.errors[shown]],
        }

    return {
        "paper": [thin(run) for run in runs],
        "package": [thin(run) for run in package],
        "iterations": FEW,
        "accuracies": accuracies,
    }


def draw(figure, curves):
    """Draw the errors of both methods, and the accuracies."""
    paper, package, accuracy = figure.subplots(1, 3)
    for axes, name in ((paper, "paper"), (package, "package")):
        for line in curves[name]:
            axes.semilogy(line["t"], line["error"], label=line["label"])
        axes.set(xlabel="iteration", ylabel="distance to the limit, relative", ylim=(1e-10, 100.0))
        axes.legend(fontsize="x-small", loc="upper right")
    paper.set_title(f"Published ADMM, penalty {RHO:g} beta")
    package.set_title("The package's ADMM, penalties fixed")
    splits = np.transpose(curves["accuracies"])
    places = range(len(splits))
    accuracy.plot(places, splits, color="C0", alpha=0.3)
    accuracy.plot(places, splits.mean(axis=1), "C0o-", label="mean of the splits")
    accuracy.set_xticks(places, [*map(str, curves["iterations"]), "converged"])
    accuracy.set(xlabel="iterations", ylabel="test accuracy", title="Breast cancer")
    accuracy.legend(fontsize="x-small")


if __name__ == "__main__":
    main(study, draw)
