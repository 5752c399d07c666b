"""Training in several processes: averages of gradients and figures, one set of statistics."""

from __future__ import annotations

import numpy as np
import torch
from torch import distributed


def process() -> tuple[int, int]:
    """Return the number of this process and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def before_step(largest_norm, optimizer, args, kwargs):
    """Average the gradients over the processes, then clip them."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    n_processes = process()[1]
    if n_processes > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        parts = (flat / n_processes).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    if largest_norm is not None:
        torch.nn.utils.clip_grad_norm_(weights, largest_norm)


def share_buffers(model):
    """Give all processes the buffers of the first: the statistics of batch normalisation."""
    if process()[1] > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def check_alike(name, value):
    """Raise ValueError, in every process, if the processes differ in a value."""
    each = [None] * process()[1]
    if len(each) > 1:
        distributed.all_gather_object(each, value)
    if any(other != each[0] for other in each):
        raise ValueError(
            f"{name} must be the same in all processes, on a disk that they share; got {each}."
        )


def gathered(value) -> list:
    """Return what each process has, in their order; all but the first get an empty list."""
    rank, n_processes = process()
    if n_processes == 1:
        return [value]
    each = [None] * n_processes if rank == 0 else None
    distributed.gather_object(value, each, 0)
    return each or []


def shared(figures):
    """Return the mean figures of all processes."""
    n_processes = process()[1]
    if n_processes == 1:
        return figures
    each = [None] * n_processes
    distributed.all_gather_object(each, figures)
    return {
        name: type(value)(np.mean([other[name] for other in each]))
        for name, value in figures.items()
    }
