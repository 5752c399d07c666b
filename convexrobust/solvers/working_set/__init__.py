r"""Column generation: few patterns at a time, always the ones that matter.

A program with all patterns has far too many columns, and nearly all of its neurons are zero. Let
:math:`p(\mathcal{W})` be the optimum over a *working set* of patterns. A dual point of it is one
of the program with all patterns unless a new neuron gains more than it costs,

.. math:: \max_{\|u\|_2 = 1} -h(u) > \beta,

with the residual h of `residuals`, whose D follows u. So solve the working set; let the patterns
join whose neurons gain most at that dual point, and unused ones leave; start the next solve where
the last one stopped. :math:`p(\mathcal{W})` never rises. Where no neuron gains more than
:math:`\beta` the dual bound holds for all patterns, as far as the search for the maximum can tell.
The first patterns are the gates of a network (by default one that is trained on the certified bound
for a moment): it is then a point of the first program, and every solve can only improve on it.

A run is a flow of values. A `Point` is a solution and its program; a `State` holds the point to
start from, the best one and the last `Round`. A step takes a state and returns the next, and
`what_follows` names the step from the state alone:

.. code-block:: text

    SOLVE   roughly               -> EXTEND where that can pay, else CLOSE
    EXTEND  price, join, leave    -> SOLVE where patterns joined, up to max_rounds, else CLOSE
    CLOSE   to the tolerance      -> STOP, or START_SMALL where the solver was lost
    START_SMALL  from the best point, among fewer patterns    -> STOP

`CLOSE` is left out where the gap is closed. Before the first step the best constant network becomes
a candidate. `seeding` has the first point, `constant` that network, `pricing` what joins, `columns`
how patterns join and leave, `point` and `rounds` the values, and `solver` the steps.
"""

from convexrobust.solvers.working_set.seeding import train_certified
from convexrobust.solvers.working_set.solver import WorkingSet

__all__ = ["WorkingSet", "train_certified"]
