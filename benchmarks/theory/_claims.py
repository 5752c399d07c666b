"""What the theory scripts share: findings, the command line, and the record of a run.

A script has a docstring whose first line is its title, and two functions:

    study(quick) -> findings, curves     # list of Finding; whatever `draw` needs, as plain lists
    draw(figure, curves)                 # one picture, from what the record holds

and ends in `main(study, draw)`. Its record is a JSON file from which tables and pictures are made
again without running anything.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import convexrobust


@dataclass(frozen=True)
class Finding:
    """One claim and what became of it.

    Attributes
    ----------
    claim : what is said, testable, with its source.
    setting : data, sizes, seeds, tolerance.
    measured : the figures.
    holds : the verdict.
    proven : whether it is a theorem, here or in a paper: then it has to hold. Otherwise it is an
        observation of a paper, which may not be seen again.
    remark : what to know about it; the analysis, where it does not hold.
    """

    claim: str
    setting: str
    measured: str
    holds: bool
    proven: bool = True
    remark: str = ""

    def __post_init__(self):
        if not self.holds and not self.remark:
            raise ValueError(f"A claim that does not hold needs a remark: {self.claim!r}.")


def main(study, draw):
    """Run a script: print its findings, write its record and its picture."""
    script = sys.modules[study.__module__]
    parser = argparse.ArgumentParser(description=script.__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--out", type=Path, default=Path("build/theory"), help="folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    name = Path(script.__file__).stem
    began = time.perf_counter(), time.process_time()
    findings, curves = study(options.quick)
    record = {
        "title": script.__doc__.splitlines()[0].rstrip("."),
        "command": f"python benchmarks/theory/{name}.py" + " --quick" * options.quick,
        "seconds": round(time.perf_counter() - began[0], 1),
        "cpu_seconds": round(time.process_time() - began[1], 1),
        "versions": convexrobust.versions(),
        "findings": [asdict(finding) for finding in findings],
        "curves": curves,
    }
    text = json.dumps(record, indent=1, default=plain)
    (options.out / f"{name}.json").write_text(text)
    print(text_of(record))
    picture(draw, json.loads(text)["curves"], options.out / f"{name}.png")


def read(file):
    """Return the record that a script wrote."""
    return json.loads(Path(file).read_text())


def text_of(record):
    """Return the findings of a record as text."""
    lines = [record["title"], "=" * len(record["title"])]
    for finding in record["findings"]:
        lines += [
            f"\n[{verdict(finding)}] {finding['claim']}",
            f"  setting:  {finding['setting']}",
            f"  measured: {finding['measured']}",
        ]
        if finding["remark"]:
            lines.append(f"  remark:   {finding['remark']}")
    return "\n".join([*lines, f"\n{record['seconds']:.0f} s, {record['command']}"])


def verdict(finding):
    """Return the verdict of a finding in words."""
    return "holds" if finding["holds"] else "does not hold"


def picture(draw, curves, file):
    """Draw the curves of a record into a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    draw(figure, curves)
    figure.savefig(file, dpi=120)


def plain(value):
    """Return arrays and numbers of numpy as JSON has them."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON.")
