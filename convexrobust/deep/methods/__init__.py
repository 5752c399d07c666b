"""Methods of adversarial training, each fit for `convexrobust.deep.training.train`."""

from convexrobust.deep.methods.attacked import Attacked
from convexrobust.deep.methods.awp import WeightPerturbed
from convexrobust.deep.methods.base import LossMethod, Method
from convexrobust.deep.methods.certified import Certified
from convexrobust.deep.methods.dale import Dale
from convexrobust.deep.methods.fast_bat import FastBat
from convexrobust.deep.methods.free import Free
from convexrobust.deep.methods.gradalign import GradAlign
from convexrobust.deep.methods.mart import Mart
from convexrobust.deep.methods.pairing import Pairing
from convexrobust.deep.methods.ssds import Ssds
from convexrobust.deep.methods.standard import Standard
from convexrobust.deep.methods.trades import Trades

__all__ = [
    "Attacked",
    "Certified",
    "Dale",
    "FastBat",
    "Free",
    "GradAlign",
    "LossMethod",
    "Mart",
    "Method",
    "Pairing",
    "Ssds",
    "Standard",
    "Trades",
    "WeightPerturbed",
]
