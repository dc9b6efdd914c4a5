"""One contract over every public transformation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from all_methods import ALL_METHODS
from jax import lax

import optax_clipx as clipx

every_method = pytest.mark.parametrize(
    "make", ALL_METHODS.values(), ids=ALL_METHODS.keys()
)


def params():
    return {
        "dense": {"kernel": jnp.full((3, 4), 0.5), "bias": jnp.full((4,), 0.1)},
        "half": jnp.full((2, 3), 0.25, jnp.bfloat16),
        "tiny": jnp.full((5,), 0.5, jnp.float16),
        "scalar": jnp.float32(2.0),
    }


def grads(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    return jax.tree.map(
        lambda p: jax.random.normal(next(keys), p.shape, p.dtype), params()
    )


@pytest.mark.one_in(10)
@every_method
def test_dtypes_shapes_and_structure_are_kept(make):
    clipper = make(0.1)
    state = clipper.init(params())
    clipped, new_state = jax.jit(clipper.update)(grads(), state, params())
    chex.assert_trees_all_equal_structs(clipped, grads())
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, grads())
    chex.assert_tree_all_finite(clipped)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new_state)
    assert not any(x.weak_type for x in jax.tree.leaves((clipped, state, new_state)))


@pytest.mark.one_in(10)
@every_method
def test_eager_and_jitted_agree(make):
    clipper = make(0.1)
    state = clipper.init(params())
    eager = clipper.update(grads(), state, params())
    jitted = jax.jit(clipper.update)(grads(), state, params())
    chex.assert_trees_all_close(eager, jitted, rtol=1e-6)


@pytest.mark.one_in(10)
@every_method
@pytest.mark.parametrize("metrics", [True, False])
def test_one_trace_serves_many_steps(make, metrics):
    clipper = make(0.1, metrics=metrics)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(updates, state, params):
        return clipper.update(updates, state, params)

    state = clipper.init(params())
    for seed in range(3):
        _, state = step(grads(seed), state, params())


@pytest.mark.one_in(10)
@every_method
def test_scan_equals_a_loop(make):
    clipper = make(0.1)
    stacked = jax.tree.map(
        lambda *x: jnp.asarray(np.stack(x)), *[grads(i) for i in range(3)]
    )

    def body(state, updates):
        clipped, state = clipper.update(updates, state, params())
        return state, clipped

    state, clipped = jax.jit(lambda s, g: lax.scan(body, s, g))(
        clipper.init(params()), stacked
    )
    one_by_one = clipper.init(params())
    for i in range(3):
        last, one_by_one = clipper.update(grads(i), one_by_one, params())
    chex.assert_trees_all_close(state, one_by_one, rtol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[-1], clipped), last, rtol=1e-3)


@pytest.mark.one_in(10)
@every_method
def test_init_from_shapes_alone(make):
    clipper = make(0.1)
    abstract = jax.eval_shape(clipper.init, params())
    from_shapes = clipper.init(jax.eval_shape(params))
    real = clipper.init(params())
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, real)
    chex.assert_trees_all_equal_shapes_and_dtypes(from_shapes, real)


@pytest.mark.one_in(10)
@every_method
def test_donated_state_and_updates(make):
    clipper = make(0.1)
    step = jax.jit(clipper.update, donate_argnums=(0, 1))
    state = clipper.init(params())
    expected, _ = clipper.update(grads(), state, params())
    for _ in range(2):
        clipped, state = step(grads(), state, params())
    chex.assert_trees_all_close(clipped, expected, rtol=1e-3)


@pytest.mark.one_in(10)
@every_method
def test_state_has_no_array_twice(make):
    leaves = jax.tree.leaves(make(0.1).init(params()))
    assert len({id(x) for x in leaves}) == len(leaves)


@pytest.mark.one_in(10)
@every_method
def test_extra_arguments_are_ignored(make):
    clipper = optax.with_extra_args_support(make(0.1))
    state = clipper.init(params())
    clipper.update(grads(), state, params())  # from the second on it is compiled
    plain = clipper.update(grads(), state, params())
    extra = clipper.update(grads(), state, params(), value=1.0, loss=jnp.ones(3))
    chex.assert_trees_all_equal(plain, extra)


@pytest.mark.one_in(10)
@every_method
def test_metrics_do_not_change_updates(make):
    with_metrics, without = make(0.1), make(0.1, metrics=False)
    assert without.init(params()) == optax.EmptyState()
    first, _ = with_metrics.update(grads(), with_metrics.init(params()), params())
    second, state = without.update(grads(), without.init(params()), params())
    chex.assert_trees_all_equal(first, second)
    assert state == optax.EmptyState()


@pytest.mark.one_in(10)
@every_method
def test_update_without_state_starts_a_fresh_one(make):
    clipper = make(0.1)
    clipped, state = clipper.update(grads(), None, params())
    again, _ = clipper.update(grads(), clipper.init(params()), params())
    chex.assert_trees_all_equal(clipped, again)
    assert int(state.metrics.steps) == 1


@pytest.mark.one_in(10)
@every_method
@pytest.mark.parametrize(
    "empty",
    [
        {},
        [],
        None,
        {"a": None},
        {"a": optax.MaskedNode()},
        {"a": jnp.zeros((0, 3))},
        {"a": np.zeros((2,), jax.dtypes.float0)},
    ],
    ids=["dict", "list", "none", "none_leaf", "masked", "size_0", "float0"],
)
def test_nothing_to_clip_passes_through(make, empty):
    clipper = make(0.1)
    clipped, state = clipper.update(empty, clipper.init(empty), empty)
    assert jax.tree.structure(clipped) == jax.tree.structure(empty)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, empty)
    assert int(state.metrics.steps) == 1
    assert float(state.metrics.norm) == 0


@pytest.mark.one_in(10)
@every_method
def test_leaves_that_pass_through_stand_beside_others(make):
    tree = {**grads(), "none": None, "masked": optax.MaskedNode(), "e": jnp.zeros((0,))}
    full = {
        **params(),
        "none": None,
        "masked": optax.MaskedNode(),
        "e": jnp.zeros((0,)),
    }
    clipper = make(0.1)
    clipped, _ = clipper.update(tree, clipper.init(full), full)
    alone, _ = clipper.update(grads(), clipper.init(params()), params())
    assert clipped["none"] is None
    assert clipped["masked"] == optax.MaskedNode()
    chex.assert_trees_all_close({k: clipped[k] for k in alone}, alone, rtol=1e-3)


@pytest.mark.one_in(10)
@every_method
def test_in_a_chain_with_adam(make):
    optimizer = optax.chain(make(0.1), optax.adam(1e-3))
    tree = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    state = optimizer.init(tree)
    step = jax.jit(optimizer.update)
    with jax.numpy_dtype_promotion("standard"):  # Adam's own bias correction
        for _ in range(2):
            updates, state = step(tree, state, tree)
    chex.assert_tree_all_finite(updates)
    assert float(clipx.metrics(state)["clip/steps"]) == 2


@pytest.mark.one_in(10)
@every_method
def test_vmap_over_models(make):
    clipper = make(0.1)
    tree = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    models = jax.tree.map(lambda x: jnp.stack([x, 100 * x, 0 * x]), tree)
    states = jax.vmap(clipper.init)(models)
    clipped, states = jax.jit(jax.vmap(clipper.update))(models, states, models)
    alone_of = jax.jit(clipper.update)
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], models)
        alone, state = alone_of(one, clipper.init(one), one)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], (clipped, states)),
            (alone, state),
            rtol=1e-5,
        )


@pytest.mark.one_in(10)
@every_method
def test_disable_jit(make):
    clipper = make(0.1)
    tree = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    expected = jax.jit(clipper.update)(tree, clipper.init(tree), tree)
    with jax.disable_jit():
        found = clipper.update(tree, clipper.init(tree), tree)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.one_in(10)
@every_method
def test_complex_leaves_keep_their_phase(make):
    tree = {"w": jnp.array([[3 + 4j, 1j], [2.0, 1 - 1j]], jnp.complex64)}
    clipper = make(0.1)
    try:
        clipped, _ = clipper.update(tree, clipper.init(tree), tree)
    except TypeError as error:
        assert "complex" in str(error)  # noqa: PT017  (the interval's own error)
        return
    kept = np.abs(clipped["w"]) > 0
    chex.assert_trees_all_close(
        np.angle(clipped["w"])[kept], np.angle(tree["w"])[kept], rtol=1e-5
    )
    assert clipped["w"].dtype == jnp.complex64


@pytest.mark.one_in(10)
@every_method
def test_float64(make):
    with jax.enable_x64(True):
        tree = {"w": jnp.ones((3, 4), jnp.float64), "b": jnp.ones(4, jnp.float32)}
        clipper = make(0.1)
        state = clipper.init(tree)
        clipped, new = jax.jit(clipper.update)(tree, state, tree)
        assert clipped["w"].dtype == jnp.float64
        assert clipped["b"].dtype == jnp.float32
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new)


@pytest.mark.one_in(10)
@every_method
def test_inject_hyperparams(make):
    def factory(limit):
        return make(limit)

    clipper = optax.inject_hyperparams(factory)(optax.constant_schedule(0.1))
    tree = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    state = clipper.init(tree)
    step = jax.jit(clipper.update)
    clipped, state = step(tree, state, tree)
    expected, _ = make(0.1).update(tree, None, tree)
    chex.assert_trees_all_close(clipped, expected, rtol=1e-6)
    assert float(clipx.metrics(state)["clip/steps"]) == 1
