"""A warm-up lasts for as many norms as were seen: zeros and NaN do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx
from optax_clipx import measures, thresholds


def ratio(**options):
    return clipx.adagc(warmup_steps=3, warmup_max_norm=1e9, scope="tree", **options)


def in_two_steps(then):
    return lambda **options: clipx.clip_by(
        measures.tree_norm(), thresholds.warmup(1e9, then=then, steps=2), **options
    )


METHODS = {
    "warmup, a number": in_two_steps(1.0),
    "warmup, a rule": in_two_steps(thresholds.quantile(0.5, window=9)),
    "zclip": lambda **options: clipx.zclip(warmup_steps=3, **options),
    "zclip, window": lambda **options: clipx.historical_update_clip(
        warmup_steps=3, window=8, **options
    ),
    "auto_clip": clipx.auto_clip,
    "quantile_clip": clipx.quantile_clip,
    "adagc": ratio,
    "norm_growth_clip": clipx.norm_growth_clip,
    "log_zscore_clip": clipx.log_zscore_clip,
    "skip_spikes": lambda **options: clipx.skip_spikes(optax.identity()),
}
SEEN = (1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 1.1, 0.9, 1.0, 80.0, 1.0, 70.0)


def outputs(tx, norms):
    state, found, update = tx.init(jnp.zeros(1)), [], jax.jit(tx.update)
    for norm in norms:
        clipped, state = update(jnp.array([norm], jnp.float32), state)
        found.append(float(clipped[0]))
    return found


@pytest.mark.one_in(10)
@pytest.mark.parametrize("nothing", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("name", METHODS)
def test_steps_that_say_nothing_leave_no_trace(name, nothing):
    tx = METHODS[name](nonfinite="zero")
    alone = outputs(tx, SEEN)
    mixed = outputs(tx, [nothing] * 20 + [x for n in SEEN for x in (n, nothing)])
    assert mixed[20::2] == alone
    assert not any(mixed[:20] + mixed[21::2])


def test_the_warm_up_ends_after_so_many_norms():
    found = outputs(METHODS["warmup, a number"](nonfinite="zero"), [5, np.nan, 5, 5])
    assert found == [5, 0, 5, 1]


def test_each_leaf_counts_its_own():
    rule = thresholds.warmup(10.0, then=1.0, steps=1)
    tx = clipx.clip_by(measures.leaf_norms(), rule)
    state = tx.init([jnp.zeros(1)] * 2)
    for grads, want in (([4.0, 0.0], [4.0, 0.0]), ([4.0, 4.0], [1.0, 4.0])):
        clipped, state = tx.update([jnp.array([g]) for g in grads], state)
        assert [float(x[0]) for x in clipped] == want
