r"""Column generation: few patterns at a time, always the ones that matter.

A program with all patterns has far too many columns, and nearly all of its neurons are zero. A
*working set* of patterns is solved, the dual point prices all gates of R^d for the patterns that
it violates most, these join, unused ones leave, and the next program starts where the last one
stopped. The first patterns are the gates of a network (by default one that is trained on the
certified bound for a moment): it is then a point of the first program, and every solve can only
improve on it.

`seeding` trains the first network, `constant` has the best constant one, `pricing` finds what
joins, `columns` lets patterns join and leave, and `solver` is the loop.
"""

from convexrobust.solvers.working_set.seeding import train_certified
from convexrobust.solvers.working_set.solver import WorkingSet

__all__ = ["WorkingSet", "train_certified"]
