"""`carry_over`: an old checkpoint for an optimizer with other clippers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_clipx as clipx

pytestmark = pytest.mark.filterwarnings("ignore:.*jax.tree_util:DeprecationWarning")
PARAMS = {"w": np.ones((2, 3), np.float32), "b": [np.ones(3, np.float32)]}
adam = optax.adamw(1e-3)
zclip, fixed = clipx.zclip(), clipx.clip_by_global_norm(1.0)


def trained(tx):
    """A state in which each array has a number of its own."""
    leaves, treedef = jax.tree.flatten(tx.init(PARAMS))
    numbered = [jnp.full_like(x, i + 2) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, numbered)


SKIP_STATE = [
    *("metrics", "rule", "loss_rule", "skipped", "reason"),
    *("num_skipped", "consecutive_skips"),
]
# old optimizer, new one, what is fresh, and where the old state is in the new one
ADDED = {
    "first": (adam, optax.chain(zclip, adam), ["0"], lambda s: s[1]),
    "for_optax": (
        optax.chain(optax.clip_by_global_norm(1.0), adam),
        optax.chain(zclip, adam),
        ["0"],
        lambda s: (optax.EmptyState(), s[1]),
    ),
    "between": (
        optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda i: 0.1)),
        optax.chain(
            zclip,
            optax.scale_by_adam(),
            clipx.quantile_clip(),
            optax.scale_by_schedule(lambda i: 0.1),
        ),
        ["0", "2"],
        lambda s: (s[1], s[3]),
    ),
    "named": (
        optax.named_chain(("adam", adam), ("more", optax.trace(0.9))),
        optax.named_chain(("clip", zclip), ("more", optax.trace(0.9)), ("adam", adam)),
        ["clip"],
        lambda s: type(s)(adam=s["adam"], more=s["more"]),
    ),
    "wrapped": (
        optax.chain(zclip, adam),
        clipx.skip_spikes(optax.chain(zclip, adam)),
        SKIP_STATE,
        lambda s: s.inner,
    ),
    "inside": (
        optax.MultiSteps(adam, 2),
        optax.MultiSteps(optax.chain(zclip, adam), 2),
        ["inner_opt_state/0"],
        lambda s: s._replace(inner_opt_state=s.inner_opt_state[1]),
    ),
    "injected": (
        optax.inject_hyperparams(optax.adam)(1e-3),
        optax.chain(zclip, optax.inject_hyperparams(optax.adam)(1e-3)),
        ["0"],
        lambda s: s[1],
    ),
    "rule": (
        optax.chain(fixed, adam),
        optax.chain(zclip, adam),
        ["0/rule"],
        lambda s: (s[0]._replace(rule=()), s[1]),
    ),
    "nothing": (optax.chain(zclip, adam), optax.chain(zclip, adam), [], lambda s: s),
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", ADDED)
def test_all_that_fits_is_kept(name):
    old_tx, new_tx, fresh, place = ADDED[name]
    old, new = trained(old_tx), new_tx.init(PARAMS)
    state, told = clipx.carry_over(old, new)
    assert told == fresh
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    chex.assert_trees_all_equal(place(state), old)
    kept, was = len(jax.tree.leaves(state)), len(jax.tree.leaves(old))
    untouched = zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)
    assert sum(a is b for a, b in untouched) == kept - was


def test_the_new_optimizer_goes_on_with_it():
    """Adam's steps are those of before: only the clipper begins anew."""
    old_tx, new_tx, grads = adam, optax.chain(zclip, adam), PARAMS
    with jax.numpy_dtype_promotion("standard"):  # Adam's own bias correction
        _, old = old_tx.update(grads, old_tx.init(PARAMS), PARAMS)
        state, _ = clipx.carry_over(old, new_tx.init(PARAMS))
        found, state = jax.jit(new_tx.update)(grads, state, PARAMS)
        want, _ = jax.jit(old_tx.update)(grads, old, PARAMS)
    chex.assert_trees_all_close(found, want, rtol=1e-6)  # z-clip warms up
    assert int(clipx.metrics(state)["clip/steps"]) == 1


LOST = {
    "a_rule": (
        optax.chain(zclip, adam),
        optax.chain(clipx.quantile_clip(), adam),
        ["0/rule"],
    ),
    "a_clipper": (optax.chain(zclip, adam), adam, ["0"]),
    "a_wrapper": (
        clipx.skip_spikes(adam),
        adam,
        SKIP_STATE,
    ),
    "a_name": (
        optax.named_chain(("a", adam), ("b", zclip)),
        optax.named_chain(("a", adam), ("c", zclip)),
        ["b"],
    ),
    "a_shape": (
        optax.chain(clipx.quantile_clip(window=4), adam),
        optax.chain(clipx.quantile_clip(window=8), adam),
        ["0/rule/history"],
    ),
    "a_dtype": (
        optax.adam(0.1),
        optax.adam(0.1, mu_dtype=jnp.bfloat16),
        ["0/mu"],
    ),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", LOST)
def test_what_would_be_lost_is_an_error_unless_allowed(name):
    old_tx, new_tx, names = LOST[name]
    old, new = trained(old_tx), new_tx.init(PARAMS)
    with pytest.raises(ValueError, match="a place in the new state") as caught:
        clipx.carry_over(old, new)
    assert f"drop={names}" in str(caught.value)
    state, _ = clipx.carry_over(old, new, drop=names)
    for name in ("nu", "count"):
        kept, was = (optax.tree.get_all_with_path(x, name) for x in (state, old))
        assert len(kept) == len(was) >= 1
        chex.assert_trees_all_equal([x for _, x in kept], [x for _, x in was])
    everything, _ = clipx.carry_over(old, new, drop=[""])
    chex.assert_trees_all_equal(everything, state)
    if len(names) > 1:
        with pytest.raises(ValueError, match=names[-1]):
            clipx.carry_over(old, new, drop=names[:-1])


def test_drop_that_names_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"to name what is lost, got \['1'\]"):
        clipx.carry_over(adam.init(PARAMS), adam.init(PARAMS), drop=["1"])


def test_two_places_are_an_error():
    with pytest.raises(ValueError, match="several"):
        clipx.carry_over(trained(adam), optax.chain(adam, adam).init(PARAMS))
    both = trained(optax.chain(adam, adam))
    state, fresh = clipx.carry_over(both, optax.chain(zclip, adam, adam).init(PARAMS))
    assert fresh == ["0"]
    chex.assert_trees_all_equal(state[1:], both)


def test_a_state_without_its_types_is_an_error():
    plain = {"0": {"count": jnp.zeros((), jnp.int32)}}
    with pytest.raises(ValueError, match="as the state of the old optimizer"):
        clipx.carry_over(plain, adam.init(PARAMS))


def test_shapes_in_the_place_of_a_new_state_are_an_error():
    """The values of a fresh clipper are not known from them."""
    shapes = jax.eval_shape(optax.chain(zclip, adam).init, PARAMS)
    with pytest.raises(ValueError, match=r"0/metrics/norm.*Pass tx.init\(params\)"):
        clipx.carry_over(trained(adam), shapes)
    with pytest.raises(ValueError, match="Expected new_state to hold arrays"):
        clipx.carry_over(optax.sgd(0.1).init(PARAMS), shapes)


def test_shapes_are_enough_where_nothing_is_fresh():
    old = trained(optax.chain(zclip, adam))
    state, fresh = clipx.carry_over(old, jax.eval_shape(lambda: old))
    assert fresh == []
    chex.assert_trees_all_equal(state, old)


def test_an_old_state_of_shapes_is_an_error():
    shapes = jax.eval_shape(adam.init, PARAMS)
    with pytest.raises(ValueError, match=r"old_state to hold arrays.*Restore it first"):
        clipx.carry_over(shapes, optax.chain(zclip, adam).init(PARAMS))


def test_shapes_of_both_give_the_shapes_of_the_result():
    shapes, new = jax.eval_shape(lambda: (adam.init(PARAMS), zclip.init(PARAMS)))
    found, _ = clipx.carry_over(shapes, (new, shapes))
    assert found == (new, shapes)


@pytest.mark.parametrize("which", ["old_state", "new_state"])
def test_an_optimizer_in_the_place_of_its_state_is_an_error(which):
    states = {"old_state": trained(adam), "new_state": trained(adam)} | {which: adam}
    with pytest.raises(TypeError, match=f"Expected {which} to be the state of"):
        clipx.carry_over(**states)


def test_parameters_in_the_place_of_a_state_are_an_error():
    with pytest.raises(ValueError, match=r"Nothing of it fits.*init") as caught:
        clipx.carry_over(trained(adam), PARAMS)
    assert "drop" not in str(caught.value)


def test_other_parameters_are_an_error():
    """Lists of layers are not aligned with each other."""
    three, four = ([jnp.ones(2)] * n for n in (3, 4))
    with pytest.raises(ValueError, match="a place in the new state"):
        clipx.carry_over(adam.init(three), adam.init(four))


def restored(tree, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return checkpointer.restore(folder / "state", target)


@jax.numpy_dtype_promotion("standard")
@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # older Orbax
def test_flax_train_state(tmp_path):
    def state_of(tx):
        return TrainState.create(apply_fn=None, params=PARAMS, tx=tx)

    old = state_of(adam).apply_gradients(grads=PARAMS)
    old = restored(old, state_of(adam), tmp_path)
    new = state_of(optax.chain(zclip, adam))
    opt_state, fresh = clipx.carry_over(old.opt_state, new.opt_state)
    new = new.replace(step=old.step, params=old.params, opt_state=opt_state)
    assert fresh == ["0"]
    new, old = (state.apply_gradients(grads=PARAMS) for state in (new, old))
    assert new.step == 2
    chex.assert_trees_all_close(new.params, old.params, rtol=1e-6)
    # Or the whole of it at once.
    whole, fresh = clipx.carry_over(old, state_of(optax.chain(zclip, adam)))
    assert fresh == ["opt_state/0"]
    chex.assert_trees_all_equal(whole.params, old.params)


@jax.numpy_dtype_promotion("standard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nnx_optimizer(tmp_path):
    def optimizer_of(tx):
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    model, old = optimizer_of(adam)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    old.update(model, grads)
    _, like = optimizer_of(adam)
    nnx.update(like, restored(nnx.state(old), nnx.state(like), tmp_path))
    chex.assert_trees_all_equal(nnx.state(like), nnx.state(old))

    other, new = optimizer_of(optax.chain(zclip, adam))
    new.opt_state, fresh = clipx.carry_over(like.opt_state, new.opt_state)
    new.step = like.step
    nnx.update(other, nnx.state(model))
    assert fresh == ["0"]
    old.update(model, grads)
    new.update(other, grads)
    assert int(new.step[...]) == 2
    chex.assert_trees_all_close(nnx.state(other), nnx.state(model), rtol=1e-6)
    assert int(clipx.metrics(new.opt_state)["clip/steps"]) == 1


def test_skipped_steps_are_carried_over_to_another_rule():
    """What the default limits of a version before remembered is a window of norms."""
    window = clipx.thresholds.zscore(6.0, window=128, warmup_steps=64, stats="skip")
    before = clipx.skip_spikes(adam, threshold=window, loss_threshold=window)
    old, new = trained(before), clipx.skip_spikes(adam).init(PARAMS)
    with pytest.raises(ValueError, match=r"drop=\['rule.*'loss_rule"):
        clipx.carry_over(old, new)
    state, fresh = clipx.carry_over(old, new, drop=["rule", "loss_rule"])
    assert fresh == ["rule", "loss_rule"]
    chex.assert_trees_all_equal(state.inner, old.inner)
    assert state.num_skipped == old.num_skipped
