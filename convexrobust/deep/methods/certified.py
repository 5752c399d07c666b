r"""Certified training: the worst loss that a bound on the margins allows, instead of an attack."""

from __future__ import annotations

import numpy as np
import torch

from convexrobust.attacks.region import Region
from convexrobust.backends import torch as torch_backend
from convexrobust.deep.methods.base import LossMethod
from convexrobust.deep.networks import Normalize
from convexrobust.losses import Logistic, MarginLoss
from convexrobust.perturbations import DUAL_NORM

BOUNDS = ("slope", "ibp")
_LINEAR = (torch.nn.Linear, torch.nn.Conv2d)
# No output falls when an input rises: the ends of a box go to the ends of the next.
_RISING_LAYERS = (
    torch.nn.ReLU,
    torch.nn.Flatten,
    torch.nn.Identity,
    torch.nn.MaxPool2d,
    torch.nn.AvgPool2d,
    torch.nn.AdaptiveAvgPool2d,
    Normalize,
)


class Certified(LossMethod):
    r"""Minimise the loss of lower bounds of the margins on the whole ball.

    .. math:: \kappa\, \ell(f(x), y) + (1 - \kappa)\, \varphi(\underline{m}(x, y))

    "slope" is the interval of `convexrobust.program` and `certificates.margin_bounds`, for
    two-layer networks in every norm; "ibp" propagates boxes through the layers (Gowal et al.,
    arXiv 1810.12715), for l-inf. Raise the radius slowly (``warmup`` of the loop): at full radius
    the bounds of a network that is not trained say nothing.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    bound : {"slope", "ibp"}
        The bound. "slope" needs ``Sequential(Linear, ReLU, Linear)``; "ibp" a ``Sequential`` of
        Linear, Conv2d, ReLU, Flatten, pooling and `deep.networks.Normalize` that ends in Linear.
    clean_share : float
        The share :math:`\kappa` of the cross-entropy of the data.
    loss : MarginLoss, optional
        :math:`\varphi`, a loss of `convexrobust.losses`; by default `Logistic`, the cross-entropy.
    """

    only_classes = "it bounds margins between classes; ConvexRobustRegressor has a certified loss"

    def __init__(self, ball, bound="slope", clean_share=0.0, loss=None):
        if bound not in BOUNDS:
            raise ValueError(f"bound must be one of {BOUNDS}, got {bound!r}.")
        if bound == "ibp" and ball.p != np.inf:
            raise ValueError(f"bound='ibp' propagates boxes: the norm must be inf, got {ball.p!r}.")
        if not 0.0 <= clean_share <= 1.0:
            raise ValueError(f"clean_share must be in [0, 1], got {clean_share!r}.")
        if not (loss is None or isinstance(loss, MarginLoss)):
            raise ValueError(
                f"loss must be a loss of margins, such as Hinge() or Logistic(), got {loss!r}."
            )
        super().__init__(ball)
        self.bound, self.clean_share, self.margin_loss = bound, clean_share, loss or Logistic()

    def loss(self, model, x, points, y):
        """Return the mean of the formula; the share of certified samples is a figure."""
        margins_of = slope_margins if self.bound == "slope" else ibp_margins
        with torch.autocast(x.device.type, enabled=False):  # rounded to half they are no bounds
            margins = margins_of(model, x, y, self.current_ball)
        outputs = model(x)
        loss = self.mean(self.margin_loss.value(torch_backend, margins))
        if self.clean_share > 0.0:
            clean = self.mean(self.losses(outputs, y))
            loss = self.clean_share * clean + (1.0 - self.clean_share) * loss
        certified = (margins.amin(dim=1) > 0.0).float().mean().item()
        return loss, self.figures(outputs, y) | {"certified": certified}


def slope_margins(model, x, y, ball) -> torch.Tensor:
    r"""Return lower bounds (b, E) of the margins of a two-layer network on the ball.

    With the coefficients a of a margin in the neurons h, gates D and
    :math:`q = \sum_j a_j D_j h_j` its slope at the centre of the set,

    .. math:: \underline{m} = m - \rho(q) - \sum_j (-a_j)_+ (\rho(h_j) - |h_j'x + b_j|)_+

    where :math:`\rho` is the support function of the set.

    Parameters
    ----------
    model : Sequential(Linear, ReLU, Linear)
        The network.
    x : tensor of shape (b, d)
        Points.
    y : tensor of shape (b,)
        Labels.
    ball : LpBall
        The threat model.

    Raises
    ------
    ValueError
        For a model of another form.
    """
    first, last = _two_layers(model)
    center, widths = _sets(x, ball)
    before = first(center)
    coefficients, margins = _rivals(last, torch.relu(before), y)
    gated = coefficients * (before >= 0.0)[:, None, :]
    reach = _support(widths[:, None, :], gated @ first.weight, ball.p)
    of_neurons = _support(widths[:, None, :], first.weight[None], ball.p)
    slack = torch.relu(of_neurons - before.abs())
    return margins - reach - torch.sum(torch.relu(-coefficients) * slack[:, None, :], dim=2)


def ibp_margins(model, x, y, ball) -> torch.Tensor:
    """Return lower bounds (b, E) of the margins by boxes that are propagated through the layers.

    The last layer and the difference of outputs are bounded as one.

    Parameters
    ----------
    model, x, y, ball
        As in `slope_margins`, for the layers that `Certified` names.
    """
    *layers, last = _layers(model)
    if not isinstance(last, torch.nn.Linear):
        raise ValueError(f"the model must end in Linear for bound='ibp', got {last}.")
    center, widths = _sets(x.flatten(1), ball)
    center, widths = (part.expand(len(x), -1).reshape(x.shape) for part in (center, widths))
    for layer in layers:
        center, widths = _through(layer, center, widths)
    coefficients, margins = _rivals(last, center, y)
    return margins - torch.sum(coefficients.abs() * widths[:, None, :], dim=2)


def _sets(x, ball):
    """Return centres (b, d) and half widths (b, d) or (1, d) of the sets around points (b, d)."""
    region = Region(torch_backend, x, ball)
    if ball.p == np.inf:  # cut by the bounds exactly
        return (region.low + region.high) / 2.0, (region.high - region.low) / 2.0
    return x, torch_backend.constant(ball.epsilons(x.shape[1])[None, :], x)


def _support(widths, slopes, p):
    if p == np.inf:
        return torch.sum(widths * slopes.abs(), dim=2)
    return torch.linalg.vector_norm(widths * slopes, ord=DUAL_NORM[p], dim=2)


def _rivals(last, hidden, y):
    """Return the coefficients (b, E, m) of the margins in the last hidden layer, and the margins.

    With one output the only margin is y f; with several they are f_y - f_c for the rivals c.
    """
    weight, bias = last.weight, last.bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if len(weight) == 1:
        sign = torch.where(y > 0, 1.0, -1.0).to(weight)[:, None]
        coefficients, offsets = sign[:, :, None] * weight[None], sign * bias
    else:
        label, others = y.long()[:, None], torch.arange(len(weight) - 1, device=y.device)[None]
        rivals = others + (others >= label).long()
        coefficients, offsets = weight[label] - weight[rivals], bias[label] - bias[rivals]
    return coefficients, torch.sum(coefficients * hidden[:, None, :], dim=2) + offsets


def _through(layer, center, widths):
    """Return centres and half widths after a layer: a box that holds all its outputs."""
    if isinstance(layer, torch.nn.Linear):
        return layer(center), torch.nn.functional.linear(widths, layer.weight.abs())
    if isinstance(layer, torch.nn.Conv2d):
        if layer.padding_mode != "zeros":
            raise ValueError("bound='ibp' needs Conv2d with padding_mode='zeros'.")
        options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return layer(center), torch.nn.functional.conv2d(widths, layer.weight.abs(), None, *options)
    low, high = layer(center - widths), layer(center + widths)
    return (low + high) / 2.0, (high - low) / 2.0


def _is_sequential(model) -> bool:
    sequential = torch.nn.Sequential
    return isinstance(model, sequential) and type(model).forward is sequential.forward


def _layers(model) -> list:
    """Return the layers of nested Sequentials, or say which one has no bound."""
    if _is_sequential(model):
        return [layer for part in model for layer in _layers(part)]
    if not isinstance(model, _LINEAR + _RISING_LAYERS):
        names = ", ".join(kind.__name__ for kind in _LINEAR + _RISING_LAYERS)
        raise ValueError(f"bound='ibp' needs a Sequential of {names}; got {type(model).__name__}.")
    return [model]


def _two_layers(model):
    kinds = (torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear)
    fits = _is_sequential(model) and len(model) == len(kinds)
    if not (fits and all(isinstance(*pair) for pair in zip(model, kinds, strict=True))):
        raise ValueError(
            "bound='slope' needs Sequential(Linear, ReLU, Linear), as `networks.two_layer` and "
            "`TwoLayerReLU.to_torch` return; use bound='ibp' for other networks."
        )
    return model[0], model[2]
