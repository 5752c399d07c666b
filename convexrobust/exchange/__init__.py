r"""Adversarial training to proven global optimality, by the exchange method.

Adversarial training of a two-layer ReLU network,

.. math:: \min_{\text{net}} \sum_k \omega_k \max_{\delta \in \Delta_k}
          \varphi\bigl(m_k(x_k + \delta)\bigr) + \beta \sum_j \|u_j\|_2 \|\alpha_j\|_1,

has infinitely many perturbations. Keep finitely many *copies* of each sample, perturbed ones, and
let the loss of a sample be the largest over its copies: that is a nominal `ConvexProgram` with
``copy_of`` on the activation patterns of the copies, in which no neuron has to be stable. Its
optimum over all patterns is a lower bound of adversarial training, whatever the copies; the worst
case of the network that it trains is an upper bound. `Exchange` solves, attacks, adds the worst
points as copies, and goes on until the bounds meet. (It is the exchange method of semi-infinite
programming on the convex reformulation of Pilanci and Ergen, arXiv 2002.10553.)

Patterns are found the same way. With the multipliers a of the margins of a restricted program, a
neuron of cell i, pattern :math:`D_i` and cone :math:`K_i`, gains at most

.. math:: \|\Pi_{K_i}(-g_i)\|_2 = \min_{b \ge 0} \|g_i - X'(S_i \circ b)\|_2, \qquad
          g_i = \mp \Big(\sum_e T_e \circ a_e \circ X\Big)' D_i

a unit of length, and costs :math:`\beta`. Cells that gain more become patterns. Scaled until none
does, the multipliers are a dual point of the program with all patterns. Rows without a multiplier
do not enter g, so that only the cells of the others have to be enumerated.
"""

from __future__ import annotations

from convexrobust.exchange.method import Exchange
from convexrobust.exchange.solution import ExchangeSolution, Round

__all__ = ["Exchange", "ExchangeSolution", "Round"]
