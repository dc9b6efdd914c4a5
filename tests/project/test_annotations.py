"""How many arguments of the package's functions say what they are."""

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "optax_clipx"
LARGEST_SHARE = 0.10


def arguments(source):
    """The arguments of all functions of a file, apart from `self` and `cls`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            stars = [x for x in (given.vararg, given.kwarg) if x is not None]
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *stars]
            yield from (x for x in every if x.arg not in ("self", "cls"))


def says_nothing(argument):
    """Whether an argument has no annotation, or one with `Any` in it."""
    if argument.annotation is None:
        return True
    parts = ast.walk(argument.annotation)
    return any("Any" in (getattr(x, "id", ""), getattr(x, "attr", "")) for x in parts)


def test_what_counts_as_saying_nothing():
    source = "def f(self, a, b: Any, c: list[typing.Any], d: int, *e: Any): ..."
    found = {x.arg: says_nothing(x) for x in arguments(source)}
    assert found == {"a": True, "b": True, "c": True, "d": False, "e": True}


def test_few_arguments_are_any():
    all_of, nothing_of = Counter(), Counter()
    for path in PACKAGE.rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        for argument in arguments(path.read_text()):
            all_of[name] += 1
            nothing_of[name] += says_nothing(argument)
    share = nothing_of.total() / all_of.total()
    worst = [f"{name}: {n} of {all_of[name]}" for name, n in nothing_of.most_common(10)]
    assert all_of.total() > 2000
    assert share <= LARGEST_SHARE, f"{share:.1%}; most in " + ", ".join(worst)
