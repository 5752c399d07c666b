"""Networks: their sizes as published, their outputs by hand, and where they normalise."""
# ruff: noqa: E402 - without torch the file is skipped before it imports what needs it

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convexrobust.deep import attacks
from convexrobust.deep.methods.certified import ibp_margins
from convexrobust.deep.networks import (
    MLP,
    Normalize,
    Normalized,
    PreActResNet,
    SmallCNN,
    preact_resnet18,
    two_layer,
    wide_resnet,
)
from convexrobust.perturbations import LpBall


def n_weights(model):
    return sum(weight.numel() for weight in model.parameters())


def test_two_layer_by_hand():
    model = two_layer(3, 5, 2).double()
    assert [type(layer).__name__ for layer in model] == ["Linear", "ReLU", "Linear"]
    first, _, last = model
    X = np.random.default_rng(0).normal(size=(4, 3))
    hidden = np.maximum(X @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0.0)
    expected = hidden @ last.weight.detach().numpy().T + last.bias.detach().numpy()
    assert model(torch.as_tensor(X)).detach().numpy() == pytest.approx(expected)


def test_mlp_has_the_layers_asked_for():
    model = MLP(7, [6, 5, 4], 3)
    shapes = [tuple(weight.shape) for weight in model.parameters() if weight.ndim == 2]
    assert shapes == [(6, 7), (5, 6), (4, 5), (3, 4)]
    assert isinstance(model[-1], torch.nn.Linear)


def test_small_cnn_is_that_of_the_paper():
    model = SmallCNN()
    # 16 kernels of 4 x 4, 32 of 16 x 4 x 4, 1568 inputs to 100 neurons, 10 outputs; with biases.
    assert n_weights(model) == 16 * 17 + 32 * (16 * 16 + 1) + 100 * (32 * 49 + 1) + 10 * 101
    x, y = torch.rand(2, 1, 28, 28), torch.tensor([3, 4])
    assert model(x).shape == (2, 10)
    assert (ibp_margins(model, x, y, LpBall(np.inf, 0.5)) < 0.0).all()  # and has boxes
    assert SmallCNN(3, n_channels=2, size=8)(torch.rand(2, 2, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (preact_resnet18, 11.17),
        (lambda: wide_resnet(28, 10), 36.48),  # 36.5 M in the paper
        (lambda: wide_resnet(34, 10), 46.16),
        (lambda: wide_resnet(40, 4), 8.95),  # 8.9 M
    ],
)
def test_residual_networks_have_the_published_size(build, millions):
    with torch.device("meta"):
        assert n_weights(build()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_wide_resnet_has_the_depth_it_is_called_by():
    for depth in (10, 16, 28):
        with torch.device("meta"):
            modules = list(wide_resnet(depth, 1).modules())
        kernels = [m for m in modules if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
        # Three projections of 1 x 1 in place of the one of 16 channels: counted in the depth.
        assert len(kernels) + 1 + 2 == depth


@pytest.mark.parametrize("n_outputs", [1, 4])
def test_residual_networks_train_on_images(n_outputs):
    torch.manual_seed(0)
    model = PreActResNet([4, 8], 2, n_outputs, n_channels=2)
    x = torch.rand(3, 2, 8, 8)
    outputs = model(x)
    assert outputs.shape == (3, n_outputs)
    outputs.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0.0 for weight in model.parameters())
    model.eval()  # then rows do not depend on each other
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-6)


def test_a_block_adds_to_its_input():
    model = PreActResNet([4], 1)
    block = model[1]
    with torch.no_grad():
        block.conv2.weight.zero_()
    x = torch.rand(2, 4, 6, 6)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4, 4)])
def test_normalisation_is_along_the_second_axis(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    mean, std = [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]
    normalized = Normalize(mean, std)(x)
    for c in range(3):
        assert torch.allclose(normalized[:, c], (x[:, c] - mean[c]) / std[c])
    assert torch.allclose(Normalize(0.5, 2.0)(x), (x - 0.5) / 2.0)


def test_attacks_on_a_normalised_model_have_the_units_of_the_data():
    torch.manual_seed(0)
    model = Normalized(two_layer(3, 6, 2), [10.0, 0.0, 0.0], [5.0, 0.1, 1.0]).double()
    x = torch.randn(8, 3).double() * torch.tensor([5.0, 0.1, 1.0]) + torch.tensor([10.0, 0, 0])
    ball = LpBall(np.inf, np.array([1.0, 0.02, 0.2]))
    delta = attacks.fgsm(model, x, model(x).argmax(dim=1), ball) - x
    assert delta.abs().amax(dim=0).numpy() == pytest.approx(ball.epsilon)
    assert set(model.state_dict()) >= {"0.mean", "0.std"}  # a checkpoint has them
    assert len(list(model.parameters())) == 4  # and no optimizer moves them


@pytest.mark.parametrize(
    ("message", "build"),
    [
        ("depth must be 6 n", lambda: wide_resnet(30)),
        ("size must be a multiple of 4", lambda: SmallCNN(size=10)),
        ("std must be positive", lambda: Normalize(0.0, [1.0, 0.0])),
        ("mean must be a finite", lambda: Normalize(np.nan, 1.0)),
    ],
)
def test_misuse_is_an_error(message, build):
    with pytest.raises(ValueError, match=message):
        build()
