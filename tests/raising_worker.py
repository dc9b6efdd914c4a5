"""One process that meets non-finite gradients everywhere; run by test_raising.py."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

METHODS = {
    "norm": partial(clipx.clip_by_global_norm, 1.0, nonfinite="raise"),
    "value": partial(clipx.clip, 0.1, nonfinite="raise"),
    "functional": None,
}
FINE = np.arange(1.0, 9.0, dtype=np.float32)
BAD = np.where(FINE == 4, np.nan, FINE).astype(np.float32)


def step(name, axis_name=None):
    """One step of a method on updates of one leaf, `w`."""
    if name == "functional":
        return lambda g: clipx.functional.clip_by_global_norm(
            {"w": g}, 1.0, nonfinite="raise", axis_name=axis_name
        )[0]["w"]
    tx = METHODS[name](axis_name=axis_name)
    return lambda g: tx.update({"w": g}, tx.init({"w": g}))[0]["w"]


def scanned(one, mesh):
    """50 steps of which the fourth meets what is bad; all hold collectives."""

    def body(carry, i):
        g = jax.lax.with_sharding_constraint(carry, NamedSharding(mesh, P("d")))
        clipped = one(jnp.where(i == 3, g, FINE))
        return carry, jnp.sum(clipped) + jnp.max(carry)

    return jax.jit(lambda g: jax.lax.scan(body, g, jnp.arange(50))[1])


def scanned_in_manual(one, mesh, check_vma):
    def body(carry, i):
        clipped = one(jnp.where(i == 3, carry, 1 + 0 * carry))
        return carry, jax.lax.psum(jnp.sum(clipped), "d")

    return jax.jit(
        jax.shard_map(
            lambda g: jax.lax.scan(body, g, jnp.arange(50))[1],
            mesh=mesh,
            in_specs=P("d"),
            out_specs=P(),
            check_vma=check_vma,
        )
    )


def contexts(name):
    """Each: a function of a NumPy vector of eight entries."""
    auto = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    explicit = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    one, manual = step(name), step(name, axis_name="d")

    def on(mesh, spec, run):
        return lambda g: run(jax.device_put(g, NamedSharding(mesh, spec)))

    def mapped(check_vma):
        return jax.jit(
            jax.shard_map(
                one if check_vma else manual,
                mesh=auto,
                in_specs=P("d"),
                out_specs=P("d"),
                check_vma=check_vma,
            )
        )

    cube = jax.make_mesh((2, 2, 2), ("d", "x", "y"), axis_types=(AxisType.Auto,) * 3)
    mapped_partly = jax.shard_map(
        one, mesh=cube, in_specs=P("d"), out_specs=P("d"), axis_names={"d"}
    )
    two_left = (
        {} if jax.__version_info__ < (0, 10) else {"two_left": jax.jit(mapped_partly)}
    )

    return two_left | {
        "eager": lambda g: one(jnp.asarray(g)),
        "eager_sharded": on(auto, P("d"), one),
        "jit": lambda g: jax.jit(one)(jnp.asarray(g)),
        "auto": on(auto, P("d"), jax.jit(one)),
        "explicit": on(explicit, P("d"), jax.jit(one)),
        "replicated": on(auto, P(), jax.jit(one)),
        "shard_map": on(auto, P("d"), mapped(True)),
        "shard_map_blind": on(auto, P("d"), mapped(False)),
        "pmap": jax.pmap(manual, axis_name="d"),
        "scan": on(auto, P("d"), scanned(one, auto)),
        "scan_in_shard_map": on(auto, P("d"), scanned_in_manual(one, auto, True)),
        "scan_blind": on(auto, P("d"), scanned_in_manual(manual, auto, False)),
    }


def outcome(run, g):
    """The exception met where the result is read, or its largest entry."""
    try:
        return float(np.max(np.asarray(run(g))))
    except Exception as error:
        return [type(error).__name__, str(error)]


def main(output, name):
    """Saves what came of bad updates and of the clean ones after them."""
    jax.config.update("jax_num_cpu_devices", 8)
    found = {}
    for context, run in contexts(name).items():
        found[context] = [outcome(run, BAD), outcome(run, FINE)]
    with open(output, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
