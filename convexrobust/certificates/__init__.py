r"""What a network provably does on whole perturbation sets.

`certify` decides for each sample whether a perturbation can change its class, in one of three ways,
each at least as sharp as the one before:

* "interval": the interval of `convexrobust.program` at new points, a few matrix products;
* "lp": the triangle relaxation of the neurons that change sign on a set;
* "exact": branch and bound on their signs, fractions of a millisecond to seconds a sample.

`exact_margins` closes the brackets, `output_interval` bounds outputs (regression),
`certified_radius` and `exact_radius` return the largest perturbation that is proven harmless. Every
bound is one of weak duality in float64, less what rounding may have added: it is valid, however it
was found.
"""

from convexrobust.certificates.interval import certified_radius, margin_bounds
from convexrobust.certificates.verification import (
    METHODS,
    Certificate,
    RadiusBracket,
    Verdict,
    certify,
    exact_margins,
    exact_objective,
    exact_radius,
    output_interval,
)

__all__ = [
    "METHODS",
    "Certificate",
    "RadiusBracket",
    "Verdict",
    "certified_radius",
    "certify",
    "exact_margins",
    "exact_objective",
    "exact_radius",
    "margin_bounds",
    "output_interval",
]
