"""What was measured by the comparison, as tables, as a summary and as a picture."""

from __future__ import annotations

import json

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range

COLUMNS = ("clean", "attacked", "exact", "lp", "certified")
COSTS = {"neurons": 0, "seconds": 1, "seconds_tuned": 1}  # and their digits
HEADS = ("clean", "attacked", "exact", "LP", "certified", "neurons", "s", "s tuned")
OURS = "convex soft"
CONVEX = ("convex standard", "convex hard", "convex soft", "convex exchange", "robust linear SVM")
CERTIFIED = "certified training"  # the rival that trains on the bound it is measured by
TIE = 1.0  # points of accuracy


def records(file):
    """Return the records of a file of JSON lines, the last of each setting."""
    if not file.exists():
        return []
    found = {}
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line that an interrupted run was writing
            continue
        found[json.dumps(record["setting"])] = record
    return list(found.values())


def grouped(found):
    """Return the records by data and method: {data: {method: [record of a seed, ...]}}."""
    groups = {}
    for record in sorted(found, key=lambda record: record["setting"]["seed"]):
        setting = record["setting"]
        groups.setdefault(setting["data"], {}).setdefault(setting["method"], []).append(record)
    return groups


def report(found, regressions=()):
    """Return the tables and the summary as text."""
    groups = grouped(found)
    parts = [
        table(name, methods, 3 if name in regressions else 1) for name, methods in groups.items()
    ]
    return "\n\n".join([*parts, *summary(tuned(groups, regressions))])


def tuned(groups, regressions):
    """Return the groups of the classifications in which something was tuned, on all splits.

    Data and methods with fewer splits than the others are left out: their means are less certain.
    """
    groups = {
        name: methods
        for name, methods in groups.items()
        if name not in regressions and len(next(iter(methods.values()))[0]["setting"]["betas"]) > 1
    }
    most = max((splits(methods) for methods in groups.values()), default=0)
    return {
        name: {method: runs for method, runs in methods.items() if len(runs) == most}
        for name, methods in groups.items()
        if splits(methods) == most
    }


def splits(methods):
    """Return the largest number of splits that a method was run on."""
    return max(len(runs) for runs in methods.values())


def table(name, methods, digits):
    """Return the table of one data set, its accuracies or residuals with some digits."""
    setting = next(iter(methods.values()))[0]["setting"]
    lines = [
        f"{name}, epsilon {setting['epsilon']:.3g}, {setting['n_train']} training rows, "
        f"{splits(methods)} split(s)",
        f"{'method':<20}" + "".join(f"{head:>16}" for head in HEADS),
    ]
    for method, runs in methods.items():
        done = [run for run in runs if "error" not in run]
        if done:
            cells = [cell([run[key] for run in done], digits) for key in COLUMNS]
            cells += [f"{np.mean([run[k] for run in done]):.{n}f}" for k, n in COSTS.items()]
            open_points = np.mean([run["undecided"] for run in done])
            note = f"  ({open_points:.1f} undecided)" if open_points else ""
        else:
            cells, note = ["-"] * len(HEADS), ""
        if len(runs) < splits(methods):
            note += f"  ({len(runs)} split(s))"
        if len(done) < len(runs):
            note += f"  {len(runs) - len(done)} of {len(runs)} failed"
        lines.append(f"{method:<20}" + "".join(f"{text:>16}" for text in cells) + note)
    return "\n".join(lines)


def cell(values, digits):
    """Return mean and standard error."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} +- {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}"


# ------------------------------------------------------------------ over all data


def means(groups, key):
    """Return data sets, methods and the means (data, method) where every method has a result.

    They are those with the most means: a method on few of the data sets is left out, or these are.
    """
    complete = {
        name: {
            method: np.mean([run[key] for run in runs if "error" not in run])
            for method, runs in methods.items()
            if any("error" not in run for run in runs)
        }
        for name, methods in groups.items()
    }
    tables = [
        (list(row), [name for name in complete if complete[name].keys() >= row.keys()])
        for row in complete.values()
    ]
    methods, data = max(tables, key=lambda t: len(t[0]) * len(t[1]), default=([], []))
    return data, methods, np.array([[complete[name][m] for m in methods] for name in data])


def summary(groups):
    """Return the parts of the summary: over all data, and ours against each of the others."""
    data, methods, exact = means(groups, "exact")
    if len(data) < 2 or OURS not in methods:
        return []
    lp, certified, seconds = (means(groups, k)[2] for k in ("lp", "certified", "seconds_tuned"))
    ranks = np.mean([rankdata(-row) for row in exact], axis=0)
    lines = [
        f"Means over {len(data)} data sets ({', '.join(data)}); rank by exact accuracy; "
        f"win / tie / loss: data sets on which {OURS} is more than {TIE:g} point of exact accuracy "
        "better, within it, worse; data and methods with fewer splits are left out",
        f"{'method':<20}{'exact':>10}{'LP':>10}{'certified':>12}{'s tuned':>10}{'rank':>8}"
        f"{'win/tie/loss':>16}",
    ]
    ours = exact[:, methods.index(OURS)]
    for k in np.argsort(ranks):
        ahead = ours - exact[:, k]
        score = f"{np.sum(ahead > TIE)}/{np.sum(abs(ahead) <= TIE)}/{np.sum(ahead < -TIE)}"
        lines.append(
            f"{methods[k]:<20}{exact[:, k].mean():>10.1f}{lp[:, k].mean():>10.1f}"
            f"{certified[:, k].mean():>12.1f}"
            f"{seconds[:, k].mean():>10.1f}{ranks[k]:>8.2f}"
            + f"{'' if methods[k] == OURS else score:>16}"
        )
    lines.append(f"critical difference of ranks (Nemenyi, 5 %): {critical_difference(exact):.2f}")
    if len(data) > 2 and len(methods) > 2:
        lines.append(f"Friedman test of equal ranks: p = {friedmanchisquare(*exact.T).pvalue:.1e}")
    return ["\n".join(lines), verdicts(methods, exact, certified, seconds)]


def critical_difference(values):
    """Return the least difference of mean ranks that is significant at 5 % (Nemenyi, 1963)."""
    n, k = values.shape
    q = studentized_range.ppf(0.95, k, np.inf) / np.sqrt(2.0)
    return q * np.sqrt(k * (k + 1) / (6.0 * n))


def verdicts(methods, exact, certified, seconds):
    """Return the goals and what became of them."""
    rivals = [k for k, method in enumerate(methods) if method not in CONVEX]
    if not rivals:
        return ""
    ours = methods.index(OURS)
    means = {"exact": exact.mean(axis=0), "certified": certified.mean(axis=0)}
    best = max(rivals, key=lambda k: means["exact"][k])
    others = [k for k in rivals if methods[k] != CERTIFIED]
    lines = [f"Goals of {OURS}, on the means over the data:"]

    def goal(text, ahead, least, unit="points"):
        met = "met" if ahead >= least else "NOT met"
        lines.append(f"  {text}: {ahead:+.1f} {unit} (goal {least:+g}): {met}")

    goal(f"exact, best rival ({methods[best]})", means["exact"][ours] - means["exact"][best], 0.0)
    if others:
        next_best = max(others, key=lambda k: means["certified"][k])
        ahead = means["certified"][ours] - means["certified"][next_best]
        goal(f"certified, best without certified training ({methods[next_best]})", ahead, 10.0)
    if CERTIFIED in methods:
        k = methods.index(CERTIFIED)
        goal("certified, certified training", (certified[:, ours] - certified[:, k]).mean(), 0.0)
    spared = (seconds[:, best] - seconds[:, ours]).mean()
    goal(f"time with tuning spared against {methods[best]}", spared, 0.0, "s")
    return "\n".join(lines)


def draw(figure, found, regressions=()):
    """Draw exact and certified accuracies of all methods on all data."""
    groups = tuned(grouped(found), regressions)
    data, methods, exact = means(groups, "exact")
    certified = means(groups, "certified")[2]
    order = np.argsort(exact.mean(axis=0))
    axes = figure.subplots(1, len(data), sharey=True, squeeze=False)[0]
    rows = np.arange(len(methods))
    for axis, name, high, low in zip(axes, data, exact, certified, strict=True):
        colors = ["#0072b2" if methods[k] in CONVEX else "#d55e00" for k in order]
        axis.hlines(rows, low[order], high[order], color=colors, linewidth=2, alpha=0.5)
        axis.scatter(high[order], rows, color=colors, s=22, zorder=3)
        axis.scatter(low[order], rows, color=colors, s=22, marker="|", zorder=3)
        axis.set_title(name, fontsize="small")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(rows, [methods[k] for k in order])
    figure.supxlabel("test accuracy (%): bar certified by the interval bound, dot exact")
