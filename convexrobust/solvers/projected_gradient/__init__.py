r"""Projected gradient steps on weights and multipliers: the first-order workhorse for large data.

A `ConvexProgram` is the saddle point of a group norm in the weights U and of simple sets in the
multipliers: of a margin (:math:`a \ge 0`, its sum limited by the loss), of a slope (a point of the
unit ball), of a cone row (a number in [0, 1] for a slack, at least 0 for a constraint) and of a
neuron's support (a point of the unit ball). An iteration projects a step in the multipliers and
takes a proximal step in U:

.. math::

    \lambda^+ = \Pi(\lambda + K U / \mu), \qquad
    U^+ = \operatorname{prox}_{\beta / L}(U - K'(2 \lambda^+ - \lambda) / L), \qquad
    (\lambda, U) \mathrel{+}= \rho\,(\lambda^+ - \lambda, U^+ - U),

the over-relaxed primal-dual method (following Chambolle and Pock, J. Math. Imaging Vis. 2011).
It is smoothing by a proximal term :math:`\mu/2 \|\lambda - \lambda_k\|^2` whose centre moves on at
every step, so that :math:`\mu` need not go to 0. With the centre fixed at 0, as in Nesterov's
smoothing, accelerated steps at several fixed :math:`\mu` came less far in as many iterations.

Slopes, slacks and supports are worth to a margin what the margin is worth, so their multipliers
are stored as fractions of the margin's (or of the slack's) and multiplied out for K'. Whatever
the iterate, the products are in the domain of the dual and certify a lower bound.

`terms` has the terms of the saddle point with their multipliers, `saddle` the iterate and its
steps, `solver` the loop.
"""

from convexrobust.solvers.projected_gradient.solver import ProjectedGradient

__all__ = ["ProjectedGradient"]
