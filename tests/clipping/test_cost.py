"""What a compiled step moves, holds and is made of: a guard that needs no clock.

Bytes are XLA's count for CPU, in units of the gradients' size. It counts the pass in
the branch for norms out of range as well, which usual steps do not take.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from versions import FUSED
from xla_settings import OWN

import optax_clipx as clipx

SHAPE, LEAVES = (256, 64), 4


class Cost:
    """A step of Adam behind a clipper, compiled for so many equal leaves."""

    def __init__(self, clipper, leaves):
        tx = optax.chain(clipper, optax.adam(1e-3))
        kinds = [jax.ShapeDtypeStruct(SHAPE, jnp.float32)] * leaves
        state = jax.eval_shape(tx.init, kinds)

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        with jax.numpy_dtype_promotion("standard"):
            lowered = jax.jit(step, donate_argnums=(0, 1)).lower(kinds, state, kinds)
            compiled = lowered.compile(OWN)
        memory, self.text = compiled.memory_analysis(), compiled.as_text()
        size = 4 * leaves * SHAPE[0] * SHAPE[1]
        self.moved = compiled.cost_analysis()["bytes accessed"] / size
        self.held = memory.temp_size_in_bytes
        self.kept = memory.argument_size_in_bytes - memory.alias_size_in_bytes
        self.fusions = self.text.count(" fusion(")
        self.kernels = len(set(map(anonymous, loops(self.text))))
        self.lines = len(lowered.as_text().splitlines())


def loops(text):
    """What XLA compiles to machine code, one computation each."""
    return re.findall(r"^%(?:fused|wrapped).*?^\}", text, re.MULTILINE | re.DOTALL)


def anonymous(computation):
    """Without names, and what they were made from: of equal ones XLA compiles one."""
    plain = re.sub(r", metadata=\{[^}]*\}", "", computation)
    return re.sub(r"%[\w.\-]+|param_[\w.]+", "%", plain)


@functools.cache
def cost(name, leaves=LEAVES):
    return Cost(CLIPPERS[name](), leaves)


def by_parity(path, leaf):
    return int(path[0]) % 2


CLIPPERS = {
    "none": optax.identity,
    "tree": lambda: clipx.clip_by_global_norm(1.0),
    "tree, metrics=False": lambda: clipx.clip_by_global_norm(1.0, metrics=False),
    "group": lambda: clipx.clip_by_group_norm({0: 1.0, 1: 1.0}, by_parity),
    "leaf": lambda: clipx.clip_by_leaf_norm(1.0),
    "zclip": clipx.zclip,
    "agc": lambda: clipx.adaptive_grad_clip(0.01),
    "element": lambda: clipx.clip(0.1),
    "element, metrics=False": lambda: clipx.clip(0.1, metrics=False),
    "optax": lambda: optax.clip_by_global_norm(1.0),
}
PASSES = {  # over the gradients' size; twice, for the branch
    "tree": 1,
    "tree, metrics=False": 1,
    "group": 1,
    "leaf": 1,
    "zclip": 1,
    "agc": 2,
    "element": 3,
    "element, metrics=False": 0,
}


@FUSED
@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", PASSES)
def test_a_step_reads_the_gradients_once_more(name):
    added = cost(name).moved - cost("none").moved
    assert added < 2 * PASSES[name] + (0.7 if name == "agc" else 0.02)


@FUSED
@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", PASSES)
def test_nothing_of_a_leafs_size_is_held_beside_it(name):
    leaf = 4 * SHAPE[0] * SHAPE[1]
    assert cost(name).held - cost("none").held < leaf / 2
    assert cost(name).kept == pytest.approx(cost("none").kept, abs=256)


@FUSED
@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "make",
    [
        lambda: clipx.clip(0.1),
        lambda: clipx.clip(0.1, nonfinite="sanitize"),
        lambda: clipx.clip_by_global_norm(1.0, nonfinite="sanitize"),
        clipx.clip_by_second_moment,
        lambda: clipx.mixed_clip(1.0),
        clipx.scale_by_acclip,
        clipx.scale_by_stable_adam,
    ],
    ids=lambda make: "",
)
def test_nothing_computed_of_large_leaves_is_held(make):
    """And what is remembered of each entry is written in place."""
    tx = optax.chain(make(), optax.scale(-1.0))
    kinds = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * 4
    state = jax.eval_shape(tx.init, kinds)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(kinds, state, kinds)
    compiled = lowered.compile(OWN)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * kinds[0].size / 3


def test_clamping_without_metrics_costs_nothing():
    assert cost("element, metrics=False").moved == cost("none").moved
    assert cost("element, metrics=False").fusions == cost("none").fusions


def test_optax_writes_the_clipped_gradients_and_holds_them():
    # What the bounds above are to be compared with; if this fails, optax got better.
    assert cost("optax").moved - cost("none").moved > 4
    assert cost("optax").held > 4 * LEAVES * SHAPE[0] * SHAPE[1]


@FUSED
@pytest.mark.parametrize("name", ["tree", "leaf", "zclip"])
def test_a_leaf_adds_two_fusions(name):
    def a_leaf(name):
        return (cost(name, 2 * LEAVES).fusions - cost(name).fusions) / LEAVES

    # One of them in the branch. Of leaves by themselves, their limits are scalars more.
    assert a_leaf(name) - a_leaf("none") <= (2 if name != "leaf" else 3)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["tree", "group", "leaf", "zclip", "agc"])
def test_leaves_of_one_shape_are_compiled_once(name):
    assert cost(name).kernels < cost(name).fusions
    # A vector of other length may be cut in other pieces.
    assert cost(name, 2 * LEAVES).kernels - cost(name).kernels < LEAVES


@FUSED
@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("scope", "shape"), [("tree", (512, 512)), ("unit", (64, 2**16))]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_narrow_leaf_is_not_stored_wide(dtype, scope, shape):
    """Beside a float64 leaf a float32 one is narrow as well."""
    measure = {
        "tree": clipx.measures.tree_norm(),
        "unit": clipx.measures.unit_norms(axis=0),
    }[scope]
    with jax.enable_x64(dtype == "float32"):
        kinds = [jax.ShapeDtypeStruct(shape, dtype)] * 3
        if dtype == "float32":
            kinds.append(jax.ShapeDtypeStruct((8,), jnp.float64))
        step = jax.jit(clipx.clip_by(measure, 1.0).update, donate_argnums=0)
        compiled = step.lower(kinds).compile(OWN)
    leaf = jnp.dtype(dtype).itemsize * shape[0] * shape[1]
    # Units take some vectors of all norms, together a leaf or so here.
    bound = leaf if scope == "tree" else 2 * leaf
    assert compiled.memory_analysis().temp_size_in_bytes < bound


def test_few_long_rows_are_added_in_loops_and_not_reduced():
    """A reduction of such units takes XLA for CPU 30 times as long."""
    kinds = [jax.ShapeDtypeStruct((4, 2**8, 2**8), jnp.float32)]
    step = jax.jit(lambda grads: clipx.measures.unit_norms(axis=0)(grads))
    text = step.lower(kinds).compile(OWN).as_text()
    assert "f32[1,256,256]" in text
    assert not re.findall(r"f32\[1?,?256,256\]\S* reduce\(", text)


def test_few_long_rows_are_not_derived_row_by_row():
    """Each row's derivative would be padded to the size of the leaf."""
    total = jax.grad(lambda x: jnp.sum(clipx.measures.unit_norms(axis=0)([x])[0]))
    text = jax.jit(total).lower(jax.ShapeDtypeStruct((4, 2**16), jnp.float32)).as_text()
    assert "stablehlo.pad" not in text


@pytest.mark.one_in(2, rest="slow")
@pytest.mark.parametrize("scope", ["tree", "group"])
def test_no_loop_adds_up_all_leaves(scope):
    """XLA would look for it in a time that grows with the square of the leaves."""

    def largest(leaves):
        kinds = [jax.ShapeDtypeStruct((64,), jnp.float32)] * leaves
        step = jax.jit(lambda grads: CLIPPERS[scope]().update(grads)[0])
        found = loops(step.lower(kinds).compile(OWN).as_text())
        return max(len(loop.splitlines()) for loop in found)

    assert largest(200) <= largest(100) < 200


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "lines"), [("tree", 8), ("leaf", 18), ("agc", 25), ("optax", 14)]
)
def test_a_leaf_is_a_few_lines_of_the_traced_program(name, lines):
    def a_leaf(name):  # one more of many
        many, more = (cost(name, n * LEAVES).lines for n in (3, 4))
        return (more - many) / LEAVES

    assert a_leaf(name) - a_leaf("none") <= lines
