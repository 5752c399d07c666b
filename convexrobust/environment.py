"""What a measurement was made with: the machine, and the versions that decide its outcome."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "convexrobust",
    "numpy",
    "scipy",
    "scikit-learn",
    "cvxpy",
    "clarabel",
    "torch",
    "numba",
)


def versions() -> dict[str, str]:
    """Return the machine and the versions of Python and packages, for records and bug reports.

    Returns
    -------
    dict of str
        ``processor``, ``cores`` (those that this process may use), ``python``, and each of the
        packages that is installed. Nothing of it names the machine or its user.
    """
    found = {"processor": _processor(), "cores": str(_cores()), "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _cores():
    with suppress(AttributeError):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _processor():
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
