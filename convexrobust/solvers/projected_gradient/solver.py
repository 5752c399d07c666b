"""`ProjectedGradient`: the loop around the saddle point's steps, with its certificates."""

from __future__ import annotations

import numpy as np

from convexrobust.program import ConvexProgram, Solution
from convexrobust.solvers.contract import check_accepted, refusal_of_loss
from convexrobust.solvers.monitor import Monitor
from convexrobust.solvers.projected_gradient.saddle import Saddle
from convexrobust.solvers.tensors import memory_of, scalar_like

_RECORD_AFTER = 25  # iterations to the first certificate, and at least between two


class ProjectedGradient:
    """Solve a `ConvexProgram` by projected gradient steps in torch; see the package's text.

    Parameters
    ----------
    tol : float
        Relative gap between the certified objective and lower bound to stop at.
    max_iter : int
        Most iterations; with ``batch_size`` an iteration is one batch.
    dtype : {"float32", "float64"}
        Of the iterates. Bounds are always certified in float64.
    device : str
        A torch device, e.g. "cpu" or "cuda".
    batch_size : int, optional
        Update the multipliers of about this many random rows in an iteration, in place of all
        (following Chambolle, Ehrhardt, Richtarik and Schoenlieb, SIAM J. Optim. 2018).
    chunk_size : int, optional
        Work on so many rows at a time. Data and multipliers then stay in main memory and visit the
        device chunk by chunk; the iterates are the same up to rounding. By default all rows at a
        time, or 2048 on a CPU, where that is faster.
    time_limit : float, optional
        Seconds.
    random_state : int
        Of the batches.

    Raises
    ------
    ValueError
        For a parameter out of its range, or a device that is not there.
    """

    def __init__(
        self,
        tol=1e-3,
        max_iter=2000,
        *,
        dtype="float32",
        device="cpu",
        batch_size=None,
        chunk_size=None,
        time_limit=None,
        random_state=0,
    ):
        scalar_like(dtype, "cpu")  # a dtype out of its range is refused here already
        for name, size in (("batch_size", batch_size), ("chunk_size", chunk_size)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {size!r}.")
        if max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {max_iter!r}.")
        self.tol = tol
        self.max_iter = max_iter
        self.dtype = dtype
        self.device = device
        self.batch_size = batch_size
        self.chunk_size = chunk_size
        self.time_limit = time_limit
        self.random_state = random_state

    def __repr__(self):
        names = ("tol", "max_iter", "dtype", "device", "batch_size", "chunk_size")
        return f"ProjectedGradient({', '.join(f'{k}={getattr(self, k)!r}' for k in names)})"

    def refusal(self, program: ConvexProgram) -> str | None:
        """Return why the program is not for this solver, None if it is; see `Solver.refusal`."""
        if program.copy_of is not None:
            return "ProjectedGradient takes no copies of samples: use ConicSolver()."
        return refusal_of_loss("ProjectedGradient", program.loss)

    def solve(self, program: ConvexProgram, start: Solution | None = None) -> Solution:
        """Solve the program, from the weights and multipliers of ``start`` where they fit.

        Parameters
        ----------
        program : ConvexProgram
            What to minimise.
        start : Solution, optional
            Starting point.

        Returns
        -------
        Solution
            The best certified iterate with the best lower bound, and the history of both.

        Warns
        -----
        ConvergenceWarning
            If the gap did not reach ``tol``.

        Raises
        ------
        ValueError
            If the device is missing.
        ProgramRefusedError
            For a program that it refuses, with the text of `refusal`.
        MemoryError
            If the device is too small for a chunk.
        """
        like = scalar_like(self.dtype, self.device)
        check_accepted(self, program)
        monitor = Monitor(program, "ProjectedGradient", self.tol, self.time_limit)
        if start is not None and start.V.shape != program.shape:
            start = None
        remedy = f"chunk_size (now {self.chunk_size}) or the number of patterns"
        with monitor.running(), memory_of(like, remedy):
            if start is None or not monitor.record(0, start.V, start.W, _fitting(program, start)):
                self._iterate(program, like, start, monitor)
        return monitor.solution()

    def _iterate(self, program, like, start, monitor):
        """Iterate until the monitor is content; certify at growing distances."""
        saddle = Saddle(
            program,
            like,
            batch_size=self.batch_size,
            chunk_size=self.chunk_size,
            random_state=self.random_state,
        )
        saddle.begin(start)
        generator = np.random.default_rng(self.random_state)
        distance = _RECORD_AFTER if self.batch_size is None else 2 * len(saddle.chunks)
        next_record = distance
        for n_iter in range(1, self.max_iter + 1):
            if self.batch_size is None:
                saddle.step()
            else:
                saddle.batch_step(saddle.chunks[generator.integers(len(saddle.chunks))])
            if n_iter < next_record and n_iter < self.max_iter:
                continue
            V, W = saddle.certifiable.double().cpu().numpy()
            if monitor.record(n_iter, V, W, saddle.multipliers()):
                return
            saddle.rebalance()
            distance = max(distance, n_iter // 10)
            next_record = n_iter + distance


def _fitting(program, start):
    """Return the multipliers of a start if they are of this program's shapes."""
    found = start.multipliers
    if found is None or found.margins.shape != program.margin_map.offsets.shape:
        return None
    shapes = [(len(r), program.D.shape[1]) for r in program.rows_v + program.rows_w]
    return found if [b.shape for b in found.cones_v + found.cones_w] == shapes else None
