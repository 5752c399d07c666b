"""The command ``convexrobust``, also ``python -m convexrobust``."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="convexrobust",
        description="Convex training of two-layer ReLU networks with proven robustness.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo", help="train and compare on breast cancer data, print a table, draw a picture"
    )
    demo.add_argument(
        "--epsilon", type=float, default=None, help="l-inf radius, standardised units"
    )
    demo.add_argument("--beta", type=float, default=None, help="weight decay of every model")
    demo.add_argument("--seed", type=int, default=0, help="seed of split, patterns and networks")
    demo.add_argument(
        "--picture", type=Path, default=Path("convexrobust_demo.png"), help="file to write"
    )
    demo.set_defaults(run=_demo)
    options = vars(parser.parse_args(arguments))
    options.pop("run")(**options)


def _demo(**options):
    from convexrobust.demo import run

    try:
        run(**{name: value for name, value in options.items() if value is not None})
    except ImportError as error:  # of an extra: the message says which, a traceback would hide it
        raise SystemExit(f"convexrobust: {error}") from error


if __name__ == "__main__":
    main()
