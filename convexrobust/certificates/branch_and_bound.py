r"""The smallest outputs of a network on sets, by branch and bound over many samples at once.

Without its concave neurons the problem is convex. A case fixes the signs of some of them; a case
whose bound leaves it open is split in two at the neuron that promises most. Cases of all samples
are bounded together (`relaxation`), the lowest bounds first; where the chords of the neurons that
are left explain little of what is missing, the case is solved to full accuracy (`cone_program`).
"""

from __future__ import annotations

import time

import numpy as np

from convexrobust.certificates.cone_program import solve
from convexrobust.certificates.relaxation import Cases, Relaxation, implied_ranges, roots

_STEPS = 10  # of Adam on the slopes of a case
_FEW = 32  # cases of a problem, after which implications between its neurons are worth their time
_CASES_AT_ONCE = 512  # cases bounded together
_MOST_OPEN = 20_000  # cases; then the newest come first, so that memory stays bounded
_CLOSED = 1e-6  # a bracket is closed at this part of the span of the output
_NOTHING = 1e-9  # a margin of this part of it is taken for 0 where only its sign matters
_EXPLAINED = 0.1  # by the chords, of what is missing: below, a case is solved accurately


class Search:
    """The search for the smallest output of each sample.

    Parameters
    ----------
    minima : Minima
        The problems; of those of a sample the lowest counts.
    X : ndarray of shape (n, d)
        The samples.
    ball : LpBall
        The threat model, for its bounds.
    known : ndarray of shape (I,)
        Lower bounds of the problems that are known already.
    verdict_only : bool
        Leave a sample as soon as the sign of its smallest output is known.
    split : bool
        Split cases. Without, every problem's relaxation is solved, and no more.
    time_limit : ndarray of shape (n,)
        Seconds for each sample. The time of a batch is shared out among its cases.
    """

    def __init__(self, minima, X, ball, known, *, verdict_only=False, split=True, time_limit):
        self.minima, self.X, self.known = minima, X, known
        self.low, self.high = ball.feature_range(X.shape[1])
        self.is_cut = ball.p != np.inf and ball.bounds is not None
        self.verdict_only, self.split, self.time_limit = verdict_only, split, time_limit
        self.closed = np.full(len(known), np.inf)  # lowest bound of a problem's closed cases
        self.upper, self.X_adv = np.full(len(X), np.inf), np.array(X)
        self.seconds, self.n_cases = np.zeros(len(X)), np.zeros(len(known), dtype=int)
        self.implied: dict[tuple[int, int], tuple] = {}
        span = 2.0 * np.sum(np.abs(minima.weight) * minima.reach[minima.sample], axis=1)
        self.tolerance = (_NOTHING if verdict_only else _CLOSED) * span

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lower bounds (n,) of the smallest outputs, the points found, and the seconds."""
        every = np.arange(len(self.known))
        self._reach(every, self.X[self.minima.sample])
        cases = self._open(roots(self.minima)._replace(bound=self.known))
        while len(cases.problem):
            order = np.argsort(cases.bound, kind="stable")
            if len(order) > _MOST_OPEN:
                order = np.arange(len(order))[::-1]
            halves = self._halves(cases.at(order[:_CASES_AT_ONCE]))
            cases = self._open(cases.at(order[_CASES_AT_ONCE:]).joined(halves))
        lower = np.full(len(self.X), np.inf)
        np.minimum.at(lower, self.minima.sample, np.maximum(self.closed, self.known))
        return lower, self.X_adv, self.seconds

    def _open(self, cases) -> Cases:
        """Return the cases that are worth bounding, and close the others."""
        settled = self._settled(cases.problem, cases.bound)
        return self._without(cases, settled | self._is_late(cases.problem))

    def _without(self, cases, done) -> Cases:
        np.minimum.at(self.closed, cases.problem[done], cases.bound[done])
        return cases.at(~done)

    def _settled(self, problem, bound):
        """Return which cases need no smaller bounds."""
        upper = self.upper[self.minima.sample[problem]]
        settled = bound >= upper - self.tolerance[problem]
        return settled | (bound > 0.0) | (upper <= 0.0) if self.verdict_only else settled

    def _halves(self, batch) -> Cases:
        """Bound cases, and split those that stay open in two."""
        clock, relaxation = time.perf_counter(), Relaxation(self.minima, batch)
        ascent = relaxation.ascend(batch.slope, _STEPS)
        for step in ascent.steps:
            self._reach(batch.problem, relaxation.sets.center + step)
        neurons, slope = ascent.neurons, ascent.slope
        bound = np.maximum(batch.bound, ascent.bound)
        finished = self._settled(batch.problem, bound)
        target = 0.0 if self.verdict_only else self.upper[self.minima.sample[batch.problem]]
        explained = relaxation.looseness(neurons).sum(axis=1)
        is_last = (explained <= _EXPLAINED * (target - bound)) | (not self.split)
        share = (time.perf_counter() - clock) / len(bound)
        np.add.at(self.seconds, self.minima.sample[batch.problem], share)
        for k in np.flatnonzero(~finished & is_last):
            if self._settled(batch.problem[[k]], bound[[k]]) or self._is_late(batch.problem[[k]]):
                continue
            solved = self._solved(batch.at(slice(k, k + 1)))
            bound[k], slope[k] = max(bound[k], solved.bound), solved.slope
            neurons[k] = solved.neurons
        scores = relaxation.branching_scores(neurons)
        finished = self._settled(batch.problem, bound) | ~scores.any(axis=1) | (not self.split)
        cases = self._without(batch._replace(slope=slope, bound=bound), finished)
        if finished.all():
            return cases
        halves = cases.at(np.repeat(np.arange(len(cases.problem)), 2))
        neuron = np.repeat(scores[~finished].argmax(axis=1), 2)
        halves.sign[np.arange(len(neuron)), neuron] = np.tile([1, -1], len(cases.problem))
        self._imply(halves, neuron)
        return halves

    def _imply(self, halves, neuron):
        """Narrow the ranges of all neurons by what the new sign of one of them implies."""
        np.add.at(self.n_cases, halves.problem, 1)
        many = np.flatnonzero(self.n_cases[halves.problem] > _FEW)
        many = many[~self._is_late(halves.problem[many])]
        pairs, which = np.unique(
            np.column_stack([halves.problem, neuron])[many], axis=0, return_inverse=True
        )
        for place, (i, j) in enumerate(map(tuple, pairs)):
            here = many[which.ravel() == place]
            inactive = (halves.sign[here, j] < 0).astype(int)
            least, most = (ends[inactive] for ends in self._implied_by(i, j))
            halves.least[here] = np.maximum(halves.least[here], least)
            halves.most[here] = np.minimum(halves.most[here], most)
        halves.bound[(halves.least > halves.most).any(axis=1)] = np.inf  # there is no such case

    def _implied_by(self, problem, neuron):
        """Return the ranges given the signs of a neuron, found when they are first asked for."""
        if (problem, neuron) not in self.implied:
            clock = time.perf_counter()
            self.implied[problem, neuron] = implied_ranges(self.minima, problem, neuron)
            self.seconds[self.minima.sample[problem]] += time.perf_counter() - clock
        return self.implied[problem, neuron]

    def _is_late(self, problem):
        """Return which problems' samples are out of time."""
        return (self.seconds >= self.time_limit)[self.minima.sample[problem]]

    def _solved(self, case):
        """Solve one case to full accuracy."""
        clock, relaxation = time.perf_counter(), Relaxation(self.minima, case)
        low, high = np.full((2, self.X.shape[1]), np.inf) * [[-1.0], [1.0]]
        if self.is_cut:
            center = relaxation.sets.center[0]
            low, high = self.low - center, self.high - center
        solved = solve(relaxation, low, high)
        self._reach(case.problem, relaxation.sets.center + solved.step)
        self.seconds[self.minima.sample[case.problem]] += time.perf_counter() - clock
        return solved

    def _reach(self, problem, points):
        """Keep the points with the lowest outputs of their samples."""
        points = np.clip(points, self.low, self.high)
        neurons = self.minima.network.design(points) @ self.minima.network.hidden
        output = np.maximum(neurons, 0.0) * self.minima.weight[problem]
        output = self.minima.offset[problem] + output.sum(axis=1)
        sample = self.minima.sample[problem]
        better = np.flatnonzero(output < self.upper[sample])
        better = better[np.argsort(-output[better], kind="stable")]  # the lowest is written last
        self.upper[sample[better]] = output[better]
        self.X_adv[sample[better]] = points[better]
