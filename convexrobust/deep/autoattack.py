"""AutoAttack by its authors, for what it can do: images in [0, 1] with at least four classes."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch

from convexrobust.attacks.region import Region
from convexrobust.backends import torch as torch_backend
from convexrobust.deep.model_loss import left_as_found

VERSIONS = ("standard", "plus", "rand")
_NORMS = {np.inf: "Linf", 2: "L2", 1: "L1"}
_FEWEST_CLASSES = 4  # its DLR loss compares the largest output with the third largest rival
_FEWEST_PIXELS = 5  # in height: its Square Attack in l2 divides by a fifth of it
_ALTERNATIVE = "Use convexrobust.deep.attacks.worst_case instead, which takes any model and bounds."


def autoattack(
    model, x, y, ball, *, version="standard", batch_size=250, random_state=0
) -> torch.Tensor:
    """Return the points of AutoAttack (the package ``pyautoattack``), checked.

    Parameters
    ----------
    model : torch.nn.Module
        From images to outputs (n, C), logits; attacked in eval mode and left as it was.
    x : tensor of shape (n, c, h, w)
        Images in [0, 1].
    y : tensor of shape (n,)
        Class numbers 0 .. C-1.
    ball : LpBall
        One radius for all features, and no bounds or (0, 1).
    version : {"standard", "plus", "rand"}
        Which attacks it consists of.
    batch_size : int
        Rows attacked at once.
    random_state : int
        Seed.

    Returns
    -------
    tensor of the shape of x
        Attacked points; where it found none, x.

    Raises
    ------
    ImportError
        Without ``pyautoattack``.
    ValueError
        For what it would crash on, or silently do something else with: points that are no images
        or outside [0, 1], other bounds, radii that differ, fewer than four classes.
    RuntimeError
        If a point is outside the ball or the bounds.

    References
    ----------
    Croce and Hein, arXiv 2003.01690.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {VERSIONS}, got {version!r}.")
    if len(x) == 0:
        return x.clone()
    with torch.no_grad(), left_as_found(model, "eval"):
        n_classes = _checked_classes(model, x, y, ball)
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError(
            "autoattack needs pyautoattack: pip install 'convexrobust[autoattack]'."
        ) from error
    region = Region(torch_backend, x.flatten(1), type(ball)(ball.p, ball.epsilon, (0.0, 1.0)))
    # It sets torch's global seed.
    with torch.random.fork_rng(), left_as_found(model, "eval"), _frozen(model):
        attack = AutoAttack(
            model,
            norm=_NORMS[ball.p],
            eps=ball.radius,
            seed=random_state,
            version=version,
            device=x.device,
        )
        # Its nine targets are an index error for fewer than ten classes.
        for targeted in (attack.apgd_targeted, attack.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, n_classes - 1)
        found = attack.run_standard_evaluation(x, y, batch_size=batch_size)
    points = (found[0] if isinstance(found, tuple) else found).detach()
    return region.checked(points.flatten(1)).reshape(x.shape)


@contextmanager
def _frozen(model):
    """Keep gradients from the parameters, into which one of its attacks backpropagates."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _checked_classes(model, x, y, ball):
    """Return the number of classes, or refuse what is not for AutoAttack."""
    if x.ndim != 4 or x.shape[2] < _FEWEST_PIXELS:
        raise ValueError(
            f"AutoAttack takes images (n, c, h, w) with h >= {_FEWEST_PIXELS}, got x of shape "
            f"{tuple(x.shape)}. {_ALTERNATIVE}"
        )
    if bool((x < 0.0).any()) or bool((x > 1.0).any()):
        raise ValueError(
            f"AutoAttack clips to [0, 1], and x reaches from {x.min():.3g} to {x.max():.3g}. "
            f"{_ALTERNATIVE}"
        )
    lo, hi = ball.feature_range(x[0].numel())
    if ball.bounds is not None and not (np.all(lo == 0.0) and np.all(hi == 1.0)):
        raise ValueError(f"AutoAttack knows the bounds (0, 1) only. {_ALTERNATIVE}")
    if np.ndim(ball.epsilon) > 0:
        raise ValueError(f"AutoAttack takes one epsilon for all features. {_ALTERNATIVE}")
    outputs = model(x[:1])
    if outputs.ndim != 2 or outputs.shape[1] < _FEWEST_CLASSES:
        raise ValueError(
            f"AutoAttack needs at least {_FEWEST_CLASSES} outputs, this model returns shape "
            f"{tuple(outputs.shape)}. {_ALTERNATIVE}"
        )
    if bool((y < 0).any()) or bool((y >= outputs.shape[1]).any()):
        raise ValueError(f"y must hold 0 .. {outputs.shape[1] - 1} for this model.")
    return outputs.shape[1]
