"""The type checker of the tests: beartype, making the checks of a signature once."""

import beartype

MADE = {}


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
    try:
        found = MADE.get(key)
    except TypeError:  # a default that has no hash
        return beartype.beartype(function)
    if found is None:
        found = MADE[key] = beartype.beartype(function)
    return found
