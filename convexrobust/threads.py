"""One thread for small problems, whose matrices are too small to share."""

from __future__ import annotations

import sys
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

_ONE_THREAD = 2_000_000  # products of a step up to which a second thread costs more than it brings


@contextmanager
def threads_for(n_products: int):
    """Limit BLAS, and torch where it is loaded, to one thread where steps are small.

    Parameters
    ----------
    n_products : int
        Products of a step: rows times weights, n d P for a program with P patterns.
    """
    if n_products > _ONE_THREAD:
        yield
        return
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    try:
        if torch:
            torch.set_num_threads(1)
        with threadpool_limits(1):
            yield
    finally:
        if torch:
            torch.set_num_threads(before)
