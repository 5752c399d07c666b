r"""The one training loop: any `deep.methods` method, any torch model, epochs that can be resumed.

Every epoch draws its batches and all its noise from a seed of its own, made of ``random_state`` and
the number of the epoch. A checkpoint therefore holds no state of a random generator, and a resumed
run is the uninterrupted one, bit for bit where the arithmetic of the device is deterministic.
"""

from __future__ import annotations

import csv
import json
import math
import os
import sys
import time
import warnings
import zlib
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from convexrobust.deep import attacks
from convexrobust.deep.methods.base import Method, accuracy
from convexrobust.deep.model_loss import left_as_found
from convexrobust.deep.two_layer import train_two_layer
from convexrobust.perturbations import LpBall

__all__ = ["History", "collapsed", "learning_rate_factor", "train", "train_two_layer"]

SCHEDULES = ("cyclic", "multistep", "cosine", None)
_PEAK = 0.4  # of a cyclic run: where the learning rate is largest
_DROPS = (0.5, 0.75)  # of a run: where the learning rate of "multistep" falls to a tenth
_VALIDATED = 512  # rows of the validation data at a time
_COLLAPSED = "catastrophic overfitting"
_HELD = {"settings", "seed", "history", "best", "model", "optimizer", "method"}  # by a checkpoint
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
        Share of the run, 0 to 1, in which the radius grows linearly to that of the ball.
    validation : tuple (X, y), optional
        Data that is attacked after every epoch, in eval mode at the full radius of ``method.ball``.
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
    device = torch.device(device or next(model.parameters()).device)
    _check_options(n_epochs, schedule, warmup, keep, overfitting, validation, patience, method.ball)
    _check_files(checkpoint, log)
    _check_precision(precision, device)
    _check_processes(batch_size)
    model.to(device)
    optimizer = optimizer or partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
    optimizer = optimizer(model.parameters(), lr=learning_rate)
    optimizer.register_step_pre_hook(partial(_before_step, clip_gradient))
    data = _as_tensors(model, X, y)
    validation = None if validation is None else _as_tensors(model, *validation)
    seed = int(np.random.default_rng(random_state).integers(2**32))

    settings = {"n_epochs": n_epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    settings |= {"schedule": schedule, "warmup": warmup, "clip_gradient": clip_gradient}
    settings |= {"keep": keep, "patience": patience, "overfitting": overfitting}
    settings |= {"precision": precision, "random_state": None if random_state is None else seed}
    settings |= {"method": method, "optimizer": type(optimizer).__name__}
    settings |= {"data": _fingerprint(data), "validation": _fingerprint(validation)}
    settings = {name: _described(value) for name, value in settings.items()}
    run = _Run(model, method, optimizer, data, validation, settings, seed, checkpoint)

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


def learning_rate_factor(schedule, done) -> float:
    r"""Return the share of the largest learning rate that is used when a share of a run is done.

    "cyclic": linearly from 0 to 1 at 2/5 of the run, and back to 0 (Wong, Rice and Kolter,
    arXiv 2001.03994); "multistep": 1, and a tenth of it after 1/2 and again after 3/4 (as Rice,
    Wong and Kolter, arXiv 2002.11569); "cosine": :math:`(1 + \cos \pi t) / 2`; None: 1.
    """
    if schedule == "cyclic":
        return float(np.interp(done, [0.0, _PEAK, 1.0], [0.0, 1.0, 0.0]))
    if schedule == "multistep":
        return 0.1 ** sum(done >= drop for drop in _DROPS)
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0


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
    if not before or _ROBUST not in last:
        return False
    best = max(before, key=lambda figures: figures[_ROBUST])
    fell = last[_ROBUST] < best[_ROBUST] - drop
    return fell and last.get("accuracy", 1.0) >= best.get("accuracy", 0.0)


@dataclass
class _Run:
    """What one training consists of, and what a checkpoint holds of it."""

    model: torch.nn.Module
    method: Method
    optimizer: torch.optim.Optimizer
    data: tuple
    validation: tuple | None
    settings: dict
    seed: int
    path: str | None
    history: History = field(default_factory=History)
    best: dict | None = None

    def epoch(self) -> dict:
        """Train on all batches once; return the mean figures."""
        started, number = time.perf_counter(), len(self.history.epochs)
        device = self._device()
        self.model.train()
        batches = self._batches(number)
        totals: dict[str, float] = {}
        for i, rows in enumerate(batches):
            self._set_pace((number + (i + 0.5) / len(batches)) / self.settings["n_epochs"])
            x, y = (part[rows].to(device) for part in self.data)
            with self._precision(device):
                figures = self._step(number, x, y, rows)
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(rows)
        self._check_weights(number)
        n_rows = sum(len(rows) for rows in batches)
        means = {name: total / n_rows for name, total in totals.items()}
        pace = {"learning_rate": self.optimizer.param_groups[0]["lr"], "scale": self.method.scale}
        return {"epoch": number} | pace | means | {"seconds": time.perf_counter() - started}

    def _batches(self, number):
        """Return this process's rows of each batch, and seed what else is random in the epoch."""
        rank, n_processes = _process()
        shuffling = np.random.default_rng([self.seed, number])
        order = torch.from_numpy(shuffling.permutation(len(self.data[0])))
        (noise_seed,) = np.random.SeedSequence([self.seed, number, rank]).generate_state(1)
        torch.manual_seed(int(noise_seed))
        batches = torch.split(order, self.settings["batch_size"])
        # Equal shares, so that the mean over processes is that over the batch.
        parts = [rows[: len(rows) - len(rows) % n_processes][rank::n_processes] for rows in batches]
        return [rows for rows in parts if len(rows)]

    def _set_pace(self, done):
        """Set learning rate and radius for a share of the run."""
        factor = learning_rate_factor(self.settings["schedule"], done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["learning_rate"] * factor
        warmup = self.settings["warmup"]
        self.method.scale = min(1.0, done / warmup) if warmup > 0.0 else 1.0

    def _step(self, number, x, y, rows):
        try:
            return self.method.step(self.model, self.optimizer, x, y, rows)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} {self._last_good(number)}") from error

    def _last_good(self, number):
        if self.path is None or number == 0:
            return f"It was in epoch {number}; there is no checkpoint."
        return f"It was in epoch {number}; the checkpoint {self.path} is of the epoch before."

    def validated(self, attack) -> dict:
        """Return the accuracies on the validation data."""
        if self.validation is None:
            return {}
        device, ball = self._device(), self.method.ball
        right, robust = [], []
        for x, y in zip(*(part.split(_VALIDATED) for part in self.validation), strict=True):
            x, y = x.to(device), y.to(device)
            right.append(len(y) * _accuracy(self.model, x, y))
            if ball is not None:
                robust.append(len(y) * _accuracy(self.model, attack(self.model, x, y, ball), y))
        n = len(self.validation[1])
        figures = {_CLEAN: sum(right) / n}
        return figures if ball is None else figures | {_ROBUST: sum(robust) / n}

    def record(self, figures):
        """Add an epoch to the history; keep its weights if they are the best."""
        figures = _shared(self.model, figures)
        history, name = self.history, _ROBUST if _ROBUST in figures else _CLEAN
        history.epochs.append(figures)
        if name not in figures:
            return
        if history.best_epoch is None or figures[name] > history.epochs[history.best_epoch][name]:
            history.best_epoch = figures["epoch"]
            if self.settings["keep"] == "best" or self.settings["overfitting"] == "roll back":
                self.best = deepcopy(self.model.state_dict())

    def _precision(self, device):
        if self.settings["precision"] is None:
            return nullcontext()
        # Without a cache of the weights in half precision: a step may change them midway.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)

    def _device(self):
        return next(self.model.parameters()).device

    def _check_weights(self, number):
        if not all(bool(torch.isfinite(weight).all()) for weight in self.model.parameters()):
            raise FloatingPointError(
                f"a weight is not finite: lower the learning rate. {self._last_good(number)}"
            )

    def save(self):
        """Write the checkpoint, so that a crash leaves the old one or the new one."""
        if self.path is None or _process()[0] != 0:
            return
        state = {
            "settings": self.settings,
            "seed": self.seed,
            "history": vars(self.history),
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
        }
        unfinished = Path(f"{self.path}.unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self.path)

    def resume(self):
        """Go on from the checkpoint, if there is one; give all processes one start."""
        if self.path is not None and Path(self.path).exists():
            self._take_up(_read(self.path))
        if _process()[1] > 1:
            seeds = [self.seed]
            distributed.broadcast_object_list(seeds, 0)
            (self.seed,) = seeds
            for value in self.model.state_dict().values():
                distributed.broadcast(value, 0)

    def _take_up(self, state):
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"checkpoint {self.path} is of another training: {name} was "
                    f"{state['settings'].get(name)!r} and is {value!r}. Give another path."
                )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"checkpoint {self.path} is of another model: {error}") from error
        self.method.load_state_dict(state["method"])
        self.history, self.seed = History(**state["history"]), state["seed"]
        self.best = state["best"]


def _read(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = _HELD - set(state)
    except Exception as error:  # torch raises errors of many kinds for a damaged file
        raise ValueError(
            f"checkpoint {path} cannot be read: {error}. Delete it, or give another path."
        ) from error
    if missing:
        raise ValueError(f"checkpoint {path} is not one of a training: it lacks {sorted(missing)}.")
    return state


def _described(value):
    """Return a setting as plain values; of a method its options, not what it remembers."""
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str | list):
        return value
    if isinstance(value, partial):
        return [value.func.__qualname__, {k: _described(v) for k, v in value.keywords.items()}]
    if hasattr(value, "load_state_dict"):
        remembered = {"scale", *value.state_dict()}
        options = {k: _described(v) for k, v in vars(value).items() if k not in remembered}
        return {"name": type(value).__name__} | options
    return repr(value) if isinstance(value, LpBall) else type(value).__name__


def _fingerprint(data):
    """Return shapes and check sums of arrays."""
    if data is None:
        return None
    return [[list(part.shape), zlib.crc32(part.cpu().contiguous().numpy())] for part in data]


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
    if _process()[0] != 0:
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


def _accuracy(model, x, y):
    with torch.no_grad(), left_as_found(model, "eval"):
        return accuracy(model(x), y)


def _as_tensors(model, X, y):
    """Return points in the type of the model's parameters, and labels."""
    X = torch.as_tensor(X).to(next(model.parameters()).dtype)
    y = torch.as_tensor(y)
    if X.ndim < 2 or y.shape != X.shape[:1] or len(X) == 0:
        raise ValueError(
            f"X must be (n, ...) with at least one row and y (n,), got {tuple(X.shape)} and "
            f"{tuple(y.shape)}."
        )
    return X, y


# ------------------------------------------------------------------ several processes


def _process() -> tuple[int, int]:
    """Return the number of this process and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _before_step(largest_norm, optimizer, args, kwargs):
    """Average the gradients over the processes, then clip them."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    n_processes = _process()[1]
    if n_processes > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        parts = (flat / n_processes).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    if largest_norm is not None:
        torch.nn.utils.clip_grad_norm_(weights, largest_norm)


def _shared(model, figures):
    """Return the mean figures of all processes; give all the statistics of the first."""
    n_processes = _process()[1]
    if n_processes == 1:
        return figures
    for buffer in model.buffers():
        distributed.broadcast(buffer, 0)
    each = [None] * n_processes
    distributed.all_gather_object(each, figures)
    return {
        name: type(value)(np.mean([other[name] for other in each]))
        for name, value in figures.items()
    }


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
    n_processes = _process()[1]
    if n_started > 1 and n_processes == 1:
        raise RuntimeError(
            f"{n_started} processes were started: call torch.distributed.init_process_group first."
        )
    if batch_size < 1 or batch_size % n_processes:
        raise ValueError(
            f"batch_size must be a positive multiple of the {n_processes} process(es), got "
            f"{batch_size!r}."
        )
