"""One of several processes that clip the same updates; run by test_processes.py."""

import sys
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

SPECS = {
    "a": P("x", "y"),
    "b": P("x", None),
    "c": P(None, "y"),
    "d": P(("x", "y"), None),
    "e": P(),
}
METHODS = {
    "tree": partial(clipx.clip_by_global_norm, 1.0),
    "tree_inf": partial(clipx.clip_by_global_norm, 1.0, ord=np.inf),
    "tree_3": partial(clipx.clip_by_global_norm, 1.0, ord=3),
    "leaf": partial(clipx.clip_by_leaf_norm, 1.0),
    "group": partial(
        clipx.clip_by_group_norm, {"a": 1.0, "b": 2.0}, lambda p, x: min(p[0], "b")
    ),
    "adaptive": partial(clipx.adaptive_grad_clip, 0.1),
    "zero": partial(clipx.clip_by_global_norm, 1.0, nonfinite="zero"),
    "zero_units": partial(clipx.adaptive_grad_clip, 0.1, nonfinite="zero"),
    "sanitize": partial(clipx.clip_by_global_norm, 1.0, nonfinite="sanitize"),
    "drop": partial(
        clipx.clip_by, clipx.measures.tree_norm(), 200.0, clipx.responses.drop
    ),
}


def every_method(values, specs=None):
    """What each method makes of the updates."""
    return {
        name: make(specs=specs).update(values, None, values)
        for name, make in METHODS.items()
    }


def cases():
    """Updates whose one bad entry lies in the last shard of `a`."""
    rng = np.random.default_rng(0)
    for name, value in (("usual", None), ("spike", 1e4), ("nan", np.nan)):
        values = {k: rng.normal(size=(8, 4)).astype(np.float32) for k in SPECS}
        if value is not None:
            values["a"][-1, -1] = value
        yield name, values


def main(output, coordinator=None, processes=1, process=0):
    """Saves what this process sees of the clipped updates."""
    jax.config.update("jax_num_cpu_devices", 8 // int(processes))
    if int(processes) > 1:
        jax.distributed.initialize(coordinator, int(processes), int(process))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    auto = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    contexts = {
        "explicit": (mesh, every_method),
        "auto": (auto, every_method),
        "shard_map": (
            auto,
            jax.shard_map(
                lambda g: every_method(g, specs=SPECS),
                mesh=auto,
                in_specs=(SPECS,),
                out_specs={name: (SPECS, P()) for name in METHODS},
            ),
        ),
    }
    found = {}
    for context, (here, step) in contexts.items():
        step = jax.jit(step, out_shardings=NamedSharding(here, P()))
        for case, values in cases():
            on_mesh = {
                k: jax.make_array_from_callback(
                    v.shape, NamedSharding(here, SPECS[k]), lambda i, v=v: v[i]
                )
                for k, v in values.items()
            }
            with jax.set_mesh(here):
                seen = jax.device_get(step(on_mesh))
            for name, leaves in seen.items():
                for i, leaf in enumerate(jax.tree.leaves(leaves)):
                    found[f"{case} {context} {name} {i}"] = leaf
    np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
