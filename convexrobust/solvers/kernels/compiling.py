"""How the kernels are compiled.

What numba keeps on disk is compiled anew when the file of a kernel changes, and only then. So no
kernel calls one of another file, and who changes the options here changes those files, too.
"""

from __future__ import annotations

from numba import njit


def compiled(function):
    """Compile a function at its first call, and keep the result on disk where that is possible."""
    # Sums may be taken in any order, as in BLAS; infinities and NaN keep their meaning.
    options = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to write to
        return njit(**options)(function)
