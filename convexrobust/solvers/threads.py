"""One thread for small programs, whose matrices are too small to share."""

from __future__ import annotations

import sys
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

from convexrobust.program import ConvexProgram

_SMALL = 2_000_000  # n d P up to which a second thread costs more than it brings


@contextmanager
def threads_for(program: ConvexProgram):
    """Limit BLAS, and torch where it is loaded, to one thread while a small program is solved."""
    n, P = program.D.shape
    if n * program.X.shape[1] * P > _SMALL:
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
