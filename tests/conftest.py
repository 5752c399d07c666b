"""Settings of the whole test run: one thread, no display, GPU tests only where there is a GPU."""

import os

# Before numpy and torch are first imported, because both read these variables only then. The test
# problems are tiny: a second thread costs far more than it brings, most of all on a busy machine.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest

# A solver's time varies with the machine's load; that is no property of the code.
hypothesis.settings.register_profile("convexrobust", deadline=None)
hypothesis.settings.load_profile("convexrobust")


def has_gpu():
    """Whether torch is installed and sees a CUDA device."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    """Skip the tests marked gpu where they cannot run; torch is loaded only if there are any."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs torch and a CUDA device"))
