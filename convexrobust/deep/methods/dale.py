r"""DALE: samples perturbations that are likely to hurt, and holds the clean loss below a margin."""

from __future__ import annotations

import warnings

import torch

from convexrobust.attacks.region import Region, check_counts, evaluated
from convexrobust.backends import torch as torch_backend
from convexrobust.deep.methods.base import (
    SamplingMethod,
    descend,
)
from convexrobust.deep.model_loss import autograd_objective, left_as_found

_LARGE_MULTIPLIER = 100.0  # the robust loss then hardly counts
_BELOW_1 = 1.0 - 2.0**-24  # the largest number below 1: the logarithm of 0 would be infinite noise


class Dale(SamplingMethod):
    r"""Minimise the robust loss subject to a clean loss of at most a margin (Robey et al.).

    .. math:: \min_\theta\; \mathbb E\, \ell(x + \delta) \quad \text{s.t.} \quad
              \mathbb E\, \ell(x) \le \rho

    Perturbations are drawn by projected Langevin steps on :math:`U = \log \ell`, then the weights
    go down the Lagrangian, and its multiplier :math:`\nu` up:

    .. math::
        \delta \leftarrow \Pi\bigl[\delta + \eta\, s(\nabla U + \sqrt{2 \eta T}\, \xi)\bigr], \qquad
        \theta: \min\, \overline{\ell(x + \delta)} + \nu\, \overline{\ell(x)}, \qquad
        \nu \leftarrow \bigl[\nu + \eta_d (\overline{\ell(x)} - \rho)\bigr]_+

    where s is the steepest step in the norm (signs for l-inf), and all lengths and gradients of the
    first formula are in units of the ball.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    margin : float
        The largest mean clean loss :math:`\rho` that is allowed, in nats for the cross-entropy. The
        default can always be kept with two classes, where chance has 0.69.
    dual_step : float
        Step :math:`\eta_d` of the multiplier, which starts at 1.
    multiplier : float, optional
        Fixes :math:`\nu`; ``margin`` and ``dual_step`` are then not used.
    temperature : float
        T, at least 0. With 0 the samples are the points of projected gradient ascent, exactly.
    n_steps : int
        Steps of the sampler.
    step : float
        Their length :math:`\eta`, as a fraction of the ball.
    mode : {"eval", "train", None}
        The mode in which the model is sampled; None for the one it is in.
    random_state : int or None
        Seed of the noise.
    sample_loss : SampleLoss, optional
        `CrossEntropy`, the default, or `HalfSquares` of `convexrobust.deep.losses`.

    Attributes
    ----------
    multiplier : float
        :math:`\nu` now.

    Raises
    ------
    ValueError
        For options out of their range.

    Warns
    -----
    RuntimeWarning
        Once, if the multiplier passes 100: the margin is probably out of reach.

    Notes
    -----
    The noise :math:`\xi` is Laplace's for l-inf and Gaussian for l2, as in the paper; for l1, which
    it does not treat, Laplace's. Its code takes :math:`\log(1 - p_y)` for U, another increasing
    function of the cross-entropy, and starts at Gaussian noise of size 0.001 instead of 0. Its
    noise (0.001 and 0.01 times Laplace's, beside gradients of means of 64 rows) is a temperature of
    0.0005 to 0.0009 in the units here. Steps are along signs, so that this is no temperature of
    :math:`\ell^{1/T}`: what counts is the noise beside the gradient of each coordinate, which is
    the smaller the more robust the model is and the more coordinates there are. On pictures the
    noise of the paper's code drowns the gradients, and robustness with them: hence the low default.
    Raise ``margin`` if the multiplier grows: the clean loss then outweighs the robust one, and the
    steps of the weights become long, since the two are added.

    References
    ----------
    Robey, Chamon, Pappas, Hassani and Ribeiro, arXiv 2110.15767.
    """

    def __init__(
        self,
        ball,
        *,
        margin=0.7,
        dual_step=0.01,
        multiplier=None,
        temperature=1e-7,
        n_steps=10,
        step=0.25,
        mode="eval",
        random_state=0,
        sample_loss=None,
    ):
        super().__init__(ball, random_state, sample_loss)
        check_counts(n_steps=n_steps)
        if step <= 0.0 or dual_step <= 0.0:
            raise ValueError(f"step and dual_step must be positive, got {step!r}, {dual_step!r}.")
        if min(margin, temperature, 0.0 if multiplier is None else multiplier) < 0.0:
            raise ValueError(
                "margin, temperature and multiplier must be at least 0, "
                f"got {margin!r}, {temperature!r} and {multiplier!r}."
            )
        self.margin, self.dual_step, self.fixed = margin, dual_step, multiplier
        self.multiplier = 1.0 if multiplier is None else float(multiplier)
        self.temperature, self.n_steps, self.length = temperature, n_steps, step
        self.mode = mode

    def step(self, model, optimizer, x, y, rows) -> dict[str, float]:
        """Take one primal and one dual step; see `Method.step`.

        The dual step uses the clean loss before the primal one.
        """
        outputs = model(self.sample(model, x, y))
        robust = self.mean(self.losses(outputs, y))
        clean = self.mean(self.losses(model(x), y))
        used = self.multiplier
        loss = descend(optimizer, robust + used * clean)
        if self.fixed is None:
            self._raise_multiplier(clean.item() - self.margin)
        figures = {"robust_loss": robust.item(), "clean_loss": clean.item(), "multiplier": used}
        return {"loss": loss} | self.figures(outputs, y) | figures

    def sample(self, model, x, y) -> torch.Tensor:
        """Return perturbed points of the shape of x, drawn around x (b, ...) with labels y (b,)."""
        region = Region(torch_backend, x.detach().flatten(1), self.current_ball)
        logarithms = self.sample_loss.logarithms
        objective = autograd_objective(lambda X: logarithms(model(X.reshape(x.shape)), y))
        points = region.X
        with left_as_found(model, self.mode):
            for _ in range(self.n_steps):
                _, gradient = evaluated(objective, points)
                ascent = gradient + self._noise(region)
                points = region.moved(points + region.steepest(points, ascent, self.length))
        return region.checked(points).reshape(x.shape)

    def state_dict(self) -> dict:
        """Return the multiplier and the state of the generator."""
        return super().state_dict() | {"multiplier": self.multiplier}

    def load_state_dict(self, state):
        """Go on with the multiplier and the noise of a checkpoint."""
        super().load_state_dict(state)
        self.multiplier = state["multiplier"]

    def _noise(self, region):
        """Return noise for gradients in units of X: steps are taken in units of the ball."""
        if self.temperature == 0.0:
            return 0.0
        shape, generator = tuple(region.X.shape), self.generator
        if region.ball.p == 2:
            noise = torch.randn(shape, generator=generator)
        else:
            # Laplace's law by its inverse: one draw an entry, and several times faster than two.
            share = torch.empty(shape).uniform_(-_BELOW_1, _BELOW_1, generator=generator)
            noise = share.sign() * torch.log1p(-share.abs())
        size = (2.0 * self.length * self.temperature) ** 0.5
        return size / region.unit * noise.to(region.X)

    def _raise_multiplier(self, excess):
        before = self.multiplier
        self.multiplier = max(before + self.dual_step * excess, 0.0)
        if before <= _LARGE_MULTIPLIER < self.multiplier:
            warnings.warn(
                f"DALE's multiplier has passed {_LARGE_MULTIPLIER:g} and the clean loss is still "
                f"above the margin {self.margin:g}; the model can probably not reach it. Raise "
                "margin, or lower dual_step if the multiplier swings.",
                RuntimeWarning,
                stacklevel=3,
            )
