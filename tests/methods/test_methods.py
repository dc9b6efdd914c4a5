"""Each method against a float64 NumPy reference written from its formula."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optax_clipx as clipx

ORDS = [None, 1, 2, 2.5, np.inf, "rms"]


def tree(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 2, 4), "dense": (5, 4), "bias": (4,), "scale": ()}
    return {
        name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }


def assert_close(found, expected):
    for name, want in expected.items():
        np.testing.assert_allclose(found[name], want.astype(np.float64), rtol=2e-6)


@pytest.mark.parametrize("ord", ORDS)
def test_global_norm(ord):
    grads = tree()
    true = float(reference.norm(list(grads.values()), ord))
    clip = jax.jit(lambda g, limit: clipx.clip_by_global_norm(limit, ord=ord).update(g))
    for limit in (0.1, 1.0, 1e3):
        clipped, state = clip(grads, jnp.float32(limit))
        expected = reference.rescale(list(grads.values()), limit, ord)
        assert_close(clipped, dict(zip(grads, expected, strict=True)))
        found, after = state.metrics, min(true, limit)
        np.testing.assert_allclose(found.norm, true, rtol=1e-6)
        np.testing.assert_allclose(found.clipped_norm, after, rtol=1e-6)
        np.testing.assert_allclose(found.scale, min(1, limit / true), rtol=1e-6)
        assert float(found.threshold) == np.float32(limit)
        assert float(found.clipped) == (true > limit)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("ord", ORDS)
def test_leaf_norm(ord):
    grads = tree()
    clipped, state = clipx.clip_by_leaf_norm(1.5, ord=ord).update(grads)
    expected = {k: reference.rescale([v], 1.5, ord)[0] for k, v in grads.items()}
    assert_close(clipped, expected)
    norms = {k: float(reference.norm([v], ord)) for k, v in grads.items()}
    share = np.mean([n > 1.5 for n in norms.values()])
    np.testing.assert_allclose(state.metrics.clipped, share)
    whole = float(reference.norm(list(grads.values()), ord))
    after = float(reference.norm(list(expected.values()), ord))
    np.testing.assert_allclose(state.metrics.norm, whole, rtol=1e-6)
    np.testing.assert_allclose(state.metrics.clipped_norm, after, rtol=1e-6)
    worst = max(norms.values())
    np.testing.assert_allclose(state.metrics.scale, min(1, 1.5 / worst), rtol=1e-6)


def test_leaf_norm_of_stacked_layers():
    grads = {"layers": tree()["conv"], "bias": tree()["bias"]}
    batch_axes = lambda path, leaf: (0, 1) if path == ("layers",) else None  # noqa: E731
    clipper = clipx.clip_by_leaf_norm(1.0, batch_axes=batch_axes)
    clipped, _ = jax.jit(clipper.update)(grads)
    layers = np.asarray(grads["layers"])
    for i in range(3):
        for j in range(3):
            (want,) = reference.rescale([layers[i, j]], 1.0)
            np.testing.assert_allclose(
                clipped["layers"][i, j], want.astype(np.float64), rtol=2e-6
            )


def test_block_rms():
    grads = tree()
    clipped, _ = clipx.clip_by_block_rms(0.5).update(grads)
    expected = {k: reference.rescale([v], 0.5, "rms")[0] for k, v in grads.items()}
    assert_close(clipped, expected)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("ord", ORDS)
def test_group_norm(ord):
    grads = tree()
    labels = {"conv": "matrix", "dense": "matrix", "bias": "vector", "scale": "vector"}
    limits = {"matrix": 2.0, "vector": 0.5}
    by_function = lambda path, leaf: labels[path[0]]  # noqa: E731
    for given in (labels, by_function):
        clipped, state = clipx.clip_by_group_norm(limits, given, ord=ord).update(grads)
        expected = {}
        for label, limit in limits.items():
            names = [k for k in grads if labels[k] == label]
            found = reference.rescale([grads[k] for k in names], limit, ord)
            expected |= dict(zip(names, found, strict=True))
        assert_close(clipped, expected)
        whole = float(reference.norm(list(grads.values()), ord))
        np.testing.assert_allclose(state.metrics.norm, whole, rtol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("axis", [None, -1, "by_path"])
@pytest.mark.parametrize("clipping", [0.01, 0.3])
def test_adaptive(axis, clipping):
    grads, params = tree(0), tree(1, 0.1)
    grads.pop("scale"), params.pop("scale")
    params["dense"] = params["dense"].at[:, 0].set(0.0)  # a unit that starts at zero
    by_path = lambda path, leaf: (0, 1) if path == ("conv",) else -1  # noqa: E731
    given = by_path if axis == "by_path" else axis
    clipper = clipx.adaptive_grad_clip(clipping, eps=1e-2, axis=given)
    clipped, state = jax.jit(clipper.update)(grads, clipper.init(params), params)
    expected = {}
    for name, grad in grads.items():
        axes = given((name,), grad) if callable(given) else given
        axes = reference.optax_unit_axes(grad.shape) if axes is None else axes
        expected[name] = reference.adaptive(grad, params[name], clipping, 1e-2, axes)
    assert_close(clipped, expected)
    whole = float(reference.norm(list(grads.values())))
    np.testing.assert_allclose(state.metrics.norm, whole, rtol=1e-6)


def test_value():
    grads = tree()
    clipped, state = clipx.clip_by_value(-0.5, 1.0).update(grads)
    expected = {
        k: np.clip(np.asarray(v, np.float64), -0.5, 1) for k, v in grads.items()
    }
    for name, want in expected.items():
        np.testing.assert_array_equal(clipped[name], want.astype(np.float32))
    entries = np.concatenate([np.ravel(v) for v in grads.values()])
    outside = np.mean((entries < -0.5) | (entries > 1.0))
    np.testing.assert_allclose(state.metrics.clipped, outside, rtol=1e-6)
    before, after = (float(reference.norm(list(t.values()))) for t in (grads, expected))
    np.testing.assert_allclose(state.metrics.norm, before, rtol=1e-6)
    np.testing.assert_allclose(state.metrics.clipped_norm, after, rtol=1e-6)
    np.testing.assert_allclose(state.metrics.scale, after / before, rtol=1e-6)


def test_value_with_bounds_for_each_leaf_and_a_schedule():
    grads = {"a": jnp.array([5.0, -5.0]), "b": {"c": jnp.array([5.0, -5.0])}}
    clipper = clipx.clip_by_value(
        {"a": -1.0, "b": optax.linear_schedule(-2.0, -4.0, 2)}, {"a": 2.0, "b": 3.0}
    )
    state = clipper.init(grads)
    for low in (-2.0, -3.0, -4.0):
        clipped, state = clipper.update(grads, state)
        np.testing.assert_array_equal(clipped["a"], [2.0, -1.0])
        np.testing.assert_array_equal(clipped["b"]["c"], [3.0, low])


RESPONSES = {
    "rescale": (clipx.responses.rescale, lambda n, t: min(1, t / n)),
    "normalize": (clipx.responses.normalize, lambda n, t: t / n),
    "smooth": (clipx.responses.smooth, lambda n, t: 1 / (1 + n / t)),
    "smooth_2": (
        lambda n, t: clipx.responses.smooth(n, t, p=2.0),
        lambda n, t: 1 / np.sqrt(1 + (n / t) ** 2),
    ),
    "drop": (clipx.responses.drop, lambda n, t: float(n <= t)),
    "biweight": (
        clipx.responses.biweight,
        lambda n, t: max(0, 1 - (n / t) ** 2) ** 2,
    ),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(name):
    response, formula = RESPONSES[name]
    measure = clipx.measures.tree_norm()
    clip = jax.jit(lambda g, limit: clipx.clip_by(measure, limit, response).update(g))
    for limit, size in itertools.product((1e-30, 0.3, 3.0, 1e5), (1e-12, 1.0, 1e12)):
        grads = tree(scale=size)
        clipped, state = clip(grads, jnp.float32(limit))
        norm = float(reference.norm(list(grads.values())))
        scale = formula(norm, limit)
        for key, grad in grads.items():
            want = np.asarray(grad, np.float64) * scale
            np.testing.assert_allclose(clipped[key], want, rtol=2e-6, atol=1e-38)
        np.testing.assert_allclose(state.metrics.clipped_norm, norm * scale, rtol=2e-6)


@pytest.mark.parametrize(
    "response",
    [
        *(clipx.responses.normalize, clipx.responses.smooth),
        *(clipx.responses.drop, clipx.responses.biweight),
    ],
)
def test_responses_of_single_entries(response):
    grads = tree()
    clipper = clipx.clip_by(clipx.measures.magnitudes(), 0.5, response)
    clipped, _ = jax.jit(clipper.update)(grads)
    for name, grad in grads.items():
        n = np.abs(np.asarray(grad)).ravel()
        scales = jax.jit(response)(n, np.full(n.shape, 0.5, np.float32))
        want = grad * np.reshape(scales, grad.shape)
        np.testing.assert_allclose(clipped[name], want, rtol=1e-6)


def test_pytorch_coefficient():
    golden = np.load("tests/golden/inputs.npz")
    for limit in ("1.0", "5.0"):
        trace = np.load(f"tests/golden/torch_clip_grad_norm_{limit}.npz")
        step = jax.jit(clipx.clip_by_global_norm(float(limit), eps=1e-6).update)
        for t in range(80):
            clipped, _ = step([golden[f"g{i}"][t] for i in range(3)])
            for i in range(3):
                np.testing.assert_allclose(clipped[i], trace[f"u{i}"][t], rtol=1e-5)


@pytest.mark.parametrize("make", [clipx.clip_by_leaf_norm, clipx.clip_by_block_rms])
def test_a_schedule_counts_updates_from_zero(make):
    schedule = lambda count: 4.0 / jnp.asarray(2**count, jnp.float32)  # noqa: E731
    for metrics in (True, False):
        clipper = make(schedule, metrics=metrics)
        grads = {"w": jnp.array([100.0])}
        state = clipper.init(grads)
        for limit in (4.0, 2.0, 1.0):
            clipped, state = jax.jit(clipper.update)(grads, state)
            np.testing.assert_allclose(clipped["w"], [limit], rtol=1e-6)


def test_a_limit_for_each_leaf():
    grads = {
        "a": jnp.array([10.0]),
        "b": {"c": jnp.array([10.0]), "d": jnp.array([1.0])},
    }
    limits = {"a": 2.0, "b": optax.constant_schedule(3.0)}
    clipped, _ = clipx.clip_by_leaf_norm(limits).update(grads)
    assert [float(x[0]) for x in jax.tree.leaves(clipped)] == [2.0, 3.0, 1.0]
    masked = {"a": None, "b": {"c": optax.MaskedNode(), "d": jnp.array([9.0])}}
    clipped, _ = clipx.clip_by_leaf_norm(limits).update(masked)
    assert float(clipped["b"]["d"][0]) == 3.0


def test_a_norm_computed_elsewhere():
    grads = tree()
    clipper = clipx.clip_by_global_norm(1.0)
    clipped, state = jax.jit(clipper.update)(grads, clipper.init(grads), norm=10.0)
    for name, grad in grads.items():
        np.testing.assert_allclose(clipped[name], grad / 10.0, rtol=1e-6)
    assert float(state.metrics.norm) == 10.0
    renamed = clipx.clip_by_global_norm(1.0, norm_arg="total")
    again, _ = renamed.update(grads, renamed.init(grads), total=10.0, norm=3.0)
    np.testing.assert_allclose(again["dense"], clipped["dense"], rtol=1e-6)
    lost, state = clipper.update(grads, clipper.init(grads), norm=jnp.nan)
    assert np.all(np.isnan(lost["dense"]))
    with pytest.raises(ValueError, match="scalar"):
        clipper.update(grads, clipper.init(grads), norm=jnp.ones(2))


def test_relative_to_params_for_whole_leaves():
    grads, params = {"w": jnp.array([30.0, 40.0])}, {"w": jnp.array([6.0, 8.0])}
    rule = clipx.thresholds.relative_to_params(
        optax.linear_schedule(0.5, 1.0, 1), eps=1e-3
    )
    for measure in (clipx.measures.tree_norm(), clipx.measures.leaf_norms()):
        clipper = clipx.clip_by(measure, rule)
        state = clipper.init(params)
        for limit in (5.0, 10.0):
            clipped, state = clipper.update(grads, state, params)
            norm = float(jnp.linalg.norm(clipped["w"]))
            np.testing.assert_allclose(norm, limit, rtol=1e-6)


@pytest.mark.slow
def test_functions_return_what_the_transformations_do():
    grads, params = tree(), tree(1)
    f = clipx.functional
    pairs = [
        (f.clip_by_leaf_norm(grads, 1.0)[0], clipx.clip_by_leaf_norm(1.0)),
        (f.clip_by_global_norm(grads, 1.0)[0], clipx.clip_by_global_norm(1.0)),
        (f.clip_by_value(grads, -1.0, 0.5), clipx.clip_by_value(-1.0, 0.5)),
        (f.adaptive_grad_clip(grads, params, 0.1)[0], clipx.adaptive_grad_clip(0.1)),
    ]
    for found, clipper in pairs:
        expected, _ = clipper.update(grads, clipper.init(params), params)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    given, norm = f.clip_by_global_norm(grads, 1.0, norm=4.0)
    np.testing.assert_allclose(given["dense"], grads["dense"] / 4, rtol=1e-6)
    assert float(norm) == 4.0


def test_norm_functions():
    grads = tree()
    f = clipx.functional
    whole = float(reference.norm(list(grads.values())))
    np.testing.assert_allclose(f.global_norm(grads), whole, rtol=1e-6)
    for name, norm in f.leaf_norms(grads, ord=1).items():
        np.testing.assert_allclose(
            norm, float(reference.norm([grads[name]], 1)), rtol=1e-6
        )
    for name, norm in f.unit_norms(grads).items():
        axes = reference.optax_unit_axes(grads[name].shape)
        want = reference.unit_norms(grads[name], axes).astype(np.float64)
        np.testing.assert_allclose(norm, want, rtol=1e-6)
    norms = f.group_norms(grads, lambda path, leaf: leaf.ndim)
    assert list(norms) == [0, 1, 2, 4]
    np.testing.assert_allclose(
        norms[2], float(reference.norm([grads["dense"]])), rtol=1e-6
    )
    assert float(f.global_norm({})) == 0
    assert float(f.leaf_norms({"e": jnp.zeros((0,))})["e"]) == 0


def test_measures_are_functions_of_a_pytree():
    grads = tree()
    assert float(clipx.measures.tree_norm()(grads)) == float(
        clipx.functional.global_norm(grads)
    )
    magnitudes = clipx.measures.magnitudes()(grads)
    np.testing.assert_array_equal(magnitudes["dense"], np.abs(grads["dense"]))
    stacked = clipx.measures.leaf_norms(batch_axes=0)({"w": grads["dense"]})
    assert stacked["w"].shape == (5, 1)
