r"""The gated ReLU program: a group lasso below every ReLU program of the same patterns.

Drop the cones, the slacks and the perturbations from a `ConvexProgram`, and its neurons of weight
+1 and -1 merge into U = V - W:

.. math:: \min_U\ \sum_k \omega_k \varphi(m_k(f(x_k))) + \beta \sum_{c,i} \|u_{ci}\|_2,
          \qquad f_c(x_k) = \sum_i D_{ki}\, x_k'u_{ci}

(the convex gated ReLU network of Mishkin, Sahiner and Pilanci, arXiv 2202.01331). As
:math:`\|v - w\| \le \|v\| + \|w\|` and no perturbation raises a margin, its value is a lower bound
of the soft, the one-sided and the hard program for every epsilon. Its dual asks
:math:`\|X'(D_i \circ \lambda_c)\|_2 \le \beta` of all residuals, where :math:`\lambda_c` is the
derivative of the mean loss in output c; any multipliers can be scaled until that holds.

`solve_gated` runs accelerated proximal gradients with two matrix products an iteration, and
Newton's method on the neurons that are not 0. `GatedRelaxation` makes a ReLU network of the result.

`gates` and `smoothing` are the two halves of the objective, `bound` is the certificate, `run` the
state that all steps share. `first_order`, `weights_newton` and `proximal_point` are the steps,
`solver` chooses between them, and `relu` makes the network.
"""

from convexrobust.solvers.gated.relu import GatedRelaxation, to_relu
from convexrobust.solvers.gated.solver import GatedSolution, solve_gated

__all__ = ["GatedRelaxation", "GatedSolution", "solve_gated", "to_relu"]
