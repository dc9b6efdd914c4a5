"""What `help()` shows: shared arguments in full, and types that say something."""

import inspect
import subprocess
import sys
import typing
from types import FunctionType

import pytest

import optax_clipx as clipx
from optax_clipx._trees.docstrings import complete_package

MODULES = (clipx, clipx.functional, clipx.backward, clipx.qk, clipx.per_example)
MODULES += (clipx.plotting,)
FUNCTIONS = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if isinstance(getattr(module, name), FunctionType)
}


@pytest.mark.one_in(10, rest="slow")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_shared_argument_is_only_a_reference(name):
    text = inspect.getdoc(FUNCTIONS[name])
    for argument in ("nonfinite", "axis_name", "specs", "metrics", "scope", "theme"):
        assert f"{argument}: as " not in text


@pytest.mark.parametrize("function", [clipx.zclip, clipx.functional.clip_by_leaf_norm])
def test_the_policies_are_described(function):
    assert '``"zero"`` makes the updates zero' in " ".join(function.__doc__.split())


def test_what_follows_a_reference_is_kept():
    text = " ".join(clipx.clip_by_spectral_norm.__doc__.split())
    want = "prefix of ``PartitionSpec``; needed in ``shard_map`` where a matrix is cut."
    assert want in text


LIMITS = {
    "clip": "max_delta",
    "clip_by_value": "min_value",
    "clip_by_leaf_norm": "max_norm",
    "clip_by_block_rms": "threshold",
    "clip_by_global_norm": "max_norm",
    "clip_by_group_norm": "max_norms",
    "adaptive_grad_clip": "clipping",
    "clip_by_spectral_norm": "max_norm",
}


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("name", LIMITS)
def test_limits_have_types(name):
    parameters = inspect.signature(getattr(clipx, name)).parameters
    for argument in (LIMITS[name], "axis_name", "specs"):
        assert parameters[argument].annotation is not typing.Any


def first(a):
    """First.

    Args:
        a: a number.
    """


def second(a, b):
    """Second.

    Args:
        a: as in :func:`first`, above 0.
        b: as in :func:`third`.
    """


def test_references_are_replaced_and_unknown_ones_stay():
    complete_package({"__all__": ["first", "second"], "first": first, "second": second})
    assert "    a: a number, above 0.\n    b: as in :func:`third`." in second.__doc__


@pytest.mark.slow
def test_without_docstrings():
    code = "import optax_clipx as c; raise SystemExit(c.clip.__doc__ is not None)"
    assert subprocess.run([sys.executable, "-OO", "-c", code]).returncode == 0
