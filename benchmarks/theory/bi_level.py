r"""Adversarial training as a bi-level problem.

Run ``python benchmarks/theory/bi_level.py`` (``--quick`` for small sizes).

Zhang, Zhang, Khanduri, Hong, Chang and Liu (2022) write adversarial training with weights W as

    min_W  mean_k l(W; x_k + delta_k*(W))   s.t.
    delta*(W) = argmin over C of  -<g, delta - z> + (lambda / 2) |delta - z|^2,

where C is the l-inf ball, cut by the bounds of the features, z a random start in it, and g the
gradient of l in delta at z. The lower level has the closed form delta* = P_C(z + g / lambda), with
the projection P_C on C. By the chain rule the gradient of the upper level is the direct one,
grad_W l(W; delta*), plus the implicit gradient

    (d delta* / dW)' grad_delta l(W; delta*),   d delta* / dW = (1 / lambda) H  d grad_delta l / dW,

where H is diagonal: 1 for coordinates inside of C and 0 for those at its boundary.

With sign(g) for g the lower level is the attack of Fast-AT (Wong, Rice and Kolter 2020), one signed
step from a random start. A sign has the derivative 0, and so has delta*: Fast-AT is the bi-level
method without implicit gradient. Fast-BAT keeps g and has one.

Fast-AT is prone to catastrophic overfitting: from some epoch on the network is right at the points
of the one-step attack (FGSM) and wrong at those of more steps (PGD). The paper says that Fast-BAT
does not suffer from it, thanks to the implicit gradient. The experiment here is a small one.
"""

from functools import partial

import cvxpy as cp
import numpy as np
import torch
from _claims import Finding, main

from convexrobust.deep import attacks
from convexrobust.deep.catalogue import load_task
from convexrobust.deep.methods import Attacked, Dale, FastBat
from convexrobust.deep.networks import SmallCNN
from convexrobust.deep.training import train
from convexrobust.perturbations import LpBall

RADIUS = 0.3  # of the small problem
BALL = LpBall(np.inf, 0.25, (0.0, 1.0))  # around images
SIZE = 16  # their height and width
N_EPOCHS, LEARNING_RATE = 16, 0.005
BI_LEVEL = partial(FastBat, implicit_weight=1.0)  # as the formula says
METHODS = {
    "FGSM-AT": Attacked.fgsm,
    "Fast-AT": Attacked.fast,
    "Fast-BAT": BI_LEVEL,
    "Fast-BAT, direct gradient": partial(FastBat, implicit_gradient=False),
    "DALE": partial(Dale, margin=0.1, temperature=1e-3, n_steps=5, step=0.4),
}
ONE_STEP = "FGSM-AT", "Fast-AT"
COLORS = dict(zip(METHODS, ("red", "orange", "blue", "deepskyblue", "green"), strict=True))


def study(quick):
    """Return findings and curves."""
    small = SmallProblem(40 if quick else 200)
    findings = [fast_at(small), lower_level(small), implicit_gradient(small), differences(small)]
    runs, models = experiment(quick)
    findings += [implicit_share(models, quick), textbook_fall(runs), *overfitting(runs)]
    return findings, {"plane": plane(), "runs": runs}


# ------------------------------------------------------------------ the gradient


class SmallProblem:
    """A smooth network with three outputs on random points in [-1, 1], in double precision."""

    def __init__(self, n):
        torch.manual_seed(0)
        self.x = 2.0 * torch.rand(n, 8, dtype=torch.float64) - 1.0
        self.y = torch.arange(n) % 3
        self.ball = LpBall(np.inf, RADIUS, (-1.0, 1.0))
        low, high = self.x - RADIUS, self.x + RADIUS
        self.low, self.high = low.clip(min=-1.0), high.clip(max=1.0)

    def network(self):
        """Return the network, always with the same weights."""
        torch.manual_seed(1)
        layers = torch.nn.Linear(8, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)
        return torch.nn.Sequential(*layers).double()

    def start(self, model):
        """Return z: what `FastBat` attacks with if its step is too short to change a number."""
        return FastBat(self.ball, n_steps=1, step=1e-30).attack(model, self.x, self.y).detach()

    def solution(self, model, z, lam=None):
        """Return delta* as points, g and lambda: by default as `FastBat` has it for step 1."""
        g = self.input_gradient(model, z)
        if lam is None:  # moves of one radius, root mean square
            lam = g.detach().norm(dim=1, keepdim=True) / (RADIUS * g.shape[1] ** 0.5)
        return torch.minimum(torch.maximum(z + g / lam, self.low), self.high), g, lam

    def input_gradient(self, model, points):
        """Return the gradient of each loss in its point, as a function of the weights."""
        leaf = points.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(leaf), self.y, reduction="sum")
        return torch.autograd.grad(loss, leaf, create_graph=True)[0]

    def upper_level(self, model, z, lam):
        """Return the mean loss at delta*(W), as a function of the weights."""
        points, _, _ = self.solution(model, z, lam)
        return torch.nn.functional.cross_entropy(model(points), self.y)


def weight_gradient(method, model, x, y):
    """Return the gradient in the weights that a step of a method takes, as one vector."""
    method.step(model, torch.optim.SGD(model.parameters(), lr=0.0), x, y, torch.arange(len(y)))
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def fast_at(small, n_steps=20):
    """Train by Fast-AT, and by `FastBat` with signs, from the same starts."""
    starts = FastBat(small.ball, n_steps=1, step=1e-30)

    def random_step(model, x, y, ball, mode):
        z = starts.attack(model, x, y).detach()
        step = 1.25 * RADIUS * small.input_gradient(model, z).sign()
        return torch.minimum(torch.maximum(z + step, small.low), small.high)

    signs = partial(FastBat, small.ball, sign=True, n_steps=1, step=1.25)
    methods = [Attacked(small.ball, random_step), signs(), signs(implicit_gradient=False)]
    trained = []
    for method in methods:
        model = small.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(n_steps):
            method.step(model, optimizer, small.x, small.y, torch.arange(len(small.y)))
        trained.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    moved = (trained[0] - torch.cat([w.flatten() for w in small.network().parameters()])).norm()
    difference = max((other - trained[0]).abs().max().item() for other in trained[1:])
    return Finding(
        "Fast-AT is the bi-level method with the sign of g, and its implicit gradient is 0 (Zhang "
        "et al. 2022).",
        f"tanh network 8-20-3, {len(small.y)} points, {n_steps} steps of SGD from the same starts, "
        "with and without implicit gradient; tolerance: none, bit for bit",
        f"largest difference of a weight {difference:g}, weights moved by {moved.item():.2f}",
        difference == 0.0,
    )


def lower_level(small, n_checked=10):
    """Compare the points of `FastBat` with those of a quadratic program."""
    model = small.network()
    z = small.start(model)
    points = FastBat(small.ball, n_steps=1, step=1.0).attack(model, small.x, small.y).detach()
    _, g, lam = small.solution(model, z)
    errors, n_inside = [], 0
    for k in range(n_checked):
        point, slope = cp.Variable(8), (g[k] / lam[k]).detach().numpy()
        cost = -slope @ (point - z[k].numpy()) + cp.sum_squares(point - z[k].numpy()) / 2.0
        box = [point >= small.low[k].numpy(), point <= small.high[k].numpy()]
        tight = {"tol_gap_abs": 1e-14, "tol_gap_rel": 1e-14, "tol_feas": 1e-12}
        cp.Problem(cp.Minimize(cost), box).solve(solver=cp.CLARABEL, **tight)
        errors.append(np.abs(point.value - points[k].numpy()).max())
        n_inside += int(((points[k] > small.low[k]) & (points[k] < small.high[k])).sum())
    return Finding(
        "The lower level is solved by delta* = P_C(z + g / lambda).",
        f"{n_checked} points of 8 features, the ball of radius {RADIUS} cut by [-1, 1]; against "
        "Clarabel, tolerance 1e-8",
        f"largest difference {max(errors):.1e}, {n_inside} of {8 * n_checked} coordinates inside",
        max(errors) < 1e-8,
    )


def implicit_gradient(small):
    """Compare the implicit gradient of `FastBat` with the formula."""
    model, method = small.network(), partial(BI_LEVEL, small.ball, n_steps=1, step=1.0)
    full = weight_gradient(method(), model, small.x, small.y)
    direct = weight_gradient(method(implicit_gradient=False), model, small.x, small.y)
    points, g, lam = small.solution(model, small.start(model))
    inside = (points > small.low) & (points < small.high)
    v = inside * small.input_gradient(model, points) / lam / len(small.y)
    parts = torch.autograd.grad((g * v.detach()).sum(), list(model.parameters()))
    formula = torch.cat([part.flatten() for part in parts])
    error = ((full - direct - formula).norm() / formula.norm()).item()
    share = (formula.norm() / direct.norm()).item()
    return Finding(
        "The derivative through the projection is the implicit gradient (1 / lambda) (d g / dW)' H "
        "grad l(delta*) (Zhang et al. 2022).",
        f"tanh network, {len(small.y)} points, relative error of the vector, tolerance 1e-10",
        f"relative error {error:.1e}; implicit gradient {share:.3f} of the direct one, "
        f"{inside.double().mean().item():.0%} of the coordinates inside",
        error < 1e-10 and share > 0.0,
    )


def differences(small, n_directions=10, h=1e-5):
    """Compare the gradient of `FastBat` with differences of the whole bi-level objective."""
    model = small.network()
    z = small.start(model)
    _, _, lam = small.solution(model, z)
    method = BI_LEVEL(small.ball, n_steps=1, step=1.0)
    full = weight_gradient(method, model, small.x, small.y)
    alone = FastBat(small.ball, n_steps=1, step=1.0, implicit_gradient=False)
    direct = weight_gradient(alone, model, small.x, small.y)
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    errors, without = [], []
    for _ in range(n_directions):
        direction = torch.randn(len(weights), dtype=torch.float64)
        ends = []
        for sign in (1.0, -1.0):
            moved = weights + sign * h * direction
            torch.nn.utils.vector_to_parameters(moved, model.parameters())
            ends.append(small.upper_level(model, z, lam).item())
        slope = (ends[0] - ends[1]) / (2.0 * h)
        errors.append(abs(slope - (full @ direction).item()))
        without.append(abs(slope - (direct @ direction).item()))
    size = full.norm().item()
    return Finding(
        "Direct and implicit gradient together are the gradient of the bi-level objective.",
        f"z and lambda fixed; central differences in {n_directions} directions, error relative to "
        "the length of the gradient, tolerance 1e-5",
        f"largest error {max(errors) / size:.1e}; without the implicit gradient "
        f"{max(without) / size:.1e}",
        max(errors) < 1e-5 * size < max(without),
    )


# ------------------------------------------------------------------ catastrophic overfitting


def experiment(quick):
    """Return the accuracies of each run, by method, and trained and untrained networks."""
    runs, models = {}, {}
    names = (
        [name for name in METHODS if "BAT" in name or name == "Fast-AT"] if quick else list(METHODS)
    )
    for name in names:
        runs[name] = []
        for seed in range(1 if quick else 2):
            model = network(seed)
            if name == "Fast-BAT" and seed == 0:
                models["untrained"] = network(seed)
                models["trained"] = model
            runs[name].append(trained(model, METHODS[name](BALL), seed, quick))
    return runs, models


def network(seed):
    """Return an untrained network for the digits."""
    torch.manual_seed(seed)
    return SmallCNN(10, 1, SIZE)


def digits(quick):
    """Return digits of scikit-learn to train on and to attack, enlarged."""
    task = load_task("digits")
    grid = np.ones((1, 1, SIZE // 8, SIZE // 8))
    n, n_test = (300, 50) if quick else (len(task.X), 200)
    X, X_test = np.kron(task.X[:n], grid), np.kron(task.X_test[:n_test], grid)
    return (X, task.y[:n]), (X_test, task.y_test[:n_test])


def trained(model, method, seed, quick):
    """Train; return the accuracies after each epoch: clean, under FGSM and under PGD."""
    data, test = digits(quick)
    at_fgsm = []

    def pgd(model, x, y, ball):
        points = attacks.fgsm(model, x, y, ball, loss="cross-entropy")
        with torch.no_grad():
            at_fgsm.append((model(points).argmax(dim=1) == y).double().mean().item())
        return attacks.pgd(model, x, y, ball, loss="cross-entropy", n_steps=10)

    history = train(
        model,
        method,
        *data,
        n_epochs=2 if quick else N_EPOCHS,
        learning_rate=LEARNING_RATE,
        optimizer=torch.optim.Adam,
        schedule=None,
        validation=test,
        attack=pgd,
        random_state=seed,
    )
    figures = {
        "pgd": [epoch["validation_robust_accuracy"] for epoch in history.epochs],
        "clean": [epoch["validation_accuracy"] for epoch in history.epochs],
    }
    return {"fgsm": at_fgsm} | figures


def last(runs, name, attack="pgd"):
    """Return the accuracies at the end of the runs of a method."""
    return np.array([run[attack][-1] for run in runs[name]])


def ends(runs, *names):
    """Return the accuracies at the end of the runs of some methods as text."""
    attacked = ("clean", "fgsm", "pgd")
    return "; ".join(
        f"{name} "
        + ", ".join("/".join(f"{run[a][-1]:.2f}" for a in attacked) for run in runs[name])
        for name in names
    )


def fall(run):
    """Return how far the accuracy under PGD ended below its best, and FGSM's rise since then."""
    best = int(np.argmax(run["pgd"]))
    return run["pgd"][best] - run["pgd"][-1], run["fgsm"][-1] - run["fgsm"][best]


def described(runs):
    """Return the setting of the experiment as text."""
    n_seeds, n_epochs = len(runs["Fast-AT"]), len(runs["Fast-AT"][0]["pgd"])
    return (
        f"digits of scikit-learn at {SIZE} x {SIZE}, pixels in [0, 1], l-inf radius "
        f"{BALL.epsilon:g}, CNN, Adam at {LEARNING_RATE:g} without schedule or warm-up, {n_epochs} "
        f"epochs, {n_seeds} seeds; radius and rate chosen in trial runs such that FGSM-AT fails; "
        "accuracies clean/FGSM/PGD-10 on 200 test points"
    )


def textbook_fall(runs):
    """Judge whether one-step methods show the fall of the textbook."""
    names = [name for name in ONE_STEP if name in runs]
    falls = [fall(run) for name in names for run in runs[name]]
    shown = ", ".join(f"{lost:.2f} ({rise:+.2f})" for lost, rise in falls)
    return Finding(
        "One-step training overfits in the textbook way: accuracy under PGD falls by more than 0.2 "
        "from its best, that under FGSM does not fall (Wong et al. 2020).",
        described(runs),
        f"{' and '.join(names)}: fall under PGD (rise under FGSM since the best epoch) {shown}",
        any(lost > 0.2 and rise >= 0.0 for lost, rise in falls),
        proven=False,
        remark="No fall from a height: without warm-up at this radius the accuracy under PGD does "
        "not rise first. In trial runs with smaller radii or rates it rose and stayed. The end is "
        "that of a collapse; see the next finding.",
    )


def overfitting(runs):
    """Judge whether one-step methods end overfitted, and Fast-BAT does not."""
    shares = {}
    for name in runs:
        learned = last(runs, name, "clean") > 0.5
        shares[name] = (last(runs, name) / last(runs, name, "fgsm"))[learned]
    one_step = [share for name in ONE_STEP if name in runs for share in shares[name]]
    setting = (
        "the runs above; PGD below half of FGSM in each run of the first, above in each of the "
        "second; runs that have not learned (clean below 0.5) are not counted, as was decided "
        "after the runs"
    )
    return [
        Finding(
            "One-step training (FGSM-AT, Fast-AT) ends right at the points of FGSM and wrong at "
            "those of PGD; Fast-BAT does not (Zhang et al. 2022).",
            setting,
            ends(runs, *runs),
            min(len(one_step), len(shares["Fast-BAT"])) > 0
            and bool(max(one_step) < 0.5 < min(shares["Fast-BAT"])),
            proven=False,
            remark="One-step methods can also stay at the guess of one class. In a few epochs, as "
            "with --quick, no method learns.",
        ),
        gain(runs),
    ]


def gain(runs):
    """Judge what the implicit gradient brings."""
    name = "Fast-BAT, direct gradient"
    gains = last(runs, "Fast-BAT") - last(runs, name)
    return Finding(
        "The implicit gradient makes Fast-BAT more robust (Zhang et al. 2022).",
        "the runs above; higher accuracy under PGD-10 at the end for every seed, by more than 0.05 "
        "in the mean, about one standard error of a difference on 200 points",
        f"gains {', '.join(f'{value:+.3f}' for value in gains)}; {ends(runs, 'Fast-BAT', name)}",
        bool(np.all(gains > 0.0) and gains.mean() > 0.05),
        proven=False,
        remark="Not for every seed. Without it the method does not overfit either: what protects "
        "it here is its attack, two steps without signs.",
    )


def implicit_share(models, quick):
    """Measure the implicit gradient of `FastBat` before and after training."""
    (X, y), _ = digits(quick)
    x, y = torch.as_tensor(X[:128]).float(), torch.as_tensor(y[:128])
    shares = {}
    for name, model in models.items():
        model.train()
        full = weight_gradient(BI_LEVEL(BALL), model, x, y)
        direct = weight_gradient(FastBat(BALL, implicit_gradient=False), model, x, y)
        shares[name] = ((full - direct).norm() / direct.norm()).item()
    return Finding(
        "The implicit gradient is no small part of the step: at least a tenth of the direct one.",
        "digits, one batch of 128, the network of the runs below before and after Fast-BAT; "
        "lengths of the vectors",
        ", ".join(f"{name} {share:.3f}" for name, share in shares.items()),
        min(shares.values()) >= 0.1,
        proven=False,
        remark="lambda is such that steps are two radii long, and coordinates that end at the "
        "boundary of C, where H is 0, add nothing.",
    )


def plane():
    """Return lower levels in two dimensions: z, g / lambda, the solution and the one with signs."""
    z = [[-0.15, 0.1], [0.12, -0.2], [0.05, 0.22]]
    moves = [[0.57, -0.12], [-0.2, 0.6], [-0.2, -0.18]]
    solutions = np.clip(np.add(z, moves), -RADIUS, RADIUS)
    signed = np.clip(z + 1.25 * RADIUS * np.sign(moves), -RADIUS, RADIUS)
    return {"z": z, "moves": moves, "solutions": solutions, "signed": signed}


# ------------------------------------------------------------------ the picture


def draw(figure, curves):
    """Draw the lower level in two dimensions, and the accuracies over the epochs."""
    left, middle, right = figure.subplots(1, 3)
    draw_plane(left, **curves["plane"])
    for axes, attack in ((middle, "pgd"), (right, "fgsm")):
        for name, runs in curves["runs"].items():
            accuracies = np.array([run[attack] for run in runs]).T
            lines = axes.plot(range(1, len(accuracies) + 1), accuracies, color=COLORS[name], lw=1.5)
            lines[0].set_label(name)
        axes.set(xlabel="epoch", ylim=(0.0, 0.85), title=f"Under {attack.upper()}, a line a seed")
        axes.set_ylabel("accuracy on test points")
    right.legend(fontsize=8, loc="upper left")


def draw_plane(axes, z, moves, solutions, signed):
    """Draw starts, gradient steps, and their projections on the box."""
    from matplotlib.patches import Rectangle

    corner = (-RADIUS, -RADIUS)
    axes.add_patch(Rectangle(corner, 2 * RADIUS, 2 * RADIUS, color="0.92", label="box C"))
    for start, move, end, corner in zip(z, moves, solutions, signed, strict=True):
        axes.plot(*start, "ko", ms=4)
        axes.annotate("", np.add(start, move), start, arrowprops={"arrowstyle": "->"})
        axes.plot(*np.transpose([np.add(start, move), end]), "k:", lw=1)
        axes.plot(*end, "C0s", ms=6)
        axes.plot(*corner, "C3^", ms=7)
    axes.plot([], [], "ko", ms=4, label="start z, with g / lambda")
    axes.plot([], [], "C0s", label="Fast-BAT: P(z + g / lambda)")
    axes.plot([], [], "C3^", label="Fast-AT: with sign(g)")
    axes.set(xlim=(-0.48, 0.48), ylim=(-0.4, 0.8), aspect="equal", title="The lower level")
    axes.set(xlabel="perturbation, feature 1", ylabel="feature 2")
    axes.legend(fontsize=7, loc="upper left")


if __name__ == "__main__":
    main(study, draw)
