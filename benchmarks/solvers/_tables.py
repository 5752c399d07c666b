"""The tables that training methods are compared on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

TABLES = {"breast cancer": 0.2, "heart": 0.1, "pima": 0.1, "mammographic": 0.1}
FASHION = {"fashion 0/6": 0.04}


def load(name, n_most):
    """Return X and y = -1/+1 of a data set, None where its file is not there."""
    folder = Path(os.environ.get("CONVEXROBUST_DATA", "."))
    if name == "breast cancer":
        X, y = load_breast_cancer(return_X_y=True)
    elif name in FASHION:
        file = folder / "fashion_mnist_train.npz"
        if not file.exists():
            return None
        with np.load(file) as data:
            images, labels = (data[key] for key in list(data)[:2])
        two = np.isin(labels, (0, 6))
        X = images[two].reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(-1, 196) / 255.0
        y = labels[two]
    else:
        file = folder / f"{name}.csv"
        if not file.exists():
            return None
        table = np.genfromtxt(file, delimiter=",", skip_header=1, dtype=str)
        target = np.unique(table[:, -1], return_inverse=True)[1]
        X = np.array([[float(v) if v not in ("", "?") else np.nan for v in r[:-1]] for r in table])
        table = np.column_stack([X, target])
        table = np.unique(table[~np.isnan(table).any(axis=1)], axis=0)
        X, y = table[:, :-1], table[:, -1]
    rows = np.random.default_rng(0).permutation(len(X))[:n_most]
    return X[rows], np.where(y[rows] == y.max(), 1, -1)


def split(name, X, y):
    """Return training and test parts, standardised (images: centred) by the training part."""
    parts = train_test_split(X, y, test_size=0.3, stratify=y, random_state=0)
    scaler = StandardScaler(with_std=name not in FASHION).fit(parts[0])
    return scaler.transform(parts[0]), scaler.transform(parts[1]), parts[2], parts[3]
