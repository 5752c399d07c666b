"""Non-convex adversarial training in torch, the comparison for the convex programs, and attacks."""

try:
    from convexrobust.deep import attacks, methods, networks
    from convexrobust.deep.attacks import as_two_logit
    from convexrobust.deep.augmentation import Augmented, augmented
    from convexrobust.deep.catalogue import (
        METHODS,
        Task,
        create_method,
        create_network,
        load_task,
    )
    from convexrobust.deep.data import load_cifar10, load_fashion_mnist, load_mnist
    from convexrobust.deep.estimator import AdversarialClassifier, AdversarialRegressor
    from convexrobust.deep.training import History, train, train_two_layer
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "convexrobust.deep needs torch: pip install 'convexrobust[torch]'."
    ) from error

__all__ = [
    "METHODS",
    "AdversarialClassifier",
    "AdversarialRegressor",
    "Augmented",
    "History",
    "Task",
    "as_two_logit",
    "attacks",
    "augmented",
    "create_method",
    "create_network",
    "load_cifar10",
    "load_fashion_mnist",
    "load_mnist",
    "load_task",
    "methods",
    "networks",
    "train",
    "train_two_layer",
]
