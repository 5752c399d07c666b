"""Where a tensor solver computes."""

from __future__ import annotations

from contextlib import contextmanager

import torch

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def scalar_like(dtype, device) -> torch.Tensor:
    """Return a scalar tensor of a dtype on a device, for others to be made like.

    Raises
    ------
    ValueError
        For a dtype that is not "float32" or "float64", or a device that is not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}.")
    try:
        return torch.zeros((), dtype=DTYPES[dtype], device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"device={device!r} is not usable here ({error}); use device='cpu', or install a torch "
            "build for that device."
        ) from error


@contextmanager
def memory_of(like, remedy):
    """Turn an out-of-memory error of the device of ``like`` into one that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"{like.device} is too small for this program: lower {remedy}, or use "
            "ProjectedGradient(chunk_size=...), which visits the device in parts."
        ) from error
