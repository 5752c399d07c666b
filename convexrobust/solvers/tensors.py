"""Where a tensor solver computes."""

from __future__ import annotations

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
