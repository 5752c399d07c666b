r"""The alternating direction method of multipliers on tensors, for every program and any size.

Each part of the program that couples variables (loss, cone rows, norms) gets a copy z of what it
sees, a linear function Kx of the weights x, so that each is solved exactly (Boyd et al. 2011 for
the method; the splitting is our own). With the state s, copies plus scaled multipliers, and weights
:math:`\rho` of the copies, which are balanced now and then, an iteration is

.. math::

    z = \operatorname{prox}(s), \qquad
    x = \operatorname*{argmin}_x\ \|K x - (2 z - s)\|_\rho^2, \qquad
    s \leftarrow s + 1.6\,(K x - z).

The normal operator of x is a sum of two Kronecker products, which two eigendecompositions, made
once, invert for every :math:`\rho`. An iteration costs matrix products, linear in the number of
rows. The copies are those of `splitting`; `iteration` takes the steps on tensors, and `fused` those
on arrays, with compiled `kernels`; `solver` is the loop around them.
"""

from convexrobust.solvers.admm.solver import ADMM

__all__ = ["ADMM"]
