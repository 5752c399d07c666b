"""What an attack on a torch model increases, and the promise to leave the model as it was."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from convexrobust.deep.losses import output_residuals

LOSSES = ("margin", "cross-entropy", "residual")
_BINARY = ([-1], [0], [1], [-1, 1], [0, 1])


class ModelLoss:
    r"""The loss of a model at points, each row its own, as a differentiable function.

    ``"margin"`` is :math:`\max_{c \ne y} f_c - f_y`, above 0 where the row is misclassified, and
    :math:`-y f` with one output; ``"cross-entropy"`` is :math:`\log \sum_c e^{f_c} - f_y` and
    :math:`\log(1 + e^{-y f})`. With a target t they are :math:`f_t - f_y` and
    :math:`f_t - \log \sum_c e^{f_c}`.

    Parameters
    ----------
    model : callable
        From points (n, *shape) to outputs (n,), (n, 1) or (n, C).
    y : tensor of shape (n,)
        Labels: -1 / +1, 0 / 1 or bool with one output, class numbers 0 .. C-1 with several.
    shape : tuple
        The shape of one point.
    loss : {"margin", "cross-entropy"}
        Which of the two.
    target : tensor of shape (n,), optional
        The classes to raise, in the coding of y.

    Raises
    ------
    ValueError
        For another loss, labels that are not whole numbers, or targets that equal labels.
        When called: for labels or outputs that do not fit each other.
    """

    def __init__(self, model, y, shape, loss="margin", target=None):
        if loss not in LOSSES[:2]:
            raise ValueError(f"loss must be one of {LOSSES[:2]}, got {loss!r}.")
        self.model, self.shape, self.loss = model, shape, loss
        self.y = _class_numbers("y", y)
        self.target = None if target is None else _class_numbers("targets", target)
        if target is not None and bool((self.target == self.y).any()):
            raise ValueError("targets must differ from y in every row.")
        both = {"y": self.y} | ({} if target is None else {"targets": self.target})
        self.classes = {name: torch.unique(values).tolist() for name, values in both.items()}

    def __call__(self, X):
        """Return the losses (n,) of points (n, d)."""
        outputs = self.outputs(X)
        if outputs.shape[1] == 1:
            return self._signed(outputs[:, 0])
        return self._of_target(outputs) if self.target is not None else self._of_rivals(outputs)

    def outputs(self, X):
        """Return the outputs (n, C) at points (n, d), in the dtype of the points."""
        outputs = self.model(X if X.shape[1:] == self.shape else X.reshape(len(X), *self.shape))
        if outputs.ndim == 1:
            outputs = outputs[:, None]
        if outputs.ndim != 2 or len(outputs) != len(X):
            raise ValueError(
                f"the model must return (n,), (n, 1) or (n, C) for n={len(X)} points, "
                f"got {tuple(outputs.shape)}."
            )
        self.check_labels(outputs.shape[1])
        return outputs.to(X.dtype)  # autocast returns half precision

    def likeliest_rivals(self, X, n_targets):
        """Return up to n_targets other classes a row, those with the largest outputs first."""
        with torch.no_grad():
            outputs = self.outputs(X)
        if outputs.shape[1] == 1:
            return [torch.where(self.y > 0, min(self.classes["y"][0], 0), 1)]
        rivals = outputs.scatter(1, self.y[:, None], -torch.inf)
        return list(rivals.topk(min(n_targets, outputs.shape[1] - 1), dim=1).indices.T)

    def _signed(self, output):
        margin = torch.where(self.y > 0, output, -output)
        if self.loss == "margin":
            return -margin
        if self.target is not None:
            return -torch.nn.functional.softplus(margin)
        return torch.nn.functional.softplus(-margin)

    def _of_rivals(self, outputs):
        if self.loss == "cross-entropy":
            return torch.nn.functional.cross_entropy(outputs, self.y, reduction="none")
        rivals = outputs.detach().scatter(1, self.y[:, None], -torch.inf)
        return self._above_label(outputs, rivals.argmax(dim=1))

    def _of_target(self, outputs):
        if self.loss == "cross-entropy":
            return -torch.nn.functional.cross_entropy(outputs, self.target, reduction="none")
        return self._above_label(outputs, self.target)

    def _above_label(self, outputs, rival):
        pair = outputs.gather(1, torch.stack([rival, self.y], dim=1))
        return pair[:, 0] - pair[:, 1]

    def check_labels(self, n_outputs):
        """Raise ValueError for labels or targets that do not fit a number of outputs."""
        for name, classes in self.classes.items():
            if n_outputs == 1:
                fits, legal = classes in _BINARY, "-1 / +1 or 0 / 1"
            else:
                fits = 0 <= classes[0] and classes[-1] < n_outputs
                legal = f"0 .. {n_outputs - 1}"
            if not fits:
                raise ValueError(
                    f"{name} must hold {legal} for a model with {n_outputs} output(s), "
                    f"got {classes[:5]}."
                )


class ModelResidual:
    """The size of the residual of a model for regression at points, beside `ModelLoss`.

    Parameters
    ----------
    model : callable
        From points (n, *shape) to outputs (n,) or (n, 1).
    y : tensor of shape (n,)
        Targets, real numbers.
    shape : tuple
        The shape of one point.
    """

    def __init__(self, model, y, shape):
        self.model, self.y, self.shape = model, y, shape

    def __call__(self, X):
        """Return the sizes (n,) at points (n, d)."""
        return output_residuals(self.model(X.reshape(len(X), *self.shape)), self.y).abs()


def model_loss(model, y, shape, loss="margin", target=None):
    """Return what an attack on a model increases: `ModelLoss`, or `ModelResidual` if "residual"."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}.")
    if loss != "residual":
        return ModelLoss(model, y, shape, loss, target)
    return ModelResidual(model, y, shape)


def autograd_objective(objective):
    """Return ``loss_and_gradient`` for an attack from a differentiable function of the points.

    Parameters
    ----------
    objective : callable
        From a tensor of points (n, d) to a tensor of losses (n,), each of its own row only.

    Returns
    -------
    callable
        From points (n, d) to losses (n,) and gradients (n, d), both detached. The ``.grad`` of no
        parameter is touched. Its method ``losses`` returns the losses alone.

    Raises
    ------
    ValueError
        When called, if the losses do not depend on the points differentiably.
    """
    return _Differentiated(objective)


class _Differentiated:
    """A function of points, with its gradients."""

    def __init__(self, objective):
        self.objective = objective

    def __call__(self, X):
        X = X.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.objective(X)
            if not losses.requires_grad:
                raise ValueError(
                    "the loss has no gradient in the points: the model detaches them or runs "
                    "without gradients. Attack it with square."
                )
            (gradient,) = torch.autograd.grad(losses.sum(), X)
        return losses.detach(), gradient

    def losses(self, X):
        with torch.no_grad():
            return self.objective(X)


@contextmanager
def left_as_found(model, mode):
    """Put a model in a mode for a while; then give modules their modes and buffers back.

    Parameters
    ----------
    model : callable
        Only a ``torch.nn.Module`` has modes and buffers; anything else is left alone.
    mode : {"eval", "train", None}
        The mode; None for the one it is in.
    """
    if mode not in ("eval", "train", None):
        raise ValueError(f"mode must be 'eval', 'train' or None, got {mode!r}.")
    if not isinstance(model, torch.nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        if mode is not None:
            model.train(mode == "train")
        yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            # Written only where needed: a graph that the caller holds may have saved the buffer.
            if not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)


class _TwoLogit(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        half = self.model(x).reshape(len(x)) / 2.0
        return torch.stack([-half, half], dim=1)


def as_two_logit(model):
    """Return a module with outputs [-f/2, f/2] (n, 2) for a model with one output f.

    Other libraries take models of two or more classes only; some call a model of one output
    robust at every point. Margins and cross-entropies are those of f, with labels 0 / 1.

    Parameters
    ----------
    model : torch.nn.Module or callable
        From x to outputs (n,) or (n, 1).
    """
    return _TwoLogit(model)


def _class_numbers(name, y):
    numbers = y.to(torch.int64)
    whole = not y.is_floating_point() or bool((numbers == y).all())
    if y.ndim != 1 or not whole:
        raise ValueError(f"{name} must be whole numbers of shape (n,), got {tuple(y.shape)}.")
    return numbers
