"""A pytest plugin: optax's clipping names are ours before its tests import them."""

import functools
import importlib

import optax
import optax.contrib
import optax.transforms

import optax_clipx

NAMES = (
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "adaptive_grad_clip",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
)
calls = dict.fromkeys(NAMES, 0)


def counted(name):
    ours = getattr(optax_clipx, name)

    @functools.wraps(ours)
    def call(*args, **kwargs):
        calls[name] += 1
        return ours(*args, **kwargs)

    return call


home = importlib.import_module("optax.transforms._clipping")
for name in NAMES:
    theirs, ours = getattr(home, name), counted(name)
    for module in (home, optax, optax.transforms, optax.contrib):
        if getattr(module, name, None) is theirs:
            setattr(module, name, ours)


def pytest_terminal_summary(terminalreporter):
    """Says how often each of ours was called."""
    terminalreporter.write_line(f"ours called: {calls}")
