"""Non-convex adversarial training in torch, the comparison for the convex programs, and attacks."""

try:
    from convexrobust.deep import attacks
    from convexrobust.deep.attacks import as_two_logit
    from convexrobust.deep.training import train_two_layer
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "convexrobust.deep needs torch: pip install 'convexrobust[torch]'."
    ) from error

__all__ = ["as_two_logit", "attacks", "train_two_layer"]
