"""The type checker of the tests: jaxtyping and beartype, prepared once a signature."""

import contextlib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import beartype
import jaxtyping
import jaxtyping._typeguard
from beartype.door import is_bearable

jaxtyped = jaxtyping.jaxtyped
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


class Checks(NamedTuple):
    """Those of what a function is called with, and of what it returns."""

    code: types.CodeType  # held, so that no other has its id
    arguments: Callable[..., None]
    returned: Callable[[Any], None]
    letters: contextlib.AbstractContextManager  # where one of a shape is one number


def hook(package):
    """The import hook of jaxtyping, which is slow with what is defined in functions.

    Each call of a function decorates again those that it defines. jaxtyping then reads
    their signatures, makes checks of them, and binds arguments for its messages. For
    each tree it makes a check of its leaves. All that was a tenth of the tests' time.
    """
    jaxtyping.jaxtyped = checked_once
    jaxtyping._typeguard.typechecked = of_leaves
    return jaxtyping.install_import_hook(package, "typechecker.checker")


def of_leaves(function):
    """The check of a leaf: that of the only argument of the function."""
    (kind,) = function.__annotations__.values()

    def check(leaf):
        if not is_bearable(leaf, kind):
            raise TypeError(f"A {type(leaf).__name__} is not of {kind}.")

    return check


def checked_once(*, typechecker):
    """Takes the place of `jaxtyping.jaxtyped`, which the import hook calls."""

    def decorate(function):
        if not isinstance(function, types.FunctionType):
            return jaxtyped(function, typechecker=typechecker)

        @functools.wraps(function)
        def checked(*args, **kwargs):
            __tracebackhide__ = True
            if jaxtyping.config.jaxtyping_disable:
                return function(*args, **kwargs)
            checks = checks_of(function, typechecker)
            with checks.letters:
                checks.arguments(*args, **kwargs)
                value = function(*args, **kwargs)
                checks.returned(value)
            return value

        return checked

    return decorate


def checks_of(function, typechecker):
    """The checks of a signature, made when the first such function is called."""
    found = MADE.get(id(function.__code__))
    if found is None:
        hints = hints_of(function)
        has_shapes = "jaxtyping" in str(hints)
        returned = {"return": hints.pop("return", Any)}
        found = MADE[id(function.__code__)] = Checks(
            function.__code__,
            typechecker(without_body(function, hints)),
            typechecker(named(function, lambda value: value, returned)),
            jaxtyped("context") if has_shapes else contextlib.nullcontext(),
        )
    return found


def hints_of(function):
    """The annotations of a function; any value fits a name that is not defined yet."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:
        hints = function.__annotations__
        return {k: Any if isinstance(v, str) else v for k, v in hints.items()}


def without_body(function, hints):
    """A function with the parameters of another one that does nothing."""
    bare = [
        x.replace(annotation=x.empty, default=x.empty if x.default is x.empty else None)
        for x in inspect.signature(function).parameters.values()
    ]
    names = {}
    exec(f"def made{inspect.Signature(bare)}: pass", names)
    return named(function, names["made"], hints)


def named(function, other, hints):
    """The other function, with the name of this one and with these annotations."""
    other.__annotations__ = hints
    other.__module__, other.__name__ = function.__module__, function.__name__
    other.__qualname__ = function.__qualname__
    return other


def checker(function):
    """Beartype, without checks of some types."""
    return configured(by_hand())(function)


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
def configured(unchecked):
    """Beartype with these types left out, and errors as jaxtyping raises them."""
    overrides = {x: object for kind in unchecked for x in (kind, kind | None)}
    # Later versions of beartype have another name for it.
    frozen = getattr(beartype, "FrozenDict", None) or beartype.BeartypeHintOverrides
    conf = beartype.BeartypeConf(
        hint_overrides=frozen(overrides), violation_type=TypeError
    )
    return beartype.beartype(conf=conf)
