"""
Certify a network that you already have
=======================================

`convexrobust.certify` takes two-layer ReLU networks, whoever trained them. Here scikit-learn's
``MLPClassifier`` behind a scaler is attacked, certified and verified exactly, all in units of the
raw features.
"""

# %%
# A network and its perturbations
# -------------------------------
# Every feature of a tumour may be off by a tenth of its standard deviation.
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from convexrobust import ConvexRobustClassifier, LpBall, as_network, certify, exact_radius

X, y = load_breast_cancer(return_X_y=True)
X, X_test, y, y_test = train_test_split(X, y, train_size=200, random_state=0, stratify=y)
perceptron = MLPClassifier((50,), max_iter=1000, random_state=0)
perceptron = make_pipeline(StandardScaler(), perceptron).fit(X, y)
ball = LpBall(np.inf, 0.1 * X.std(axis=0))

# %%
# The scaler is part of the network that is certified: its inputs are the raw features.
as_network(perceptron).hidden.shape

# %%
# Three ways to prove
# -------------------
# Intervals leave points open that are robust, the linear program fewer, and branch and bound none:
# each point is proven robust, or comes with an adversarial point.
for method in ("interval", "lp", "exact"):
    found = certify(perceptron, X_test, y_test, ball, method)
    counts = {str(s): int(np.sum(found.status == s)) for s in np.unique(found.status)}
    print(f"{method:<9} {counts}, {1e3 * found.seconds.sum():.0f} ms for {len(X_test)} points")

# %%
# The counterexamples are inputs that one can look at, and predict.
broken = np.flatnonzero((found.status == "broken") & (perceptron.predict(X_test) == y_test))
k = broken[0]
change = (found.X_adv[k] - X_test[k]) / X.std(axis=0)
print(f"point {k}: class {y_test[k]}, predicted {perceptron.predict(found.X_adv[[k]])[0]}")
print(f"after changes of {np.abs(change).max():.2f} standard deviations at most")

# %%
# How far is the nearest adversary?
# ---------------------------------
# `convexrobust.exact_radius` brackets the distance to it, here to one per cent.
robust = ConvexRobustClassifier(epsilon=0.1, beta=1e-2, n_patterns=10, random_state=0)
robust = make_pipeline(StandardScaler(), robust).fit(X, y)
some = slice(50)
radii = {
    name: exact_radius(model, X_test[some], y_test[some], ball, tol=1e-2, time_limit=2.0)
    for name, model in {"perceptron": perceptron, "convex robust": robust}.items()
}

# %%
# Trained for robustness, most points are farther from their nearest adversary.
import matplotlib.pyplot as plt

fig, ax = plt.subplots(layout="constrained")
for name, found in radii.items():
    in_deviations = np.sort(found.lower) * 0.1 / ball.radius
    share = 1.0 - np.arange(len(in_deviations)) / len(in_deviations)
    ax.step(in_deviations, share, where="pre", label=name)
ax.set(xlabel="radius in standard deviations", ylabel="proven share of the points")
ax.set(xlim=(0, 1), ylim=(0, 1))
ax.legend(frameon=False)
plt.show()

# %%
# One table for all
# -----------------
# The same attacks and proofs for every model, with confidence intervals of the accuracies.
from convexrobust.evaluation import evaluate_robustness

models = {"perceptron": perceptron, "convex robust": robust}
suite = {"pgd": {"n_restarts": 2}, "square": {"n_queries": 200}}
table = evaluate_robustness(
    models, X_test, y_test, [0.1, 0.2], feature_scale=X.std(axis=0), suite=suite
)
print(table)
