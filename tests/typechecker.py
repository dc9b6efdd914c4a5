"""The type checker of the tests: beartype, making the checks of a signature once."""

import functools
import sys

import beartype

MADE = {}
# Types of arguments that functions check themselves, with messages of their own.
BY_HAND = {
    "_trees.arguments": ("Schedule",),
    "_trees.types": ("Index", "Name", "Scalar"),
    "_trees.leaves": ("Selector",),
    "_reductions.plan": ("Ord",),
    "_clipping.measures": ("LeafAxis",),
    "_methods.common": ("Scope",),
}


def beartype_once(function):
    """Makes checks, or takes those that it made for the same signature.

    jaxtyping has it check functions that it makes from signatures alone. Each call of a
    function that defines another comes with the same ones again.
    """
    key = (
        function.__module__,
        function.__qualname__,
        function.__code__,
        tuple(function.__annotations__.items()),
        function.__defaults__,
        tuple((function.__kwdefaults__ or {}).items()),
    )
    made = checker(by_hand())
    try:
        found = MADE.get(key)
    except TypeError:  # a default that has no hash
        return made(function)
    if found is None:
        found = MADE[key] = made(function)
    return found


def by_hand():
    """Those of these types that are defined so far."""
    modules = [(sys.modules.get(f"optax_clipx.{x}"), BY_HAND[x]) for x in BY_HAND]
    return tuple(
        getattr(module, name)
        for module, names in modules
        for name in names
        if hasattr(module, name)
    )


@functools.cache
def checker(unchecked):
    """Beartype, without checks of some types."""
    overrides = {x: object for kind in unchecked for x in (kind, kind | None)}
    # Later versions of beartype have another name for it.
    frozen = getattr(beartype, "FrozenDict", None) or beartype.BeartypeHintOverrides
    conf = beartype.BeartypeConf(hint_overrides=frozen(overrides))
    return beartype.beartype(conf=conf)
