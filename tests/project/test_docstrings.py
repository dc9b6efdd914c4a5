"""Every public name has a whole docstring, whose example runs."""

import doctest
import inspect
import types

import jax
import pytest

import optax_clipx as clipx

SECTIONS = ("Raises:", "Example:", "References:")


MODULES = (
    *(clipx.measures, clipx.thresholds, clipx.responses, clipx.functional),
    *(clipx.backward, clipx.units, clipx.qk, clipx.per_example),
    clipx.plotting,
)


def public():
    for module in (clipx, *MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, types.ModuleType) or name.startswith("__"):
                continue
            yield f"{module.__name__}.{name}", value


@pytest.mark.parametrize("module", [clipx, *MODULES, clipx.history])
def test_dir_shows_what_is_public(module):
    shown = {name for name in dir(module) if not name.startswith("__")}
    shown -= {"jaxtyping"}  # of the hook by which tests check types
    assert shown == {name for name in module.__all__ if not name.startswith("__")}


NAMES = dict(public())
WITHOUT = {
    "optax_clipx.measures.Measure",
    "optax_clipx.qk.Layout",
    *(
        f"optax_clipx.{name}"
        for name in (
            "ClipState",
            "QKClipState",
            "SkipState",
            "TrackState",
            "Diagnosis",
            "Finding",
            "Suggestion",
            "Sweep",
        )
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_sections(name):
    value = NAMES[name]
    text = inspect.getdoc(value)
    assert text.splitlines()[0].endswith((".", "`"))
    if name in WITHOUT:
        return
    for section in SECTIONS:
        assert section in text, f"{name} lacks {section}"
    if inspect.isfunction(value):
        assert "Returns:" in text
        for parameter in inspect.signature(value).parameters:
            assert f"{parameter}:" in text, f"{name} says nothing of {parameter}"


@pytest.mark.one_in(10, rest="slow")
@pytest.mark.parametrize("name", NAMES)
def test_example(name):
    value = NAMES[name]
    with jax.numpy_dtype_promotion("standard"):
        tests = doctest.DocTestFinder(recurse=False).find(value, name, globs={})
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        for test in tests:
            runner.run(test)
    assert runner.failures == 0
    assert name in WITHOUT or runner.tries > 1
