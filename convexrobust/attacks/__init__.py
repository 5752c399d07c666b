r"""Attacks: perturbations within an `LpBall` that make a loss large.

An attack knows nothing about models. It is given a function ``loss_and_gradient(X)`` of the
quantity to increase, which returns the loss of each row (n,) and its gradient in that row (n, d),
and it is written once for NumPy arrays and torch tensors (``xp``, a backend). For a two-layer
network `worst_margin_objective` is such a function in closed form; `convexrobust.deep` attacks any
torch model.

What an attack finds is a lower bound on the worst case. How much it misses is measured by
`convexrobust.certificates`, from above. Every attack checks its result: a point outside the ball or
the bounds is an error.
"""

from convexrobust.attacks.apgd import apgd
from convexrobust.attacks.gradient import fgsm, pgd
from convexrobust.attacks.objectives import worst_margin_objective
from convexrobust.attacks.square import square
from convexrobust.attacks.worst import worst_of

__all__ = ["apgd", "fgsm", "pgd", "square", "worst_margin_objective", "worst_of"]
