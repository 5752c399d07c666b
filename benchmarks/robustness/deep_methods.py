"""Methods of adversarial training against each other: methods x data x epsilon x seeds.

    python benchmarks/robustness/deep_methods.py --data digits --epsilon 0.1 0.2 --seeds 3
    python benchmarks/robustness/deep_methods.py --data cifar10 --folder DATA --network resnet18 \
        --epsilon 0.031 --methods fast gradalign fast-bat pgd --device cuda --augment

Every run leaves one JSON file in the folder of results, and a run whose file is there is skipped,
so that an interrupted suite goes on where it was (within a run too, from its checkpoint) and a
larger one uses what a smaller one measured. A run that fails is recorded and the suite goes on.

Columns: accuracy in % on the test data as it is, under FGSM, under PGD with 50 steps and 10
restarts, and under the worst attack (those, APGD and Square, for each sample); certified by the
interval bound for two-layer networks and by bound propagation for others in l-inf; seconds for an
epoch of training; and the passes in it that a gradient goes back through, in passes over the data
(calls of the model: certified bounds, which work on the layers themselves, are not among them).
Means and standard errors over the seeds. No method was tuned: all share the optimizer and schedule.
Options of a method stand behind its name, as in ``--methods pgd dale:margin=0.6``.
"""

import argparse
import ast
import json
import os
import tempfile
import traceback
import zlib
from functools import partial
from itertools import cycle, product
from pathlib import Path

import numpy as np
import torch

import convexrobust
from convexrobust import LpBall, as_network
from convexrobust.deep import METHODS, Augmented, create_method, create_network, load_task, train
from convexrobust.deep.methods.base import WrappedMethod
from convexrobust.deep.methods.certified import ibp_margins
from convexrobust.evaluation import evaluate_robustness

SUITE = {
    "fgsm": {},
    "pgd": {"n_steps": 50, "n_restarts": 10},
    "apgd": {"n_steps": 100, "n_restarts": 2},
    "square": {"n_queries": 1000},
}
QUICK_SUITE = {"fgsm": {}, "pgd": {"n_steps": 5, "n_restarts": 2}}
COLUMNS = {
    "clean": "clean",
    "fgsm": "FGSM",
    "pgd": "PGD-50-10",
    "worst attack": "worst attack",
    "certified": "certified",
}
COSTS = {"seconds": "s/epoch", "passes": "passes/epoch"}
# What decides the outcome of a run; the rest of the options is about files and machines.
SETTING = (
    *("data", "classes", "size", "network", "width", "norm", "epochs", "batch_size"),
    *("learning_rate", "weight_decay", "schedule", "warmup", "augment", "rows", "test_rows"),
    "smoke",
)


class Counted(WrappedMethod):
    """A method that counts the passes a gradient can go back through, in samples."""

    def __init__(self, method, model):
        super().__init__(method)
        self.samples, self.counting = 0, False
        self.hook = model.register_forward_hook(self._count)

    def _count(self, model, inputs, outputs):
        if self.counting and outputs.requires_grad:
            self.samples += len(outputs)

    def step(self, *batch):
        self.counting = True
        try:
            return self.method.step(*batch)
        finally:
            self.counting = False

    def state_dict(self):
        return {"method": super().state_dict(), "samples": self.samples}

    def load_state_dict(self, state):
        super().load_state_dict(state["method"])
        self.samples = state["samples"]


# ------------------------------------------------------------------ one run


def run_one(setting, options, checkpoint):
    """Train and measure; return the figures of one run."""
    task = load_task(
        setting["data"],
        options.folder,
        classes=setting["classes"],
        size=setting["size"],
        flatten=setting["network"] == "two-layer",
        random_state=setting["seed"],
    )
    X, y = task.X[: setting["rows"]], task.y[: setting["rows"]]
    order = np.random.default_rng(0).permutation(len(task.X_test))[: setting["test_rows"]]
    X_test, y_test = task.X_test[order], task.y_test[order]
    ball = LpBall(float(setting["norm"]), setting["epsilon"], task.bounds)
    torch.manual_seed(setting["seed"])
    model = create_network(
        setting["network"], X.shape[1:], task.n_outputs, width=setting["width"]
    ).to(options.device)
    name, method_options = method_of(setting["method"])
    method_options |= {"n_rows": len(X), "random_state": setting["seed"]}
    method = create_method(name, ball, **method_options)
    method = Counted(Augmented(method) if setting["augment"] else method, model)
    history = train(
        model,
        method,
        X,
        y,
        n_epochs=setting["epochs"],
        batch_size=setting["batch_size"],
        learning_rate=setting["learning_rate"],
        optimizer=partial(torch.optim.SGD, momentum=0.9, weight_decay=setting["weight_decay"]),
        schedule=setting["schedule"],
        warmup=setting["warmup"],
        validation=(X_test[:200], y_test[:200]),  # for the curves; nothing is chosen by it
        random_state=setting["seed"],
        checkpoint=checkpoint,
    )
    method.hook.remove()  # a model with hooks is not read as a two-layer network
    return measure(model, ball, X_test, y_test, setting["smoke"]) | {
        "seconds": float(np.median(history["seconds"])),
        "passes": method.samples / (len(X) * setting["epochs"]),
        "epochs": history.epochs,
    }


def method_of(text):
    """Return name and options of a method written as name:option=value,option=value."""
    name, _, options = text.partition(":")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(METHODS)}")
    pairs = (pair.split("=", 1) for pair in options.split(",") if pair)
    return name, {key: ast.literal_eval(value) for key, value in pairs}


def known_method(text):
    """Return a method as it is written, if it can be read."""
    method_of(text)
    return text


def measure(model, ball, X, y, quick):
    """Return the accuracies of a trained model, None where there is none."""
    network = as_network(model) if X.ndim == 2 else None
    suite = QUICK_SUITE if quick else SUITE
    if network is None:
        suite = {name: options | {"batch_size": 250} for name, options in suite.items()}
    table = evaluate_robustness(
        {"model": network or model},
        X,
        y,
        ball.radius,
        norm=ball.p,
        bounds=ball.bounds,
        suite=suite,
        exact=False,
    )
    found = {m: table.accuracy("model", ball.radius, m) for m in COLUMNS}
    if network is None and ball.p == np.inf:
        found["certified"] = propagated(model, X, y, ball)
    return {name: None if np.isnan(value) else value for name, value in found.items()}


def propagated(model, X, y, ball):
    """Return the accuracy that bound propagation proves, nan for layers that it does not know."""
    parameter, certified = next(model.parameters()), []
    try:
        for k in range(0, len(X), 250):
            x = torch.as_tensor(X[k : k + 250]).to(parameter)
            labels = torch.as_tensor(y[k : k + 250], device=parameter.device)
            with torch.no_grad():
                certified.append(ibp_margins(model, x, labels, ball).amin(dim=1) > 0.0)
    except ValueError:
        return float("nan")
    return torch.cat(certified).double().mean().item()


# ------------------------------------------------------------------ the suite


def settings_of(options):
    """Return what is to be run, one dict a run."""
    shared = {name: getattr(options, name) for name in SETTING if name != "data"}
    several = product(options.data, options.epsilon, options.methods, range(options.seeds))
    return [
        {"method": method, "data": data, "epsilon": epsilon, "seed": seed} | shared
        for data, epsilon, method, seed in several
    ]


def file_of(setting, folder):
    """Return the file of a run; its name holds a checksum of all that decides the outcome."""
    checksum = zlib.crc32(json.dumps(setting, sort_keys=True).encode())
    words = {"data": Path(setting["data"]).stem, "method": method_of(setting["method"])[0]}
    name = "{data}_{network}_{method}_{epsilon:g}_{seed}".format(**setting | words)
    return folder / f"{name}_{checksum:08x}.json"


def completed(setting, options):
    """Return the result of a run: from its file, or by running it."""
    file = file_of(setting, options.results)
    if file.exists():
        result = json.loads(file.read_text())
        if not (options.retry and "error" in result):
            return result
    checkpoint = file.with_suffix(".pt")
    try:
        result = run_one(setting, options, checkpoint)
    except Exception as error:  # recorded, so that one failure does not end the suite
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    result = {"setting": setting} | result | {"versions": convexrobust.versions()}
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1))
    os.replace(unfinished, file)
    checkpoint.unlink(missing_ok=True)
    return result


def grouped(results):
    """Return the results of each problem and method, those of all seeds together."""
    groups = {}
    for result in results:
        setting = result["setting"]
        problem = (setting["data"], setting["network"], setting["epsilon"])
        groups.setdefault(problem, {}).setdefault(setting["method"], []).append(result)
    return groups


def table_of(results):
    """Return the table of all results as text."""
    lines = []
    for (data, network, epsilon), methods in grouped(results).items():
        title = f"{data}, {network}, epsilon {epsilon:g}"
        heads = [*COLUMNS.values(), *COSTS.values()]
        lines += [f"\n{title}", f"{'method':<16}" + "".join(f"{head:>15}" for head in heads)]
        for method, runs in methods.items():
            done = [run for run in runs if "error" not in run]
            cells = [cell([run[name] for run in done], 100.0) for name in COLUMNS]
            cells += [cell([run[name] for run in done], 1.0) for name in COSTS]
            failed = len(runs) - len(done)
            note = f"  {failed} of {len(runs)} failed" if failed else ""
            lines.append(f"{method:<16}" + "".join(f"{text:>15}" for text in cells) + note)
    return "\n".join(lines)


def cell(values, factor):
    """Return mean and standard error."""
    if not values or any(value is None for value in values):
        return "-"
    values = factor * np.array(values)
    digits = 1 if factor > 1.0 else 2
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.{digits}f} +- {error:.{digits}f}"


def draw(results, folder):
    """Write, for each problem, the trade-off and the accuracy over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for (data, network, epsilon), methods in grouped(results).items():
        figure, (trade_off, epochs) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
        colors = [*pyplot.get_cmap("tab10").colors, *pyplot.get_cmap("Dark2").colors]
        for color, (method, runs) in zip(cycle(colors), methods.items(), strict=False):
            done = [run for run in runs if "error" not in run]
            if not done:
                continue
            clean, robust = (
                100 * np.mean([run[name] for run in done]) for name in ("clean", "worst attack")
            )
            trade_off.plot(clean, robust, "o", color=color)  # named by the legend of the curves
            curves = [[e["validation_robust_accuracy"] for e in run["epochs"]] for run in done]
            epochs.plot(100 * np.mean(curves, axis=0), color=color, label=method)
        trade_off.set(xlabel="clean accuracy (%)", ylabel="accuracy under the worst attack (%)")
        epochs.set(xlabel="epoch", ylabel="accuracy under PGD-10 (%)")
        figure.legend(loc="outside right center", fontsize="small")
        figure.suptitle(f"{data}, {network}, epsilon {epsilon:g}")
        figure.savefig(folder / f"{Path(data).stem}_{network}_{epsilon:g}.png", dpi=150)
        pyplot.close(figure)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), type=known_method)
    parser.add_argument("--data", nargs="+", default=["digits"])
    parser.add_argument("--folder", help="where the files of mnist, fashion-mnist, cifar10 are")
    parser.add_argument("--classes", nargs="+", help="only these, such as bird ship")
    parser.add_argument("--size", type=int, help="shrink images to this height and width")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.1])
    parser.add_argument("--norm", choices=("1", "2", "inf"), default="inf")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--network", default="two-layer")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--schedule", default="cyclic")
    parser.add_argument("--warmup", type=float, default=0.3)
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--rows", type=int, help="train on no more than these")
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=Path("deep_methods_results"))
    parser.add_argument("--plots", type=Path, help="folder for pictures")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--device")
    parser.add_argument("--smoke", action="store_true", help="a few methods, small and short")
    options = parser.parse_args()
    if options.classes is not None:
        options.classes = [int(c) if c.isdigit() else c for c in options.classes]
    if options.smoke:
        options.methods, options.results = ["standard", "fast", "dale", "certified"], None
        options.epochs, options.rows, options.test_rows, options.width = 3, 400, 60, 32
    return options


def main():
    options = parsed()
    with tempfile.TemporaryDirectory() as temporary:
        options.results = options.results or Path(temporary)
        options.results.mkdir(parents=True, exist_ok=True)
        results, settings = [], settings_of(options)
        for k, setting in enumerate(settings, 1):
            results.append(completed(setting, options))
            state = results[-1].get("error", "done")
            name = "{method} on {data}, epsilon {epsilon:g}, seed {seed}".format(**setting)
            print(f"[{k}/{len(settings)}] {name}: {state}", flush=True)
        print(table_of(results))
        if options.smoke:
            print("smoke: PGD with 5 steps and 2 restarts, and no other attacks")
        if options.plots is not None:
            options.plots.mkdir(parents=True, exist_ok=True)
            draw(results, options.plots)


if __name__ == "__main__":
    main()
