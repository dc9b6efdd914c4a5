"""The programs written by hand do what ours do, or they would be no yardstick."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import optax_clipx as clipx

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import least


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize(
    ("ours", "by_hand"),
    [
        (clipx.clip(0.1), least.clip(0.1)),
        (clipx.adaptive_grad_clip(0.5), least.adaptive_grad_clip(0.5)),
    ],
    ids=["clip", "AGC"],
)
def test_same_updates_and_metrics(ours, by_hand):
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(8,), (8, 4), (4,)]
    params = [jax.random.normal(*x) for x in zip(keys[:3], shapes, strict=True)]
    grads = [jax.random.normal(*x) for x in zip(keys[3:], shapes, strict=True)]
    found = [tx.update(grads, tx.init(params), params) for tx in (ours, by_hand)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *found)
    assert 0 < found[0][1].metrics.clipped < 1
