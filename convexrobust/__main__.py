"""The command ``convexrobust``, also ``python -m convexrobust``."""

from __future__ import annotations

import argparse
import ast
from functools import partial
from pathlib import Path

_SUITE = {"fgsm": {}, "pgd": {"n_steps": 50, "n_restarts": 10}}


def main(arguments=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="convexrobust",
        description="Convex training of two-layer ReLU networks with proven robustness.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(commands)
    _add_train(commands)
    options = vars(parser.parse_args(arguments))
    options.pop("run")(**options)


def _add_demo(commands):
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


def _demo(**options):
    from convexrobust.demo import run

    try:
        run(**{name: value for name, value in options.items() if value is not None})
    except ImportError as error:  # of an extra: the message says which, a traceback would hide it
        raise SystemExit(f"convexrobust: {error}") from error


def _add_train(commands):
    train = commands.add_parser(
        "train",
        help="train a network by a method of adversarial training, print its robustness",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for add in (_add_problem, _add_model, _add_pace, _add_files):
        add(train)
    train.set_defaults(run=_train)


def _add_problem(train):
    group = train.add_argument_group("data and perturbations")
    group.add_argument(
        "--data",
        default="digits",
        help="mnist, fashion-mnist, cifar10, digits, breast-cancer, or an .npz file with X and y",
    )
    group.add_argument("--folder", help="where the files of the first three are")
    group.add_argument("--classes", nargs="+", help="only these classes")
    group.add_argument("--size", type=int, help="shrink images to this height and width")
    group.add_argument("--rows", type=int, help="train on no more rows than these")
    group.add_argument("--test-rows", type=int, default=1000, help="measure on no more than these")
    group.add_argument("--epsilon", type=float, default=0.1, help="radius in units of the data")
    group.add_argument("--norm", default="inf", help="of perturbations: 1, 2 or inf")


def _add_model(train):
    group = train.add_argument_group("network and method")
    group.add_argument("--method", default="pgd", help="a name in convexrobust.deep.METHODS")
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method, such as weight=3.0; may be repeated",
    )
    group.add_argument("--network", default="two-layer", help="two-layer, cnn, resnet18, ...")
    group.add_argument("--width", type=int, default=64, help="neurons of the two-layer network")
    group.add_argument("--augment", action="store_true", help="shift and mirror images at random")


def _add_pace(train):
    group = train.add_argument_group("optimization")
    group.add_argument("--epochs", type=int, default=30)
    group.add_argument("--batch-size", type=int, default=128)
    group.add_argument("--learning-rate", type=float, default=0.1, help="the largest, of SGD")
    group.add_argument("--weight-decay", type=float, default=5e-4)
    group.add_argument("--schedule", default="cyclic", help="cyclic, multistep or cosine")
    group.add_argument("--warmup", type=float, default=0.0, help="share of epochs to full epsilon")
    group.add_argument("--precision", help="bfloat16, for autocast")
    group.add_argument("--device", help="where to train, such as cuda")
    group.add_argument("--seed", type=int, default=0)


def _add_files(train):
    group = train.add_argument_group("files")
    group.add_argument("--checkpoint", help="state after each epoch; training goes on from it")
    group.add_argument("--log", help=".csv or .jsonl file for the figures of the epochs")
    group.add_argument("--save", help="file for the weights (state_dict)")


def _train(**options):
    try:
        _train_and_measure(argparse.Namespace(**options))
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        raise SystemExit(f"convexrobust: {error}") from error


def _train_and_measure(options):
    import numpy as np
    import torch

    from convexrobust import LpBall
    from convexrobust.deep.augmentation import Augmented
    from convexrobust.deep.catalogue import create_method, create_network
    from convexrobust.deep.training import train
    from convexrobust.evaluation import evaluate_robustness

    task = _task(options)
    ball = LpBall(options.norm, options.epsilon, task.bounds)
    torch.manual_seed(options.seed)
    model = create_network(options.network, task.X.shape[1:], task.n_outputs, width=options.width)
    method = create_method(
        options.method,
        ball,
        n_rows=len(task.X),
        random_state=options.seed,
        **dict(_option(text) for text in options.option),
    )
    train(
        model,
        Augmented(method) if options.augment else method,
        task.X,
        task.y,
        n_epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        optimizer=partial(torch.optim.SGD, momentum=0.9, weight_decay=options.weight_decay),
        schedule=options.schedule,
        warmup=options.warmup,
        precision=options.precision,
        device=options.device,
        random_state=options.seed,
        checkpoint=options.checkpoint,
        log=options.log,
        progress=True,
    )
    if options.save is not None:
        torch.save(model.state_dict(), options.save)
    rows = np.random.default_rng(0).permutation(len(task.X_test))[: options.test_rows]
    table = evaluate_robustness(
        {options.method: model},
        task.X_test[rows],
        task.y_test[rows],
        options.epsilon,
        norm=ball.p,
        bounds=task.bounds,
        suite=_SUITE,
        exact=False,
    )
    print(table)


def _task(options):
    """Return the data, cut to the rows asked for."""
    from convexrobust.deep.catalogue import load_task

    classes = options.classes and [int(c) if c.isdigit() else c for c in options.classes]
    task = load_task(
        options.data,
        options.folder,
        classes=classes,
        size=options.size,
        flatten=options.network == "two-layer",
        random_state=options.seed,
    )
    return task._replace(X=task.X[: options.rows], y=task.y[: options.rows])


def _option(text):
    """Return the name and the value of ``name=value``; words need no quotes."""
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--option must be NAME=VALUE, got {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    main()
