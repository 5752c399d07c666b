"""Solvers: ``solve(program, start=None) -> Solution`` for a `ConvexProgram`.

========================  ==========================================  ==========================
solver                    method                                      for
========================  ==========================================  ==========================
`InteriorPoint`           primal-dual interior point, structured      small and medium, to 1e-6
`ADMM`                    splitting with exact solves, on tensors      large, to 1e-2 or 1e-3
`WorkingSet`              column generation around one of these        the best patterns
`ProjectedGradient`       primal-dual gradient steps, in row chunks    data beyond memory
`ConicSolver`             Clarabel, MOSEK, SCS, ... through cvxpy      the reference
`GatedRelaxation`         the group lasso without cones                a first answer, nominal
========================  ==========================================  ==========================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from convexrobust.solvers.choice import default_solver
from convexrobust.solvers.conic import ConicSolver
from convexrobust.solvers.contract import ProgramRefusedError, Solver, SolverError
from convexrobust.solvers.interior_point import InteriorPoint
from convexrobust.solvers.working_set import WorkingSet, train_certified

if TYPE_CHECKING:
    from convexrobust.solvers.admm import ADMM
    from convexrobust.solvers.gated import GatedRelaxation
    from convexrobust.solvers.projected_gradient import ProjectedGradient

__all__ = [
    "ADMM",
    "ConicSolver",
    "GatedRelaxation",
    "InteriorPoint",
    "ProgramRefusedError",
    "ProjectedGradient",
    "Solver",
    "SolverError",
    "WorkingSet",
    "default_solver",
    "train_certified",
]

# Loaded on first use, because they import torch.
_ON_TENSORS = {
    "ADMM": "admm",
    "GatedRelaxation": "gated",
    "ProjectedGradient": "projected_gradient",
}


def __getattr__(name):
    if name not in _ON_TENSORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ON_TENSORS[name]}"), name)
