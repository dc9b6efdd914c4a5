"""The contract inside optax's wrappers, and before every optimizer of optax."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contract_base import (
    RATE,
    assert_close,
    by_hand,
    first_params,
    gradients,
    same,
    train,
    trainer,
)

import optax_clipx as clipx


def chained(make):
    tx = optax.chain(make(), optax.sgd(RATE))
    return train(tx, first_params(), gradients(), jax.jit(tx.update))[0]


def named(make):
    tx = optax.named_chain(("clip", make()), ("sgd", optax.sgd(RATE)))
    found, state = train(tx, first_params(), gradients(), jax.jit(tx.update))
    assert "clip" in state
    return found


def finite_only(make):
    """`apply_if_finite`, with a NaN between the steps that it leaves out."""
    tx = optax.apply_if_finite(trainer(make), 3)
    grads = gradients()
    spoiled = jax.tree.map(lambda g: g * jnp.nan, grads[0])
    grads.insert(2, spoiled)
    found, _ = train(tx, first_params(), grads, jax.jit(tx.update))
    assert_close(found[1:2], found[2:3], rtol=0, atol=0)
    return found[:2] + found[3:]


def accumulated(make):
    """`MultiSteps`, each gradient in two unequal halves."""
    tx = optax.MultiSteps(trainer(make), every_k_schedule=2)
    halves = [
        jax.tree.map(lambda g, part=part: g * part, grads)
        for grads in gradients()
        for part in (0.5, 1.5)
    ]
    return train(tx, first_params(), halves, jax.jit(tx.update))[0][1::2]


def part(tree):
    return {"dense": tree["dense"]}


def masked(make):
    """Half of the model is clipped as if it were all there is."""
    mask = {"dense": True, "out": False}
    tx = optax.chain(optax.masked(make(), mask), optax.sgd(RATE))
    found, _ = train(tx, first_params(), gradients(), jax.jit(tx.update))
    compare_parts(make, found)


def partitioned(make):
    """`partition`: the rest is frozen."""
    labels = {"dense": "clipped", "out": "frozen"}
    tx = optax.partition(
        {"clipped": trainer(make), "frozen": optax.set_to_zero()}, labels
    )
    found, _ = train(tx, first_params(), gradients(), jax.jit(tx.update))
    compare_parts(make, found)
    frozen = [{"out": tree["out"]} for tree in found]
    assert_close(frozen, [{"out": first_params()["out"]}] * len(found), 0, 0)


def compare_parts(make, found):
    alone = trainer(make)
    wanted, _ = train(alone, part(first_params()), map(part, gradients()))
    assert_close([part(tree) for tree in found], wanted)


def looking_ahead(make):
    """`lookahead`: after a period of two the fast parameters are the slow ones."""
    tx = optax.lookahead(trainer(make), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(first_params())
    state, found = tx.init(params), []
    step = jax.jit(tx.update)
    for g in gradients()[:2]:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params.fast)
    fast = by_hand(make)[:2]
    middle = jax.tree.map(lambda x, y: (x + y) / 2, first_params(), fast[1])
    assert_close(found, [fast[0], middle])


def schedule_free(make):
    """Its gradient descent is that of the clipped gradients: z walks as by hand.

    Methods that look at the parameters are shown those where the gradient was taken.
    """
    tx = optax.contrib.schedule_free(trainer(make), RATE, b1=0.9)
    params = first_params()
    state, alone = tx.init(params), make()
    clip_state, z = alone.init(params), params
    step = jax.jit(tx.update)
    for g in gradients():
        clipped, clip_state = alone.update(g, clip_state, params)
        z = jax.tree.map(lambda z, u: z - RATE * u, z, clipped)
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
        assert_close([state.z], [z], rtol=1e-5, atol=1e-5)


def before(optimizer):
    """A context: an optimizer gives the updates for gradients clipped by hand."""
    return lambda make: compare_updates(compiled(make()), optimizer)


def compiled(tx):
    """The same transformation, compiled once for all optimizers that follow it."""
    update = jax.jit(tx.update)
    return optax.GradientTransformationExtraArgs(
        tx.init, lambda updates, state, params=None, **_: update(updates, state, params)
    )


def compare_updates(clipper, optimizer):
    tx = optax.chain(clipper, optimizer)
    params = first_params()
    state = tx.init(params)
    clip_state, own = clipper.init(params), optimizer.init(params)
    for g in gradients()[:3]:
        clipped, clip_state = clipper.update(g, clip_state, params)
        wanted, own = updated(optimizer, clipped, own, params)
        updates, state = updated(tx, g, state, params)
        assert_close([updates], [wanted], rtol=1e-6, atol=0)
        params = optax.apply_updates(params, updates)


def updated(tx, grads, state, params):
    """An update; line searches and Polyak's step look at the loss, a bowl."""
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return tx.update(grads, state, params)
    return tx.update(grads, state, params, obj_fn=bowl, **for_search(grads, params))


def bowl(params):
    return optax.tree.vdot(params, params) / 2


def for_search(grads, params):
    return {"value": bowl(params), "grad": grads, "value_fn": bowl}


def for_sam(grads, params):
    return {"grad_fn": lambda params, step: jax.grad(bowl)(params)}


def for_plateau(grads, params):
    return {"value": jnp.float32(1.0)}


def compiled_with(optimizer, extra_of):
    """An optimizer that asks for more, compiled once for all that is before it."""
    step = jax.jit(lambda u, s, p, g: optimizer.update(u, s, p, **extra_of(g, p)))
    names = set(extra_of(first_params(), first_params()))

    def update(updates, state, params=None, **extra):
        assert set(extra) == names  # what the caller passed, and no more
        return step(updates, state, params, extra.get("grad", updates))

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def with_arguments(optimizer, extra_of):
    """A context: an optimizer that asks for more, alone and inside of wrappers."""
    optimizer = compiled_with(optimizer, extra_of)

    def cell(make):
        clipper = compiled(make())
        for wrap in (lambda tx: tx, clipx.skip_spikes, clipx.track_norms):
            tx = wrap(optax.chain(clipper, optimizer))
            params = first_params()
            state = tx.init(params)
            clip_state, own = clipper.init(params), optimizer.init(params)
            for g in gradients()[:3]:
                extra = extra_of(g, params)
                clipped, clip_state = clipper.update(g, clip_state, params)
                wanted, own = optimizer.update(clipped, own, params, **extra)
                updates, state = tx.update(g, state, params, **extra)
                assert_close([updates], [wanted], rtol=1e-6, atol=0)
                params = optax.apply_updates(params, updates)

    return cell


def every_optimizer():
    """Each optimizer in optax's and optax.contrib's public lists, by its name."""
    found = {}
    for module in (optax, optax.contrib):
        for name in sorted(vars(module)):
            make = getattr(module, name)
            if name.startswith("_") or not inspect.isfunction(make):
                continue
            parameters = inspect.signature(make).parameters
            if "learning_rate" not in parameters:
                continue
            needed = [
                p.name
                for p in parameters.values()
                if p.default is p.empty and p.kind is not p.VAR_KEYWORD
            ]
            found[name] = (make, needed)
    return found


def injected(make):
    """`inject_hyperparams` around a factory: a schedule sets the learning rate."""

    def factory(learning_rate):
        return optax.chain(make(), optax.sgd(learning_rate))

    tx = optax.inject_hyperparams(factory)(optax.constant_schedule(RATE))
    found, state = train(tx, first_params(), gradients(), jax.jit(tx.update))
    assert np.isclose(float(state.hyperparams["learning_rate"]), RATE)
    assert clipx.metrics(state) is not None
    return found


# What an optimizer needs beside a learning rate, and why one is left out.
FURTHER = {"noisy_sgd": {"key": 0}, "lbfgs": {"linesearch": None}}
LEFT_OUT = {
    "dpsgd": "its gradients have an axis of examples",
    "optimistic_adam": "deprecated; optimistic_adam_v2 is there",
    "schedule_free": "a wrapper, with a cell of its own",
}


def before_every_optimizer(make):
    clipper = compiled(make())
    for name, (factory, needed) in every_optimizer().items():
        if name in LEFT_OUT:
            continue
        options = {"learning_rate": RATE} if "learning_rate" in needed else {}
        try:
            compare_updates(clipper, factory(**options, **FURTHER.get(name, {})))
        except Exception as error:
            error.add_note(f"before optax's {name}")
            raise


OPTAX = {
    "chain": same(chained),
    "named_chain": same(named),
    "masked": masked,
    "partition": partitioned,
    "MultiSteps": same(accumulated),
    "apply_if_finite": same(finite_only),
    "inject_hyperparams": same(injected),
    "lookahead": looking_ahead,
    "schedule_free": schedule_free,
    "lbfgs": with_arguments(optax.lbfgs(RATE), for_search),
    "zoom line search": with_arguments(
        optax.chain(
            optax.sgd(1.0), optax.scale_by_zoom_linesearch(max_linesearch_steps=15)
        ),
        for_search,
    ),
    "backtracking line search": with_arguments(
        optax.chain(
            optax.sgd(1.0),
            optax.scale_by_backtracking_linesearch(max_backtracking_steps=15),
        ),
        for_search,
    ),
    "sam": with_arguments(
        optax.contrib.sam(
            optax.sgd(RATE),
            optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
            opaque_mode=True,
        ),
        for_sam,
    ),
    "reduce_on_plateau": with_arguments(
        optax.chain(
            optax.sgd(RATE), optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
        ),
        for_plateau,
    ),
    "before muon": before(optax.contrib.muon(RATE)),
    "before each optimizer": before_every_optimizer,
}
