"""A clipper beside `optax.contrib.muon`: whose steps a spike in one leaf changes."""

import enum
import math
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from optax.contrib import muon

import optax_clipx as clipx

SHAPES = {"kernel": (16, 8), "head": (8, 4), "bias": (8,), "scale": (8,)}
OTHERS = ("bias", "scale")  # what Muon leaves to Adam
PARAMS = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
# Older versions of optax orthogonalize matrices alone.
MuonDimensionNumbers = getattr(
    optax.contrib,
    "MuonDimensionNumbers",
    namedtuple("Numbers", "reduction_axis output_axis", defaults=(0, 1)),
)
HAS_NUMBERS = pytest.mark.skipif(
    not hasattr(optax.contrib, "MuonDimensionNumbers"),
    reason="Optax before 0.2.6 has no dimension numbers for Muon",
)
LIMIT = clipx.clip_by_global_norm(1.0)


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's optimizers rely on it
        yield


def noise(seed):
    return np.random.default_rng(seed).normal(size=(16, 8))


def gradients(step=0, spike=False):
    """Usual gradients, with a part that stays and one that changes."""
    same, other = np.random.default_rng(999), np.random.default_rng(step)
    grads = {
        name: 0.01 * (same.normal(size=shape) + other.normal(size=shape))
        for name, shape in SHAPES.items()
    }
    if spike:
        grads["kernel"] = noise(7) / np.linalg.norm(noise(7)) * 1e8
    return {name: jnp.asarray(x, jnp.float32) for name, x in grads.items()}


def first_updates(tx, place=lambda tree: tree):
    """The updates of a first step without and with the spike."""
    params = place(PARAMS)
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    both = [update(place(gradients(spike=s)), state, params)[0] for s in (False, True)]
    return [jax.tree.map(np.asarray, updates) for updates in both]


def times_smaller(tx, **options):
    """By how much the spike makes the steps of Adam's leaves smaller."""
    usual, spiked = first_updates(tx, **options)
    norms = [[np.linalg.norm(x[name]) for name in OTHERS] for x in (usual, spiked)]
    return np.divide(*norms)


def largest_change(tx, **options):
    usual, spiked = first_updates(tx, **options)
    return max(np.max(np.abs(spiked[name] / usual[name] - 1)) for name in OTHERS)


def in_front(clipper):
    return optax.chain(clipper, muon(1e-2))


def test_a_spike_in_muons_leaf_starves_the_others_in_one_norm():
    assert np.all(times_smaller(in_front(LIMIT)) >= 50)


def test_a_spike_in_muons_leaf_changes_no_other_leaf_without_it():
    tx = in_front(clipx.excluding(LIMIT, clipx.muon_leaves))
    assert largest_change(tx) <= 1e-6


def labels(params):
    return jax.tree.map(lambda x: "muon" if x.ndim == 2 else "adam", params)


def test_clipping_inside_the_adam_branch_does_the_same():
    adam = optax.chain(LIMIT, optax.adamw(1e-2))
    tx = optax.partition({"muon": muon(1e-2), "adam": adam}, labels)
    assert largest_change(tx) <= 1e-6


PLACES = {
    "auto": {"kernel": P("x"), "head": P(), "bias": P("x"), "scale": P()},
    # Muon itself multiplies matrices, which optax cannot do along Explicit axes.
    "explicit": {"kernel": P(), "head": P(), "bias": P("x"), "scale": P()},
}


@pytest.mark.one_in(3, rest="slow")
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("shape", [(8,), (4, 2)])
def test_on_a_mesh(kind, shape):
    axes = (AxisType.Auto if kind == "auto" else AxisType.Explicit,) * len(shape)
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=axes)
    specs = dict(PLACES[kind])
    if kind == "auto" and len(shape) == 2:
        specs["kernel"] = P("x", "y")

    def place(tree):
        return {
            k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in tree.items()
        }

    excluded = in_front(clipx.excluding(LIMIT, clipx.muon_leaves))
    with jax.set_mesh(mesh):
        assert largest_change(excluded, place=place) <= 1e-6
        assert np.all(times_smaller(in_front(LIMIT), place=place) >= 50)


def steps_until_back(clipper, spike_at=5, steps=400):
    """How long after a spike in it Muon's leaf goes in another direction.

    And by how much the step with the spike is larger.
    """
    usual, spiked = (
        jax.tree.map(
            lambda *x: np.stack(x),
            *[gradients(i, spike=s and i == spike_at) for i in range(steps)],
        )
        for s in (False, True)
    )
    tx = in_front(clipper)

    def step(state, grads):
        updates, state = tx.update(grads, state, PARAMS)
        return state, updates["kernel"].ravel()

    run = jax.jit(lambda grads: jax.lax.scan(step, tx.init(PARAMS), grads)[1])
    one, other = np.asarray(run(usual)), np.asarray(run(spiked))
    sizes = [np.linalg.norm(x, axis=1) for x in (one, other)]
    cosine = np.sum(one * other, axis=1) / sizes[0] / sizes[1]
    different = np.flatnonzero(cosine < 0.9)
    return different[-1] + 1 - spike_at, sizes[1][spike_at] / sizes[0][spike_at]


def test_the_step_of_muons_own_leaf_is_as_large_and_goes_astray():
    """Momentum of decay 0.95 forgets 1e8 in 360 steps: log(1e8) / -log(0.95)."""
    steps, larger = steps_until_back(clipx.excluding(LIMIT, clipx.muon_leaves))
    assert 340 <= steps <= 380
    assert 0.9 <= larger <= 1.1


def for_others(path, leaf):
    return not clipx.muon_leaves(path, leaf)


def test_clipping_muons_leaves_one_by_one_brings_it_back():
    clipper = optax.chain(
        clipx.excluding(LIMIT, clipx.muon_leaves),
        clipx.excluding(clipx.clip_by_leaf_norm(1.0), for_others),
    )
    steps, _ = steps_until_back(clipper, steps=60)
    assert 2 <= steps <= 15
    assert largest_change(in_front(clipper)) <= 1e-6


class Kind(enum.Enum):
    MUON = 1
    ADAM = 2


NUMBERS = MuonDimensionNumbers()
TREE = {"a": {"w": jnp.full((2, 2), 3.0), "b": jnp.array([3.0, 4.0])}, "c": jnp.ones(1)}


def dimensions(params):
    return jax.tree.map(lambda x: NUMBERS if x.ndim == 2 else None, params)


WAYS = {
    "muon_leaves": (clipx.muon_leaves, {}),
    "mask": ({"a": {"w": True, "b": False}, "c": False}, {}),
    "numpy_mask": ({"a": {"w": np.bool_(True), "b": False}, "c": False}, {}),
    "labels": ({"a": {"w": "muon", "b": "adam"}, "c": "adam"}, {}),
    "label_function": (labels, {}),
    "own_labels": ({"a": {"w": "x", "b": "y"}, "c": "z"}, {"label": "x"}),
    "several": ({"a": {"w": "x", "b": "y"}, "c": "z"}, {"label": ("x", "w")}),
    "enum": (
        {"a": {"w": Kind.MUON, "b": Kind.ADAM}, "c": Kind.ADAM},
        {"label": Kind.MUON},
    ),
    "dimensions": ({"a": {"w": NUMBERS, "b": None}, "c": None}, {}),
    "dimension_function": (dimensions, {}),
    "mask_function": (lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree), {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("jitted", [False, True])
def test_each_way_to_say_which_leaves(way, jitted):
    where, options = WAYS[way]
    tx = clipx.excluding(clipx.clip_by_global_norm(1.0), where, **options)
    update = jax.jit(tx.update) if jitted else tx.update
    clipped, state = update(TREE, tx.init(TREE))
    assert float(clipx.metrics(state)["clip/norm"]) == pytest.approx(math.sqrt(26))
    np.testing.assert_array_equal(clipped["a"]["w"], TREE["a"]["w"])
    np.testing.assert_allclose(clipped["a"]["b"], [3 / 26**0.5, 4 / 26**0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("here", "there"), [(True, False), ("muon", "adam"), (NUMBERS, None)]
)
def test_a_pytree_may_be_a_prefix(here, there):
    tx = clipx.excluding(clipx.clip(0.5), {"a": here, "c": there})
    clipped, _ = tx.update(TREE, tx.init(TREE))
    np.testing.assert_array_equal(clipped["a"]["b"], [3.0, 4.0])
    assert float(clipped["c"][0]) == 0.5


@HAS_NUMBERS
def test_dimension_numbers_name_leaves_of_any_rank():
    """Muon's own argument excludes a stack of matrices, and lets an embedding be."""
    params = {"experts": jnp.ones((4, 8, 8)), "embedding": jnp.ones((8, 4))}

    def numbers(params):
        return {"experts": MuonDimensionNumbers(1, 2), "embedding": None}

    tx = optax.chain(
        clipx.excluding(clipx.clip_by_leaf_norm(1.0), numbers),
        muon(1e-2, muon_weight_dimension_numbers=numbers),
    )
    grads = jax.tree.map(lambda x: 3.0 * x, params)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert float(clipx.metrics(state)["clip/norm"]) == pytest.approx(3 * 32**0.5)


def shares(tx, spike):
    tx = clipx.track_norms(tx)
    _, state = jax.jit(tx.update)(gradients(spike=spike), tx.init(PARAMS), PARAMS)
    return clipx.metrics(state).get("track/muon_share")


def test_the_share_of_muons_leaves_in_the_norm():
    assert float(shares(in_front(LIMIT), spike=True)) == 1.0
    grads = gradients()
    squares = {name: np.sum(np.square(x)) for name, x in grads.items()}
    want = (squares["kernel"] + squares["head"]) / sum(squares.values())
    assert float(shares(in_front(LIMIT), spike=False)) == pytest.approx(want)


def test_the_share_of_muons_leaves_in_a_norm_without_them_is_unknown():
    tx = in_front(clipx.excluding(LIMIT, clipx.muon_leaves))
    assert np.isnan(shares(tx, spike=False))


@pytest.mark.parametrize(
    "tx", [in_front(clipx.clip_by_leaf_norm(1.0)), optax.chain(LIMIT, optax.adam(1.0))]
)
def test_without_muon_or_a_norm_of_all_there_is_no_such_share(tx):
    assert shares(tx, spike=False) is None


@HAS_NUMBERS
def test_the_share_of_muons_layers():
    tx = clipx.track_norms(
        optax.chain(
            LIMIT,
            optax.partition(
                {
                    "m": muon(
                        1e-2, muon_weight_dimension_numbers=MuonDimensionNumbers(1, 2)
                    ),
                    "a": optax.adam(1e-2),
                },
                {"w": "m", "b": "a"},
            ),
        ),
        batch_axes={"w": 0, "b": ()},
    )
    grads = {"w": jnp.ones((3, 2, 2)), "b": jnp.ones(4)}
    _, state = tx.update(grads, tx.init(grads), grads)
    assert float(clipx.metrics(state)["track/muon_share"]) == 0.75


def test_in_nnx():
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    tx = optax.chain(clipx.excluding(LIMIT, clipx.muon_leaves), muon(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3))) * 10))(model)
    optimizer.update(model, grads)
    norm = clipx.metrics(optimizer.opt_state)["clip/norm"]
    np.testing.assert_allclose(norm, 10 * 3**0.5, rtol=1e-6)  # of the bias alone


def test_labels_of_none_of_the_leaves_are_a_mistake():
    with pytest.raises(ValueError, match=r"'adamw'.*fits none of: a/b, a/w, c"):
        clipx.excluding(LIMIT, {"a": "adamw", "c": "adam"}).init(TREE)


def test_a_leaf_that_a_mask_leaves_out_is_named():
    with pytest.raises(ValueError, match=r"in where= for every leaf, got none for c"):
        clipx.excluding(LIMIT, {"a": True}).init(TREE)


@pytest.mark.parametrize("where", [3, {"a": 0.5, "c": True}, {}, ()])
def test_what_says_nothing_of_leaves_is_refused(where):
    with pytest.raises(TypeError, match="Expected where to be a name"):
        clipx.excluding(LIMIT, where)


def test_a_function_that_returns_something_else_is_refused():
    tx = clipx.excluding(LIMIT, lambda tree: jax.tree.map(lambda x: x.ndim, tree))
    with pytest.raises(TypeError, match="Expected where to be a name"):
        tx.init(TREE)
