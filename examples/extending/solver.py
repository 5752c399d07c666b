"""A solver: the program on the rows that matter, which another solver solves.

The hinge of a row beyond its threshold is 0, and at the optimum most rows are there. So solve the
program on some rows, let those of positive loss join, and stop when the certificate on all rows
says that none is missing: rows left out have multipliers of 0, which is a dual point as good as
any.
"""

from dataclasses import replace

import numpy as np

from convexrobust import GroupLasso, InteriorPoint
from convexrobust.backends import numpy as xp
from convexrobust.duality import Multipliers
from convexrobust.losses import LossKind
from convexrobust.solvers.contract import check_accepted, refusal_of
from convexrobust.solvers.monitor import Monitor


class ActiveRows:
    """Solve soft programs on the rows of positive loss.

    Parameters
    ----------
    tol : float
        Relative gap on all rows to stop at.
    solver : Solver, optional
        Of the programs on some rows; by default `InteriorPoint`.
    first : int
        Rows to begin with.
    """

    def __init__(self, tol=1e-4, solver=None, first=20):
        self.tol = tol
        self.solver = InteriorPoint(tol / 10.0) if solver is None else solver
        self.first = first

    def refusal(self, program):
        """Return what this solver cannot treat of a program, and which can; else None."""
        if program.formulation != "soft":
            return "ActiveRows takes no cones as constraints: use InteriorPoint()."
        if program.copy_of is not None:
            return "ActiveRows takes no copies of samples: use ConicSolver()."
        if program.loss.kind != LossKind.SMALLEST_MARGIN:
            return (
                f"ActiveRows needs a loss that is 0 beyond a margin, and "
                f"{type(program.loss).__name__} is '{program.loss.kind}': use ConicSolver()."
            )
        return refusal_of(self.solver, program)

    def solve(self, program, start=None):
        """Return the best certified point; warn if its gap is not closed."""
        check_accepted(self, program)
        monitor = Monitor(program, "ActiveRows", self.tol)
        rows = np.linspace(0, len(program.X) - 1, min(self.first, len(program.X))).astype(int)
        n_iter = 0
        with monitor.running():
            while True:
                part, share = restricted(program, rows)
                found = self.solver.solve(part)
                n_iter += found.n_iter
                multipliers = on_all_rows(program, part, rows, share, found.multipliers)
                if monitor.record(n_iter, found.V, found.W, multipliers):
                    break
                losses = program.loss.value(xp, program.margins(xp, found.V, found.W))
                losses[rows] = 0.0
                new = np.argsort(-losses)[: min(np.sum(losses > 0.0), len(rows))]
                if len(new) == 0:  # the other solver's gap is what is left
                    break
                rows = np.union1d(rows, new)
        return monitor.solution()


def restricted(program, rows):
    """Return the program on some rows, and their share of all weights.

    Its objective is that of the program over the share: the mean is over these rows alone.
    """
    share = program.weight[rows].sum()
    part = replace(
        program,
        X=program.X[rows],
        y=program.y[rows],
        D=program.D[rows],
        sample_weight=program.weight[rows],
        regularizer=GroupLasso(program.regularizer.beta / share),
    )
    return part, share


def on_all_rows(program, part, rows, share, found):
    """Return the multipliers of a program on some rows as those of the whole one."""

    def spread(values, places, n):
        full = np.zeros((n, values.shape[1]))
        full[places] = share * values
        return full

    def of_cones(found, all_rows, part_rows):
        places = [np.searchsorted(a, rows[r]) for a, r in zip(all_rows, part_rows, strict=True)]
        parts = zip(found, places, all_rows, strict=True)
        return [spread(b, at, len(every)) for b, at, every in parts]

    n = len(program.X)
    return Multipliers(
        spread(found.margins, rows, n),
        {e: spread(P, rows, n) for e, P in found.slopes.items()},
        of_cones(found.cones_v, program.rows_v, part.rows_v),
        of_cones(found.cones_w, program.rows_w, part.rows_w),
    )
