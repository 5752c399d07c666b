"""Patterns, the columns of D, that join a program or leave it, together with a point of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np


def kept(program, solution, used):
    """Return the program and its solution without the patterns that are not used."""
    m = solution.multipliers._replace(
        cones_v=[b[:, used] for b in solution.multipliers.cones_v],
        cones_w=[b[:, used] for b in solution.multipliers.cones_w],
    )
    V, W = solution.V[:, :, used], solution.W[:, :, used]
    return replace(program, D=program.D[:, used]), replace(solution, V=V, W=W, multipliers=m)


def joined(program, solution, new):
    """Return the program with those of ``new`` patterns that it lacks, and the solution padded."""
    known = {column.tobytes() for column in np.ascontiguousarray(program.D.T, dtype=np.int8)}
    columns = np.ascontiguousarray(new.T, dtype=np.int8)
    new = np.array([c for c in columns if c.tobytes() not in known], dtype=np.int8)
    new = new.reshape(-1, len(program.X)).T

    def padded(A):
        return np.concatenate([A, np.zeros((*A.shape[:-1], new.shape[1]))], axis=-1)

    multipliers = solution.multipliers
    if multipliers is not None:
        multipliers = multipliers._replace(
            cones_v=[padded(b) for b in multipliers.cones_v],
            cones_w=[padded(b) for b in multipliers.cones_w],
        )
    solution = replace(
        solution, V=padded(solution.V), W=padded(solution.W), multipliers=multipliers
    )
    return replace(program, D=np.hstack([program.D, new])), solution
