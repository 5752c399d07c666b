"""Which attacks an evaluation runs: by name with options, or given; checked before any work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np

from convexrobust.attacks.region import Region

ATTACKS = ("fgsm", "pgd", "apgd", "square", "autoattack")
SUITE = {
    "fgsm": {},
    "pgd": {"n_steps": 50, "n_restarts": 5},
    "apgd": {"n_steps": 100, "n_restarts": 2},
    "square": {"n_queries": 1000},
}
_OTHER_MEASURES = ("clean", "worst attack", "certified", "exact")  # of the table
_CALL = "attack(loss_and_gradient, X, ball, xp=xp)"


@dataclass(frozen=True)
class Attack:
    """One entry of a suite.

    Attributes
    ----------
    name : str
        Of its measure in the table.
    method : str or callable
        One of `ATTACKS`, or a function called as ``attack(loss_and_gradient, X, ball, xp=xp)``.
    options : dict
        Of a method by name.
    """

    name: str
    method: str | Callable
    options: dict = field(default_factory=dict)

    def points(self, loss_and_gradient, X, ball, xp):
        """Return the points (n, d) of a given function, checked to lie in the ball."""
        assert callable(self.method)
        region = Region(xp, X, ball)
        points = self.method(loss_and_gradient, X + 0.0, ball, xp=xp)  # a copy, to write on
        if not isinstance(points, type(X)) or tuple(points.shape) != tuple(X.shape):
            got = f"{type(points).__name__} {tuple(getattr(points, 'shape', ()))}"
            raise ValueError(
                f"suite[{self.name!r}] must return points like X, {type(X).__name__} "
                f"{tuple(X.shape)}; got {got}."
            )
        try:
            return region.checked(points)
        except RuntimeError as error:
            raise RuntimeError(f"suite[{self.name!r}]: {error}") from error


def checked_suite(suite) -> list[Attack]:
    """Return the attacks of a suite, or say which entry is wrong and what is legal."""
    suite = SUITE if suite is None else suite
    if not isinstance(suite, Mapping):
        raise ValueError(
            "suite must be a dict of names to options or callables, e.g. {'pgd': {'n_steps': 100}};"
            f" got {suite!r}."
        )
    return [_checked_entry(name, entry) for name, entry in suite.items()]


def _checked_entry(name, entry) -> Attack:
    if not isinstance(name, str) or name in _OTHER_MEASURES:
        raise ValueError(
            f"suite must have strings as names, and none of {_OTHER_MEASURES}, which the table has "
            f"besides; got {name!r}."
        )
    if callable(entry):
        if not _takes_call(entry):
            raise ValueError(f"suite[{name!r}] must be callable as {_CALL}; got {entry!r}.")
        return Attack(name, entry)
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"suite[{name!r}] must be a dict of options, or a function called as {_CALL}; "
            f"got {entry!r}."
        )
    options = dict(entry)
    method = options.pop("attack", name)
    if not isinstance(method, str) or method not in ATTACKS:
        raise ValueError(
            f"suite[{name!r}] has no known attack: 'attack' must be one of {ATTACKS}, "
            f"got {method!r}."
        )
    if name in ATTACKS and method != name:
        raise ValueError(
            f"suite[{name!r}] must be {name!r}, but its 'attack' is {method!r}; give it a name of "
            "its own."
        )
    return Attack(name, method, options)


def _takes_call(function) -> bool:
    try:
        inspect.signature(function).bind(None, None, None, xp=None)
    except TypeError:
        return False
    except ValueError:  # a function of C, which does not tell
        return True
    return True


def check_options(attack, function, model):
    """Raise ValueError unless a function takes the options of an attack for a model."""
    keywords = inspect.signature(function).parameters.values()
    legal = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY and p.name != "xp"}
    for option, value in attack.options.items():
        if option not in legal:
            raise ValueError(
                f"suite[{attack.name!r}] has no option {option!r} for the model {model!r}: "
                f"{attack.method!r} takes {sorted(legal)}."
            )
        wanted, is_legal = _WANTED[option]
        if not (value is legal[option] or is_legal(value)):
            raise ValueError(
                f"suite[{attack.name!r}] must have {wanted} as {option!r}, got {value!r}."
            )


def _is_count(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_shape(value) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(_is_count, value))


def is_seed(value) -> bool:
    """Tell whether attacks take a value as ``random_state``."""
    if isinstance(value, Integral):
        return int(value) >= 0
    return value is None or isinstance(value, np.random.Generator)


_COUNT = ("a whole number >= 1", _is_count)
_NUMBER = ("a number", lambda value: isinstance(value, Real))
# What the options of all attacks are. Which of them an attack has its signature says, and the
# attack itself which numbers and names are legal.
_WANTED: dict[str, tuple[str, Callable]] = {
    "n_steps": _COUNT,
    "n_restarts": _COUNT,
    "n_queries": _COUNT,
    "batch_size": _COUNT,
    "step": _NUMBER,
    "momentum": _NUMBER,
    "share": _NUMBER,
    "shape": ("a tuple (c, h, w) of whole numbers", _is_shape),
    "random_state": ("None, a whole number >= 0 or a numpy.random.Generator", is_seed),
    "loss": ("a name", lambda value: isinstance(value, str)),
    "version": ("a name", lambda value: isinstance(value, str)),
    "mode": ("'eval', 'train' or None", lambda value: str(value) in ("eval", "train", "None")),
    "targets": ("a number of classes", _is_count),
}
