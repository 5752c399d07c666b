r"""One evaluation for every classifier: clean, attacked, certified and exact accuracy.

All are measured on the same samples, sets and attacks, in units of the input. For every sample

.. math:: \text{certified} \le \text{exact} \le \text{worst attack} \le \text{clean},

and a violation is an error here, never a number.
"""

from convexrobust.evaluation.robustness import evaluate_robustness
from convexrobust.evaluation.suite import SUITE
from convexrobust.evaluation.table import Measurement, RobustnessTable

__all__ = ["SUITE", "Measurement", "RobustnessTable", "evaluate_robustness"]
