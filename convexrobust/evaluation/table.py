"""Measured accuracies as rows, and as a table."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest


class Measurement(NamedTuple):
    """One measured accuracy.

    Attributes
    ----------
    model : str
        Name of the model.
    epsilon : float
        Radius, in units of the input.
    measure : str
        "clean", the name of an attack, "worst attack", "certified" or "exact".
    accuracy : float
        Share of the samples; nan where the model does not allow the measure.
    low, high : float
        Confidence interval of the accuracy on the population (Clopper and Pearson), nan likewise.
    n : int
        Number of samples.
    undecided : int
        Samples that "exact" did not decide in time; they count as not robust.
    seconds : float
        Time it took; 0 for "worst attack", which follows from the attacks.
    """

    model: str
    epsilon: float
    measure: str
    accuracy: float
    low: float
    high: float
    n: int
    undecided: int
    seconds: float


class RobustnessTable:
    """Measured accuracies, one row each; printed with a column for each measure.

    Parameters
    ----------
    rows : list of Measurement
        The measurements.
    """

    def __init__(self, rows):
        self.rows = list(rows)

    def accuracy(self, model, epsilon, measure) -> float:
        """Return one of the accuracies."""
        for row in self.rows:
            if (row.model, row.measure) == (model, measure) and np.isclose(
                row.epsilon, epsilon, atol=0.0
            ):
                return row.accuracy
        raise KeyError(f"no {measure!r} of {model!r} at epsilon={epsilon!r} was measured.")

    def to_frame(self):
        """Return the rows as a pandas data frame."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_frame needs pandas: pip install 'convexrobust[data]'.") from error
        return pandas.DataFrame(self.rows, columns=Measurement._fields)

    def __str__(self):
        measures = list(dict.fromkeys(row.measure for row in self.rows))
        table = [["model", "epsilon", *measures, "seconds"]]
        for model, epsilon in dict.fromkeys((row.model, row.epsilon) for row in self.rows):
            found = {r.measure: r for r in self.rows if (r.model, r.epsilon) == (model, epsilon)}
            seconds = sum(row.seconds for row in found.values())
            cells = [_cell(found[m]) if m in found else "" for m in measures]
            table.append([model, f"{epsilon:.3g}", *cells, f"{seconds:.2f}"])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in table
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


class Adder:
    """Appends rows about one model at one radius."""

    def __init__(self, rows, model, epsilon, confidence):
        self.rows, self.model, self.epsilon = rows, model, epsilon
        self.confidence = confidence

    def __call__(self, measure, robust, seconds, undecided=0):
        """Append a row: which samples are robust, or None if it was not measured."""
        n, (low, high) = 0, (np.nan, np.nan)
        accuracy = np.nan
        if robust is not None:
            n, k = len(robust), int(robust.sum())
            accuracy = k / n
            low, high = binomtest(k, n).proportion_ci(self.confidence, method="exact")
        row = (self.model, self.epsilon, measure, accuracy, float(low), float(high))
        self.rows.append(Measurement(*row, n, undecided, seconds))


def _cell(row):
    if np.isnan(row.accuracy):
        return "-"
    mark = "*" if row.undecided else ""
    return f"{row.accuracy:.1%} [{100 * row.low:.0f}, {100 * row.high:.0f}]{mark}"
