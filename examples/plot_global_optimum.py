"""
The global optimum of a neural network
======================================

On small data all activation patterns can be enumerated. Then the convex program has the value of
the best two-layer network of any width, and gradient descent can only come close to it.
"""

# %%
# Eight points in the plane have few patterns.
import matplotlib.pyplot as plt
import numpy as np

from convexrobust import (
    ConicSolver,
    ConvexProgram,
    GroupLasso,
    LpBall,
    Squared,
    TwoLayerReLU,
    count_patterns,
    enumerate_patterns,
)

rng = np.random.default_rng(3)
X = np.column_stack([np.sort(rng.uniform(-1, 1, 8)), np.ones(8)])  # the last column: intercept
y = np.sin(4 * X[:, 0])
D = enumerate_patterns(X)
print(f"{D.shape[1]} patterns; Cover's count says {count_patterns(8, 2)}")

# %%
# One program, a path of perturbation radii. The solver compiles once.
solver, networks = ConicSolver(), {}
for epsilon in (0.0, 0.05, 0.1):
    ball = LpBall(np.inf, epsilon)
    program = ConvexProgram(X, y, D, Squared(), GroupLasso(1e-3), ball)
    solution = solver.solve(program)
    networks[epsilon] = TwoLayerReLU.from_solution(solution)
    print(
        f"epsilon {epsilon:.2f}: objective {solution.objective:.6f}, "
        f"lower bound {solution.lower_bound:.6f}, {networks[epsilon].n_neurons} neurons"
    )

# %%
# The larger the box around each point in which the network has to fit, the flatter the function.
fig, ax = plt.subplots()
grid = np.linspace(-1.2, 1.2, 400)[:, None]
for epsilon, network in networks.items():
    ax.plot(grid, network.predict(grid), label=f"epsilon = {epsilon:g}")
ax.plot(X[:, 0], y, "k.", label="data")
ax.set(xlabel="x", ylabel="f(x)", title="Globally optimal two-layer ReLU networks")
ax.legend()
