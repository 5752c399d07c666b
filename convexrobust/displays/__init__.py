"""Pictures of networks and of what is proven about them, in the manner of scikit-learn's displays.

A display holds numbers as attributes and draws them with ``plot``. ``from_estimator`` computes the
numbers for a model, ``from_predictions`` takes them from elsewhere; both draw at once. Several
displays can share axes. All of it needs matplotlib (``pip install 'convexrobust[plot]'``), which is
imported when something is drawn.
"""

from convexrobust.displays.accuracy import RobustAccuracyDisplay
from convexrobust.displays.boundary import RobustBoundaryDisplay
from convexrobust.displays.convergence import ConvergenceDisplay
from convexrobust.displays.images import AdversarialExamplesDisplay
from convexrobust.displays.radius import CertifiedRadiusDisplay

__all__ = [
    "AdversarialExamplesDisplay",
    "CertifiedRadiusDisplay",
    "ConvergenceDisplay",
    "RobustAccuracyDisplay",
    "RobustBoundaryDisplay",
]
