"""A run that saves checkpoints, to be killed; started by test_checkpoints.py."""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_clipx as clipx

folder, steps, every = Path(sys.argv[1]), int(sys.argv[2]), 4
optimizer = clipx.skip_spikes(
    optax.chain(clipx.zclip(warmup_steps=5), optax.adam(1e-2)),
    threshold=clipx.thresholds.zscore(6.0, window=16, warmup_steps=8),
)


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["kernel"]) @ params["head"] - y) ** 2)


@jax.jit
def train_step(state, x, y):
    params, opt_state = state["params"], state["opt_state"]
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, opt_state = optimizer.update(grads, opt_state, params, loss=loss)
    params = optax.apply_updates(params, updates)
    metrics = {"loss": loss, **clipx.metrics(opt_state)}
    return {"params": params, "opt_state": opt_state}, metrics


def batch(step):
    rng = np.random.default_rng(step)
    size = 1e3 if step % 19 == 15 else 1.0
    return size * rng.normal(size=(16, 8)), size * rng.normal(size=(16, 1))


keys = jax.random.split(jax.random.key(0))
params = {
    "kernel": jax.random.normal(keys[0], (8, 16)),
    "head": jax.random.normal(keys[1], (16, 1)),
}
state, start = {"params": params, "opt_state": optimizer.init(params)}, 0
with (
    ocp.CheckpointManager(
        folder / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as manager,
    clipx.History(folder / "run.jsonl", resume=True) as history,
):
    if manager.latest_step() is not None:
        start = manager.latest_step()
        state = manager.restore(start, args=ocp.args.StandardRestore(state))
    for step in range(start, steps):
        state, metrics = train_step(state, *batch(step))
        history.append(step, metrics)
        if (step + 1) % every == 0:
            history.flush()
            manager.save(step + 1, args=ocp.args.StandardSave(state))
        print(step, flush=True)
        time.sleep(0.01)
leaves = jax.tree_util.tree_leaves_with_path(state)
np.savez(
    folder / "end.npz", **{jax.tree_util.keystr(k): np.asarray(x) for k, x in leaves}
)
