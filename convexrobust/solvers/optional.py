"""Optional dependencies: whether they are there, and the kernels that numba compiles."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from functools import lru_cache


def installed(module: str) -> bool:
    """Tell whether a module could be imported, without doing so."""
    return importlib.util.find_spec(module) is not None


def compiled_kernels(*, load: bool = True):
    """Return the module of the kernels; None without numba.

    Loading them takes half a second; if that is too much, ``load=False`` gives them only if they
    have been loaded already.
    """
    if not load and "convexrobust.solvers.kernels" not in sys.modules:
        return None
    return _kernels() if installed("numba") else None


@lru_cache
def _kernels():
    try:
        from convexrobust.solvers import kernels  # imports numba
    except ImportError as error:  # numba refuses versions of NumPy that it does not know
        warnings.warn(
            f"numba is installed but cannot be imported ({error}): solvers are slower without it. "
            "Upgrade or uninstall numba.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return kernels
