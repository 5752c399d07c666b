"""Non-convex adversarial training in torch, the comparison for the convex programs."""

try:
    from convexrobust.deep.training import train_two_layer
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "convexrobust.deep needs torch: pip install 'convexrobust[torch]'."
    ) from error

__all__ = ["train_two_layer"]
