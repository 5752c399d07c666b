r"""Adversarial training of a two-layer ReLU network by gradient descent on its weights.

It is the non-convex twin of `convexrobust.program.ConvexProgram`: the same network, loss, threat
model and weight decay, without the guarantee. For one output and no attack both have the same
optimal value once the network is wide enough and the program has all patterns (Pilanci and Ergen,
arXiv 2002.10553). With several outputs the neurons here are shared between outputs, and those of
the program are not, so that this optimum can be lower.
"""

from __future__ import annotations

import numpy as np
import torch

from convexrobust.attacks import fgsm, pgd
from convexrobust.backends import torch as torch_backend
from convexrobust.deep.model_loss import autograd_objective
from convexrobust.losses import Hinge
from convexrobust.network import TwoLayerReLU
from convexrobust.threads import threads_for

ATTACKS = ("none", "fgsm", "pgd")


def train_two_layer(
    X,
    y,
    *,
    width=64,
    ball=None,
    attack="none",
    beta=1e-3,
    n_outputs=1,
    loss=None,
    n_epochs=150,
    learning_rate=0.02,
    batch_size=None,
    n_steps=10,
    warmup=1.0 / 3.0,
    random_state=0,
) -> TwoLayerReLU:
    r"""Train a two-layer ReLU network by Adam on attacked data.

    .. math:: \min_{u, \alpha} \frac1n \sum_k \varphi\bigl(m_k(x_k + \delta_k)\bigr)
              + \frac{\beta}{2} \sum_j \left( \|u_j\|^2 + \|\alpha_j\|^2 \right)

    where the attack finds :math:`\delta_k` anew in every step (Madry et al., arXiv 1706.06083). It
    lowers the smallest margin; see `convexrobust.attacks.worst_margin_objective`. Hidden biases
    are part of u and decay too; there is no output bias. The learning rate falls to 0 along a
    cosine. On one machine the same seed gives the same network.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Data, without an intercept column; features should be of comparable scale.
    y : ndarray of shape (n,)
        Labels -1 / +1 with one output, class numbers 0 .. C-1 with several; targets if the loss is
        one of regression.
    width : int
        Number of hidden neurons.
    ball : LpBall, optional
        The threat model. Needed unless ``attack="none"``, which ignores it.
    attack : {"none", "fgsm", "pgd"}
        What is trained on: the data, `fgsm` points or `pgd` points.
    beta : float
        Strength of the weight decay, at least 0.
    n_outputs : int
        Number of outputs C.
    loss : Loss, optional
        A loss of `convexrobust.losses`; `Hinge` by default.
    n_epochs : int
        Passes over the data.
    learning_rate : float
        First learning rate of Adam.
    batch_size : int, optional
        Rows in a step; all of them by default.
    n_steps : int
        Steps of the pgd attack.
    warmup : float
        Share of the epochs in which the radius grows linearly from 0 to that of the ball.
    random_state : None, int or numpy.random.Generator
        For the first weights and the batches.

    Returns
    -------
    TwoLayerReLU
        The network after the last epoch, in float64.

    Raises
    ------
    ValueError
        For labels that do not fit the outputs, an attack that is not known or has no ball, and X
        outside the bounds of the ball.
    FloatingPointError
        If the objective, or the loss in an attack, stops being finite: the learning rate is too
        large or the features are of very different scales.

    Notes
    -----
    The defaults were tuned for the accuracy of pgd training on attacked test data (standardised
    breast cancer, l-inf, radius 0.1 to 0.3). They stop before the objective does: more epochs
    lower it further and, because the network then fits the attacked training points too closely,
    lower that accuracy by a few per cent. To compare objectives, give more epochs.
    """
    loss = Hinge() if loss is None else loss
    X, y = np.asarray(X, dtype=np.float64), np.asarray(y)
    _check(X, y, loss, n_outputs, attack, ball)
    rng = np.random.default_rng(random_state)
    weights = _first_weights(X.shape[1] + 1, width, n_outputs, rng)
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_epochs)
    with threads_for(min(len(X), batch_size or len(X)) * sum(w.numel() for w in weights)):
        for epoch in range(n_epochs):
            now = _grown(ball, epoch / n_epochs, warmup) if attack != "none" else None
            for rows in _batches(len(X), batch_size, rng):
                points = torch.as_tensor(X[rows])
                margins = _margins_of(y[rows], loss.task, n_outputs, loss.margin_scales)
                points = _attacked(points, weights, margins, attack, now, n_steps)
                losses = loss.value(torch_backend, margins(_outputs(weights, points)))
                decay = sum(torch.sum(torch.square(weight)) for weight in weights)
                _descend(optimizer, torch.mean(losses) + beta / 2.0 * decay, epoch)
            schedule.step()
    return TwoLayerReLU(*(weight.detach().numpy() for weight in weights))


def _check(X, y, loss, n_outputs, attack, ball):
    if X.ndim != 2 or y.shape != (len(X),):
        raise ValueError(f"X must be (n, d) and y (n,), got {X.shape} and {y.shape}.")
    if attack not in ATTACKS:
        raise ValueError(f"attack must be one of {ATTACKS}, got {attack!r}.")
    if attack != "none" and ball is None:
        raise ValueError(f"attack={attack!r} needs a ball, for example LpBall(numpy.inf, 0.1).")
    if loss.task == "regression":
        if n_outputs != 1:
            raise ValueError("n_outputs must be 1 for a regression loss.")
        return
    legal = [-1, 1] if n_outputs == 1 else list(range(n_outputs))
    if not np.isin(y, legal).all():
        raise ValueError(
            f"y must hold only {legal} with n_outputs={n_outputs}, got {np.unique(y)[:5]}."
        )


def _first_weights(d, width, n_outputs, rng):
    """Return hidden (d, width) and output (width, C) weights.

    They are small, so that the neurons find their directions while the outputs are still near 0.
    """
    hidden = 0.1 * rng.standard_normal((d, width)) / np.sqrt(d)
    output = 0.1 * rng.standard_normal((width, n_outputs)) / np.sqrt(width)
    return [torch.tensor(weight, requires_grad=True) for weight in (hidden, output)]


def _outputs(weights, X):
    hidden, output = weights
    return torch.relu(X @ hidden[:-1] + hidden[-1]) @ output


def _margins_of(y, task, n_outputs, scales=1.0):
    """Return the function from outputs (n, C) to the margins (n, E) of the labels y, scaled."""
    margins = _unscaled_margins_of(y, task, n_outputs)
    if np.all(np.equal(scales, 1.0)):
        return margins
    factors = torch.as_tensor(scales, dtype=torch.float64)
    return lambda outputs: factors * margins(outputs)


def _unscaled_margins_of(y, task, n_outputs):
    if task == "regression" or n_outputs == 1:
        target = torch.as_tensor(y.astype(np.float64))[:, None]
        if task == "regression":
            return lambda outputs: torch.hstack([target - outputs, outputs - target])
        return lambda outputs: target * outputs
    label = torch.as_tensor(y.astype(np.int64))[:, None]
    others = torch.arange(n_outputs - 1)[None, :]
    rivals = others + (others >= label)  # the classes but the label, in order
    return lambda outputs: outputs.gather(1, label) - outputs.gather(1, rivals)


def _attacked(X, weights, margins, attack, ball, n_steps):
    """Return points of the ball around X with small margins, as a constant."""
    if attack == "none":
        return X
    fixed = [weight.detach() for weight in weights]
    objective = autograd_objective(
        lambda points: torch_backend.row_max(-margins(_outputs(fixed, points)))
    )
    if attack == "fgsm":
        return fgsm(objective, X, ball, xp=torch_backend)
    return pgd(objective, X, ball, n_steps=n_steps, xp=torch_backend)


def _grown(ball, progress, warmup):
    """Return the ball at this share of the epochs."""
    return ball if progress >= warmup else ball.scaled_to(ball.radius * progress / warmup)


def _batches(n, batch_size, rng):
    if batch_size is None or batch_size >= n:
        return [np.arange(n)]
    order = rng.permutation(n)
    return [order[first : first + batch_size] for first in range(0, n, batch_size)]


def _descend(optimizer, objective, epoch):
    if not torch.isfinite(objective):
        raise FloatingPointError(
            f"the training objective is {objective.item()} in epoch {epoch}: lower learning_rate, "
            "or bring the features to one scale."
        )
    optimizer.zero_grad()
    objective.backward()
    optimizer.step()
