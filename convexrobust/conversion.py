"""Two-layer ReLU networks out of models that other libraries trained.

Nothing is imported for it: the models are recognised by the names of their classes and attributes.
"""

from __future__ import annotations

import numpy as np

from convexrobust.network import TwoLayerReLU

_SCALERS = ("StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler", "PCA")


def as_network(model) -> TwoLayerReLU:
    """Return the two-layer ReLU network that a model computes, in units of the model's input.

    Parameters
    ----------
    model : object
        * a `TwoLayerReLU`;
        * a fitted estimator with a ``network_``, as those of this package;
        * a torch ``Sequential(Linear, ReLU, Linear)``, perhaps with ``Flatten`` first;
        * a fitted ``MLPClassifier`` or ``MLPRegressor`` of scikit-learn with one hidden layer of
          ReLUs; its outputs are those before the logistic or softmax function;
        * a fitted ``Pipeline`` of ``StandardScaler``, ``MinMaxScaler``, ``MaxAbsScaler``,
          ``RobustScaler`` or ``PCA`` and one of these: the scaling joins the hidden layer.

    Returns
    -------
    TwoLayerReLU

    Raises
    ------
    ValueError
        If the model is another one or not fitted, or its weights are not finite.

    Notes
    -----
    It has the weights of the model in double precision, and what is proven of it is proven of these
    weights in exact arithmetic. A model that computes in single precision, or scales its input in
    a step of its own, rounds differently: by about 1e-7 or 1e-16 of its terms.
    """
    if isinstance(model, TwoLayerReLU):
        return model
    if hasattr(model, "network_"):
        return model.network_
    if hasattr(model, "steps"):
        return _of_pipeline(model)
    if hasattr(model, "coefs_"):
        return _of_perceptron(model)
    if hasattr(model, "named_children"):
        return _of_torch(model)
    raise _refusal(model, "it is not a network, or not fitted")


def network_labels(model, y) -> np.ndarray:
    """Return labels as the margins of the model's network count them.

    Labels of ``model.classes_`` become -1 / +1 for two classes, else class numbers; without
    ``classes_`` they are returned as they are.

    Raises
    ------
    ValueError
        If a label is not among the classes.
    """
    y = np.asarray(y)
    classes = getattr(model, "classes_", None)
    if classes is None:
        return y
    unknown = ~np.isin(y, classes)
    if unknown.any():
        raise ValueError(
            f"y holds labels that are not among the classes {classes}: {np.unique(y[unknown])[:5]}."
        )
    labels = np.searchsorted(classes, y)
    return 2 * labels - 1 if len(classes) == 2 else labels


def _of_perceptron(model):
    if len(model.coefs_) != 2 or model.activation != "relu":
        raise _refusal(
            model, f"it has {len(model.coefs_) - 1} hidden layers of {model.activation!r} units"
        )
    if model.out_activation_ == "logistic" and model.n_outputs_ > 1:
        raise _refusal(model, "it predicts several labels at once")
    if model.out_activation_ not in ("identity", "logistic", "softmax"):
        raise _refusal(model, f"its outputs go through {model.out_activation_!r}")
    (first, last), (bias, offset) = model.coefs_, model.intercepts_
    return TwoLayerReLU(np.vstack([first, bias]), last, offset=offset)


def _of_torch(model):
    torch_classes = (c for c in type(model).__mro__ if c.__module__.startswith("torch."))
    base = next(torch_classes)  # a subclass of Sequential is one if it computes the same
    if base.__name__ != "Sequential" or type(model).forward is not base.forward:
        raise _refusal(model, "it is a module with a forward method of its own")
    layers = list(model)  # with layers that are used twice
    names = [type(layer).__name__ for layer in layers]
    if names[:1] == ["Flatten"] and layers[0].start_dim == 1:
        layers, names = layers[1:], names[1:]
    if names != ["Linear", "ReLU", "Linear"]:
        raise _refusal(model, f"its layers are {names}")
    if any(m._forward_hooks or m._forward_pre_hooks for m in (model, *model)):
        raise _refusal(model, "hooks change what its layers compute")
    first, _, last = layers
    hidden, output = _numbers(first.weight).T, _numbers(last.weight).T
    intercept = first.bias is not None
    if intercept:
        hidden = np.vstack([hidden, _numbers(first.bias)])
    offset = None if last.bias is None else _numbers(last.bias)
    return TwoLayerReLU(hidden, output, intercept, offset)


def _numbers(parameter):
    return parameter.detach().cpu().double().numpy()


def _of_pipeline(model):
    network = as_network(model.steps[-1][1])
    for _, scaler in reversed(model.steps[:-1]):
        if scaler is None or scaler == "passthrough":
            continue
        A, b = _affine(scaler)
        d = network.n_features
        if A.shape[1] != d:
            raise _refusal(scaler, f"it returns {A.shape[1]} features and the next step takes {d}")
        bias = network.hidden[d] if network.intercept else 0.0
        hidden = np.vstack([A @ network.hidden[:d], b @ network.hidden[:d] + bias])
        network = TwoLayerReLU(hidden, network.output, offset=network.offset)
    return network


def _affine(scaler):
    """Return A (d, d') and b (d',) of a scaler that computes x @ A + b."""
    name = type(scaler).__name__
    if name not in _SCALERS or getattr(scaler, "clip", False):
        raise _refusal(
            scaler, f"a step of the pipeline must be one of {_SCALERS}, without clipping"
        )
    if not hasattr(scaler, "n_features_in_"):
        raise _refusal(scaler, "it is not fitted")
    if name == "PCA":
        if scaler.whiten:
            raise _refusal(scaler, "PCA with whiten=True is not read")
        return scaler.components_.T, -scaler.mean_ @ scaler.components_.T
    if name == "MinMaxScaler":
        return np.diag(scaler.scale_), scaler.min_
    scale = getattr(scaler, "scale_", None)
    center = getattr(scaler, "mean_" if name == "StandardScaler" else "center_", None)
    if name == "StandardScaler" and not scaler.with_mean:
        center = None
    A = np.diag(1.0 / (np.ones(scaler.n_features_in_) if scale is None else scale))
    return A, np.zeros(len(A)) if center is None else -center @ A


def _refusal(model, why) -> ValueError:
    return ValueError(
        f"{type(model).__name__} cannot be read as a two-layer ReLU network: {why}. Give a "
        "TwoLayerReLU, a fitted estimator of convexrobust, a torch Sequential(Linear, ReLU, "
        "Linear), scikit-learn's MLPClassifier or MLPRegressor with one hidden layer and "
        "activation='relu', or a Pipeline of scalers and one of these."
    )
