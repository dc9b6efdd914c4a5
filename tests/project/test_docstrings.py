"""Every public name has a whole docstring, whose example runs."""

import doctest
import inspect
import types

import jax
import pytest

import optax_clipx as clipx

SECTIONS = ("Raises:", "Example:", "References:")


def public():
    modules = ("backward", "functional", "per_example", "plotting", "units")
    for module in (clipx, *(getattr(clipx, name) for name in modules)):
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", "").startswith("optax_clipx")
            if name.startswith("_") or isinstance(value, types.ModuleType) or not ours:
                continue
            if module is not clipx and value.__module__ != module.__name__:
                continue
            yield f"{module.__name__}.{name}", value


NAMES = dict(public())
WITHOUT = {
    f"optax_clipx.{name}"
    for name in (
        "Measure",
        "ClipState",
        "SkipState",
        "TrackState",
        "Suggestion",
        "Sweep",
    )
}


@pytest.mark.sampled
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


@pytest.mark.complete
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
