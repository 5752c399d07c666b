r"""The alternating direction method of multipliers on tensors, for every program and any size.

Each part of the program that couples variables gets a copy of what it sees, so that every part is
solved exactly (following Boyd et al. 2011 for the method; the splitting is our own):

* the slopes of the margins, :math:`M_e = \sum_c T_{ec} \circ D (V_c - W_c)'` (n x d), on which the
  loss and the perturbations of the slope act, sample by sample;
* the pre-activations :math:`H = X U` and the reaches :math:`T_{ki} = \rho_k(u_i)` (n x P), on which
  the cone rows or slacks act;
* the weights U themselves, with the group norm and the epigraph of :math:`\rho`.

What remains for U is least squares whose normal operator is a sum of two Kronecker products,

.. math:: (\rho_h X'X + \rho_z I)\, \Delta + 2 \rho_m\, \Delta\, G, \qquad
          G = \sum_e (T_e \circ D)'(T_e \circ D),

for the difference :math:`\Delta = V - W`, and its first term alone for V + W. Two
eigendecompositions, made once, solve it for every choice of the weights :math:`\rho`, which can
therefore be adapted block by block for nothing. An iteration costs matrix products only, linear in
the number of rows.

From the bottom up: `gram` and `kronecker` are the least squares; `reach`, `cones`, `margin_prox`
with `balance` the proximal steps; `splitting` the iteration on tensors, for any program, device and
precision; `fused` the same one on arrays, with the compiled `kernels`, for perturbations in boxes
on a CPU; and `solver` the loop around it.
"""

from convexrobust.solvers.admm.solver import ADMM

__all__ = ["ADMM"]
