"""`metrics` of states that have lost their types: nested and flat dicts of arrays."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clipx as clipx

GRADS = {"dense": {"kernel": jnp.array([3.0, 4.0])}}


def optimizer():
    return clipx.skip_spikes(
        clipx.track_norms(
            optax.chain(
                clipx.clip_by_global_norm(1.0),
                optax.trace(0.9),
                clipx.clip_by_leaf_norm(0.5),
            )
        )
    )


def state_of(tx):
    return jax.jit(tx.update)(GRADS, tx.init(GRADS), GRADS)[1]


def flat(state):
    """As ninjax keeps it."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        "/".join(("opt", "state", *map(name_of, keys))): leaf for keys, leaf in leaves
    }


def name_of(key):
    return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))))


FORMS = {
    "flat": flat,
    "nested": flax.serialization.to_state_dict,
    "tuples": lambda state: flax.traverse_util.flatten_dict(
        flax.serialization.to_state_dict(state)
    ),
}


def test_a_clipper_in_a_flat_state():
    read = clipx.metrics(
        flat(state_of(optax.chain(clipx.clip_by_global_norm(1.0), optax.sgd(0.1))))
    )
    assert set(read) == {f"clip/{field}" for field in clipx.ClipMetrics._fields}
    assert read["clip/norm"] == 5.0
    assert read["clip/clipped_norm"] == 1.0


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_as_the_state_itself(form):
    state = state_of(optimizer())
    want, found = clipx.metrics(state), clipx.metrics(FORMS[form](state))
    assert {"clip/0/norm", "skip/norm", "track_norms/dense/kernel"} <= set(want)
    assert set(found) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(found[name], value)


def test_check_of_a_flat_state():
    tx = clipx.clip_by_global_norm(1.0)
    grads = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    _, state = tx.update(grads, tx.init(GRADS))
    with pytest.raises(FloatingPointError, match="step 1"):
        clipx.check(flat((state,)))


def test_a_flat_state_without_a_clipper_names_what_was_found():
    state = flat(optax.adam(0.1).init(GRADS))
    with pytest.raises(
        ValueError,
        match=r"a dict with 'opt/state/0/count', .*A dict of parameters or",
    ):
        clipx.metrics(state)
