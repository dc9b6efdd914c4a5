"""What is remembered of each entry is a tree like the parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stateful
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_clipx as clipx
from optax_clipx.measures import unit_norms

# Each with how many numbers it remembers of an entry.
OF_ENTRIES = {
    "stable_adamw": (clipx.stable_adamw(1e-3), 2),
    "scale_by_stable_adam": (clipx.scale_by_stable_adam(), 2),
    "clip_by_second_moment": (clipx.clip_by_second_moment(), 1),
    "scale_by_acclip": (clipx.scale_by_acclip(), 2),
    "mixed_clip": (clipx.mixed_clip(1.0), 1),
    "normalized_momentum": (clipx.normalized_momentum(), 1),
    "error_feedback": (clipx.error_feedback(clipx.clip_by_global_norm(1.0)), 1),
    "reset_moments": (clipx.reset_moments(clipx.scale_by_acclip()), 2),
}
OF_NORMS = {
    "zclip": clipx.zclip(scope=unit_norms()),
    "quantile_clip": clipx.quantile_clip(scope=unit_norms()),
    "window": clipx.quantile_clip(window=4, scope=unit_norms()),
    "minimum": clipx.clip_by(
        unit_norms(), clipx.thresholds.minimum(clipx.thresholds.zscore(), 3.0)
    ),
    "stabilize_norm": clipx.stabilize_norm(),
    "leaves": clipx.zclip(scope="leaf"),
    "track_norms": clipx.track_norms(optax.identity(), ratios=True),
}
each = pytest.mark.parametrize("name", OF_ENTRIES)


def mapped(tx, state, params):
    """The shapes that map_params takes for a parameter's, beside the parameters'."""
    seen = []
    optax.tree.map_params(
        tx, lambda x, p: seen.append((x.shape, jnp.shape(p))), state, params
    )
    return seen


@pytest.mark.one_in(2)
@each
def test_map_params_visits_every_moment(name):
    tx, times = OF_ENTRIES[name]
    params = stateful.params()
    found = mapped(tx, tx.init(params), params)
    assert found == [((8,), (8,)), ((8, 4), (8, 4)), ((8, 2), (8, 2))] * times


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", OF_NORMS)
def test_map_params_passes_over_norms(name):
    tx, params = OF_NORMS[name], stateful.params()
    state = tx.init(params)
    kept = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(kept) == jax.tree.structure(state)
    assert mapped(tx, state, params) == []


def test_norms_are_tracked_where_there_are_no_leaves():
    tx = clipx.track_norms(optax.identity(), ratios=True)
    _, state = tx.update({}, tx.init({}), {})
    names = ["track/vanishing", "track/exploding", "track/dominant_share"]
    assert sorted(clipx.metrics(state)) == sorted(names)


@pytest.mark.one_in(2)
@each
def test_shapes_are_enough_for_init(name):
    tx, _ = OF_ENTRIES[name]
    params = stateful.params()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert jax.eval_shape(tx.init, params) == jax.eval_shape(lambda: tx.init(shapes))


class Layer(nn.Module):
    """A kernel in a box that says how it is cut, and a bias in none."""

    box: str = "with_partitioning"

    @nn.compact
    def __call__(self, x):
        init = getattr(nn, self.box)(nn.initializers.ones, ("fsdp", None))
        kernel = self.param("kernel", init, (16, 4))
        bias = self.param("bias", nn.initializers.zeros, (4,))
        return x @ kernel + bias[None]


@pytest.mark.one_in(10)
@pytest.mark.parametrize("box", ["with_partitioning", "with_logical_partitioning"])
@each
def test_zero_cuts_the_moments_of_boxed_parameters(name, box):
    """As the recipes of Flax do it for Adam: init with the shardings of its state."""
    tx, times = OF_ENTRIES[name]
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def init_params():
        return Layer(box).init(jax.random.key(0), jnp.ones((2, 16)))

    def init():
        return tx.init(init_params())

    specs = nn.get_partition_spec(jax.eval_shape(init))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, [("fsdp", "fsdp")])
    state = jax.jit(init, out_shardings=shardings)()
    kernels = [x for x in jax.tree.leaves(state) if x.shape == (16, 4)]
    assert [x.addressable_shards[0].data.shape for x in kernels] == [(2, 4)] * times
    params = jax.jit(init_params)()
    _, after = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    bare = nn.unbox(state)  # as MaxText keeps it
    _, after = jax.jit(tx.update)(nn.unbox(params), bare, nn.unbox(params))
    assert jax.tree.structure(after) == jax.tree.structure(bare)


@pytest.mark.one_in(2)
@each
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@jax.numpy_dtype_promotion("standard")
def test_nnx_variables_keep_their_metadata(name):
    tx, times = OF_ENTRIES[name]
    ones = nnx.with_partitioning(nnx.initializers.ones, ("fsdp", None))
    with jax.set_mesh(jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))):
        model = nnx.Linear(16, 4, rngs=nnx.Rngs(0), kernel_init=ones)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        specs = nnx.get_partition_spec(nnx.state(optimizer))
        found = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
        assert found.count(P("fsdp", None)) == times
        grads = jax.tree.map(jnp.ones_like, nnx.state(model))
        nnx.jit(lambda *args: args[0].update(*args[1:]))(optimizer, model, grads)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", sorted(set(OF_ENTRIES) - {"stable_adamw"}))
def test_leaves_without_a_gradient_stay_as_they_are(name):
    """Optax's weight decay, in stable_adamw, refuses their gradients itself."""
    tx, times = OF_ENTRIES[name]
    no_gradient = np.zeros(4, jax.dtypes.float0)
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": None, "c": jnp.arange(4)}
    grads = params | {"c": no_gradient}
    state = tx.init(params)
    updates, after = tx.update(grads, state, params)
    assert updates["b"] is None
    assert updates["c"] is no_gradient
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert mapped(tx, after, params) == [((3,), (3,)), ((4,), (4,))] * times


@pytest.mark.one_in(2)
@each
def test_moments_lie_as_parameters_made_with_explicit_axes_do(name):
    tx, times = OF_ENTRIES[name]
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    params = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("fsdp", None)))
    moments = [x for x in jax.tree.leaves(tx.init(params)) if x.ndim]
    assert [x.sharding.spec for x in moments] == [P("fsdp", None)] * times


def test_a_memory_in_the_layout_of_before_is_named():
    tx = clipx.mixed_clip(1.0)
    old = tx.init(jnp.ones(2))._replace(rule=[jnp.ones(2)])
    with pytest.raises(TypeError, match=r"carry_over\(old_state, tx.init\(params\)\)"):
        tx.update(jnp.ones(2), old)


@pytest.mark.parametrize(
    "limit",
    [3.0, clipx.thresholds.minimum(clipx.thresholds.zscore(), 3.0)],
    ids=["number", "minimum"],
)
def test_specs_made_by_map_params_have_the_structure_of_the_state(limit):
    tx, params = clipx.clip_by(clipx.measures.tree_norm(), limit), stateful.params()
    specs = optax.tree.map_params(
        tx, lambda _: P("x"), tx.init(params), transform_non_params=lambda _: P()
    )
    assert jax.tree.structure(specs) == jax.tree.structure(tx.init(params))
