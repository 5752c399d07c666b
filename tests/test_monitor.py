"""What all iterative solvers share: who is told, who may stop them, threads and memory."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_info, threadpool_limits

from convexrobust import threads
from convexrobust.losses import Hinge
from convexrobust.program import ConvexProgram
from convexrobust.solvers import ADMM, InteriorPoint, ProjectedGradient
from convexrobust.solvers.monitor import Monitor, watched_by
from tests.cases import BALLS, small_program

SOLVERS = [InteriorPoint(1e-9, 5), ADMM(1e-9, 200), ProjectedGradient(1e-9, 200)]


def program():
    return small_program(Hinge(), BALLS[2])


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_watcher_sees_the_history(solver):
    seen = []
    with watched_by(lambda row, found: seen.append((row, found))):
        solution = solver.solve(program())
    assert tuple(row for row, _ in seen) == solution.history
    assert all(row.objective == found.objective for row, found in seen)
    assert len(solver.solve(program()).history) == len(seen)  # nobody watches any more


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_watcher_stops_the_solver(solver):
    with (
        watched_by(lambda row, found: True),
        pytest.warns(ConvergenceWarning, match="'interrupted'"),
    ):
        solution = solver.solve(program())
    assert len(solution.history) == 1


def test_ctrl_c_keeps_the_best_iterate():
    few = program()
    monitor = Monitor(few, "some solver", tol=1e-3)
    V, W = np.random.default_rng(0).normal(size=(2, *few.shape)) / 100
    with monitor.running():
        monitor.record(1, V, W)
        raise KeyboardInterrupt
    with pytest.warns(ConvergenceWarning, match="some solver stopped with status 'interrupted'"):
        solution = monitor.solution()
    assert solution.objective == few.solution(V, W).objective


@pytest.mark.parametrize(("limit", "n_threads"), [(10**9, 1), (0, 2)])
def test_small_programs_get_one_thread(monkeypatch, limit, n_threads):
    monkeypatch.setattr(threads, "_ONE_THREAD", limit)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threadpool_limits(2), threads.threads_for(1000):
            assert torch.get_num_threads() == n_threads
            assert {pool["num_threads"] for pool in threadpool_info()} <= {1, n_threads}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("solver", SOLVERS[1:], ids=lambda solver: type(solver).__name__)
def test_too_little_memory_says_what_to_lower(monkeypatch, solver):
    def full(*args, **facts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ConvexProgram, "solution", full)  # where a device might be full
    with pytest.raises(MemoryError, match=r"cpu is too small .* lower .*the number of patterns"):
        solver.solve(program())
