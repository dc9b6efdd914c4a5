"""One of several ways to compute the same, taken when the platform is known."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from optax_clipx._devices.platforms import Ways, by_platform

X = jnp.array([1.0, 2.0])


def ways(traced):
    """The same number in three ways, which say that they were traced."""

    def way(name, number):
        def double(x):
            traced.append(name)
            return number * x

        return double

    return Ways(way("cpu", 2.0), way("tpu", 3.0), way("others", 4.0))


@pytest.mark.parametrize(
    ("platform", "name", "number"),
    [
        ("cpu", "cpu", "2.0"),
        ("tpu", "tpu", "3.0"),
        ("cuda", "others", "4.0"),
        ("rocm", "others", "4.0"),
    ],
)
def test_only_the_way_of_the_platform_is_traced(platform, name, number):
    traced = []
    program = jax.jit(lambda x: by_platform(ways(traced), x, x)).trace(X)
    assert traced == []
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert traced == [name]
    assert f"dense<{number}" in text


def test_a_program_for_two_platforms_has_both():
    program = jax.jit(lambda x: by_platform(ways([]), x, x))
    text = export.export(program, platforms=("cpu", "tpu"))(X).mlir_module()
    assert "dense<2.0" in text
    assert "dense<3.0" in text


def test_inside_a_way_the_platform_is_known():
    traced = []

    def outer(x):
        return by_platform(ways(traced), x)

    nested = Ways(outer, outer, outer)
    assert jax.jit(lambda x: by_platform(nested, x, x))(X).tolist() == [2.0, 4.0]
    assert traced == ["cpu"]


@pytest.mark.parametrize(
    ("around", "want"),
    [
        (lambda f: jax.vmap(f), [2.0, 4.0]),
        (lambda f: jax.grad(lambda x: f(x).sum()), [2.0, 2.0]),
        (lambda f: lambda x: jax.jvp(f, (x,), (x,))[1], [2.0, 4.0]),
        (lambda f: f, [2.0, 4.0]),
    ],
    ids=["vmap", "grad", "jvp", "eager"],
)
def test_it_is_mapped_and_differentiated_as_the_function(around, want):
    run = around(lambda x: by_platform(ways([]), x, x))
    assert run(X).tolist() == want
    assert jax.jit(run)(X).tolist() == want


def test_on_a_mesh_all_ways_are_traced():
    mesh = jax.make_mesh((1,), ("x",))
    traced = []
    with jax.set_mesh(mesh):
        jax.jit(lambda x: by_platform(ways(traced), x, x)).trace(X)
    assert sorted(traced) == ["cpu", "others", "tpu"]
