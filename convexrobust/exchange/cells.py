"""Pricing of all cells of the copies: a bound over all patterns, and the patterns that pay."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from convexrobust.duality import Multipliers
from convexrobust.patterns import enumerate_patterns

_NEGLIGIBLE = 1e-7  # part of the largest multiplier below which one is left out of the pricing
_PAYS = 1.0 + 1e-6  # times beta: the gain from which a cell becomes a pattern
_ALIKE = 0.97  # cosine from which two new gates count as one
_MOST_NEW = 10  # patterns an output and sign priced in a round
_SCREENING = 30  # steps of the cheap bound on a cell's gain


class Priced(NamedTuple):
    """A bound over all patterns, and patterns (n, m) that pay, with gates (d, m)."""

    lower_bound: float
    D: np.ndarray
    gates: np.ndarray


def price_cells(restricted, margins, most_cells) -> Priced:
    """Price every cell of the rows that have multipliers."""
    a = np.maximum(margins, 0.0)
    used = a.sum(axis=1) > _NEGLIGIBLE * a.sum(axis=1).max(initial=0.0)
    a = np.where(used[:, None], a, 0.0)
    cells, n = _cells(restricted.X[used], most_cells), len(used)
    D = np.zeros((n, cells.shape[1]), dtype=np.int8)
    D[used] = cells
    cones: tuple[list, list] = ([], [])
    new, gates = [np.zeros((n, 0))], [np.zeros((restricted.X.shape[1], 0))]
    for c in range(restricted.n_outputs):
        weight = np.sum(a * restricted.margin_map.directions[:, :, c], axis=1)[used]
        G = -(weight[:, None] * restricted.X[used]).T @ cells
        for sign, found in zip((1.0, -1.0), cones, strict=True):
            b = np.zeros(D.shape)
            b[used], U = dual_cones(sign * G, restricted.X[used], cells, restricted.regularizer)
            found.append(b)
            best = _distinct(U, restricted.regularizer.beta)
            u = U[:, best] / np.linalg.norm(U[:, best], axis=0)
            new.append(np.where(used[:, None], D[:, best], restricted.X @ u >= 0.0))
            gates.append(u)
    slopes = {e: np.zeros(restricted.X.shape) for e in restricted.margin_map.slope_of}
    whole = replace(restricted, D=D, formulation="hard")
    bound = whole.lower_bound(Multipliers(a, slopes, *cones))
    return Priced(bound, np.hstack(new).astype(np.int8), np.hstack(gates))


def _cells(X, most_cells):
    if len(X) == 0:
        return np.zeros((0, 1), dtype=np.int8)
    try:
        return enumerate_patterns(X, limit=most_cells)
    except ValueError as error:
        raise ValueError(
            f"the copies have too many cells for patterns='all' ({error}) Use patterns='grow' "
            f"without a bound over all patterns, fewer samples or features, or raise "
            f"most_cells={most_cells}: time and memory grow with it."
        ) from error


def dual_cones(G, X, cells, regularizer):
    """Return multipliers b >= 0 of cone rows (n, P), and what they leave of -G, (d, P).

    Cells that a cheap bound proves not to pay keep its b, the others have the best.
    """
    S, beta = 2.0 * cells - 1.0, regularizer.beta
    squares = np.maximum(np.sum(X**2, axis=1)[:, None], 1e-300)  # a row may be 0
    B, R = np.zeros(S.shape), G.copy()
    left = np.flatnonzero(np.linalg.norm(R, axis=0) > beta)
    for _ in range(_SCREENING):
        if len(left) == 0:
            break
        # The row whose multiplier lowers ||G - X'(S b)|| most takes its best value.
        step = np.maximum(S[:, left] * (X @ R[:, left]) / squares, -B[:, left])
        row = np.argmax(np.abs(step) * np.sqrt(squares), axis=0)
        step = step[row, np.arange(len(left))]
        B[row, left] += step
        R[:, left] -= X[row].T * (S[row, left] * step)
        left = left[np.linalg.norm(R[:, left], axis=0) > beta]
    for i in left:
        A = X.T * S[:, i]
        B[:, i], _ = nnls(A, G[:, i])
        R[:, i] = G[:, i] - A @ B[:, i]
    return B, -R


def _distinct(U, beta) -> list[int]:
    """Return the columns of U longer than beta, longest first, none close to one before it."""
    lengths, chosen = np.linalg.norm(U, axis=0), []
    order = np.argsort(-lengths)
    taken = np.zeros((0, len(U)))
    for i in order[lengths[order] > _PAYS * beta]:
        u = U[:, i] / lengths[i]
        if np.all(taken @ u < _ALIKE):
            chosen.append(i)
            taken = np.vstack([taken, u])
        if len(chosen) == _MOST_NEW:
            break
    return chosen
