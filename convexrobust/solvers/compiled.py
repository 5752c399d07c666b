"""Whether a method runs compiled by numba (an optional dependency), and how.

What numba keeps on disk is compiled anew when the file of a kernel changes, and only then. So no
kernel calls one of another file, and who changes the options here changes those files, too.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache

import numpy as np

from convexrobust.program import ConvexProgram


def compiles(program: ConvexProgram) -> bool:
    """Tell whether the iteration of `ADMM` is compiled for a program on a CPU.

    It is for perturbations in boxes or none, and rows that are samples of their own, where numba is
    there.
    """
    boxes = program.sets.unperturbed or program.sets.p == np.inf
    there = importlib.util.find_spec("numba") is not None
    return boxes and program.copy_of is None and there and _numba_works()


def compiled(function):
    """Compile a function at its first call, and keep the result on disk where that is possible."""
    from numba import njit

    # Sums may be taken in any order, as in BLAS; infinities and NaN keep their meaning.
    options = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to write to
        return njit(**options)(function)


@lru_cache
def _numba_works() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError as error:  # numba refuses versions of NumPy that it does not know
        warnings.warn(
            f"numba is installed but cannot be imported ({error}): ADMM is slower without it. "
            "Upgrade or uninstall numba.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
