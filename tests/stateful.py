"""Every public transformation with what it keeps, for the tests of checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from all_methods import ADAPTIVE

import optax_clipx as clipx


def with_maxima(layout, maxima):
    """QK-Clip with the same largest logits in each step."""
    tx = clipx.qk_clip_updates(layout)

    def update(updates, state, params):
        return tx.update(updates, state, params, max_logits=maxima)

    return optax.GradientTransformation(tx.init, update)


# By the public name; a second word tells apart what keeps something else.
STATEFUL = {
    **{name: make() for name, make in ADAPTIVE.items() if hasattr(clipx, name)},
    "clip": clipx.clip(0.5),
    "clip_by_value": clipx.clip_by_value(-0.5, 0.5),
    "clip_by_leaf_norm": clipx.clip_by_leaf_norm(1.0),
    "clip_by_block_rms": clipx.clip_by_block_rms(0.5),
    "clip_by_global_norm": clipx.clip_by_global_norm(1.0),
    "clip_by_group_norm": clipx.clip_by_group_norm(
        {"dense": 1.0, "head": 0.5}, lambda path, leaf: path[0]
    ),
    "adaptive_grad_clip": clipx.adaptive_grad_clip(0.1),
    "smooth_clip": clipx.smooth_clip(1.0),
    "normalize_by_norm": clipx.normalize_by_norm(1.0),
    "clip_by_spectral_norm": clipx.clip_by_spectral_norm(1.0),
    "clip_by schedule": clipx.clip_by(
        clipx.measures.tree_norm(), optax.linear_schedule(4.0, 1.0, 8), metrics=False
    ),
    "clip_by band": clipx.clip_by(
        clipx.measures.leaf_norms(),
        clipx.thresholds.group_band(0.5, 2.0),
        clipx.responses.normalize,
    ),
    "clip_by combined": clipx.clip_by(
        clipx.measures.tree_norm(),
        clipx.thresholds.warmup(
            3.0,
            then=clipx.thresholds.minimum(
                clipx.thresholds.scaled(clipx.thresholds.quantile(0.5), 2.0), 9.0
            ),
            steps=2,
        ),
    ),
    "zclip leaf": clipx.zclip(warmup_steps=3, stats="skip", scope="leaf"),
    "quantile_clip window": clipx.quantile_clip(window=4, scope="leaf"),
    "quantile_clip all": clipx.quantile_clip(max_steps=9),
    "adagc tree": clipx.adagc(warmup_steps=3, scope="tree"),
    "quantile_clip tracked": clipx.quantile_clip(0.9, estimator="tracker"),
    "quantile_clip tracked units": clipx.quantile_clip(
        0.9, estimator="tracker", scope=clipx.measures.unit_norms()
    ),
    "historical_update_clip": clipx.historical_update_clip(window=5, warmup_steps=3),
    "clip_by_second_moment": clipx.clip_by_second_moment(warmup_steps=2),
    "mixed_clip": clipx.mixed_clip(1.0),
    "normalized_momentum": clipx.normalized_momentum(),
    "scale_by_acclip": clipx.scale_by_acclip(),
    "stabilize_norm": clipx.stabilize_norm(),
    "scale_by_stable_adam": clipx.scale_by_stable_adam(),
    "stable_adamw": clipx.stable_adamw(0.01),
    "excluding": clipx.excluding(clipx.zclip(warmup_steps=3), "head"),
    "error_feedback": clipx.error_feedback(clipx.clip_by_global_norm(1.0)),
    "reset_moments": clipx.reset_moments(
        clipx.scale_by_stable_adam(), every=4, warmup=3
    ),
    "skip_spikes": clipx.skip_spikes(
        optax.chain(clipx.zclip(warmup_steps=3), clipx.scale_by_stable_adam()),
        threshold=clipx.thresholds.zscore(2.5, window=4, warmup_steps=3),
    ),
    "track_norms": clipx.track_norms(
        optax.chain(clipx.clip_by_global_norm(1.0), optax.scale(-0.1)), ratios=True
    ),
    "cautious": clipx.cautious(optax.sgd(0.1, momentum=0.9)),
    "qk_clip_updates": with_maxima(
        clipx.qk.mha("dense/kernel", "head", head_axis=0),
        {"attention": np.linspace(50.0, 400.0, 8, dtype=np.float32)},
    ),
    "tap": clipx.tap(clipx.zclip(warmup_steps=3), lambda step, metrics: None),
}


def params():
    rng = np.random.default_rng(0)
    shapes = {"dense": {"kernel": (8, 4), "bias": (8,)}, "head": (8, 2)}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def grads(step):
    """Gradients of usual size, with spikes where rules have seen enough."""
    rng = np.random.default_rng(step + 1)
    size = 20.0 if step in (4, 6) else 1.0
    return jax.tree.map(
        lambda p: jnp.asarray(size * rng.normal(size=p.shape), jnp.float32), params()
    )


def update_all(updates, states, params, names=tuple(STATEFUL)):
    """What each makes of the same updates, and its state."""
    found = {n: STATEFUL[n].update(updates, states[n], params) for n in names}
    return {n: x[0] for n, x in found.items()}, {n: x[1] for n, x in found.items()}


jitted = jax.jit(update_all, static_argnames="names")


@functools.cache
def after_six_steps():
    states = {name: tx.init(params()) for name, tx in STATEFUL.items()}
    for step in range(6):
        _, states = jitted(grads(step), states, params())
    return states
