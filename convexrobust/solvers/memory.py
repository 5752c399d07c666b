"""How the C library treats memory that is freed between the steps of a method."""

from __future__ import annotations

import numpy as np

_MOST = 4_000_000  # float64 numbers: glibc takes no notice of blocks beyond 32 MiB


def keep_freed(n_numbers: int) -> None:
    """Make glibc keep that much memory when it is freed; other C libraries do not mind.

    It gives back what exceeds twice the largest block that it has seen freed. Without one as large
    as the arrays of a step together, every step fetches its memory anew, in much of its time.
    """
    np.empty(min(n_numbers, _MOST))
