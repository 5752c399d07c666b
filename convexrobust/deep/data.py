"""Images for training: MNIST, Fashion-MNIST and CIFAR-10, from their published files.

Nothing is downloaded where a folder is given; without one scikit-learn fetches the data from
OpenML. Values are in [0, 1], so that radii have the units of the papers (0.3, or 8 / 255);
whoever standardises does so inside the model.
"""

from __future__ import annotations

import gzip
import pickle
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["load_cifar10", "load_fashion_mnist", "load_mnist"]

SUBSETS = ("train", "test")


@dataclass(frozen=True)
class _Source:
    """Where a data set is found, and what it holds."""

    title: str
    name: str  # of npz files
    openml: str
    n_train: int
    shape: tuple[int, int, int]
    folders: tuple[str, ...]  # inside the one given, where downloads put the files
    classes: tuple[str, ...]


_DIGITS = tuple("0123456789")
_CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
)
_OBJECTS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_MNIST = _Source(
    "MNIST", "mnist", "mnist_784", 60000, (1, 28, 28), ("", "MNIST/raw", "MNIST"), _DIGITS
)
_FASHION = _Source(
    "Fashion-MNIST",
    "fashion_mnist",
    "Fashion-MNIST",
    60000,
    (1, 28, 28),
    ("", "FashionMNIST/raw", "FashionMNIST"),
    _CLOTHES,
)
_CIFAR = _Source(
    "CIFAR-10", "cifar10", "CIFAR_10", 50000, (3, 32, 32), ("", "cifar-10-batches-py"), _OBJECTS
)


def load_mnist(folder=None, subset="train", *, classes=None, size=None, flatten=False):
    """Return the handwritten digits of MNIST.

    Parameters
    ----------
    folder : str or Path, optional
        Where the files are: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two
        ``t10k-...``, packed (.gz) or not, also in ``MNIST/raw``, where torchvision puts them; or
        ``mnist_train.npz`` and ``mnist_test.npz`` with arrays X and y; or ``mnist.npz`` with
        x_train, y_train, x_test and y_test. Without a folder they are fetched from OpenML.
    subset : {"train", "test"}
        60000 images to train on, or 10000 others.
    classes : sequence of int or str, optional
        Only these classes, numbered 0, 1, ... in this order: ``(2, 8)`` gives a binary problem.
    size : int, optional
        Height and width to shrink the images to, by averages over equal areas.
    flatten : bool
        Return X (n, c * h * w).

    Returns
    -------
    X : float32 ndarray of shape (n, 1, 28, 28)
        Images in [0, 1].
    y : int64 ndarray of shape (n,)
        Class numbers.

    Raises
    ------
    FileNotFoundError
        If no known file is in the folder; the message names those expected.
    ValueError
        For a file that is damaged or holds something else, and options that cannot be.
    """
    return _loaded(_MNIST, folder, subset, classes, size, flatten)


def load_fashion_mnist(folder=None, subset="train", *, classes=None, size=None, flatten=False):
    """Return the pictures of clothes of Fashion-MNIST; see `load_mnist`.

    The files have the names of MNIST's, also in ``FashionMNIST/raw``, or are
    ``fashion_mnist_train.npz``, ``fashion_mnist_test.npz`` or ``fashion_mnist.npz``. Classes have
    names too: t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, boot.
    """
    return _loaded(_FASHION, folder, subset, classes, size, flatten)


def load_cifar10(folder=None, subset="train", *, classes=None, size=None, flatten=False):
    """Return the photographs of CIFAR-10, X (n, 3, 32, 32); see `load_mnist`.

    The files are ``data_batch_1`` to ``data_batch_5`` and ``test_batch`` (also in
    ``cifar-10-batches-py``), ``cifar-10-python.tar.gz`` that holds them, or npz files
    ``cifar10_train.npz``, ``cifar10_test.npz`` or ``cifar10.npz``. The batches are pickles; they
    are read without running what a pickle may ask for. There are 50000 images to train on.

    Classes: airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck. The papers on
    convex adversarial training use ``classes=("bird", "ship")``, one with ``size=7`` (d = 147).
    """
    return _loaded(_CIFAR, folder, subset, classes, size, flatten)


# ------------------------------------------------------------------ from raw images to X and y


def _loaded(source, folder, subset, classes, size, flatten):
    if subset not in SUBSETS:
        raise ValueError(f"subset must be one of {SUBSETS}, got {subset!r}.")
    read = _from_openml if folder is None else _from_folder
    images, labels = read(source, folder, subset)
    if classes is not None:
        images, labels = _of_classes(images, labels, _class_numbers(source, classes))
    X = _in_unit_range(images)
    if size is not None:
        X = _shrunk(X, size)
    return X.reshape(len(X), -1) if flatten else X, labels.astype(np.int64)


def _class_numbers(source, classes):
    names = {name: number for number, name in enumerate(source.classes)}
    numbers = [names.get(label, label) if isinstance(label, str) else label for label in classes]
    if len(set(numbers)) < len(numbers) or len(numbers) < 2 or not set(numbers) <= set(range(10)):
        raise ValueError(
            f"classes must be at least two different ones of 0 .. 9 or of {source.classes}, "
            f"got {classes!r}."
        )
    return numbers


def _of_classes(images, labels, numbers):
    """Return the images of some classes, which are numbered anew in their order."""
    rows = np.flatnonzero(np.isin(labels, numbers))
    place = np.full(max(numbers) + 1, -1)
    place[numbers] = np.arange(len(numbers))
    return images[rows], place[labels[rows]]


def _in_unit_range(images):
    if images.dtype == np.uint8:
        return np.divide(images, 255.0, dtype=np.float32)
    X = images.astype(np.float32)
    if len(X) and not (X.min() >= 0.0 and X.max() <= 1.0):
        raise ValueError(
            f"images must be uint8, or real numbers in [0, 1], got {images.dtype} in "
            f"[{X.min():g}, {X.max():g}]."
        )
    return X


def _shrunk(X, size):
    """Return square images averaged over size * size equal areas."""
    h = X.shape[-1]
    if not 1 <= size <= h:
        raise ValueError(f"size must be between 1 and {h}, got {size!r}.")
    ends, pixels = np.arange(size + 1)[:, None] * h / size, np.arange(h)
    overlap = np.minimum(ends[1:], pixels + 1) - np.maximum(ends[:-1], pixels)
    A = (np.maximum(overlap, 0.0) * size / h).astype(np.float32)
    return A @ X @ A.T


# ------------------------------------------------------------------ reading


def _from_openml(source, folder, subset):
    from sklearn.datasets import fetch_openml

    images, labels = fetch_openml(
        source.openml, version=1, return_X_y=True, as_frame=False, parser="auto"
    )
    part = slice(source.n_train) if subset == "train" else slice(source.n_train, None)
    return _checked(source, "OpenML", images[part].astype(np.uint8), labels[part].astype(np.int64))


def _from_folder(source, folder, subset):
    """Return the images and labels of the first known files in the folder."""
    folder = Path(folder)
    readers = _image_files if source is _CIFAR else _idx_files
    for place in (folder / inside for inside in source.folders):
        for read, files in (readers(place, subset), *_npz_files(source, place, subset)):
            if all(file.is_file() for file in files):
                return _checked(source, files[0], *_undamaged(read, files))
    state = "holds no file" if folder.is_dir() else "does not exist, so it holds no file"
    raise FileNotFoundError(
        f"the folder {str(folder)!r} {state} of {source.title} ({subset}). Expected there: "
        f"{_expected(source, subset)}. Without a folder they are fetched from OpenML."
    )


def _expected(source, subset):
    if source is _CIFAR:
        batches = "data_batch_1 to data_batch_5" if subset == "train" else "test_batch"
        names = f"cifar-10-python.tar.gz; or {batches} (also in {source.folders[1]})"
    else:
        names = " and ".join(f"{name} (or .gz)" for name in _idx_names(subset))
        names += f" (also in {source.folders[1]})"
    return (
        f"{names}; or {source.name}_{subset}.npz with X and y; or {source.name}.npz with "
        f"x_{subset} and y_{subset}"
    )


def _undamaged(read, files):
    try:
        return read(*files)
    except (
        *(EOFError, KeyError, MemoryError, OSError, ValueError, pickle.UnpicklingError),
        *(tarfile.TarError, zipfile.BadZipFile, zlib.error),
    ) as error:
        names = ", ".join(str(file) for file in files)
        raise ValueError(f"cannot read {names}: {error}. Get the file anew.") from error


def _checked(source, file, images, labels):
    """Return images (n, c, h, w) and whole labels (n,), making sure that they are these data."""
    labels = np.asarray(labels).ravel()
    pixels = int(np.prod(source.shape))
    if images.size != len(labels) * pixels or len(labels) == 0:
        raise ValueError(
            f"{file} holds images {images.shape} and {len(labels)} labels, but {source.title} has "
            f"images {source.shape} and one label each."
        )
    if not np.isin(labels, range(10)).all():
        raise ValueError(f"{file} holds labels other than 0 .. 9, got {np.unique(labels)[:12]}.")
    if images.ndim == 4 and images.shape[1:] == (*source.shape[1:], source.shape[0]):
        images = images.transpose(0, 3, 1, 2)  # channels last, as Keras stores them
    return images.reshape(len(labels), *source.shape), labels.astype(np.int64)


def _npz_files(source, place, subset):
    def read(file):
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as data:
            images, labels = ("X", "y") if "X" in data else (f"x_{subset}", f"y_{subset}")
            return data[images], data[labels]

    names = (f"{source.name}_{subset}.npz", f"{source.name}.npz")
    return [(read, [place / name]) for name in names]


def _idx_names(subset):
    start = "train" if subset == "train" else "t10k"
    return [f"{start}-images-idx3-ubyte", f"{start}-labels-idx1-ubyte"]


def _idx_files(place, subset):
    def packed_or_not(name):
        plain = place / name
        return plain if plain.is_file() else place / f"{name}.gz"

    def read(images, labels):
        return _idx(images), _idx(labels)

    return read, [packed_or_not(name) for name in _idx_names(subset)]


def _idx(file):
    """Return the array of an idx file: 0, 0, 8 (bytes), the number of axes, their lengths, data."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
        content = stream.read()
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError("it is not an idx file of bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], dtype=">i4")
    if len(content) - start != np.prod(shape, dtype=np.int64):
        raise ValueError(f"it holds {len(content) - start} bytes of {tuple(shape.tolist())}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _batch_names(subset):
    return [f"data_batch_{k}" for k in range(1, 6)] if subset == "train" else ["test_batch"]


def _image_files(place, subset):
    names, archive = _batch_names(subset), place / "cifar-10-python.tar.gz"
    if not archive.is_file():
        return _batches, [place / name for name in names]

    def read(file):
        with tarfile.open(file) as members:
            found = {Path(member.name).name: member for member in members if member.isfile()}
            return _joined(members.extractfile(found[name]) for name in names)

    return read, [archive]


def _batches(*files):
    return _joined(open(file, "rb") for file in files)


def _joined(streams):
    parts = []
    for stream in streams:
        with stream:
            parts.append(_ArraysOnly(stream, encoding="bytes").load())
    labels = np.concatenate([np.asarray(part[b"labels"]) for part in parts])
    return np.concatenate([part[b"data"] for part in parts]), labels


def _array_to_fill(kind, shape, dtype):
    """Return the empty array that a pickle then gives its state, which checks shape and bytes."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError(f"it asks for {kind!r} of shape {shape}, not for an array")
    return np.ndarray(shape, np.dtype(dtype))


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of arrays, lists and dicts; refuses whatever else they would call."""

    def find_class(self, module, name):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _array_to_fill
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
