"""
Generated patterns and the exchange method
==========================================

A convex program is as good as its activation patterns. Here patterns are drawn at random, generated
where the dual point asks for them, and, for adversarial training itself, priced one and all.
"""

# %%
# Random patterns
# ---------------
# Two interleaved half circles with a box around each point. The 60 points have a few thousand
# patterns; the soft program is solved for some of them, drawn at random.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import make_moons
from sklearn.preprocessing import scale

from convexrobust import ConvexProgram, GroupLasso, Hinge, LpBall, count_patterns, sample_patterns
from convexrobust.solvers import WorkingSet, default_solver

X, y = make_moons(60, noise=0.15, random_state=0)
X = np.column_stack([scale(X), np.ones(60)])  # the last column: intercept


def program_on(D):
    return ConvexProgram(X, 2 * y - 1, D, Hinge(), GroupLasso(1e-2), LpBall(np.inf, 0.1))


counts, seeds = [4, 8, 16, 32, 64, 128], range(5)
drawn = np.empty((len(seeds), len(counts)))
for i, seed in enumerate(seeds):
    for j, count in enumerate(counts):
        program = program_on(sample_patterns(X, count, random_state=seed))
        drawn[i, j] = default_solver(program, tol=1e-3).solve(program).objective
print(f"{count_patterns(60, 3)} patterns at most")
print("random patterns, mean objective of 5 draws:", np.round(drawn.mean(axis=0), 4))

# %%
# The working set
# ---------------
# It starts from eight random patterns and adds what pricing finds; unused patterns leave. Stopped
# after more and more rounds it shows its way. A second one starts from the gates of a small network
# as well, trained on the certified bound for a moment (``width``).
first = program_on(sample_patterns(X, 8, random_state=0))


def stopped_after(rounds, width):
    return WorkingSet(1e-4, width=width, n_new=8, max_rounds=rounds).solve(first)


priced = [stopped_after(rounds, width=0) for rounds in (1, 2, 3, 4, 6, 9)]
seeded = [stopped_after(rounds, width=8) for rounds in (1, 2, 3, 6)]
for name, found in (("priced", priced[-1]), ("seeded", seeded[-1])):
    print(f"{name}: objective {found.objective:.5f}, {found.D.shape[1]} patterns")
    print(f"  lower bound {found.lower_bound:.5f}, {found.lower_bound_scope}")

# %%
# Each lower bound is about the patterns used, be they good or bad. That pricing found no violated
# pattern in the end does not prove that there is none. The bound that proves it takes all patterns
# to be enumerated, and is lower.
from convexrobust.solvers.working_set.pricing import global_lower_bound

proven = max(
    global_lower_bound(program_on(found.D), found.multipliers) for found in (priced[-1], seeded[-1])
)
print(f"lower bound over all patterns: {proven:.5f}")

# %%
# On the left the objectives of solved programs. On the right what one run recorded: every round
# solves a program of its own, whose bounds meet lower than those of the round before. Their lower
# bound holds for the patterns of that round only, and better patterns go below it.
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True)
left.fill_between(counts, drawn.min(axis=0), drawn.max(axis=0), color="C0", alpha=0.2)
left.plot(counts, drawn.mean(axis=0), "o-", color="C0", label="random: mean and range of 5 draws")
for solutions, color, label in ((priced, "C1", "priced"), (seeded, "C2", "seeded and priced")):
    sizes = [solution.D.shape[1] for solution in solutions]
    left.plot(sizes, [s.objective for s in solutions], "o-", color=color, label=label)
left.set(xscale="log", xlabel="patterns", ylabel="soft objective", title="Solved programs")
left.set_xticks(counts, counts)
left.minorticks_off()

history = np.array(priced[-1].history)
for part in np.split(history, np.flatnonzero(np.diff(history[:, 2]) > 0) + 1):  # one per round
    steps, _, upper, lower, _ = part.T
    right.fill_between(steps, lower, upper, color="C1", alpha=0.2)
    (above,) = right.plot(steps, upper, ".-", color="C1")
    (below,) = right.plot(steps, lower, ".--", color="C1")
above.set_label("objective")
below.set_label("lower bound, patterns of the round")
right.set(xlabel="Newton steps", title="The rounds of a working set (priced)", ylim=(0.22, 0.47))
for ax in (left, right):
    ax.axhline(proven, color="black", linestyle=":", label="lower bound, all patterns")
    ax.legend()
fig.tight_layout()

# %%
# Adversarial training itself
# ---------------------------
# The soft program minimises a bound of the worst case, and not the worst case. `Exchange` trains on
# perturbed copies of the points, adds the worst perturbation of each network to them, and prices
# all patterns of the copies: for a few points, adversarial training is solved to a proven optimum.
from convexrobust import TwoLayerReLU, enumerate_patterns
from convexrobust.certificates import exact_margins
from convexrobust.exchange import Exchange

rng = np.random.default_rng(2)
X = np.column_stack([rng.uniform(-1, 1, (10, 2)), np.ones(10)])
y = np.where(X[:, 0] * X[:, 1] > 0, 1, -1)
ball, beta = LpBall(np.inf, 0.15), 0.02
program = ConvexProgram(X, y, enumerate_patterns(X), Hinge(), GroupLasso(beta), ball)

soft = default_solver(program, tol=1e-4).solve(program)  # over all patterns of the points
margins = exact_margins(TwoLayerReLU.from_solution(soft), X[:, :2], y, ball).lower
lengths = np.linalg.norm([soft.V, soft.W], axis=2).sum()
worst = np.maximum(1 - margins, 0).mean() + beta * lengths
best = Exchange(tol=1e-4).solve(program)
print(f"soft: certified {soft.objective:.4f}, exact worst case {worst:.4f}")
print(f"exchange: {best.objective:.4f}, at least {best.lower_bound:.4f}, {best.lower_bound_scope}")

# %%
# The bracket of each round, and the network at its end: its boundary avoids the boxes where that
# pays.
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
n_iter = [r.n_iter for r in best.rounds]
upper = np.minimum.accumulate([r.objective for r in best.rounds])
lower = np.maximum.accumulate([r.lower_bound for r in best.rounds])
left.fill_between(n_iter, lower, upper, alpha=0.2)
left.plot(n_iter, upper, ".-", label="best network, exact worst case")
left.plot(n_iter, lower, ".--", color="C0", label="lower bound, all networks")
left.axhline(worst, color="black", linestyle=":", label="soft network, exact worst case")
left.set(xlabel="round", ylabel="worst-case objective", title="The bracket of exchange")
left.set_xticks(n_iter)
left.legend()

grid = np.linspace(-1.3, 1.3, 200)
points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
outputs = best.network.predict(points).reshape(200, 200)
right.contourf(grid, grid, outputs, [-1e9, 0, 1e9], colors=["C0", "C1"], alpha=0.2)
for x, label in zip(X, y, strict=True):
    color = "C1" if label > 0 else "C0"
    right.add_patch(plt.Rectangle(x[:2] - 0.15, 0.3, 0.3, fill=False, color=color))
    right.plot(*x[:2], ".", color=color)
right.set(title="The optimal network and the boxes", aspect="equal")
fig.tight_layout()
