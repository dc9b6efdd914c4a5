"""Below a finite limit the response decides; an infinite one changes nothing."""

import functools

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import optax_clipx as clipx

UPDATES = jnp.array([3.0, 4.0])
RESPONSES = {
    "rescale": (clipx.responses.rescale, [3.0, 4.0]),
    "drop": (clipx.responses.drop, [3.0, 4.0]),
    "normalize": (clipx.responses.normalize, [60.0, 80.0]),
    "biweight": (clipx.responses.biweight, [2.985019, 3.980025]),
    "smooth": (functools.partial(clipx.responses.smooth, p=1.0), [2.857143, 3.809524]),
}


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("name", RESPONSES)
def test_below_a_finite_limit(name):
    response, want = RESPONSES[name]
    clipper = clipx.clip_by(clipx.measures.tree_norm(), 100.0, response)
    assert_allclose(clipper.update(UPDATES)[0], want, rtol=1e-6)


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize(
    "measure", [clipx.measures.tree_norm(), clipx.measures.magnitudes()]
)
def test_an_infinite_limit_changes_nothing(measure, name):
    response, _ = RESPONSES[name]
    clipper = clipx.clip_by(measure, jnp.inf, response)
    assert_array_equal(clipper.update(UPDATES)[0], UPDATES)


@pytest.mark.parametrize(("limit", "want"), [(100.0, [60, 80]), (jnp.inf, [3, 4])])
def test_clipped_grad_does_the_same(limit, want):
    grad_fn = clipx.per_example.clipped_grad(
        jnp.vdot, limit, response=clipx.responses.normalize
    )
    assert_allclose(grad_fn(jnp.zeros(2), UPDATES[None])[0], want, rtol=1e-6)


REFUSE_COMPLEX = {
    "clip_by_second_moment": clipx.clip_by_second_moment(2.0),
    "clip_by_spectral_norm": clipx.clip_by_spectral_norm(1.0),
    "clip_by_value": clipx.clip_by_value(-1.0, 1.0),
    "scale_by_stable_adam": clipx.scale_by_stable_adam(),
    "stable_adamw": clipx.stable_adamw(0.1),
    "stabilize_norm": clipx.stabilize_norm(),
    "scale_by_acclip": clipx.scale_by_acclip(),
}


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("name", REFUSE_COMPLEX)
def test_what_refuses_complex_leaves_says_so(name):
    updates = jnp.array([1.0 + 1.0j])
    optimizer = REFUSE_COMPLEX[name]
    with pytest.raises(TypeError, match="real updates"):
        optimizer.update(updates, optimizer.init(jax.typeof(updates)), updates)
    raises = getattr(clipx, name).__doc__.split("Raises:")[1].split("Example:")[0]
    assert "complex leaves" in " ".join(raises.split())
