"""A run with a block of poisoned batches, to be rewound; `main` to be killed.

With a coordinator's address, the number of processes and one's own, `main` is one of
several processes, each of which has a part of every batch.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx

STEPS, EVERY = 300, 20
POISONED = range(150, 170)
OPTIONS = {"patience": 5, "window": 60, "margin": 20}
rate = optax.linear_schedule(0.1, 0.0, STEPS)
optimizer = optax.chain(clipx.clip_by_global_norm(1.0), optax.sgd(rate, momentum=0.9))


def loss_fn(params, x, y):
    hidden = jax.nn.relu(x @ params["kernel"] + params["bias"])
    return jnp.mean((hidden @ params["head"] - y) ** 2)


@jax.jit
def train_step(state, x, y):
    params, opt_state = state["params"], state["opt_state"]
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    metrics = {"loss": loss, **clipx.metrics(opt_state)}
    return {
        "params": optax.apply_updates(params, updates),
        "opt_state": opt_state,
    }, metrics


def batch(number, poisoned=POISONED, size=32):
    """Noisy values of a function; those of a poisoned batch are far off."""
    rng = np.random.default_rng(number)
    x = rng.normal(size=(size, 4))
    y = np.abs(x[:, :1]) + 0.3 * rng.normal(size=(size, 1))
    if number in poisoned:
        y -= 1e4
    return x.astype(np.float32), y.astype(np.float32)


def fresh():
    keys = jax.random.split(jax.random.key(0))
    params = {
        "bias": jnp.zeros((1, 16)),
        "kernel": 0.5 * jax.random.normal(keys[0], (4, 16)),
        "head": 0.1 * jax.random.normal(keys[1], (16, 1)),
    }
    return {"params": params, "opt_state": optimizer.init(params)}


def manager_of(folder):
    options = ocp.CheckpointManagerOptions(max_to_keep=4)
    return ocp.CheckpointManager(folder / "states", options=options)


def train(folder, batch=batch, tell=lambda what: None, put=lambda x, *axes: x):
    """Trains or goes on, with rewinds; the state at the end, and the Rewind."""
    process = jax.process_index()
    with (
        manager_of(folder) as manager,
        clipx.History(folder / f"run.{process}.jsonl", resume=True) as history,
    ):
        rewind = clipx.Rewind(
            manager, history, folder / "rewinds.jsonl", primary=process == 0, **OPTIONS
        )
        state, step = rewind.restore(put(fresh()))
        while step < STEPS:
            x, y = put(batch(rewind.batch(step)), "data")
            state, metrics = train_step(state, x, y)
            history.append(step, metrics)
            tell(step)
            if rewind.step(step):
                tell("rewind")
                state, step = rewind.restore(state)
                continue
            step += 1
            if step % EVERY == 0:
                history.flush()
                manager.save(step, args=ocp.args.StandardSave(state))
    return state, rewind


def train_without(batch=batch):
    """The same run without rewinds."""
    state = fresh()
    for step in range(STEPS):
        state, _ = train_step(state, *batch(step))
    return state


clean = partial(batch, poisoned=())


def final_loss(state):
    """Of many examples that no run was trained on."""
    return float(loss_fn(state["params"], *clean(10**6, size=4096)))


def main(folder, coordinator=None, processes=1, process=0):
    """Trains, and tells of each step; saves the bits of the end."""
    jax.config.update("jax_num_cpu_devices", 1)
    if coordinator:
        jax.distributed.initialize(coordinator, int(processes), int(process))
    mesh = jax.make_mesh((int(processes),), ("data",), axis_types=(AxisType.Auto,))

    def put(tree, *axes):
        def one(x):
            sharding = NamedSharding(mesh, P(*axes))
            return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

        return jax.tree.map(one, tree)

    def tell(what):
        print(what, flush=True)
        time.sleep(0.002)

    state, rewind = train(Path(folder), tell=tell, put=put)
    leaves = [np.asarray(x).tobytes().hex() for x in jax.tree.leaves(state)]
    decisions = [decision._asdict() for decision in rewind.decisions]
    end = json.dumps({"leaves": leaves, "decisions": decisions})
    (Path(folder) / f"end.{process}.json").write_text(end)


if __name__ == "__main__":
    main(*sys.argv[1:])
