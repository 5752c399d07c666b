r"""A primal-dual interior-point method that factors in the neurons only.

Every term of the program is an epigraph: slacks :math:`s \in K` of linear functions of the
variables, with multipliers :math:`z \in K` of which the certificate's :math:`a, P, b` are parts.
A step of Mehrotra's predictor-corrector method with Nesterov and Todd's scaling solves
:math:`\sum G' H G\,\Delta = \dots` with H the scaling of each cone. All variables that belong to
one sample, one cone row or one neuron's norm are eliminated by formula. What stays is

.. math::

    \begin{pmatrix} K & -A' \\ A & C \end{pmatrix}
    \begin{pmatrix} \Delta u \\ a \end{pmatrix} = \begin{pmatrix} r_u \\ r_a \end{pmatrix}

in the neurons u (each with the epigraph variable of its robust cone) and the multipliers a of the
margins. Row (k, e) of A is the effective worst-case sample, C is block-diagonal by sample, and K is
block-diagonal by neuron but for the curvature of the slopes' norms. So :math:`K + A' C^{-1} A` is
factored, or, without perturbation and with many neurons, the n x n :math:`C + A K^{-1} A'`.

From the bottom up: `cones`, `epigraphs` and `losses` are the terms and what becomes of them after
elimination, `data` the numbers of the program that stay, `iterate` the numbers that change,
`system` the equations above, `newton` one step, `left_out` the neurons that take no part, and
`solver` the loop around it all.

Following Nesterov and Todd (1997), Mehrotra (1992), and the notation of Vandenberghe's "The
CVXOPT linear and quadratic cone program solvers" (2010).
"""

from convexrobust.solvers.interior_point.solver import InteriorPoint

__all__ = ["InteriorPoint"]
