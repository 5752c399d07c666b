"""The element-wise passes of an iteration of `ADMM`, compiled by numba (an optional dependency).

Each does for arrays in memory what the tensors of `ADMM` do in several passes; the formulas are
explained there: `margin_prox`, `balance`, `cones`, `reach`, `kronecker`. They are for
`FusedIteration`, which multiplies the matrices in between.
"""

from convexrobust.solvers.admm.kernels.margins import margin_prox, margins_prox, move_slopes
from convexrobust.solvers.admm.kernels.moves import (
    join,
    move_gaps,
    move_product,
    relax,
    right_side,
    separate,
    settle,
)
from convexrobust.solvers.admm.kernels.weights import box_prox, shared_prox, shrink

__all__ = [
    "box_prox",
    "join",
    "margin_prox",
    "margins_prox",
    "move_gaps",
    "move_product",
    "move_slopes",
    "relax",
    "right_side",
    "separate",
    "settle",
    "shared_prox",
    "shrink",
]
