r"""Losses of a task: what a deep method minimises, and what follows from it.

A method has one of them as a part, `BallMethod.sample_loss`, and asks it for all that differs
between classes and numbers: the loss of each sample, how far two outputs are apart, and what an
attack climbs. A loss of one's own derives from `SampleLoss`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

_CERTAIN = 30.0  # above it, log log(1 + exp(-m)) is -m to 1e-13


class SampleLoss(ABC):
    """The loss of outputs (b,), (b, 1) or (b, C) at targets (b,).

    Attributes
    ----------
    task : {"classification", "regression"}
        What it is a loss of.
    climbed : {"cross-entropy", "margin", "residual"}
        What attacks climb in its place, as ``loss`` of `convexrobust.deep.attacks.pgd`.
    """

    task: str
    climbed: str

    @abstractmethod
    def values(self, outputs, y) -> torch.Tensor:
        """Return the loss of each sample, (b,), at least in single precision."""

    @abstractmethod
    def logarithms(self, outputs, y) -> torch.Tensor:
        """Return the logarithm of each loss, (b,), also where that underflows."""

    @abstractmethod
    def divergences(self, clean, attacked, y) -> torch.Tensor:
        """Return how far the predictions of each sample are apart, (b,)."""

    @abstractmethod
    def distances(self, clean, attacked, y) -> torch.Tensor:
        """Return how far the outputs of each sample are apart, (b,)."""

    @abstractmethod
    def figures(self, outputs, y) -> dict[str, float]:
        """Return what the log says of the outputs at the points trained on."""


@dataclass(frozen=True)
class CrossEntropy(SampleLoss):
    r"""The cross-entropy :math:`-\log p_y` of the label's probability."""

    task = "classification"
    climbed = "cross-entropy"

    def values(self, outputs, y) -> torch.Tensor:
        """Return the cross-entropy of each sample, (b,)."""
        return sample_losses(outputs, y)

    def logarithms(self, outputs, y) -> torch.Tensor:
        """Return the logarithm of each cross-entropy, (b,)."""
        return log_losses(outputs, y)

    def divergences(self, clean, attacked, y) -> torch.Tensor:
        r"""Return :math:`\mathrm{KL}(p \,\|\, p')` of the probabilities of each sample, (b,)."""
        return divergence(log_probabilities(clean, y)[0], log_probabilities(attacked, y)[0])

    def distances(self, clean, attacked, y) -> torch.Tensor:
        """Return the length of each difference of outputs, (b,)."""
        return torch.linalg.vector_norm((attacked - clean).reshape(len(clean), -1), dim=1)

    def figures(self, outputs, y) -> dict[str, float]:
        """Return the accuracy."""
        return {"accuracy": accuracy(outputs, y)}


@dataclass(frozen=True)
class HalfSquares(SampleLoss):
    r"""Half the square of the residual, :math:`\tfrac12 (f(x) - y)^2`, of one output."""

    task = "regression"
    climbed = "residual"

    def values(self, outputs, y) -> torch.Tensor:
        """Return half the square of each residual, (b,)."""
        return half_squares(outputs, y)

    def logarithms(self, outputs, y) -> torch.Tensor:
        """Return the logarithm of each loss, (b,), with a gradient of 0 where that is 0."""
        losses = half_squares(outputs, y)
        return losses.clip(min=torch.finfo(losses.dtype).tiny).log()

    def divergences(self, clean, attacked, y) -> torch.Tensor:
        """Return half the square of each difference of outputs, (b,)."""
        return half_squares(attacked, clean.reshape(len(y)))

    def distances(self, clean, attacked, y) -> torch.Tensor:
        """Return half the square of each difference of outputs, (b,)."""
        return self.divergences(clean, attacked, y)

    def figures(self, outputs, y) -> dict[str, float]:
        """Return the mean size of the residuals."""
        return {"residual": output_residuals(outputs, y).abs().mean().item()}


LOSS_OF_TASK = {loss.task: loss for loss in (CrossEntropy(), HalfSquares())}


def check_sample_loss(loss) -> None:
    """Raise ValueError unless it is a loss of this module, or one derived from `SampleLoss`."""
    if isinstance(loss, SampleLoss):
        return
    of_class = isinstance(loss, type) and issubclass(loss, SampleLoss)
    remedy = f"the class {loss.__name__}: give {loss.__name__}()" if of_class else f"{loss!r}"
    raise ValueError(
        "sample_loss must be CrossEntropy() or HalfSquares() of convexrobust.deep.losses, or an "
        f"object derived from SampleLoss, got {remedy}."
    )


def sample_losses(outputs, y) -> torch.Tensor:
    r"""Return the cross-entropy of each sample, (b,), at least in single precision.

    :math:`\log(1 + e^{-y f})` with one output (labels -1 / +1 or 0 / 1),
    :math:`\log \sum_c e^{f_c} - f_y` with several.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if has_one_output(outputs):
        sign = torch.where(y > 0, 1.0, -1.0).to(outputs)
        return torch.nn.functional.softplus(-sign * outputs.reshape(len(y)))
    return torch.nn.functional.cross_entropy(outputs, y.long(), reduction="none")


def has_one_output(outputs) -> bool:
    """Whether outputs are those (b,) or (b, 1) of a binary classifier with one output."""
    return outputs.ndim == 1 or outputs.shape[1] == 1


def log_probabilities(outputs, y) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities (b, C) of the classes, C = 2 with one output, and labels 0 .."""
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if has_one_output(outputs):
        margin = outputs.reshape(len(y))
        both = torch.stack([-margin, margin], dim=1)
        return torch.nn.functional.logsigmoid(both), (y > 0).long()
    return torch.nn.functional.log_softmax(outputs, dim=1), y.long()


def accuracy(outputs, y) -> float:
    """Return the share of the samples that the outputs classify rightly."""
    if has_one_output(outputs):
        right = (outputs.reshape(len(y)) > 0) == (y > 0)
    else:
        right = outputs.argmax(dim=1) == y
    return right.sum().item() / len(y)


def log_losses(outputs, y) -> torch.Tensor:
    r"""Return the logarithm of the cross-entropy of each sample (b,), also where that underflows.

    The cross-entropy is :math:`\log(1 + e^{-m})` with the margin m = y f of one output, and
    :math:`m = f_y - \log \sum_{c \ne y} e^{f_c}` of several.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if has_one_output(outputs):
        margin = torch.where(y > 0, 1.0, -1.0).to(outputs) * outputs.reshape(len(y))
    else:
        label = y.long()[:, None]
        rivals = outputs.scatter(1, label, -torch.inf)
        margin = outputs.gather(1, label)[:, 0] - torch.logsumexp(rivals, dim=1)
    excess = torch.relu(margin - _CERTAIN)  # by which the logarithm falls like the margin rises
    return torch.nn.functional.softplus(excess - margin).log() - excess


def divergence(p, q):
    r"""Return :math:`\mathrm{KL}(p \| q)` of each row of two (b, C) of log-probabilities, (b,)."""
    return torch.sum(p.exp() * (p - q), dim=1)


def half_squares(outputs, y) -> torch.Tensor:
    """Return half the square of each residual, (b,), at least in single precision."""
    return 0.5 * output_residuals(outputs, y).square()


def output_residuals(outputs, y) -> torch.Tensor:
    """Return outputs less targets, (b,), at least in single precision; of one output only."""
    if outputs.numel() != len(y):
        raise ValueError(f"a model for regression has one output, this has {outputs.shape[1:]}.")
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32)).reshape(len(y)) - y
