r"""What adversarial training methods have in common.

A method makes one step of training on one batch. It is a small object: its options, the ball, and
what it remembers between batches (multipliers, perturbations of samples). The loop, the schedules
and the files belong to `convexrobust.deep.training`.

The mode of the model is the loop's, and in training mode every pass whose output is part of the
loss moves the statistics of batch normalisation. Passes that look for an attack do not.
Whatever is random is drawn from torch's generators, which the loop seeds for every epoch, or from
one that the method remembers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from convexrobust.attacks.region import Region
from convexrobust.backends import torch as torch_backend
from convexrobust.deep.losses import CrossEntropy, SampleLoss, check_sample_loss, sample_losses
from convexrobust.deep.model_loss import left_as_found
from convexrobust.deep.processes import process
from convexrobust.perturbations import LpBall

OF_ANY_LOSS = (
    *("Standard", "Attacked", "Free", "GradAlign", "Trades", "Pairing", "WeightPerturbed"),
    *("Dale", "FastBat", "Ssds"),
)


class Method(Protocol):
    """One way to train a model on batches.

    Attributes
    ----------
    ball : LpBall or None
        The threat model at full radius; None for a method that needs none.
    scale : float
        Share of the radius in use now, between 0 and 1; the loop raises it to warm up.

    Notes
    -----
    A method that can weigh samples has an attribute ``sample_weights``, as `BallMethod` has.
    """

    ball: LpBall | None
    scale: float

    def step(self, model, optimizer, x, y, rows) -> dict[str, float]:
        """Update the model's parameters by one batch.

        Parameters
        ----------
        model : torch.nn.Module
            From points (b, ...) to outputs (b,), (b, 1) or (b, C).
        optimizer : torch.optim.Optimizer
            Of the model's parameters.
        x : tensor of shape (b, ...)
            Points.
        y : tensor of shape (b,)
            Labels: -1 / +1 or 0 / 1 with one output, class numbers with several.
        rows : tensor of shape (b,)
            The numbers of the samples in the data, for what is remembered of each; on the CPU.

        Returns
        -------
        dict
            Figures of this batch for the log: "loss" at least, the mean that was minimised.
        """

    def state_dict(self) -> dict:
        """Return what is remembered, for a checkpoint: tensors, numbers and containers of them."""

    def load_state_dict(self, state):
        """Take up what was remembered."""


class BallMethod:
    """A method with a threat model that remembers nothing: the base of most.

    Losses and figures of the samples are those of its part ``sample_loss``, averaged by `mean`, so
    that a task and weights are each met in one place.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    sample_loss : SampleLoss, optional
        A loss of `convexrobust.deep.losses`: `CrossEntropy`, the default, or `HalfSquares`, which
        makes the method one of regression.

    Attributes
    ----------
    only_classes : str
        Why a method cannot take another loss than the cross-entropy; empty if it can.
    sample_weights : tensor of shape (b,) or None
        Of the samples of the batch, set by the loop; 1 on average over the data.
    """

    scale = 1.0
    only_classes = ""
    sample_loss: SampleLoss = CrossEntropy()
    sample_weights: torch.Tensor | None = None

    def __init__(self, ball, sample_loss=None):
        self.ball = ball
        if sample_loss is None or sample_loss == self.sample_loss:
            return  # the default is not an option that checkpoints name
        check_sample_loss(sample_loss)
        if self.only_classes and sample_loss.task != "classification":
            raise ValueError(
                f"{type(self).__name__} cannot take {type(sample_loss).__name__}: "
                f"{self.only_classes}. Methods of {sample_loss.task}: {', '.join(OF_ANY_LOSS)}."
            )
        self.sample_loss = sample_loss

    @property
    def task(self) -> str:
        """What is trained: "classification" or "regression"."""
        return self.sample_loss.task

    @property
    def current_ball(self) -> LpBall:
        """The ball at its present radius."""
        return (
            self.ball if self.scale == 1.0 else self.ball.scaled_to(self.scale * self.ball.radius)
        )

    def losses(self, outputs, y) -> torch.Tensor:
        """Return the loss of each sample, (b,)."""
        return self.sample_loss.values(outputs, y)

    def figures(self, outputs, y) -> dict[str, float]:
        """Return what the log says of the outputs at the points trained on."""
        return self.sample_loss.figures(outputs, y)

    def mean(self, losses) -> torch.Tensor:
        """Return the mean of losses (b,) over the batch, each times the weight of its sample."""
        return (losses if self.sample_weights is None else self.sample_weights * losses).mean()

    def state_dict(self) -> dict:
        """Return what is remembered, for a checkpoint."""
        return {}

    def load_state_dict(self, state):
        """Take up what was remembered."""


class SamplingMethod(BallMethod):
    """A method with a threat model that draws random numbers: it remembers its generator.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    random_state : int or None
        Seed of the generator; None for torch's own, which the loop seeds. The numbers are drawn on
        the CPU, so that they do not depend on the device. Processes that train together draw
        different ones.
    sample_loss : SampleLoss, optional
        As of `BallMethod`.
    """

    def __init__(self, ball, random_state, sample_loss=None):
        super().__init__(ball, sample_loss)
        self.generator = None if random_state is None else torch.Generator()
        if self.generator is not None:
            rank = process()[0]
            seed = np.random.SeedSequence([random_state, rank]).generate_state(1)[0]
            self.generator.manual_seed(int(seed) if rank else random_state)

    def state_dict(self) -> dict:
        """Return the state of the generator, for a checkpoint."""
        return {"generator": None if self.generator is None else self.generator.get_state()}

    def load_state_dict(self, state):
        """Go on with the random numbers where they were."""
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())


class LossMethod(BallMethod, ABC):
    """A method that attacks a batch and then takes one step down a loss of it.

    What it is made of, `points` and `loss`, is what `WeightPerturbed` needs of a method.
    """

    def points(self, model, x, y) -> torch.Tensor:
        """Return the attacked points of a batch, without a graph; the points themselves here."""
        return x

    @abstractmethod
    def loss(self, model, x, points, y) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the mean loss, with its graph, and figures for the log."""

    def step(self, model, optimizer, x, y, rows) -> dict[str, float]:
        """Update the model's parameters by one batch; see `Method.step`."""
        loss, figures = self.loss(model, x, self.points(model, x, y), y)
        return {"loss": descend(optimizer, loss)} | figures


@contextmanager
def weighted(method, weights):
    """Let a method weigh the samples of a batch for a while; None for no weights."""
    if weights is None:
        yield
        return
    method.sample_weights = weights
    try:
        yield
    finally:
        method.sample_weights = None


class WrappedMethod:
    """A method around another one, whose ball, radius, weights and memory are its own.

    Parameters
    ----------
    method : Method
        The other one.
    """

    def __init__(self, method):
        self.method = method

    @property
    def ball(self) -> LpBall:
        """The threat model."""
        return self.method.ball

    @property
    def scale(self) -> float:
        """The share of the radius in use."""
        return self.method.scale

    @scale.setter
    def scale(self, value):
        self.method.scale = value

    @property
    def sample_weights(self):
        """The weights of the samples of the batch."""
        return self.method.sample_weights

    @sample_weights.setter
    def sample_weights(self, value):
        self.method.sample_weights = value

    def state_dict(self) -> dict:
        """Return what the method remembers, for a checkpoint."""
        return self.method.state_dict()

    def load_state_dict(self, state):
        """Let the method take up what it remembered."""
        self.method.load_state_dict(state)


def innermost(method) -> Method:
    """Return the method that others are wrapped around, such as `WeightPerturbed`."""
    while hasattr(method, "method"):
        method = method.method
    return method


def input_gradient(model, x, y, mode="eval", losses=sample_losses) -> torch.Tensor:
    """Return the gradient of each sample's loss in its point, of the shape of x.

    The model is left as it was found, the ``.grad`` of its parameters included.
    """
    with left_as_found(model, mode), torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(losses(model(x), y).sum(), x)
    return gradient


def uniform_noise(x, ball) -> torch.Tensor:
    """Return one perturbation for each point (b, ...), uniform in the ball without its bounds."""
    X = x.flatten(1)
    if ball.p == np.inf:
        noise = torch.empty_like(X).uniform_(-1.0, 1.0)
        return (torch_backend.constant(ball.epsilons(X.shape[1]), X) * noise).reshape(x.shape)
    rng = np.random.default_rng(int(torch.randint(2**62, ())))
    sample = LpBall(ball.p, ball.epsilon).sample(np.zeros(tuple(X.shape)), rng)
    return torch_backend.constant(sample, X).reshape(x.shape)


class Around:
    """The ball around points of any shape: `convexrobust.attacks.region.Region` for batches."""

    def __init__(self, x, ball):
        self.shape, self.region = x.shape, Region(torch_backend, x.detach().flatten(1), ball)

    def moved(self, points) -> torch.Tensor:
        """Return points put back into the ball, then into the bounds."""
        return self.region.moved(points.detach().flatten(1)).reshape(self.shape)

    def stepped(self, points, gradient, length=1.0) -> torch.Tensor:
        """Return points after a steepest step, ``length`` in units of the ball; not yet moved."""
        points, gradient = points.detach().flatten(1), gradient.flatten(1)
        return (points + self.region.steepest(points, gradient, length)).reshape(self.shape)

    def within_bounds(self, points) -> torch.Tensor:
        """Return points put back into the bounds only; they may be outside the ball."""
        clipped = points.flatten(1).clip(self.region.lo, self.region.hi)
        return torch.where(self.region.free, clipped, self.region.X).reshape(self.shape)

    def checked(self, points) -> torch.Tensor:
        """Return points if all are in the ball and the bounds, else raise RuntimeError."""
        return self.region.checked(points.flatten(1)).reshape(self.shape)


def backward(optimizer, loss) -> float:
    """Put the gradient of a loss into the parameters; return the loss.

    Raises
    ------
    FloatingPointError
        If it is not finite.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the training loss is {loss.item()}: lower the learning rate or epsilon, or bring the "
            "features to one scale."
        )
    optimizer.zero_grad()
    loss.backward()
    return loss.item()


def descend(optimizer, loss) -> float:
    """Take one step of the optimizer down a loss; return the loss.

    Raises
    ------
    FloatingPointError
        If it is not finite, before the parameters change.
    """
    value = backward(optimizer, loss)
    optimizer.step()
    return value
