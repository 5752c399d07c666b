"""Time of `import convexrobust` against `import sklearn`, each in a fresh interpreter.

    python benchmarks/package/import_time.py

The goal is a ratio below 1.5 and neither cvxpy nor torch loaded.
"""

import argparse
import statistics
import subprocess
import sys

IMPORT_TIMED = (
    "import time; t = time.perf_counter(); import {module}; "
    "print(time.perf_counter() - t); "
    "import sys; print([m for m in ('cvxpy', 'torch') if m in sys.modules])"
)


def import_once(module):
    """Return the seconds of one import and which heavy packages it loaded."""
    command = [sys.executable, "-c", IMPORT_TIMED.format(module=module)]
    seconds, heavy = subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return float(seconds), heavy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one repeat")
    repeats = 1 if parser.parse_args().smoke else 9

    # Interleaved, so that a busy machine slows both alike; one unmeasured round fills the cache.
    modules, times, heavy = ("sklearn", "convexrobust"), {}, {}
    for _ in range(repeats + 1):
        for module in modules:
            seconds, heavy[module] = import_once(module)
            times.setdefault(module, []).append(seconds)
    medians = {module: statistics.median(times[module][1:]) for module in modules}
    for module in modules:
        print(f"import {module:<13} {medians[module]:.3f} s (median of {repeats})")
    print(f"ratio {medians['convexrobust'] / medians['sklearn']:.2f} (goal < 1.5)")
    print(f"heavy packages loaded by convexrobust: {heavy['convexrobust']} (goal: none)")


if __name__ == "__main__":
    main()
