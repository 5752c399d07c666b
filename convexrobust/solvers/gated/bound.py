"""The lower bound that the derivative of the loss at any outputs gives."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from convexrobust.program import ConvexProgram

_EPS = np.finfo(float).eps
_N_SCALES = 8  # tried; the dual function is concave, and nearly a parabola, in the scale
_LARGEST_SCALE = 1e6  # of the multipliers, where nothing else limits it


def lower_bound(program: ConvexProgram, a, longest: float, size: float) -> float:
    """Return a valid lower bound from multipliers a (n, E) with residuals at most ``longest``.

    ``size`` bounds what the sizes of the terms of a residual sum up to, for the rounding in it.
    """
    used = program.weight > 0.0
    residual = longest + (len(program.X) + a.shape[1] + 8) * _EPS * size
    a, weight, offsets = a[used], program.weight[used], program.margin_map.offsets[used]
    limit = _largest_scale(program, a, weight, residual)
    each = a / weight[:, None]
    linear, terms = float(np.sum(a * offsets)), float(np.sum(a * (1.0 + np.abs(offsets))))
    rounding = (a.size + 16) * _EPS

    def dual(t):
        conjugate = weight * program.loss.conjugate(t * each)
        value = -t * linear - float(np.sum(conjugate))
        return value - rounding * (float(np.sum(np.abs(conjugate))) + t * terms)

    if not limit > 0.0:
        return dual(0.0)
    found = minimize_scalar(
        lambda t: -dual(t), bounds=(0.0, limit), method="bounded", options={"maxiter": _N_SCALES}
    )
    # At 1 they are those of the loss, which is nearly best late; a wide search may miss it.
    return max(dual(t) for t in (0.0, min(1.0, limit), found.x, limit))


def _largest_scale(program, a, weight, residual):
    """Return the largest t for which t a is feasible."""
    limit = _LARGEST_SCALE
    if not residual * limit <= program.regularizer.beta:
        limit = program.regularizer.beta / residual if np.isfinite(residual) else 0.0
    limit = min(limit, program.loss.largest_scale(a / weight[:, None]))
    return limit * (1.0 - 1e-12)
