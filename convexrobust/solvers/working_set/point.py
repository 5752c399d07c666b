"""`Point`: a solution together with the program that it is a point of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from convexrobust.duality import Multipliers
from convexrobust.program import ConvexProgram, Solution
from convexrobust.solvers.residuals import multipliers_from_margins
from convexrobust.solvers.working_set.columns import joined, kept
from convexrobust.solvers.working_set.constant import ConstantNetwork


@dataclass(frozen=True, eq=False)
class Point:
    """A solution, and the program whose patterns its weights belong to.

    Attributes
    ----------
    program : ConvexProgram
        With P patterns.
    solution : Solution
        V and W have P columns each.
    """

    program: ConvexProgram
    solution: Solution

    @classmethod
    def zero(cls, program: ConvexProgram) -> Point:
        """Return the zero network."""
        return cls(program, program.solution(*np.zeros((2, *program.shape))))

    @property
    def n_patterns(self) -> int:
        """P."""
        return self.program.D.shape[1]

    @property
    def used(self) -> np.ndarray:
        """Tell which patterns have a neuron, the first one if none has; shape (P,)."""
        V, W = self.solution.V, self.solution.W
        used = np.any(V != 0.0, axis=(0, 1)) | np.any(W != 0.0, axis=(0, 1))
        used[0] |= not used.any()
        return used

    def kept(self, used: np.ndarray) -> Point:
        """Return the point without the patterns that are not used; it must have multipliers."""
        return Point(*kept(self.program, self.solution, used))

    def joined(self, new: np.ndarray) -> Point:
        """Return the point with those of ``new`` patterns (n, K) that it lacks, at weight 0."""
        return Point(*joined(self.program, self.solution, new))

    def at(self, weights: Solution) -> Point:
        """Return the point at the weights of another solution; its bound stays that it was."""
        names = ("V", "W", "objective", "cone_violation")
        moved = {name: getattr(weights, name) for name in names}
        return Point(self.program, replace(self.solution, **moved))

    def priced_by(self, multipliers: Multipliers) -> Point:
        """Return the point with other multipliers."""
        return Point(self.program, replace(self.solution, multipliers=multipliers))

    def bounded_by(self, constant: ConstantNetwork, **options) -> Point:
        """Return the point, with the bound of a constant network if that is better."""
        multipliers = multipliers_from_margins(self.program, constant.margins, **options)
        bound = self.program.lower_bound(multipliers)
        if bound <= self.solution.lower_bound:
            return self
        known = replace(self.solution, multipliers=multipliers, lower_bound=bound)
        return Point(self.program, known)
