"""Patterns against brute force, linear programs and the theorems that count cells."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog

from convexrobust.patterns import (
    count_patterns,
    enumerate_patterns,
    improvement_probability,
    patterns_of,
    required_patterns,
    sample_patterns,
)

DIRECTIONS = ["gaussian", "data", "means", "pca"]


def gaussian_data(n, d, rank=None, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X if rank is None else rng.standard_normal((n, rank)) @ X[:rank]


def with_intercept(X):
    return np.column_stack([X, np.ones(len(X))])


def grid(levels, d):
    return np.array(list(itertools.product(levels, repeat=d)), dtype=float)


def column_set(D):
    return {tuple(column) for column in D.T.tolist()}


def margin(X, signs):
    """Largest t with signs_k x_k'u >= t |x_k| for some u in the unit box: positive in a cell."""
    norms = np.linalg.norm(X, axis=1)
    rows = (signs[:, None] * X / norms[:, None])[norms > 0]
    d = X.shape[1]
    result = linprog(
        np.append(np.zeros(d), -1),
        A_ub=np.column_stack([-rows, np.ones(len(rows))]),
        b_ub=np.zeros(len(rows)),
        bounds=[(-1, 1)] * d + [(None, 1)],
    )
    return -result.fun


def patterns_by_linear_programs(X):
    """Grow the sign vectors row by row and keep those with a strictly feasible gate."""
    nonzero = X.any(axis=1)
    rows = X[nonzero]
    prefixes = [()]
    for k in range(1, len(rows) + 1):
        grown = ((*prefix, sign) for prefix in prefixes for sign in (1, -1))
        prefixes = [signs for signs in grown if margin(rows[:k], np.array(signs)) > 1e-6]
    D = np.ones((len(X), len(prefixes)), dtype=np.int8)
    D[nonzero] = (np.array(prefixes).T + 1) // 2
    return D


def whitney_count(X):
    """Number of cells, sum over the subsets S of the rows of (-1)^(|S| - rank S)."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(X)), k) for k in range(1, len(X) + 1)
    )
    return 1 + sum((-1) ** (len(S) - np.linalg.matrix_rank(X[list(S)])) for S in map(list, subsets))


# Degenerate data on which the exact set is known to be delicate.
DEGENERATE = {
    "rank deficient": gaussian_data(9, 5, rank=3),
    "zero row": np.vstack([gaussian_data(6, 3), np.zeros(3)]),
    "duplicate rows": np.repeat(gaussian_data(5, 3), 2, axis=0),
    "scaled rows": np.vstack([gaussian_data(5, 3), math.pi * gaussian_data(5, 3)]),
    "antiparallel rows": np.vstack([gaussian_data(5, 3), -math.e * gaussian_data(5, 3)]),
    "cube": with_intercept(grid([0, 1], 3)),
    "lattice of the plane": grid([-1, 0, 1], 2),
    "coplanar normals": np.vstack([np.eye(3), [1, 1, 0], [1, 1, 1], [0, 1, 1], [1, 0, -1]]),
    "one hyperplane": np.array([[0.0, 2.0, -1.0], [0.0, -4.0, 2.0]]),
    "one column": np.array([[1.0], [-2.0], [0.0], [3.0]]),
}


@pytest.fixture(params=DEGENERATE, ids=lambda name: name.replace(" ", "-"))
def degenerate(request):
    return DEGENERATE[request.param]


class TestPatternsOf:
    def test_definition_with_zero_active(self):
        D = patterns_of([[1, 0], [0, 1], [0, 0]], [[1, -1, 0], [-2, 0, 3]])
        assert D.dtype == np.int8
        assert D.tolist() == [[1, 0, 1], [0, 1, 1], [1, 1, 1]]

    @pytest.mark.parametrize("U", [np.ones((3, 1)), np.ones(2), [[np.inf], [0]]])
    def test_bad_gates(self, U):
        with pytest.raises(ValueError, match=r"^U must"):
            patterns_of(np.ones((4, 2)), U)


class TestCount:
    @pytest.mark.parametrize(
        ("n", "rank", "count"), [(6, 2, 12), (8, 3, 58), (10, 4, 260), (12, 5, 1124), (20, 3, 382)]
    )
    def test_known_values(self, n, rank, count):
        assert count_patterns(n, rank) == count

    def test_independent_rows_take_all_signs(self):
        assert count_patterns(7, 7) == count_patterns(7, 9) == 2**7

    @given(st.integers(2, 300), st.integers(2, 60))
    def test_deletion_and_restriction(self, n, rank):
        split = count_patterns(n - 1, rank - 1)
        assert count_patterns(n, rank) == count_patterns(n - 1, rank) + split

    def test_exact_beyond_floats(self):
        assert count_patterns(5000, 5000) == 2**5000

    @pytest.mark.parametrize("bad", [0, -1, 2.0, True, "3", None])
    def test_bad_arguments(self, bad):
        with pytest.raises(ValueError, match=r"^n must"):
            count_patterns(bad, 2)
        with pytest.raises(ValueError, match=r"^rank must"):
            count_patterns(5, bad)


class TestEnumerate:
    @pytest.mark.parametrize(
        ("n", "d"), [(1, 1), (6, 2), (50, 2), (8, 3), (40, 3), (10, 4), (12, 5), (9, 9), (6, 8)]
    )
    def test_general_position_attains_covers_count(self, n, d):
        D = enumerate_patterns(gaussian_data(n, d))
        assert len(column_set(D)) == D.shape[1] == count_patterns(n, d)

    def test_full_circle_of_gates(self):
        X = gaussian_data(9, 2, seed=1)
        angles = np.linspace(0, 2 * np.pi, 20_001)
        swept = patterns_of(X, np.stack([np.cos(angles), np.sin(angles)]))
        assert column_set(enumerate_patterns(X)) == column_set(swept)

    def test_dense_sampling_of_directions(self):
        X = gaussian_data(7, 3, seed=2)
        sampled = patterns_of(X, gaussian_data(3, 50_000))
        assert column_set(enumerate_patterns(X)) == column_set(sampled)

    def test_degenerate_data_against_linear_programs(self, degenerate):
        D = enumerate_patterns(degenerate)
        assert D.dtype == np.int8
        assert len(column_set(D)) == D.shape[1]
        assert column_set(D) == column_set(patterns_by_linear_programs(degenerate))

    @pytest.mark.parametrize("X", [gaussian_data(14, 4), with_intercept(grid([0, 1], 3))])
    def test_every_pattern_has_a_strict_witness(self, X):
        assert all(margin(X, signs) > 1e-7 for signs in 2.0 * enumerate_patterns(X).T - 1)

    @pytest.mark.parametrize(("d", "count"), [(1, 4), (2, 14), (3, 104), (4, 1882)])
    def test_threshold_functions(self, d, count):
        # The patterns of the corners of a cube are the linear threshold functions (OEIS A000609).
        assert enumerate_patterns(with_intercept(grid([0, 1], d))).shape[1] == count

    def test_reflection_arrangement(self):
        # The hyperplanes +-u_i = u_j and u_i = 0 have as many cells as B_4 has elements, 2^4 4!.
        pairs = itertools.combinations(np.eye(4), 2)
        X = np.vstack([np.eye(4), *([a - b, a + b] for a, b in pairs)])
        assert enumerate_patterns(X).shape[1] == 2**4 * math.factorial(4)

    @settings(max_examples=40)
    @given(
        arrays(int, st.tuples(st.integers(1, 7), st.integers(1, 4)), elements=st.integers(-2, 2))
    )
    def test_small_integers_against_whitneys_count(self, X):
        D = enumerate_patterns(X)
        assert len(column_set(D)) == D.shape[1] == whitney_count(X[X.any(axis=1)])

    @pytest.mark.parametrize(
        "change",
        [
            gaussian_data(3, 3, seed=3),
            np.diag([1e6, 1e-6, 1]),
            [[1, 0, 0], [0, 1, 0], [1e5, 1e5, 1]],
        ],
        ids=["generic", "units", "far from the origin"],
    )
    def test_invariant_under_a_change_of_coordinates(self, change):
        X = with_intercept(grid([-1, 0, 1], 2))
        np.testing.assert_array_equal(enumerate_patterns(X), enumerate_patterns(X @ change))

    def test_repeated_and_opposite_rows(self):
        X = gaussian_data(6, 3)
        D = enumerate_patterns(X)
        E = enumerate_patterns(np.vstack([X, 3 * X[:2], -X[2:4], np.zeros(3)]))
        np.testing.assert_array_equal(E, np.vstack([D, D[:2], 1 - D[2:4], np.ones_like(D[:1])]))

    def test_order(self):
        D = enumerate_patterns(with_intercept(gaussian_data(11, 2)))
        columns = [tuple(column) for column in D.T.tolist()]
        assert columns == sorted(columns, reverse=True)
        assert all(columns[0])

    def test_all_zero_data(self):
        assert enumerate_patterns(np.zeros((3, 2))).tolist() == [[1], [1], [1]]

    def test_guard_counts_distinct_hyperplanes(self):
        X = gaussian_data(12, 5)
        with pytest.raises(ValueError, match=r"1124 patterns.*limit=1123.*sample_patterns"):
            enumerate_patterns(np.vstack([X, -2 * X]), limit=1123)
        with pytest.raises(ValueError, match=r"2 distinct hyperplanes"):
            enumerate_patterns([[1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [-1.0, 0.0]], limit=1)
        assert enumerate_patterns(np.vstack([X, -2 * X]), limit=1124).shape[1] == 1124

    def test_guard_comes_before_the_work(self):
        with pytest.raises(ValueError, match=r"about 10\^107 patterns .*limit=20000"):
            enumerate_patterns(gaussian_data(500, 100))

    @pytest.mark.parametrize("limit", [0, 1.5, None])
    def test_bad_limit(self, limit):
        with pytest.raises(ValueError, match=r"^limit must"):
            enumerate_patterns(np.eye(2), limit=limit)


@pytest.mark.parametrize("directions", DIRECTIONS)
class TestSample:
    X = with_intercept(gaussian_data(12, 3))
    y = np.repeat([0, 1, 2], 4)

    def sample(self, X, n_patterns, directions, random_state=0):
        y = np.arange(len(X)) % 3
        return sample_patterns(X, n_patterns, y=y, directions=directions, random_state=random_state)

    def test_distinct_realisable_and_all_active_first(self, directions):
        D = self.sample(self.X, 100, directions)
        assert D.dtype == np.int8
        assert D.shape == (12, 100)
        assert len(column_set(D)) == 100
        assert D[:, 0].all()
        assert column_set(D) <= column_set(enumerate_patterns(self.X))

    @pytest.mark.parametrize("make", [int, np.random.default_rng, np.random.RandomState])
    def test_reproducible(self, directions, make):
        first, again, other = (self.sample(self.X, 20, directions, make(s)) for s in (7, 7, 8))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_degenerate_data(self, directions, degenerate):
        exact = enumerate_patterns(degenerate)
        all_active = (1,) * len(degenerate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            D = self.sample(degenerate, 30, directions)
        assert D.shape[1] == min(30, len(column_set(exact) | {all_active}))
        assert column_set(D) - {all_active} <= column_set(exact)

    def test_too_many_warns_and_returns_all(self, directions):
        X = with_intercept(gaussian_data(6, 2))
        with pytest.warns(UserWarning, match=r"^100 patterns .* 32 found: X has no more.* 32"):
            D = self.sample(X, 100, directions)
        assert column_set(D) == column_set(enumerate_patterns(X))

    def test_random_state_none(self, directions):
        assert self.sample(self.X, 9, directions, random_state=None).shape == (12, 9)

    @pytest.mark.parametrize("seed", [-1, 0.5, "seed"])
    def test_bad_random_state(self, directions, seed):
        with pytest.raises(ValueError, match=r"^random_state must"):
            self.sample(self.X, 5, directions, random_state=seed)

    @pytest.mark.parametrize("n_patterns", [0, -3, 2.0, True, "4", None])
    def test_bad_n_patterns(self, directions, n_patterns):
        with pytest.raises(ValueError, match=r"^n_patterns must"):
            self.sample(self.X, n_patterns, directions)

    def test_one_pattern_is_all_active(self, directions):
        assert self.sample(self.X, 1, directions).tolist() == [[1]] * 12


class TestSampleLaws:
    def test_gaussian_hyperplanes_do_not_depend_on_the_rows(self):
        X = gaussian_data(20, 4)
        D = sample_patterns(X, 50, random_state=3)
        repeated = sample_patterns(np.repeat(X, 3, axis=0), 50, random_state=3)
        np.testing.assert_array_equal(repeated, np.repeat(D, 3, axis=0))
        dropped = sample_patterns(X[5:], 15, random_state=3)
        assert column_set(dropped) <= column_set(D[5:])

    def test_fewer_gaussian_patterns_are_the_first_ones(self):
        X = gaussian_data(20, 4)
        D = sample_patterns(X, 300, random_state=3)
        np.testing.assert_array_equal(sample_patterns(X, 40, random_state=3), D[:, :40])

    def test_all_active_need_not_be_realisable(self):
        X = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
        with pytest.warns(UserWarning, match="5 found"):
            D = sample_patterns(X, 6, random_state=0)
        assert column_set(D) == column_set(enumerate_patterns(X)) | {(1, 1, 1)}

    def test_all_zero_data(self):
        with pytest.warns(UserWarning, match="1 found"):
            assert sample_patterns(np.zeros((2, 3)), 2, directions="data").tolist() == [[1], [1]]

    def test_rare_patterns_are_completed_without_warning(self):
        # Two rows a millionth of a radian apart: no sampler meets the two cells between them.
        X = np.array([[1.0, 0.0], [1.0, 1e-6], [0.0, 1.0]])
        assert sample_patterns(X, 6, random_state=0).shape == (3, 6)

    def test_stalled_sampler_warns_where_enumeration_is_too_dear(self):
        # Sixty needles along one axis: general position, but hardly a gate tells them apart.
        X = np.column_stack([np.ones(60), 1e-7 * gaussian_data(60, 3)])
        with pytest.warns(UserWarning, match=r"^500 patterns .* draws in a row .* directions"):
            D = sample_patterns(X, 500, random_state=0)
        assert 2 <= D.shape[1] < 500

    def test_data_gates_touch_rank_minus_one_rows(self):
        # Next to a vertex of the arrangement: flipping some rank - 1 = 2 rows meets all four cells.
        X = with_intercept(gaussian_data(10, 2))
        exact = column_set(enumerate_patterns(X))
        D = sample_patterns(X, 40, directions="data", random_state=1)[:, 1:]
        for column in D.T:
            flips = (
                [tuple(column ^ np.isin(np.arange(10), s)) for s in ([i], [j], [i, j])]
                for i, j in itertools.combinations(range(10), 2)
            )
            assert any(exact.issuperset(corner) for corner in flips)

    def test_data_gates_have_random_signs(self):
        X = with_intercept(gaussian_data(40, 3))
        D = sample_patterns(X, 400, directions="data", random_state=0)
        assert np.abs(D.mean(axis=1) - 0.5).max() < 0.15

    def test_means_separate_distant_classes(self):
        y = np.arange(30) % 2
        X = with_intercept(gaussian_data(30, 5) + 40 * y[:, None])
        D = sample_patterns(X, 40, y=y, directions="means", random_state=0)
        assert column_set(D) & {tuple(y), tuple(1 - y)}
        # The threshold goes through a data point: the larger class is rarely cut in Gaussian draws.
        assert len(set(D.sum(axis=0))) > 10

    def test_pca_thresholds_along_the_long_axis(self):
        X = gaussian_data(30, 4) * [1000, 1e-3, 1e-3, 1e-3]
        D = sample_patterns(with_intercept(X), 60, directions="pca", random_state=0)
        assert (np.diff(D[np.argsort(X[:, 0])], axis=0) != 0).sum(axis=0).max() == 1

    @pytest.mark.parametrize("directions", ["means", "pca"])
    def test_units_of_the_features_do_not_move_the_threshold_off_the_data(self, directions):
        y = np.arange(40) % 2
        X = with_intercept(1e4 + gaussian_data(40, 2))
        D = sample_patterns(X, 40, y=y, directions=directions, random_state=0)
        assert len(set(D.sum(axis=0))) > 15

    def test_labels_may_be_strings(self):
        y = ["a", "b", "c", "d"] * 3
        X = gaussian_data(12, 3)
        assert sample_patterns(X, 10, y=y, directions="means", random_state=0).shape == (12, 10)

    @pytest.mark.parametrize("y", [None, np.zeros(6), np.arange(5), np.eye(6)])
    @pytest.mark.parametrize("n_patterns", [1, 5])
    def test_means_needs_labels(self, y, n_patterns):
        with pytest.raises(ValueError, match="needs y"):
            sample_patterns(gaussian_data(6, 2), n_patterns, y=y, directions="means")

    def test_unknown_directions(self):
        with pytest.raises(ValueError, match=r"directions must be one of .*'pca'.*'svm'"):
            sample_patterns(np.eye(3), 2, directions="svm")


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[np.nan]], [[np.inf, 1]], np.empty((0, 2)), 3.0])
def test_bad_data(bad):
    for function in (
        lambda X: sample_patterns(X, 3),
        lambda X: patterns_of(X, [[1.0]]),
        enumerate_patterns,
    ):
        with pytest.raises(ValueError, match=r"^X must"):
            function(bad)


class TestTheorem:
    PSI = (1e-6, 0.05, 0.3, 0.5, 0.9)

    @pytest.mark.parametrize("n", [1, 10, 1000])
    @pytest.mark.parametrize("psi", PSI)
    @pytest.mark.parametrize("xi", [1e-4, 0.03, 0.5, 0.99])
    def test_smallest_number_that_satisfies_the_bound(self, n, psi, xi):
        bound = min((n + 1) / (psi * xi) - 1, 2 / xi * (n + 1 - math.log(psi)))
        P = required_patterns(n, psi, xi)
        assert isinstance(P, int)
        assert P - 1 < bound <= P

    @pytest.mark.parametrize("n", [1, 7, 100, 5000])
    @pytest.mark.parametrize("psi", PSI)
    def test_inverse(self, n, psi):
        for P in [*range(1, 60), *np.geomspace(60, 1e7, 60).astype(int)]:
            xi = improvement_probability(n, int(P), psi)
            assert 0 < xi <= 1
            if xi < 1:
                assert required_patterns(n, psi, xi) <= P
                assert required_patterns(n, psi, xi * (1 - 1e-9)) >= P

    def test_few_draws_say_nothing(self):
        assert improvement_probability(100, 5, 0.05) == 1

    def test_the_simulated_probability_is_below_the_bound(self):
        # One dual variable: minimise it above all draws. A fresh draw helps if it is a new maximum.
        psi, P = 0.1, 60
        draws = np.random.default_rng(0).random((2000, P))
        xi = improvement_probability(1, P, psi)
        assert xi < 1
        assert np.mean(1 - draws.max(axis=1) > xi) <= psi

    @pytest.mark.parametrize("bad", [0, 1, -0.1, 1.5, math.nan, "0.5", None])
    def test_bad_probabilities(self, bad):
        with pytest.raises(ValueError, match=r"^psi must"):
            required_patterns(5, bad, 0.1)
        with pytest.raises(ValueError, match=r"^xi must"):
            required_patterns(5, 0.1, bad)
        with pytest.raises(ValueError, match=r"^psi must"):
            improvement_probability(5, 3, bad)

    @pytest.mark.parametrize("bad", [0, 2.5, None])
    def test_bad_counts(self, bad):
        with pytest.raises(ValueError, match=r"^n must"):
            required_patterns(bad, 0.1, 0.1)
        with pytest.raises(ValueError, match=r"^n must"):
            improvement_probability(bad, 3, 0.1)
        with pytest.raises(ValueError, match=r"^n_patterns must"):
            improvement_probability(5, bad, 0.1)
