"""A threshold rule of one's own, and everything that it gets for free.

python examples/own_rule.py
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clipx as clipx


# begin
class HampelState(NamedTuple):
    """The last norms, along the last axis; 0 where there is none yet."""

    norms: jax.Array


def hampel(k=3.0, window=50):
    """Median and k scaled deviations from it of the last norms (Hampel, 1974)."""

    def init(norms):
        return HampelState(jnp.zeros((*norms.shape, window)))

    def update(norms, state, context):
        last = jnp.where(state.norms > 0, state.norms, jnp.nan)
        median = jnp.nanmedian(last, axis=-1, keepdims=True)
        deviation = 1.4826 * jnp.nanmedian(jnp.abs(last - median), axis=-1)
        limits = median[..., 0] + k * jnp.maximum(deviation, 0.01 * median[..., 0])
        limits = jnp.where(jnp.isnan(limits), jnp.inf, limits)
        after = jnp.concatenate([state.norms[..., 1:], norms[..., None]], axis=-1)
        return limits, HampelState(after)

    return clipx.thresholds.Threshold(init, update)


# end
def main():
    """Clips a run with a spike and a NaN, in four ways."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    clippers = {
        "tree": clipx.clip_by(clipx.measures.tree_norm(), hampel(), nonfinite="zero"),
        "leaf": clipx.clip_by(clipx.measures.leaf_norms(), hampel(), nonfinite="zero"),
        "skip": clipx.skip_spikes(optax.identity(), threshold=hampel(k=6.0)),
        "at most 2": clipx.clip_by(
            clipx.measures.tree_norm(),
            clipx.thresholds.minimum(hampel(), 2.0),
            nonfinite="zero",
        ),
    }
    for name, clipper in clippers.items():
        state, update = clipper.init(params), jax.jit(clipper.update)
        for step in range(60):
            scale = {40: 1000.0, 50: np.nan}.get(step, 1.0)
            grads = jax.tree.map(
                lambda p, s=scale: s * rng.normal(size=p.shape).astype(p.dtype), params
            )
            _, state = update(grads, state)
            seen = clipx.metrics(state)
            kind = "skip" if name == "skip" else "clip"
            if step in (39, 40, 50, 51):
                print(
                    f"{name:10} step {step}: norm {seen[f'{kind}/norm']:8.2f}"
                    f" -> {seen[f'{kind}/clipped_norm']:5.2f}"
                    f" (threshold {seen[f'{kind}/threshold']:.2f})"
                )
    print(
        "\nThe rule is a function of norms, so the same few lines clip the whole tree"
        " or each leaf, or skip steps.\nThe spike in step 40 is brought down to the"
        " threshold; after it and the NaN in step 50 the threshold is about as before."
    )


if __name__ == "__main__":
    main()
