r"""Activation patterns of a data set: sample, enumerate, count, and how many a theorem asks for.

A hidden neuron with gate :math:`u \in R^d` is active on the rows of X (n x d, intercept column
included) where :math:`X u \ge 0`; its *pattern* is :math:`1[X u \ge 0] \in \{0, 1\}^n`. The
hyperplanes :math:`x_k' u = 0` cut the space of gates into cells, one pattern each. Patterns are
the columns of D (n x P), of type int8 so that 2 * D - 1 cannot wrap around.
"""

import math
import warnings
from numbers import Integral, Real

import numpy as np

_GATES_AT_ONCE = 256  # gates drawn and tested at once, at most
_PATIENCE = 2000  # draws in a row without a new pattern before the sampler gives up
_AFFORDABLE = 2000  # cells that are enumerated when the sampler gives up
_NUDGE = 1e-6  # relative shift that takes a gate off the data points it passes through
_PARALLEL = 1e-9  # normals within this angle (radian) belong to one hyperplane


def sample_patterns(X, n_patterns, *, y=None, directions="gaussian", random_state=None):
    r"""Draw distinct activation patterns :math:`1[X u \ge 0]` at random gates u.

    The all-active pattern always comes first, the others in order of appearance. It may belong to
    no cell, and is valid nevertheless: the soft program takes any 0/1 vector, and in the hard
    program the cone of such a pattern merely has no interior.

    Parameters
    ----------
    X : array-like of shape (n, d)
        Data, with the intercept column already appended if one is wanted.
    n_patterns : int
        Number of distinct patterns P, all-active included.
    y : array-like of shape (n,), optional
        Class labels, for ``directions="means"`` only.
    directions : {"gaussian", "data", "means", "pca"}, default="gaussian"
        Law of the gate u:

        - "gaussian": standard normal. The draws depend on d and not on n: repeating or dropping
          rows keeps the same hyperplanes.
        - "data": a normal, of random sign, of the hyperplane through r - 1 random rows, r = rank X.
        - "means": difference of two random class means, plus Gaussian jitter of the same length.
        - "pca": sum of the principal axes times their singular values times Gaussian weights.

        The last two put the hyperplane through a random data point by means of the first constant
        column of X; without one it passes through the origin.
    random_state : int, numpy Generator, numpy RandomState or None, default=None
        Source of randomness.

    Returns
    -------
    D : int8 array of shape (n, P)
        Distinct patterns, one a column.

    Raises
    ------
    ValueError
        If an argument is invalid, or "means" lacks labels of two classes.

    Warns
    -----
    UserWarning
        If fewer patterns than asked are returned. The sampler gives up after 2000 draws in a row
        without a new pattern; what it missed is then enumerated if `count_patterns` allows for no
        more than 2000.

    Notes
    -----
    The Gaussian law follows Bai, Gautam, Gai and Sojoudi (arXiv:2105.12237). Gates of the other
    laws touch data points and are moved by a relative 1e-6, into one of the cells around them.
    """
    X, n_patterns = _as_matrix("X", X), _as_count("n_patterns", n_patterns)
    if directions not in _DIRECTIONS:
        raise ValueError(f"directions must be one of {list(_DIRECTIONS)}, got {directions!r}.")
    rng = _as_generator(random_state)
    found = _collect(
        X, n_patterns, _DIRECTIONS[directions](X, y, min(n_patterns, _GATES_AT_ONCE), rng)
    )
    if len(found) < n_patterns:
        found = _complete(X, n_patterns, found)
    columns = b"".join(list(found)[:n_patterns])
    return np.frombuffer(columns, dtype=np.int8).reshape(-1, len(X)).T.copy()


def patterns_of(X, U):
    r"""Return the patterns :math:`D = 1[X U \ge 0]` of given gates.

    X (n, d) and U (d, m), a gate a column, give D (n, m), int8; gates of one cell give equal
    columns. Not finite or not matching matrices raise ValueError.
    """
    X, U = _as_matrix("X", X), _as_matrix("U", U)
    if U.shape[0] != X.shape[1]:
        raise ValueError(f"U must have {X.shape[1]} rows, one a column of X, got shape {U.shape}.")
    return (X @ U >= 0).astype(np.int8)


def enumerate_patterns(X, *, limit=20_000):
    r"""List all activation patterns of X exactly, one for each full-dimensional cell.

    Patterns of gates on a face, where some :math:`x_k' u = 0` counts as active, are not listed:
    such a gate lies in the closed cone of a listed pattern.

    Parameters
    ----------
    X : array-like of shape (n, d)
        Data. Zero rows are active everywhere.
    limit : int, default=20_000
        Largest number of patterns, by `count_patterns` of the distinct hyperplanes, to attempt.

    Returns
    -------
    D : int8 array of shape (n, P)
        Patterns in lexicographic order, 1 before 0: all-active comes first if it is among them.

    Raises
    ------
    ValueError
        If X is not a finite matrix, or may have more than `limit` patterns (told before the work).

    Notes
    -----
    The recursion that proves Cover's count, deletion and restriction: the cells that one more
    hyperplane splits are the cells which the earlier ones cut out of it, a problem of one
    dimension less. In the plane sorted angles give the cells, in time O(n log n). No linear
    program is needed, and of two opposite cells only one is visited. Rows within an angle of 1e-9
    of each other, in coordinates that whiten X, count as parallel.
    """
    X, limit = _as_matrix("X", X), _as_count("limit", limit)
    Z, member, side = _hyperplanes(X)
    if (most := _most_cells(Z)) > limit:
        number = most if most < 10**12 else f"about 10^{math.log10(most):.0f}"
        raise ValueError(
            f"X may have {number} patterns ({len(Z)} distinct hyperplanes, rank {Z.shape[1]}), "
            f"more than limit={limit}. Use sample_patterns, or raise limit."
        )
    if not len(Z):
        return np.ones((len(X), 1), dtype=np.int8)
    signs = side[:, None] * (2 * patterns_of(Z, _half_gates(Z)) - 1)[member]
    D = np.hstack([signs >= 0, signs <= 0]).astype(np.int8)
    return D[:, np.lexsort(~np.packbits(D, axis=0)[::-1])]


def count_patterns(n, rank):
    r"""Return Cover's count :math:`2 \sum_{k<r} \binom{n-1}{k}` of the patterns of n rows, exactly.

    It is the maximum over all data sets of rank r, attained in general position (any r rows
    independent). A rank beyond n counts as n and gives :math:`2^n`. Both arguments are positive
    integers, else ValueError.

    References
    ----------
    T. M. Cover, "Geometrical and statistical properties of systems of linear inequalities with
    applications in pattern recognition", IEEE Transactions on Electronic Computers, 1965.
    """
    n, rank = _as_count("n", n), _as_count("rank", rank)
    count = binomial = 1
    for k in range(1, min(n, rank)):
        binomial = binomial * (n - k) // k
        count += binomial
    return 2 * count


def required_patterns(n, psi, xi):
    r"""Return the number of random patterns after which one more rarely improves the optimum.

    The smallest :math:`P \ge \min\{(n+1)/(\psi\xi) - 1,\; (2/\xi)(n + 1 - \log\psi)\}`. With
    probability at least 1 - psi over P independent draws, a fresh draw from the same law improves
    the optimal value of the convex program with probability at most xi. This does NOT bound the
    distance to the optimum over all patterns: rare improvements may be large.

    Parameters
    ----------
    n : int
        Number of training rows.
    psi, xi : float
        Probabilities in (0, 1), else ValueError: that the statement fails, that a fresh pattern
        improves the optimum.

    Notes
    -----
    Following Bai, Gautam, Gai and Sojoudi (arXiv:2105.12237); repeated draws count. A pattern is
    one random convex constraint of the dual program, which has n + 1 variables in epigraph form:
    both terms are bounds of the scenario approach (Calafiore and Campi, "Uncertain convex
    programs", Mathematical Programming, 2005).
    """
    n, psi, xi = _as_count("n", n), _as_probability("psi", psi), _as_probability("xi", xi)
    return math.ceil(min((n + 1) / (psi * xi) - 1, 2 / xi * (n + 1 - math.log(psi))))


def improvement_probability(n, n_patterns, psi):
    r"""Return the smallest xi, at most 1, for which `n_patterns` draws suffice.

    The inverse of `required_patterns`,
    :math:`\min\{(n+1)/(\psi(P+1)),\; 2(n + 1 - \log\psi)/P,\; 1\}`, where 1 says nothing. It is
    rounded up, so ``required_patterns(n, psi, xi) <= n_patterns`` holds whenever xi < 1.

    Parameters
    ----------
    n, n_patterns : int
        Number of training rows and of independent draws P.
    psi : float
        Probability in (0, 1), else ValueError, that the statement fails.
    """
    n, n_patterns = _as_count("n", n), _as_count("n_patterns", n_patterns)
    psi = _as_probability("psi", psi)
    xi = min((n + 1) / (psi * (n_patterns + 1)), 2 * (n + 1 - math.log(psi)) / n_patterns)
    return min(1.0, xi * (1 + 2**-49))  # eight units in the last place cover the rounding


# Sampling: each law of gates is an endless stream of batches U (d, m).


def _gaussian(X, y, m, rng):
    while True:
        yield rng.standard_normal((m, X.shape[1])).T


def _data(X, y, m, rng):
    basis = _thin_svd(X)[1]
    Z, rank = X @ basis, basis.shape[1]
    while True:
        chosen = [Z[rng.choice(len(Z), rank - 1, replace=False)] for _ in range(m)]
        # The last Householder column is orthogonal to the rows even if they are dependent.
        normals = [np.linalg.qr(rows.T, mode="complete")[0][:, -1] for rows in chosen]
        yield _nudge(X, basis @ np.column_stack(normals) * rng.choice([-1, 1], m), rng)


def _means(X, y, m, rng):
    if y is None or np.shape(y) != (len(X),):
        raise ValueError(f'directions="means" needs y, one label for each of the {len(X)} rows.')
    labels, index, counts = np.unique(y, return_inverse=True, return_counts=True)
    if (classes := len(labels)) < 2:
        raise ValueError('directions="means" needs y of at least two classes, got one.')
    means = np.zeros((classes, X.shape[1]))
    np.add.at(means, index, X / counts[index, None])
    while True:
        first = rng.integers(classes, size=m)
        other = (first + rng.integers(1, classes, size=m)) % classes
        jitter = _unit_rows(rng.standard_normal((m, X.shape[1])))
        yield _through_points(X, (_unit_rows(means[first] - means[other]) + jitter).T, rng)


def _pca(X, y, m, rng):
    centred = X - X.mean(axis=0)
    while True:
        # If centred = L S V', then centred' h has the law of V S g for Gaussian g, h: no SVD.
        yield _through_points(X, centred.T @ rng.standard_normal((len(X), m)), rng)


_DIRECTIONS = {"gaussian": _gaussian, "data": _data, "means": _means, "pca": _pca}


def _through_points(X, U, rng):
    """Shift each hyperplane, by the gate's entry of a constant column, to a random data point."""
    constant = np.flatnonzero((np.ptp(X, axis=0) == 0) & (X[0] != 0))
    points = X[rng.integers(len(X), size=U.shape[1])]
    for column in constant[:1]:
        U[column] = 0
        U[column] = -np.einsum("md,dm->m", points, U) / X[0, column]
    return _nudge(X, U, rng)


def _nudge(X, U, rng):
    """Move gates off the data points they touch, where rounding would choose the side."""
    scales = np.linalg.norm(X, axis=0)[:, None]  # so that the units of a feature do not matter
    scales[scales == 0] = 1
    sizes = np.linalg.norm(scales * U, axis=0)
    return U + _NUDGE * sizes / scales * rng.standard_normal(U.shape)


def _collect(X, n_patterns, gates):
    """Draw until enough patterns are found or patience ends; a dict keeps order of appearance."""
    found, fruitless = _columns(np.ones((len(X), 1), dtype=np.int8)), 0
    for U in gates:
        before = len(found)
        found |= _columns(patterns_of(X, U))
        fruitless = 0 if len(found) > before else fruitless + U.shape[1]
        if len(found) >= n_patterns or fruitless >= _PATIENCE:
            return found


def _complete(X, n_patterns, found):
    """Enumerate what the sampler missed if that is affordable; warn of what is still missing."""
    why = f"{_PATIENCE} draws in a row gave no new one. Ask for fewer, or try other directions."
    if _most_cells(_hyperplanes(X)[0]) <= _AFFORDABLE:
        found = found | _columns(enumerate_patterns(X, limit=_AFFORDABLE))
        why = f"X has no more. Ask for at most {len(found)}."
    if len(found) < n_patterns:
        message = f"{n_patterns} patterns were asked for, {len(found)} found: {why}"
        warnings.warn(message, UserWarning, stacklevel=3)
    return found


def _columns(D):
    return dict.fromkeys(map(bytes, np.ascontiguousarray(D.T)))


# Enumeration: Z (n, r) holds unit normals, a gate is any point inside a cell.


def _hyperplanes(X):
    """Return normals Z (m, r) of the distinct hyperplanes, and each row's one and side of it.

    The side is -1 or 1, and 0 for a zero row. Z is whitened (X = L S V' has the cells of L), which
    opens narrow cells.
    """
    A = _unit_rows(_unit_rows(X.T).T)  # scaling a row or a column changes no pattern
    lead = np.take_along_axis(A, np.argmax(abs(A) > _PARALLEL, axis=1)[:, None], axis=1)
    side, nonzero = np.sign(lead[:, 0]).astype(np.int8), A.any(axis=1)
    member = np.zeros(len(X), dtype=int)
    if not nonzero.any():
        return np.empty((0, 0)), member, side
    A = (A * side[:, None])[nonzero]
    # Rounding may separate a parallel pair; _gates_beside and _plane_gates merge it later.
    _, first, inverse = np.unique(A.round(12), axis=0, return_index=True, return_inverse=True)
    member[nonzero] = inverse.ravel()
    return _unit_rows(_thin_svd(A[first])[0]), member, side


def _most_cells(Z):
    return count_patterns(*Z.shape) if len(Z) else 1


def _half_gates(Z):
    """Return gates (r, P / 2), one for each pair of opposite cells."""
    if Z.shape[1] <= 2:
        return np.ones((1, 1)) if Z.shape[1] == 1 else _plane_gates(Z)
    U = Z[:1].T
    for k in range(1, len(Z)):
        # New gates come first and the first gate of a cell is kept: an old gate may lie on the new
        # hyperplane, but only if that splits its cell. So a gate's margin never shrinks.
        U = np.hstack([_gates_beside(Z[k], Z[:k]), U])
        signs = Z[: k + 1] @ U > 0
        cells = np.packbits(signs == signs[0], axis=0)  # the same for opposite cells
        U = U[:, np.unique(cells, axis=1, return_index=True)[1]]
    return U


def _plane_gates(Z):
    """Return the bisectors of the sectors between the lines; one of no width is a double line."""
    lines = np.sort(np.arctan2(Z[:, 0], -Z[:, 1]) % np.pi)
    widths = np.diff(lines, append=lines[0] + np.pi)
    angles = (lines + widths / 2)[widths > _PARALLEL]
    return np.stack([np.cos(angles), np.sin(angles)])


def _gates_beside(z, Z):
    """Return gates on both sides of each cell that the hyperplanes Z cut out of that of z."""
    basis = np.linalg.qr(z[:, None], mode="complete")[0][:, 1:]
    restricted = Z @ basis
    if np.linalg.norm(restricted, axis=1).min() <= _PARALLEL:
        return np.empty((len(z), 0))  # z repeats one of Z and splits nothing
    W = basis @ _half_gates(_unit_rows(restricted))
    step = abs(Z @ W).min(axis=0) / 2 * z[:, None]  # unit normals: half the margin is left
    return np.hstack([W + step, W - step])


def _unit_rows(A):
    norms = np.linalg.norm(A, axis=1, keepdims=True)
    return A / np.where(norms > 0, norms, 1)


def _thin_svd(X):
    """Return orthonormal bases (n, r) and (d, r) of X's column and row space, r at least 1."""
    left, values, right = np.linalg.svd(X, full_matrices=False)
    noise = values[0] * max(X.shape) * np.finfo(float).eps
    rank = max(1, np.count_nonzero(values > noise))
    return left[:, :rank], right[:rank].T


def _as_matrix(name, value):
    value = np.asarray(value, dtype=float)
    if value.ndim != 2 or not value.size:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {value.shape}.")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity.")
    return value


def _as_count(name, value):
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return int(value)


def _as_probability(name, value):
    if not isinstance(value, Real) or not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}.")
    return float(value)


def _as_generator(seed):
    if isinstance(seed, np.random.RandomState):
        seed = seed.randint(2**31, size=4)
    try:
        return np.random.default_rng(seed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"random_state must be None, int or generator, got {seed!r}.") from error
