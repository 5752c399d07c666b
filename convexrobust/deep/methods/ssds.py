r"""SSDS: every sample keeps a perturbation, which moves on a little at each visit."""

from __future__ import annotations

import numpy as np
import torch

from convexrobust.attacks.region import Region, check_counts
from convexrobust.backends import torch as torch_backend
from convexrobust.deep.methods.base import BallMethod, descend
from convexrobust.deep.model_loss import left_as_found
from convexrobust.dynamics import check_variant, next_epigraph, next_perturbations
from convexrobust.perturbations import LpBall

ASCENTS = ("steepest", "raw")


class Ssds(BallMethod):
    r"""Train along the stochastic saddle-point dynamical system of Esfandiari et al.

    For the samples of a batch, with :math:`w_i = u_i / \epsilon` in units of the ball,

    .. math::
        \theta \leftarrow \theta - \alpha \lambda \nabla_\theta \tfrac1b \sum_i
            \ell(x_i + \epsilon \Pi(w_i)), \qquad
        w_i \leftarrow w_i + \gamma_k (a_i - v_i g_i), \qquad
        v_i \leftarrow [v_i + \gamma_k (\|w_i\|_p - 1)]_+

    with the ascent :math:`a_i` below and :math:`g_i \in \partial \|w_i\|_p`. The weight
    :math:`\lambda` rises while the loss is above its level t, which follows it. Steps are the
    damped ones of `convexrobust.dynamics`. The gradients in the weights and in the
    perturbations are of one forward pass, in the mode the model is in.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    n_rows : int
        Number of samples in the training data; ``rows`` in `step` are below it.
    variant : {"ssds", "nolam", "nolag"}
        The full system; without :math:`\lambda`; or without v too, with perturbations projected.
    step : float
        First step :math:`\gamma` of w and v; of w in radii of the ball if "steepest".
    weight_step : float
        First step of :math:`\lambda` and t.
    decay : float
        Steps are divided by :math:`(1 + k)^{\text{decay}}` after k passes over the data; the
        theorem wants it above 0.5, the paper's experiments nearly 0.
    ascent : {"steepest", "raw"}
        The direction of steepest ascent, of length 1; or, as in the paper, the gradient of the
        sample's loss in units of the ball, which hardly moves those of well-fitted samples.
    n_inner : int
        Steps of the perturbations in a visit, each but the last at the cost of a gradient.
    sample_loss : SampleLoss, optional
        `CrossEntropy`, the default, or `HalfSquares` of `convexrobust.deep.losses`.

    Attributes
    ----------
    perturbations : tensor of shape (n_rows, d) or None
        w, on the device of the data; None before the first step. Memory as the data has.
    prices : tensor of shape (n_rows,) or None
        v.
    weight : float
        :math:`\lambda`, which multiplies the loss, so that Adam does not notice it.

    Raises
    ------
    ValueError
        For an unknown variant or ascent, steps that are not positive, or counts below 1.

    Notes
    -----
    Perturbations belong to inputs: data must not be augmented at random. Each moves once an epoch,
    so that at equal numbers of epochs the network is less robust than after `pgd` training. With
    several processes each has its own perturbations.

    Against the paper: with multipliers w may leave the ball, so the network is trained, and its
    gradient taken, at the nearest point in the ball and its bounds; such points owe no price, so
    that :math:`\lambda` follows the loss alone. Multipliers are of the mean over the samples, not
    of the sum. Steps are damped, because those of the paper diverge for l1 unless they fall. With
    "steepest" in l-inf the step of v is :math:`\gamma` times the number of features, the price at
    which that ascent stops.

    Its code differs more: it clips u in all variants, which leaves v nothing to do, scales only a
    part of the bracket in the equation of :math:`\lambda`, and takes a subgradient of the l1 norm
    for the l-inf budget.

    References
    ----------
    Esfandiari, Balu, Ebrahimi, Vaidya, Elia and Sarkar, arXiv 1910.08623.
    """

    def __init__(
        self,
        ball,
        n_rows,
        *,
        variant="ssds",
        step=1.0,
        weight_step=0.1,
        decay=0.0,
        ascent="steepest",
        n_inner=1,
        sample_loss=None,
    ):
        super().__init__(ball, sample_loss)
        check_variant(variant)
        check_counts(n_rows=n_rows, n_inner=n_inner)
        if ascent not in ASCENTS:
            raise ValueError(f"ascent must be one of {ASCENTS}, got {ascent!r}.")
        if min(step, weight_step) <= 0.0 or decay < 0.0:
            raise ValueError(
                "step and weight_step must be positive and decay at least 0, "
                f"got {step!r}, {weight_step!r} and {decay!r}."
            )
        self.n_rows, self.variant, self.ascent, self.n_inner = n_rows, variant, ascent, n_inner
        self.length, self.weight_length, self.decay = step, weight_step, decay
        self.perturbations = None
        self.prices = None
        self.level = None  # t; it starts at the first loss
        self.weight, self.n_seen = 1.0, 0

    def step(self, model, optimizer, x, y, rows) -> dict[str, float]:
        """Move the weights, and the perturbations of the batch; see `Method.step`."""
        rows = self._checked_rows(rows, x)
        region = Region(torch_backend, x.detach().flatten(1), self.current_ball)
        with left_as_found(model, None):
            for _ in range(self.n_inner - 1):
                losses, points = self._losses(model, region, x, y, rows)
                self._move(region, rows, points, _gradient(losses, points, keep=False))
        losses, points = self._losses(model, region, x, y, rows)
        gradient = _gradient(losses, points, keep=True)
        used = self.weight
        mean = self.mean(losses)
        descend(optimizer, used * mean)
        loss = mean.item()
        if self.variant == "ssds":
            length = self._decayed(self.weight_length)
            level = loss if self.level is None else self.level
            self.level, self.weight = next_epigraph(level, self.weight, loss, length)
        self._move(region, rows, points, gradient)
        self.n_seen += len(x)
        return {"loss": loss, "weight": used, "price": self.prices[rows].mean().item()}

    def state_dict(self) -> dict:
        """Return perturbations, multipliers and the number of samples seen."""
        names = ("perturbations", "prices", "level", "weight", "n_seen")
        state = {name: getattr(self, name) for name in names}
        return {k: s.clone() if torch.is_tensor(s) else s for k, s in state.items()}

    def load_state_dict(self, state):
        """Go on with the perturbations and multipliers of a checkpoint."""
        held = state["perturbations"]
        if held is not None and len(held) != self.n_rows:
            raise ValueError(
                f"the state is of {len(held)} samples, this method of n_rows={self.n_rows}."
            )
        for name, value in state.items():
            setattr(self, name, value.clone() if torch.is_tensor(value) else value)

    def _checked_rows(self, rows, x):
        rows = torch.as_tensor(rows, device=x.device)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.n_rows:
            raise ValueError(f"rows must be in 0 .. {self.n_rows - 1} (n_rows), got {rows}.")
        if self.perturbations is None:
            self.perturbations = x.new_zeros(self.n_rows, x[0].numel())
            self.prices = x.new_zeros(self.n_rows)
        self.perturbations = self.perturbations.to(x)
        self.prices = self.prices.to(x)
        return rows

    def _losses(self, model, region, x, y, rows):
        """Return losses (b,) of the perturbed points, and the points (b, d) they depend on."""
        perturbed = region.X + region.epsilon * self.perturbations[rows]
        points = region.checked(region.moved(perturbed)).requires_grad_()
        return self.losses(model(points.reshape(x.shape)), y), points

    def _move(self, region, rows, points, gradient):
        """Take the batch's perturbations and their prices one step on."""
        ascent, pull = region.epsilon * gradient, 1.0
        if self.ascent == "steepest":
            ascent = region.steepest(points.detach(), gradient, 1.0) / region.unit
            pull = region.n_free if region.ball.p == np.inf else 1.0  # its dual norm
        length = self._decayed(self.length)
        self.perturbations[rows], self.prices[rows] = next_perturbations(
            torch_backend,
            self.perturbations[rows],
            self.prices[rows],
            ascent,
            LpBall(region.ball.p, 1.0),
            length,
            self.variant,
            price_length=length * pull,
        )

    def _decayed(self, length):
        return length / (1.0 + self.n_seen / self.n_rows) ** self.decay


def _gradient(losses, points, *, keep):
    """Return the gradient of each row's own loss (b, d)."""
    (gradient,) = torch.autograd.grad(losses.sum(), points, retain_graph=keep)
    return gradient
