"""What solvers return: its statuses are values, whoever writes them."""

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

import convexrobust
from convexrobust.certificates import Verdict, certify
from convexrobust.network import TwoLayerReLU
from convexrobust.perturbations import LpBall
from convexrobust.solution import Scope, Solution, Status
from convexrobust.solvers.monitor import warn_early

ZERO = np.zeros((1, 2, 3))


def test_a_status_is_a_member_and_a_string():
    solution = Solution(ZERO, ZERO, 1.0, status="time limit", lower_bound_scope="all patterns")
    assert solution.status is Status.TIME_LIMIT is convexrobust.Status("time limit")
    assert solution.lower_bound_scope is Scope.ALL_PATTERNS
    assert solution.status == "time limit"
    assert f"{solution.status}, {solution.lower_bound_scope}" == "time limit, all patterns"
    assert pickle.loads(pickle.dumps(solution)).status is Status.TIME_LIMIT


def test_a_status_that_nobody_gave_is_unknown():
    assert Solution(ZERO, ZERO, 1.0).status is Status.UNKNOWN


@pytest.mark.parametrize("wrong", ["whatever", "Optimal", None, 3, ["optimal"], np.zeros(2)])
@pytest.mark.parametrize(
    ("argument", "legal"), [("status", "iteration limit"), ("lower_bound_scope", "all patterns")]
)
def test_a_status_of_no_meaning_is_refused_with_those_that_have_one(argument, wrong, legal):
    message = f"{argument} must be one of .*'{legal}'.*; got {re.escape(repr(wrong))}"
    with pytest.raises(ValueError, match=message):
        Solution(ZERO, ZERO, 1.0, **{argument: wrong})
    with pytest.raises(ValueError, match=message):
        replace(Solution(ZERO, ZERO, 1.0), **{argument: wrong})


@pytest.mark.parametrize("status", Status)
def test_warnings_quote_the_string(status):
    solution = Solution(ZERO, ZERO, 1.0, status=status, solver="some solver")
    with pytest.warns(ConvergenceWarning, match=f"some solver stopped with status '{status}' "):
        warn_early(solution)


def test_verdicts_are_strings_in_arrays():
    network = TwoLayerReLU(np.eye(2), np.array([[1.0], [-1.0]]), intercept=False)
    X = np.array([[5.0, 0.0], [0.0, 5.0], [1.0, 0.9]])
    status = certify(network, X, np.ones(3), LpBall(np.inf, 0.2)).status
    assert type(status[0]) is np.str_
    np.testing.assert_array_equal(status, ["robust", "broken", "unknown"])
    np.testing.assert_array_equal(status == Verdict.UNKNOWN, [False, False, True])
