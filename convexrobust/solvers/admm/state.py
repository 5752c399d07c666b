"""What an iteration of `ADMM` acts on: its state, and the weights; and what it finds.

P neurons of each of two sides (V and W) and C outputs see n samples with E margins in d features;
m is the number of cone rows of all sides and outputs, stacked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

RELAXATION = 1.6  # 1.9 takes fewer iterations on some programs, and more on others


class Blocks(NamedTuple):
    """One array for each copy that is stored.

    Attributes
    ----------
    M : Tensor of shape (E, n, d)
        Slopes of the margins.
    Z : Tensor of shape (2, C, d, P)
        Weights, V and W.
    A : Tensor of shape (2, C, P) or (2, C, d, P), optional
        Bounds of the reaches, see `reach`; None without perturbations.
    """

    M: torch.Tensor
    Z: torch.Tensor
    A: torch.Tensor | None = None

    def each(self, function, *others) -> Blocks:
        """Apply a function to each block that is there, and to those of the others."""
        parts = zip(self, *others, strict=True)
        return Blocks._make(None if part[0] is None else function(*part) for part in parts)


class Weights(NamedTuple):
    r"""The weights :math:`\rho` of the copies.

    The iteration has those of the mean over the samples; a warm start takes them times the number
    of rows.
    """

    slopes: float
    neurons: float
    bounds: float
    preactivations: float
    reaches: float


class State(NamedTuple):
    """The state; an iteration overwrites its arrays, in place.

    Attributes
    ----------
    s : Blocks
        Copies plus scaled multipliers, z + u.
    a : Tensor of shape (E, n)
        Multipliers of the margins.
    gaps, b : Tensors of shape (m, P)
        State and multipliers of the cone rows or slacks, see `cones`.
    XH, RT : Tensors of the shapes of Z and A
        State of X'H and R'T, see `cones`; RT is None without perturbations.
    last : Tensor of shape (2, C, P)
        Where the joint step of weights and bounds starts, see `reach`.
    """

    s: Blocks
    a: torch.Tensor
    gaps: torch.Tensor
    b: torch.Tensor
    XH: torch.Tensor
    RT: torch.Tensor | None
    last: torch.Tensor

    def contiguous(self) -> State:
        """Return the state with contiguous blocks, in the same memory where they are."""
        return self._replace(s=self.s.each(torch.Tensor.contiguous))


class Found(NamedTuple):
    """What the last iteration found; the next one may overwrite it.

    Attributes
    ----------
    z, x : Blocks
        The proximal point, and the least-squares point.
    pulled, reached : Tensors of the shapes of Z and A
        X'(S b) and R'b of the multipliers b; ``reached`` is None without perturbations.
    """

    z: Blocks
    x: Blocks
    pulled: torch.Tensor
    reached: torch.Tensor | None


def dual(s, x, z):
    """Return the scaled multiplier u of the last iteration, from a block of the state after it."""
    return s - RELAXATION * (x - z) - z
