"""Free adversarial training: the gradient of every step serves the weights and the attack."""

from __future__ import annotations

import torch

from convexrobust.deep.methods.base import Around, BallMethod, descend


class Free(BallMethod):
    r"""Repeat each batch, and move weights and points by the gradients of one backward pass.

    .. math:: \theta \leftarrow \theta - \eta \nabla_\theta \ell(x + \delta), \qquad
              \delta \leftarrow \Pi(\delta + s(\nabla_\delta \ell(x + \delta)))

    The perturbation stays for the next batch, one for each place in a batch. An epoch costs as much
    as ``n_replays`` epochs of plain training: give a ``n_replays``-th of them.

    Parameters
    ----------
    ball : LpBall
        The threat model.
    n_replays : int
        Steps on each batch.
    step : float
        Length of the step of the perturbation in units of the ball.
    sample_loss : SampleLoss, optional
        `CrossEntropy`, the default, or `HalfSquares` of `convexrobust.deep.losses`.

    References
    ----------
    Shafahi et al., arXiv 1904.12843.
    """

    def __init__(self, ball, n_replays=8, step=1.0, sample_loss=None):
        if n_replays < 1:
            raise ValueError(f"n_replays must be at least 1, got {n_replays!r}.")
        super().__init__(ball, sample_loss)
        self.n_replays, self.length = n_replays, step
        self.delta = None

    def step(self, model, optimizer, x, y, rows) -> dict[str, float]:
        """Update the model's parameters ``n_replays`` times by one batch."""
        around, delta = Around(x, self.current_ball), self._remembered(x)
        for _ in range(self.n_replays):
            points = around.moved(x + delta).requires_grad_()
            outputs = model(points)
            loss = descend(optimizer, self.mean(self.losses(outputs, y)))
            delta = around.moved(around.stepped(points, points.grad, self.length)) - x
        self.delta[: len(x)] = delta
        return {"loss": loss} | self.figures(outputs, y)

    def _remembered(self, x):
        if self.delta is None:
            self.delta = torch.zeros_like(x)
        self.delta = self.delta.to(x)
        if len(self.delta) < len(x):
            more = x.new_zeros(len(x) - len(self.delta), *x.shape[1:])
            self.delta = torch.cat([self.delta, more])
        return self.delta[: len(x)]

    def state_dict(self) -> dict:
        """Return the perturbation."""
        return {"delta": self.delta}

    def load_state_dict(self, state):
        """Take up the perturbation."""
        self.delta = state["delta"]
