"""All solvers on the same programs: seconds to certified gaps, memory, speed-ups.

    python benchmarks/solvers/convergence.py [--smoke] [--limit SECONDS] [--only WORD]
        [--solvers NAME ...] [--json FILE] [--plot FILE]

Programs: robust hinge, soft at l-inf epsilon 0.1 and hard at 0.05, beta 1e-3; nominal hard squared
loss, beta = 1 % of the smallest beta with a zero optimum. Each solver runs in a fresh process on
one thread, after a tiny program that all imports are charged to. Iterative solvers stop at a
certified gap of 1e-6 or at the limit; Clarabel has ten times that, and so has "pyscnn".

"cvxpy as written" is the formula of the program as it stands, given to cvxpy and solved by
Clarabel; "Clarabel" is `ConicSolver`, which models the program with fewer and sparser cones.

All objectives are the certified ones in float64. An iterate counts if its cone violation is at most
1e-4, as outside the cones an objective may be below their optimum. The best value of a program is
the smallest objective that counts, and at least the largest certified lower bound, of the solvers
chosen (so let one be among them that closes the gap). Conic solvers have one point, their answer.
Networks (marked *) and pyscnn have one point for each of several budgets, every run from the start.
The value of a network is that on the patterns of its own gates, so that it does not set the best
value and may end below it. train_certified and Adam choose these patterns freely, which is another
problem. pyscnn is given the program's, but its augmented Lagrangian violates the cones, and its
network (pyscnn*) leaves the patterns there. "pyscnn" is the program itself: the same weights as
they are, where that counts, and projected on the cones exactly, which is not counted in its time;
its budgets grow by a factor of 1.4, the others' by 4.

Columns: seconds until the objective is within 1e-2, 1e-3, 1e-6 of the best value; seconds in all
and CPU seconds (fewer where other jobs share the machine, so that wall times are too long); for
the best iterate that counts (else the last) its distance from the best value, its certified gap
and its cone violation; peak memory above that of the process before the solve.
"""

import argparse
import json
import multiprocessing
import os
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported, here and in the children

import numpy as np
from _programs import DATA, OBJECTIVES, SMOKE_DATA
from _runners import PATIENCE, RUNNERS, measure

LEVELS = (1e-2, 1e-3, 1e-6)
FEASIBLE = 1e-4
BASELINES = ("cvxpy as written", "Clarabel", "pyscnn")
GRACE = 60.0  # seconds, and once more the longest limit, after which a process is stopped


@dataclass
class Run:
    """What one solver did on one program; rows of the history: seconds, objective, violation."""

    program: str
    solver: str
    history: list
    lower_bound: float
    seconds: float
    cpu_seconds: float
    memory: float
    best: float = np.nan

    def first(self, level) -> float:
        """Return the seconds to a relative distance from the best value, inf if not reached."""
        target = self.best + level * abs(self.best)
        reached = (s for s, value, violation in self.history if counts(value, violation, target))
        return min(reached, default=np.inf)

    @property
    def final(self) -> tuple:
        """The row of the best iterate that counts, of the last one if none does."""
        rows = [row for row in self.history if counts(*row[1:])]
        return min(rows, key=itemgetter(1), default=self.history[-1])

    @property
    def objective(self) -> float:
        return self.final[1]

    @property
    def violation(self) -> float:
        return self.final[2]

    @property
    def above_best(self) -> float:
        return (self.objective - self.best) / abs(self.best)

    @property
    def gap(self) -> float:
        return (self.objective - self.lower_bound) / abs(self.objective)


def counts(value, violation, target=np.inf):
    return violation <= FEASIBLE and value <= target


def run_alone(solver, program, limit) -> Run:
    """Run a solver in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply_async(measure, (solver, program, limit)).get(
            2.0 * PATIENCE * limit + GRACE
        )
        pool.close()
        pool.join()  # lets the process clean up, as leaving the block would not
    return Run(program, solver, *result)


def run_all(program, limit, solvers=tuple(RUNNERS)) -> list[Run]:
    """Return the runs of the solvers of a program that succeed; say why others do not."""
    runs, objective = [], program.split(", ")[1]
    for solver in solvers:
        if objective not in RUNNERS[solver].objectives:
            continue
        try:
            runs.append(run_alone(solver, program, limit))
        except ImportError as error:
            print(f"  {solver} is left out: {error}", flush=True)
        except multiprocessing.TimeoutError:
            print(f"  {solver} was stopped: it did not mind its time limit", flush=True)
        except Exception as error:  # one solver that fails is a result, and no reason to end
            print(f"  {solver} failed: {type(error).__name__}: {error}", flush=True)
    set_best(runs)
    return runs


def set_best(runs):
    """Set the best value of the program that all runs are of."""
    convex = [run for run in runs if not RUNNERS[run.solver].own_patterns]
    values = [v for run in convex for _, v, violation in run.history if counts(v, violation)]
    bound = max((run.lower_bound for run in convex), default=-np.inf)
    for run in runs:
        run.best = max(min(values, default=np.inf), bound)


def print_table(runs):
    """Print one line for each run of a program."""
    print(f"{runs[0].program}: best value {text(runs[0].best, '.9g')}")
    to = "".join(f"{f's to {level:.0e}':>11}" for level in LEVELS)
    print(f"  {'solver':<18}{to}{'s in all':>9}{'CPU s':>8}", end="")
    print(f"{'above best':>12}{'gap':>9}{'cones':>9}{'MiB':>7}")
    for run in runs:
        to = "".join(f"{text(run.first(level)):>11}" for level in LEVELS)
        print(f"  {run.solver:<18}{to}{run.seconds:9.2f}{run.cpu_seconds:8.2f}", end="")
        print(f"{run.above_best:12.1e}{text(run.gap, '.1e'):>9}{run.violation:9.1e}", end="")
        print(f"{run.memory:7.0f}", flush=True)


def text(number, form=".2f") -> str:
    return format(number, form) if np.isfinite(number) else "-"


def print_speedups(runs):
    """Print how many times faster than the baselines each solver reaches the first two levels."""
    print("\nSpeed-up over the baseline of the line, to 1e-2 and 1e-3 (-: not reached; >: the")
    print("baseline had not reached it when it was stopped; *: a network, whose patterns may")
    print("differ: not quite, or not at all, the same problem)")
    solvers = [s for s in RUNNERS if s not in BASELINES and any(run.solver == s for run in runs)]
    print(f"{'':<64}" + "".join(f"{solver:>19}" for solver in solvers))
    for program in dict.fromkeys(run.program for run in runs):
        of = {run.solver: run for run in runs if run.program == program}
        for baseline in BASELINES:
            if baseline in of:
                ratios = "".join(f"{speedups(of[baseline], of.get(s)):>19}" for s in solvers)
                print(f"{program:<46}{baseline:<18}" + ratios)


def speedups(baseline, run) -> str:
    return "  ".join(f"{speedup(baseline, run, level):>7}" for level in LEVELS[:2])


def speedup(baseline, run, level) -> str:
    if run is None or not np.isfinite(run.first(level)):
        return "-"
    seconds, more = baseline.first(level), ""
    if not np.isfinite(seconds):  # of several runs, the longest
        seconds, more = max(seconds for seconds, *_ in baseline.history), ">"
    return f"{more}{seconds / run.first(level):.1f}"


def write_json(runs, path):
    """Write a row for each run, what is not finite as null."""
    rows = [
        asdict(run)
        | {name: getattr(run, name) for name in ("objective", "violation", "gap", "above_best")}
        | {f"seconds_to_{level:.0e}": run.first(level) for level in LEVELS}
        for run in runs
    ]
    for row in rows:
        row.update({k: None for k, v in row.items() if isinstance(v, float) and not np.isfinite(v)})
    Path(path).write_text(json.dumps(rows, indent=1))


def plot(runs, path):
    """Draw the best objective so far above the best value, one panel a program; no networks."""
    from matplotlib.figure import Figure

    programs = list(dict.fromkeys(run.program for run in runs))
    n_columns = min(3, len(programs))
    shape = (-(-len(programs) // n_columns), n_columns)
    figure = Figure(figsize=(4.5 * shape[1], 3.5 * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False).ravel()
    for panel, program in zip(panels, programs, strict=False):
        panel.set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative distance")
        panel.set_title(program, fontsize="medium")
        for i, solver in enumerate(RUNNERS):
            style = {"drawstyle": "steps-post", "label": solver, "markersize": 4}
            for run in runs:
                own_problem = RUNNERS[solver].own_patterns
                if (run.program, run.solver) == (program, solver) and not own_problem:
                    panel.plot(*curve(run), f"C{i}.-", **style)
        panel.legend(fontsize="x-small")
    for panel in panels[len(programs) :]:
        panel.remove()
    figure.savefig(path)


def curve(run):
    """Return seconds and the smallest relative distance so far; 1e-9 stands for less, or below."""
    rows = sorted((s, value) for s, value, violation in run.history if counts(value, violation))
    lowest = np.minimum.accumulate([value for _, value in rows])
    return [s for s, _ in rows], np.maximum((lowest - run.best) / abs(run.best), 1e-9)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny size, in seconds")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each solver")
    parser.add_argument("--only", default="", help="a word of the name of the program")
    parser.add_argument("--solvers", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--plot", help="file to draw the curves to")
    arguments = parser.parse_args()
    limit = min(arguments.limit, 2.0) if arguments.smoke else arguments.limit
    runs = []
    for name, data in (SMOKE_DATA if arguments.smoke else DATA).items():
        objectives = ["nominal squared"] if data.nominal_only else OBJECTIVES
        for program in (f"{name}, {objective}" for objective in objectives):
            if arguments.only not in program:
                continue
            if found := run_all(program, limit, arguments.solvers):
                print_table(found)
                runs += found
    print_speedups(runs)
    if arguments.json:
        write_json(runs, arguments.json)
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
