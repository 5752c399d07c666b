import numpy as np
import pytest

from convexrobust.perturbations import LpBall

torch = pytest.importorskip("torch")
autoattack = pytest.importorskip("convexrobust.deep.autoattack").autoattack


def images(n=12, classes=5, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, classes))
    x = torch.rand(n, 1, 6, 6)
    return model, x, model(x).argmax(dim=1)


@pytest.mark.parametrize("p", [2, np.inf])
def test_its_points_are_inside_and_break_what_can_be_broken(p):
    pytest.importorskip("pyautoattack")
    model, x, y = images()
    ball = LpBall(p, 0.3, (0.0, 1.0))
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    points = autoattack(model, x, y, ball, batch_size=5)
    assert torch.equal(torch.rand(2), expected)
    delta = (points - x).flatten(1).numpy()
    assert np.linalg.norm(delta, p, axis=1).max() <= 0.3 * (1.0 + 1e-5)
    assert points.min() >= 0.0
    assert points.max() <= 1.0
    assert (model(points).argmax(dim=1) != y).float().mean() > 0.5
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.rand(12, 36)}, "images"),
        ({"x": torch.rand(12, 1, 4, 4)}, "h >= 5"),
        ({"x": torch.rand(12, 1, 6, 6) - 0.5}, r"\[0, 1\]"),
        ({"version": "fast"}, "version"),
        ({"y": torch.full((12,), 5)}, r"0 \.\. 4"),
        ({"ball": LpBall(np.inf, 0.1, (-1.0, 1.0))}, "bounds"),
        ({"ball": LpBall(np.inf, np.full(36, 0.1))}, "one epsilon"),
        ({"model": images(classes=3)[0]}, "at least 4"),
    ],
)
def test_what_it_cannot_do_is_refused(change, message):
    model, x, y = images()
    arguments = {"model": model, "x": x, "y": y, "ball": LpBall(np.inf, 0.1)} | change
    with pytest.raises(ValueError, match=message):
        autoattack(**arguments)


def test_no_images():
    model, x, y = images()
    assert autoattack(model, x[:0], y[:0], LpBall(np.inf, 0.1)).shape == (0, 1, 6, 6)
