"""Networks that exchange starts from, or looks at between two others."""

from __future__ import annotations

import importlib.util

import numpy as np

from convexrobust.network import TwoLayerReLU
from convexrobust.solvers import train_certified

_EPOCHS, _MOST_ROWS = 300, 4000  # of a training


def check_network(network, program):
    """Raise ValueError unless the network is one for the data of the program."""
    n_outputs, d, _ = program.shape
    wanted = (d - program.intercept, n_outputs, program.intercept)
    found = (network.n_features, network.n_outputs, network.intercept)
    if found != wanted:
        raise ValueError(
            f"network has (features, outputs, intercept) = {found}, but the program asks for "
            f"{wanted}: train it on the same data."
        )
    if network.offset is not None and np.any(network.offset):
        raise ValueError(
            "network has an output offset, and those of the program have none: give "
            "dataclasses.replace(network, offset=None), and train on centred targets."
        )


def trained_network(program, width, rng) -> TwoLayerReLU:
    """Return a network trained by gradient descent, to start from."""
    if importlib.util.find_spec("torch") is None or not program.intercept:
        return train_certified(program, width=width, random_state=rng)
    from convexrobust.deep import train_two_layer  # imports torch

    rows = np.sort(rng.permutation(len(program.X))[:_MOST_ROWS])
    return train_two_layer(
        program.X[rows, :-1],
        np.asarray(program.y)[rows],
        width=width,
        ball=program.perturbation,
        attack="pgd",
        beta=program.regularizer.beta,
        n_outputs=program.n_outputs,
        loss=program.loss,
        n_epochs=_EPOCHS,
        random_state=rng,
    )


def zero_network(program) -> TwoLayerReLU:
    """Return the network without neurons."""
    n_outputs, d, _ = program.shape
    return TwoLayerReLU(np.zeros((d, 0)), np.zeros((0, n_outputs)), intercept=program.intercept)


def mixed(first, second, share):
    """Return the network (1 - share) * first + share * second."""
    low, high = np.sqrt(1.0 - share), np.sqrt(share)
    hidden = np.hstack([low * first.hidden, high * second.hidden])
    output = np.vstack([low * first.output, high * second.output])
    return TwoLayerReLU(hidden, output, intercept=first.intercept)
