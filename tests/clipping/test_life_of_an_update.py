"""What is static is settled once for each update that is traced."""

import collections
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import optax_clipx as clipx
from optax_clipx._devices import mesh

PACKAGE = Path(clipx.__file__).parent
FOLDERS = ("_reductions", "_thresholds", "_clipping", "_methods")
PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
METHODS = {
    "tree": lambda: clipx.clip_by_global_norm(1.0),
    "leaf": lambda: clipx.clip_by_leaf_norm(1.0),
    "group": lambda: clipx.clip_by_group_norm(
        {"a": 1.0, "b": 1.0}, {"w": "a", "b": "b"}
    ),
    "unit": lambda: clipx.adaptive_grad_clip(0.1),
    "zclip": lambda: clipx.zclip(),
    "clip": lambda: clipx.clip(1.0),
    "second_moment": lambda: clipx.clip_by_second_moment(2.0),
    "spectral": lambda: clipx.clip_by_spectral_norm(1.0),
    "stable_adam": lambda: clipx.scale_by_stable_adam(),
    "stabilize": lambda: clipx.stabilize_norm(),
    "skip": lambda: clipx.skip_spikes(clipx.zclip()),
    "track": lambda: clipx.track_norms(clipx.zclip()),
}


@pytest.mark.parametrize("method", METHODS)
def test_where_leaves_lie_is_found_once_for_each_clipper(monkeypatch, method):
    calls = []
    found = mesh.placements
    for name, module in list(sys.modules.items()):
        if name.startswith("optax_clipx.") and hasattr(module, "placements"):
            monkeypatch.setattr(
                module, "placements", lambda *args: calls.append(1) or found(*args)
            )
    tx = METHODS[method]()
    state = tx.init(PARAMS)
    calls.clear()
    jax.jit(tx.update).trace(PARAMS, state, PARAMS)
    assert len(calls) == 1


def test_a_trace_enters_each_file_at_most_twice():
    # `_trees` and `_devices` are called as JAX is, from everywhere.
    def of_package(frame):
        name = frame.f_code.co_filename.removeprefix(str(PACKAGE))
        return name.endswith(".py") and name.split("/")[1] in FOLDERS and name

    def enters(frame, event, arg):
        name = event == "call" and of_package(frame)
        if name:
            back = frame.f_back
            while back and not of_package(back):
                back = back.f_back
            if not back or of_package(back) != name:
                entered[name] += 1

    tx = METHODS["tree"]()
    state = tx.init(PARAMS)
    jax.jit(tx.update).trace(PARAMS, state, PARAMS)  # imports, and what is cached
    entered = collections.Counter()
    again = jax.jit(lambda *given: tx.update(*given))
    sys.setprofile(enters)
    try:
        again.trace(PARAMS, state, PARAMS)
    finally:
        sys.setprofile(None)
    assert entered["/_clipping/clip_by.py"] == 1
    assert max(entered.values()) <= 2, entered.most_common(3)
