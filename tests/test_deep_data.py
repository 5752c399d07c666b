"""Data sets from tiny files in their published formats, and random shifts."""
# ruff: noqa: E402 - without torch the file is skipped before it imports what needs it

import gzip
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convexrobust.deep.augmentation import Augmented, augmented
from convexrobust.deep.data import load_cifar10, load_fashion_mnist, load_mnist
from convexrobust.deep.methods import Free, Standard
from convexrobust.deep.methods.ssds import Ssds
from convexrobust.deep.training import train
from convexrobust.perturbations import LpBall


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)


@pytest.fixture(scope="module")
def photographs():
    return np.random.default_rng(1).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)


LABELS = np.arange(20, dtype=np.uint8) % 10


def write_idx(folder, images, labels, start="train", packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for values, name in ((images, "images-idx3-ubyte"), (labels, "labels-idx1-ubyte")):
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
        content = header + values.tobytes()
        file = folder / f"{start}-{name}{'.gz' if packed else ''}"
        file.write_bytes(gzip.compress(content) if packed else content)


def python_2_pickle(images, labels):
    """Return a batch as Python 2 wrote it: every string and all bytes of arrays are SHORT_BINSTR.

    The published files were made with Python 2 and protocol 2, which Python 3 cannot write.
    """
    flat = images.reshape(len(images), -1).tobytes()

    def string(value):
        return b"T" + len(value).to_bytes(4, "little") + value

    def number(value):
        return b"J" + value.to_bytes(4, "little")

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + string(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xff" * 2 + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85"
    array += string(b"b") + b"\x87R"
    shape = number(len(images)) + number(len(flat) // len(images)) + b"\x86"
    array += b"(" + number(1) + shape + dtype + b"\x89" + string(flat) + b"tb"
    listed = b"](" + b"".join(number(int(label)) for label in labels) + b"e"
    return b"\x80\x02}" + string(b"data") + array + b"s" + string(b"labels") + listed + b"s."


def batch(images, labels):
    return pickle.dumps(
        {b"data": images.reshape(len(images), -1), b"labels": labels.tolist()}, protocol=2
    )


def write_batches(folder, photographs):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(5):
        rows = slice(4 * k, 4 * k + 4)
        (folder / f"data_batch_{k + 1}").write_bytes(batch(photographs[rows], LABELS[rows]))
    (folder / "test_batch").write_bytes(batch(photographs[:3], LABELS[:3]))


class TestFiles:
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("inside", ["", "MNIST/raw"])
    def test_mnist_as_published(self, tmp_path, images, packed, inside):
        write_idx(tmp_path / inside, images, LABELS, packed=packed)
        write_idx(tmp_path / inside, images[:5], LABELS[:5], start="t10k", packed=packed)
        X, y = load_mnist(tmp_path)
        assert (X.shape, X.dtype, y.dtype) == ((20, 1, 28, 28), np.float32, np.int64)
        np.testing.assert_allclose(X[:, 0], images / 255.0, rtol=1e-6)
        np.testing.assert_array_equal(y, LABELS)
        assert load_mnist(tmp_path, "test")[0].shape == (5, 1, 28, 28)

    def test_fashion_mnist_of_npz(self, tmp_path, images):
        np.savez(tmp_path / "fashion_mnist_train.npz", X=images, y=LABELS)
        np.savez(tmp_path / "fashion_mnist_test.npz", X=images[:3] / 255.0, y=LABELS[:3])
        X, y = load_fashion_mnist(tmp_path)
        np.testing.assert_allclose(X[:, 0], images / 255.0, rtol=1e-6)
        np.testing.assert_allclose(load_fashion_mnist(tmp_path, "test")[0], X[:3], rtol=1e-6)
        X, y = load_fashion_mnist(tmp_path, classes=("boot", "t-shirt"))
        np.testing.assert_array_equal(y, np.where(LABELS[np.isin(LABELS, [0, 9])] == 9, 0, 1))

    def test_both_parts_in_one_npz(self, tmp_path, photographs):
        last = photographs.transpose(0, 2, 3, 1)
        parts = {"x_train": last, "y_train": LABELS[:, None]}
        np.savez(tmp_path / "cifar10.npz", x_test=last[:2], y_test=LABELS[:2, None], **parts)
        X, y = load_cifar10(tmp_path)
        np.testing.assert_allclose(X, photographs / 255.0, rtol=1e-6)
        assert y.shape == (20,)
        assert len(load_cifar10(tmp_path, "test")[0]) == 2

    @pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
    def test_cifar_batches(self, tmp_path, photographs, inside):
        write_batches(tmp_path / inside, photographs)
        X, y = load_cifar10(tmp_path)
        np.testing.assert_allclose(X, photographs / 255.0, rtol=1e-6)
        np.testing.assert_array_equal(y, LABELS)
        assert len(load_cifar10(tmp_path, "test")[0]) == 3

    def test_cifar_batch_of_python_2(self, tmp_path, photographs):
        (tmp_path / "test_batch").write_bytes(python_2_pickle(photographs, LABELS))
        X, y = load_cifar10(tmp_path, "test")
        np.testing.assert_allclose(X, photographs / 255.0, rtol=1e-6)
        np.testing.assert_array_equal(y, LABELS)

    def test_cifar_archive(self, tmp_path, photographs):
        write_batches(tmp_path / "cifar-10-batches-py", photographs)
        archive = tmp_path / "packed" / "cifar-10-python.tar.gz"
        archive.parent.mkdir()
        with tarfile.open(archive, "w:gz") as members:
            members.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
        np.testing.assert_array_equal(load_cifar10(archive.parent)[0], load_cifar10(tmp_path)[0])

    @pytest.mark.parametrize(("subset", "expected"), [("train", 60000), ("test", 10000)])
    def test_openml_has_the_training_images_first(self, monkeypatch, subset, expected):
        labels = np.repeat(["3", "4"], [60000, 10000])

        def fetch_openml(name, **_):
            assert name == "mnist_784"
            return np.zeros((70000, 784), dtype=np.uint8), labels

        monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch_openml)
        X, y = load_mnist(subset=subset, size=1)
        assert X.shape == (expected, 1, 1, 1)
        assert set(y) == ({3} if subset == "train" else {4})


class TestChoices:
    @pytest.mark.parametrize("size", [14, 10, 7, 1, 28])
    def test_shrunk_images_are_averages_of_areas(self, tmp_path, images, size):
        write_idx(tmp_path, images, LABELS)
        whole, small = load_mnist(tmp_path)[0], load_mnist(tmp_path, size=size)[0]
        fine = np.kron(whole, np.ones((size, size)))  # pixels that both grids consist of
        expected = fine.reshape(20, 1, size, 28, size, 28).mean(axis=(3, 5))
        np.testing.assert_allclose(small, expected, atol=1e-6)

    def test_birds_and_ships_as_in_the_convex_papers(self, tmp_path, photographs):
        write_batches(tmp_path, photographs)
        X, y = load_cifar10(tmp_path, classes=("bird", "ship"), size=7, flatten=True)
        assert X.shape == (4, 147)
        np.testing.assert_array_equal(y, [0, 1, 0, 1])
        numbers = load_cifar10(tmp_path, classes=(2, 8), size=7, flatten=True)
        np.testing.assert_array_equal(numbers[0], X)
        np.testing.assert_array_equal(load_cifar10(tmp_path, classes=(8, 2))[1], 1 - y)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"subset": "validation"}, "subset must be one of"),
            ({"classes": (2, 2)}, "classes must be at least two different"),
            ({"classes": (3,)}, "classes must be at least two different"),
            ({"classes": (0, 10)}, "classes must be at least two different"),
            ({"classes": ("cat", "0")}, "classes must be at least two different"),
            ({"size": 0}, "size must be between 1 and 28"),
            ({"size": 29}, "size must be between 1 and 28"),
        ],
        ids=str,
    )
    def test_what_cannot_be_is_refused(self, tmp_path, images, options, message):
        write_idx(tmp_path, images, LABELS)
        with pytest.raises(ValueError, match=message):
            load_mnist(tmp_path, **options)


class Attack:
    """A pickle that would run a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class TestDamage:
    def test_missing_files_are_named_with_their_place(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no file of MNIST \(train\)") as caught:
            load_mnist(tmp_path)
        message = str(caught.value)
        assert "train-images-idx3-ubyte" in message
        assert "mnist_train.npz" in message
        assert str(tmp_path) in message
        with pytest.raises(
            FileNotFoundError, match=r"does not exist.*data_batch_1 to data_batch_5"
        ):
            load_cifar10(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="test_batch"):
            load_cifar10(tmp_path, "test")

    def test_labels_without_images_are_missing_files(self, tmp_path, images):
        write_idx(tmp_path, images, LABELS)
        (tmp_path / "train-images-idx3-ubyte").unlink()
        with pytest.raises(FileNotFoundError, match="train-images"):
            load_mnist(tmp_path)

    def test_a_pickle_runs_nothing(self, tmp_path):
        (tmp_path / "test_batch").write_bytes(pickle.dumps(Attack(f"touch {tmp_path / 'ran'}")))
        with pytest.raises(ValueError, match=r"test_batch: it asks for \w+\.system"):
            load_cifar10(tmp_path, "test")
        assert not (tmp_path / "ran").exists()

    def test_objects_in_npz_are_refused(self, tmp_path):
        objects = np.array([Attack("true")], dtype=object)
        np.savez(tmp_path / "mnist_train.npz", X=objects, y=LABELS)
        with pytest.raises(ValueError, match=r"cannot read .*mnist_train.npz"):
            load_mnist(tmp_path)

    def test_arrays_that_claim_more_than_there_is_are_refused(self, tmp_path):
        huge = {"descr": "|u1", "fortran_order": False, "shape": (2**55,)}
        with zipfile.ZipFile(tmp_path / "mnist_train.npz", "w") as archive:
            with archive.open("X.npy", "w") as stream:
                np.lib.format.write_array_header_1_0(stream, huge)
            with archive.open("y.npy", "w") as stream:
                np.lib.format.write_array(stream, LABELS)
        with pytest.raises(ValueError, match=r"cannot read .*mnist_train.npz"):
            load_mnist(tmp_path)
        asks = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I9\ntS'b'\ntR."
        (tmp_path / "test_batch").write_bytes(asks)
        with pytest.raises(ValueError, match=r"test_batch: it asks for .* of shape .9,."):
            load_cifar10(tmp_path, "test")

    @pytest.mark.parametrize("keep", [2, 10, 1000])
    def test_truncated_files(self, tmp_path, images, keep):
        write_idx(tmp_path, images, LABELS)
        file = tmp_path / "train-images-idx3-ubyte"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"cannot read .*train-images.*Get the file anew"):
            load_mnist(tmp_path)

    def test_damaged_archives(self, tmp_path):
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not packed")
        with pytest.raises(ValueError, match=r"cannot read .*cifar-10-python"):
            load_cifar10(tmp_path)
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0" * 99)[:-9])
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b""))
        with pytest.raises(ValueError, match=r"cannot read .*ubyte.gz"):
            load_mnist(tmp_path)
        (tmp_path / "fashion_mnist_train.npz").write_bytes(b"PK\3\4 no zip")
        (tmp_path / "train-images-idx3-ubyte.gz").unlink()
        with pytest.raises(ValueError, match=r"cannot read .*npz"):
            load_fashion_mnist(tmp_path)

    def test_an_archive_without_a_batch(self, tmp_path):
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as members:
            members.addfile(tarfile.TarInfo("readme.html"), io.BytesIO())
        with pytest.raises(ValueError, match="data_batch_1"):
            load_cifar10(tmp_path)

    @pytest.mark.parametrize(
        ("X", "y", "message"),
        [
            (np.zeros((3, 28, 27)), np.zeros(3), r"holds images \(3, 28, 27\) and 3 labels"),
            (np.zeros((3, 28, 28)), np.zeros(2), r"holds images \(3, 28, 28\) and 2 labels"),
            (np.zeros((0, 28, 28)), np.zeros(0), "holds images"),
            (np.zeros((1, 28, 28)), [10], r"labels other than 0 .. 9, got \[10\]"),
            (np.zeros((1, 28, 28)), [0.5], r"labels other than 0 .. 9, got \[0.5\]"),
            (np.full((1, 28, 28), 255.0), [1], r"uint8, or real numbers in \[0, 1\]"),
            (np.full((1, 28, 28), np.nan), [1], r"uint8, or real numbers in \[0, 1\]"),
            (np.zeros((1, 28, 28)), None, "cannot read .*mnist_train.npz"),
        ],
    )
    def test_other_contents(self, tmp_path, X, y, message):
        np.savez(tmp_path / "mnist_train.npz", **{"X": X} | ({} if y is None else {"y": y}))
        with pytest.raises(ValueError, match=message):
            load_mnist(tmp_path)


class TestAugmented:
    def test_every_image_is_shifted_and_mirrored_as_a_whole(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(300, 2, 6, 5, generator=generator)
        moved = augmented(x, padding=2, generator=generator)
        assert (moved.shape, moved.dtype) == (x.shape, x.dtype)
        padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
        found = set()
        for before, after in zip(padded, moved, strict=True):
            candidates = {
                (i, j, flip): after
                for i in range(5)
                for j in range(5)
                for flip in (False, True)
                if torch.equal(_window(before, i, j, flip), after)
            }
            assert candidates  # exactly a window of the padded image, mirrored or not
            found |= set(candidates)
        assert len(found) == 50  # all of them occur among 300 images

    def test_without_shift_and_mirror_nothing_changes(self):
        x = torch.rand(4, 1, 3, 3)
        assert torch.equal(augmented(x, padding=0, flip=False), x)

    def test_the_seed_decides(self):
        x = torch.rand(9, 1, 8, 8)
        first, again = (augmented(x, generator=torch.Generator().manual_seed(3)) for _ in "12")
        assert torch.equal(first, again)

    def test_of_points_is_refused(self):
        with pytest.raises(ValueError, match=r"images \(n, c, h, w\), got points \(3, 5\)"):
            augmented(torch.zeros(3, 5))


class Recorder(Standard):
    """Standard training that remembers its batches."""

    def __init__(self, ball=None):
        super().__init__(ball)
        self.batches = []

    def step(self, model, optimizer, x, y, rows):
        self.batches.append((x, rows))
        return super().step(model, optimizer, x, y, rows)


class TestAugmentedMethod:
    def test_every_epoch_sees_other_images(self):
        x, y = torch.rand(12, 1, 6, 6), torch.arange(12) % 2
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 1))
        seen = []
        for _ in range(2):
            method = Recorder(LpBall(np.inf, 0.1))
            train(model, Augmented(method, padding=1), x, y, n_epochs=2, batch_size=4)
            images, rows = (torch.cat(parts) for parts in zip(*method.batches, strict=True))
            first, second = rows[:12].argsort(), rows[12:].argsort()
            assert torch.equal(rows[:12][first], torch.arange(12))
            epochs = images[:12][first], images[12:][second]
            assert not torch.equal(*epochs)
            seen.append(torch.cat(epochs))
        assert torch.equal(*seen)  # the seed decides

    def test_it_is_its_method_to_the_loop(self):
        method = Augmented(Free(LpBall(2, 0.5)))
        method.scale = 0.25
        assert (method.method.scale, method.scale) == (0.25, 0.25)
        assert method.ball.radius == 0.5
        method.load_state_dict(method.state_dict())

    def test_stored_perturbations_do_not_fit(self):
        with pytest.raises(ValueError, match="Ssds keeps a perturbation of each image"):
            Augmented(Ssds(LpBall(np.inf, 0.1), 10))


def _window(padded, i, j, flip):
    window = padded[:, i : i + 6, j : j + 5]
    return window.flip(2) if flip else window
