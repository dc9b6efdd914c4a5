"""Docstrings that say in full what they refer to.

What many functions take is described once. Other docstrings say `name: as in
:func:`clip_by`.`, and `help()` and the site show the text there in its place.
"""

import functools
import inspect
import re
import textwrap
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any

_REFERENCE = re.compile(r"as (?:in|for) :func:`~?(optax_clipx\.)?([\w.]+)`")
_WIDTH = 88


def complete_package(names: Mapping[str, Any]) -> None:
    """Completes the public functions of a package, given its globals.

    Without docstrings (`python -OO`) nothing happens.
    """
    modules = {
        f"{name}.": [getattr(module, x) for x in module.__all__]
        for name, module in names.items()
        if name in names["__all__"] and isinstance(module, ModuleType)
    }
    modules[""] = [names[name] for name in names["__all__"]]
    functions = {
        prefix + value.__name__: value
        for prefix, values in modules.items()
        for value in values
        if isinstance(value, FunctionType)
    }
    for name, function in functions.items():
        _complete(function, name.rpartition(".")[0], functions)


def _complete(
    function: FunctionType, module: str, functions: Mapping[str, FunctionType]
) -> None:
    """Replaces references between arguments by what they refer to."""
    if not _REFERENCE.search(function.__doc__ or ""):
        return
    text = inspect.cleandoc(function.__doc__ or "")
    for name, described in _arguments(text).items():
        full = _resolved(name, described, module, functions)
        if full != described:
            text = _with_argument(text, name, full)
    function.__doc__ = text


def _resolved(
    name: str, text: str, module: str, functions: Mapping[str, FunctionType]
) -> str:
    """The text of an argument; where it begins with a reference, what that says."""
    reference = _REFERENCE.match(text)
    if not reference:
        return text
    whole, target = reference.groups()
    own = f"{module}.{target}"
    found = own if own in functions and not whole else target
    source = functions.get(found)
    known = _arguments(inspect.cleandoc(getattr(source, "__doc__", None) or ""))
    if name not in known:
        return text
    there = found.rpartition(".")[0]
    full = _resolved(name, known[name], there, functions)
    return full.removesuffix(".") + text[reference.end() :]


@functools.cache
def _arguments(text: str) -> dict[str, str]:
    """What the section of arguments says of each, on one line."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    entries = re.split(r"^    (?=\w)", section.group(1) if section else "", flags=re.M)
    pairs = (entry.partition(":") for entry in entries if ":" in entry)
    return {name: " ".join(value.split()) for name, _, value in pairs}


def _with_argument(text: str, name: str, value: str) -> str:
    lines = textwrap.wrap(
        f"{name}: {value}",
        _WIDTH,
        initial_indent=" " * 4,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
    entry = "\n".join(lines) + "\n"
    pattern = rf"^    {name}:.*\n(?:        .*\n)*"
    return re.sub(pattern, lambda _: entry, text + "\n", count=1, flags=re.M)[:-1]
