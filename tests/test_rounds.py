"""What follows a round of `WorkingSet`, from the record of the rounds alone."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from convexrobust.losses import Hinge
from convexrobust.program import Progress
from convexrobust.solvers.residuals import multipliers_at_zero
from convexrobust.solvers.working_set.point import Point
from convexrobust.solvers.working_set.rounds import (
    Accuracy,
    Criteria,
    Log,
    Round,
    State,
    Step,
    what_follows,
)
from tests.cases import BALLS, small_program

CRITERIA = Criteria(tol=0.01, scale=1.0)
CLOSED, OPEN = 0.999, 0.5  # lower bounds of a point of objective 1
NEW = np.ones((14, 1), dtype=np.int8)
NONE = NEW[:, :0]


def point(lower_bound=OPEN, n_patterns=4, multipliers=True, **facts):
    program = small_program(Hinge(), BALLS[2], n=14, D=np.eye(14, dtype=np.int8)[:, :n_patterns])
    zero = Point.zero(program)
    known = multipliers_at_zero(program) if multipliers else None
    facts = {"objective": 1.0, "lower_bound": lower_bound, "multipliers": known, **facts}
    return Point(program, replace(zero.solution, **facts))


def round_of(found, is_best=True, went_back=False, improved=True):
    return Round(found, Accuracy(1e-2, 150, 0.2), is_best, went_back, improved)


def state_after(step, last, best=None, start=None, **facts):
    best = last.found if best is None else best
    start = last.found if start is None else start
    return State(start, best, NONE, last, Log(), step, **{"n_rounds": 2, **facts})


def following(state, max_rounds=3, ended=False):
    return what_follows(state, CRITERIA, max_rounds, ended)


@pytest.mark.parametrize(
    ("state", "step"),
    [
        (state_after(Step.SOLVE, round_of(point(OPEN))), Step.EXTEND),
        (state_after(Step.SOLVE, round_of(point(OPEN), improved=False)), Step.EXTEND),
        (state_after(Step.SOLVE, round_of(point(CLOSED))), Step.EXTEND),
        # Nothing that prices, or nothing to gain: the first round is always priced.
        (state_after(Step.SOLVE, round_of(point(OPEN, multipliers=False))), Step.CLOSE),
        (state_after(Step.SOLVE, round_of(point(CLOSED, multipliers=False))), Step.STOP),
        (state_after(Step.SOLVE, round_of(point(CLOSED), improved=False)), Step.STOP),
        (state_after(Step.SOLVE, round_of(point(CLOSED), improved=False), n_rounds=1), Step.EXTEND),
        # After pricing.
        (state_after(Step.EXTEND, round_of(point(OPEN)), priced=NEW), Step.SOLVE),
        (state_after(Step.EXTEND, round_of(point(OPEN)), priced=NEW, n_rounds=3), Step.CLOSE),
        (state_after(Step.EXTEND, round_of(point(OPEN)), priced=NONE), Step.CLOSE),
        (state_after(Step.EXTEND, round_of(point(CLOSED)), priced=NONE), Step.STOP),
        # The gap of the best point counts if the last round led to it.
        (
            state_after(Step.EXTEND, round_of(point(OPEN)), best=point(CLOSED), priced=NONE),
            Step.STOP,
        ),
        (
            state_after(
                Step.EXTEND, round_of(point(OPEN), is_best=False), best=point(CLOSED), priced=NONE
            ),
            Step.CLOSE,
        ),
        # Outside the cones no gap says much.
        (
            state_after(Step.EXTEND, round_of(point(CLOSED, cone_violation=0.1)), priced=NONE),
            Step.CLOSE,
        ),
        (state_after(Step.CLOSE, round_of(point(OPEN))), Step.STOP),
        (state_after(Step.START_SMALL, round_of(point(OPEN), went_back=True)), Step.STOP),
    ],
)
def test_what_follows(state, step):
    assert following(state) is step
    if step is not Step.STOP:
        assert following(state, ended=True) is Step.STOP


@pytest.mark.parametrize(
    ("facts", "found", "best", "step"),
    [
        ({"went_back": True}, point(OPEN), point(OPEN), Step.START_SMALL),
        ({"went_back": False}, point(OPEN), point(OPEN), Step.STOP),
        ({"went_back": True}, point(CLOSED), point(OPEN), Step.STOP),
        # No solver has improved the best point, or it has no fewer patterns.
        ({"went_back": True}, point(OPEN), point(OPEN, multipliers=False), Step.STOP),
        ({"went_back": True}, point(OPEN, n_patterns=1), point(OPEN), Step.STOP),
    ],
)
def test_a_small_start_follows_where_the_solver_was_lost(facts, found, best, step):
    state = state_after(Step.CLOSE, round_of(found, is_best=False, **facts), best=best)
    assert following(state) is step


def test_the_first_round_is_solved_whatever_the_time():
    state = State.at(point())
    assert following(state) is following(state, ended=True) is Step.SOLVE
    assert following(state, max_rounds=0) is Step.CLOSE
    assert following(state, max_rounds=0, ended=True) is Step.STOP


def test_a_round_is_compared_with_the_best_point_before():
    accuracy = Accuracy(1e-2, 150, 0.2)
    best, worse = point(OPEN, objective=1.0), point(OPEN, objective=1.2)
    last = Round.compared(worse, worse.at(best.solution), best, accuracy, CRITERIA)
    assert last.went_back
    assert not last.improved
    assert last.is_best  # at the weights of the best one
    better = point(OPEN, objective=0.9)
    last = Round.compared(better, better, best, accuracy, CRITERIA)
    assert last.improved
    assert last.is_best
    assert not last.went_back
    outside = point(OPEN, objective=0.5, cone_violation=0.1)
    assert Round.compared(outside, outside, best, accuracy, CRITERIA).went_back


def test_a_log_goes_on_where_the_last_solve_ended():
    row = Progress(5, 0.5, 1.0, 0.0, 0.0)
    log = Log().with_solve(1.0, point(n_iter=7, history=(row,)).solution)
    log = log.with_solve(2.0, point(n_iter=3, history=(row,)).solution)
    assert log.n_iter == 10
    assert [(entry.n_iter, entry.seconds) for entry in log.history] == [(5, 1.5), (12, 2.5)]


def test_points_and_states_are_values():
    first = point()
    state = State.at(first)
    with pytest.raises(FrozenInstanceError):
        first.program = None
    with pytest.raises(FrozenInstanceError):
        state.best = first
    joined = first.joined(NEW)
    assert (joined.n_patterns, first.n_patterns) == (5, 4)
    assert first.joined(first.program.D).n_patterns == 4
    assert joined.kept(joined.used).n_patterns == 1  # of no neurons the first pattern stays
