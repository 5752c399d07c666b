r"""Adversarial training as a constrained, semi-infinite problem.

Run ``python benchmarks/theory/semi_infinite_learning.py`` (``--quick`` for small sizes).

Robey, Chamon, Pappas, Hassani and Ribeiro (2021) minimise the robust loss under a limit on the
clean loss,

    P(rho) = min_w  mean_k max_{|delta|_inf <= eps} l(w; x_k + delta, y_k)
             s.t.   mean_k l(w; x_k, y_k) <= rho,

and read the inner maximum as the supremum of E_lambda[l] over densities lambda of perturbations:
infinitely many unknowns. Their method DALE draws perturbations by Langevin steps, goes down
robust + nu clean in w, and up in the multiplier nu.

*The worst density.* Charged (gamma / 2) int lambda^2, the best density is lambda = [l - mu]_+ /
gamma, with mu such that it integrates to 1. As gamma -> 0 it concentrates on the maximisers. Around
a smooth maximum l is a parabola: with h = max l - mu the support is as wide as h^(1/2), the
integral goes like h^(3/2) / gamma, and so h and max l - E_lambda[l] = h / 5 like gamma^(2/3).

*The sampler.* `Dale` takes steps eta s(U' + (2 eta T)^(1/2) xi), U = log l, with the sign s and
Laplace's noise xi. With temperature T = 0 that is projected gradient ascent, bit for bit. In one
dimension it is a random walk on the multiples of eta, up with probability 1 - exp(-|U'| / c) / 2
where U' > 0, c = (2 eta T)^(1/2): its law after n steps is a row of the n-th power of a matrix. For
small |U'| / c it has drift eta U' / c and variance eta^2 a step. So for eta -> 0 its stationary law
tends to l^(1/tau) with tau = eta c / 2 = (eta^3 T / 2)^(1/2), not to the l^(1/T) of Langevin steps.

*Duality where it is exact.* For a linear model with the logistic loss, l(m) = log(1 + exp(-m)), the
inner maximum is l(y x'w - eps |w|_1) and the problem is convex. Then P(rho) = max_nu g(nu) with
g(nu) = min_w robust + nu (clean - rho). The best nu is the price of the limit: P'(rho) = -nu, every
tangent is below P, and nu = 0 where the limit is slack. Below the smallest clean loss there is no
such w, and nu grows for ever.
"""

import warnings
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from _claims import Finding, main
from scipy.optimize import brentq

from convexrobust.deep.methods import Dale
from convexrobust.deep.networks import MLP
from convexrobust.perturbations import LpBall

EPSILON = 0.3  # of the linear problem, in standard deviations


def study(quick):
    """Return findings and curves."""
    problem = LinearProblem.draw(*((60, 4) if quick else (200, 10)))
    saddle, drawn = duality(problem)
    price, trade = trade_off(problem, quick)
    densities, worst = worst_density()
    samples = [ascent_at_zero(quick), law_of_samples(quick), stationary_laws(quick)]
    findings = [*densities, *samples, *saddle, price, out_of_reach(problem)]
    return findings, {"density": worst, "ascent": drawn, "trade": trade}


def solved(problem, **options):
    """Return the optimal value by Clarabel, also where it stops short of its tolerance."""
    with warnings.catch_warnings():
        # The verdicts have tolerances of their own, and wider ones.
        warnings.filterwarnings("ignore", "Solution may be inaccurate")
        return problem.solve(solver=cp.CLARABEL, **options)


# ------------------------------------------------------------------ the worst density


def bimodal_model():
    """Return a tanh network f of one feature whose loss has two peaks around x = 0."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    edges, sharpness = torch.tensor([-0.7, -0.3, 0.4, 0.6]), 5.0
    with torch.no_grad():
        model[0].weight.fill_(sharpness)
        model[0].bias.copy_(-sharpness * edges)
        model[2].weight.copy_(torch.tensor([[-1.5, 1.5, -1.8, 1.8]]))
        model[2].bias.fill_(2.0)
    return model.double()


def loss_and_slope(deltas):
    """Return the logistic loss of the network, label +1, and U' at perturbations (n,)."""
    points = torch.as_tensor(deltas)[:, None].requires_grad_()
    loss = torch.nn.functional.softplus(-bimodal_model()(points)[:, 0])
    slope = torch.autograd.grad(loss.log().sum(), points)[0][:, 0]
    return loss.detach().numpy(), slope.numpy()


def closed_form(loss, gamma, spacing):
    """Return [loss - mu]_+ / gamma with the mu for which it integrates to 1."""

    def excess(mu):
        return spacing * np.sum(np.maximum(loss - mu, 0.0)) / gamma - 1.0

    mu = brentq(excess, loss.min() - gamma, loss.max(), xtol=1e-15)
    return np.maximum(loss - mu, 0.0) / gamma


def by_quadratic_program(loss, gamma, spacing):
    """Return the density with the largest E[loss] - gamma / 2 int lambda^2 on the grid."""
    mass = cp.Variable(len(loss), nonneg=True)
    value = loss @ mass - gamma / (2.0 * spacing) * cp.sum_squares(mass)
    problem = cp.Problem(cp.Maximize(value), [cp.sum(mass) == 1.0])
    solved(problem, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return mass.value / spacing


def worst_density():
    """Compare the closed form with a quadratic program, and follow it to gamma = 0."""
    coarse, errors = loss_and_slope(np.linspace(-1.0, 1.0, 201))[0], []
    for gamma in (1.0, 0.1, 0.01):
        best = by_quadratic_program(coarse, gamma, 0.01)
        errors.append(np.abs(closed_form(coarse, gamma, 0.01) - best).max() / best.max())
    agreement = Finding(
        "The density [l - mu]_+ / gamma maximises E[l] - (gamma / 2) int lambda^2 (Robey et al. "
        "2021).",
        "tanh network of one feature, 201 grid points, gamma 1, 0.1, 0.01; against Clarabel, "
        "tolerance 1e-6 of the largest density",
        f"largest relative difference {max(errors):.1e}",
        max(errors) < 1e-6,
    )
    deltas, spacing = np.linspace(-1.0, 1.0, 20001), 1e-4
    loss, gammas = loss_and_slope(deltas)[0], np.logspace(1, -5, 13)
    densities = np.array([closed_form(loss, gamma, spacing) for gamma in gammas])
    shown = deltas[::100], loss[::100], gammas[[2, 4, 6]], densities[[2, 4, 6], ::100]
    curves = dict(zip(("deltas", "loss", "gammas", "densities"), shown, strict=True))
    return [agreement, concentration(loss, densities, gammas, spacing)], curves


def concentration(loss, densities, gammas, spacing):
    """Judge how the densities concentrate."""
    gaps = loss.max() - spacing * densities @ loss
    supports = np.mean(densities > 0.0, axis=1)
    rate = np.log(gaps[-1] / gaps[-3]) / np.log(gammas[-1] / gammas[-3])
    rows = list(zip(gammas, gaps, supports, strict=True))[::2]
    shown = ", ".join(f"{gamma:g}: {gap:.2g} ({share:.1%})" for gamma, gap, share in rows)
    monotone = np.all(np.diff(gaps) < 0.0) and np.all(np.diff(supports) <= 0.0)
    return Finding(
        "As gamma -> 0, E[l] rises to max l and the support shrinks, monotonically (Robey et al. "
        "2021), the gap like gamma^(2/3).",
        "the same loss, 20001 grid points; rate over the last decade of gamma, tolerance 0.02",
        f"gamma: gap (support) {shown}; rate {rate:.3f}",
        bool(monotone) and abs(rate - 2.0 / 3.0) < 0.02,
    )


# ------------------------------------------------------------------ the sampler


def ascent_at_zero(quick):
    """Compare `Dale` without temperature with projected gradient ascent."""
    torch.manual_seed(0)
    model, n = MLP(20, [50, 50], 3).double(), 100 if quick else 500
    x, y = torch.randn(n, 20, dtype=torch.float64), torch.arange(n) % 3
    points = x
    for _ in range(10):
        leaf = points.clone().requires_grad_()
        torch.nn.functional.cross_entropy(model(leaf), y, reduction="sum").backward()
        points = (points + 0.25 * EPSILON * leaf.grad.sign()).clip(x - EPSILON, x + EPSILON)
    method = Dale(LpBall(np.inf, EPSILON), temperature=0.0, n_steps=10, step=0.25)
    found = method.sample(model, x, y)
    return Finding(
        "With temperature 0 the samples are the points of projected gradient ascent (Robey et al. "
        "2021).",
        f"ReLU network 20-50-50-3, {n} points, 10 steps of 0.25 radii; bit for bit",
        f"largest difference {(found - points).abs().max().item():g}, largest move "
        f"{(points - x).abs().max().item():g}",
        torch.equal(found, points) and not torch.equal(points, x),
    )


def walk(eta, temperature):
    """Return the matrix of Dale's walk on the multiples of eta in [-1, 1], and the loss there."""
    n = round(2.0 / eta) + 1
    loss, slope = loss_and_slope(np.linspace(-1.0, 1.0, n))
    tail = 0.5 * np.exp(-np.abs(slope) / np.sqrt(2.0 * eta * temperature))
    up = np.where(slope > 0.0, 1.0 - tail, tail)
    matrix = np.diag(up[:-1], 1) + np.diag(1.0 - up[1:], -1)
    matrix[-1, -1], matrix[0, 0] = up[-1], 1.0 - up[0]  # a step out of the ball ends at its end
    return matrix, loss


def law_of_samples(quick):
    """Compare a histogram of samples with the law of the walk."""
    n, n_steps, eta, temperature = (1000, 201, 0.1, 180.0) if quick else (6000, 1001, 0.05, 1440.0)
    ball = LpBall(np.inf, 1.0)
    method = Dale(ball, temperature=temperature, n_steps=n_steps, step=eta)
    x, y = torch.zeros(n, 1, dtype=torch.float64), torch.ones(n)
    steps = (method.sample(bimodal_model(), x, y)[:, 0].numpy() + 1.0) / eta
    matrix, _ = walk(eta, temperature)
    law = np.linalg.matrix_power(matrix, n_steps)[len(matrix) // 2]
    found = np.bincount(np.rint(steps).astype(int), minlength=len(law)) / n
    chance = 0.5 * np.sum(np.sqrt(law / n)) + np.sqrt(np.log(1e4) / (2.0 * n))
    return Finding(
        "With T > 0 the samples in one dimension have the law of the walk above.",
        f"{n} samples, {n_steps} steps of {eta:g} radii, T = {temperature:g}; total variation at "
        f"most {chance:.3f}, which chance exceeds less than once in 10^4 times",
        f"total variation {total_variation(found, law):.4f}",
        total_variation(found, law) < chance,
    )


def stationary_laws(quick):
    """Follow the stationary law of the walk to eta = 0 with tau fixed."""
    tau, etas, distances = 0.3, [0.1, 0.05, 0.025] + ([] if quick else [0.0125, 0.00625]), []
    for eta in etas:
        temperature = 2.0 * tau**2 / eta**3
        matrix, loss = walk(eta, temperature)
        ratios = np.diag(matrix, 1) / np.diag(matrix, -1)  # detailed balance
        law = normalised(np.append(0.0, np.cumsum(np.log(ratios))))
        others = (normalised(np.log(loss) / t) for t in (tau, temperature))
        distances.append([total_variation(law, other) for other in others])
    near, far = np.array(distances).T
    return Finding(
        "For small steps the samples have the law l^(1/tau), tau = (eta^3 T / 2)^(1/2), and not "
        "the l^(1/T) of Langevin steps on log l without the sign.",
        f"stationary law of the walk, tau = {tau:g}, eta halved from {etas[0]:g} to {etas[-1]:g}; "
        "each half to bring it nearer by 0.6, and to keep it 0.4 away from l^(1/T)",
        "total variation " + ", ".join(f"{a:.3f} ({b:.3f})" for a, b in distances),
        bool(np.all(near[1:] < 0.6 * near[:-1])) and far.min() > 0.4,
        remark="The sign forgets the length of gradient and noise: the walk is colder than T.",
    )


def normalised(log_law):
    """Return the law of a logarithm that lacks its constant."""
    law = np.exp(log_law - log_law.max())
    return law / law.sum()


def total_variation(law, other):
    """Return the distance of two laws in total variation."""
    return 0.5 * np.abs(law - other).sum()


# ------------------------------------------------------------------ the convex problem


@dataclass(frozen=True)
class LinearProblem:
    """Logistic regression, with both losses as expressions of cvxpy in the weights."""

    X: np.ndarray
    y: np.ndarray
    robust: cp.Expression
    clean: cp.Expression
    linear: cp.Constraint

    @classmethod
    def draw(cls, n, d):
        """Return the problem of n noisy labels of a linear function of d features."""
        rng = np.random.default_rng(0)
        X, truth = rng.normal(size=(n, d)), rng.choice([-1.0, 1.0], d) * rng.uniform(1.0, 2.0, d)
        y = np.where(X @ truth + rng.normal(size=n) > 0.0, 1.0, -1.0)
        w, margins = cp.Variable(d), cp.Variable(n)
        robust = cp.sum(cp.logistic(EPSILON * cp.norm(w, 1) - margins)) / n
        clean = cp.sum(cp.logistic(-margins)) / n
        return cls(X, y, robust, clean, margins == cp.multiply(y, X @ w))

    def clean_range(self):
        """Return the smallest clean loss, and the clean loss of the most robust weights."""
        ends = []
        for loss in (self.clean, self.robust):
            solved(cp.Problem(cp.Minimize(loss), [self.linear]))
            ends.append(self.clean.value.item())
        return ends

    def at(self, rho):
        """Return P(rho) and the multiplier of the limit; infinity and nothing if infeasible."""
        limit = self.clean <= rho
        value = solved(cp.Problem(cp.Minimize(self.robust), [self.linear, limit]))
        return value, None if limit.dual_value is None else float(limit.dual_value)

    def dual_ascent(self, rho, n_steps):
        """Return multiplier, g and clean loss at each step of dual ascent with exact minima."""
        nu = cp.Parameter(nonneg=True, value=1.0)
        lagrangian = cp.Problem(cp.Minimize(self.robust + nu * self.clean), [self.linear])
        steps = []
        for _ in range(n_steps):
            value = solved(lagrangian) - nu.value * rho
            steps.append((nu.value, value, self.clean.value.item()))
            nu.value = max(nu.value + 30.0 * (self.clean.value.item() - rho), 0.0)
        return np.array(steps, dtype=float).T

    def trained(self, n_steps, learning_rate, **options):
        """Return the figures of the steps of `Dale`, all rows at once, and its last multiplier."""
        model = torch.nn.Linear(self.X.shape[1], 1, bias=False).double()
        torch.nn.init.zeros_(model.weight)
        # For a linear model one full step is the exact inner maximum.
        method = Dale(LpBall(np.inf, EPSILON), temperature=0.0, n_steps=1, step=1.0, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
        data = torch.as_tensor(self.X), torch.as_tensor(self.y), torch.arange(len(self.y))
        return [method.step(model, optimizer, *data) for _ in range(n_steps)], method.multiplier


def duality(problem):
    """Compare the constrained problem, its dual, and `Dale` at one limit."""
    lowest, most_robust = problem.clean_range()
    rho = 0.75 * lowest + 0.25 * most_robust
    value, price = problem.at(rho)
    multipliers, values, cleans = problem.dual_ascent(rho, 30)
    gap, slack = value - values.max(), multipliers[-1] * (cleans[-1] - rho)
    n_steps = 400
    figures, nu = problem.trained(n_steps, 1.0, margin=rho, dual_step=2.0)
    found = [nu, figures[-1]["robust_loss"], figures[-1]["clean_loss"]]
    errors = np.abs(np.subtract(found, [price, value, rho]))
    setting = (
        f"linear model, X {problem.X.shape[0]} x {problem.X.shape[1]}, l-inf radius {EPSILON}, "
        f"rho = {rho:.4f} between {lowest:.4f} (smallest) and {most_robust:.4f} (most robust)"
    )
    findings = [
        Finding(
            "No duality gap: max g(nu) = P(rho), with complementary slackness nu (clean - rho) = 0 "
            "(Robey et al. 2021 bound the gap of richer models).",
            f"{setting}; {len(values)} steps of dual ascent; tolerance 1e-6, multiplier 1e-4",
            f"P = {value:.7f}, gap {gap:.1e}, slackness {slack:.1e}, multiplier "
            f"{multipliers[-1]:.5f}, of the solver {price:.5f}",
            -1e-7 < gap < 1e-6 and abs(slack) < 1e-6 and abs(multipliers[-1] - price) < 1e-4,
        ),
        Finding(
            "Dale reaches this saddle point with one primal and one dual step at a time.",
            f"{setting}; {n_steps} steps; tolerance 1e-4",
            "errors: multiplier {:.1e}, robust loss {:.1e}, clean loss {:.1e}".format(*errors),
            errors.max() < 1e-4,
            remark="No weight is 0 at the solution. Where one is, the l1 norm has a kink, around "
            "which steps of one length hover.",
        ),
    ]
    path = [step["multiplier"] for step in figures[:100]]
    return findings, {"exact": multipliers, "dale": path, "price": price}


def trade_off(problem, quick):
    """Follow P(rho) and its slope."""
    lowest, most_robust = problem.clean_range()
    shares = [0.1, 0.5, 1.2] if quick else [0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.2]
    width = most_robust - lowest
    rhos, step = lowest + width * np.array(shares), 1e-3 * width
    values, prices = np.array([problem.at(rho) for rho in rhos]).T
    before, after = ([problem.at(rho + move)[0] for rho in rhos] for move in (-step, step))
    slopes = np.subtract(after, before) / (2.0 * step)
    error = np.max(np.abs(slopes + prices) / np.maximum(prices, 1.0))
    above = np.max(values[:, None] - prices[:, None] * (rhos - rhos[:, None]) - values)
    rows = zip(rhos, values, prices, strict=True)
    shown = ", ".join(f"{rho:.3f}: {value:.4f} ({price:.3f})" for rho, value, price in rows)
    finding = Finding(
        "The multiplier is the price of the limit: P'(rho) = -nu; P is convex, its tangents are "
        "below it; a slack limit is free.",
        f"{len(rhos)} limits, the last one slack; central differences, tolerance 1e-3 of "
        "max(nu, 1); tangents and free price 1e-6",
        f"error of the slope {error:.1e}, tangents at most {above:.1e} above P, price of the slack "
        f"limit {prices[-1]:.1e}; rho: P (nu) {shown}",
        error < 1e-3 and above < 1e-6 and prices[-1] < 1e-6,
    )
    return finding, {"rhos": rhos, "values": values, "prices": prices, "lowest": lowest}


def out_of_reach(problem):
    """Ask for less than the smallest clean loss."""
    lowest, _ = problem.clean_range()
    rho, dual_step, n_steps = 0.5 * lowest, 4.0, 400
    least, (value, _) = dual_step * (lowest - rho), problem.at(rho)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # the warning is what is looked for
        figures, nu = problem.trained(n_steps, 0.01, margin=rho, dual_step=dual_step)
    said = sum("multiplier has passed 100" in str(warning.message) for warning in caught)
    rise = np.diff([step["multiplier"] for step in figures] + [nu]).min()
    return Finding(
        "Below the smallest clean loss the problem is infeasible, the multiplier rises at every "
        "step by at least dual step times what is missing, and Dale warns once.",
        f"rho half the smallest clean loss {lowest:.4f}, {n_steps} steps, dual step {dual_step:g}",
        f"optimal value of the solver {value}, multiplier at the end {nu:.0f}, smallest rise "
        f"{rise:.3f} of at least {least:.3f}, warnings {said}",
        value == np.inf and rise >= least * (1.0 - 1e-6) and nu > 100.0 and said == 1,
    )


# ------------------------------------------------------------------ the picture


def draw(figure, curves):
    """Draw densities, the trade-off with its tangents, and the multipliers."""
    left, middle, right = figure.subplots(1, 3)
    draw_densities(left, **curves["density"])
    draw_trade_off(middle, **curves["trade"])
    draw_ascent(right, **curves["ascent"])


def draw_densities(axes, deltas, loss, gammas, densities):
    """Draw the loss and the worst densities."""
    axes.plot(deltas, loss, "k--", lw=1, label="loss (nats)")
    for gamma, density in zip(gammas, densities, strict=True):
        axes.plot(deltas, density, label=f"density, gamma = {gamma:g}")
    axes.set(xlabel="perturbation delta", ylabel="loss, density", title="The worst density")
    axes.legend(fontsize=8)


def draw_trade_off(axes, rhos, values, prices, lowest):
    """Draw robust against clean loss, with pieces of tangents of slope -nu."""
    axes.plot(rhos, values, "o-", ms=4, label="P(rho)")
    reach = 0.12 * (rhos[-1] - rhos[0])
    for rho, value, price in zip(rhos, values, prices, strict=True):
        ends = np.array([-reach, reach]) / np.hypot(1.0, price)
        axes.plot(rho + ends, value - price * ends, color="C1", lw=2, alpha=0.7)
    axes.plot([], [], color="C1", lw=2, label="slope -nu")
    axes.axvline(lowest, color="grey", ls=":", label="smallest clean loss")
    axes.set(xlabel="limit rho on the clean loss (nats)", ylabel="robust loss (nats)")
    axes.set_title("What clean accuracy costs")
    axes.legend(fontsize=8)


def draw_ascent(axes, exact, dale, price):
    """Draw the multipliers over the steps."""
    axes.axhline(price, color="black", lw=1, label="multiplier of the solver")
    axes.plot(exact, "o-", ms=3, label="dual ascent, exact minima")
    axes.plot(dale, label="Dale")
    axes.set(xlabel="step", ylabel="multiplier nu", title="Dual ascent", xlim=(-1, 60))
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main(study, draw)
