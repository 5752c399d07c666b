"""The margins of a task as linear functions of the outputs, each scaled as a loss asks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from convexrobust.losses import Loss, LossKind


class MarginMap(NamedTuple):
    """How the margins of a sample depend on the outputs: m_ke = sum_c T_kec f_c(x_k) + b_ke.

    Attributes
    ----------
    directions : ndarray of shape (n, E, C)
        T: the entries -1, 0, 1 of the task, times the loss's scale of the margin.
    offsets : ndarray of shape (n, E)
        b.
    slope_of : tuple of int
        For each margin the first with the same direction up to sign: they share a slope. Those
        whose directions are of different lengths do not.
    """

    directions: np.ndarray
    offsets: np.ndarray
    slope_of: tuple[int, ...]


_TASKS = ("classification", "regression")


def check_loss(loss, n_outputs):
    """Raise ValueError for what is no loss, or one that says of itself what cannot be."""
    if not isinstance(loss, Loss):
        raise ValueError(
            "loss must be an object derived from convexrobust.losses.Loss, e.g. Hinge(); got "
            f"{loss!r}."
        )
    kinds = tuple(str(kind) for kind in LossKind)
    _check_attribute(loss, "task", lambda task: task in _TASKS, f"one of {_TASKS}")
    _check_attribute(
        loss, "kind", lambda kind: kind in kinds, f"one of {kinds}, of which 'other' says nothing"
    )
    _check_attribute(
        loss, "largest_multiplier", lambda most: most > 0.0, "a positive number, inf for no limit"
    )
    if loss.kind == LossKind.SMALLEST_MARGIN:
        _check_attribute(loss, "threshold", np.isfinite, "a finite number")
        _check_attribute(
            loss, "steepness", lambda s: 0.0 <= s < np.inf, "a finite number >= 0, 0 for linear"
        )
    _check_margins(loss, n_outputs)


def _check_attribute(loss, attribute, is_legal, legal):
    """Raise ValueError unless an attribute of a loss is there and legal."""
    given = getattr(loss, attribute, None)
    try:
        fine = bool(is_legal(given))
    except (TypeError, ValueError):  # of another type than the comparison's
        fine = False
    if not fine:
        says = "has none" if given is None else f"says {given!r}"
        raise ValueError(f"loss.{attribute} must be {legal}; {type(loss).__name__} {says}.")


def _check_margins(loss, n_outputs):
    """Raise ValueError for scales or limits of a loss's margins that cannot be."""
    n_margins = 2 if loss.task == "regression" else max(n_outputs - 1, 1)
    for attribute, finite in (("margin_scales", True), ("margin_limits", False)):
        given = getattr(loss, attribute)
        try:
            values = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.zeros(1)
        legal = values.shape in ((), (n_margins,)) and bool(np.all(values > 0.0))
        if not legal or (finite and not np.isfinite(values).all()):
            raise ValueError(
                f"loss.{attribute} must be one positive number or a tuple of {n_margins}, one for "
                f"each margin; {type(loss).__name__} says {given!r}."
            )
    if loss.kind != LossKind.OTHER and np.isfinite(loss.margin_limits).any():
        raise ValueError(
            f"loss.margin_limits are for the kind 'other', but {type(loss).__name__} is of kind "
            f"{str(loss.kind)!r}, whose conjugate limits only the sum: set largest_multiplier."
        )


def margin_map(loss, y, n_outputs) -> MarginMap:
    """Return which combinations of outputs the margins of a loss are, for targets y (n,)."""
    directions, offsets, slope_of = _unscaled_margins(loss.task, y, n_outputs)
    scales = np.broadcast_to(np.asarray(loss.margin_scales, dtype=np.float64), len(slope_of))
    if np.all(scales == 1.0):
        return MarginMap(directions, offsets, slope_of)
    if np.any(scales != scales[0]):
        slope_of = tuple(range(len(scales)))
    return MarginMap(scales[:, None] * directions, scales * offsets, slope_of)


def _unscaled_margins(task, y, n_outputs):
    """Return the directions, offsets and shared slopes of a task's margins."""
    n = len(y)
    if task == "regression":
        directions = np.broadcast_to(np.array([[-1.0], [1.0]]), (n, 2, 1))
        return directions, np.column_stack([y, -y]).astype(np.float64), (0, 0)
    if n_outputs == 1:
        return y.astype(np.float64)[:, None, None], np.zeros((n, 1)), (0,)
    y = y.astype(np.intp)
    identity = np.eye(n_outputs)
    rivals = np.array([[c for c in range(n_outputs) if c != label] for label in range(n_outputs)])
    directions = identity[y][:, None, :] - identity[rivals[y]]
    return directions, np.zeros(directions.shape[:2]), tuple(range(n_outputs - 1))
