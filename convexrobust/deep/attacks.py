r"""Attacks on torch models: any inputs, any bounds or none, one output or many.

The functions of `convexrobust.attacks` for a model, points and labels. They leave the model as they
found it (modes of its modules, buffers, the ``.grad`` of its parameters), do not write to the
tensors given, return points of the same shape, dtype and device, and check that all are inside the
ball and its bounds. Whoever normalises inputs does so inside the model, so that the ball has the
units of x.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from convexrobust import attacks as methods
from convexrobust.attacks.region import Region
from convexrobust.backends import torch as torch_backend
from convexrobust.deep.model_loss import (
    ModelLoss,
    as_two_logit,
    autograd_objective,
    left_as_found,
    model_loss,
)

__all__ = [
    "apgd",
    "as_two_logit",
    "autograd_objective",
    "fgsm",
    "pgd",
    "square",
    "worst_case",
]

NAMES = ("fgsm", "pgd", "apgd", "square")  # of attacks


def fgsm(
    model, x, y, ball, *, loss="margin", targets=None, mode="eval", batch_size=None
) -> torch.Tensor:
    """Return points one full gradient step away; see `convexrobust.attacks.fgsm`.

    Parameters
    ----------
    model, x, y, ball, loss, targets, mode, batch_size
        As in `pgd`.

    Returns
    -------
    tensor of the shape of x
        The attacked points.
    """
    attack = _on_gradients(methods.fgsm)
    return _attacked(attack, model, x, y, ball, loss, targets, mode, batch_size)


def pgd(
    model,
    x,
    y,
    ball,
    *,
    loss="margin",
    targets=None,
    n_steps=40,
    step=1.0,
    momentum=0.0,
    n_restarts=1,
    random_state=None,
    mode="eval",
    batch_size=None,
) -> torch.Tensor:
    r"""Return the worst points that projected gradient ascent meets.

    The method, with its own options, is `convexrobust.attacks.pgd`.

    Parameters
    ----------
    model : torch.nn.Module or callable
        From points (n, ...) to outputs (n,), (n, 1) or (n, C), each row from its own point.
    x : tensor of shape (n, d) or (n, c, h, w)
        The points to attack, float32 or float64.
    y : tensor of shape (n,)
        Labels: -1 / +1, 0 / 1 or bool with one output, class numbers 0 .. C-1 with several; real
        numbers for "residual".
    ball : LpBall
        The threat model; radii and bounds per feature are those of ``x[0].flatten()``.
    loss : {"margin", "cross-entropy", "residual"}
        What is increased: the largest rival's output minus the label's (:math:`-y f` with one
        output), the cross-entropy of the label, or :math:`|f - y|` of a model for regression.
    targets : tensor of shape (n,) or int, optional
        Classes whose output, or likelihood, is raised instead, one a row. An int k stands for the
        k likeliest classes but the label, one attack each; of their results the one with the
        largest ``loss`` counts (C - 1 or more: all classes).
    n_steps, step, momentum, n_restarts, random_state
        As in `convexrobust.attacks.pgd`. A generator goes on from batch to batch; without a seed,
        here and in the attacks below, torch's generator decides.
    mode : {"eval", "train", None}
        The mode the model is attacked in, None for the one it is in. In "train" batch
        normalisation makes the rows of a batch depend on each other.
    batch_size : int, optional
        Rows that are attacked at once; all by default.

    Returns
    -------
    tensor of the shape of x
        The attacked points.

    Raises
    ------
    ValueError
        If labels, targets or outputs do not fit each other, x is outside the bounds or not of
        single or double precision, or an option is not one of those above.
    FloatingPointError
        If the loss or its gradient is not finite at a point that the attack meets.
    RuntimeError
        If the result is outside the ball or the bounds.
    """
    attack = _on_gradients(
        methods.pgd,
        n_steps=n_steps,
        step=step,
        momentum=momentum,
        n_restarts=n_restarts,
        random_state=_generator(random_state, is_used=n_restarts != 1),
    )
    return _attacked(attack, model, x, y, ball, loss, targets, mode, batch_size)


def apgd(
    model,
    x,
    y,
    ball,
    *,
    loss="margin",
    targets=None,
    n_steps=100,
    n_restarts=1,
    random_state=None,
    mode="eval",
    batch_size=None,
) -> torch.Tensor:
    """Return the worst points that ascent with adaptive steps meets.

    Parameters
    ----------
    model, x, y, ball, loss, targets, mode, batch_size
        As in `pgd`. The margin loss takes the place of the difference-of-logits ratio of the
        paper, which needs three classes, or four with targets.
    n_steps, n_restarts, random_state
        As in `convexrobust.attacks.apgd`.

    Returns
    -------
    tensor of the shape of x
        The attacked points.
    """
    attack = _on_gradients(
        methods.apgd,
        n_steps=n_steps,
        n_restarts=n_restarts,
        random_state=_generator(random_state, is_used=n_restarts != 1),
    )
    return _attacked(attack, model, x, y, ball, loss, targets, mode, batch_size)


def square(
    model,
    x,
    y,
    ball,
    *,
    loss="margin",
    targets=None,
    n_queries=1000,
    share=0.8,
    random_state=None,
    mode="eval",
    batch_size=None,
) -> torch.Tensor:
    """Return the worst points that random search meets, without any gradient.

    Parameters
    ----------
    model, x, y, ball, loss, targets, mode, batch_size
        As in `pgd`. Points (n, c, h, w) are searched by squares of the image.
    n_queries, share, random_state
        As in `convexrobust.attacks.square`.

    Returns
    -------
    tensor of the shape of x
        The attacked points.
    """
    options = {
        "n_queries": n_queries,
        "share": share,
        "random_state": _generator(random_state),
    }

    def attack(objective, X, ball):
        shape = objective.shape if len(objective.shape) == 3 else None
        with torch.no_grad():
            return methods.square(objective, X, ball, shape=shape, xp=torch_backend, **options)

    return _attacked(attack, model, x, y, ball, loss, targets, mode, batch_size)


def worst_case(
    model, x, y, ball, *, attacks=None, mode="eval", batch_size=None, random_state=0
) -> torch.Tensor:
    r"""Return the worst points of several attacks, each tried on what the ones before left.

    Once a row is misclassified it is left alone, so that the share of rows that are still right is
    the robust accuracy under the worst attack for each row. Of the other rows the point with the
    smallest margin is returned.

    Parameters
    ----------
    model, x, y, ball, mode, batch_size
        As in `pgd`.
    attacks : iterable of callables, optional
        Called as ``attack(model, x, y, ball)`` on the rows that are left, returning points: the
        functions of this module, with options as ``functools.partial(pgd, n_restarts=5)``. By
        default `standard_attacks`.
    random_state : None, int or numpy.random.Generator
        For the standard attacks.

    Returns
    -------
    tensor of the shape of x
        The attacked points; misclassified rows of x are returned as they are.

    Raises
    ------
    RuntimeError
        If a point of any attack is outside the ball or the bounds.
    ValueError, FloatingPointError
        As in `pgd`.

    References
    ----------
    The plan is that of AutoAttack (Croce and Hein, arXiv 2003.01690).
    """
    x, y = _checked(x, y)
    if attacks is None:
        attacks = standard_attacks(mode=mode, batch_size=batch_size, random_state=random_state)
    worst, loss = x.clone(), _margins(model, x, y, mode, batch_size)
    for attack in attacks:
        check_attack(attack)
        left = torch.nonzero(loss < 0.0)[:, 0]
        if len(left) == 0:
            break
        points = attack(model, x[left], y[left], ball).detach()
        Region(torch_backend, x[left].flatten(1), ball).checked(points.flatten(1))
        found = _margins(model, points, y[left], mode, batch_size)
        better = found > loss[left]
        worst[left[better]], loss[left[better]] = points[better], found[better]
    return worst


def standard_attacks(*, mode="eval", batch_size=None, random_state=0):
    """Return the attacks of `worst_case`: APGD on both losses and on nine targets, and Square."""
    options = {
        "mode": mode,
        "batch_size": batch_size,
        "random_state": _generator(random_state),
    }
    return [
        partial(apgd, loss="cross-entropy", n_restarts=2, **options),
        partial(apgd, loss="margin", n_restarts=2, **options),
        partial(apgd, targets=9, **options),
        partial(square, n_queries=2000, **options),
    ]


# ------------------------------------------------------------------ one attack on batches


def _generator(random_state, *, is_used=True):
    """Return NumPy's generator; without a seed, one that torch's generator seeds if it is used.

    A training seeds torch for every epoch, and so decides what the attacks in it draw.
    """
    if random_state is None and is_used:
        random_state = int(torch.randint(2**62, ()))
    return np.random.default_rng(random_state)


def _on_gradients(method, **options):
    """Return a method of `convexrobust.attacks` as a function of a differentiable objective."""

    def attack(objective, X, ball):
        return method(autograd_objective(objective), X, ball, xp=torch_backend, **options)

    return attack


def _attacked(attack, model, x, y, ball, loss, targets, mode, batch_size):
    x, y = _checked(x, y)
    _check_targets(targets, y, loss)
    X, out = x.flatten(1), []
    # Tensors made in inference mode could never have a gradient.
    with torch.inference_mode(False), left_as_found(model, mode):
        for rows in _batches(len(X), batch_size):
            aims = targets[rows].to(x.device) if torch.is_tensor(targets) else targets
            objective = partial(model_loss, model, y[rows].clone(), x.shape[1:], loss)
            out.append(_aimed(attack, objective, aims, X[rows].clone(), ball))
    return torch.cat(out).reshape(x.shape) if out else x.clone()


def _aimed(attack, objective, targets, X, ball):
    """Return attacked points of one batch, the worst over its targets if there are several."""
    loss = objective()
    if targets is None:
        return attack(loss, X, ball)
    if torch.is_tensor(targets):
        return attack(objective(targets), X, ball)

    def towards(target):
        return lambda _, X, ball, xp: attack(objective(target), X, ball)

    each = [towards(target) for target in loss.likeliest_rivals(X, targets)]
    return methods.worst_of(autograd_objective(loss), X, ball, each, xp=torch_backend)


def _margins(model, x, y, mode, batch_size):
    """Return the margin loss of each row, above 0 where it is misclassified."""
    with torch.no_grad(), left_as_found(model, mode):
        parts = [
            ModelLoss(model, y[rows], x.shape[1:])(x[rows].flatten(1))
            for rows in _batches(len(x), batch_size)
        ]
    return torch.cat(parts) if parts else x.new_zeros(0)


def _batches(n, batch_size):
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}.")
    size = batch_size or max(n, 1)
    return [slice(first, first + size) for first in range(0, n, size)]


def check_attack(attack) -> None:
    """Raise ValueError unless it can be called as ``attack(model, x, y, ball)``.

    A name is refused with those that are known here, a class by its name.
    """
    if callable(attack) and not isinstance(attack, type):
        return
    got = f"the class {attack.__name__}" if isinstance(attack, type) else repr(attack)
    names = ", ".join(f"convexrobust.deep.attacks.{name}" for name in NAMES)
    raise ValueError(
        f"attack must be a function called as attack(model, x, y, ball): {names}, with options by "
        f"functools.partial; got {got}."
    )


def _check_targets(targets, y, loss):
    if loss == "residual" and targets is not None:
        raise ValueError("targets are classes, which loss='residual' does not have.")
    per_row = torch.is_tensor(targets) and targets.shape == y.shape
    if not (targets is None or per_row or (isinstance(targets, int) and targets >= 1)):
        raise ValueError(
            f"targets must be a tensor of shape {tuple(y.shape)} like y, or a number of classes "
            f"of at least 1, got {targets!r}."
        )


def _checked(x, y):
    if not torch.is_tensor(x) or x.dtype not in (torch.float32, torch.float64):
        kind = getattr(x, "dtype", type(x).__name__)
        raise ValueError(
            f"x must be a tensor of float32 or float64, got {kind}; in half precision the rounding "
            "is of the size of a perturbation."
        )
    y = torch.as_tensor(y, device=x.device)
    if x.ndim < 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"x must be (n, ...) with at least two axes and y (n,), got {tuple(x.shape)} and "
            f"{tuple(y.shape)}."
        )
    return x.detach(), y
