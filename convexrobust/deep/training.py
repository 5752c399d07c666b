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
import warnings
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from convexrobust.deep import attacks
from convexrobust.deep.catalogue import check_method
from convexrobust.deep.losses import has_one_output
from convexrobust.deep.methods.base import innermost
from convexrobust.deep.model_loss import ModelLoss, left_as_found
from convexrobust.deep.processes import before_step, process
from convexrobust.deep.run import ROBUST, History, Run, described, fingerprint, learning_rate_factor
from convexrobust.deep.two_layer import train_two_layer

__all__ = ["History", "collapsed", "learning_rate_factor", "train", "train_two_layer"]

SCHEDULES = ("cyclic", "multistep", "cosine", None)
_COLLAPSED = "catastrophic overfitting"


def train(
    model,
    method,
    X,
    y,
    *,
    n_epochs,
    sample_weight=None,
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
    sample_weight : array or tensor of shape (n,), optional
        Weights, at least 0, that multiply the losses of the samples, attacked or not; only their
        ratios matter. Rows of weight 0 are left out, and equal weights are as none. Validation,
        and all figures but the losses, have no weights.
    batch_size : int
        Rows of a step, those of all processes together. A last batch of a single row joins the one
        before, which batch normalisation could not train on alone.
    learning_rate : float
        The largest learning rate.
    optimizer : callable, optional
        Called as ``optimizer(parameters, lr=learning_rate)``: a class of `torch.optim`, with its
        options by `functools.partial`. By default SGD, momentum 0.9 and weight decay 5e-4.
    schedule : {"cyclic", "multistep", "cosine", None}
        The learning rate over the steps of the run; see `learning_rate_factor`.
    warmup : float
        Share of the run, 0 to 1, in which the radius grows linearly to that of the ball.
    validation : tuple (X, y), optional
        Data that is attacked after every epoch, in eval mode at the full radius of ``method.ball``.
    attack : callable, optional
        Of the validation data, called as ``attack(model, x, y, ball)``; 10 steps of
        `deep.attacks.pgd` by default. Without a seed it draws from torch's generator.
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
        For batches and all that methods, attacks and models draw from torch's generators, which
        are given back as they were. A generator of your own in a method or an attack is yours.
    checkpoint : path, optional
        File that holds the state after each epoch. If it is there, training goes on from it. The
        same for all processes.
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
        For options that are not those above, weights for a method that cannot weigh samples, or a
        checkpoint that cannot be read or is that of another training; the text says which setting
        differs.
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
    times or differentiate twice. Rows of a last batch that do not divide evenly sit out the epoch.
    What a method remembers is each process's own; the checkpoint holds all of it, and as many
    processes can resume it exactly (any number, for a method that remembers nothing).
    """
    check_method(method)
    if attack is not None:
        attacks.check_attack(attack)
    device = torch.device(device or next(model.parameters()).device)
    _check_options(n_epochs, schedule, warmup, keep, overfitting, validation, patience, method.ball)
    _check_files(checkpoint, log)
    _check_precision(precision, device)
    _check_processes(batch_size)
    model.to(device)
    optimizer = optimizer or partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
    optimizer = optimizer(model.parameters(), lr=learning_rate)
    optimizer.register_step_pre_hook(partial(before_step, clip_gradient))
    data, weights = _weighed(method, _as_tensors(model, X, y), sample_weight)
    validation = None if validation is None else _as_tensors(model, *validation)
    _check_labels(model, method, data, device)
    if validation is not None:
        _check_labels(model, method, validation, device)
    seed = int(np.random.default_rng(random_state).integers(2**32))

    settings = {"n_epochs": n_epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    settings |= {"schedule": schedule, "warmup": warmup, "clip_gradient": clip_gradient}
    settings |= {"keep": keep, "patience": patience, "overfitting": overfitting}
    settings |= {"precision": precision, "random_state": None if random_state is None else seed}
    options = {name: value for name, value in optimizer.defaults.items() if name != "lr"}
    settings |= {"method": method, "optimizer": [type(optimizer).__name__, options]}
    settings |= {"attack": attack}
    settings |= {"data": fingerprint(data), "validation": fingerprint(validation)}
    settings |= {"sample_weight": fingerprint(None if weights is None else [weights])}
    settings = {name: described(value) for name, value in settings.items()}
    run = Run(model, method, optimizer, data, validation, settings, seed, checkpoint, weights)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run.resume()
        while len(run.history.epochs) < n_epochs and not run.history.stopped:
            run.record(run.epoch() | run.validated(attack or partial(attacks.pgd, n_steps=10)))
            run.history.stopped = _reason_to_stop(run.history, patience, overfitting)
            run.save()
            _report(run.history, log, progress)
    if keep == "best" or (overfitting == "roll back" and run.history.stopped == _COLLAPSED):
        model.load_state_dict(run.best)
    model.eval()
    return run.history


def collapsed(epochs, drop=0.2) -> bool:
    """Whether the last epoch shows catastrophic overfitting (Wong, Rice and Kolter, 2001.03994).

    The robust validation accuracy is more than ``drop`` below the best one before, although the
    accuracy on the points that the method trains on ("accuracy") is no lower than it was then.

    Parameters
    ----------
    epochs : list of dict
        As `History.epochs`.
    drop : float
        The fall of the accuracy.
    """
    *before, last = epochs
    if not before or ROBUST not in last:
        return False
    best = max(before, key=lambda figures: figures[ROBUST])
    fell = last[ROBUST] < best[ROBUST] - drop
    return fell and last.get("accuracy", 1.0) >= best.get("accuracy", 0.0)


def _reason_to_stop(history, patience, overfitting):
    if overfitting is not None and collapsed(history.epochs):
        warnings.warn(
            f"{_COLLAPSED} in epoch {len(history.epochs) - 1}: the accuracy under the validation "
            "attack fell. Attack with more steps, or use GradAlign or N-FGSM.",
            RuntimeWarning,
            stacklevel=3,
        )
        return _COLLAPSED
    if patience is not None and len(history.epochs) - 1 - history.best_epoch >= patience:
        return f"no better validation accuracy for {patience} epochs"
    return ""


def _report(history, log, progress):
    """Write the log anew, so that a resumed run leaves no epoch twice, and a line of progress."""
    if process()[0] != 0:
        return
    if progress:
        figures = (f"{name} {value:.4g}" for name, value in history.epochs[-1].items())
        print("  ".join(figures), file=sys.stderr)
    if log is None:
        return
    with open(log, "w", newline="", encoding="utf-8") as file:
        if Path(log).suffix == ".jsonl":
            file.writelines(json.dumps(figures) + "\n" for figures in history.epochs)
        else:
            writer = csv.DictWriter(file, list(dict.fromkeys(chain(*history.epochs))))
            writer.writeheader()
            writer.writerows(history.epochs)


def _check_labels(model, method, data, device):
    """Raise ValueError for labels that do not fit the model's outputs, before the first epoch."""
    if getattr(innermost(method), "task", "classification") != "classification":
        return
    X, y = data
    with torch.no_grad(), left_as_found(model, "eval"):
        outputs = model(X[:1].to(device))
    n_outputs = 1 if has_one_output(outputs) else outputs.shape[1]
    ModelLoss(model, y, X.shape[1:]).check_labels(n_outputs)


def _as_tensors(model, X, y):
    """Return points in the type of the model's parameters, and labels."""
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the model's parameters are {dtype}: give a float32 model, and precision='bfloat16' "
            "to compute in half precision."
        )
    X = torch.as_tensor(X).to(dtype)
    y = torch.as_tensor(y)
    if X.ndim < 2 or y.shape != X.shape[:1] or len(X) == 0:
        raise ValueError(
            f"X must be (n, ...) with at least one row and y (n,), got {tuple(X.shape)} and "
            f"{tuple(y.shape)}."
        )
    return X, y


def _weighed(method, data, sample_weight):
    """Return the data (X, y) with a positive weight, and these weights: 1 on average, or None."""
    if sample_weight is None:
        return data, None
    if not hasattr(method, "sample_weights"):
        raise ValueError(
            f"{type(innermost(method)).__name__} cannot weigh samples: leave sample_weight out, or "
            "derive the method from BallMethod and average its losses by its mean."
        )
    X, y = data
    weights = torch.as_tensor(sample_weight, dtype=torch.float64, device=X.device)
    if weights.shape != y.shape or not torch.isfinite(weights).all() or (weights < 0.0).any():
        raise ValueError(
            f"sample_weight must be {len(y)} finite numbers of at least 0, one for each row of X, "
            f"got shape {tuple(weights.shape)}."
        )
    kept = weights > 0.0
    if not kept.any():
        raise ValueError("sample_weight must be above 0 for at least one row, it is 0 for all.")
    X, y, weights = X[kept], y[kept], weights[kept]
    return (X, y), None if (weights == weights[0]).all() else weights / weights.mean()


# ------------------------------------------------------------------ checks


def _check_options(n_epochs, schedule, warmup, keep, overfitting, validation, patience, ball):
    if n_epochs < 1:
        raise ValueError(f"n_epochs must be at least 1, got {n_epochs!r}.")
    if not 0.0 <= warmup <= 1.0:
        raise ValueError(f"warmup must be in [0, 1], got {warmup!r}.")
    for name, value, legal in (
        ("schedule", schedule, SCHEDULES),
        ("keep", keep, ("last", "best")),
        ("overfitting", overfitting, (None, "stop", "roll back")),
    ):
        if value not in legal:
            raise ValueError(f"{name} must be one of {legal}, got {value!r}.")
    if validation is None and (keep == "best" or patience is not None or overfitting is not None):
        raise ValueError("keep='best', patience and overfitting need validation=(X, y).")
    if overfitting is not None and ball is None:
        raise ValueError("overfitting needs a method with a ball, which the validation attacks in.")
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience!r}.")


def _check_files(checkpoint, log):
    for name, path in (("checkpoint", checkpoint), ("log", log)):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise ValueError(f"{name}={str(path)!r} is in a folder that does not exist: make it.")
    if log is not None and Path(log).suffix not in (".csv", ".jsonl"):
        raise ValueError(f"log must end in .csv or .jsonl, got {str(log)!r}.")


def _check_precision(precision, device):
    if precision not in (None, "bfloat16"):
        raise ValueError(f"precision must be None or 'bfloat16', got {precision!r}.")
    supported = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    if precision is not None and not supported:
        raise ValueError(f"precision='bfloat16' is not supported on {device}: use precision=None.")


def _check_processes(batch_size):
    n_started = int(os.environ.get("WORLD_SIZE", "1"))
    n_processes = process()[1]
    if n_started > 1 and n_processes == 1:
        raise RuntimeError(
            f"{n_started} processes were started: call torch.distributed.init_process_group first."
        )
    whole = isinstance(batch_size, int | np.integer)
    if not whole or batch_size < 1 or batch_size % n_processes:
        raise ValueError(
            f"batch_size must be a positive multiple of the {n_processes} process(es), got "
            f"{batch_size!r}."
        )
