"""The page of results in the docs, made from the records in benchmarks/results.

    make results

Nothing is run: tables and pictures come from the records, which these commands made anew, and
which hold the versions and the machine that they were made with:

    python benchmarks/theory/report.py --out benchmarks/results/theory
    python benchmarks/robustness/comparison.py --out benchmarks/results/comparison
    python benchmarks/robustness/deep_methods.py ... --results benchmarks/results/deep
"""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RECORDS = HERE / "results"
DOCS = HERE.parent / "docs"
sys.path += [str(HERE / "theory"), str(HERE / "robustness")]  # the scripts know how to show theirs

_claims = importlib.import_module("_claims")
_report = importlib.import_module("_report")
deep_methods = importlib.import_module("deep_methods")
theory = importlib.import_module("report")
PROBLEMS = importlib.import_module("_data").PROBLEMS

HEAD = """\
Results
=======

Written by ``make results`` from the records in ``benchmarks/results``: edit neither this page nor
its pictures. Below each table stands the command that measured it. Data sets other than those of
scikit-learn are read from the folder ``CONVEXROBUST_DATA``.
"""
COMPARISON = """\
The best way to train a robust two-layer network
------------------------------------------------

``python benchmarks/robustness/comparison.py --out benchmarks/results/comparison``

All methods see the same splits and the same threat model (l-inf), and each has its beta chosen in
the same way, by the accuracy under attack in cross-validation on the training part (for convex
programs by ``RegularizationPathCV``); everything else is as the package has it by default. Mean and
standard error over the splits of test accuracies in percent: as it is; under the worst of FGSM, PGD
and APGD; exact, decided by branch and bound; proven by the linear relaxation (LP); certified by the
interval bound. Then neurons, and CPU seconds of one training and of all with the tuning. The
regression (diabetes) has the root of the mean squared worst-case error in the place of accuracies,
in standard deviations of the target.
"""
DEEP = """\
Methods of adversarial training
-------------------------------

``python benchmarks/robustness/deep_methods.py``, with the options that the titles of the tables
name and those below. No method was tuned: all share optimizer and schedule. Seconds are those of
the clock, on a machine that also ran other work: compare passes, which are counted (PGD has had one
less since).
"""
THEORY = """\
The theory, measured
--------------------

``make theory`` runs every script below and writes this report anew. A claim is a theorem, or an
observation that need not be seen again; where it does not hold, the remark says why.
"""


def page(records):
    """Return the page as text."""
    parts = [HEAD]
    found = compared(records)
    if found:
        parts += [COMPARISON, block(_report.report(found, regressions()))]
        parts += [image("comparison", "Exact and certified accuracy of every method on every data")]
        parts += [made_with(found)]
    runs = deep_runs(records)
    if runs:
        parts += [DEEP, block(deep_methods.table_of(runs)), options_of(runs)]
        parts += [image(name, "Trade-off, and accuracy over the epochs") for name in plots_of(runs)]
        parts += [made_with(runs)]
    claims = theory_records(records)
    if claims:
        parts += [THEORY, counted(claims), verdicts(claims), made_with(list(claims.values()))]
        for name, record in claims.items():
            parts += [f"{record['title']}\n{'~' * len(record['title'])}\n"]
            parts += [block(_claims.text_of(record)), image(name, record["title"])]
    return "\n".join(parts)


def regressions():
    """Return the names of the problems whose measures are residuals."""
    return [name for name, problem in PROBLEMS.items() if problem.regression]


def compared(records):
    """Return the records of the comparison, in the order of the problems."""
    order = {name: k for k, name in enumerate(PROBLEMS)}
    found = [r for file in (records / "comparison").glob("*.jsonl") for r in _report.records(file)]
    return sorted(found, key=lambda record: order[record["setting"]["data"]])


def deep_runs(records):
    """Return the results of the deep methods, in the order of the catalogue."""
    runs = [json.loads(file.read_text()) for file in sorted((records / "deep").glob("*.json"))]
    order = list(deep_methods.METHODS)

    def place(run):
        setting = run["setting"]
        return setting["epsilon"], order.index(deep_methods.method_of(setting["method"])[0])

    return sorted(runs, key=place)


def theory_records(records):
    """Return the records of the theory scripts, in the order of the report."""
    files = {name: records / "theory" / f"{name}.json" for name in theory.SCRIPTS}
    return {name: _claims.read(file) for name, file in files.items() if file.exists()}


def draw(records, folder):
    """Write every picture of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    found = compared(records)
    if found:
        figure = Figure(figsize=(14, 4), layout="constrained")
        _report.draw(figure, found, regressions())
        figure.savefig(folder / "comparison.png", dpi=110)
    deep_methods.draw(deep_runs(records), folder)
    for name, record in theory_records(records).items():
        script = importlib.import_module(name)
        _claims.picture(script.draw, record["curves"], folder / f"{name}.png")


# ------------------------------------------------------------------ pieces of the page


def block(text):
    """Return text as it stands."""
    return "::\n\n" + "\n".join(f"   {line}".rstrip() for line in text.splitlines()) + "\n"


def image(name, alt):
    """Return a picture."""
    return f".. image:: images/results/{name}.png\n   :alt: {alt}\n"


def made_with(found):
    """Return the machines and versions of some records, each once."""
    lines = {", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in found}
    return "Made with: " + "; and with ".join(sorted(lines)) + ".\n"


def options_of(runs):
    """Return the options that the runs share, as those of the command."""
    shared = ("rows", "test_rows", "epochs", "batch_size", "learning_rate", "schedule", "warmup")
    seen = {tuple((n, run["setting"][n]) for n in ("epsilon", *shared)): None for run in runs}
    texts = [", ".join(f"{name.replace('_', ' ')} {value}" for name, value in s) for s in seen]
    return "Settings: " + "; ".join(texts) + ".\n"


def plots_of(runs):
    """Return the names of the pictures of the deep methods."""
    settings = [run["setting"] for run in runs]
    return list(
        dict.fromkeys(f"{Path(s['data']).stem}_{s['network']}_{s['epsilon']:g}" for s in settings)
    )


def counted(claims):
    """Return how many of the claims hold."""
    held = {True: [], False: []}
    for record in claims.values():
        for finding in record["findings"]:
            held[finding["proven"]].append(finding["holds"])
    theorems, seen = (f"{sum(held[kind])} of {len(held[kind])}" for kind in (True, False))
    return f"{theorems} theorems hold, and {seen} observations were seen again.\n"


def verdicts(claims):
    """Return the table of all claims."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 60 12 28", ""]
    for row in [("claim", "verdict", "measured by"), *claim_rows(claims)]:
        lines += [f"   {'-' if k else '* -'} {text}" for k, text in enumerate(row)]
    return "\n".join(lines).replace("\n   - ", "\n     - ") + "\n"


def claim_rows(claims):
    """Yield claim, verdict and script of every finding."""
    for name, record in claims.items():
        for finding in record["findings"]:
            claim = re.sub(
                r"([*|`])", r"\\\1", finding["claim"]
            )  # what reStructuredText would read
            yield claim, _claims.verdict(finding), f"``{name}.py``"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    draw(options.records, options.docs / "images" / "results")
    (options.docs / "results.rst").write_text(page(options.records))


if __name__ == "__main__":
    main()
