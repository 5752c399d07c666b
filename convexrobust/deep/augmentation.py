"""Random shifts and reflections of images, anew in every step of training."""

from __future__ import annotations

import torch

from convexrobust.deep.catalogue import check_method
from convexrobust.deep.methods.base import WrappedMethod


def augmented(x, *, padding=4, flip=True, generator=None) -> torch.Tensor:
    """Return images shifted and mirrored at random, each in its own way.

    Parameters
    ----------
    x : tensor of shape (n, c, h, w)
        Images.
    padding : int
        Largest shift in pixels, in both directions; what comes in from outside is 0.
    flip : bool
        Mirror every other image, left to right.
    generator : torch.Generator, optional
        A generator on the CPU; that of torch by default.

    Returns
    -------
    tensor of the shape of x

    Raises
    ------
    ValueError
        If x are no images.
    """
    if x.ndim != 4:
        raise ValueError(f"augmentation is for images (n, c, h, w), got points {tuple(x.shape)}.")
    (n, c, h, w), device = x.shape, x.device
    shift = torch.randint(-padding, padding + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(h) + shift[0], torch.arange(w) + shift[1]
    if flip:
        mirrored = torch.rand((n, 1), generator=generator) < 0.5
        columns = torch.where(mirrored, w - 1 - columns, columns)
    inside = ((0 <= rows) & (rows < h))[:, :, None] & ((0 <= columns) & (columns < w))[:, None, :]
    rows, columns = rows.clamp(0, h - 1).to(device), columns.clamp(0, w - 1).to(device)
    image, channel = (torch.arange(k, device=device) for k in (n, c))
    moved = x[
        image[:, None, None, None],
        channel[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
    return torch.where(inside[:, None].to(device), moved, torch.zeros_like(moved))


class Augmented(WrappedMethod):
    """A method whose batches of images are `augmented` first.

    Parameters
    ----------
    method : Method
        Any but those that remember a perturbation of each sample (`Ssds`), which belongs to the
        pixels of one image.
    padding, flip
        As in `augmented`.

    Raises
    ------
    ValueError
        For a method that remembers perturbations of samples.
    """

    def __init__(self, method, *, padding=4, flip=True):
        if hasattr(method, "n_rows"):
            raise ValueError(
                f"{type(method).__name__} keeps a perturbation of each image, which does not fit "
                "the image once it is shifted or mirrored; train it without augmentation."
            )
        check_method(method)
        super().__init__(method)
        self.padding, self.flip = padding, flip

    def step(self, model, optimizer, x, y, rows) -> dict[str, float]:
        """Update the model's parameters by one batch; see `Method.step`."""
        x = augmented(x, padding=self.padding, flip=self.flip)
        return self.method.step(model, optimizer, x, y, rows)
