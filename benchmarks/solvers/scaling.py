"""One iteration on large data: its time against its matrix products, its growth, its memory.

    python benchmarks/solvers/scaling.py [--smoke] [--threads N] [--device cuda]

Soft hinge program, l-inf, Gaussian data with 200 features and 256 patterns, float32. Seconds of an
iteration are the minimum over several, without the certificates (which cost about as much as a few
iterations, at growing distances). "products" are matrix products of the same shapes and number,
alone, by torch or NumPy, whichever is quicker. Goals: at most 1.5 times the products; at most 2.2
times as long when n doubles. Memory is the peak of a fresh process above that before the iterate is
made; "named" are the arrays that the iterate keeps: data, patterns, multipliers, weights. Goal: at
most 1.5 times those.
"""

import argparse
import multiprocessing
import resource
import time
from functools import partial

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from convexrobust import ConvexProgram, GroupLasso, Hinge, LpBall
from convexrobust.solvers.admm.splitting import Splitting
from convexrobust.solvers.projected_gradient.saddle import Saddle
from convexrobust.solvers.tensors import scalar_like


def program_of(n, d, P):
    """Return a robust program on Gaussian data."""
    rng = np.random.default_rng(0)
    X = np.hstack([rng.normal(size=(n, d - 1)), np.ones((n, 1))])
    y = np.where(X[:, 0] * X[:, 1] + 0.5 * X[:, 2] > 0, 1, -1)
    D = (X @ rng.normal(size=(d, P)) >= 0).astype(np.int8)
    return ConvexProgram(X, y, D, Hinge(), GroupLasso(1e-3), LpBall(np.inf, 0.02))


def projected_gradient(program, like):
    """Return the iterate of `ProjectedGradient` and its step."""
    saddle = Saddle(program, like)
    saddle.begin(None)
    return saddle, saddle.step


def admm(program, like):
    """Return the iterate of `ADMM` and its step."""
    splitting = Splitting(program, like)
    return splitting, partial(splitting.advance, 1)


METHODS = {"ProjectedGradient": projected_gradient, "ADMM": admm}


def products(program, like):
    """Return the matrix products of an iteration: of slopes and cone rows, forward and back.

    Rows of one label have slacks for one sign of the neurons only. There is a step by torch and, on
    the CPU, one by NumPy, whose products the compiled iteration of `ADMM` uses.
    """
    (n, P), d = program.D.shape, program.X.shape[1]
    shapes = (n, d), (n, P), (n, d), (n, P), (d, P)
    tensors = [torch.ones(*shape, dtype=like.dtype, device=like.device) for shape in shapes]

    def step(X, D, Q, B, U):
        D @ U.T
        X @ U
        Q.T @ D
        X.T @ B

    steps = [partial(step, *tensors)]
    if like.device.type == "cpu":
        steps.append(partial(step, *(tensor.numpy() for tensor in tensors)))
    return steps


def seconds_of(step, like, n_times):
    """Return the smallest time of a call."""
    times = []
    for _ in range(n_times):
        clock = time.perf_counter()
        step()
        if like.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - clock)
    return min(times)


def size_of(thing, seen):
    """Return the bytes of all tensors and arrays that a thing holds, shared memory once."""
    while isinstance(thing, np.ndarray) and thing.base is not None:
        thing = thing.base
    place = id(thing)
    if isinstance(thing, torch.Tensor):
        place = thing.untyped_storage().data_ptr()
    elif isinstance(thing, np.ndarray):
        place = thing.ctypes.data
    if place in seen:
        return 0
    seen.add(place)
    if isinstance(thing, torch.Tensor):
        return thing.untyped_storage().nbytes()
    if isinstance(thing, np.ndarray):
        return thing.nbytes
    if isinstance(thing, dict):
        return sum(size_of(part, seen) for part in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(size_of(part, seen) for part in thing)
    if type(thing).__module__.startswith("convexrobust.solvers"):
        # Some have slots in place of a dictionary.
        names = getattr(type(thing), "__slots__", None) or vars(thing)
        return sum(size_of(getattr(thing, name), seen) for name in names)
    return 0


def peak(like):
    """Return the largest memory so far, in bytes."""
    if like.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(name, shape, threads, device, n_times):
    """Return seconds of an iteration, bytes at the peak and bytes of the arrays kept."""
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    like, program = scalar_like("float32", device), program_of(*shape)
    program.sets, program.margin_map, program.weight, program.rows_v, program.rows_w  # noqa: B018
    with torch.no_grad():
        if name == "products":
            return min(seconds_of(s, like, n_times) for s in products(program, like)), 0, 0
        METHODS[name](program_of(20, 3, 2), like)[1]()  # loads what is compiled
        before = peak(like)
        iterate, step = METHODS[name](program, like)
        seconds = seconds_of(step, like, n_times)
    return seconds, peak(like) - before, size_of(iterate, set())


def alone(*arguments):
    """Measure in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, in seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    sizes, (d, P), n_times = (5000, 10_000, 20_000, 40_000, 80_000), (200, 256), 5
    if options.smoke:
        sizes, (d, P), n_times = (200, 400), (10, 8), 2
    print(f"d={d}, P={P}, float32, {options.device}, {options.threads} threads")
    print("method                   n   ms/iter  products    times   growth   peak MiB  named MiB")
    for name in METHODS:
        last = np.nan
        for n in sizes:
            rest = ((n, d, P), options.threads, options.device, n_times)
            of_products, _, _ = alone("products", *rest)
            seconds, memory, named = alone(name, *rest)
            print(
                f"{name:<18}{n:8d}{1e3 * seconds:10.1f}{1e3 * of_products:10.1f}"
                f"{seconds / of_products:9.2f}{seconds / last:9.2f}{memory / 2**20:11.0f}"
                f"{named / 2**20:11.0f}",
                flush=True,
            )
            last = seconds


if __name__ == "__main__":
    main()
