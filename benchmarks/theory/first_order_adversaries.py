r"""First-order adversaries of two-layer networks.

    python benchmarks/theory/first_order_adversaries.py

An adversary that climbs the loss by gradient steps, delta <- P(delta + eta grad L(x + delta)) with
the projection P on ||delta||_2 <= epsilon, could end anywhere: the loss is not concave. Deng, He,
Huang and Su (2020, "Towards understanding the dynamics of the first-order adversaries") prove for
f(x) = a'sigma(W x) with a smooth sigma at random weights, and the quadratic loss
L = (f(x) - y)^2 / 2, that such steps reach a local maximum soon. At a fixed ratio epsilon / ||x||
they find that smaller inputs make it easier. Checked here, with W (m, d) of entries N(0, 1/d), a
(m) of entries N(0, 1/m), targets y = +1 or -1, epsilon = ||x|| / 2, many starts in each ball and
steps eta = 1 / (largest curvature of L met in the ball):

1. the points reached pass the second-order test of a local maximum: on the sphere
   grad L = mu delta with mu >= 0, and the Hessian less mu I has no positive curvature along it.
2. with H at least the norms of the Hessian of L in the ball and g at most those of its gradient,
   H epsilon < g leaves one maximum only: it is a fixed point of delta -> epsilon grad L / |grad L|,
   which contracts. H epsilon / g falls with the scale of the inputs.
3. hence fewer steps, and fewer distinct maxima, for smaller inputs.
4. ReLU has kinks, at which the maxima of the loss like to be: residuals stay where they are.
5. what becomes of it in training on digits, with inputs and epsilon both multiplied by s.

The residual is the length of the next step, relative to the first before its projection.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from _claims import Finding, main
from sklearn.datasets import load_digits

from convexrobust.backends import numpy as numpy_backend
from convexrobust.deep import attacks
from convexrobust.deep.methods import Attacked
from convexrobust.deep.networks import two_layer
from convexrobust.deep.training import train
from convexrobust.dynamics import is_local_maximum, projected_gradient_trace
from convexrobust.perturbations import LpBall

D, WIDTH, RATIO, TOLERANCE, SHARPNESS = 20, 100, 0.5, 1e-6, 4.0
LARGEST_BEND = 4.0 / np.sqrt(27.0)  # of the second derivative of tanh


def tanh(t):
    """Return tanh and its first two derivatives."""
    s = np.tanh(t)
    return s, 1.0 - s**2, -2.0 * s * (1.0 - s**2)


def softplus(t):
    """Return log(1 + exp(b t)) / b for the sharpness b, and its first two derivatives."""
    p = 0.5 + 0.5 * np.tanh(SHARPNESS * t / 2.0)
    return np.logaddexp(0.0, SHARPNESS * t) / SHARPNESS, p, SHARPNESS * p * (1.0 - p)


def relu(t):
    """Return the ReLU and its derivatives away from the kink."""
    return np.maximum(t, 0.0), (t > 0.0) * 1.0, 0.0 * t


class RandomNetwork:
    """f(x) = a'sigma(W x) at random weights, with the quadratic loss at a target."""

    def __init__(self, activation, rng, target=None):
        self.sigma = activation
        self.W = rng.normal(size=(WIDTH, D)) / np.sqrt(D)
        self.a = rng.normal(size=WIDTH) / np.sqrt(WIDTH)
        self.y = rng.choice([-1.0, 1.0]) if target is None else target
        self.x = rng.normal(size=D)
        self.x /= np.linalg.norm(self.x)

    def loss_and_gradient(self, X):
        s, slope, _ = self.sigma(X @ self.W.T)
        r = s @ self.a - self.y
        return r**2 / 2.0, r[:, None] * ((slope * self.a) @ self.W)

    def hessian(self, x):
        s, slope, bend = self.sigma(self.W @ x)
        g = (slope * self.a) @ self.W
        return np.outer(g, g) + (s @ self.a - self.y) * (self.W.T * (bend * self.a)) @ self.W

    def surely_has_one_maximum(self, scale):
        """Return whether bounds, for tanh, prove H epsilon < g in the ball."""
        epsilon, x = RATIO * scale, scale * self.x
        s, slope, _ = self.sigma(self.W @ x)
        length, error = np.linalg.norm((slope * self.a) @ self.W), abs(s @ self.a - self.y)
        bend = LARGEST_BEND * np.linalg.norm((self.W.T * np.abs(self.a)) @ self.W, 2)
        longest = length + epsilon * bend
        H = longest**2 + (error + epsilon * longest) * bend
        g = max(length - epsilon * bend, 0.0) * max(error - epsilon * longest, 0.0)
        return bool(H * epsilon < g)


@dataclass(frozen=True)
class Ascent:
    """The ascents of one network at one scale.

    n_iter: steps of each start, inf if it did not converge; residuals: (r, starts); n_maxima:
    distinct ones; passed, unbeaten: how many of them are maxima by the test, by sampling;
    bent: H epsilon / g at the starts, with the median of g; aligned: mean cosine of the gradients
    with their mean; sure: whether one maximum is proven.
    """

    n_iter: np.ndarray
    residuals: np.ndarray
    n_maxima: int
    passed: int
    unbeaten: int
    bent: float
    aligned: float
    sure: bool


def ascend(net, scale, n_starts, n_steps, rng):
    """Climb from random starts in the ball around an input of length ``scale``."""
    ball, x = LpBall(2, RATIO * scale), scale * net.x
    X = np.tile(x, (n_starts, 1))
    starts = X + ball.sample(X, rng)
    curvature = max(np.linalg.norm(net.hessian(point), 2) for point in starts)
    gradients = net.loss_and_gradient(starts)[1]
    lengths = np.linalg.norm(gradients, axis=1)
    trace = projected_gradient_trace(
        net.loss_and_gradient,
        X,
        ball,
        step=1.0 / curvature,
        n_steps=n_steps,
        tol=TOLERANCE,
        start=starts,
    )
    maxima = distinct(trace.points[trace.n_iter >= 0], 0.05 * ball.radius)
    mean = gradients.mean(axis=0)
    return Ascent(
        np.where(trace.n_iter < 0, np.inf, trace.n_iter),
        trace.residuals,
        len(maxima),
        sum(passes(net, point, x, ball.radius) for point in maxima),
        sum(unbeaten(net, point, x, ball, rng) for point in maxima),
        curvature * ball.radius / np.median(lengths),
        np.mean(gradients @ mean / lengths) / np.linalg.norm(mean),
        net.sigma is tanh and net.surely_has_one_maximum(scale),
    )


def distinct(points, apart):
    """Return points no two of which are closer than ``apart``, one for each cluster."""
    kept = []
    for point in points:
        if all(np.linalg.norm(point - other) > apart for other in kept):
            kept.append(point)
    return kept


def passes(net, point, x, epsilon):
    """Return whether a point passes the test of second order."""
    gradient = net.loss_and_gradient(point[None])[1][0]
    return is_local_maximum(gradient, net.hessian(point), point - x, epsilon)


def unbeaten(net, point, x, ball, rng):
    """Return whether no random point of the ball nearby has a larger loss."""
    near = point - x + 0.02 * ball.radius * rng.normal(size=(500, D)) / np.sqrt(D)
    inside = LpBall(2, ball.radius * (1.0 - 1e-12))
    losses, _ = net.loss_and_gradient(x + inside.project(numpy_backend, near))
    best = net.loss_and_gradient(point[None])[0][0]
    return bool(losses.max() <= best + 1e-9 * abs(best))


# ------------------------------------------------------------------ the claims


def maxima_finding(runs, setting):
    """Return the finding that what smooth networks converge to are local maxima."""
    smooth = [run for (name, _), group in runs.items() if name != "relu" for run in group]
    found, passed, sampled = (
        sum(getattr(run, count) for run in smooth) for count in ("n_maxima", "passed", "unbeaten")
    )
    share = np.mean(np.concatenate([np.isfinite(run.n_iter) for run in smooth]))
    return Finding(
        "Where the ascent converges on a smooth network, it is at a local maximum.",
        f"tanh and softplus, {setting}; test of second order with slack 1e-4, and 500 random "
        "points within 2 % of the radius, none of which may have a larger loss",
        f"{share:.0%} of the ascents converged, to {found} distinct points; {passed} pass the "
        f"test, {sampled} are not beaten",
        passed == sampled == found > 0,
        remark="The theorem is about most starts and wide networks; here not one exception is "
        "allowed.",
    )


def uniqueness_finding(runs):
    """Return the finding that H epsilon < g leaves one maximum."""
    sure = [
        (run.n_maxima, np.isfinite(run.n_iter).all())
        for group in runs.values()
        for run in group
        if run.sure
    ]
    return Finding(
        "Where H epsilon < g is proven for the whole ball, all starts reach the one maximum.",
        "tanh, all scales; H and g bounded through |W' diag |a| W|; points closer than 5 % of the "
        "radius count as one",
        f"proven for {len(sure)} pairs of network and scale; maxima found in them "
        f"{sorted({n for n, _ in sure})}",
        bool(sure) and all(n == 1 and converged for n, converged in sure),
    )


def scale_findings(runs, scales, setting):
    """Return the findings on the scale of the inputs."""
    findings = []
    for name in ("tanh", "softplus"):
        steps = [median_steps(runs[name, scale]) for scale in scales]
        maxima = [mean_of(runs[name, scale], "n_maxima") for scale in scales]
        bent = [mean_of(runs[name, scale], "bent") for scale in scales]
        aligned = [mean_of(runs[name, scale], "aligned") for scale in scales]
        findings += [
            trend(f"{name}: smaller inputs take fewer steps.", setting, scales, steps, "steps"),
            trend(f"{name}: smaller inputs have fewer maxima.", setting, scales, maxima, "maxima"),
            trend(
                f"{name}: smaller inputs see a less bent loss, H epsilon / g.",
                f"{setting}; cosines of gradients at starts with their mean: " + listed(aligned),
                scales,
                bent,
                "ratios",
            ),
        ]
    still = [median_steps(runs["tanh at y = 0", scale]) for scale in scales]
    small = [count for count, scale in zip(still, scales, strict=True) if scale <= 1.0]
    findings.append(
        Finding(
            "That needs a target away from the outputs: with y = 0 steps do not fall below ||x|| "
            "= 1.",
            f"tanh, {setting}; medians within 10 % of each other for ||x|| up to 1",
            f"steps {listed(still)} for ||x|| = {listed(scales)}",
            bool(max(small) <= 1.1 * min(small)),
            proven=False,
            remark="f is nearly linear for small inputs, so L is (g'x)^2 / 2, which looks the "
            "same at every scale. With y = 1 the gradient does not vanish and H epsilon / g does.",
        )
    )
    return findings


def trend(claim, setting, scales, values, what):
    """Return the finding that values do not fall and end higher as the scale grows."""
    holds = bool(np.all(np.diff(values) >= 0.0) and values[-1] > values[0])
    rises = int(np.sum(np.diff(values) < 0.0))
    return Finding(
        claim,
        f"{setting}; no fall from one scale to the next, and more at the last than at the first",
        f"{what} {listed(values)} for ||x|| = {listed(scales)}",
        holds,
        proven=False,
        remark=""
        if holds
        else f"{rises} of {len(values) - 1} moves to larger inputs go the other "
        f"way, from the first to the last the factor is {values[-1] / values[0]:.2g}.",
    )


def kink_finding(runs, scales, setting):
    """Return the finding that ReLU networks do not get to small residuals."""
    smooth, kinked = (
        np.median([run.residuals[-1] for s in scales for run in runs[name, s]])
        for name in ("tanh", "relu")
    )
    shares = [
        np.mean([np.isfinite(run.n_iter) for s in scales for run in runs[name, s]])
        for name in ("tanh", "relu")
    ]
    return Finding(
        "Constant steps settle on smooth networks, and do not on ReLU networks.",
        f"{setting}; settled is a residual of {TOLERANCE:g}; at least 90 % against at most 10 %",
        f"settled {shares[0]:.0%} of tanh and {shares[1]:.0%} of ReLU ascents; median last "
        f"residuals {smooth:.1e} and {kinked:.1e}",
        bool(shares[0] >= 0.9 and shares[1] <= 0.1),
        proven=False,
        remark="Maxima of a piecewise quadratic loss sit on kinks, where the gradient jumps over 0 "
        "and the steps go to and fro. Taking the best point met, as attacks do, does not mind.",
    )


def training_finding(table, scales, rates):
    """Return the finding on adversarial training at scaled inputs."""
    table = np.mean(table, axis=0)
    best = table.max(axis=1)
    holds = bool(np.all(np.diff(table[:, 1]) <= 0.01))
    rows = [f"rate {rate:g}: {listed(column)}" for rate, column in zip(rates, table.T, strict=True)]
    return Finding(
        "In training: with nothing else changed, smaller inputs give larger robust accuracy.",
        f"digits, 64 - 100 - 10 ReLU, l2 radius 0.6 s, PGD training at equal epochs, SGD; rate "
        f"{rates[1]:g} decides, one point of slack",
        f"robust test accuracy for s = {listed(scales)}: "
        + "; ".join(rows)
        + f"; best rate each: {listed(best)}",
        holds,
        proven=False,
        remark="Scaling inputs by s is a change of the first layer's learning rate, by s^2 in what "
        "a step does to the outputs: too small is under-trained after equal epochs, too large is "
        "unstable. With the best rate for each scale little is left. The theorem is about the "
        "attack at random weights, not about the end of training.",
    )


def median_steps(group):
    """Return the median of the steps; inf if fewer than half of the ascents converged."""
    return float(np.median(np.concatenate([run.n_iter for run in group])))


def mean_of(group, what):
    return float(np.mean([getattr(run, what) for run in group]))


def listed(values):
    return ", ".join(f"{value:.3g}" for value in values)


# ------------------------------------------------------------------ training


def robust_accuracies(scales, rates, *, n_rows, n_epochs, seed):
    """Return robust test accuracies (scales, rates) after PGD training of scaled digits."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(X))
    train_rows, test_rows = order[:n_rows], order[-700:]
    table = np.empty((len(scales), len(rates)))
    for (i, s), (j, rate) in product(enumerate(scales), enumerate(rates)):
        torch.manual_seed(seed)
        model, ball, Z = two_layer(64, 100, 10), LpBall(2, 0.6 * s), s * X / 16.0
        method, sgd = Attacked.pgd(ball, n_steps=5), partial(torch.optim.SGD, momentum=0.9)
        options = {"n_epochs": n_epochs, "batch_size": 64, "learning_rate": rate, "optimizer": sgd}
        train(model, method, Z[train_rows], y[train_rows], random_state=seed, **options)
        x = torch.as_tensor(Z[test_rows], dtype=torch.float32)
        labels = torch.as_tensor(y[test_rows])
        attacked = attacks.pgd(model, x, labels, ball, n_steps=20)
        table[i, j] = (model(attacked).argmax(1) == labels).float().mean()
    return table


# ------------------------------------------------------------------ the study and its picture


def study(quick):
    scales = (0.25, 1.0, 8.0) if quick else (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    n_nets, n_starts, n_steps = (3, 8, 300) if quick else (12, 20, 1000)
    setting = f"{n_nets} networks of {WIDTH} neurons, {n_starts} starts, at most {n_steps} steps"
    kinds = {"tanh": (tanh, None), "softplus": (softplus, None), "relu": (relu, None)}
    kinds["tanh at y = 0"] = (tanh, 0.0)
    runs = {}
    for (name, (sigma, target)), scale in product(kinds.items(), scales):
        rng = np.random.default_rng(0)  # the same networks at every scale
        nets = [RandomNetwork(sigma, rng, target) for _ in range(n_nets)]
        runs[name, scale] = [ascend(net, scale, n_starts, n_steps, rng) for net in nets]
    training_scales = (0.5, 1.0) if quick else (0.125, 0.5, 1.0, 2.0, 8.0)
    rates, seeds = (0.02, 0.1, 0.5), (range(1) if quick else range(2))
    sizes = {"n_rows": 200, "n_epochs": 2} if quick else {"n_rows": 1000, "n_epochs": 10}
    tables = [robust_accuracies(training_scales, rates, seed=seed, **sizes) for seed in seeds]
    findings = [
        maxima_finding(runs, setting),
        uniqueness_finding(runs),
        *scale_findings(runs, scales, setting),
        kink_finding(runs, scales, setting),
        training_finding(tables, training_scales, rates),
    ]
    return findings, curves_of(runs, scales)


def curves_of(runs, scales):
    names = ("tanh", "softplus", "tanh at y = 0")
    curves = {"scales": list(scales), "steps": {}, "maxima": {}, "residuals": {}}
    for name in names:
        steps = [median_steps(runs[name, scale]) for scale in scales]
        curves["steps"][name] = [count if np.isfinite(count) else None for count in steps]
        curves["maxima"][name] = [mean_of(runs[name, scale], "n_maxima") for scale in scales]
    for name, scale in product(("tanh", "softplus", "relu"), (1.0, 8.0)):
        residuals = [np.median(run.residuals[:150], axis=1) for run in runs[name, scale]]
        longest = max(map(len, residuals))
        # An ascent ends when all starts have converged: its last residual stands for the rest.
        full = [np.pad(r, (0, longest - len(r)), mode="edge") for r in residuals]
        curves["residuals"][f"{name}, ||x|| = {scale:g}"] = [
            float(f"{r:.3g}") for r in np.median(full, axis=0)
        ]
    return curves


def draw(figure, curves):
    figure.set_size_inches(12, 4)
    steps, maxima, residuals = figure.subplots(1, 3)
    for ax, what in ((steps, "steps"), (maxima, "maxima")):
        for name, values in curves[what].items():
            ax.plot(curves["scales"], np.array(values, dtype=float), "o-", ms=4, label=name)
        ax.set_xscale("log", base=2)
        ax.set(xlabel="length of the input ||x||, radius half of it", ylim=(0.0, None))
        ax.legend()
    steps.set(ylabel="median steps to convergence")
    maxima.set(ylabel="distinct maxima per network")
    colours = {"tanh": "C0", "softplus": "C1", "relu": "C3"}
    for k, (name, values) in enumerate(curves["residuals"].items()):
        residuals.semilogy(values, "-:"[k % 2], color=colours[name.split(",")[0]], label=name)
    residuals.set(xlabel="step of the ascent", ylabel="median residual, relative to the first step")
    residuals.legend(fontsize="small")


if __name__ == "__main__":
    main(study, draw)
