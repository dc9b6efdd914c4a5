"""A few numbers from a few numbers, in one kernel on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from xla_settings import OWN

import optax_clipx as clipx
from optax_clipx._devices.numbers import FEW, _from_one_vector, as_one


def numbers(x, y, count):
    """A float of two, a flag, a count that goes on, and one that comes out again."""
    return {"root": jnp.sqrt(x) + y, "over": x > y, "count": count + 1, "y": y}


def given():
    return jnp.float32(4.0), jnp.float32(3.0), jnp.int32(7)


@pytest.mark.parametrize("around", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_numbers_are_those_of_the_function(around):
    found = around(lambda *args: as_one(numbers, *args))(*given())
    assert found["root"] == 5.0
    assert bool(found["over"])
    assert found["count"] == 8
    assert found["y"] == 3.0


def from_one_vector(fun, *args):
    """As for GPUs, here on CPU."""
    return _from_one_vector(jax.make_jaxpr(fun)(*args), *args)


def test_numbers_that_lie_in_one_vector_are_the_same():
    def fun(x, count, y, flag):
        return x + 1, count, y * 2, flag, x, np.float32(0.5), np.int32(2)

    args = (jnp.float32(4.0), jnp.int32(7), jnp.array([1.0, 3.0]), jnp.bool_(True))
    found = jax.jit(functools.partial(from_one_vector, fun))(*args)
    x, count, y, flag, same, half, two = found
    assert (x, count, flag, same, half, two) == (5.0, 7, True, 4.0, 0.5, 2)
    np.testing.assert_array_equal(y, [2.0, 6.0])


@pytest.mark.parametrize("number", [0.0, -0.0, np.inf, np.nan, 1e-40, -3.5])
def test_a_number_that_comes_out_as_it_went_in_is_the_same(number):
    step = jax.jit(functools.partial(from_one_vector, lambda x, y: (x, x + y)))
    found, _ = step(jnp.float32(number), jnp.float32(1))
    np.testing.assert_array_equal(found, np.float32(number))
    assert np.signbit(found) == np.signbit(number)


def test_integers_alone_are_not_put_into_a_vector():
    fun = functools.partial(from_one_vector, lambda x, y: (x + 1, y))
    x, y = jax.jit(fun)(jnp.int32(4), jnp.int32(7))
    assert (x, y) == (5, 7)
    text = jax.jit(fun).lower(jnp.int32(4), jnp.int32(7)).as_text()
    assert "concatenate" not in text


def test_integers_do_not_go_along_with_one_array():
    fun = functools.partial(from_one_vector, lambda x, y: (x + 1, y + 1))
    x, y = jax.jit(fun)(jnp.float32(4), jnp.int32(7))
    assert (x, y) == (5, 8)


def test_a_known_number_comes_out_of_the_vector():
    """A constant would be copied by a kernel of its own."""

    def fun(x, y):
        return as_one(lambda x, y: (x + y, np.float32(0.5)), x, y)

    given = (jnp.float32(4), jnp.float32(1))
    text = jax.jit(fun).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert "tensor<3xi32>" in text
    assert jax.jit(fun)(*given)[1] == 0.5


def test_two_numbers_are_not_put_into_a_vector():
    traced = jax.jit(lambda x, y: as_one(jnp.add, x, y)).trace(*given()[:2])
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "concatenate" not in text


def test_gpus_read_one_vector_and_tpus_the_numbers():
    traced = jax.jit(lambda *args: as_one(numbers, *args)).trace(*given())
    for platform, joined in (("cuda", True), ("rocm", True), ("tpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.concatenate" in text) == joined
        assert "stablehlo.while" not in text


def test_a_nan_comes_out_as_one():
    found = jax.jit(lambda *args: as_one(numbers, *args))(
        jnp.float32(np.nan), jnp.float32(3.0), jnp.int32(7)
    )
    assert np.isnan(found["root"])
    assert found["count"] == 8


def test_a_float_made_of_a_count_alone():
    found = jax.jit(lambda n: as_one(lambda n: n.astype(jnp.float32) / 2, n))
    assert found(jnp.int32(3)) == 1.5


def test_derivatives_of_both_orders_and_of_what_is_closed_over():
    def fun(x, factor):
        return as_one(lambda x: {"y": factor * x**3}, x)["y"]

    args = (jnp.float32(2.0), jnp.float32(5.0))
    assert jax.jit(jax.grad(fun))(*args) == 60.0
    assert jax.jit(jax.grad(fun, argnums=1))(*args) == 8.0
    assert jax.jit(jax.grad(jax.grad(fun)))(*args) == 60.0


def test_a_derivative_beside_counts_and_flags():
    def fun(x, count):
        found = as_one(numbers, x, jnp.float32(3.0), count)
        return found["root"], (found["count"], found["over"])

    slope, (count, over) = jax.jit(jax.grad(fun, has_aux=True))(4.0, jnp.int32(7))
    assert (slope, count, bool(over)) == (0.25, 8, True)


def test_over_a_batch_each_has_its_own():
    x = jnp.array([1.0, np.nan, 9.0])
    found = jax.jit(jax.vmap(lambda x: as_one(jnp.sqrt, x)))(x)
    np.testing.assert_array_equal(found, [1.0, np.nan, 3.0])


def is_in_a_loop(fun, *args):
    return "stablehlo.while" in jax.jit(fun).lower(*args).as_text()


def test_what_xla_cannot_put_into_a_small_loop_is_called_as_it_is():
    def fun(x):
        return jnp.sort(jnp.stack([x, -x])), jax.lax.cond(x > 0, jnp.sin, jnp.cos, x)

    def product(x):
        return jnp.stack([x, x]) @ jnp.ones(2)

    for each in (fun, product, jnp.sin):
        assert not is_in_a_loop(functools.partial(as_one, each), jnp.float32(1))
    assert is_in_a_loop(functools.partial(as_one, jnp.sqrt), jnp.float32(1))


def test_no_number_that_a_loop_could_watch():
    found = jax.jit(functools.partial(as_one, lambda n: n + 1))(jnp.int32(3))
    assert found == 4


def test_many_numbers_are_computed_without_a_loop():
    def fun(x):
        return as_one(lambda x: (jnp.sqrt(x), jnp.sum(x)), x)

    most = (FEW - 1) // 2
    for size, is_one in ((most, True), (most + 1, False)):
        x = jnp.full((size,), 4.0)
        assert is_in_a_loop(fun, x) == is_one
        root, total = jax.jit(fun)(x)
        np.testing.assert_array_equal(root, 2.0)
        assert total == 4 * size


def test_xla_compiles_the_loop_as_one():
    x = [jnp.float32(i) for i in range(20)]
    step = jax.jit(lambda x: as_one(lambda x: [jnp.sqrt(i) + x[0] for i in x], x))
    text = step.lower(x).compile(OWN).as_text()
    entry = text[text.index("ENTRY ") :]
    assert "while(" not in entry
    assert entry.count(" call(") == 1
    for i, found in enumerate(step(x)):
        np.testing.assert_allclose(found, i**0.5, rtol=1e-6)


UNUSED = {  # in the end: an argument that XLA finds to be without use
    "times zero": lambda x, y, n: (x + 1, n * 0),
    "never chosen": lambda x, y, n: jnp.where(jnp.float32(1) > 0, x, y),
    "minus itself": lambda x, y, n: (x + 1, n - n),
    "equal to itself": lambda x, y, n: (x + 1, n == n),
    "not read": lambda x, y, n: x * y,
}


@pytest.mark.parametrize("fun", UNUSED.values(), ids=UNUSED.keys())
@pytest.mark.parametrize("around", [jax.jit, jax.pmap], ids=["jit", "pmap"])
def test_an_argument_without_use(fun, around):
    step = around(functools.partial(as_one, fun))
    args = given()
    if around is jax.pmap:
        args = [jnp.broadcast_to(x, (8,)) for x in args]
    for one, other in zip(
        jax.tree.leaves(step(*args)), jax.tree.leaves(fun(*args)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_an_argument_that_xla_finds_to_be_constant():
    """It then has no use in what is compiled as one."""

    def fun(x, n):
        return as_one(lambda x, never: (x + 1, never | (x > 5)), x, n - n > 0)

    more, over = jax.jit(fun)(jnp.float32(4), jnp.int32(7))
    assert (more, bool(over)) == (5, False)


def test_what_the_types_do_not_show_to_be_cut():
    """With `in_shardings` XLA alone knows. For several devices there is no loop."""
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    cut, whole = (jax.NamedSharding(mesh, jax.P(*p)) for p in (("x",), ()))
    tx = clipx.zclip(scope="leaf")
    grads = {str(i): jnp.ones(8) * (i + 1) for i in range(8)}
    state = tx.init(grads)
    shardings = jax.tree.map(lambda x: cut if x.size % 8 == 0 else whole, state)
    step = jax.jit(lambda g, s: tx.update(g, s), in_shardings=(cut, shardings))
    found, _ = step(grads, state)
    for name, x in grads.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-6)


@pytest.mark.parametrize("size", [FEW // 2 - 1, FEW // 2, 8192])
def test_what_is_closed_over_is_few_numbers_too(size):
    table = jnp.arange(float(size)).reshape(-1, 1)

    def fun(x, other):
        return as_one(lambda x: x * jnp.max(jnp.sum(table, 1)) + jnp.mean(other), x)

    x, other = jnp.float32(2), jnp.ones(size)
    assert is_in_a_loop(fun, x, other) == (size < FEW // 2)
    np.testing.assert_allclose(jax.jit(fun)(x, other), 2 * size - 1, rtol=1e-5)


def test_an_array_of_unknown_size_may_be_closed_over():
    (n,) = jax.export.symbolic_shape("n")

    def fun(x, other):
        return as_one(lambda x: x + jnp.max(other * 2), x)

    exported = jax.export.export(jax.jit(fun))(
        jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.float32)
    )
    assert exported.call(jnp.float32(1), jnp.arange(4.0)) == 7


def test_a_step_on_cpu_has_few_kernels_more_than_with_optax():
    """Counted as XLA compiles them: what a loop holds is one."""

    def kernels(clipper):
        tx = optax.chain(clipper, optax.adam(1e-3))
        params = [jnp.ones((64, 64)), jnp.ones(64)]
        with jax.numpy_dtype_promotion("standard"):
            step = jax.jit(tx.update).lower(params, tx.init(params), params)
        text = step.compile(OWN).as_text()
        return text[text.index("ENTRY ") :].count(" fusion(") + text.count(" call(")

    optax_has = kernels(optax.clip_by_global_norm(1.0))
    assert kernels(clipx.clip_by_global_norm(1.0)) <= optax_has + 4
    assert kernels(clipx.zclip()) <= optax_has + 4
