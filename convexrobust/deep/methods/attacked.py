r"""Training on attacked points: FGSM-AT, Fast-AT, N-FGSM and PGD-AT.

.. math:: \min_\theta \frac1n \sum_k \ell(f_\theta(x_k'), y_k)

They differ in how :math:`x_k'` is found, that is all. In every norm the sign of the papers is the
steepest step of the ball.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from convexrobust.deep import attacks
from convexrobust.deep.methods.base import (
    Around,
    LossMethod,
    input_gradient,
    sample_losses,
    uniform_noise,
)


class Attacked(LossMethod):
    """Minimise the cross-entropy of attacked points (Madry et al., arXiv 1706.06083).

    The named constructors choose the attack, those of `Mart`, `Pairing` and `GradAlign` too.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    attack : callable, optional
        Called as ``attack(model, x, y, ball, mode=mode)``, returns points: a function of
        `convexrobust.deep.attacks` with options. By default 10 steps of `pgd` on the cross-entropy.
    mode : {"eval", "train"}
        The mode of the model while it is attacked: published codes differ. Batch normalisation
        keeps its statistics in both.
    """

    def __init__(self, ball, attack=None, mode="eval"):
        if mode not in ("eval", "train"):
            raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}.")
        super().__init__(ball)
        self.attack, self.mode = attack or partial(several_steps, n_steps=10), mode

    @classmethod
    def fgsm(cls, ball, mode="eval"):
        """Return FGSM-AT, one full step (Goodfellow et al., arXiv 1412.6572)."""
        return cls(ball, attack=partial(attacks.fgsm, loss="cross-entropy"), mode=mode)

    @classmethod
    def fast(cls, ball, step=1.25, mode="train"):
        """Return Fast-AT (RS-FGSM): a random start and one step (Wong et al., arXiv 2001.03994)."""
        return cls(ball, attack=partial(random_step, step=step), mode=mode)

    @classmethod
    def n_fgsm(cls, ball, noise=2.0, step=1.0, mode="train"):
        """Return N-FGSM: noise and a step, not clipped (de Jorge et al., arXiv 2202.01181).

        Its points are up to ``noise + step`` radii away, within the bounds.
        """
        return cls(ball, attack=partial(noisy_step, noise=noise, step=step), mode=mode)

    @classmethod
    def pgd(cls, ball, n_steps=10, step=1.0, n_restarts=1, mode="eval"):
        """Return PGD-AT (Madry et al., arXiv 1706.06083); options as in `deep.attacks.pgd`.

        The attack is this package's: the first start is the sample itself, steps shrink from
        ``step`` to 0, and the worst point met is taken. The paper's has a random start, steps of
        one length, and takes the last point.
        """
        attack = partial(several_steps, n_steps=n_steps, step=step, n_restarts=n_restarts)
        return cls(ball, attack=attack, mode=mode)

    def points(self, model, x, y):
        """Return the attacked points."""
        return self.attack(model, x, y, self.current_ball, mode=self.mode).detach()

    def loss(self, model, x, points, y):
        """Return the mean cross-entropy of the attacked points."""
        outputs = model(points)
        return self.mean(self.losses(outputs, y)), self.figures(outputs, y)


def several_steps(model, x, y, ball, *, n_restarts=1, mode="eval", **options):
    """Return `deep.attacks.pgd` on the cross-entropy, its random starts drawn by torch."""
    rng = None
    if n_restarts > 1:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
    options |= {"n_restarts": n_restarts, "random_state": rng, "mode": mode}
    return attacks.pgd(model, x, y, ball, loss="cross-entropy", **options)


def random_step(model, x, y, ball, *, step=1.25, mode="train", losses=sample_losses):
    r"""Return :math:`\Pi(z + \text{step} \cdot s(\nabla \ell(z)))`, z uniform in the ball."""
    around = Around(x, ball)
    start = around.moved(x + uniform_noise(x, ball))
    gradient = input_gradient(model, start, y, mode, losses)
    return around.checked(around.moved(around.stepped(start, gradient, step)))


def noisy_step(model, x, y, ball, *, noise=2.0, step=1.0, mode="train", losses=sample_losses):
    r"""Return :math:`z + \text{step} \cdot s(\nabla \ell(z))`, z uniform in ``noise`` balls.

    Only the bounds of the ball are kept, as no point outside them exists.
    """
    around = Around(x, ball)
    start = around.within_bounds(x + noise * uniform_noise(x, ball))
    gradient = input_gradient(model, start, y, mode, losses)
    return around.within_bounds(around.stepped(start, gradient, step))
