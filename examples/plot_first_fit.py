"""
A first certified classifier
============================

Train a two-layer ReLU network against perturbations, see how much of its accuracy is proven, and
how far each point may move before its prediction could change.
"""

# %%
# Data and model
# --------------
# Standardise first: ``epsilon`` is in the units of X.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from convexrobust import ConvexRobustClassifier

X, y = load_breast_cancer(return_X_y=True)
X, X_test, y, y_test = train_test_split(X, y, train_size=120, random_state=0, stratify=y)
scaler = StandardScaler().fit(X)
X, X_test = scaler.transform(X), scaler.transform(X_test)

model = ConvexRobustClassifier(epsilon=0.2, beta=1e-2, n_patterns=6, random_state=0)
model.fit(X, y)

# %%
# The optimum is global over the patterns used, and the gap proves it.
print(f"objective {model.objective_:.6f}, at least {model.lower_bound_:.6f}")
print(f"{model.network_.n_neurons} neurons after {model.n_iter_} iterations")

# %%
# Robustness, from both sides
# ---------------------------
# "certified" is a proof and a lower bound, "attack" an upper bound.
print(f"clean     {model.score(X_test, y_test):.3f}")
for method in ("certified", "attack"):
    print(f"{method:<9} {model.robust_score(X_test, y_test, method=method):.3f}")

# %%
# The certified radius of a point is the epsilon up to which its prediction provably stays.
radius = model.certified_radius(X_test)
correct = model.predict(X_test) == y_test

fig, ax = plt.subplots()
bins = np.linspace(0, radius.max(), 25)
ax.hist([radius[correct], radius[~correct]], bins, stacked=True, label=["right", "wrong"])
ax.axvline(model.epsilon, color="black", linestyle=":", label="trained epsilon")
ax.set(xlabel="certified radius", ylabel="test points", title="How far can each point move?")
ax.legend()
