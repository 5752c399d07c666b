"""How a solver closes the gap between its objective and a lower bound of the optimum."""

from __future__ import annotations

import numpy as np

from convexrobust.displays.common import axes_or_new, check_lengths

_VIOLATION_DRAWN = 1e-4  # cone violation up to which an objective counts as one of the program
_KINDS = ("band", "gap")
_AGAINST = ("seconds", "iterations")


class ConvergenceDisplay:
    r"""The band from the lower bound to the best objective so far, over time or iterations.

    The optimum is inside the band at any time.

    Parameters
    ----------
    objective : array-like of shape (n_rows,)
        Best objectives so far; nan before there is one.
    lower_bound : array-like of shape (n_rows,)
        Best lower bounds so far; nan or -inf before there is one.
    seconds, n_iter : array-like of shape (n_rows,)
        When.
    estimator_name : str, optional
        For the legend.

    Attributes
    ----------
    ax_, figure_ : Axes, Figure
        What was drawn on.
    objective_, lower_bound_ : Line2D
        The ends of the band; None where the gap is drawn.
    band_ : PolyCollection
        What is between them; None where the gap is drawn.
    gap_ : Line2D
        The relative gap; None where the band is drawn.

    Raises
    ------
    ValueError
        For arrays of different lengths.
    """

    def __init__(self, objective, lower_bound, *, seconds, n_iter, estimator_name=None):
        self.objective = np.asarray(objective, dtype=np.float64)
        self.lower_bound = np.asarray(lower_bound, dtype=np.float64)
        self.seconds = np.asarray(seconds, dtype=np.float64)
        self.n_iter = np.asarray(n_iter)
        self.estimator_name = estimator_name
        check_lengths(
            objective=self.objective,
            lower_bound=self.lower_bound,
            seconds=self.seconds,
            n_iter=self.n_iter,
        )

    @property
    def relative_gap(self) -> np.ndarray:
        """The gap relative to the objective, (n_rows,)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self.objective - self.lower_bound) / np.abs(self.objective)

    @classmethod
    def from_estimator(cls, estimator, *, name=None, ax=None, **style):
        """Draw how the fit of an estimator of this package went.

        Parameters
        ----------
        estimator : ConvexRobustClassifier or ConvexRobustRegressor
            A fitted one.
        name : str, optional
            For the legend, by default the name of the solver.
        ax, **style
            As in `plot`.

        Returns
        -------
        ConvergenceDisplay

        Raises
        ------
        ValueError
            If it has no solution, or the solver recorded no history.
        """
        if not hasattr(estimator, "solution_"):
            raise ValueError(
                f"estimator must be a fitted one of convexrobust, with a solution_; got "
                f"{type(estimator).__name__}. Fit it first."
            )
        return cls.from_solution(estimator.solution_, name=name, ax=ax, **style)

    @classmethod
    def from_solution(cls, solution, *, name=None, ax=None, **style):
        """Draw the history of a solution.

        Parameters
        ----------
        solution : Solution
            Of an iterative solver.
        name : str, optional
            For the legend, by default the name of the solver.
        ax, **style
            As in `plot`.

        Returns
        -------
        ConvergenceDisplay

        Raises
        ------
        ValueError
            If there is no history.

        Notes
        -----
        Iterates outside the cones of a hard formulation have no objective of the program, and are
        left out. A solver that generates patterns has bounds for the patterns of its rounds. Where
        one is above the final lower bound, it is not about the final patterns, and the final one is
        drawn instead: the band is then the distance to what was proven in the end.
        """
        if not solution.history:
            raise ValueError(
                f"solution must have a history, and {solution.solver or 'its solver'} recorded "
                "none; solve with InteriorPoint(), ADMM(), ProjectedGradient() or WorkingSet()."
            )
        columns = ("n_iter", "seconds", "objective", "lower_bound", "cone_violation")
        rows = [[getattr(row, column) for column in columns] for row in solution.history]
        n_iter, seconds, objective, lower_bound, violation = np.array(rows, dtype=np.float64).T
        outside = violation > max(_VIOLATION_DRAWN, solution.cone_violation)
        best = np.minimum.accumulate(np.where(outside, np.inf, objective))
        bound = np.minimum(np.maximum.accumulate(lower_bound), solution.lower_bound)
        best, bound = (np.where(np.isfinite(end), end, np.nan) for end in (best, bound))
        name = (solution.solver or None) if name is None else name
        display = cls(best, bound, seconds=seconds, n_iter=n_iter, estimator_name=name)
        return display.plot(ax=ax, **style)

    def plot(self, ax=None, *, kind="band", against="seconds", name=None, **style):
        """Draw the band or the gap.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw, perhaps on another display; by default a new figure.
        kind : {"band", "gap"}
            "band": objective and lower bound. "gap": their relative distance, on a logarithmic
            axis; rows where it is not positive are left out.
        against : {"seconds", "iterations"}
            The horizontal axis.
        name : str, optional
            Another name for the legend.
        **style
            For the lines, e.g. ``color``.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For another kind or axis.
        ImportError
            Without matplotlib.
        """
        for argument, value, legal in (("kind", kind, _KINDS), ("against", against, _AGAINST)):
            if value not in legal:
                raise ValueError(f"{argument} must be one of {legal}, got {value!r}.")
        self.ax_ = axes_or_new(ax)
        self.figure_ = self.ax_.figure
        self.objective_ = self.lower_bound_ = self.band_ = self.gap_ = None
        name = self.estimator_name if name is None else name
        x = self.seconds if against == "seconds" else self.n_iter
        style = {"drawstyle": "steps-post", "marker": ".", **style}
        if kind == "gap":
            self._draw_gap(x, name, style)
        else:
            self._draw_band(x, name, style)
        self.ax_.set_xlabel(against)
        return self

    def _draw_band(self, x, name, style):
        prefix = "" if name is None else f"{name}: "
        label = {"label": f"{prefix}objective"}
        (self.objective_,) = self.ax_.plot(x, self.objective, **{**label, **style})
        color = self.objective_.get_color()
        dashed = {"linestyle": "--", **style, "color": color, "label": f"{prefix}lower bound"}
        (self.lower_bound_,) = self.ax_.plot(x, self.lower_bound, **dashed)
        soft = {"color": color, "alpha": 0.15, "linewidth": 0, "step": "post"}
        self.band_ = self.ax_.fill_between(x, self.lower_bound, self.objective, **soft)
        self.ax_.set_ylabel("worst-case objective")
        self.ax_.legend(frameon=False)

    def _draw_gap(self, x, name, style):
        gap = self.relative_gap
        label = {} if name is None else {"label": name}
        (self.gap_,) = self.ax_.plot(x, np.where(gap > 0.0, gap, np.nan), **{**label, **style})
        self.ax_.set(yscale="log", ylabel="relative gap")
        if name is not None:
            self.ax_.legend(frameon=False)
