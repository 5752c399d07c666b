r"""The one training loop: any `deep.methods` method, any torch model, epochs that can be resumed.

Every epoch draws its batches and all its noise from a seed of its own, made of ``random_state`` and
the number of the epoch. A checkpoint therefore holds no state of a random generator, and a resumed
run is the uninterrupted one, bit for bit where the arithmetic of the device is deterministic.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
import warnings
import zlib
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from convexrobust.deep import attacks
from convexrobust.deep.methods.base import accuracy
from convexrobust.deep.model_loss import left_as_found
from convexrobust.deep.two_layer import train_two_layer

__all__ = ["History", "collapsed", "learning_rate_factor", "train", "train_two_layer"]

SCHEDULES = ("cyclic", "multistep", "cosine", None)
_PEAK = 0.4  # of a cyclic run: where the learning rate is largest
_DROPS = (0.5, 0.75)  # of a run: where the learning rate of "multistep" falls to a tenth
_ROBUST, _CLEAN = "validation_robust_accuracy", "validation_accuracy"


@dataclass
class History:
    """What a training was like.

    Attributes
    ----------
    epochs : list of dict
        The figures of each epoch: "epoch", "learning_rate", "scale" of the radius, "seconds", the
        means of the method's figures and, with validation data, "validation_accuracy" and
        "validation_robust_accuracy".
    best_epoch : int or None
        The epoch with the best robust (without a ball: plain) validation accuracy.
    stopped : str
        Why it ended before the last epoch; empty if it did not.
    """

    epochs: list[dict] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: str = ""

    def __getitem__(self, name) -> np.ndarray:
        """Return one figure of all epochs."""
        return np.array([figures[name] for figures in self.epochs])


def train(
    model,
    method,
    X,
    y,
    *,
    n_epochs,
    batch_size=128,
    learning_rate=0.1,
    optimizer=None,
    schedule="cyclic",
    warmup=0.0,
    validation=None,
    attack=None,
    keep="last",
    patience=None,
    overfitting=None,
    clip_gradient=None,
    precision=None,
    device=None,
    random_state=0,
    checkpoint=None,
    log=None,
    progress=False,
) -> History:
    r"""Train a model in place by a method of `convexrobust.deep.methods`.

    Parameters
    ----------
    model : torch.nn.Module
        From points (b, ...) to outputs (b,), (b, 1) or (b, C). Left in eval mode.
    method : Method
        What a step on a batch is.
    X : array or tensor of shape (n, ...)
        Points; taken in the floating-point type of the model's parameters.
    y : array or tensor of shape (n,)
        Labels: -1 / +1 or 0 / 1 with one output, class numbers with several.
    n_epochs : int
        Passes over the data.
    batch_size : int
        Rows of a step, those of all processes together.
    learning_rate : float
        The largest learning rate.
    optimizer : callable, optional
        Called as ``optimizer(parameters, lr=learning_rate)``: a class of `torch.optim`, with its
        options by `functools.partial`. By default SGD, momentum 0.9 and weight decay 5e-4.
    schedule : {"cyclic", "multistep", "cosine", None}
        The learning rate over the steps of the run; see `learning_rate_factor`.
    warmup : float
        Share of the run in which the radius grows linearly to that of the ball.
    validation : tuple (X, y), optional
        Data that is attacked after every epoch, at the full radius of ``method.ball``.
    attack : callable, optional
        Of the validation data, called as ``attack(model, x, y, ball)``; 10 steps of
        `deep.attacks.pgd` by default.
    keep : {"last", "best"}
        The weights to end with: of the last epoch, or of `History.best_epoch`.
    patience : int, optional
        Epochs without a better validation accuracy after which training stops.
    overfitting : {None, "stop", "roll back"}
        What to do on catastrophic overfitting (see `collapsed`): nothing, stop, or stop and go back
        to the weights of the best epoch.
    clip_gradient : float, optional
        Largest norm of the gradient of a step.
    precision : {None, "bfloat16"}
        Autocast matrix products to half the precision; attacked points keep that of X.
    device : torch.device or str, optional
        Where to train; by default where the model is.
    random_state : None, int or numpy.random.Generator
        For batches and all that methods and models draw from torch's generators, which are given
        back as they were.
    checkpoint : path, optional
        File that holds the state after each epoch. If it is there, training goes on from it.
    log : path, optional
        File for the figures of the epochs, ``.csv`` or ``.jsonl``.
    progress : bool
        Print a line for each epoch to the standard error stream.

    Returns
    -------
    History
        The figures of the epochs.

    Raises
    ------
    ValueError
        For options that are not those above, or a checkpoint that cannot be read or is that of
        another training; the text says which setting differs.
    FloatingPointError
        If the loss is not finite. It names the last good checkpoint.

    Warns
    -----
    RuntimeWarning
        If training stops for catastrophic overfitting.

    Notes
    -----
    With several processes (``torchrun``, after `torch.distributed.init_process_group`) every
    process takes its share of each batch. Gradients are averaged before the optimizer's step rather
    than by ``DistributedDataParallel``, whose hooks do not fit methods that call a model several
    times or differentiate twice. Each process keeps its own method state; all go on from the
    checkpoint of the first, so that methods which remember samples must be trained by one.
    """
    _check_options(schedule, keep, overfitting, precision, validation, patience, log)
    device = torch.device(device or next(model.parameters()).device)
    _check_precision(precision, device)
    model.to(device)
    data = _as_tensors(model, X, y)
    factory = optimizer or partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
    seed = int(np.random.default_rng(random_state).integers(2**32))
    settings = {
        "method": f"{type(method).__name__} {method.ball}",
        "data": _fingerprint(*data),
        "n_epochs": n_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "seed": seed if random_state is not None else None,
    }
    run = _Run(model, method, factory(model.parameters(), lr=learning_rate), settings, seed)
