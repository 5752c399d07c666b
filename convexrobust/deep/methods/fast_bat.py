r"""Fast-BAT: training through the attack, which is one projected gradient step on a linear loss."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from convexrobust.attacks.region import Region, check_counts, evaluated
from convexrobust.backends import torch as torch_backend
from convexrobust.deep.methods.base import SamplingMethod, descend
from convexrobust.deep.model_loss import autograd_objective, left_as_found


class FastBat(SamplingMethod):
    r"""Train through the solution of the attacker's problem (Zhang et al.).

    The attacker linearises the loss at a point z of the ball C and adds a quadratic term,

    .. math:: \delta^*(\theta) = \arg\min_{\delta \in C}
              -\langle \nabla \ell(\theta, z), \delta - z \rangle
              + \tfrac{\lambda}{2} \|\delta - z\|^2
              = \Pi_C\bigl(z + \tfrac1\lambda \nabla \ell(\theta, z)\bigr),

    which has a derivative in :math:`\theta`. The step of the weights goes along

    .. math:: \nabla_\theta \ell(\theta, \delta^*)
              + \Bigl(\frac{d \delta^*}{d \theta}\Bigr)' \nabla_\delta \ell(\theta, \delta^*),
              \qquad
              \frac{d \delta^*}{d \theta}
              = \tfrac1\lambda\, \Pi_C'\, \nabla^2_{\delta \theta} \ell(\theta, z),

    the second term being the implicit gradient. For l-inf :math:`\Pi_C'` is 1 for coordinates
    inside the ball and the bounds, 0 for the others. As in the paper, where the two terms have
    steps of their own, the second one is added with a weight.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    implicit_gradient : bool
        Whether the second term is added, which costs a second derivative.
    implicit_weight : float
        Its weight; 1 is the derivative of the formula.
    sign : bool
        Takes the sign of the gradient (l-inf only). The implicit gradient is then exactly 0. With
        ``n_steps=1, step=1.25`` this is FGSM training with random starts (Fast-AT).
    n_steps : int
        Gradient steps from the random start; z is the point before the last.
    step : float
        Length of a step in radii of the ball: the root mean square over the features for l-inf,
        the Euclidean length for l2 and l1, and the size of every entry if ``sign``.
    mode : {"eval", "train", None}
        The mode in which the model is attacked; None for the one it is in.
    random_state : int or None
        Seed of the random starts.
    sample_loss : SampleLoss, optional
        `CrossEntropy`, the default, or `HalfSquares` of `convexrobust.deep.losses`.

    Raises
    ------
    ValueError
        For a sign in another norm than l-inf, or options out of their range.

    Notes
    -----
    The steps here are relative to the radius, with :math:`1/\lambda` the step divided by the length
    of the sample's gradient, held constant in the derivative. The paper's code has raw gradients
    times 5000/255 (2000/255 for radii above 8/255), made for images in [0, 1] with 10 classes,
    attacks in train mode, and gives the implicit gradient a :math:`1/\lambda` of its own, 0.1, far
    below that of its steps; hence the small weight here. With a weight of 1 robustness suffers on
    pictures. Its steps are two, as here.

    References
    ----------
    Zhang, Zhang, Khanduri, Hong, Chang and Liu, arXiv 2112.12376.
    """

    def __init__(
        self,
        ball,
        *,
        implicit_gradient=True,
        implicit_weight=0.1,
        sign=False,
        n_steps=2,
        step=2.0,
        mode="eval",
        random_state=0,
        sample_loss=None,
    ):
        super().__init__(ball, random_state, sample_loss)
        check_counts(n_steps=n_steps)
        if step <= 0.0:
            raise ValueError(f"step must be positive, got {step!r}.")
        if sign and ball.p != np.inf:
            raise ValueError("sign=True is for l-inf balls; leave it out for l1 and l2.")
        if not implicit_weight >= 0.0:
            raise ValueError(f"implicit_weight must be at least 0, got {implicit_weight!r}.")
        self.implicit_gradient, self.implicit_weight = implicit_gradient, implicit_weight
        self.sign = sign
        self.n_steps, self.length, self.mode = n_steps, step, mode

    def step(self, model, optimizer, x, y, rows) -> dict[str, float]:
        """Take one step of the weights through the attack; see `Method.step`."""
        points = self.attack(model, x, y)
        outputs = model(points)
        loss = descend(optimizer, self.mean(self.losses(outputs, y)))
        return {"loss": loss} | self.figures(outputs, y)

    def attack(self, model, x, y) -> torch.Tensor:
        """Return attacked points of the shape of x, differentiable in the weights if implicit."""
        region = Region(torch_backend, x.detach().flatten(1), self.current_ball)
        seed = int(torch.randint(2**62, (), generator=self.generator))
        points = region.random_points(np.random.default_rng(seed))
        gradient_of = partial(_gradient, model, self.losses, x.shape, y)
        with left_as_found(model, self.mode):
            for _ in range(self.n_steps - 1):
                points = self._ascended(region, points, gradient_of(points))
            graph = self.implicit_gradient and self.implicit_weight > 0.0
            gradient = gradient_of(points, create_graph=graph)
            points = self._ascended(region, points, gradient)
            if graph:
                value = points.detach()
                points = value + self.implicit_weight * (points - value)
        region.checked(points.detach())
        return points.reshape(x.shape)

    def _ascended(self, region, points, gradient):
        if self.sign:
            return region.moved(points + region.steepest(points, gradient, self.length))
        rate = _inverse_lambda(region, gradient.detach(), self.length)
        return project_differentiably(region, points + rate * gradient)


def project_differentiably(region, points):
    """Return points (n, d) projected as by `Region.moved`, with a derivative in every norm."""
    if region.ball.p == np.inf:
        return region.moved(points)
    delta = torch.where(region.free, points - region.X, 0.0) / region.unit
    if region.ball.p == 2:
        delta = delta / torch.linalg.vector_norm(delta, dim=1, keepdim=True).clip(min=1.0)
    else:
        delta = _onto_cross_polytope(delta)
    return (region.X + region.epsilon * delta).clip(region.lo, region.hi)


def _onto_cross_polytope(A):
    """Project the rows of A on the l1 ball of radius 1: shrink the k largest entries alike."""
    falling = A.abs().sort(dim=1, descending=True).values
    counts = torch.arange(1, A.shape[1] + 1).to(A)
    shrinkages = (falling.cumsum(dim=1) - 1.0) / counts
    k = (falling > shrinkages).sum(dim=1, keepdim=True)
    shrinkage = torch.relu(shrinkages.gather(1, k - 1))
    return A.sign() * torch.relu(A.abs() - shrinkage)


def _inverse_lambda(region, gradient, step):
    r"""Return :math:`1/\lambda` for each row, (n, 1) or (n, d): moves are ``step`` radii long."""
    length = torch.linalg.vector_norm(region.epsilon * gradient, dim=1, keepdim=True)
    spread = np.sqrt(region.n_free) if region.ball.p == np.inf else 1.0
    return step * spread * region.epsilon**2 / torch.where(length > 0.0, length, 1.0)


def _gradient(model, losses, shape, y, points, *, create_graph=False):
    """Return the gradient of each row's own loss (b, d), on demand a function of the weights."""
    if not create_graph:
        objective = autograd_objective(lambda X: losses(model(X.reshape(shape)), y))
        return evaluated(objective, points)[1]
    points = points.detach().requires_grad_()
    # Of a copy of the buffers: batch normalisation writes to the model's before the backward pass.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    call = partial(torch.func.functional_call, model, buffers) if buffers else model
    outputs = call(points.reshape(shape))
    return torch.autograd.grad(losses(outputs, y).sum(), points, create_graph=True)[0]
