"""
Pictures of robustness
======================

How much accuracy is left as the perturbations grow, what of it is proven, where the boundary runs
between the points, and what an image looks like that fools the network: the displays of
`convexrobust.displays`, in the manner of scikit-learn's.
"""

# %%
# Robust accuracy
# ---------------
# Handwritten 3s and 8s of 8 x 8 pixels, from 0 to 1. One network is trained as usual, the other
# against perturbations of every pixel by up to 0.1.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from convexrobust import ConvexRobustClassifier, LpBall
from convexrobust.displays import RobustAccuracyDisplay

X, y = load_digits(return_X_y=True)
X, y = X[np.isin(y, [3, 8])] / 16.0, y[np.isin(y, [3, 8])]
X, X_test, y, y_test = train_test_split(X, y, train_size=60, random_state=0, stratify=y)

ball = LpBall(np.inf, 0.1, bounds=(0.0, 1.0))
options = {"norm": ball.p, "bounds": ball.bounds, "n_patterns": 4, "random_state": 0}
standard = ConvexRobustClassifier(epsilon=0.0, **options).fit(X, y)
robust = ConvexRobustClassifier(epsilon=ball.epsilon, **options).fit(X, y)

# %%
# The true accuracy is between the solid curve, which is proven, and the dashed one, down to which
# an attack pushes it. Against the usual network small perturbations suffice; the robust one is as
# good without any, at the dots on the left. Far beyond the radius that it was trained for its
# proofs fail, and not the network: the dotted curve, the exact one, stays close to the attacked.
epsilons = np.linspace(0.0, 0.25, 21)
shown = RobustAccuracyDisplay.from_estimator(
    robust, X_test, y_test, epsilons=epsilons, exact=True, name="robust"
)
shown.ax_.axvline(ball.epsilon, color="black", linewidth=0.8, linestyle=":")
shown.ax_.set_title("Handwritten 3s and 8s")
usual = RobustAccuracyDisplay.from_estimator(
    standard, X_test, y_test, epsilons=epsilons, ball=ball, name="standard", ax=shown.ax_
)

# %%
# Certified radii
# ---------------
# Every prediction has a radius within which it provably stays. The few wrong ones, downwards, have
# small radii. Radii that are drawn as the share of points that are right and exceed them are the
# certified accuracy again, now with a step for each point.
from convexrobust.displays import CertifiedRadiusDisplay

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
radii = CertifiedRadiusDisplay.from_estimator(robust, X_test, y_test, ax=left, name="robust")
radii.plot(right, kind="survival")
radii = CertifiedRadiusDisplay.from_estimator(
    standard, X_test, y_test, ball=ball, ax=right, kind="survival", name="standard"
)

# %%
# Adversarial examples
# --------------------
# The robust network gives in to larger perturbations too. Red pixels were raised, blue ones
# lowered. Below the images is what the network takes them for.
from convexrobust.displays import AdversarialExamplesDisplay

larger = ball.scaled_to(0.2)
images = AdversarialExamplesDisplay.from_estimator(
    robust, X_test, y_test, shape=(8, 8), ball=larger
)

# %%
# The boundary in the plane
# -------------------------
# Two interleaved half circles, and what may happen to each point: diamonds, circles and boxes are
# the balls of the three norms. The boundary crosses those that are dashed, so that some
# perturbation changes the prediction; of the others it is proven that none does.
from sklearn.datasets import make_moons
from sklearn.preprocessing import scale

from convexrobust.displays import RobustBoundaryDisplay

X, y = make_moons(36, noise=0.12, random_state=0)
X = scale(X)
fig, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for panel, p, title in zip(panels, (1, 2, np.inf), ("l1", "l2", "l-inf"), strict=True):
    model = ConvexRobustClassifier(0.25, norm=p, n_patterns=30, random_state=0).fit(X, y)
    RobustBoundaryDisplay.from_estimator(model, X, y, ax=panel)
    panel.set_title(f"trained and drawn for {title}")
    if panel is not panels[-1]:
        panel.get_legend().remove()

# %%
# Convergence
# -----------
# Solvers record objective and lower bound as they go. The optimum is in the band; the relative gap
# on the right says how much of the objective is still in doubt.
from convexrobust.displays import ConvergenceDisplay

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
band = ConvergenceDisplay.from_estimator(robust, against="iterations", ax=left)
gap = band.plot(right, kind="gap", against="iterations")
