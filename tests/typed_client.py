"""A program that uses the public names, checked by mypy and pyright, and run.

What a call returns is stated with `assert_type`, which both checkers hold it to.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clipx as clipx

Params = dict[str, jax.Array]
Clipper: TypeAlias = optax.GradientTransformationExtraArgs

PARAMS: Params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
GRADS: Params = {"kernel": jnp.full((3, 2), 30.0), "bias": jnp.full(2, 40.0)}


def by_name(path: tuple[str, ...], leaf: Any) -> str:
    return path[-1]


def kernels_alone(path: tuple[str, ...], leaf: Any) -> tuple[int, ...] | None:
    return (0,) if path[-1] == "kernel" else None


def twice_the_last() -> clipx.thresholds.Threshold:
    """A rule of one's own."""

    def init(norms: Any) -> Any:
        return jax.tree.map(lambda n: jnp.full_like(n, jnp.inf), norms)

    def update(
        norms: Any, state: Any, context: clipx.thresholds.Context
    ) -> tuple[Any, Any]:
        assert_type(context.step, jax.Array | int)
        assert_type(context.labels, list[Any] | None)
        return state, jax.tree.map(lambda n: 2 * n, norms)

    return clipx.thresholds.Threshold(init, update)


def half(norms: jax.Array, limits: jax.Array) -> jax.Array:
    """A response of one's own."""
    return jnp.where(norms > limits, 0.5, 1.0)


SCHEDULE: optax.Schedule = optax.linear_schedule(1.0, 0.1, 100)

CLIPPERS: dict[str, Clipper] = {
    "clip": clipx.clip(1.0),
    "clip_by_value": clipx.clip_by_value(-1.0, jnp.array(1.0), nonfinite="zero"),
    "clip_by_leaf_norm": clipx.clip_by_leaf_norm(1, ord=np.inf, batch_axes=0),
    "clip_by_block_rms": clipx.clip_by_block_rms(1.0, batch_axes=(0,)),
    "clip_by_global_norm": clipx.clip_by_global_norm(SCHEDULE, eps=1e-6),
    "clip_by_group_norm": clipx.clip_by_group_norm(
        {"kernel": 1.0, "bias": SCHEDULE}, by_name
    ),
    "adaptive_grad_clip": clipx.adaptive_grad_clip(0.01, axis=clipx.units.flax),
    "zclip": clipx.zclip(2.5, mode="mean", max_norm=1.0),
    "auto_clip": clipx.auto_clip(),
    "quantile_clip": clipx.quantile_clip(0.1, window=20),
    "adagc": clipx.adagc(1.05, scope="tree"),
    "olmo_ratio_clip": clipx.olmo_ratio_clip(2.0),
    "log_zscore_clip": clipx.log_zscore_clip(),
    "quantile_clip tracked": clipx.quantile_clip(0.9, estimator="tracker"),
    "norm_growth_clip": clipx.norm_growth_clip(),
    "smooth_clip": clipx.smooth_clip(1.0),
    "normalize_by_norm": clipx.normalize_by_norm(),
    "clip_by_spectral_norm": clipx.clip_by_spectral_norm(1.0),
    "clip_by_second_moment": clipx.clip_by_second_moment(),
    "mixed_clip": clipx.mixed_clip(1.0),
    "own rule": clipx.clip_by(clipx.measures.tree_norm(), twice_the_last()),
    "own response": clipx.clip_by(clipx.measures.leaf_norms("rms"), 1.0, half),
    "prefix": clipx.clip_by(
        clipx.measures.leaf_norms(), {"kernel": 1.0, "bias": np.inf}
    ),
    "units": clipx.clip_by(
        clipx.measures.unit_norms(axis=kernels_alone),
        clipx.thresholds.relative_to_params(0.1),
        clipx.responses.smooth,
        metrics=False,
    ),
    "groups": clipx.clip_by(
        clipx.measures.group_norms(by_name),
        clipx.thresholds.minimum(
            clipx.thresholds.zscore(), clipx.thresholds.constant(1.0)
        ),
    ),
    "excluding": clipx.excluding(clipx.clip_by_leaf_norm(1.0), ("bias",)),
    "error_feedback": clipx.error_feedback(clipx.clip_by_global_norm(1.0)),
}


def clipping() -> None:
    for clipper in CLIPPERS.values():
        clipper.init(PARAMS)
    clipper = CLIPPERS["own response"]
    updates, _ = clipper.update(GRADS, clipper.init(PARAMS), PARAMS)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, GRADS)


def optimizers() -> None:
    adam = optax.chain(clipx.zclip(), optax.adam(1e-3))
    wrapped: list[optax.GradientTransformation] = [
        clipx.skip_spikes(
            adam,
            threshold=clipx.thresholds.warmup(
                1.0, then=clipx.thresholds.quantile(0.9), steps=5
            ),
        ),
        clipx.reset_moments(optax.adam(1e-3), 100),
        clipx.track_norms(adam, labels=by_name, ratios=True),
        clipx.stable_adamw(1e-3),
        optax.chain(clipx.scale_by_stable_adam(), optax.scale(-1e-3)),
        optax.inject_hyperparams(clipx.clip_by_global_norm)(max_norm=1.0),
    ]
    states = [optimizer.init(PARAMS) for optimizer in wrapped]
    _, state = wrapped[0].update(GRADS, states[0], PARAMS)
    assert isinstance(state, clipx.SkipState)
    assert_type(state.metrics, clipx.ClipMetrics)
    assert_type(state.num_skipped, jax.Array)
    assert_type(state.metrics.norm, jax.Array | None)
    assert_type(clipx.metrics(state), dict[str, jax.Array])
    clipx.check(state)


def functions() -> None:
    functional = clipx.functional
    assert_type(functional.global_norm(GRADS), jax.Array)
    _, norm = functional.clip_by_global_norm(GRADS, 1.0, norm=jnp.array(70.0))
    assert_type(norm, jax.Array)
    _, norms = functional.clip_by_leaf_norm(GRADS, {"kernel": 1.0, "bias": 2.0})
    assert set(norms) == set(GRADS)
    functional.clip_by_value(GRADS, -1.0, 1.0)
    functional.adaptive_grad_clip(GRADS, PARAMS, 0.01, axis=clipx.units.flax)
    functional.leaf_norms(GRADS, "rms")
    functional.unit_norms(GRADS, kernels_alone)
    assert_type(functional.group_norms(GRADS, by_name), dict[Any, jax.Array])
    assert_type(
        clipx.responses.rescale(jnp.array(2.0), jnp.array(1.0), eps=1e-6), jax.Array
    )


def loss(params: Params, x: jax.Array) -> jax.Array:
    y = clipx.backward.clip_norm(x @ params["kernel"], 1.0) + params["bias"]
    y = clipx.backward.zero_nonfinite(clipx.backward.clip_value(y, -1.0, 1.0))
    return jnp.sum(jnp.square(y))


def per_example() -> None:
    grad_fn = clipx.per_example.clipped_grad(
        loss, 1.0, microbatch_size=2, response=clipx.responses.normalize
    )
    assert_type(grad_fn, Callable[..., tuple[Any, clipx.per_example.ClippedExamples]])
    _, found = grad_fn(PARAMS, jnp.ones((4, 1, 3)))
    assert_type(found, clipx.per_example.ClippedExamples)
    assert found.norms.shape == (4,)
    stacked = jax.tree.map(lambda g: jnp.stack([g, g]), GRADS)
    _, count = clipx.per_example_global_norm_clip(list(stacked.values()), 1.0)
    assert_type(count, jax.Array)


def recording(folder: Path) -> None:
    optimizer = clipx.track_norms(clipx.clip_by_global_norm(1.0))
    state = optimizer.init(PARAMS)
    with clipx.History(folder / "run.jsonl") as history:
        for step in range(20):
            _, state = optimizer.update(GRADS, state, PARAMS)
            history.append(step, {"loss": 1.0 / (1 + step), **clipx.metrics(state)})
        history.append(range(20, 22), {"loss": np.array([0.1, 0.2])})
    assert_type(history.columns, dict[str, np.ndarray])
    assert_type(history.save(str(folder / "run.csv")), Path)
    loaded = clipx.History.load(folder / "run.csv", step="step")
    assert_type(loaded, clipx.History)
    assert len(loaded) == len(history.steps) == 22
    suggestion = clipx.suggest_threshold(history["clip/norm"][:20], 0.1, limit=1.0)
    assert_type(suggestion, clipx.Suggestion)
    assert_type(suggestion.value, float)


def score(limit: float, *, seed: int, learning_rate: float) -> float:
    return (limit - 1.0) ** 2 + seed + learning_rate


def sweeping(folder: Path) -> None:
    found = clipx.find_threshold(
        score,
        0.1,
        10,
        num=3,
        seeds=range(2),
        learning_rates=np.array([0.1, 1.0]).tolist(),
        path=folder / "sweep.jsonl",
        progress=False,
    )
    assert_type(found, clipx.Sweep)
    assert_type(found.best, float)
    assert_type(found.best_learning_rate, float | None)


def units() -> None:
    rule = clipx.units.stacked(clipx.units.flax, "blocks")
    clipx.units.show(PARAMS, axis=rule)
    clipx.units.show(PARAMS, axis={"kernel": (0,), "bias": 0})
    clipper = clipx.adaptive_grad_clip(0.1, axis=rule)
    assert_type(clipper, Clipper)


def main(folder: Path) -> None:
    clipping()
    optimizers()
    functions()
    per_example()
    recording(folder)
    sweeping(folder)
    units()
    assert_type(clipx.__version__, str)


def pictures(history: clipx.History, path: Path) -> None:
    """Checked, and left to the tests of plotting to run."""
    history.plot(path, theme="dark")
    clipx.plotting.norms(str(path), limit=1)
    clipx.plotting.compare({"a": [history, history], "b": {"loss": [1.0, 2.0]}})
    history.to_pandas()
