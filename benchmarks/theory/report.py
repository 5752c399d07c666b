"""Every theory script, one after the other or several at once, and one report of them all.

    make theory
    python benchmarks/theory/report.py --jobs 2 --only sampling_theorem bi_level

Writes build/theory/report.md with a line for each claim and the picture of each script, beside the
records that it is made of. A script that fails is named in the report, and the others go on.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _claims import read, text_of, verdict

HERE = Path(__file__).parent
# In the order of the argument: what is convex, what is sampled, what is robust, who else trains.
SCRIPTS = (
    "convex_reformulation",
    "sampling_theorem",
    "sampled_neurons",
    "admm_convergence",
    "adversarial_programs",
    "global_adversarial_training",
    "polynomial_activation",
    "saddle_point_dynamics",
    "semi_infinite_learning",
    "bi_level",
    "first_order_adversaries",
)


def run(name, out, quick):
    """Run a script in a process of its own; return its last words if it failed, else None."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(out), *quick]
    threads = {"OMP_NUM_THREADS": "1"}  # tiny problems: a second thread costs more than it brings
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    print(done.stdout if done.returncode == 0 else f"{name} failed:\n{done.stderr}", flush=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def report(out, names, failed):
    """Return the report as Markdown."""
    found = {name: read(out / f"{name}.json") for name in names if name not in failed}
    lines = ["# The theory, measured", "", "| claim | verdict |", "|---|---|"]
    for name, record in found.items():
        for finding in record["findings"]:
            lines.append(
                f"| [{record['title']}](#{name}): {finding['claim']} | {verdict(finding)} |"
            )
    lines += [f"| {name} | failed: {words} |" for name, words in failed.items()]
    for name, record in found.items():
        lines += ["", f'<a id="{name}"></a>', "", f"## {record['title']}"]
        lines += ["", "```", text_of(record), "```", "", f"![{record['title']}]({name}.png)"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(SCRIPTS), choices=SCRIPTS)
    parser.add_argument("--out", type=Path, default=Path("build/theory"), help="folder")
    parser.add_argument("--jobs", type=int, default=2, help="scripts at once")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--smoke", action="store_true", help="one script in small size")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if options.smoke:
            options.only, options.quick, options.out = ["bi_level"], True, Path(temporary)
        options.out.mkdir(parents=True, exist_ok=True)
        quick = ["--quick"] * options.quick
        with ThreadPoolExecutor(options.jobs) as pool:
            errors = list(pool.map(lambda name: run(name, options.out, quick), options.only))
        failed = {n: e for n, e in zip(options.only, errors, strict=True) if e is not None}
        (options.out / "report.md").write_text(report(options.out, options.only, failed))
    print(f"{len(options.only) - len(failed)} of {len(options.only)} scripts done", flush=True)
    if not options.smoke:
        print(f"report: {options.out / 'report.md'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
