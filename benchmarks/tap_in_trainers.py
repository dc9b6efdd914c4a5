"""A tap in trainers from PyPI that hide their optimizer state: is each step reported?

flowjax's `fit_to_data`, numpyro's `SVI.run` and brax's PPO run as they are installed.
The first two are given the optimizer; brax builds its own from Optax, so the Optax that
its module uses gets our clipper and the tap. For each trainer the reports are compared
with the number of updates that it makes, counted from its own results or settings.

    pip install flowjax numpyro brax
    python benchmarks/tap_in_trainers.py --output docs/results/tap_in_trainers
"""

import argparse
import importlib.metadata
import pathlib
import types
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_clipx as clipx

Sink = clipx.History


def tapped(sink: Sink, every: int) -> optax.GradientTransformation:
    """The optimizer that the trainers are given."""
    clipper = clipx.clip_by_global_norm(1.0)
    return clipx.tap(optax.chain(clipper, optax.adam(1e-3)), sink, every=every)


def flowjax(sink: Sink, every: int) -> int:
    """A normalizing flow; its loop calls a jitted step."""
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train import fit_to_data

    flow = masked_autoregressive_flow(
        jax.random.key(0), base_dist=Normal(jnp.zeros(2)), flow_layers=2
    )
    data = jax.random.normal(jax.random.key(1), (1000, 2)) * 3
    _, losses = fit_to_data(
        jax.random.key(2),
        flow,
        data,
        optimizer=tapped(sink, every),
        max_epochs=12,
        max_patience=100,
        show_progress=False,
    )
    return len(losses["train"]) * (900 // 100)  # 900 for training, in batches of 100


def numpyro(sink: Sink, every: int, progress: bool = False) -> int:
    """Variational inference; its loop is one scan."""
    import numpyro as npo
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    def model(x: Any) -> None:
        mean = npo.sample("mean", npo.distributions.Normal(0.0, 10.0))
        with npo.plate("data", len(x)):
            npo.sample("x", npo.distributions.Normal(mean, 1.0), obs=x)

    svi = SVI(model, AutoNormal(model), tapped(sink, every), Trace_ELBO())
    x = 3 + jax.random.normal(jax.random.key(0), (100,))
    result = svi.run(jax.random.key(1), 500, x, progress_bar=progress)
    return len(result.losses)


def numpyro_with_progress(sink: Sink, every: int) -> int:
    """The same, in blocks between which it draws a progress bar."""
    return numpyro(sink, every, progress=True)


def brax(sink: Sink, every: int) -> int:
    """PPO; a scan in a scan in a pmap over all devices."""
    from brax import envs
    from brax.training.agents.ppo import train as ppo

    def chain(clipper: Any, adam: Any) -> optax.GradientTransformation:
        return clipx.tap(optax.chain(clipper, adam), sink, every=every)

    if not hasattr(jax, "device_put_replicated"):  # JAX 0.10 took it away from brax
        jax.device_put_replicated = replicated
    ours = {"chain": chain, "clip_by_global_norm": clipx.clip_by_global_norm}
    ppo.optax = types.SimpleNamespace(**{**vars(optax), **ours})
    clipx.config.update("blind_axes", "replicated")  # it averages its gradients
    trained: list[int] = []
    ppo.train(
        environment=envs.get_environment("fast"),
        num_timesteps=4000,
        episode_length=20,
        num_envs=8,
        unroll_length=5,
        batch_size=8,
        num_minibatches=2,
        num_updates_per_batch=3,
        num_evals=3,
        max_grad_norm=1.0,
        progress_fn=lambda step, metrics: trained.append(step),
    )
    clipx.config.update("blind_axes", "error")
    # One step of training takes batch_size * num_minibatches * unroll_length steps.
    return trained[-1] // (8 * 2 * 5) * 2 * 3


def replicated(tree: Any, devices: Any) -> Any:
    """A copy on each device, as pmap takes it."""
    spread = NamedSharding(Mesh(np.array(devices), "d"), PartitionSpec("d"))
    stacked = jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)
    return jax.device_put(stacked, spread)


TRAINERS: dict[str, tuple[Callable[[Sink, int], int], str, str]] = {
    "fit_to_data": (flowjax, "flowjax", "a loop over a jitted step"),
    "SVI.run": (numpyro, "numpyro", "one scan"),
    "SVI.run, progress bar": (numpyro_with_progress, "numpyro", "blocks of steps"),
    "PPO": (brax, "brax", "scans in a pmap over 2 devices"),
}


def measure(name: str, every: int) -> dict[str, Any]:
    """What a trainer reported."""
    train, package, loop = TRAINERS[name]
    before, history = clipx.flush_taps(), clipx.History()
    updates = train(history, every)
    counts = clipx.flush_taps()
    norms = history["clip/norm"]
    return {
        "trainer": f"{package} {importlib.metadata.version(package)}, {name}",
        "loop": loop,
        "every": every,
        "updates": updates,
        "reports": counts.delivered - before.delivered,
        "in_order": np.array_equal(history.steps, np.arange(0, updates, every)),
        "first": float(norms[0]),
        "last": float(norms[-1]),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    head = ["trainer", "its loop", "every", "updates", "reports", "each once, in order"]
    head += ["first norm", "last norm"]
    rows = [
        [
            row["trainer"],
            row["loop"],
            str(row["every"]),
            f"{row['updates']:,}",
            f"{row['reports']:,}",
            "yes" if row["in_order"] else "no",
            f"{row['first']:.3g}",
            f"{row['last']:.3g}",
        ]
        for row in report["rows"]
    ]
    return "\n".join(harness.table(head, rows, text=2) + harness.footer(report))


def main() -> None:
    """Trains, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=[*TRAINERS])
    parser.add_argument("--every", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--output", type=pathlib.Path, help="write OUTPUT.json and .md")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    rows = [measure(name, n) for name in options.trainers for n in options.every]
    report = {"environment": harness.environment(), "rows": rows}
    harness.write(options.output, report, markdown(report))


if __name__ == "__main__":
    main()
