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
from convexrobust.deep.losses import CrossEntropy, check_sample_loss
from convexrobust.deep.methods.base import (
    Around,
    LossMethod,
    input_gradient,
    uniform_noise,
)

CROSS_ENTROPY = CrossEntropy()


class Attacked(LossMethod):
    """Minimise the loss of attacked points (Madry et al., arXiv 1706.06083).

    The named constructors choose the attack, those of `Mart`, `Pairing` and `GradAlign` too.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    attack : callable, optional
        Called as ``attack(model, x, y, ball, mode=mode)``, returns points: a function of
        `convexrobust.deep.attacks` with options. By default 10 steps of `pgd` on the loss.
    mode : {"eval", "train"}
        The mode of the model while it is attacked: published codes differ. Batch normalisation
        keeps its statistics in both.
    sample_loss : SampleLoss, optional
        `CrossEntropy`, the default, or `HalfSquares` of `convexrobust.deep.losses`.

    Raises
    ------
    ValueError
        For another mode or loss, or an attack that is none, such as a name.
    """

    def __init__(self, ball, attack=None, mode="eval", sample_loss=None):
        if mode not in ("eval", "train"):
            raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}.")
        super().__init__(ball, sample_loss)
        if attack is not None:
            attacks.check_attack(attack)
        self.attack = attack or _climbing(several_steps, self.sample_loss, n_steps=10)
        self.mode = mode

    @classmethod
    def fgsm(cls, ball, mode="eval", sample_loss=None):
        """Return FGSM-AT, one full step (Goodfellow et al., arXiv 1412.6572)."""
        attack = one_step_on(sample_loss or cls.sample_loss)
        return cls(ball, attack=attack, mode=mode, sample_loss=sample_loss)

    @classmethod
    def fast(cls, ball, step=1.25, mode="train", sample_loss=None):
        """Return Fast-AT (RS-FGSM): a random start and one step (Wong et al., arXiv 2001.03994)."""
        attack = _climbing(random_step, sample_loss, step=step)
        return cls(ball, attack=attack, mode=mode, sample_loss=sample_loss)

    @classmethod
    def n_fgsm(cls, ball, noise=2.0, step=1.0, mode="train", sample_loss=None):
        """Return N-FGSM: noise and a step, not clipped (de Jorge et al., arXiv 2202.01181).

        Its points are up to ``noise + step`` radii away, within the bounds.
        """
        attack = _climbing(noisy_step, sample_loss, noise=noise, step=step)
        return cls(ball, attack=attack, mode=mode, sample_loss=sample_loss)

    @classmethod
    def pgd(cls, ball, n_steps=10, step=1.0, n_restarts=1, mode="eval", sample_loss=None):
        """Return PGD-AT (Madry et al., arXiv 1706.06083); options as in `deep.attacks.pgd`.

        The attack is this package's: the first start is the sample itself, steps shrink from
        ``step`` to 0, and the worst point met is taken. The paper's has a random start, steps of
        one length, and takes the last point.
        """
        options = {"n_steps": n_steps, "step": step, "n_restarts": n_restarts}
        attack = _climbing(several_steps, sample_loss, **options)
        return cls(ball, attack=attack, mode=mode, sample_loss=sample_loss)

    def points(self, model, x, y):
        """Return the attacked points."""
        return self.attack(model, x, y, self.current_ball, mode=self.mode).detach()

    def loss(self, model, x, points, y):
        """Return the mean loss of the attacked points."""
        outputs = model(points)
        return self.mean(self.losses(outputs, y)), self.figures(outputs, y)


def one_step_on(sample_loss):
    """Return the attack by one full step on a loss."""
    check_sample_loss(sample_loss)
    return partial(attacks.fgsm, loss=sample_loss.climbed)


def _climbing(attack, sample_loss, **options):
    """Return an attack of this file on a loss; the cross-entropy is what they climb untold."""
    if sample_loss is None or sample_loss == CrossEntropy():
        return partial(attack, **options)
    return partial(attack, **options, loss=sample_loss)


def several_steps(model, x, y, ball, *, n_restarts=1, mode="eval", loss=CROSS_ENTROPY, **options):
    """Return `deep.attacks.pgd` on a loss, its random starts drawn by torch."""
    rng = None
    if n_restarts > 1:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
    options |= {"n_restarts": n_restarts, "random_state": rng, "mode": mode}
    return attacks.pgd(model, x, y, ball, loss=loss.climbed, **options)


def random_step(model, x, y, ball, *, step=1.25, mode="train", loss=CROSS_ENTROPY):
    r"""Return :math:`\Pi(z + \text{step} \cdot s(\nabla \ell(z)))`, z uniform in the ball."""
    around = Around(x, ball)
    start = around.moved(x + uniform_noise(x, ball))
    gradient = input_gradient(model, start, y, mode, loss.values)
    return around.checked(around.moved(around.stepped(start, gradient, step)))


def noisy_step(model, x, y, ball, *, noise=2.0, step=1.0, mode="train", loss=CROSS_ENTROPY):
    r"""Return :math:`z + \text{step} \cdot s(\nabla \ell(z))`, z uniform in ``noise`` balls.

    Only the bounds of the ball are kept, as no point outside them exists.
    """
    around = Around(x, ball)
    start = around.within_bounds(x + noise * uniform_noise(x, ball))
    gradient = input_gradient(model, start, y, mode, loss.values)
    return around.within_bounds(around.stepped(start, gradient, step))
