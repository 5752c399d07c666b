"""What the exchange method returns: its best network, the bracket, and each round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from convexrobust.network import TwoLayerReLU
from convexrobust.program import ConvexProgram, Solution


class Round(NamedTuple):
    """One round of `Exchange`.

    Attributes
    ----------
    n_iter : int
        Rounds so far.
    seconds : float
        Wall time since the start.
    objective : float
        Upper bound on the worst-case objective of this round's network.
    lower_bound : float
        This round's lower bound, of the scope of the solution.
    attacked_objective : float
        The network's objective at the worst points found.
    restricted_objective : float
        The optimum on the copies that the round began with.
    n_copies, n_patterns : int
        Size of the restricted program.
    """

    n_iter: int
    seconds: float
    objective: float
    lower_bound: float
    attacked_objective: float
    restricted_objective: float
    n_copies: int
    n_patterns: int


@dataclass(frozen=True, eq=False)
class ExchangeSolution(Solution):
    """What `Exchange` returns: a `Solution`, and what is special to exchange.

    ``objective`` is an upper bound on the worst-case objective of ``network``. V and W have a
    column for each of its neurons.

    Attributes
    ----------
    network : TwoLayerReLU
        The best network.
    attacked_objective : float
        Its objective at the worst points found: at most ``objective``, and equal to it (up to the
        tolerance of the search) with ``inner="exact"``.
    restricted : ConvexProgram
        The last nominal program, with the copies and their patterns.
    rounds : tuple of Round
        The history, with what is special to exchange.
    """

    network: TwoLayerReLU = field(kw_only=True)
    attacked_objective: float = field(kw_only=True)
    restricted: ConvexProgram = field(kw_only=True)
    rounds: tuple[Round, ...] = field(kw_only=True)
