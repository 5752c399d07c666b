"""One training: its epochs, its figures and its checkpoints."""

from __future__ import annotations

import math
import os
import time
import zlib
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from convexrobust.deep.losses import accuracy
from convexrobust.deep.methods.base import Method, weighted
from convexrobust.deep.model_loss import left_as_found
from convexrobust.deep.processes import check_alike, gathered, process, share_buffers, shared
from convexrobust.perturbations import LpBall

ROBUST, CLEAN = "validation_robust_accuracy", "validation_accuracy"
_PEAK = 0.4  # of a cyclic run: where the learning rate is largest
_DROPS = (0.5, 0.75)  # of a run: where the learning rate of "multistep" falls to a tenth
_VALIDATED = 512  # rows of the validation data at a time
_HELD = {"settings", "seed", "history", "best", "model", "optimizer", "methods"}  # by a checkpoint


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


@dataclass
class Run:
    """What one training consists of, and what a checkpoint holds of it."""

    model: torch.nn.Module
    method: Method
    optimizer: torch.optim.Optimizer
    data: tuple
    validation: tuple | None
    settings: dict
    seed: int
    path: str | None
    weights: torch.Tensor | None = None
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
        share_buffers(self.model)  # before the validation, which is then of one model
        n_rows = sum(len(rows) for rows in batches)
        means = {name: total / n_rows for name, total in totals.items()}
        pace = {"learning_rate": self.optimizer.param_groups[0]["lr"], "scale": self.method.scale}
        return {"epoch": number} | pace | means | {"seconds": time.perf_counter() - started}

    def _batches(self, number):
        """Return this process's rows of each batch, and seed what else is random in the epoch.

        A rest that would be a single row for each process joins the batch before: batch
        normalisation has no variance to divide by in a batch of one.
        """
        rank, n_processes = process()
        shuffling = np.random.default_rng([self.seed, number])
        order = torch.from_numpy(shuffling.permutation(len(self.data[0])))
        (noise_seed,) = np.random.SeedSequence([self.seed, number, rank]).generate_state(1)
        torch.manual_seed(int(noise_seed))
        batches = _split(order, self.settings["batch_size"], 2 * n_processes)
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
        weights = None if self.weights is None else self.weights[rows].to(x)
        try:
            with weighted(self.method, weights):
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
        figures = {CLEAN: sum(right) / n}
        return figures if ball is None else figures | {ROBUST: sum(robust) / n}

    def record(self, figures):
        """Add an epoch to the history; keep its weights if they are the best."""
        figures = shared(figures)
        history, name = self.history, ROBUST if ROBUST in figures else CLEAN
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
        if self.path is None:
            return
        methods = gathered(_plain(self.method.state_dict()))
        if process()[0] != 0:
            return
        state = {
            "settings": self.settings,
            "seed": self.seed,
            "history": vars(self.history),
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "methods": methods,
        }
        state = _plain(state)
        unfinished = Path(f"{self.path}.unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self.path)

    def resume(self):
        """Go on from the checkpoint, if there is one; give all processes one start."""
        found = self.path is not None and Path(self.path).exists()
        check_alike("checkpoint", self.path and f"{self.path} ({'there' if found else 'new'})")
        if found:
            self._take_up(_read(self.path))
        if process()[1] > 1:
            seeds = [self.seed]
            distributed.broadcast_object_list(seeds, 0)
            (self.seed,) = seeds
            for value in self.model.state_dict().values():
                distributed.broadcast(value, 0)

    def _take_up(self, state):
        saved = state["settings"]
        saved |= {"method": _named_as_now(saved.get("method"))}
        for name, value in self.settings.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"checkpoint {self.path} is of another training: {name} was "
                    f"{saved.get(name)!r} and is {value!r}. Give another path."
                )
        state_of_method = self._own(state["methods"])
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"checkpoint {self.path} is of another model: {error}") from error
        self.method.load_state_dict(state_of_method)
        self.history, self.seed = History(**state["history"]), state["seed"]
        self.best = state["best"]

    def _own(self, states):
        """Return the state of this process's method from those of all."""
        rank, n_processes = process()
        if len(states) != n_processes and any(states):
            raise ValueError(
                f"checkpoint {self.path} was written by {len(states)} process(es) and is read by "
                f"{n_processes}; {type(self.method).__name__} remembers something in each. Resume "
                f"with {len(states)}, or give another path."
            )
        return states[rank] if rank < len(states) else {}


def _split(order, size, smallest):
    """Return batches; a rest of fewer rows than ``smallest`` joins the batch before."""
    batches = list(torch.split(order, size))
    if len(batches) > 1 and len(batches[-1]) < smallest <= size:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


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


def described(value):
    """Return a setting as plain values; of a method its options, not what it remembers."""
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    if isinstance(value, dict):
        return {name: described(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, LpBall):
        return [float(value.p), described(value.epsilon), described(value.bounds)]
    if isinstance(value, partial):
        return [value.func.__qualname__, {k: described(v) for k, v in value.keywords.items()}]
    if hasattr(value, "load_state_dict"):
        remembered = {"scale", "sample_weights", *value.state_dict()}
        options = {k: described(v) for k, v in vars(value).items() if k not in remembered}
        return {"name": type(value).__name__} | options
    return getattr(value, "__qualname__", type(value).__name__)


def _named_as_now(method):
    """Return a method's description, of one with squared losses by the names of today.

    Until losses became a part of the methods these were classes of their own: `LeastSquares` with
    an attack by name, and a twin ``Squared...`` of each other method.
    """
    if not isinstance(method, dict):
        return method
    if "method" in method:  # around another one
        return method | {"method": _named_as_now(method["method"])}
    name, loss = method.get("name", ""), "HalfSquares"
    if name == "LeastSquares":
        one, several = ["fgsm", {"loss": "residual"}], {"step": 1.0, "n_restarts": 1, "loss": loss}
        attacked = {
            "fgsm": [one, "eval"],
            "fast": [["random_step", {"step": 1.25, "loss": loss}], "train"],
            "n-fgsm": [["noisy_step", {"noise": 2.0, "step": 1.0, "loss": loss}], "train"],
            "pgd": [["several_steps", {"n_steps": method["n_steps"]} | several], "eval"],
        }
        now = {"name": "Standard", "ball": method["ball"], "sample_loss": loss}
        if method["attack"] == "standard":
            return now
        attack, mode = attacked[method["attack"]]
        return now | {"name": "Attacked", "attack": attack, "mode": mode}
    if not name.startswith("Squared"):
        return method
    now = method | {"name": name.removeprefix("Squared"), "sample_loss": loss}
    if method.get("attack") == ["_attacked", {}]:
        now["attack"] = ["fgsm", {"loss": "residual"}]
    if method.get("attack") == ["largest_residuals", {"n_steps": 10}]:
        now["attack"] = ["several_steps", {"n_steps": 10, "loss": loss}]
    return now


def _plain(value):
    """Return a state as any process can read it safely: no number of NumPy, no other device."""
    if isinstance(value, np.generic):
        return value.item()
    if torch.is_tensor(value):
        return value.cpu()
    if isinstance(value, dict):
        return type(value)((name, _plain(part)) for name, part in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value


def fingerprint(data):
    """Return shapes and check sums of arrays."""
    if data is None:
        return None
    return [[list(part.shape), zlib.crc32(part.cpu().contiguous().numpy())] for part in data]


def _accuracy(model, x, y):
    with torch.no_grad(), left_as_found(model, "eval"):
        return accuracy(model(x), y)
