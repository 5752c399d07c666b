"""Another norm: the ball of a p that the package refuses, covered by one that it knows.

Programs, solvers, certificates and attacks are written for p = 1, 2 and infinity, and
`convexrobust.LpBall` refuses any other. What is proven for a larger ball is proven for all that lie
in it, so that a ball of these three that covers the other one is a valid threat model.
"""

import numpy as np

from convexrobust import LpBall


def covering_balls(p, epsilon, n_features):
    r"""Return balls of known norms that contain the ball of radius epsilon in the p-norm.

    For :math:`q \ge p` it lies in the q-ball of the same radius, for :math:`q \le p` in that of
    radius :math:`d^{1/q - 1/p} \epsilon`, both by Hölder's inequality. None of the three contains
    the others: a model may be robust on either.
    """
    if not p >= 1:
        raise ValueError(f"p must be at least 1, for a norm; got {p!r}.")
    balls = []
    for q in (1, 2, np.inf):
        growth = n_features ** max(1.0 / q - 1.0 / p, 0.0)
        balls.append(LpBall(q, epsilon * growth))
    return balls
