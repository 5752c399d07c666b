r"""Lower bounds of the smallest output of a network on sets, for many cases at once.

On a set only some neurons :math:`t_j = u_j'x` change sign. With its weight :math:`\omega_j` in the
output, such a neuron is bounded from below by a line :math:`g_j t_j + c_j`:

* :math:`\omega_j > 0` (convex): any :math:`g_j \in [0, \omega_j]`, with c = 0;
* :math:`\omega_j < 0` (concave): the chord over the range of :math:`t_j` (triangle relaxation);
* in a *case* that says :math:`t_j \ge 0`: any :math:`g_j \le \omega_j` with c = 0, where what lies
  beyond :math:`\omega_j` is the multiplier of the case; if it says :math:`t_j \le 0`, any
  :math:`g_j \ge 0`.

The sum of the lines is linear, and its minimum over a set is known in closed form: a valid bound
for every g, whoever found it, and concave in g. The largest is the value of the relaxation as a
linear (l1, l-inf) or cone program (l2). A few steps of Adam on g, for hundreds of cases in two
matrix products a step, come within a thousandth of it (after Xu et al., arXiv 2011.13824, and Wang
et al., arXiv 2103.06624, who optimise such bounds for deep networks).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from convexrobust.adam import Adam
from convexrobust.backends import numpy as numpy_backend
from convexrobust.network import TwoLayerReLU
from convexrobust.perturbations import Neighbourhoods

_STEP, _DECAY = 0.3, 0.97  # of Adam, in units of the neurons' weights
_MOMENTS = 0.9, 0.99
_MULTIPLIERS = (0.25, 0.5, 1.0, 2.0)  # times the ratio of the neurons' reaches


@dataclass(frozen=True, eq=False)
class Minima:
    r"""Problems that share a hidden layer: :math:`b + \sum_j \omega_j (u_j'x)_+` over sets of x.

    Parameters
    ----------
    network : TwoLayerReLU
        Its hidden layer holds the neurons u.
    sets : Neighbourhoods
        The set of each sample, in features only.
    sample : ndarray of shape (I,)
        The sample of each problem.
    weight : ndarray of shape (I, m)
        Weights omega of the neurons.
    offset : ndarray of shape (I,)
        Constants b.
    """

    network: TwoLayerReLU
    sets: Neighbourhoods
    sample: np.ndarray
    weight: np.ndarray
    offset: np.ndarray

    @property
    def hidden(self) -> np.ndarray:
        """The weights of the features, (d, m)."""
        return self.network.hidden[: self.network.n_features]

    @cached_property
    def at_center(self) -> np.ndarray:
        """The neurons at the centres of the sets, (n, m)."""
        return self.network.design(self.sets.center) @ self.network.hidden

    @cached_property
    def reach(self) -> np.ndarray:
        """The most by which the neurons change on the sets, (n, m)."""
        every = np.arange(len(self.sets.center))
        return self.sets.support_pairs(numpy_backend, self.hidden, every)

    @cached_property
    def rounding(self) -> np.ndarray:
        """The most by which ``at_center`` and ``reach`` may be off together, (n, m).

        A sum of N products is off by N units of rounding of the sum of their sizes at most.
        """
        size = np.abs(self.network.design(self.sets.center)) @ np.abs(self.network.hidden)
        n_terms = sum(self.network.hidden.shape) + 8
        return 2.0 * n_terms * np.finfo(float).eps * (size + self.reach)


class Cases(NamedTuple):
    """Cases of problems.

    Attributes
    ----------
    problem : ndarray of shape (B,)
        The problem of each case.
    sign : ndarray of shape (B, m)
        1 for neurons that are active in the case, -1 for inactive ones, 0 if nothing is said.
    least, most : ndarray of shape (B, m)
        The range of each neuron in the case.
    slope : ndarray of shape (B, m)
        Slopes g to start from.
    bound : ndarray of shape (B,)
        A lower bound of the output in the case.
    """

    problem: np.ndarray
    sign: np.ndarray
    least: np.ndarray
    most: np.ndarray
    slope: np.ndarray
    bound: np.ndarray

    def at(self, index) -> Cases:
        """Return some of the cases."""
        return Cases(*(values[index] for values in self))

    def joined(self, other) -> Cases:
        """Return these cases and others."""
        return Cases(*map(np.concatenate, zip(self, other, strict=True)))


def roots(minima) -> Cases:
    """Return the cases that say nothing, with the slopes of chords."""
    center, reach = minima.at_center[minima.sample], minima.reach[minima.sample]
    share = np.clip((center + reach) / np.where(reach > 0.0, 2.0 * reach, 1.0), 0.0, 1.0)
    every = np.arange(len(center))
    sign, bound = np.zeros(center.shape, dtype=np.int8), np.full(len(center), -np.inf)
    return Cases(every, sign, center - reach, center + reach, share * minima.weight, bound)


def implied_ranges(minima, problem, neuron) -> tuple[np.ndarray, np.ndarray]:
    r"""Return the least and the most of all neurons, given the sign of one that changes sign.

    Arrays (2, m): where the neuron i is active (0) or inactive (1). By weak duality
    :math:`t_j \ge t_j - \mu s t_i` where :math:`s t_i \ge 0`, for every :math:`\mu \ge 0`; a few
    are tried. Neurons of nearly one direction, of which trained networks have many, imply each
    other's signs.
    """
    k, i = minima.sample[problem], neuron
    z, reach, rounding, H = minima.at_center[k], minima.reach[k], minima.rounding[k], minima.hidden
    ratio = np.multiply.outer([-1.0, 1.0], np.multiply.outer(_MULTIPLIERS, reach / reach[i]))
    rest = (H.T - ratio[..., None] * H[:, i]).reshape(-1, len(H))
    sets = minima.sets.rows(np.full(len(rest), k))
    width = sets.support(numpy_backend, rest).reshape(ratio.shape)
    width += rounding + np.abs(ratio) * rounding[i]
    center = z - ratio * z[i]
    # The line that is below t_j where neuron i has one sign is above it where it has the other.
    lower, upper = (center - width).max(axis=1), (center + width).min(axis=1)
    return np.maximum(z - reach, lower[::-1]), np.minimum(z + reach, upper)


class Ascent(NamedTuple):
    """What an ascent found in each case.

    Attributes
    ----------
    bound : ndarray of shape (B,)
        Best lower bound.
    slope : ndarray of shape (B, m)
        Its slopes g.
    neurons : ndarray of shape (B, m)
        The neurons at the mean of the lowest points, which is near the relaxation's solution.
    steps : tuple of two ndarray of shape (B, d)
        From the centres to points with a small output: the best of the lowest points, their mean.
    """

    bound: np.ndarray
    slope: np.ndarray
    neurons: np.ndarray
    steps: tuple[np.ndarray, np.ndarray]


class Relaxation:
    """The lines that bound problems from below, in cases.

    Parameters
    ----------
    minima : Minima
        The problems.
    cases : Cases
        The cases.
    """

    def __init__(self, minima, cases):
        sample = minima.sample[cases.problem]
        self.hidden, self.sets = minima.hidden, minima.sets.rows(sample)
        self.weight, self.offset = minima.weight[cases.problem], minima.offset[cases.problem]
        self.at_center, self.rounding = minima.at_center[sample], minima.rounding[sample]
        self.sign, self.least = cases.sign, cases.least
        self.split = cases.sign != 0
        moving = (cases.least < 0.0) & (cases.most > 0.0) & ~self.split
        self.convex, self.chorded = moving & (self.weight > 0.0), moving & (self.weight < 0.0)
        # In units of the weight, so that weights of any size divide safely.
        span = np.where(self.chorded, cases.most - cases.least, 1.0)
        self.chord = np.where(self.chorded, self.weight * cases.most / span, 0.0)
        fixed = np.where(~moving & (cases.least >= 0.0), self.weight, self.chord)
        active = cases.sign > 0
        self.low = np.select([self.convex | (cases.sign < 0), active], [0.0, -np.inf], fixed)
        self.high = np.select([self.convex | active, self.split], [self.weight, np.inf], fixed)
        self.constant = self.offset - np.sum(self.chord * self.least * self.chorded, axis=1)

    def bound(self, slope, direction, kept=0.0):
        """Return the lower bounds (B,) of slopes g (B, m).

        Parameters
        ----------
        slope : ndarray of shape (B, m)
            Slopes within ``low`` and ``high``.
        direction : ndarray of shape (B, d)
            ``slope @ hidden.T``, or that and the multipliers of further bounds on the points.
        kept : float or ndarray of shape (B,)
            What those multipliers add.
        """
        value = self.constant + np.sum(slope * self.at_center, axis=1) + kept
        value -= self.sets.support(numpy_backend, direction)
        size = np.sum((np.abs(slope) + np.abs(self.weight)) * self.rounding, axis=1)
        return value - size - 8.0 * np.finfo(float).eps * np.abs(self.offset)

    def outputs(self, neurons):
        """Return the outputs (B,) of the problems where the neurons have these values."""
        return self.offset + np.sum(self.weight * np.maximum(neurons, 0.0), axis=1)

    def looseness(self, neurons):
        """Return how far the chords are below the concave neurons at these values, (B, m)."""
        above = self.weight * np.maximum(neurons, 0.0) - self.chord * (neurons - self.least)
        return np.where(self.chorded, np.maximum(above, 0.0), 0.0)

    def branching_scores(self, neurons):
        """Return how much a split of each neuron promises, (B, m); 0 where there is none.

        The product of what both halves gain at these values, each with a tenth of the most that a
        chord can be below: measured against either of them alone and against trial bounds.
        """
        below = -self.chord * (neurons - self.least)
        active = np.maximum(self.weight * neurons + below, 0.0)
        floor = 0.1 * np.abs(self.chord * self.least)
        score = (active + floor) * (np.maximum(below, 0.0) + floor)
        return np.where(self.chorded, score, 0.0)

    def ascend(self, slope, n_steps) -> Ascent:
        """Improve the bounds of slopes (B, m) by steps of Adam, whose length decays."""
        slope, free = np.clip(slope, self.low, self.high), self.low < self.high
        adam = Adam([slope], _MOMENTS, floor=np.finfo(float).tiny)
        best_slope, mean_neurons = slope, np.zeros(slope.shape)
        best_step, mean_step = np.zeros((2, len(slope), len(self.hidden)))
        best, lowest = np.full(len(slope), -np.inf), np.full(len(slope), np.inf)
        for i in range(1, n_steps + 1):
            direction = slope @ self.hidden.T
            bound, step = self.bound(slope, direction), self.sets.lowest(direction)
            best_slope = np.where((bound > best)[:, None], slope, best_slope)
            best = np.maximum(best, bound)
            neurons = self.at_center + step @ self.hidden
            output = self.outputs(neurons)
            best_step = np.where((output < lowest)[:, None], step, best_step)
            lowest = np.minimum(output, lowest)
            share = 2.0 / (i + 1.0)  # later points weigh more
            mean_step = (1.0 - share) * mean_step + share * step
            mean_neurons = (1.0 - share) * mean_neurons + share * neurons
            ascent = np.where(free, neurons, 0.0)  # the bound's gradient
            length = _STEP * _DECAY**i * np.abs(self.weight)
            (slope,) = adam.step([slope], [ascent], -length)
            slope = np.clip(slope, self.low, self.high)
        bound = self.bound(slope, slope @ self.hidden.T)
        slope = np.where((bound > best)[:, None], slope, best_slope)
        return Ascent(np.maximum(best, bound), slope, mean_neurons, (best_step, mean_step))
