"""CPU time of an epoch of adversarial training against the bare passes that its method needs.

    OMP_NUM_THREADS=1 python benchmarks/robustness/epoch_cost.py [--networks ...] [--methods ...]

Both train the same network on the same batches of 128, random data, in this process, in turns, on
one thread. The table holds the passes of a method, milliseconds of CPU time for an epoch of `train`
(its share of what `train` does once for a run is in it) and of the bare loop, medians over the
rounds, and the median of the ratios of the rounds. Goals: `pgd` at most 1.1, `dale` and `fast-bat`
at most 1.2. The others have none.

The bare loop is what nobody can save: it takes the rows of a batch, makes the passes, and nothing
else. It does not move the points, draw noise, keep the worst point, look at the ball, at NaN or at
the accuracy, switch modes, or set a learning rate.

* An input pass is forward, loss, and gradient of the loss in the points. Weights are as they are:
  freezing them saves nothing, as `torch.autograd.grad` computes no gradient that is not asked for.
* A weight pass is forward, loss, backward, and a step of SGD with momentum and weight decay. Where
  the loss has two terms (`dale`, `trades`), forward and backward are of two batches.
* `pgd` is 10 input passes and a weight pass. That the package takes the worst point it met rather
  than the last costs one more forward pass, which is overhead here.
* `fast-bat` is one input pass, and a weight pass through the gradient of another.
* `trades` begins with a forward pass at the data; losses of its input passes are divergences.
"""

import argparse
import statistics
import time
from functools import partial

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from convexrobust import LpBall
from convexrobust.deep import create_method, create_network, train

BATCH = 128
NETWORKS = {"two-layer": (64,), "cnn": (1, 28, 28)}
GOALS = {"pgd": 1.1, "dale": 1.2, "fast-bat": 1.2}


# ------------------------------------------------------------------ bare passes


def input_pass(model, x, loss):
    """Return the gradient of a loss of the outputs in the points."""
    points = x.detach().requires_grad_()
    return torch.autograd.grad(loss(model(points)), points)[0]


def weight_pass(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def attacked(n_steps, model, optimizer, x, y):
    for _ in range(n_steps):
        input_pass(model, x, partial(cross_entropy, target=y, reduction="sum"))
    weight_pass(optimizer, cross_entropy(model(x), y))


def dale(model, optimizer, x, y):
    for _ in range(10):
        input_pass(model, x, lambda f: cross_entropy(f, y, reduction="none").log().sum())
    weight_pass(optimizer, cross_entropy(model(x), y) + cross_entropy(model(x), y))


def fast_bat(model, optimizer, x, y):
    input_pass(model, x, partial(cross_entropy, target=y, reduction="sum"))
    points = x.detach().requires_grad_()
    losses = cross_entropy(model(points), y, reduction="sum")
    (gradient,) = torch.autograd.grad(losses, points, create_graph=True)
    weight_pass(optimizer, cross_entropy(model(x + gradient), y))


def trades(model, optimizer, x, y):
    with torch.no_grad():
        p = log_softmax(model(x), dim=1)
    for _ in range(10):
        input_pass(model, x, partial(divergence, p))
    outputs = model(x)
    apart = divergence(log_softmax(outputs, dim=1), model(x))
    weight_pass(optimizer, cross_entropy(outputs, y) + apart / len(x))


def divergence(p, outputs):
    return kl_div(log_softmax(outputs, dim=1), p, reduction="sum", log_target=True)


BARE = {
    "standard": (partial(attacked, 0), "1 weight"),
    "fgsm": (partial(attacked, 1), "1 input, 1 weight"),
    "fast": (partial(attacked, 1), "1 input, 1 weight"),
    "pgd": (partial(attacked, 10), "10 input, 1 weight"),
    "dale": (dale, "10 input, 1 weight of 2 batches"),
    "fast-bat": (fast_bat, "1 input, 1 weight through a gradient"),
    "trades": (trades, "1 forward, 10 input, 1 weight of 2 batches"),
}


# ------------------------------------------------------------------ measurement


def train_bare(model, step, X, y, n_epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for _ in range(n_epochs):
        for rows in torch.randperm(len(X)).split(BATCH):
            step(model, optimizer, X[rows], y[rows])


def train_package(model, method, X, y, n_epochs):
    ball = LpBall(np.inf, 0.05, (0.0, 1.0))
    method = create_method(method, ball, n_rows=len(X))
    train(model, method, X, y, n_epochs=n_epochs, batch_size=BATCH, learning_rate=0.01)


def milliseconds(run, model, what, X, y, n_epochs):
    """Return the CPU time of an epoch."""
    started = time.process_time()
    run(model, what, X, y, n_epochs)
    return 1e3 * (time.process_time() - started) / n_epochs


def rounds_of(network, method, n_rows, n_epochs, n_rounds):
    """Return the times (n_rounds, 2) of package and bare loop, after a round to warm up."""
    torch.manual_seed(0)
    X, y = torch.rand(n_rows, *NETWORKS[network]), torch.randint(10, (n_rows,))
    runs, times = ((train_package, method), (train_bare, BARE[method][0])), []
    for _ in range(n_rounds + 1):
        models = [create_network(network, X.shape[1:], 10, width=128) for _ in runs]
        pairs = zip(runs, models, strict=True)
        times.append([milliseconds(run, m, what, X, y, n_epochs) for (run, what), m in pairs])
    return times[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=list(BARE), choices=list(BARE))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="two methods, one round of one batch")
    options = parser.parse_args()
    if options.smoke:
        options.methods, options.rounds = ["standard", "fast-bat"], 1
    torch.set_num_threads(1)
    head = f"{'network':<10}{'method':<10}{'train':>9}{'bare':>9}{'ratio':>7}{'goal':>6}  passes"
    print(f"milliseconds of CPU time an epoch, medians of {options.rounds} rounds\n{head}")
    for network in options.networks:
        n_rows, n_epochs = (2048, 3) if network == "two-layer" else (512, 1)
        if options.smoke:
            n_rows, n_epochs = BATCH, 1
        for method in options.methods:
            times = rounds_of(network, method, n_rows, n_epochs, options.rounds)
            package, bare = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(ours / theirs for ours, theirs in times)
            goal = GOALS.get(method, "-")
            line = f"{network:<10}{method:<10}{package:9.1f}{bare:9.1f}{ratio:7.2f}{goal:>6}"
            print(f"{line}  {BARE[method][1]}", flush=True)


if __name__ == "__main__":
    main()
