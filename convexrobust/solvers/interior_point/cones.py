"""Slacks and multipliers in the two cones of the method, with Nesterov and Todd's scaling.

In each step a cone is told its linear functions (``measure``), where to aim (``aim``), the change
of the linear functions (``direct``) and how much of the step to take (``move``).
"""

from __future__ import annotations

import numpy as np


class _Cone:
    """What both cones share: slacks s and multipliers z, and their steps ds and dz."""

    s: np.ndarray
    z: np.ndarray
    ds: np.ndarray
    dz: np.ndarray

    def move(self, step):
        """Take the step."""
        self.s = self.s + step * self.ds
        self.z = self.z + step * self.dz

    def product(self, step=0.0) -> float:
        """Return s'z, or what it would be after a step."""
        if step == 0.0:
            return float(np.sum(self.s * self.z))
        s, z = self.s + step * self.ds, self.z + step * self.dz
        return float(np.sum(s * z))


class Orthant(_Cone):
    """Slacks and multipliers that are at least 0, of any shape; those outside ``mask`` are idle."""

    def __init__(self, z, mu, mask=True):
        self.mask = np.broadcast_to(mask, np.shape(z))
        self.degree = int(self.mask.sum())
        self.z = self._or(0.0, np.asarray(z))
        self.s = self._or(1.0, mu / self._or(1.0, self.z))

    def _or(self, idle, values):
        """Return the values, with another one where the mask leaves them out."""
        return values if self.degree == self.mask.size else np.where(self.mask, values, idle)

    def measure(self, value):
        """Take in the value of the linear functions that the slacks stand for."""
        self.residual = self._or(0.0, value - self.s)
        self.weight = self.z / self.s

    def aim(self, mu, correct):
        """Set the multipliers ``target`` at which Newton's equation is met without any step."""
        correction = self.ds * self.dz if correct else 0.0
        self.goal = self._or(0.0, (mu - correction) / self.s)
        self.target = self.goal - self.weight * self.residual

    def direct(self, change, z=None):
        """Set the step from the change of the linear functions, and from the new z if known."""
        self.ds = self._or(0.0, change) + self.residual
        self.dz = (self.goal - self.weight * self.ds if z is None else z) - self.z

    def longest(self) -> float:
        """Return the longest step that stays inside."""
        shrinking = max(-np.min(self.ds / self.s), -np.min(self.dz / self._or(1.0, self.z)))
        return 1.0 / max(shrinking, 1e-300)


class SecondOrder(_Cone):
    """Slacks and multipliers (..., 1 + m) in second-order cones along the last axis."""

    def __init__(self, z, mu):
        self.z = z
        self.s = mu * _reflected(z) / _square(z)[..., None]
        self.degree = int(np.prod(z.shape[:-1]))

    def measure(self, value):
        """Take in the value of the linear functions; find Nesterov and Todd's scaling point w."""
        self.residual = value - self.s
        square_s, square_z = _square(self.s), _square(self.z)
        s, z = self.s / np.sqrt(square_s)[..., None], self.z / np.sqrt(square_z)[..., None]
        half = np.sqrt((1.0 + np.sum(s * z, axis=-1)) / 2.0)
        self.w = (s + _reflected(z)) / (2.0 * half[..., None])
        self.scale = (square_s / square_z) ** 0.25
        self.scaled = self._forward(self.z)

    def _forward(self, x):
        """Return W x."""
        w0, w1 = self.w[..., :1], self.w[..., 1:]
        along = np.sum(w1 * x[..., 1:], axis=-1, keepdims=True)
        tail = x[..., 1:] + (x[..., :1] + along / (1.0 + w0)) * w1
        return self.scale[..., None] * np.concatenate([w0 * x[..., :1] + along, tail], axis=-1)

    def _backward(self, x):
        """Return the inverse of W times x."""
        w0, w1 = self.w[..., :1], self.w[..., 1:]
        along = np.sum(w1 * x[..., 1:], axis=-1, keepdims=True)
        tail = x[..., 1:] + (-x[..., :1] + along / (1.0 + w0)) * w1
        return np.concatenate([w0 * x[..., :1] - along, tail], axis=-1) / self.scale[..., None]

    def hessian(self, x):
        """Return the inverse of W'W times x."""
        return self._backward(self._backward(x))

    def aim(self, mu, correct):
        """Set the multipliers ``target`` at which Newton's equation is met without any step."""
        wanted = np.zeros_like(self.z)
        wanted[..., 0] = mu
        if correct:
            wanted -= _jordan(self._backward(self.ds), self._forward(self.dz))
        self.goal = self._backward(_quotient(wanted, self.scaled))
        self.target = self.goal - self.hessian(self.residual)

    def direct(self, change):
        """Set the step from the change of the linear functions."""
        self.ds = change + self.residual
        self.dz = self.goal - self.z - self.hessian(self.ds)

    def longest(self) -> float:
        """Return the longest step that stays inside."""
        return min(_longest(self.s, self.ds), _longest(self.z, self.dz))


def _square(x):
    """Return x0^2 - ||x1||^2, its two factors apart for accuracy."""
    length = np.linalg.norm(x[..., 1:], axis=-1)
    return (x[..., 0] - length) * (x[..., 0] + length)


def _reflected(x):
    """Return (x0, -x1)."""
    return np.concatenate([x[..., :1], -x[..., 1:]], axis=-1)


def _jordan(x, y):
    """Return the product of the second-order cone's algebra."""
    tail = x[..., :1] * y[..., 1:] + y[..., :1] * x[..., 1:]
    return np.concatenate([np.sum(x * y, axis=-1, keepdims=True), tail], axis=-1)


def _quotient(x, y):
    """Return the q with _jordan(y, q) = x."""
    along = np.sum(y[..., 1:] * x[..., 1:], axis=-1)
    head = (y[..., 0] * x[..., 0] - along) / _square(y)
    tail = (x[..., 1:] - head[..., None] * y[..., 1:]) / y[..., :1]
    return np.concatenate([head[..., None], tail], axis=-1)


def _longest(x, dx) -> float:
    """Return the longest step from inside a second-order cone: a root of a quadratic."""
    a, c = _square(dx), _square(x)
    b = x[..., 0] * dx[..., 0] - np.sum(x[..., 1:] * dx[..., 1:], axis=-1)
    root = np.sqrt(np.maximum(b * b - a * c, 0.0))
    inverse = (root - b) / c  # the largest of 1 / step over both roots
    return float(1.0 / max(np.max(inverse), 1e-300))
