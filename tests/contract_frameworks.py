"""The contract in frameworks: the same parameters as by hand, held by each of them."""

import dataclasses
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from contract_base import (
    SHAPES,
    assert_close,
    first_params,
    gradients,
    same,
    stacked,
    train,
    trainer,
)
from flax import nnx
from flax.training.train_state import TrainState


class NnxModel(nnx.Module):
    def __init__(self, params):
        self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        nnx.update(self, nnx_state(self, params))


def nnx_state(model, tree):
    """A tree as the parameters of the model."""
    graph = nnx.state(model, nnx.Param)
    pure = nnx.to_pure_dict(graph)
    assert jax.tree.structure(pure) == jax.tree.structure(tree)
    nnx.replace_by_pure_dict(graph, tree)
    return graph


def nnx_values(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def nnx_pair(make):
    model = NnxModel(first_params())
    return model, nnx.Optimizer(model, trainer(make), wrt=nnx.Param)


def nnx_optimizer(make):
    model, optimizer = nnx_pair(make)
    found = []
    for g in gradients():
        optimizer.update(model, nnx_state(model, g))
        found.append(nnx_values(model))
    return found


def nnx_jit(make):
    model, optimizer = nnx_pair(make)

    @nnx.jit
    def step(model, optimizer, grads):
        optimizer.update(model, grads)

    found = []
    for g in gradients():
        step(model, optimizer, nnx_state(model, g))
        found.append(nnx_values(model))
    return found


def nnx_scan(make):
    model, optimizer = nnx_pair(make)
    grads = [nnx_state(model, g) for g in gradients()]

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def steps(both, grads):
        model, optimizer = both
        optimizer.update(model, grads)
        return both, nnx_values(model)

    _, found = steps((model, optimizer), stacked(grads))
    return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(grads))]


def nnx_split(make):
    model, optimizer = nnx_pair(make)

    @jax.jit
    def step(graph, state, grads):
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, grads)
        return nnx.split((model, optimizer))[1]

    graph, state = nnx.split((model, optimizer))
    found = []
    for g in gradients():
        state = step(graph, state, nnx_state(model, g))
        found.append(nnx_values(nnx.merge(graph, state)[0]))
    return found


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="out")(nn.Dense(3, name="dense")(x))


def linen_train_state(make):
    model = LinenModel()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4)))
    assert jax.tree.structure(shapes["params"]) == jax.tree.structure(first_params())
    state = TrainState.create(
        apply_fn=model.apply, params=first_params(), tx=trainer(make)
    )
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    found = []
    for g in gradients():
        state = step(state, g)
        found.append(state.params)
    return found


class EqxModel(eqx.Module):
    dense: eqx.nn.Linear
    out: eqx.nn.Linear
    activation: Any

    def values(self):
        layers = {"dense": self.dense, "out": self.out}
        return {
            name: {"kernel": layer.weight.T, "bias": layer.bias}
            for name, layer in layers.items()
        }


def eqx_model(tree):
    def layer(values):
        shape = values["kernel"].shape
        blank = eqx.nn.Linear(*shape, key=jax.random.key(0))
        where = (values["kernel"].T, values["bias"])
        return eqx.tree_at(lambda m: (m.weight, m.bias), blank, where)

    return EqxModel(layer(tree["dense"]), layer(tree["out"]), jnp.tanh)


def equinox(make):
    tx = trainer(make)
    model = eqx_model(first_params())
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, grads):
        kept = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(eqx.filter(grads, eqx.is_inexact_array), state, kept)
        return eqx.apply_updates(model, updates), state

    found = []
    for g in gradients():
        model, state = step(model, state, eqx_model(g))
        found.append(model.values())
    # Its kernels lie the other way round, which units of neurons notice.
    start, *grads = map(turned, [first_params(), *gradients()])
    assert_close(found, map(turned, train(trainer(make), start, grads)[0]))


def turned(tree):
    return {n: {"kernel": v["kernel"].T, "bias": v["bias"]} for n, v in tree.items()}


def equinox_unfiltered(make):
    """The module with its activation function: an error that says what to do."""
    model = eqx_model(first_params())
    tx = make()
    with pytest.raises(TypeError, match=r"filter"):
        tx.update(model, tx.init(model), model)


def haiku(make):
    def forward(x):
        return hk.Linear(2, name="out")(hk.Linear(3, name="dense")(x))

    model = hk.without_apply_rng(hk.transform(forward))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4)))

    def named(tree):
        return {
            module: {"w": layer["kernel"], "b": layer["bias"]}
            for module, layer in tree.items()
        }

    params = named(first_params())
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    tx = trainer(make)
    found, _ = train(tx, params, map(named, gradients()), jax.jit(tx.update))
    return [
        {n: {"kernel": v["w"], "bias": v["b"]} for n, v in tree.items()}
        for tree in found
    ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any
    unused: Any = None


def plain_pytrees(make):
    """Dataclasses in a list, with None among the leaves."""

    def listed(tree):
        layers = [Layer(tree[name]["kernel"], tree[name]["bias"]) for name in SHAPES]
        return {"layers": layers, "nothing": None}

    tx = trainer(make)
    grads = map(listed, gradients())
    found, _ = train(tx, listed(first_params()), grads, jax.jit(tx.update))
    return [
        {
            name: {"kernel": layer.kernel, "bias": layer.bias}
            for name, layer in zip(SHAPES, tree["layers"], strict=True)
        }
        for tree in found
    ]


FRAMEWORKS = {
    "NNX Optimizer": same(nnx_optimizer),
    "nnx.jit": same(nnx_jit),
    "nnx.scan": same(nnx_scan),
    "nnx.split": same(nnx_split),
    "Linen TrainState": same(linen_train_state),
    "Equinox": equinox,
    "Equinox, unfiltered": equinox_unfiltered,
    "Haiku": same(haiku),
    "dataclasses, lists, None": same(plain_pytrees),
}
