"""One of several processes that train with a tap; run by test_tap_processes.py."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

STEPS = 20
GRADS = np.arange(1.0, 9.0, dtype=np.float32)  # of norm 14.28


def make(sink, axis_name=None):
    clipper = clipx.clip_by_global_norm(1.0, axis_name=axis_name)
    return clipx.tap(optax.chain(clipper, optax.sgd(0.1)), sink)


def scanned(tx):
    """All steps in one program; each one ends with a sum over all devices."""

    def train(grads):
        def step(state, _):
            updates, state = tx.update(grads, state)
            return state, jnp.sum(updates)

        return jax.lax.scan(step, tx.init(grads), None, length=STEPS)[1]

    return train


def in_a_loop(tx, mesh):
    def train(grads):
        step, state = jax.jit(tx.update), jax.jit(tx.init)(grads)
        for _ in range(STEPS):
            _, state = step(grads, state)
        return state

    return train


def contexts(sink):
    """Each: what trains on the updates, on all devices of all processes."""
    auto = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    explicit = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    backwards = jax.sharding.Mesh(np.array(jax.devices())[::-1], ("d",))
    tx, manual = make(sink), make(sink, axis_name="d")

    def summed(grads):
        return jax.lax.psum(scanned(manual)(grads), "d")

    mapped = jax.shard_map(
        summed, mesh=auto, in_specs=P("d"), out_specs=P(), check_vma=False
    )
    return {
        "auto": (auto, in_a_loop(tx, auto)),
        "explicit": (explicit, in_a_loop(tx, explicit)),
        "backwards": (backwards, in_a_loop(tx, backwards)),
        "scan": (auto, jax.jit(scanned(tx))),
        "shard_map": (auto, jax.jit(mapped)),
    }


def main(output, coordinator=None, processes=1, process=0):
    """Saves the reports that this process has had in each context."""
    jax.config.update("jax_num_cpu_devices", 8 // int(processes))
    if int(processes) > 1:
        jax.distributed.initialize(coordinator, int(processes), int(process))
    seen, found = [], {}
    cases = contexts(lambda step, metrics: seen.append([step, metrics["clip/norm"]]))
    for name, (mesh, train) in cases.items():
        grads = jax.make_array_from_callback(
            (8,), NamedSharding(mesh, P("d")), lambda i: GRADS[i]
        )
        with jax.set_mesh(mesh):
            jax.block_until_ready(train(grads))
        clipx.flush_taps()
        found[name] = list(seen)
        seen.clear()
    with open(output, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
