"""What is static is settled once for each update that is traced."""

import sys

import jax
import jax.numpy as jnp
import pytest

import optax_clipx as clipx
from optax_clipx._devices import mesh

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
