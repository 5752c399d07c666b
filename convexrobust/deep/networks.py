"""Networks for training in torch, without a normalisation of their own.

Inputs are in the units of the threat model. Whoever wants them normalised wraps a network in
`Normalized`, so that the ball keeps its units. The network of a convex solution is
`TwoLayerReLU.to_torch`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn


def two_layer(n_features, width, n_outputs=1) -> nn.Sequential:
    """Return ``Sequential(Linear, ReLU, Linear)`` from points (n, n_features) to (n, n_outputs)."""
    return MLP(n_features, [width], n_outputs)


class MLP(nn.Sequential):
    """A fully connected ReLU network.

    Parameters
    ----------
    n_features : int
        Inputs; points (n, ...) are flattened by the caller.
    widths : sequence of int
        Neurons of the hidden layers.
    n_outputs : int
        Outputs; one for a binary classifier, or one a class.
    """

    def __init__(self, n_features, widths, n_outputs=1):
        sizes = [n_features, *widths]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(*hidden, nn.Linear(sizes[-1], n_outputs))


class SmallCNN(nn.Sequential):
    """Two convolutions of stride 2, with 16 and 32 channels, and 100 neurons.

    The network for MNIST of Wong, Rice and Kolter (arXiv 2001.03994).

    Parameters
    ----------
    n_outputs : int
        Outputs.
    n_channels : int
        Channels of the images.
    size : int
        Their height and width, a multiple of 4.
    """

    def __init__(self, n_outputs=10, n_channels=1, size=28):
        if size < 4 or size % 4:
            raise ValueError(f"size must be a multiple of 4, got {size!r}.")
        super().__init__(
            nn.Conv2d(n_channels, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (size // 4) ** 2, 100),
            nn.ReLU(),
            nn.Linear(100, n_outputs),
        )


class PreActResNet(nn.Sequential):
    """A residual network whose blocks normalise first (He et al., arXiv 1603.05027).

    Parameters
    ----------
    widths : sequence of int
        Channels of the stages; each stage but the first halves the image.
    n_blocks : int
        Blocks of a stage.
    n_outputs : int
        Outputs.
    n_channels : int
        Channels of the images.
    first_width : int, optional
        Channels of the first convolution, by default those of the first stage.
    """

    def __init__(self, widths, n_blocks, n_outputs=10, n_channels=3, first_width=None):
        first_width = widths[0] if first_width is None else first_width
        blocks = []
        for stage, (before, width) in enumerate(pairwise([first_width, *widths])):
            for block in range(n_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_Block(before if block == 0 else width, width, stride))
        super().__init__(
            nn.Conv2d(n_channels, first_width, 3, padding=1, bias=False),
            *blocks,
            nn.BatchNorm2d(widths[-1]),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], n_outputs),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def preact_resnet18(n_outputs=10, n_channels=3) -> PreActResNet:
    """Return the pre-activation ResNet-18 for images of 32 x 32 pixels."""
    return PreActResNet([64, 128, 256, 512], 2, n_outputs, n_channels)


def wide_resnet(depth=34, widen=10, n_outputs=10, n_channels=3) -> PreActResNet:
    """Return the wide residual network WRN-depth-widen (Zagoruyko, Komodakis, arXiv 1605.07146).

    Raises
    ------
    ValueError
        Unless the depth is 6 n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4 with n >= 1, such as 28 or 34, got {depth!r}.")
    widths = [16 * widen, 32 * widen, 64 * widen]
    return PreActResNet(widths, (depth - 4) // 6, n_outputs, n_channels, first_width=16)


class _Block(nn.Module):
    """Twice normalisation, ReLU and convolution, added to the input or a projection of it."""

    def __init__(self, before, width, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        same = stride == 1 and before == width
        self.project = None if same else nn.Conv2d(before, width, 1, stride=stride, bias=False)

    def forward(self, x):
        active = torch.relu(self.norm1(x))
        short = x if self.project is None else self.project(active)
        return short + self.conv2(torch.relu(self.norm2(self.conv1(active))))


class Normalize(nn.Module):
    """The map from x to (x - mean) / std.

    Parameters
    ----------
    mean, std : float or sequence
        One for all, or one for each entry of the second axis: a channel of images (n, c, h, w), a
        feature of points (n, d).

    Raises
    ------
    ValueError
        If a deviation is not positive, or a value is not finite.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean, std):
        super().__init__()
        mean = torch.as_tensor(mean, dtype=torch.get_default_dtype())
        std = torch.as_tensor(std, dtype=torch.get_default_dtype())
        if max(mean.ndim, std.ndim) > 1 or not bool(torch.isfinite(mean).all()):
            raise ValueError(f"mean must be a finite number or a vector of them, got {mean}.")
        if not bool((torch.isfinite(std) & (std > 0.0)).all()):
            raise ValueError(f"std must be positive, got {std}: leave out constant features.")
        self.register_buffer("mean", mean.reshape(-1))
        self.register_buffer("std", std.reshape(-1))

    def forward(self, x):
        """Return the normalised points."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x - self.mean.reshape(shape)) / self.std.reshape(shape)


class Normalized(nn.Sequential):
    """A model behind `Normalize`: its inputs, and the ball around them, have the units of the data.

    Parameters
    ----------
    model : torch.nn.Module
        The model of normalised inputs.
    mean, std : float or sequence
        As in `Normalize`.
    """

    def __init__(self, model, mean, std):
        super().__init__(Normalize(mean, std), model)
